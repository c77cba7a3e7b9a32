"""lra-image: CIFAR-10 as gray values, from TFDS, the original archives or folders of pictures.

    python preprocess/create_cifar10.py
    python preprocess/create_cifar10.py --source cifar-10-binary.tar.gz   # or -python, or unpacked
    python preprocess/create_cifar10.py --source cifar10_images.zip       # train/cat/0001.jpg ...

The development set is the last 10 % of the training split in the order of TFDS; of folders of
pictures, the last 10 % of each class by file name; of parquet files, the last 10 % of the rows.
Source: docs/data.md, "lra-image".
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from preprocess import encode, sources
from preprocess.driver import BalancedLimit, Task
from training.data import safe_pickle
from training.errors import UserError

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIDE = 32
PIXELS = SIDE * SIDE
RECORD = 1 + 3 * PIXELS  # of a binary batch: label, red, green and blue plane
PICTURES = (".jpg", ".jpeg", ".png", ".bmp")
MAX_FILE = 1 << 20  # bytes: a 32x32 picture has a few thousand
MAX_BATCH = 1 << 28
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
BATCH = re.compile(r"(?:^|/)(data_batch_\d|test_batch)(?:\.bin)?$")


def encode_picture(payload) -> np.ndarray:
    """Ids of gray values (uint8 [1024]) or of a picture file."""
    isarray = isinstance(payload, np.ndarray)
    return encode.pixels(payload if isarray else encode.picture(payload, _decode, MAX_FILE))


def _decode(image) -> np.ndarray:
    if image.size != (SIDE, SIDE):
        raise sources.Fault("the picture is not 32x32 pixels")
    return encode.gray(np.asarray(image.convert("RGB")))


def tfds_order(split: str, count: int) -> list[int]:
    """Position in the original archive of each example of a prepared TFDS split, in its order: by
    md5 of the split's name and the number. So the archive gives the very same pickles. (Checked:
    the published split begins with train_16399, train_01680, train_47917.)"""
    return sorted(range(count), key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())


def read_batches(job, source: Path) -> Iterator[sources.Example]:
    """The original batches of a folder or archive, in the order of TFDS."""
    found = {}
    for member in sources.files(source, BATCH.search):
        name = BATCH.search(member.name)[1]
        if name not in found:
            try:
                found[name] = read_batch(member.read(MAX_BATCH), member.where)
            except sources.Fault as fault:
                raise UserError(f"{member.where}: {fault}, no CIFAR-10 batch") from None
    missing = [name for name in (*TRAIN_BATCHES, TEST_BATCH) if name not in found]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)} of the original CIFAR-10 batches")
    for split, names in (("train", TRAIN_BATCHES), ("test", (TEST_BATCH,))):
        pixels = np.concatenate([found[name][0] for name in names])
        labels = np.concatenate([found[name][1] for name in names])
        for i in np.flatnonzero(labels >= len(CLASSES)):
            job.skips.skip(f"{source}, {split} picture {i}", "the label is not in 0..9")
        order = np.array(tfds_order(split, len(labels)))
        order = order[labels[order] < len(CLASSES)]
        rows = zip(pixels[order], labels[order].tolist(), strict=True)
        yield from _cut(split, str(source), rows, len(order))


def _cut(split: str, where: str, rows, count: int) -> Iterator[sources.Example]:
    """The first 90 % of train as TFDS cuts train[:90%], the rest as dev."""
    border = round(count * 90 / 100)
    for number, (payload, label) in enumerate(rows):
        target = "dev" if split == "train" and number >= border else split
        yield target, where, payload, label


def read_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Gray values uint8 [n, 1024] and labels uint8 [n] of a batch, in either published form."""
    if data[:1] == b"\x80":
        batch = safe_pickle.load_value(io.BytesIO(data), where)
        if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
            raise UserError(f"{where} is no CIFAR-10 batch: no data and labels in it")
        planes, labels = batch["data"], batch["labels"]
        if (
            not isinstance(planes, np.ndarray)
            or planes.dtype != np.uint8
            or planes.shape != (len(planes), RECORD - 1)
            or not isinstance(labels, list)
            or not all(type(label) is int for label in labels)
        ):
            raise UserError(f"{where} is no CIFAR-10 batch: not uint8 [n, 3072] and n labels")
        if len(labels) != len(planes):
            raise UserError(f"{where} has {len(planes):,} pictures and {len(labels):,} labels")
        table = np.array([label if 0 <= label < 255 else 255 for label in labels], dtype=np.uint8)
    else:
        if not data or len(data) % RECORD:
            raise UserError(f"{where} has {len(data):,} bytes, not a multiple of {RECORD:,}")
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        planes, table = records[:, 1:], records[:, 0]
    return encode.gray(planes.reshape(-1, 3, PIXELS).transpose(0, 2, 1)), table


