"""Makes planted: `python preprocess/create_planted.py --help`."""

from script import run

if __name__ == "__main__":
    run("planted")
