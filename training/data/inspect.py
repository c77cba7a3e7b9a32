"""What is in a data pickle: counts, lengths, ids, labels, duplicates between splits, and a few
examples.

    python -m training.data.inspect data/lra_processed/lra-image.train.pickle

Reads with training.data.safe_pickle, one example at a time; executes nothing that a file contains.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.data import safe_pickle
from training.errors import UserError

SPLITS = ("train", "dev", "test")
PICTURES = ("lra-image", "lra-nature", "lra-pathfinder")
# ids 1 to 14 in the fixed order of preprocess/create_listops.py (15: unknown, or ] with brackets)
LISTOPS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "MIN", "MAX", "MED", "SM", "?"]
SHOWN_CHARACTERS = 300
MAX_ID = (1 << 20) - 1  # beyond every vocabulary
MAX_SIDE = 1024  # pixels of a picture to show


@dataclass
class Summary:
    """Of one file. Token counts are positions up to the last id other than 0."""

    examples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    array_lengths: Counter[int] = field(default_factory=Counter)
    token_counts: list[int] = field(default_factory=list)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    fingerprints: list[int] = field(default_factory=list)  # 64 bits of the ids of each example
    first: list[dict] = field(default_factory=list)  # examples to show: the first ones


def split_of(path: Path) -> tuple[str, str]:
    """Task and split that a file name stands for.

    Raises:
        UserError: another name than <task>.<split>.pickle.
    """
    parts = path.name.rsplit(".", 2)
    if len(parts) != 3 or parts[1] not in SPLITS or parts[2] != "pickle":
        raise UserError(f"{path}: a data pickle is named <task>.train|dev|test.pickle")
    return parts[0], parts[1]


def summarise(path: Path, num_first: int = 0) -> Summary:
    """One pass over a file.

    Raises:
        UserError: not a data pickle, naming item and reason; OSError: it cannot be read.
    """
    summary = Summary()
    for number, item in enumerate(safe_pickle.iterate(path)):
        if not isinstance(item, dict) or "input_ids_0" not in item or "label" not in item:
            raise UserError(f"{path}: item {number} is no example with input_ids_0 and label")
        digest = hashlib.blake2b(digest_size=8)
        for key in ("input_ids_0", "input_ids_1"):
            if key not in item:
                continue
            ids = item[key]
            if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise UserError(f"{path}: {key} of item {number} is no row of ids")
            if len(ids) and not 0 <= ids.min() <= ids.max() <= MAX_ID:
                raise UserError(
                    f"{path}: {key} of item {number} has ids from {ids.min():,} to {ids.max():,}, "
                    f"not from 0 to at most {MAX_ID:,}"
                )
            counts = np.bincount(ids.astype(np.int64), minlength=len(summary.histogram))
            counts[: len(summary.histogram)] += summary.histogram
            summary.histogram = counts
            used = np.flatnonzero(ids)
            summary.token_counts.append(int(used[-1]) + 1 if len(used) else 0)
            summary.array_lengths[len(ids)] += 1
            digest.update(ids.astype("<i4").tobytes())
        summary.labels[_label(item, number, path)] += 1
        summary.fingerprints.append(int.from_bytes(digest.digest(), "little"))
        if len(summary.first) < num_first:
            summary.first.append(item)
        summary.examples += 1
    return summary


def _label(item: dict, number: int, path: Path) -> int:
    label = item["label"]
    if isinstance(label, np.ndarray) and label.ndim == 0:
        label = label[()]
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        kind = f"array {label.shape}" if isinstance(label, np.ndarray) else type(label).__name__
        raise UserError(f"{path}: the label of item {number} is of type {kind}, not an integer")
    return int(label)


def describe(path: Path, summary: Summary) -> list[str]:
    """Lines for people."""
    if not summary.examples:
        return [f"{path}: no examples"]
    counts = np.array(summary.token_counts)
    low, middle, high = np.percentile(counts, [10, 50, 90]).astype(int)
    used = np.flatnonzero(summary.histogram)
    total = max(1, summary.histogram.sum())
    common = np.argsort(-summary.histogram, kind="stable")[:8]
    common = common[summary.histogram[common] > 0]
    unique = len(set(summary.fingerprints))
    span = f", {used[0]} to {used[-1]}" if len(used) else ""
    lines = [
        f"{path}: {summary.examples:,} examples",
        "array length: " + ", ".join(f"{n:,}" for n in sorted(summary.array_lengths)),
        f"tokens: {counts.min():,} to {counts.max():,}, 10th/50th/90th percentile {low:,}/"
        f"{middle:,}/{high:,}; {(counts == 0).sum():,} without any",
        f"ids: {len(used)} different{span}, {summary.histogram[0] / total:.1%} are 0",
        "most frequent ids: "
        + ", ".join(f"{i} ({summary.histogram[i] / total:.1%})" for i in common),
        "labels: "
        + ", ".join(
            f"{label}: {count:,} ({count / summary.examples:.1%})"
            for label, count in sorted(summary.labels.items())
        ),
        f"duplicates within the file: {summary.examples - unique:,}",
    ]
    return lines


def compare(path: Path, summary: Summary) -> list[str]:
    """How many examples of the file stand in the task's other splits too, as far as they are
    there."""
    task, split = split_of(path)
    lines = []
    for other in SPLITS:
        neighbour = path.with_name(f"{task}.{other}.pickle")
        if other == split or not neighbour.exists():
            continue
        theirs = Counter(summarise(neighbour).fingerprints)
        shared = sum(print_ in theirs for print_ in summary.fingerprints)
        remark = " (all of them)" if shared == summary.examples else ""
        if {split, other} == {"dev", "test"} and theirs == Counter(summary.fingerprints):
            remark = " (dev and test are the same data)"
        lines.append(f"also in {other}: {shared:,} of {summary.examples:,}{remark}")
    return lines


def as_text(task: str, ids: np.ndarray) -> str:
    """An example for reading: bytes as text, ListOps as its tokens."""
    ids = ids[: len(np.trim_zeros(ids, "b"))]
    if task == "lra-listops":
        text = " ".join(LISTOPS[i - 1] if 1 <= i <= 15 else f"<{i}>" for i in ids)
    else:
        text = bytes(min(max(int(i) - 1, 0), 255) for i in ids).decode("utf-8", "replace")
    text = " ".join(text.split())
    return text[:SHOWN_CHARACTERS] + ("..." if len(text) > SHOWN_CHARACTERS else "")


def contact_sheet(examples: list[dict], path: Path) -> None:
    """Writes the pictures of the examples with their labels, 8 a row, enlarged, as a PNG."""
    from PIL import Image, ImageDraw

    num_pixels = len(examples[0]["input_ids_0"])
    side = round(num_pixels**0.5)
    if {len(item["input_ids_0"]) for item in examples} != {
        side * side
    } or not 0 < side <= MAX_SIDE:
        raise UserError(
            f"no picture of the examples: the first has {num_pixels:,} ids, and all need the same "
            f"square of 1 to {MAX_SIDE}"
        )
    cell, margin, text = side * 3, 6, 14
    rows = -(-len(examples) // 8)
    size = (8 * (cell + margin) + margin, rows * (cell + margin + text) + margin)
    sheet = Image.new("L", size, 255)
    draw = ImageDraw.Draw(sheet)
    for index, item in enumerate(examples):
        pixels = item["input_ids_0"].clip(0, 255).astype(np.uint8).reshape(side, side)
        x = margin + index % 8 * (cell + margin)
        y = margin + index // 8 * (cell + margin + text)
        sheet.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + cell), f"label {int(item['label'])}", fill=0)
    try:
        sheet.save(path)
    except ValueError as error:  # of Pillow: an ending it does not know
        raise UserError(f"{path}: {error}") from None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.inspect", description="Says what is in a data pickle."
    )
    parser.add_argument("file", type=Path, help="a <task>.<split>.pickle")
    parser.add_argument("--examples", type=int, default=16, help="how many to show (default: 16)")
    parser.add_argument(
        "--picture",
        type=Path,
        help="PNG of the examples of a picture task (default: <task>.<split>.png here)",
    )
    args = parser.parse_args(argv)
    try:
        task, split = split_of(args.file)
        summary = summarise(args.file, args.examples)
        print("\n".join(describe(args.file, summary) + compare(args.file, summary)))
        if not summary.first:
            return 0
        if task.startswith(PICTURES):
            picture = args.picture or Path(f"{task}.{split}.png")
            contact_sheet(summary.first, picture)
            print(f"the first {len(summary.first)} examples: {picture}")
        else:
            for item in summary.first[:5]:
                for key in ("input_ids_0", "input_ids_1"):
                    if key in item:
                        print(f"label {int(item['label'])}: {as_text(task, item[key])}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
