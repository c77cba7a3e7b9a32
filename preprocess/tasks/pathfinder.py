"""lra-pathfinder32-<level>: do two dots lie on one dashed path (1) or on two (0)?

    python preprocess/create_pathfinder.py
    python preprocess/create_pathfinder.py --source lra_release.gz  # the archive, or a folder
    python preprocess/create_pathfinder.py --generate               # draws its own pictures

32x32 gray pictures of three levels. All pictures of a level are shuffled with --seed and cut at
80 % and 90 % into train, dev and test. Source: docs/data.md, "lra-pathfinder32".
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from preprocess import driver, encode, parallel, sources, writer
from preprocess import pathfinder_generator as generator
from preprocess.driver import Skips, Task
from training.errors import UserError

LEVELS = tuple(generator.LEVELS)
PIXELS = generator.SIDE**2
COUNT = 200_000  # pictures of a level
NUM_COLUMNS = 11
# Any file of a level below its folder. The release has other sizes too, in folders of their own
# with the same levels. Names that start with a dot are what macOS adds to archives.
MEMBER = re.compile(
    rf"(?:^|/)(?:(pathfinder\d+)/)?({'|'.join(LEVELS)})/"
    r"(?:imgs/([^/.][^/]*)/([^/.][^/]*\.png)|metadata/([^/.][^/]*\.npy))$"
)
EXPECTED = "the LRA release's folder, its folder of pictures, one level's, or its archive"
MAX_PICTURE_BYTES = 1 << 20  # a 32x32 picture has some 300
MAX_METADATA_BYTES = 1 << 26  # 200,000 rows have some 10 MB


class Pictures:
    """The pictures and labels of one level, on disk until it is known which split each goes to, in
    a temporary file without a name: it is gone whenever the process is."""

    def __init__(self, job):
        folder = job.options.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._pixels = job.task.length
        self._file = job.closing.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self.count = 0
        # of a picture of the release, "3/sample_7.png", in the file; -1: it was there but no good
        self.position: dict[str, int] = {}
        self.label: dict[str, int] = {}

    def add(self, pictures: np.ndarray) -> None:
        """Appends uint8 [n, pixels]."""
        self._file.write(np.ascontiguousarray(pictures))
        self.count += len(pictures)

    def examples(self, job, order: np.ndarray, labels) -> Iterator[sources.Example]:
        """The pictures of these places in the file, shuffled and cut."""
        self._file.flush()
        shape = (self.count, self._pixels)
        pixels = np.asarray(np.memmap(self._file, np.uint8, "r", shape=shape))
        for split, indices in split_indices(len(labels), job.options.seed).items():
            for i in indices:
                if job.full(split):
                    break
                yield split, level_of(job.stem), pixels[order[i]], int(labels[i])


def level_of(stem: str) -> str:
    return stem[stem.index("curv_") :]


def read_release(job, source: Path) -> Iterator[sources.Example]:
    """The pictures of job.stem. The first call reads those of all levels, in one pass."""
    if job.state is None:
        levels = job.options.level or LEVELS
        job.state = {name: Pictures(job) for name in levels}
        _read_levels(job, source, job.state)
        absent = [name for name, level in job.state.items() if not level.label]
        if len(absent) == len(levels) or (absent and not job.options.allow_partial):
            todo = "(--level reads one of them, --allow_partial those that are there)"
            what = f"{source} does not have {', '.join(absent)} with imgs and metadata"
            raise UserError(f"{what}; expected {EXPECTED} {todo}")
    name = level_of(job.stem)
    level = job.state[name]
    if not level.label:
        raise driver.Absent(f"{source} does not have {name} with imgs and metadata")
    yield from level.examples(job, *match_labels(level, f"{source}: {name}", job.skips))


def _read_levels(job, source: Path, found: dict[str, Pictures]) -> None:
    side = math.isqrt(job.task.length)
    pictures = _pictures(source, f"pathfinder{side}", found, job.skips)
    decode = functools.partial(_decode, side)
    batches = parallel.chunks(pictures, 500)
    with job.map(decode, batches) as results, job.progress(None, "picture") as bar:
        for decoded in results:
            for name, picture, where, pixels in decoded:
                level = found[name]
                if picture in level.position:
                    job.skips.skip(where, "a second picture of the same name")
                elif isinstance(pixels, sources.Fault):
                    level.position[picture] = -1
                    job.skips.skip(where, pixels.reason, always=pixels.always)
                else:
                    level.position[picture] = level.count
                    level.add(pixels[None])
            bar.update(len(decoded))


def _pictures(source: Path, folder: str, found, skips) -> Iterator[tuple]:
    """(level, name, where, payload) of each picture; metadata goes to `found` at once."""

    def match(name: str):
        """What a file is; None if nothing that matters."""
        matched = MEMBER.search(name)
        good = matched and matched[1] in (None, folder) and matched[2] in found
        return matched if good else None

    for root, prefix in _roots(source, folder):
        for member in sources.files(root, lambda name, prefix=prefix: match(prefix + name)):
            _, level, batch, picture, metadata = match(prefix + member.name).groups()
            if not metadata:
                yield level, f"{batch}/{picture}", member.where, member.payload(MAX_PICTURE_BYTES)
                continue
            data = member.read(MAX_METADATA_BYTES)
            for name, label in _rows(data, member.where, level, skips):
                if name in found[level].label:
                    skips.skip(f"{member.where}: {name}", "a second row for the same picture")
                else:
                    found[level].label[name] = label


def _roots(source: Path, name: str) -> Iterator[tuple[Path, str]]:
    """What to read, and what stands before its files' names: an archive, or the levels' folders
    wherever they are below `source`."""
    if not source.is_dir():
        yield source, ""
        return
    for folder in (source, *(source / root / name for root in sources.LRA_ROOTS)):
        for level in LEVELS:
            if (folder / level).is_dir():
                yield folder / level, f"{level}/"
    if source.resolve().name in LEVELS:
        yield source, f"{source.resolve().name}/"


def accepts(source: Path) -> bool:
    """Folders and archives; says what is not needed."""
    if source.name.startswith("pathfinder_tfds"):
        raise UserError(f"{source} is for TFDS and is not needed: give lra_release.gz")
    for folder in (source, source.parent):
        for path in folder.glob("pathfinder_tfds*"):
            print(f"{path} is not needed: skipped")
    return source.is_dir() or sources.is_archive(source)


def is_whole(name: str, source: Path) -> bool:
    """Whether an unpacked release has all pictures; true of an archive."""
    if not source.is_dir():
        return True
    counts = dict.fromkeys(LEVELS, 0)
    for folder, prefix in _roots(source, name):
        with contextlib.suppress(FileNotFoundError), os.scandir(folder / "imgs") as batches:
            folders = (batch for batch in batches if batch.is_dir())
            counts[prefix[:-1]] += sum(len(os.listdir(batch)) for batch in folders)
    return all(count >= COUNT for count in counts.values())


def _decode(side: int, batch: list[tuple]) -> list[tuple]:
    """Replaces each picture's payload by its pixels, or by what is wrong with it."""
    return [(*names, decode_picture(payload, side)) for *names, payload in batch]


