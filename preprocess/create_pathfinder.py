"""Makes lra-pathfinder32-<level>: do two dots lie on one dashed path (1) or on two (0)?

    python preprocess/create_pathfinder.py                          # data/lra_release
    python preprocess/create_pathfinder.py --source lra_release.gz  # the archive, or a folder
    python preprocess/create_pathfinder.py --generate               # draws its own pictures

32x32 gray pictures of three levels. All pictures of a level are shuffled with --seed and cut at
80 % and 90 % into train, dev and test. Source: docs/data.md, "lra-pathfinder32".
"""

import argparse
import contextlib
import functools
import io
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import pathfinder_generator as generator
from preprocess import routing, sources, writer

LEVELS = tuple(generator.LEVELS)
PIXELS = generator.SIDE**2
RELEASE = Path("data/lra_release")
ARCHIVE = Path("data/lra_release.gz")
FOLDERS = ("", "pathfinder32", "lra_release/pathfinder32", "lra_release/lra_release/pathfinder32")
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

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by close
        self.count = 0

    def add(self, pictures: np.ndarray) -> None:
        """Appends uint8 [n, 1024]."""
        self._file.write(np.ascontiguousarray(pictures))
        self.count += len(pictures)

    def pixels(self) -> np.ndarray:
        """uint8 [count, 1024], read from the file as needed."""
        self._file.flush()
        return np.memmap(self._file, np.uint8, "r", shape=(self.count, PIXELS))

    def close(self) -> None:
        self._file.close()


class Release:
    """What was read of one level: pictures by name ("3/sample_7.png"), labels by name."""

    def __init__(self, folder: Path):
        self.pool = Pool(folder)
        # of the picture in the pool; -1: it was there but no good
        self.position: dict[str, int] = {}
        self.label: dict[str, int] = {}


def read_release(
    source: Path, levels: list[str] | None, output_dir: Path, skips: writer.Skips, workers: int
) -> dict[str, Release]:
    """Reads all pictures and metadata of the levels (None: of those that are there) in one pass.

    Raises: ValueError if a level is missing or, unless `skips` skips it, at the first broken
    picture or row.
    """
    found: dict[str, Release] = {}
    pictures = _pictures(source, levels, output_dir, found, skips)
    batches = writer.chunks(pictures, 500)
    with (
        writer.map_ordered(_decode, batches, workers) as results,
        writer.progress(None, "reading pictures") as bar,
    ):
        for decoded in results:
            for level, name, where, pixels in decoded:
                if name in found[level].position:
                    skips.skip(where, "a second picture of the same name")
                elif isinstance(pixels, str):
                    found[level].position[name] = -1
                    skips.skip(where, pixels, always=pixels == EMPTY)
                else:
                    found[level].position[name] = found[level].pool.count
                    found[level].pool.add(pixels[None])
            bar.update(len(decoded))
    missing = [level for level in levels or [] if level not in found]
    if missing or not found:
        expected = ", ".join(missing) or "any of " + ", ".join(LEVELS)
        raise ValueError(
            f"{source} does not have {expected} with imgs and metadata; "
            "expected pathfinder32 of the LRA release, a folder above it, or the release's archive"
        )
    return found


def _pictures(source, levels, output_dir, found, skips) -> Iterator[tuple[str, str, str, bytes]]:
    """(level, name, where, bytes) of each picture; metadata goes to `found` at once."""
    for path, where, read in _files(source):
        match = MEMBER.search(path)
        if not match or match[1] not in (None, "pathfinder32"):
            continue
        level, folder, picture, metadata = match[2], match[3], match[4], match[5]
        if levels and level not in levels:
            continue
        if level not in found:
            found[level] = Release(output_dir)
        if metadata:
            for name, label in _rows(read(MAX_METADATA_BYTES), where, level, skips):
                if name in found[level].label:
                    skips.skip(f"{where}: {name}", "a second row for the same picture")
                else:
                    found[level].label[name] = label
        else:
            yield level, f"{folder}/{picture}", where, read(MAX_PICTURE_BYTES)


