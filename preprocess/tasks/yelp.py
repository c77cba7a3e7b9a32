r"""lra-yelp1: Yelp reviews as bytes, positive (1) or negative (0).

    python preprocess/create_yelp.py
    python preprocess/create_yelp.py --source yelp_review_polarity_csv.tgz

The file's escapes stay as they are: \n is two characters, "" is two quotes. Source: docs/data.md,
"lra-yelp1".
"""

import csv
import re
from collections.abc import Iterator
from typing import BinaryIO

from preprocess import encode, sources
from preprocess.driver import Task

CLASSES = ("1", "2")
ROW = re.compile(r'"(\d+)","(.*)"')
# neither white space nor a byte of a multi-byte character: nothing to strip
PLAIN = re.compile(r"[!-~](?:.*[!-~])?")


def read_rows(file: BinaryIO, where: str, skips) -> Iterator[tuple[str, list[str]]]:
    """(where, [class, text]) of each line as TFDS reads it: what the quotes hold, stripped."""
    for number, line in enumerate(sources.lines(file, where), start=1):
        line = line.removesuffix("\n")
        row_where = f"{where}, line {number}"
        match = ROW.fullmatch(line)
        if not line:
            skips.skip(row_where, "blank line")
        elif match is None:
            skips.skip(row_where, 'not of the form "1","text" or "2","text"')
        elif '","' in match[2] and _columns(line) != 2:
            skips.skip(row_where, "not two columns")
        else:
            text = match[2]
            yield row_where, [match[1], text if PLAIN.fullmatch(text) else _stripped(text)]


def _columns(line: str) -> int:
    try:
        return len(next(csv.reader([line])))
    except csv.Error:
        return 0


def _stripped(text: str) -> str:
    """A latin-1 view of UTF-8 without Unicode white space at the ends, which TFDS strips."""
    data = text.encode("latin-1").decode(errors="surrogateescape").strip()
    return data.encode(errors="surrogateescape").decode("latin-1")


TASK = Task(
    name="lra-yelp1",
    description=__doc__,
    classes=CLASSES,
    length=1024,
    any_length=True,
    counts={"train": 560_000, "test": 38_000},
    encoder=encode.text(max_ids=1000),
    sources=(
        sources.Parquet("text", CLASSES),
        sources.Csv(
            {"train": "train.csv", "test": "test.csv"},
            text=("text",),
            label=("label",),
            labels=CLASSES,
            columns=("label", "text"),
            folder="yelp_review_polarity_csv",
            rows=read_rows,
        ),
    ),
    tfds=sources.Tfds("yelp_polarity_reviews", "text", CLASSES),
    places=("yelp_review_polarity_csv.tgz", "yelp_review_polarity_csv"),
    fetch="yelp_review_polarity_csv.tgz",
)
