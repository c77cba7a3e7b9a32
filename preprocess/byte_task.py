"""What lra-text, lra-news1 and lra-yelp1 share: a text and a label each, no published dev set."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocess import routing, tfds_source, writer
from preprocess.bytes_encoder import encode_bytes

# (split, where it stands for messages, raw text, label)
Example = tuple[str, str, bytes, int]


@dataclass(frozen=True)
class ByteTask:
    """One task's facts and its reader.

    Attributes:
        max_ids, length: bytes kept and padded length of the model.
        tfds_name, tfds_text, tfds_labels: prepared data set, its feature with the text, and the
            names of its labels from 0.
        download: file that download.py leaves, read if nothing else is named.
        read_source: (source, router, skips) -> examples of the original files.
        empty_is_broken: an empty text is an error; False: it is kept, padding only, as TFDS does.
    """

    name: str
    description: str
    max_ids: int
    length: int
    tfds_name: str
    tfds_text: str
    tfds_labels: tuple[str, ...]
    download: Path
    source_help: str
    read_source: Callable[[Path, routing.Router, writer.Skips], Iterator[Example]]
    empty_is_broken: bool


def run(task: ByteTask) -> None:
    """The body of a create script: options, source, pickles, report."""
    parser = argparse.ArgumentParser(
        description=task.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    routing.add_source_options(parser, task.source_help, task.tfds_name)
    routing.add_dev_option(parser)
    writer.add_common_options(parser, seed="--dev_from_train", workers=False)
    args = parser.parse_args()
    kind, place = routing.choose_source(args, task.name, task.tfds_name, task.download)
    router = routing.router_of(args, len(task.tfds_labels))
    skips = writer.Skips(args.on_error)
    if kind == "tfds":
        examples = _read_tfds(task, place, router)
    else:
        examples = task.read_source(place, router, skips)
    write(task, examples, router, skips, args.output_dir)


def write(
    task: ByteTask,
    examples: Iterator[Example],
    router: routing.Router,
    skips: writer.Skips,
    output_dir: Path,
) -> None:
    """Encode and stream the examples to their pickles; reports what was skipped or is unusual."""
    empty = not_utf8 = 0
    with (
        routing.open_splits(output_dir, task.name, router) as writers,
        writer.progress(None, task.name) as bar,
    ):
        for split, where, text, label in examples:
            if not text and task.empty_is_broken:
                skips.skip(where, "the text is empty")
                continue
            target = router.route(split, label)
            if target is None:
                continue
            empty += not text
            not_utf8 += not _is_utf8(text)
            ids = encode_bytes(text, max_ids=task.max_ids, length=task.length)
            writers[target].add(input_ids_0=ids, label=np.int64(label))
            bar.update()
    skips.report()
    if empty:
        print(f"{empty:,} texts are empty and kept, as in the reference: padding only")
    if not_utf8:
        print(f"{not_utf8:,} texts are not valid UTF-8: their bytes are kept as they are")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_tfds(task: ByteTask, folder: Path, router: routing.Router) -> Iterator[Example]:
    for split in ("train", "test"):
        rows = tfds_source.read(
            folder, split, (task.tfds_text, "label"), labels={"label": task.tfds_labels}
        )
        for number, row in enumerate(rows):
            if router.full(split):
                break
            yield split, f"{folder} {split} {number}", row[task.tfds_text], int(row["label"])
