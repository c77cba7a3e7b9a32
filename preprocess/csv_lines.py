"""Lines of AG News and Yelp CSV files, with every byte kept."""

import io
from collections.abc import Iterator
from typing import BinaryIO

# a longer line is no row of these files; reading it whole could fill the memory
LONGEST_LINE = 1 << 20


def lines(file: BinaryIO, where: str) -> Iterator[str]:
    """Lines as latin-1 text (one character a byte) with CR LF and CR read as a line feed, which is
    how TFDS opens these files.

    Raises: ValueError for a line of more than a million bytes.
    """
    text = io.TextIOWrapper(file, encoding="latin-1", newline=None)  # closes `file` at its end
    number = 0
    while line := text.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and line[-1] != "\n":
            raise ValueError(f"{where}, line {number}: longer than {LONGEST_LINE:,} bytes")
        yield line
