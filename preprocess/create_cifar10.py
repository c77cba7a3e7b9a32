"""lra-image: CIFAR-10 as gray values, from TFDS, the original archives or folders of pictures.

    python preprocess/create_cifar10.py                                   # a prepared TFDS cifar10
    python preprocess/create_cifar10.py --source cifar-10-binary.tar.gz   # or -python, or unpacked
    python preprocess/create_cifar10.py --source cifar10_images.zip       # train/cat/0001.jpg ...

The reference takes the last 10 % of the training split, in the order of TFDS, as development set.
That order is known (`tfds_order`), so the original archives give the very same pickles without
tensorflow. Folders of pictures have no such numbers: there the last 10 % of each class by file
name are the development set. Source: docs/data.md, "lra-image".
"""

import argparse
import functools
import hashlib
import io
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import routing, sources, tfds_source, writer
from training.data import safe_pickle

TASK = "lra-image"
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIDE = 32
PIXELS = SIDE * SIDE
RECORD = 1 + 3 * PIXELS  # of a binary batch: label, red, green and blue plane
PICTURES = (".jpg", ".jpeg", ".png", ".bmp")
MAX_FILE = 1 << 20  # bytes: a 32x32 picture has a few thousand
CHUNK = 500  # pictures per piece of work
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
DOWNLOAD = Path("data/cifar-10-binary.tar.gz")


# ---- gray values --------------------------------------------------------------------------------


def gray(rgb: np.ndarray) -> np.ndarray:
    """Gray values of uint8 [..., 3], uint8 [...]: the reference's, bit by bit.

    In float32, rounded after every step: each channel times 1/255, the weighted sum from left to
    right, times 255.5, truncated. Float64 differs on 237 of all 2^24 colours.
    """
    red, green, blue = (_channel(rgb[..., i], w) for i, w in enumerate((0.2989, 0.5870, 0.1140)))
    red += green
    red += blue
    red *= np.float32(255.5)
    return red.astype(np.uint8)


def _channel(values: np.ndarray, weight: float) -> np.ndarray:
    """A channel's part of the sum: a table of 256 products."""
    table = np.arange(256, dtype=np.float32) * np.float32(1 / 255) * np.float32(weight)
    return table[values]


# ---- TFDS and the original archives: arrays -----------------------------------------------------

Examples = tuple[np.ndarray, np.ndarray]  # gray uint8 [n, 1024], labels uint8 [n]


def tfds_order(split: str, count: int) -> list[int]:
    """Position in the original archive of each example of a prepared TFDS split, in its order.

    TFDS sorts by md5 of the split's name and the example's number. Checked: the published train
    split begins with train_16399, train_01680, train_47917.
    """
    return sorted(range(count), key=lambda i: hashlib.md5(f"{split}{i}".encode()).digest())


def read_tfds(folder: Path) -> dict[str, Examples]:
    splits = {}
    for split in ("train", "test"):
        rows = tfds_source.read(folder, split, ("image", "label"), labels={"label": CLASSES})
        pixels, labels = bytearray(), bytearray()
        for row in rows:
            pixels += gray(row["image"]).tobytes()
            labels.append(int(row["label"]))
        splits[split] = _arrays(pixels, labels)
    return splits


def _arrays(pixels, labels) -> Examples:
    return np.frombuffer(pixels, np.uint8).reshape(-1, PIXELS), np.frombuffer(labels, np.uint8)


def read_batches(source: Path, skips: writer.Skips) -> dict[str, Examples]:
    """The original batches of a folder or archive, in the order of TFDS."""
    found: dict[str, Examples] = {}
    for name, where, data in _batch_files(source):
        if name not in found:
            found[name] = read_batch(data, where)
    missing = [name for name in (*TRAIN_BATCHES, TEST_BATCH) if name not in found]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)} of the original CIFAR-10 batches")
    splits = {}
    for split, names in (("train", TRAIN_BATCHES), ("test", (TEST_BATCH,))):
        pixels = np.concatenate([found[name][0] for name in names])
        labels = np.concatenate([found[name][1] for name in names])
        for i in np.flatnonzero(labels >= len(CLASSES)):
            skips.skip(f"{source}, {split} picture {i}", "the label is not in 0..9")
        order = np.array(tfds_order(split, len(labels)))
        order = order[labels[order] < len(CLASSES)]
        splits[split] = pixels[order], labels[order]
    return splits


def _batch_files(source: Path) -> Iterator[tuple[str, str, bytes]]:
    """(batch, where, content) of the batch files in a folder, tar or zip."""
    for name, size, read in _members(source):
        batch = PurePosixPath(name).name.removesuffix(".bin")
        if batch in (*TRAIN_BATCHES, TEST_BATCH):
            if size > 1 << 28:
                raise ValueError(f"{source}: {name} has {size:,} bytes, no CIFAR-10 batch")
            yield batch, f"{source}: {name}", read()


