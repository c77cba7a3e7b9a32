"""lra-retrieval: are two papers of the ACL Anthology Network related (1) or not (0), as bytes.

    python preprocess/create_retrieval.py
    python preprocess/create_retrieval.py --source lra_release.gz

The first reads data/lra_release, where download.py unpacks; the second the archive as it is; the
release's folder or tsv_data in it do as well. The texts of the release look like b'...' with
escapes; they are taken as they stand. Source: docs/data.md, "lra-retrieval".
"""

import argparse
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import routing, sources, writer
from preprocess.bytes_encoder import encode_bytes

TASK = "lra-retrieval"
MAX_IDS, LENGTH = 4000, 4096
FILES = {
    "train": "new_aan_pairs.train.tsv",
    "dev": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
COLUMNS = 5  # label, id1, id2, text1, text2; quotes are ordinary characters
NUMBER = re.compile(rb" *[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)? *")
# a longer line is no pair of papers; reading it whole could fill the memory
LONGEST_LINE = 64 << 20


def read_rows(
    file: BinaryIO, where: str, skips: writer.Skips
) -> Iterator[tuple[bytes, bytes, int]]:
    """(text1, text2, label) of each row.

    Rows that stop the reference go to `skips`: a blank line, an empty field, a stray CR, other
    than five columns, a label that is no number. CR LF and a missing final line end are fine.
    """
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        row_where = f"{where}, line {number}"
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise ValueError(f"{row_where}: longer than {LONGEST_LINE:,} bytes")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        # split() and count() look at every byte in turn, half the time of a row; partition() leaps
        fields = line.split(b"\t", COLUMNS - 2)
        text1, tab, text2 = fields.pop().partition(b"\t")
        fields += [text1, text2] if tab else [text1]
        if not line:
            skips.skip(row_where, "blank line")
        elif b"\r" in line:
            skips.skip(row_where, "a carriage return inside the line")
        elif len(fields) != COLUMNS or b"\t" in text2:
            columns = line.count(b"\t") + 1
            skips.skip(row_where, f"{columns} columns, expected {COLUMNS}")
        elif not all(fields):
            skips.skip(row_where, f"column {fields.index(b'') + 1} is empty")
        elif (label := parse_label(fields[0])) is None:
            skips.skip(row_where, "the label is not 0 or 1")
        else:
            yield text1, text2, label


@functools.lru_cache(maxsize=64)  # the files have two or three different ones
def parse_label(field: bytes) -> int | None:
    """The label as the reference reads it: a float32 cut to an integer; None if not 0 or 1."""
    if not NUMBER.fullmatch(field):
        return None
    with np.errstate(over="ignore"):
        value = np.float32(field.strip())
    return int(value) if np.isfinite(value) and int(value) in (0, 1) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="the LRA release's folder, tsv_data in it, or lra_release.gz "
        "(default: data/lra_release, else data/lra_release.gz)",
    )
    writer.add_common_options(parser, workers=False)
    args = parser.parse_args()
    source = args.source or sources.default_release()
    skips = writer.Skips(args.on_error)
    with writer.open_splits(args.output_dir, TASK, FILES) as writers, routing.measured(writers):
        for split, where, file in sources.split_files(source, "tsv_data", FILES):
            limit = writer.BalancedLimit(args.limit, 2)
            with writer.progress(None, f"{TASK} {split}") as bar:
                for text1, text2, label in read_rows(file, where, skips):
                    if limit.full:
                        break
                    if limit.take(label):
                        writers[split].add(
                            input_ids_0=encode_bytes(text1, max_ids=MAX_IDS, length=LENGTH),
                            input_ids_1=encode_bytes(text2, max_ids=MAX_IDS, length=LENGTH),
                            label=np.int32(label),
                        )
                        bar.update()
    skips.report()


if __name__ == "__main__":
    sys.exit(writer.main(main))
