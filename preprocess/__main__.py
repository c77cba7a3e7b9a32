"""`python -m preprocess TASK`: the create scripts under one name."""

import sys

from preprocess import driver, tasks


def summary(name: str) -> str:
    return tasks.load(name).description.partition("\n")[0].partition(": ")[2]


def main(argv: list[str]) -> int:
    names = "\n".join(f"  {name:16} {summary(name)}" for name in tasks.MODULES)
    text = f"usage: python -m preprocess TASK [--help]\n\nTASK is one of\n{names}"
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(text)
        return 0 if argv else 2
    if argv[0] not in tasks.MODULES:
        print(f"error: {argv[0]} is none of {', '.join(tasks.MODULES)}", file=sys.stderr)
        return 2
    return driver.main(tasks.load(argv[0]), argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
