"""lra-text: IMDb reviews as bytes, positive (1) or negative (0).

    python preprocess/create_text.py
    python preprocess/create_text.py --source aclImdb.tar.gz

White space at both ends of a review is stripped, as TFDS does (this changes two of the 50,000).
Source: docs/data.md, "lra-text".
"""

import re
from collections.abc import Iterator
from pathlib import Path

from preprocess import encode, sources
from preprocess.driver import Task
from training.errors import UserError

CLASSES = ("neg", "pos")
# names that start with a dot are what macOS adds to archives
REVIEW = re.compile(r"(?:^|/)(train|test)/(neg|pos)/([^/.][^/]*\.txt)$")


def read_reviews(job, source: Path) -> Iterator[sources.Example]:
    """Reviews of the aclImdb folder or archive, in sorted order or the archive's."""
    seen = set()
    for member in sources.files(source, REVIEW.search):
        split, name, _ = REVIEW.search(member.name).groups()
        seen.add((split, name))
        if not job.full(split):
            yield split, member.where, member.read().strip(), CLASSES.index(name)
        elif job.full("train") and job.full("test"):
            return
    for split in ("train", "test"):
        absent = ",".join(name for name in CLASSES if (split, name) not in seen)
        if absent and not job.full(split):
            raise UserError(f"{source} has no reviews in {split}/{{{absent}}}: is it aclImdb?")


TASK = Task(
    name="lra-text",
    description=__doc__,
    classes=CLASSES,
    length=4096,
    any_length=True,
    counts={"train": 25_000, "test": 25_000},
    encoder=encode.text(max_ids=4000, keep_empty=False),
    sources=(
        sources.Parquet("text", CLASSES),
        sources.Reader("the aclImdb folder, or its tar or zip", read_reviews),
    ),
    tfds=sources.Tfds("imdb_reviews/plain_text", "text", CLASSES),
    places=("aclImdb_v1.tar.gz", "aclImdb"),
    fetch="aclImdb_v1.tar.gz",
)
