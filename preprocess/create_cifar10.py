"""Makes lra-image: `python preprocess/create_cifar10.py --help`."""

from script import run

if __name__ == "__main__":
    run("lra-image")