def _files(source: Path) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    """(path in the release, name for messages, read(size)) of every file that may matter."""
    if source.name == "pathfinder_tfds.gz":
        raise ValueError(
            f"{source} holds the same pictures once more, for TFDS, and is not needed: "
            "give lra_release.gz"
        )
    if not source.exists():
        raise ValueError(
            f"{source} does not exist: get the LRA release (python preprocess/download.py --task "
            "lra-pathfinder), name it with --source, or draw pictures with --generate"
        )
    if not source.is_dir():
        if not sources.is_archive(source):
            raise ValueError(f"{source} is neither a folder nor a tar archive of the LRA release")
        for member, _, file in sources.archive_members(source):
            yield member, f"{source}:{member}", file.read
        return
    for root in (source, source.parent, source / "lra_release"):
        if (root / "pathfinder_tfds.gz").exists():
            print(f"{root / 'pathfinder_tfds.gz'} is not needed: skipped")
    roots = [(source / folder, "") for folder in FOLDERS]
    if source.resolve().name in LEVELS:
        roots.append((source.resolve().parent, source.resolve().name))
    for root, only in roots:
        for level in LEVELS:
            if level == (only or level) and (root / level).is_dir():
                yield from _level_files(root / level)


def _level_files(folder: Path) -> Iterator[tuple[str, str, Callable[[int], bytes]]]:
    # plain strings: for 200,000 small files Path objects take as long as reading
    for kind in ("imgs", "metadata"):
        top = str(folder / kind)
        for batch in sorted(_names(top)) if kind == "imgs" else [""]:
            inner = os.path.join(top, batch)
            for name in sorted(_names(inner)):
                path = os.path.join(inner, name)
                yield path, path, functools.partial(_read_file, path)


def _names(folder: str) -> list[str]:
    """What is in a folder; nothing if it is none."""
    return os.listdir(folder) if os.path.isdir(folder) else []


