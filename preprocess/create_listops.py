"""Makes lra-listops: `python preprocess/create_listops.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-listops")