def _members(source: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    if source.is_dir():
        for path in sorted(source.glob("*")) + sorted(source.glob("cifar-10-batches-*/*")):
            if path.is_file():
                yield str(path), path.stat().st_size, path.read_bytes
    elif zipfile.is_zipfile(source):
        with sources.open_zip(source) as archive:
            infos = archive.infolist()
        for info in infos:
            yield info.filename, info.file_size, functools.partial(_unzip, source, info)
    else:
        for name, size, file in sources.archive_members(source):
            yield name, size, file.read


def _unzip(source: Path, info: zipfile.ZipInfo) -> bytes:
    with sources.open_zip(source) as archive:
        return archive.read(info)


def read_batch(data: bytes, where: str) -> Examples:
    """One batch, in either of the two published forms. Raises ValueError."""
    if data[:1] == b"\x80":
        batch = safe_pickle.load_value(io.BytesIO(data), where)
        if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
            raise ValueError(f"{where} is no CIFAR-10 batch: no data and labels in it")
        planes, labels = batch["data"], batch["labels"]
        if (
            not isinstance(planes, np.ndarray)
            or planes.dtype != np.uint8
            or planes.shape != (len(planes), RECORD - 1)
            or not isinstance(labels, list)
            or not all(type(label) is int for label in labels)
        ):
            raise ValueError(f"{where} is no CIFAR-10 batch: not uint8 [n, 3072] and n labels")
        if len(labels) != len(planes):
            raise ValueError(f"{where} has {len(planes):,} pictures and {len(labels):,} labels")
        table = np.array([label if 0 <= label < 255 else 255 for label in labels], dtype=np.uint8)
    else:
        if not data or len(data) % RECORD:
            raise ValueError(f"{where} has {len(data):,} bytes, not a multiple of {RECORD:,}")
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        planes, table = records[:, 1:], records[:, 0]
    return gray(planes.reshape(-1, 3, PIXELS).transpose(0, 2, 1)), table


def convert_arrays(read: Callable[[], dict[str, Examples]], arguments) -> None:
    with (
        writer.open_splits(arguments.output_dir, TASK) as writers,
        routing.measured(writers),
    ):
        splits = read()
        border = round(len(splits["train"][1]) * 90 / 100)  # as TFDS cuts train[:90%]
        parts = {
            "train": tuple(array[:border] for array in splits["train"]),
            "dev": tuple(array[border:] for array in splits["train"]),
            "test": splits["test"],
        }
        for split, (pixels, labels) in parts.items():
            limit = writer.BalancedLimit(arguments.limit, len(CLASSES))
            for row, label in zip(pixels, labels, strict=True):
                if limit.take(label):
                    ids = row.astype(np.int32)
                    writers[split].add(input_ids_0=ids, label=np.int64(label))


# ---- folders of pictures ------------------------------------------------------------------------


def list_pictures(source: Path) -> tuple[dict[str, dict[str, list[str]]], int]:
    """split -> class -> names of picture files, sorted; and how many other files there are.

    Raises: ValueError if the folders are not train/<class>/ and test/<class>/ with the ten
    classes.
    """
    found: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    others = 0
    for name in _file_names(source):
        parts = PurePosixPath(name).parts
        hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
        if hidden or len(parts) < 3 or not parts[-1].lower().endswith(PICTURES):
            others += 1
        elif parts[-3] in found:
            found[parts[-3]].setdefault(parts[-2], []).append(name)
        else:
            raise ValueError(f"{source}: {name} is not below train/<class>/ or test/<class>/")
    for split, classes in found.items():
        unknown = sorted(set(classes) - set(CLASSES))
        missing = [name for name in CLASSES if name not in classes]
        if unknown:
            raise ValueError(f"{source}: {split}/{unknown[0]} is none of {', '.join(CLASSES)}")
        if missing:
            raise ValueError(
                f"{source} holds no pictures in {split}/{missing[0]} "
                f"(expected: {{train,test}}/{{{','.join(CLASSES)}}}/*.jpg or .png)"
            )
        for names in classes.values():
            names.sort(key=lambda name: PurePosixPath(name).name)
    return found, others


def _file_names(source: Path) -> list[str]:
    if source.is_dir():
        return [
            os.path.relpath(os.path.join(folder, name), source)
            for folder, _, names in os.walk(source)
            for name in names
        ]
    with sources.open_zip(source) as archive:
        return [info.filename for info in archive.infolist() if not info.filename.endswith("/")]


def arrange(
    found: dict[str, dict[str, list[str]]], limit: int | None, seed: int
) -> dict[str, list[tuple[str, int]]]:
    """(name, label) of each split, in a seeded order; dev = the last 10 % of each training
    class."""
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "dev": [], "test": []}
    for label, name in enumerate(CLASSES):
        train, test = found["train"][name], found["test"][name]
        border = len(train) - max(1, len(train) // 10)
        for split, names in (("train", train[:border]), ("dev", train[border:]), ("test", test)):
            parts[split] += [(name, label) for name in names]
    for number, (split, pictures) in enumerate(parts.items()):
        taken = writer.BalancedLimit(limit, len(CLASSES))
        pictures = [picture for picture in pictures if taken.take(picture[1])]
        # Raw draws keep their sequence in every NumPy, those of its `permutation` may change.
        raw = np.random.PCG64(np.random.SeedSequence([seed, number])).random_raw(len(pictures))
        parts[split] = [pictures[i] for i in np.argsort(raw, kind="stable")]
    return parts


_archive: tuple[Path, zipfile.ZipFile] | None = None  # of this worker process, opened once


def _read_file(source: Path, name: str) -> bytes:
    global _archive
    if source.is_dir():
        if os.path.getsize(source / name) > MAX_FILE:
            raise ValueError("the file is too large for a 32x32 picture")
        return (source / name).read_bytes()
    if _archive is None or _archive[0] != source:
        _archive = source, zipfile.ZipFile(source)
    if _archive[1].getinfo(name).file_size > MAX_FILE:
        raise ValueError("the file is too large for a 32x32 picture")
    return _archive[1].read(name)


def picture_ids(data: bytes) -> np.ndarray:
    """Gray values of a picture file, int32 [1024]. Raises ValueError if it is no 32x32 picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            rgb = np.asarray(image.convert("RGB")) if size == (SIDE, SIDE) else None
    except Exception as error:  # whatever a decoder does with a broken file
        raise ValueError("the picture is cut off or cannot be decoded") from error
    if rgb is None:
        raise ValueError("the picture is not 32x32 pixels")
    return gray(rgb).reshape(-1).astype(np.int32)


def encode_pictures(task: tuple[Path, list[tuple[str, int]]]) -> list[tuple[str, str, bytes]]:
    """(name, fault or "", encoded example) for each (name, label)."""
    source, pictures = task
    results = []
    for name, label in pictures:
        try:
            data = _read_file(source, name)
            encoded = writer.encode_example(picture_ids(data), np.int64(label)) if data else b""
            results.append((name, "" if data else "the picture file is empty", encoded))
        except ValueError as error:
            results.append((name, str(error), b""))
        except Exception:  # a damaged member of the zip, a file removed meanwhile
            results.append((name, "the picture file cannot be read", b""))
    return results


def convert_pictures(source: Path, arguments) -> None:
    found, others = list_pictures(source)
    parts = arrange(found, arguments.limit, arguments.seed)
    skips = writer.Skips(arguments.on_error)
    tasks = [
        (split, chunk)
        for split, pictures in parts.items()
        for chunk in writer.chunks(pictures, CHUNK)
    ]
    work = ((source, chunk) for _, chunk in tasks)
    with (
        writer.open_splits(arguments.output_dir, TASK, parts) as writers,
        routing.measured(writers),
        writer.map_ordered(encode_pictures, work, arguments.workers) as results,
        writer.progress(sum(map(len, parts.values())), TASK) as bar,
    ):
        for (split, chunk), examples in zip(tasks, results, strict=True):
            for name, fault, encoded in examples:
                if fault:
                    skips.skip(f"{source}: {name}", fault, always="empty" in fault)
                else:
                    writers[split].add_encoded(encoded)
            bar.update(len(chunk))
    skips.report()
    if others:
        print(f"ignored {others:,} files that are no pictures")


# ---- the script ---------------------------------------------------------------------------------


def is_batches(source: Path) -> bool:
    """Whether `source` is a folder or archive of the original batches; else it holds pictures."""
    if source.is_dir():
        return any(
            re.fullmatch(r"data_batch_\d(\.bin)?", p.name) for p in source.glob("*")
        ) or any(source.glob("cifar-10-batches-*/data_batch_1*"))
    if zipfile.is_zipfile(source):
        with sources.open_zip(source) as archive:
            return any(
                re.search(r"(^|/)data_batch_\d(\.bin)?$", name) for name in archive.namelist()
            )
    if sources.is_archive(source):
        return True
    raise ValueError(f"{source} is neither a folder nor a zip or tar archive")


def run(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    routing.add_source_options(
        parser,
        "folder or zip of train/<class>/ and test/<class>/ pictures; or the original python or "
        "binary batches: folder, tar.gz or zip",
        "cifar10",
    )
    writer.add_common_options(parser, seed="the order of pictures from class folders")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed} is negative")
    kind, source = routing.choose_source(arguments, TASK, "cifar10", DOWNLOAD)
    if kind == "tfds":
        convert_arrays(functools.partial(read_tfds, source), arguments)
        return
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if is_batches(source):
        skips = writer.Skips(arguments.on_error)
        convert_arrays(functools.partial(read_batches, source, skips), arguments)
        skips.report()
    else:
        convert_pictures(source, arguments)


if __name__ == "__main__":
    sys.exit(writer.main(run))
