"""Makes lra-pathfinder: `python preprocess/create_pathfinder.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-pathfinder")
