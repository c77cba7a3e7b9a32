"""Writes the report of a run, finished or not: one page that needs no network.

python experiments/report.py logs/log-0/lra-image

Every run recorded in LOGDIR or below (NAME.metrics.jsonl with NAME.run.json) gets its
train.NAME.html beside them; a run that ends writes its own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.errors import UserError
from training.recording.page import write_run_page


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logdir", type=Path, help="folder of a run's metrics.jsonl and run.json")
    folder = parser.parse_args(argv).logdir
    try:
        found = sorted(folder.rglob("*.metrics.jsonl"))
        if not found:
            raise UserError(f"there is no NAME.metrics.jsonl in {folder} or below")
        for metrics in found:
            name = metrics.name.removesuffix(".metrics.jsonl")
            page = metrics.with_name(f"train.{name}.html")
            write_run_page(metrics, metrics.with_name(f"{name}.run.json"), page)
            print(page)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
