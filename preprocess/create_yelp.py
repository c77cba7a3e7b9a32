r"""lra-yelp1: Yelp reviews as bytes, positive (1) or negative (0).

    python preprocess/create_yelp.py
    python preprocess/create_yelp.py --source yelp_review_polarity_csv.tgz

The first reads a prepared TFDS yelp_polarity_reviews, else what download.py fetched; the second a
folder, tar or tar.gz with train.csv and test.csv. The file's escapes stay as they are: \n is two
characters, "" is two quotes. Source: docs/data.md, "lra-yelp1".
"""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import byte_task, csv_lines, routing, sources, writer

ROW = re.compile(r'"([12])","(.*)"')
# neither white space nor a byte of a multi-byte character: nothing to strip
PLAIN = re.compile(r"[!-~](?:.*[!-~])?")


def read_source(
    source: Path, router: routing.Router, skips: writer.Skips
) -> Iterator[byte_task.Example]:
    """Lines of train.csv and test.csv: class 1 or 2, text."""
    names = {"train": "train.csv", "test": "test.csv"}
    for split, where, file in sources.split_files(source, "yelp_review_polarity_csv", names):
        for row_where, text, label in read_rows(file, where, skips):
            if router.full(split):
                break
            yield split, row_where, text, label


def read_rows(file: BinaryIO, where: str, skips: writer.Skips) -> Iterator[tuple[str, bytes, int]]:
    """(where, text, label) of each line as TFDS reads it: what is between the quotes, stripped."""
    for number, line in enumerate(csv_lines.lines(file, where), start=1):
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
            yield row_where, _stripped(match[2]), int(match[1]) - 1


def _columns(line: str) -> int:
    try:
        return len(next(csv.reader([line])))
    except csv.Error:
        return 0


def _stripped(text: str) -> bytes:
    """Bytes of a latin-1 view without Unicode white space at the ends, which TFDS strips."""
    data = text.encode("latin-1")
    if PLAIN.fullmatch(text):
        return data
    return data.decode(errors="surrogateescape").strip().encode(errors="surrogateescape")


TASK = byte_task.ByteTask(
    name="lra-yelp1",
    description=__doc__,
    max_ids=1000,
    length=1024,
    tfds_name="yelp_polarity_reviews",
    tfds_text="text",
    tfds_labels=("1", "2"),
    download=Path("data/yelp_review_polarity_csv.tgz"),
    source_help="folder, tar or tar.gz with train.csv and test.csv",
    read_source=read_source,
    empty_is_broken=False,
)

if __name__ == "__main__":
    sys.exit(writer.main(lambda: byte_task.run(TASK)))
