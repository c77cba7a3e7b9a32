"""Makes lra-retrieval: `python preprocess/create_retrieval.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-retrieval")
