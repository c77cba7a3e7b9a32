"""lra-pathfinder32-<level>: do two dots lie on one dashed path (1) or on two (0)?

    python preprocess/create_pathfinder.py
    python preprocess/create_pathfinder.py --source lra_release.gz  # the archive, or a folder
    python preprocess/create_pathfinder.py --generate               # draws its own pictures

32x32 gray pictures of three levels. All pictures of a level are shuffled with --seed and cut at
80 % and 90 % into train, dev and test. Source: docs/data.md, "lra-pathfinder32".
"""

import argparse
import contextlib
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

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
MAX_PICTURE_BYTES = 1 << 20  # a 32x32 picture has some 300
MAX_METADATA_BYTES = 1 << 26  # 200,000 rows have some 10 MB
PICTURES_A_BATCH = 1000  # what one folder of --release_dir holds


# ---- the release ------------------------------------------------------------------------------


class Pool:
    """The pictures and labels of one level, on disk until it is known which split each goes to.

    A temporary file in `folder` without a name: it is gone whenever the process is.
    """

    def __init__(self, folder: Path, pixels: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._pixels = pixels
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by close
        self.count = 0

    def add(self, pictures: np.ndarray) -> None:
        """Appends uint8 [n, pixels]."""
        self._file.write(np.ascontiguousarray(pictures))
        self.count += len(pictures)

    def pixels(self) -> np.ndarray:
        """uint8 [count, pixels], read from the file as needed."""
        self._file.flush()
        pixels = np.memmap(self._file, np.uint8, "r", shape=(self.count, self._pixels))
        return np.asarray(pixels)

    def close(self) -> None:
        self._file.close()


class Release:
    """What was read of one level: pictures by name ("3/sample_7.png"), labels by name."""

    def __init__(self, job):
        self.pool = Pool(job.options.output_dir, job.task.length)
        # of the picture in the pool; -1: it was there but no good
        self.position: dict[str, int] = {}
        self.label: dict[str, int] = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.close()


def folder_of(task: Task) -> str:
    """The release's folder of pictures of the task's size."""
    return f"pathfinder{math.isqrt(task.length)}"


def level_of(stem: str) -> str:
    return stem[stem.index("curv_") :]


def read_release(job, source: Path) -> Iterator[sources.Example]:
    """The pictures of job.stem. The first call reads those of all levels, in one pass."""
    if job.state is None:
        levels = job.options.level or LEVELS
        job.state = {level: job.closing.enter_context(Release(job)) for level in levels}
        _read_levels(job, source, job.state)
        absent = [level for level, release in job.state.items() if not release.label]
        if len(absent) == len(levels) or (absent and not job.options.allow_partial):
            raise UserError(
                f"{source} does not have {', '.join(absent)} with imgs and metadata; expected "
                f"{folder_of(job.task)} of the LRA release, a folder above it, or the release's "
                "archive "
                "(--level reads one of them, --allow_partial those that are there)"
            )
    level = level_of(job.stem)
    release = job.state[level]
    if not release.label:
        raise driver.Absent(f"{source} does not have {level} with imgs and metadata")
    order, labels = match_labels(release, f"{source}: {level}", job.skips)
    pixels = release.pool.pixels()
    for split, indices in split_indices(len(labels), job.options.seed).items():
        for i in indices:
            if job.full(split):
                break
            yield split, level, pixels[order[i]], int(labels[i])


def _read_levels(job, source: Path, found: dict[str, Release]) -> None:
    pictures = _pictures(source, folder_of(job.task), found, job.skips)
    decode = functools.partial(_decode, math.isqrt(job.task.length))
    batches = parallel.chunks(pictures, 500)
    with job.map(decode, batches) as results, job.progress(None, "picture") as bar:
        for decoded in results:
            for level, name, where, pixels in decoded:
                release = found[level]
                if name in release.position:
                    job.skips.skip(where, "a second picture of the same name")
                elif isinstance(pixels, sources.Fault):
                    release.position[name] = -1
                    job.skips.skip(where, pixels.reason, always=pixels.always)
                else:
                    release.position[name] = release.pool.count
                    release.pool.add(pixels[None])
            bar.update(len(decoded))


def _pictures(source: Path, folder: str, found, skips) -> Iterator[tuple[str, str, str, bytes]]:
    """(level, name, where, bytes) of each picture; metadata goes to `found` at once."""

    def match(name: str):
        """What a file is; None if nothing that matters."""
        matched = MEMBER.search(name)
        good = matched and matched[1] in (None, folder) and matched[2] in found
        return matched if good else None

    for root, prefix in _roots(source, folder):
        for member in sources.files(root, lambda name, prefix=prefix: match(prefix + name)):
            _, level, batch, picture, metadata = match(prefix + member.name).groups()
            if metadata:
                data = member.read(MAX_METADATA_BYTES)
                for name, label in _rows(data, member.where, level, skips):
                    if name in found[level].label:
                        skips.skip(f"{member.where}: {name}", "a second row for the same picture")
                    else:
                        found[level].label[name] = label
            else:
                yield level, f"{batch}/{picture}", member.where, _head(member)


def _head(member: sources.Member) -> bytes:
    with member.open() as file:
        return file.read(MAX_PICTURE_BYTES)


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
    unneeded = "the same pictures once more, for TFDS, and is not needed"
    if source.name.startswith("pathfinder_tfds"):
        raise UserError(f"{source} holds {unneeded}: give lra_release.gz")
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


def _decode(
    side: int,
    batch: list[tuple[str, str, str, bytes]],
) -> list[tuple[str, str, str, np.ndarray | sources.Fault]]:
    """Replaces each picture's bytes by its pixels, or by what is wrong with it."""
    return [(level, name, where, decode_picture(data, side)) for level, name, where, data in batch]


def decode_picture(data: bytes, side: int = generator.SIDE) -> np.ndarray | sources.Fault:
    """Pixels uint8 [side * side], row by row, of an 8-bit gray PNG; or why there are none."""
    try:
        return encode.picture_of(data, functools.partial(_gray_pixels, side), ["PNG"])
    except sources.Fault as fault:
        return fault


def _gray_pixels(side: int, picture) -> np.ndarray:
    if picture.size != (side, side) or picture.mode != "L":
        raise sources.Fault(f"not a {side}x{side} 8-bit gray picture")
    return np.frombuffer(picture.tobytes(), np.uint8)


def _rows(data: bytes, where: str, level: str, skips: Skips) -> Iterator[tuple[str, int]]:
    """(picture's name, label) of each good row of a metadata file.

    The reference loses a last row that has no newline after it; we keep it.
    """
    if data.startswith(b"\x93NUMPY"):
        raise UserError(
            f"{where} is a NumPy file; the release's metadata is text, despite its name"
        )
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, line in enumerate(lines, 1):
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


def match_labels(release: Release, where: str, skips: Skips) -> tuple[np.ndarray, np.ndarray]:
    """Joins pictures and rows: int64 [n] positions in the pool and int64 [n] labels, in the
    order of the names.

    The order is by number (batch, then sample), whatever order the source had.
    """
    for name in sorted(release.position.keys() - release.label.keys()):
        skips.skip(f"{where}/imgs/{name}", "the picture has no row in the metadata")
    for name in sorted(release.label.keys() - release.position.keys()):
        skips.skip(f"{where}/imgs/{name}", "the metadata's row has no picture")
    names = [n for n, position in release.position.items() if position >= 0 and n in release.label]
    if not names:
        raise UserError(f"{where} has no usable picture")
    names.sort(key=lambda name: ([(len(n), n) for n in re.findall(r"\d+", name)], name))
    return (
        np.array([release.position[name] for name in names], np.int64),
        np.array([release.label[name] for name in names], np.int64),
    )


# ---- the generator ----------------------------------------------------------------------------


def generate(job) -> Iterator[sources.Example]:
    """Draws --count pictures of job.stem; with --release_dir also as files in the release's
    layout."""
    options, level = job.options, level_of(job.stem)
    job.counts = {"all": options.count}
    writer.check_free_space(options.output_dir, options.count * (4 * PIXELS + 100 + PIXELS))
    labels = []
    chunks = range(-(-options.count // generator.CHUNK))
    draw = functools.partial(_draw, level, options.seed)
    with contextlib.closing(Pool(options.output_dir, PIXELS)) as pool:
        with (
            _release_files(options.release_dir, level) as save,
            job.map(draw, chunks) as results,
            job.progress(options.count, "picture") as bar,
        ):
            for pictures, chunk_labels in results:
                missing = options.count - pool.count
                save(pool.count, pictures[:missing], chunk_labels[:missing])
                pool.add(pictures[:missing].reshape(-1, PIXELS))
                labels += chunk_labels[:missing].tolist()
                bar.update(len(pictures))
        pixels = pool.pixels()
        for split, indices in split_indices(options.count, options.seed).items():
            for i in indices:
                if job.full(split):
                    break
                yield split, level, pixels[i], labels[i]


def _draw(level: str, seed: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    scenes = generator.draw_chunk(level, seed, chunk)
    return scenes.images, scenes.labels


@contextlib.contextmanager
def _release_files(release_dir: Path | None, level: str):
    """Gives a function that saves pictures in the release's layout; the level's folder appears
    when all are there."""
    if release_dir is None:
        yield lambda first, pictures, labels: None
        return
    final = release_dir / "pathfinder32" / level
    part = final.with_name(f"{level}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "metadata").mkdir(parents=True)
    constant = " ".join(generator.metadata_columns(level))

    def save(first: int, pictures: np.ndarray, labels: np.ndarray) -> None:
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True), first):
            batch, number = divmod(i, PICTURES_A_BATCH)
            folder = part / "imgs" / str(batch)
            if number == 0:
                folder.mkdir(parents=True)
            Image.fromarray(picture).save(folder / f"sample_{number}.png")
            with open(part / "metadata" / f"{batch}.npy", "a", encoding="ascii") as file:
                file.write(f"imgs/{batch} sample_{number}.png {number} {label} {constant}\n")

    try:
        yield save
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    os.replace(part, final)


# ---- splits -----------------------------------------------------------------------------------


def split_indices(count: int, seed: int) -> dict[str, np.ndarray]:
    """A seeded permutation of 0..count-1, cut at 80 % and 90 %, both truncated.

    Sorts raw 64-bit words, whose sequence NumPy promises never to change; its `permutation`
    might.
    """
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    train, dev = count * 8 // 10, count * 9 // 10
    return {"train": order[:train], "dev": order[train:dev], "test": order[dev:]}


def add_levels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("which pictures").add_argument(
        "--level",
        choices=LEVELS,
        action="append",
        help="one level only; repeatable (default: all)",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add_levels(parser)
    group = parser.add_argument_group("pictures drawn here")
    group.add_argument(
        "--count",
        type=driver.positive,
        default=COUNT,
        help="pictures a level that --generate draws (default: %(default)s)",
    )
    group.add_argument(
        "--release_dir",
        type=Path,
        metavar="DIR",
        help="--generate: also write them to DIR/pathfinder32, as the LRA release has them",
    )


def stems(options: argparse.Namespace) -> tuple[str, ...]:
    levels = options.level or LEVELS
    if options.release_dir and not options.generate:
        raise UserError("--release_dir is for --generate")
    for level in levels if options.release_dir else ():
        if (folder := options.release_dir / "pathfinder32" / level).exists():
            raise UserError(f"{folder} exists: remove it or name another --release_dir")
    return tuple(f"lra-pathfinder32-{level}" for level in levels)


TASK = Task(
    name="lra-pathfinder",
    description=__doc__,
    classes=("two paths", "one path"),
    length=PIXELS,
    counts={"all": COUNT},
    splits=("train", "dev", "test"),
    encoder=lambda options: encode.pixels,
    label_type=int,
    sources=(
        sources.Reader(
            "the LRA release's folder, its folder of pictures, one level's, or its archive",
            read_release,
            accepts,
        ),
    ),
    places=("lra_release", "lra_release.gz"),
    whole=functools.partial(is_whole, "pathfinder32"),
    fetch="lra_release.gz",
    generate=generate,
    options=add_options,
    stems=stems,
    unneeded=frozenset({"_PATHFINDER_TFDS_PATH"}),
)
