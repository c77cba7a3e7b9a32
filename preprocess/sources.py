"""Reading what people have on disk: folders, zip and tar archives, CSV, parquet, TFDS.

Nothing is unpacked. Damage is a UserError that names the file; what the environment refuses (no
permission, a failing disk, a network file system that went away) stays an OSError: it says
nothing about the data. A damaged archive must never look like a short one: tarfile ends quietly at
a header that is cut off, so the end of the archive is checked here.
"""

import bz2
import contextlib
import csv
import errno
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from training.errors import UserError

# (split, where it stands for messages, payload, label); split "all": the driver draws a test set
Example = tuple[str, str, Any, int]

TAR_BLOCK = 512
# what zipfile, tarfile and the decompressors raise for damaged files; RuntimeError: a password
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, struct.error),
    *(gzip.BadGzipFile, UnicodeDecodeError, NotImplementedError, RuntimeError, OverflowError),
)
LONGEST_LINE = 1 << 20  # bytes; a longer line is no row, and reading it whole could fill memory
LONGEST_HEADER = 8 << 10
LRA_ROOTS = ("", "lra_release", "lra_release/lra_release")  # where the release's folders may be


class Fault(UserError):
    """What is wrong with one example, counted by its text.

    always: left out also without --on_error skip (faults that published sources are known for).
    """

    def __init__(self, reason: str, always: bool = False):
        super().__init__(reason, always)
        self.reason, self.always = reason, always

    def __str__(self) -> str:
        return self.reason


def is_damage(error: BaseException) -> bool:
    """Whether an exception speaks of the bytes of an archive, not of the disk under it."""
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        # bz2 has no errno; a damaged zip sends seek to places before the file
        return error.errno in (None, errno.EINVAL)
    return isinstance(error, DAMAGE)


