"""Makes lra-nature: `python preprocess/create_inaturalist.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-nature")
