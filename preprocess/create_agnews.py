"""Makes lra-news1: `python preprocess/create_agnews.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-news1")
