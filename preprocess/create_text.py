"""Makes lra-text: `python preprocess/create_text.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-text")
