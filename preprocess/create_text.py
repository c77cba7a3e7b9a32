"""lra-text: IMDb reviews as bytes, positive (1) or negative (0).

    python preprocess/create_text.py
    python preprocess/create_text.py --source aclImdb.tar.gz

The first reads a prepared TFDS imdb_reviews, else what download.py fetched; the second the
original archive, or the folder in it. Source: docs/data.md, "lra-text".
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import byte_task, routing, sources, writer

LABELS = {"neg": 0, "pos": 1}
# names that start with a dot are what macOS adds to archives
REVIEW = re.compile(r"(?:^|/)(train|test)/(neg|pos)/([^/.][^/]*\.txt)$")


def read_source(
    source: Path, router: routing.Router, skips: writer.Skips
) -> Iterator[byte_task.Example]:
    """Reviews of the aclImdb folder or archive, in sorted order or the archive's.

    White space at both ends is stripped, as TFDS does (this changes two of the 50,000).
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; expected the aclImdb folder or its tar.gz")
    if source.is_dir():
        files = _folder_files(source, router)
    elif sources.is_archive(source):
        files = _archive_files(source, router)
    else:
        raise ValueError(f"{source} is neither a folder nor a tar archive of aclImdb")
    seen = set()
    for split, name, where, text in files:
        seen.add((split, name))
        yield split, where, text.strip(), LABELS[name]
    for split in ("train", "test"):
        absent = [name for name in LABELS if (split, name) not in seen]
        if absent and not router.full(split):
            raise ValueError(
                f"{source} has no reviews in {split}/{{{','.join(absent)}}}: is it aclImdb?"
            )


def _folder_files(source: Path, router) -> Iterator[tuple[str, str, str, bytes]]:
    base = source / "aclImdb" if (source / "aclImdb").is_dir() else source
    for split in ("train", "test"):
        for name in LABELS:
            folder = base / split / name
            for file_name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if router.full(split):
                    break
                if file_name.endswith(".txt") and not file_name.startswith("."):
                    path = folder / file_name
                    yield split, name, str(path), path.read_bytes()


def _archive_files(source: Path, router) -> Iterator[tuple[str, str, str, bytes]]:
    for member, _, file in sources.archive_members(source):
        match = REVIEW.search(member)
        if match and not router.full(match[1]):
            yield match[1], match[2], f"{source}:{member}", file.read()
        elif router.full("train") and router.full("test"):
            return


TASK = byte_task.ByteTask(
    name="lra-text",
    description=__doc__,
    max_ids=4000,
    length=4096,
    tfds_name="imdb_reviews",
    tfds_text="text",
    tfds_labels=("neg", "pos"),
    download=Path("data/aclImdb_v1.tar.gz"),
    source_help="the aclImdb folder, or its tar or tar.gz",
    read_source=read_source,
    empty_is_broken=True,
)

if __name__ == "__main__":
    sys.exit(writer.main(lambda: byte_task.run(TASK)))