def decode_picture(payload, side: int = generator.SIDE) -> np.ndarray | sources.Fault:
    """Pixels uint8 [side * side], row by row, of an 8-bit gray PNG; or why there are none."""
    decode = functools.partial(_gray_pixels, side)
    try:
        return encode.picture(payload, decode, MAX_PICTURE_BYTES, ["PNG"])
    except sources.Fault as fault:
        return fault


def _gray_pixels(side: int, picture) -> np.ndarray:
    if picture.size != (side, side) or picture.mode != "L":
        raise sources.Fault(f"not a {side}x{side} 8-bit gray picture")
    return np.frombuffer(picture.tobytes(), np.uint8)


def _rows(data: bytes, where: str, level: str, skips: Skips) -> Iterator[tuple[str, int]]:
    """(picture's name, label) of each good row of a metadata file.

    The reference loses a last row that has no newline after it; we keep it."""
    if data.startswith(b"\x93NUMPY"):
        raise UserError(f"{where} is a NumPy file; the release's metadata is text")
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else (), 1):
        row = f"{where}, row {number}"
        columns = line.decode("ascii", "replace").split()
        if not columns:
            skips.skip(row, "the row is blank")
        elif len(columns) != NUM_COLUMNS:
            skips.skip(row, f"the row does not have {NUM_COLUMNS} columns")
        elif not re.fullmatch(r"imgs/[^/]+", columns[0]):
            skips.skip(row, "the first column is not a folder such as imgs/3")
        elif columns[3] not in ("0", "1"):
            skips.skip(row, "the label (fourth column) is neither 0 nor 1")
        else:
            length = re.search(r"length_(\d+)", level)
            if number == 1 and length and columns[5] != length[1]:
                print(f"{row} says contour length {columns[5]}: is it another level's metadata?")
            yield f"{columns[0][5:]}/{columns[1]}", int(columns[3])