@contextlib.contextmanager
def _naming(path, kind: str, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Damage becomes a UserError that names `path`; other read errors get its name."""
    try:
        yield
    except OSError as error:
        if is_damage(error):
            raise _damaged(path, kind, where(), error) from error
        error.filename = error.filename or str(path)
        raise
    except DAMAGE as error:
        raise _damaged(path, kind, where(), error) from error


def _damaged(path, kind: str, where: str, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(
        f"{path} is cut off, damaged or not a {kind} ({where}{': ' if where else ''}{reason}): "
        "get it again"
    )


# ---- files of folders and archives ------------------------------------------------------------


class Member:
    """A file of a folder, by its name below it. Can be sent to another process and read there."""

    __slots__ = ("name", "where")

    def __init__(self, name: str, where: str):
        self.name, self.where = name, where

    def open(self) -> BinaryIO:
        return open(self.where, "rb", buffering=1 << 20)

    def read(self, limit: int | None = None) -> bytes:
        """Its bytes. Raises Fault if there are more than `limit`; OSError."""
        try:
            with self.open() as file:
                data = file.read() if limit is None else file.read(limit + 1)
        except OSError as error:
            error.filename = error.filename or self.where
            raise
        if limit is not None and len(data) > limit:
            raise Fault(f"the file has more than {limit:,} bytes")
        return data

    def payload(self) -> "Member | bytes":
        """Itself, to be read where it is needed; or its bytes if it can only be read now."""
        return self


class ZipMember(Member):
    __slots__ = ("archive",)

    def __init__(self, archive: str, name: str):
        super().__init__(name, f"{archive}:{name}")
        self.archive = archive

    def open(self) -> BinaryIO:
        with self._damage_is_a_fault():
            file = self._zip().open(self.name)
        raw = _Stream(file, lambda error: Fault(self.DAMAGED))
        return io.BufferedReader(raw, 1 << 20)

    def read(self, limit: int | None = None) -> bytes:
        with self._damage_is_a_fault():
            info = self._zip().getinfo(self.name)
            if limit is not None and info.file_size > limit:
                raise Fault(f"the file has more than {limit:,} bytes")
            return self._zip().read(info)

    DAMAGED = "the zip archive is damaged at this file"

    def _zip(self) -> zipfile.ZipFile:
        if self.archive not in _zips:
            _zips.clear()
            _zips[self.archive] = zipfile.ZipFile(self.archive)
        return _zips[self.archive]

    @contextlib.contextmanager
    def _damage_is_a_fault(self):
        try:
            yield
        except (OSError, *DAMAGE) as error:
            if is_damage(error):
                raise Fault(self.DAMAGED) from error
            error.filename = self.archive
            raise


_zips: dict[str, zipfile.ZipFile] = {}  # of this process, opened once


class _Stream(io.RawIOBase):
    """A file in an archive; damage in it is the UserError that `broken` makes of it."""

    def __init__(self, file, broken: Callable[[Exception], UserError]):
        self.file, self.broken = file, broken

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def read(self, size: int = -1) -> bytes:
        try:
            return self.file.read(size)
        except (OSError, *DAMAGE) as error:
            if is_damage(error):
                raise self.broken(error) from error
            raise


class _TarMember(Member):
    __slots__ = ("file",)

    def __init__(self, name: str, where: str, file: BinaryIO):
        super().__init__(name, where)
        self.file = file

    def open(self) -> BinaryIO:
        return self.file

    def payload(self) -> bytes:
        return self.file.read()


def files(path: Path, wanted: Callable[[str], Any] = lambda name: True) -> Iterator[Member]:
    """The files of a folder (sorted, its own before those of its folders), zip or tar archive
    for whose names `wanted` is true.

    A tar archive is read in one pass: use each member before the next.
    Raises: UserError naming the archive if it is cut off or damaged; OSError.
    """
    if path.is_dir():
        for member in _walk(str(path), "", (os.stat(path),)):
            if wanted(member.name):
                yield member
    elif zipfile.is_zipfile(path):
        with _naming(path, "zip archive"), zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        for info in infos:
            if not info.is_dir() and wanted(info.filename):
                yield ZipMember(str(path), info.filename)
    else:
        for name, _, file in archive_members(path, wanted):
            yield _TarMember(name, f"{path}:{name}", file)


def _walk(folder: str, below: str, above: tuple) -> Iterator[Member]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    folders = [entry for entry in found if entry.is_dir()]  # links to folders too
    inner = {entry.name for entry in folders}
    for entry in found:
        if entry.name not in inner:
            yield Member(below + entry.name, entry.path)
    for entry in folders:
        state = os.stat(entry.path)
        if entry.is_symlink() and any(os.path.samestat(state, outer) for outer in above):
            raise UserError(f"{entry.path} is a link to a folder that it lies in")
        yield from _walk(entry.path, f"{below}{entry.name}/", (*above, state))


def is_archive(path: Path) -> bool:
    """Whether a file starts like gzip, bzip2, xz, tar or is a zip (the LRA release is a tar.gz
    that ends in .gz)."""
    with _naming(path, "archive"), open(path, "rb") as file:
        head = file.read(TAR_BLOCK)
    return _opener(head) is not None or head[257:262] == b"ustar" or zipfile.is_zipfile(path)


def _opener(head: bytes):
    for magic, opener in (
        (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
        (b"BZh", bz2.BZ2File),
        (b"\xfd7zXZ\0", lzma.LZMAFile),
    ):
        if head.startswith(magic):
            return opener
    return None


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        opener = _opener(file.read(6))
        file.seek(0)
        yield opener(file) if opener else file


class _WatchedStream(io.RawIOBase):
    """Passes reads on and remembers the last tar block, to tell a whole archive from a cut one."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.tail = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.tail = (self.tail + data)[-TAR_BLOCK:] if len(data) < TAR_BLOCK else data[-TAR_BLOCK:]
        return data


def archive_members(
    path: Path, wanted: Callable[[str], Any] = lambda name: True
) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, bytes, file) of the files of a tar archive, in its order, in one pass.

    Each file must be read before the next is asked for. Stopping early is fine and skips the check
    of the rest. Names for which `wanted` is false are left out; links to files of the archive come
    last, from a second pass.

    Raises: UserError naming the archive if it is cut off, damaged or no tar archive.
    """
    links: dict[str, str] = {}  # name -> what it is a link to
    yield from _tar_pass(path, wanted, links)
    names: dict[str, list[str]] = {}
    for name, target in links.items():
        while target in links and target != name:
            target = links[target]
        names.setdefault(target, []).append(name)
    if names:
        for target, size, file in _tar_pass(path, lambda name: posixpath.normpath(name) in names):
            data = file.read()
            for name in names.pop(posixpath.normpath(target), ()):
                yield name, size, io.BytesIO(data)
    for target, missing in names.items():
        raise UserError(f"{path}: {missing[0]} is a link to {target}, which it lacks")


def _tar_pass(
    path: Path, wanted: Callable[[str], Any], links: dict[str, str] | None = None
) -> Iterator[tuple[str, int, BinaryIO]]:
    where = "at its start"

    def broken(error: Exception) -> UserError:
        return _damaged(path, "tar archive", where.replace("after", "in"), error)

    with _naming(path, "tar archive", lambda: where), _decompressed(path) as opened:
        stream = _WatchedStream(opened)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps every header it has seen: 600,000 pictures would take 500 MB
                archive.members = []
                if not wanted(member.name):
                    continue
                if member.isreg():
                    where = f"after {member.name}"
                    extracted = archive.extractfile(member)
                    assert extracted is not None
                    raw = _Stream(extracted, broken)
                    yield member.name, member.size, io.BufferedReader(raw)
                elif links is not None and (member.islnk() or member.issym()):
                    base = posixpath.dirname(member.name) if member.issym() else ""
                    target = posixpath.normpath(posixpath.join(base, member.linkname))
                    links[member.name] = target
            while stream.read(1 << 20):
                pass
        if stream.tail.strip(b"\0"):
            raise EOFError("no end-of-archive mark")


# ---- named files, as the LRA release and CSV data sets have them ------------------------------


def named_files(
    source: Path, folder: str, names: Mapping[str, str]
) -> Iterator[tuple[str, str, BinaryIO]]:
    """The files of a task, each once: (split, name to show in messages, open file).

    Args:
        source: the folder with the files, a folder above it (the LRA release's root), or an
            archive with `folder` in it. A tar archive is read in one pass, in its own order.
        folder: the task's folder in the release, such as tsv_data.
        names: split -> file name; a file may be packed (name.gz) too.
    Raises: UserError naming what is missing and what was expected.
    """
    missing = {name: split for split, name in names.items()}
    if source.is_dir():
        base = find_folder(source, folder, list(names.values()))
        for split, name in names.items():
            path = base / name if (base / name).exists() else base / f"{name}.gz"
            with open(path, "rb", buffering=1 << 20) as file:
                yield split, str(path), _unpacked(file, path)
        return
    if source.name.removesuffix(".gz") in missing:  # the one file itself
        if len(missing) > 1:
            raise UserError(f"{source} is one of {', '.join(missing)}: name their folder")
        with open(source, "rb", buffering=1 << 20) as file:
            yield missing[source.name.removesuffix(".gz")], str(source), _unpacked(file, source)
        return

    def wanted(name: str) -> bool:
        path = PurePosixPath(name)  # ._name files are what macOS adds to archives
        return path.name.removesuffix(".gz") in missing and (
            path.parent.name == folder or len(path.parts) == 1
        )

    for member in files(source, wanted):
        with member.open() as file:
            name = PurePosixPath(member.name).name.removesuffix(".gz")
            yield missing.pop(name), member.where, _unpacked(file, Path(member.name))
        if not missing:
            return
    raise UserError(f"{source} has no {', no '.join(f'{folder}/{name}' for name in missing)}")


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix != ".gz":
        return file
    raw = _Stream(gzip.GzipFile(fileobj=file), lambda e: _damaged(path, "gzip file", "", e))
    return io.BufferedReader(raw, 1 << 20)


def find_folder(source: Path, folder: str, needed: list[str]) -> Path:
    """The folder with `needed`: `source` or, up to two levels of lra_release below, `folder`."""
    candidates = [source, *(source / root / folder for root in LRA_ROOTS)]
    absent: dict[Path, list[str]] = {}
    for candidate in candidates:
        there = {name.removesuffix(".gz") for name in _names(candidate)}
        absent[candidate] = [name for name in needed if name not in there]
        if not absent[candidate]:
            return candidate
    for candidate, names in absent.items():
        if len(names) < len(needed):
            present = [name for name in needed if name not in names]
            raise UserError(f"{candidate} has {', '.join(present)} but no {', '.join(names)}")
    empty = " (it is empty)" if not _names(source) else ""
    raise UserError(
        f"{source} holds neither {', '.join(needed)} nor a folder {folder} with them{empty}"
    )


def has_files(folder: str, needed: Sequence[str], source: Path) -> bool:
    """Whether find_folder finds them; true of an archive, which nobody reads beforehand."""
    if not source.is_dir():
        return True
    with contextlib.suppress(UserError):
        find_folder(source, folder, list(needed))
        return True
    return False


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


# ---- tables: CSV and parquet ------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A source of a task: `read(job, path)` yields Examples of a file or folder that `accepts`.

    chunk: examples that a process encodes at a time; 0: encoded where they are read.
    about: what a model is trained on then, if not the original: "JPEG copies".
    """

    expected: str  # what it looks like, for messages and --help
    read: Callable[..., Iterator[Example]]
    accepts: Callable[[Path], bool] = lambda path: path.is_dir() or is_archive(path)
    chunk: int = 0
    about: str = ""


def lines(file: BinaryIO, where: str) -> Iterator[str]:
    """Lines as latin-1 text (one character a byte) with CR LF and CR read as a line feed, which is
    how TFDS opens these files.

    Raises: UserError for a line of more than a million bytes.
    """
    text = io.TextIOWrapper(file, encoding="latin-1", newline=None)
    number = 0
    while line := text.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and line[-1] != "\n":
            raise UserError(f"{where}, line {number}: longer than {LONGEST_LINE:,} bytes")
        yield line


def csv_rows(file: BinaryIO, where: str, skips) -> Iterator[tuple[str, list[str]]]:
    """(where, fields as latin-1 text) of each row of a CSV file; `""` in a field is one quote."""
    quotes, ended = 0, False  # quotes since the last complete row

    def counted():
        nonlocal quotes, ended
        for line in lines(file, where):
            quotes += line.count('"')
            yield line
        ended = True

    rows = csv.reader(counted())
    while True:
        row_where, quotes = f"{where}, line {rows.line_num + 1}", 0
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            skips.skip(row_where, f"not CSV ({error})")
            continue
        if not row:
            skips.skip(row_where, "blank line")
        elif ended and quotes % 2:
            skips.skip(row_where, "the file ends inside a quoted field: it is cut off")
        else:
            yield row_where, row


@dataclass(frozen=True)
class Csv:
    """CSV files, one a split, in a folder or archive.

    files: split -> file name; "all" alone: the driver draws a test set. A file may be packed
        (name.gz), start with a byte order mark or have a header.
    text, label: names that these columns have in a header (case does not matter).
    labels: what stands in the label column for class 0, 1, ...
    columns: the columns of a file without header; empty: it must have one.
    folder: name of the folder in an archive.
    rows: how to read a file without header, like csv_rows.
    """

    files: Mapping[str, str]
    text: tuple[str, ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    columns: tuple[str, ...] = ()
    folder: str = ""
    rows: Callable[..., Iterator[tuple[str, list[str]]]] = csv_rows
    chunk: int = 0
    about: str = ""

    PEEK = 1000  # rows that tell the numbering of the classes

    @property
    def expected(self) -> str:
        return f"folder, zip or tar with {' and '.join(self.files.values())} (or .csv.gz)"

    def accepts(self, path: Path) -> bool:
        single = path.name.removesuffix(".gz") in self.files.values()
        return path.is_dir() or single or is_archive(path)

    def read(self, job, source: Path) -> Iterator[Example]:
        table: dict[str, int] = {}
        for split, where, file in named_files(source, self.folder, self.files):
            yield from self.read_file(job, split, where, file, table)

    def read_file(self, job, split: str, where: str, file, table) -> Iterator[Example]:
        """table: class by what stands for it, filled by the first rows of the first file."""
        rows = self._rows(file, where, job.skips)
        first = list(itertools.islice(rows, self.PEEK))
        if not table:
            table.update(self._numbering([value for _, value, _ in first]))
        for row_where, value, text in itertools.chain(first, rows):
            if job.full(split):
                break
            label = table.get(value)
            if label is not None:
                yield split, row_where, text.encode("latin-1"), label
            elif value in self._border():
                raise UserError(
                    f"{row_where}: class {value} beside {min(table)} to {max(table)}: which class "
                    "is which is not certain"
                )
            else:
                names = ", ".join(self.labels[:-1])
                job.skips.skip(row_where, f"the class is not {names} or {self.labels[-1]}")

    def _rows(self, file, where: str, skips) -> Iterator[tuple[str, str, str]]:
        """(where, class, text as latin-1) of each row."""
        file = file if hasattr(file, "peek") else io.BufferedReader(file)
        start = file.peek(3)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{where} is UTF-16: write it again as UTF-8")
        if start[:3] == b"\xef\xbb\xbf":
            file.read(3)
        line = file.peek(1)[:LONGEST_HEADER].splitlines()[:1]
        text = b"".join(line).decode("latin-1")
        header = [name.strip().lower() for name in next(csv.reader([text]), ())]
        text, label = (
            next((header.index(name) for name in known if name in header), None)
            for known in (self.text, self.label)
        )
        rows, columns = self.rows(file, where, skips), self.columns
        if text is not None and label is not None:
            rows, columns = csv_rows(file, where, skips), tuple(header)
            next(rows)
        elif columns:
            text, label = columns.index(self.text[0]), columns.index(self.label[0])
        else:
            raise UserError(
                f"{where}: no column {self.text[0]} or no {self.label[0]} in its header "
                f"{', '.join(header):.200}"
            )
        expected = f"expected {', '.join(columns[:-1])} and {columns[-1]}"
        for row_where, row in rows:
            if len(row) == len(columns):
                yield row_where, row[label].strip(), row[text]
            else:
                skips.skip(row_where, f"{len(row)} columns, {expected}")

    def _numbering(self, values: list[str]) -> dict[str, int]:
        """Class by what stands for it: as `labels` says, or from 0 in copies numbered so."""
        from_zero = "0" in values and self._border()
        names = map(str, range(len(self.labels))) if from_zero else self.labels
        return {name: label for label, name in enumerate(names)}

    def _border(self) -> tuple[str, ...]:
        """The classes that only one of the numberings from 1 and from 0 has."""
        count = len(self.labels)
        numbers = self.labels == tuple(str(i + 1) for i in range(count))
        return ("0", str(count)) if numbers else ()


@dataclass(frozen=True)
class Parquet:
    """Parquet files as Hugging Face ships data sets: train-00000-of-00002.parquet and so on.

    payload, label: names of the columns; splits: split of the task -> split in the file names.
    picture: the payload is a picture ({"bytes": ...}); else a text.
    """

    payload: str
    labels: tuple[str, ...]
    label: str = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    picture: bool = False
    chunk: int = 0
    about: str = ""
    expected: str = "folder of parquet files as on Hugging Face"

    def accepts(self, path: Path) -> bool:
        return path.is_dir() and any(path.rglob("*.parquet"))

    def read(self, job, source: Path) -> Iterator[Example]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"reading {source} needs pyarrow ({error}): pip install pyarrow"
            ) from error
        for split, name in self.splits.items():
            for path in self._shards(source, name):
                with _naming(path, "parquet file"):
                    try:
                        yield from self._rows(job, split, path, pyarrow.parquet.ParquetFile(path))
                    except pyarrow.ArrowException as error:
                        raise _damaged(path, "parquet file", "", error) from error

    def _rows(self, job, split: str, path: Path, file) -> Iterator[Example]:
        schema = file.schema_arrow
        for column in (self.payload, self.label):
            if column not in schema.names:
                raise UserError(f"{path} has no column {column}, only {', '.join(schema.names)}")
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about.get("info", {}).get("features", {}).get(self.label, {}).get("names")
        if names is not None and [n.lower() for n in names] != [n.lower() for n in self.labels]:
            raise UserError(
                f"{path} numbers its {self.label} {', '.join(names)}; expected "
                f"{', '.join(self.labels)}"
            )
        number = 0
        for batch in file.iter_batches(1000, columns=[self.payload, self.label]):
            payloads, labels = batch.column(0), batch.column(1).to_pylist()
            payloads = (payloads if self.picture else payloads.cast("binary")).to_pylist()
            for payload, label in zip(payloads, labels, strict=True):
                number += 1
                where = f"{path}, row {number}"
                if job.full(split):
                    return
                if self.picture and payload is not None:
                    payload = payload["bytes"]
                if payload is None:
                    job.skips.skip(where, f"no {self.payload}")
                elif label not in range(len(self.labels)):
                    job.skips.skip(where, f"the label is not in 0..{len(self.labels) - 1}")
                else:
                    yield split, where, payload, label

    @staticmethod
    def _shards(source: Path, name: str) -> list[Path]:
        pattern = re.compile(rf"(?:^|[-_.]){name}(?:-(\d+)-of-(\d+)(?:-\w+)?)?\.parquet$")
        found = {p: m for p in sorted(source.rglob("*.parquet")) if (m := pattern.search(p.name))}
        number = {int(match[2]) if match[2] else 1 for match in found.values()}
        if number != {len(found)}:
            raise UserError(
                f"{source} has {len(found)} parquet files of the split {name}, "
                f"expected {max(number, default='one or more')}"
            )
        return list(found)


# ---- TensorFlow Datasets ----------------------------------------------------------------------


@dataclass(frozen=True)
class Tfds:
    """A prepared TensorFlow Datasets folder, read without any attempt to download.

    tensorflow is imported when an example is read, not before. Nothing is downloaded here: TFDS
    retries for minutes without a network, and download.py fetches the same data with checks.

    name: of the data set, with its configuration if it has several ("imdb_reviews/plain_text").
    payload, label: features; labels: the names that the label's numbers must stand for.
    splits: split of the task -> split of TFDS.
    encoded: the payload is a picture to give as the bytes of its file; identity: the feature that
        names it.
    """

    name: str
    payload: str
    labels: tuple[str, ...]
    label: str = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    encoded: bool = False
    identity: str = ""
    batch: int = 256
    chunk: int = 0
    about: str = ""

    def find(self, folder: Path) -> Path | None:
        """Folder of the newest prepared version, None if there is none.

        folder: the one that holds the data set, or the data set itself, or a version of it.
        """
        name, _, config = self.name.partition("/")
        for root in (folder / name, folder):
            for pattern in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
                found = [
                    path.parent
                    for path in root.glob(pattern)
                    if name in path.parts
                    and not path.parent.name.startswith("incomplete.")
                    and path.parent.parent.name in (name, config)
                ]
                if found:
                    return max(found, key=lambda folder: _version(folder.name))
        return None

    def read(self, job, folder: Path) -> Iterator[Example]:
        for split, name in self.splits.items():
            for number, row in enumerate(self._rows(folder, name)):
                if job.full(split):
                    break
                which = row[self.identity].decode() if self.identity else number
                where = f"{folder} {name}/{which}"
                yield split, where, row[self.payload], int(row[self.label])

    def _rows(self, folder: Path, split: str) -> Iterator[dict[str, Any]]:
        """Examples, file after file, as dicts of bytes and NumPy values.

        Raises: UserError if tensorflow is not installed, the split is missing, the labels have
            another order or a file is damaged.
        """
        # none of its notes on the hardware; what goes wrong is raised
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            import tensorflow as tf
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"reading {folder} needs tensorflow and tensorflow-datasets ({error}): "
                "pip install -r requirements.txt, or use --source with the original files"
            ) from error
        # reading data must not take a GPU's memory from somebody's training
        tf.config.set_visible_devices([], "GPU")
        # tfds, tensorflow and protobuf raise many kinds of exceptions for one thing: damage
        try:
            builder = tfds.builder_from_directory(str(folder))
        except Exception as error:
            raise _damaged_tfds(folder, "its metadata", error) from error
        info, features = builder.info, builder.info.features
        if split not in info.splits:
            raise UserError(f"{folder} has no split {split}, only {sorted(info.splits)}")
        keys = [key for key in (self.payload, self.label, self.identity) if key]
        for key in keys:
            if key not in features:
                raise UserError(f"{folder} has no feature {key}")
        if list(features[self.label].names) != list(self.labels):
            raise UserError(
                f"{folder} numbers its {self.label} {', '.join(features[self.label].names)}; "
                f"expected {', '.join(self.labels)}"
            )
        if info.file_format != tfds.core.FileFormat.TFRECORD:
            raise UserError(f"{folder} is not in TFDS's tfrecord format; prepare it in that")
        # parsing whole batches takes a tenth of the time of `as_dataset`, which parses one by one
        wanted = {
            key: tf.io.FixedLenFeature([], tf.int64 if key == self.label else tf.string)
            for key in keys
        }
        decode = not self.encoded and isinstance(features[self.payload], tfds.features.Image)
        count = 0
        try:
            paths = [str(path) for path in info.splits[split].filepaths]
            records = tf.data.TFRecordDataset(paths).batch(self.batch)
            # not a function of ours: tensorflow would translate its source, half a second
            parsed = records.map(functools.partial(tf.io.parse_example, features=wanted))
            for rows in parsed.prefetch(2).as_numpy_iterator():
                for values in zip(*(rows[key] for key in keys), strict=True):
                    row = dict(zip(keys, values, strict=True))
                    if decode:
                        row[self.payload] = tf.io.decode_image(row[self.payload]).numpy()
                    count += 1
                    yield row
        except MemoryError:
            raise
        except tf.errors.PermissionDeniedError as error:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder)) from error
        except Exception as error:
            raise _damaged_tfds(folder, split, error) from error
        if count != info.splits[split].num_examples:
            expected = info.splits[split].num_examples
            raise UserError(f"{folder} {split} holds {count:,} of {expected:,} examples")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _damaged_tfds(folder: Path, what: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{folder} is damaged or incomplete ({what}: {reason})")
