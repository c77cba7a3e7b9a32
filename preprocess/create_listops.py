"""Makes lra-listops: `python -m preprocess lra-listops --help`."""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import driver
from preprocess.tasks.listops import TASK

if __name__ == "__main__":
    sys.exit(driver.main(TASK))
