"""`python -m preprocess TASK`: the create scripts under one name."""

import sys

from preprocess import driver, tasks


def main(argv: list[str]) -> int:
    if argv and argv[0] in tasks.MODULES:
        return driver.main(tasks.load(argv[0]), argv[1:])
    if argv and argv[0] not in ("-h", "--help"):
        print(f"error: {argv[0]} is none of {', '.join(tasks.MODULES)}", file=sys.stderr)
        return 2
    print("usage: python -m preprocess TASK [--help]\n\nTASK is one of")
    for name in tasks.MODULES:
        print(f"  {name:16} {tasks.load(name).description.splitlines()[0].partition(': ')[2]}")
    return 0 if argv else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
