"""Makes lra-nature: `python -m preprocess lra-nature --help`."""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import driver
from preprocess.tasks.nature import TASK

if __name__ == "__main__":
    sys.exit(driver.main(TASK))