class _CutRows:
    """TFDS's or parquet's rows: train is cut when all of it has been read."""

    def read(self, job, source: Path) -> Iterator[sources.Example]:
        for split, rows in itertools.groupby(super().read(job, source), lambda row: row[0]):
            table = [
                (encode.gray(p).reshape(-1) if isinstance(p, np.ndarray) else p, label)
                for _, _, p, label in rows
            ]
            yield from _cut(split, str(source), table, len(table))


class _Tfds(_CutRows, sources.Tfds): ...


class _Parquet(_CutRows, sources.Parquet): ...


def read_pictures(job, source: Path) -> Iterator[sources.Example]:
    """Pictures train/<class>/ and test/<class>/, in a seeded order; dev = the last 10 % of each
    training class."""
    splits, others = list_pictures(source)
    for number, (split, pictures) in enumerate(splits.items()):
        taken = BalancedLimit(job.options.limit, len(CLASSES))
        pictures = [picture for picture in pictures if taken.take(picture[1])]
        # Raw draws keep their sequence in every NumPy, those of its `permutation` may change.
        draws = np.random.PCG64(np.random.SeedSequence([job.options.seed, number]))
        for i in np.argsort(draws.random_raw(len(pictures)), kind="stable"):
            member, label = pictures[i]
            yield split, member.where, member, label
    if others:
        print(f"ignored {others:,} files that are no pictures")


def list_pictures(source: Path) -> tuple[dict[str, list[tuple[sources.Member, int]]], int]:
    """split -> (picture file, label) by class and name; and how many other files there are.
    Raises: UserError if the folders are other ones or hold a picture twice."""
    found: dict[str, dict[str, dict[str, sources.Member]]] = {"train": {}, "test": {}}
    others = 0
    for member in sources.files(source):
        parts = PurePosixPath(member.name).parts
        hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
        if hidden or len(parts) < 3 or not parts[-1].lower().endswith(PICTURES):
            others += 1
            continue
        if parts[-3] not in found:
            raise UserError(f"{source}: {member.name} is not below {{train,test}}/<class>/")
        pictures = found[parts[-3]].setdefault(parts[-2], {})
        if (first := pictures.setdefault(parts[-1], member)) is not member:
            twice = f"{source} holds {'/'.join(parts[-3:])} twice ({first.name}, {member.name})"
            raise UserError(f"{twice}: a copy of the data set lies inside it")
    splits: dict[str, list[tuple[sources.Member, int]]] = {"train": [], "dev": [], "test": []}
    for split, classes in found.items():
        if unknown := sorted(set(classes) - set(CLASSES)):
            raise UserError(f"{source}: {split}/{unknown[0]} is none of {', '.join(CLASSES)}")
        for label, name in enumerate(CLASSES):
            if name not in classes:
                expected = f"expected: {{train,test}}/{{{','.join(CLASSES)}}}/*.jpg or .png"
                raise UserError(f"{source} holds no pictures in {split}/{name} ({expected})")
            pictures = [(member, label) for _, member in sorted(classes[name].items())]
            dev = max(1, len(pictures) // 10) if split == "train" else 0
            splits[split] += pictures[: len(pictures) - dev]
            splits["dev"] += pictures[len(pictures) - dev :]
    return splits, others


def is_batches(source: Path) -> bool:
    """Whether a folder or archive holds the original batches: among its first files."""
    if not source.is_dir() and not sources.is_archive(source):
        return False
    return any(BATCH.search(member.name) for member in itertools.islice(sources.files(source), 20))


TASK = Task(
    name="lra-image",
    description=__doc__,
    classes=CLASSES,
    length=PIXELS,
    counts={"train": 45_000, "dev": 5_000, "test": 10_000},
    splits=("train", "dev", "test"),
    encoder=lambda options: encode_picture,
    sources=(
        sources.Reader("the original batches: folder, tar.gz or zip", read_batches, is_batches),
        _Parquet("img", CLASSES, picture=True, chunk=500),
        sources.Reader(
            "folder or zip of train/<class>/ and test/<class>/ pictures",
            read_pictures,
            chunk=500,
            about="pictures from class folders (JPEG copies have other ids than the originals)",
        ),
    ),
    tfds=_Tfds("cifar10", "image", CLASSES),
    places=("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar-10-batches-bin"),
    fetch="cifar-10-binary.tar.gz",
)
