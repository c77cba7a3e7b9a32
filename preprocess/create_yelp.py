"""Makes lra-yelp1: `python preprocess/create_yelp.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-yelp1")
