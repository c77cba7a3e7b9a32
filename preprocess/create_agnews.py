"""lra-news1: AG News descriptions as bytes; World (0), Sports (1), Business (2), Sci/Tech (3).

    python preprocess/create_agnews.py
    python preprocess/create_agnews.py --source ag_news_csv

The first reads a prepared TFDS ag_news_subset, else what download.py fetched; the second a folder,
tar or tar.gz with train.csv and test.csv. The title is not used.
Source: docs/data.md, "lra-news1".
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import byte_task, csv_lines, routing, sources, writer

CLASSES = ("1", "2", "3", "4")


def read_source(
    source: Path, router: routing.Router, skips: writer.Skips
) -> Iterator[byte_task.Example]:
    """Rows of train.csv and test.csv: class 1..4, title, description."""
    names = {"train": "train.csv", "test": "test.csv"}
    for split, where, file in sources.split_files(source, "ag_news_csv", names):
        for row_where, text, label in read_rows(file, where, skips):
            if router.full(split):
                break
            yield split, row_where, text, label


def read_rows(file: BinaryIO, where: str, skips: writer.Skips) -> Iterator[tuple[str, bytes, int]]:
    """(where, description, label 0..3) of each row; `""` in a field is one quote."""
    quotes, ended = 0, False  # quotes since the last complete row

    def counted():
        nonlocal quotes, ended
        for line in csv_lines.lines(file, where):
            quotes += line.count('"')
            yield line
        ended = True

    rows = csv.reader(counted())
    while True:
        row_where, quotes = f"{where}, line {rows.line_num + 1}", 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            skips.skip(row_where, f"not CSV ({error})")
            continue
        if not row:
            skips.skip(row_where, "blank line")
        elif ended and quotes % 2:
            skips.skip(row_where, "the file ends inside a quoted field: it is cut off")
        elif len(row) != 3:
            skips.skip(row_where, f"{len(row)} columns, expected class, title and description")
        elif row[0].strip() not in CLASSES:
            skips.skip(row_where, "the class is not 1, 2, 3 or 4")
        else:
            yield row_where, row[2].encode("latin-1"), int(row[0]) - 1


TASK = byte_task.ByteTask(
    name="lra-news1",
    description=__doc__,
    max_ids=1000,
    length=1024,
    tfds_name="ag_news_subset",
    tfds_text="description",
    tfds_labels=("World", "Sports", "Business", "Sci/Tech"),
    download=Path("data/ag_news_csv.tar.gz"),
    source_help="folder, tar or tar.gz with train.csv and test.csv",
    read_source=read_source,
    empty_is_broken=False,
)

if __name__ == "__main__":
    sys.exit(writer.main(lambda: byte_task.run(TASK)))
