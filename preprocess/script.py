"""What the create scripts do, run as scripts: `python -m preprocess TASK` under another name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(task: str) -> None:
    from preprocess import driver, tasks

    sys.exit(driver.main(tasks.load(task)))
