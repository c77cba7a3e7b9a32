"""lra-retrieval: are two papers of the ACL Anthology Network related (1) or not (0), as bytes.

    python preprocess/create_retrieval.py
    python preprocess/create_retrieval.py --source lra_release.gz

The texts of the release look like b'...' with escapes; they are taken as they stand. Source:
docs/data.md, "lra-retrieval".
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from preprocess import encode, sources
from preprocess.driver import Skips, Task
from training.errors import UserError

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "dev": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
EXPECTED = "the LRA release's folder, tsv_data in it, or its archive lra_release.gz"
FOLDER = "tsv_data"
COLUMNS = 5  # label, id1, id2, text1, text2; quotes are ordinary characters
NUMBER = re.compile(rb" *[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)? *")


def read_pairs(job, source: Path) -> Iterator[sources.Example]:
    for split, where, file in sources.named_files(source, FOLDER, FILES):
        for row_where, texts, label in read_rows(file, where, job.skips):
            if job.full(split):
                break
            yield split, row_where, texts, label


def read_rows(
    file: BinaryIO, where: str, skips: Skips
) -> Iterator[tuple[str, tuple[bytes, bytes], int]]:
    """(where, (text1, text2), label) of each row. Rows that stop the reference go to `skips`; a
    missing final line end is fine, except where the last text is a bytes literal without its
    end."""
    for row_where, fields, ended in sources.tsv_rows(file, where, skips, COLUMNS):
        text1, text2 = fields[3:]
        if not all(fields):
            skips.skip(row_where, f"column {fields.index(b'') + 1} is empty")
        elif (label := parse_label(fields[0])) is None:
            skips.skip(row_where, "the label is not 0 or 1")
        elif not ended and text2[:2] in (b"b'", b'b"') and text2[-1:] != text2[1:2]:
            raise UserError(f"{row_where}: the file ends inside a text: it is cut off")
        else:
            yield row_where, (text1, text2), label


@functools.lru_cache(maxsize=64)  # the files have two or three different ones
def parse_label(field: bytes) -> int | None:
    """The label as the reference reads it: a float32 cut to an integer; None if not 0 or 1."""
    if not NUMBER.fullmatch(field):
        return None
    with np.errstate(over="ignore"):
        value = np.float32(field.strip())
    return int(value) if np.isfinite(value) and int(value) in (0, 1) else None


TASK = Task(
    name="lra-retrieval",
    description=__doc__,
    classes=("not related", "related"),
    length=4096,
    any_length=True,
    num_inputs=2,
    counts={"train": 147_086, "dev": 18_090, "test": 17_437},
    splits=("train", "dev", "test"),
    encoder=encode.text(max_ids=4000),
    label_type=np.int32,
    sources=(sources.Reader(EXPECTED, read_pairs),),
    places=("lra_release", "lra_release.gz"),
    whole=functools.partial(sources.has_files, FOLDER, tuple(FILES.values())),
    fetch="lra_release.gz",
)