def _read_file(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


EMPTY = "the picture file is empty"  # the release has one such file


def _decode(
    batch: list[tuple[str, str, str, bytes]],
) -> list[tuple[str, str, str, np.ndarray | str]]:
    """Replaces each picture's bytes by its pixels, or by what is wrong with it."""
    return [(level, name, where, decode_picture(data)) for level, name, where, data in batch]


def decode_picture(data: bytes) -> np.ndarray | str:
    """Pixels uint8 [1024], row by row, of a 32x32 8-bit gray PNG; or the reason why there are
    none."""
    if not data:
        return EMPTY
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.size != (generator.SIDE, generator.SIDE) or picture.mode != "L":
                return "not a 32x32 8-bit gray picture"
            return np.frombuffer(picture.tobytes(), np.uint8)
    # what Pillow raises on damaged files, found by fuzzing
    except (
        OSError,
        SyntaxError,
        ValueError,
        zlib.error,
        struct.error,
        EOFError,
        Image.DecompressionBombError,
    ):
        return "the picture is damaged or no PNG"


def _rows(data: bytes, where: str, level: str, skips: writer.Skips) -> Iterator[tuple[str, int]]:
    """(picture's name, label) of each good row of a metadata file.

    The reference loses a last row that has no newline after it; we keep it.
    """
    if data.startswith(b"\x93NUMPY"):
        raise ValueError(
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


def match_labels(
    release: Release, where: str, skips: writer.Skips
) -> tuple[np.ndarray, np.ndarray]:
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
        raise ValueError(f"{where} has no usable picture")
    names.sort(key=lambda name: ([(len(n), n) for n in re.findall(r"\d+", name)], name))
    return (
        np.array([release.position[name] for name in names], np.int64),
        np.array([release.label[name] for name in names], np.int64),
    )


# ---- the generator ----------------------------------------------------------------------------


def generate(
    level: str, count: int, seed: int, workers: int, pool: Pool, release_dir: Path | None
) -> np.ndarray:
    """Draws `count` pictures into `pool`; with release_dir also as files in the release's
    layout. Returns int64 labels."""
    labels = []
    chunks = range(-(-count // generator.CHUNK))
    draw = functools.partial(_draw, level, seed)
    with (
        _release_files(release_dir, level) as save,
        writer.map_ordered(draw, chunks, workers) as results,
        writer.progress(count, f"drawing {level}") as bar,
    ):
        for pictures, chunk_labels in results:
            missing = count - pool.count
            save(pool.count, pictures[:missing], chunk_labels[:missing])
            pool.add(pictures[:missing].reshape(-1, PIXELS))
            labels.append(chunk_labels[:missing])
            bar.update(len(pictures))
    return np.concatenate(labels)


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


def write_pickles(
    output_dir: Path,
    level: str,
    pixels: np.ndarray,
    order: np.ndarray,
    labels: np.ndarray,
    seed: int,
    limit: int | None,
) -> None:
    """Writes a level's three pickles: example i is pixels[order[i]] (uint8 [1024]) with
    labels[i].

    Ids are the gray values, the label a plain int, as the reference writes them.
    """
    task = f"lra-pathfinder32-{level}"
    with writer.open_splits(output_dir, task) as splits, routing.measured(splits):
        for split, indices in split_indices(len(labels), seed).items():
            kept = writer.BalancedLimit(limit, 2)
            for i in indices:
                if kept.full:
                    break
                if kept.take(labels[i]):
                    splits[split].add(
                        input_ids_0=pixels[order[i]].astype(np.int32), label=int(labels[i])
                    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="the LRA release's folder, its pathfinder32, one level's folder, or the archive "
        f"(default: {RELEASE}, else {ARCHIVE})",
    )
    parser.add_argument(
        "--level",
        choices=LEVELS,
        action="append",
        help="one level only; repeatable (default: all)",
    )
    group = parser.add_argument_group("drawing pictures instead of reading them")
    group.add_argument(
        "--generate", action="store_true", help="draw pictures; no source is needed"
    )
    group.add_argument(
        "--count",
        type=writer.positive,
        default=200_000,
        help="pictures a level (default: %(default)s)",
    )
    group.add_argument(
        "--release_dir",
        type=Path,
        metavar="DIR",
        help="also write pictures and metadata to DIR/pathfinder32, as the LRA release has them",
    )
    writer.add_common_options(parser, seed="the splits and the pictures that --generate draws")
    args = parser.parse_args()
    if args.generate and args.source:
        parser.error("--generate reads no --source: give one of them")
    if args.release_dir and not args.generate:
        parser.error("--release_dir is for --generate")
    if not 0 <= args.seed < 2**64:
        parser.error("--seed must be between 0 and 2^64 - 1")

    if args.generate:
        levels = args.level or LEVELS
        # the pickles, and the pool of one level
        needed = args.count * (len(levels) * (4 * PIXELS + 100) + PIXELS)
        writer.check_free_space(args.output_dir, needed)
        for level in levels if args.release_dir else ():
            if (folder := args.release_dir / "pathfinder32" / level).exists():
                raise ValueError(f"{folder} exists: remove it or name another --release_dir")
        for level in levels:
            with contextlib.closing(Pool(args.output_dir)) as pool:
                labels = generate(
                    level, args.count, args.seed, args.workers, pool, args.release_dir
                )
                order = np.arange(args.count)
                write_pickles(
                    args.output_dir, level, pool.pixels(), order, labels, args.seed, args.limit
                )
        return
    source = args.source or (ARCHIVE if ARCHIVE.exists() and not RELEASE.exists() else RELEASE)
    skips = writer.Skips(args.on_error)
    found = read_release(source, args.level, args.output_dir, skips, args.workers)
    for level, release in found.items():
        with contextlib.closing(release.pool):
            order, labels = match_labels(release, f"{source}: {level}", skips)
            writer.check_free_space(args.output_dir, len(labels) * (4 * PIXELS + 100))
            write_pickles(
                args.output_dir, level, release.pool.pixels(), order, labels, args.seed, args.limit
            )
    skips.report()


if __name__ == "__main__":
    sys.exit(writer.main(main))