def match_labels(level: Pictures, where: str, skips: Skips) -> tuple[np.ndarray, np.ndarray]:
    """Joins pictures and rows: int64 [n] places in the file and int64 [n] labels, in the order of
    the names by number (batch, then sample), whatever order the source had."""
    for name in sorted(level.position.keys() - level.label.keys()):
        skips.skip(f"{where}/imgs/{name}", "the picture has no row in the metadata")
    for name in sorted(level.label.keys() - level.position.keys()):
        skips.skip(f"{where}/imgs/{name}", "the metadata's row has no picture")
    names = [n for n, position in level.position.items() if position >= 0 and n in level.label]
    if not names:
        raise UserError(f"{where} has no usable picture")
    names.sort(key=lambda name: ([(len(n), n) for n in re.findall(r"\d+", name)], name))
    return (
        np.array([level.position[name] for name in names], np.int64),
        np.array([level.label[name] for name in names], np.int64),
    )


def generate(job) -> Iterator[sources.Example]:
    """Draws --count pictures of job.stem."""
    options, count = job.options, job.options.count
    job.counts = {"all": count}
    writer.check_free_space(options.output_dir, count * (5 * PIXELS + 100))
    labels: list[int] = []
    draw = functools.partial(_draw, level_of(job.stem), options.seed)
    level, chunks = Pictures(job), range(-(-count // generator.CHUNK))
    with job.map(draw, chunks) as results, job.progress(count, "picture") as bar:
        for pictures, chunk_labels in results:
            level.add(pictures[: count - level.count].reshape(-1, PIXELS))
            labels += chunk_labels.tolist()
            bar.update(len(pictures))
    yield from level.examples(job, np.arange(count), labels[:count])


def _draw(level: str, seed: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    scenes = generator.draw_chunk(level, seed, chunk)
    return scenes.images, scenes.labels


def split_indices(count: int, seed: int) -> dict[str, np.ndarray]:
    """A seeded permutation of 0..count-1, cut at 80 % and 90 %, both truncated: of raw 64-bit
    words, whose sequence NumPy promises never to change; that of its `permutation` might."""
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    train, dev = count * 8 // 10, count * 9 // 10
    return {"train": order[:train], "dev": order[train:dev], "test": order[dev:]}


def add_levels(parser: argparse.ArgumentParser) -> None:
    group, text = (
        parser.add_argument_group("which pictures"),
        "one level; repeatable (default: all)",
    )
    group.add_argument("--level", choices=LEVELS, action="append", help=text)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_levels(parser)
    text = "pictures a level that --generate draws (default: %(default)s)"
    group = parser.add_argument_group("pictures drawn here")
    group.add_argument("--count", type=driver.positive, default=COUNT, help=text)


def stems(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(f"{name}-{level}" for level in options.level or LEVELS)


TASK = Task(
    name="lra-pathfinder",
    description=__doc__,
    classes=("two paths", "one path"),
    length=PIXELS,
    counts={"all": COUNT},
    splits=("train", "dev", "test"),
    encoder=lambda options: encode.pixels,
    label_type=int,
    sources=(sources.Reader(EXPECTED, read_release, accepts),),
    places=("lra_release", "lra_release.gz"),
    whole=functools.partial(is_whole, "pathfinder32"),
    fetch="lra_release.gz",
    generate=generate,
    options=add_options,
    stems=functools.partial(stems, "lra-pathfinder32"),
    unneeded=frozenset({"_PATHFINDER_TFDS_PATH"}),
)
PATH_X = dataclasses.replace(
    TASK,
    name="lra-pathx",
    description="lra-pathx-<level>: lra-pathfinder with 128x128 pictures, 16,384 ids.\n\n"
    'The reference has no configuration for it. Source: docs/data.md, "lra-pathfinder32".',
    length=128 * 128,
    whole=functools.partial(is_whole, "pathfinder128"),
    generate=None,
    options=add_levels,
    stems=functools.partial(stems, "lra-pathx"),
)
