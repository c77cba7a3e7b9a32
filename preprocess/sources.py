"""Reading what people have on disk: folders, zip and tar archives, CSV, parquet, TFDS.

Nothing is unpacked. Damage is a UserError that names the file; what the environment refuses (no
permission, a failing disk, a network file system that went away) stays an OSError: it says
nothing about the data.
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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from training.errors import UserError

# (split, where it stands for messages, payload, label); split "all": the driver draws a test set
Example = tuple[str, str, Any, int]

# what zipfile, tarfile and the decompressors raise for damaged files; RuntimeError: a password
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, struct.error),
    *(gzip.BadGzipFile, UnicodeDecodeError, NotImplementedError, RuntimeError, OverflowError),
)
LONGEST_LINE = 1 << 20  # bytes; a longer line is no row, and reading it whole could fill memory
LONGEST_ROW = 64 << 20  # of the release, which has texts in its rows
LONGEST_HEADER = 8 << 10
LRA_ROOTS = ("", "lra_release", "lra_release/lra_release")  # where the release's folders may be
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


class Fault(UserError):
    """What is wrong with one example, counted by its text. always: left out also without
    --on_error skip (faults that published sources are known for)."""

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


def damaged(path, kind: str, error: Exception, where: str = "") -> UserError:
    reason = f"{where}{': ' if where else ''}{error or type(error).__name__}"
    return UserError(f"{path} is cut off, damaged or not a {kind} ({reason}): get it again")


@contextlib.contextmanager
def _naming(path, kind: str, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Damage becomes a UserError that names `path`; other read errors get its name."""
    try:
        yield
    except (OSError, *DAMAGE) as error:
        if is_damage(error):
            raise damaged(path, kind, error, where()) from error
        error.filename = error.filename or str(path)
        raise


class _Stream(io.RawIOBase):
    """What `opener()` opens in an archive; damage in it is the UserError that `broken` makes."""

    def __init__(self, opener: Callable[[], Any], broken: Callable[[Exception], UserError]):
        self.opener, self.broken, self.file = opener, broken, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.readall(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self, size: int = -1) -> bytes:
        try:
            self.file = self.file or self.opener()
            return self.file.read(size)
        except (OSError, *DAMAGE) as error:
            if is_damage(error):
                raise self.broken(error) from error
            raise


_zip = functools.lru_cache(1)(zipfile.ZipFile)  # opened once a process


class Member:
    """A file of a folder, zip or tar archive, by its name below it; all but those of tar archives
    can be sent to another process and read there."""

    __slots__ = ("archive", "file", "name", "where")

    def __init__(self, name: str, where: str, archive: str = "", file: BinaryIO | None = None):
        self.name, self.where, self.archive, self.file = name, where, archive, file

    def open(self) -> BinaryIO:
        if self.file is not None:
            return self.file
        if not self.archive:
            return open(self.where, "rb", buffering=1 << 20)
        broken = Fault("the zip archive is damaged at this file")
        raw = _Stream(lambda: _zip(self.archive).open(self.name), lambda error: broken)
        return io.BufferedReader(raw, 1 << 16)

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

    def payload(self, limit: int = -1) -> "Member | bytes":
        """Itself, to be read where it is needed; or its bytes if it can only be read now."""
        return self if self.file is None else self.file.read(limit)


def files(path: Path, wanted: Callable[[str], Any] = lambda name: True) -> Iterator[Member]:
    """The files of a folder (sorted, its own before those of its folders), zip or tar archive
    for whose names `wanted` is true.

    A tar archive is read in one pass, in its order: use each member before the next. Stopping
    early skips the check of the rest. Links to files of it come last, from a second pass.
    Raises: UserError naming the archive if it is cut off or damaged; OSError."""
    if path.is_dir():
        yield from (m for m in _walk(str(path), "", (os.stat(path),)) if wanted(m.name))
    elif zipfile.is_zipfile(path):
        with _naming(path, "zip archive"), zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        for info in infos:
            if not info.is_dir() and wanted(info.filename):
                yield Member(info.filename, f"{path}:{info.filename}", str(path))
    else:
        links: dict[str, str] = {}  # name -> what it is a link to
        yield from _tar_members(path, wanted, links)
        names: dict[str, list[str]] = {}  # what is linked to -> names
        for name, target in links.items():
            while target in links and target != name:
                target = links[target]
            names.setdefault(target, []).append(name)
        targets = _tar_members(path, lambda name: posixpath.normpath(name) in names, {})
        for member in targets if names else ():
            data = member.read()
            for name in names.pop(posixpath.normpath(member.name)):
                yield Member(name, f"{path}:{name}", file=io.BytesIO(data))
        for target, missing in names.items():
            raise UserError(f"{path}: {missing[0]} is a link to {target}, which it lacks")


def _walk(folder: str, below: str, above: tuple) -> Iterator[Member]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    folders = [entry for entry in found if entry.is_dir()]  # links to folders too
    inner = {entry.name for entry in folders}
    yield from (Member(below + e.name, e.path) for e in found if e.name not in inner)
    for entry in folders:
        state = os.stat(entry.path)
        if entry.is_symlink() and any(os.path.samestat(state, outer) for outer in above):
            raise UserError(f"{entry.path} is a link to a folder that it lies in")
        yield from _walk(entry.path, f"{below}{entry.name}/", (*above, state))


def _opener(head: bytes):
    return next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)


def is_archive(path: Path) -> bool:
    """Whether a file starts like gzip, bzip2, xz, tar or is a zip."""
    with _naming(path, "archive"), open(path, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    return bool(_opener(head)) or head[257:262] == b"ustar" or zipfile.is_zipfile(path)


class _Header(tarfile.TarInfo):
    """tarfile ends without a word at a header that is cut off or damaged: here it raises."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            ended = len(buf) < tarfile.BLOCKSIZE
            raise tarfile.ReadError("no end-of-archive mark" if ended else str(error)) from error


def _tar_members(path: Path, wanted, links: dict[str, str]) -> Iterator[Member]:
    where = "at its start"

    def broken(error: Exception) -> UserError:
        return damaged(path, "tar archive", error, where.replace("after", "in"))

    with _naming(path, "tar archive", lambda: where), open(path, "rb") as packed:
        opener = _opener(packed.read(6))
        packed.seek(0)
        stream = opener(packed) if opener else packed
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps every header it has seen: 600,000 pictures would take 500 MB
                archive.members = []
                if not wanted(member.name):
                    continue
                if member.isreg():
                    where = f"after {member.name}"
                    raw = _Stream(functools.partial(archive.extractfile, member), broken)
                    file = io.BufferedReader(raw)
                    yield Member(member.name, f"{path}:{member.name}", file=file)
                elif member.islnk() or member.issym():
                    base = posixpath.dirname(member.name) if member.issym() else ""
                    target = posixpath.normpath(posixpath.join(base, member.linkname))
                    links[member.name] = target
            while stream.read(1 << 20):
                pass  # to its checksum


def named_files(source: Path, folder: str, names: Mapping[str, str]):
    """The files of a task, each once: (split, name to show in messages, open file).

    source: the folder with the files, a folder above it (the LRA release's root), or an archive
        with `folder` in it, which is read in its own order.
    names: split -> file name; a file may be packed (name.gz) too.
    Raises: UserError naming what is missing and what was expected."""
    missing = {name: split for split, name in names.items()}

    def wanted(name: str) -> bool:
        path = PurePosixPath(name)  # ._name files are what macOS adds to archives
        known = path.name.removesuffix(".gz") in missing
        return known and (path.parent.name == folder or len(path.parts) == 1)

    if source.is_dir():
        base = find_folder(source, folder, list(missing))
        there = (name if (base / name).exists() else f"{name}.gz" for name in list(missing))
        members = (Member(name, str(base / name)) for name in there)
    elif source.name.removesuffix(".gz") in missing:  # the one file itself
        if len(missing) > 1:
            raise UserError(f"{source} is one of {', '.join(missing)}: name their folder")
        members = iter([Member(source.name, str(source))])
    else:
        members = files(source, wanted)
    for member in members:
        name = PurePosixPath(member.name).name
        with member.open() as file:
            split = missing.pop(name.removesuffix(".gz"))
            yield split, member.where, _unpacked(file, name) if name.endswith(".gz") else file
        if not missing:
            return
    raise UserError(f"{source} has no {', no '.join(f'{folder}/{name}' for name in missing)}")


def _unpacked(file: BinaryIO, name: str) -> BinaryIO:
    opener = functools.partial(gzip.GzipFile, fileobj=file)
    return io.BufferedReader(_Stream(opener, lambda e: damaged(name, "gzip file", e)), 1 << 20)


def find_folder(source: Path, folder: str, needed: Sequence[str]) -> Path:
    """The folder with `needed`: `source` or, up to two levels of lra_release below, `folder`."""
    absent = {}
    for candidate in (source, *(source / root / folder for root in LRA_ROOTS)):
        there = set(os.listdir(candidate)) if candidate.is_dir() else set()
        absent[candidate] = [name for name in needed if not {name, f"{name}.gz"} & there]
        if not absent[candidate]:
            return candidate
    for candidate, names in absent.items():
        if len(names) < len(needed):
            present = ", ".join(name for name in needed if name not in names)
            raise UserError(f"{candidate} has {present} but no {', '.join(names)}")
    nor = f"nor a folder {folder} with them{'' if os.listdir(source) else ' (it is empty)'}"
    raise UserError(f"{source} holds neither {', '.join(needed)} {nor}")


def has_files(folder: str, needed: Sequence[str], source: Path) -> bool:
    """Whether find_folder finds them; true of an archive, which nobody reads beforehand."""
    with contextlib.suppress(UserError):
        return not source.is_dir() or bool(find_folder(source, folder, needed))
    return False


@dataclass(frozen=True)
class Reader:
    """A source of a task: `read(job, path)` yields Examples of a file or folder that `accepts`."""

    expected: str  # what it looks like, for messages and --help
    read: Callable[..., Iterator[Example]]
    accepts: Callable[[Path], bool] = lambda path: path.is_dir() or is_archive(path)
    chunk: int = 0  # examples that a process encodes at a time; 0: encoded where they are read
    about: str = ""  # what a model is trained on then, if not the original: "JPEG copies"


def lines(file: BinaryIO, where: str) -> Iterator[str]:
    """Lines as latin-1 text (one character a byte) with CR LF and CR read as a line feed, which is
    how TFDS opens these files. Raises UserError for a line of more than a million bytes."""
    text = io.TextIOWrapper(file, encoding="latin-1", newline=None)
    for number, line in enumerate(iter(lambda: text.readline(LONGEST_LINE), ""), 1):
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


def tsv_rows(file: BinaryIO, where: str, skips, columns: int, first: int = 1):
    """(where, fields as bytes, whether a line end follows) of each line from `first` on; quotes
    are ordinary characters, CR LF is a line end."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_ROW), b""), first):
        row_where, ended = f"{where}, line {number}", line.endswith(b"\n")
        if len(line) == LONGEST_ROW and not ended:
            raise UserError(f"{row_where}: longer than {LONGEST_ROW:,} bytes")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        # split() and count() look at every byte in turn, half the time of a row; partition() leaps
        fields = line.split(b"\t", columns - 2)
        left, tab, right = fields.pop().partition(b"\t")
        fields += [left, right] if tab else [left]
        if not line.strip():
            skips.skip(row_where, "blank line")
        elif b"\r" in line:
            skips.skip(row_where, "a carriage return inside the line")
        elif len(fields) != columns or b"\t" in right:
            count = line.count(b"\t") + 1
            skips.skip(row_where, f"{count} columns, expected {columns}")
        else:
            yield row_where, fields, ended


@dataclass(frozen=True)
class Csv:
    """CSV files, one a split, in a folder or archive. A file may be packed (name.gz), start with a
    byte order mark or have a header."""

    files: Mapping[str, str]  # split -> file name; "all" alone: the driver draws a test set
    text: tuple[str, ...]  # names that the column has in a header (case does not matter)
    label: tuple[str, ...]
    labels: tuple[str, ...]  # what stands in the label column for class 0, 1, ...
    columns: tuple[str, ...] = ()  # of a file without header; empty: it must have one
    folder: str = ""  # its name in an archive
    rows: Callable[..., Iterator[tuple[str, list[str]]]] = csv_rows  # of a file without header
    chunk: int = 0
    about: str = ""

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
        """table: class by what stands for it, filled by the first rows of the first file: as
        `labels` says, or from 0 in copies that are numbered so."""
        count = len(self.labels)
        from_one = self.labels == tuple(str(i + 1) for i in range(count))
        borders = ("0", str(count)) if from_one else ()  # of the numberings from 0 and 1, one has
        rows = self._rows(file, where, job.skips)
        first = list(itertools.islice(rows, 1000))
        if not table:
            from_zero = from_one and any(value == "0" for _, value, _ in first)
            names = map(str, range(count)) if from_zero else self.labels
            table.update({name: label for label, name in enumerate(names)})
        for row_where, value, text in itertools.chain(first, rows):
            if job.full(split):
                break
            label = table.get(value)
            if label is not None:
                yield split, row_where, text.encode("latin-1"), label
            elif value in borders:
                beside = f"class {value} beside {min(table)} to {max(table)}"
                raise UserError(f"{row_where}: {beside}: which class is which is not certain")
            else:
                names = f"{', '.join(self.labels[:-1])} or {self.labels[-1]}"
                job.skips.skip(row_where, f"the class is {value[:20]!r}, not {names}")

    def _rows(self, file, where: str, skips) -> Iterator[tuple[str, str, str]]:
        """(where, class, text as latin-1) of each row."""
        file = file if hasattr(file, "peek") else io.BufferedReader(file)
        start = file.peek(3)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{where} is UTF-16: write it again as UTF-8")
        if start[:3] == b"\xef\xbb\xbf":
            file.read(3)
        line = b"".join(file.peek(1)[:LONGEST_HEADER].splitlines()[:1]).decode("latin-1")
        header = [name.strip().lower() for name in next(csv.reader([line]), ())]
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
            names = f"{self.text[0]} or no {self.label[0]}"
            raise UserError(f"{where}: no column {names} in its header {', '.join(header):.200}")
        expected = f"expected {', '.join(columns[:-1])} and {columns[-1]}"
        for row_where, row in rows:
            if len(row) == len(columns):
                yield row_where, row[label].strip(), row[text]
            else:
                skips.skip(row_where, f"{len(row)} columns, {expected}")


def check_names(where, column: str, names: Sequence[str], expected: Sequence[str]) -> None:
    """Raises UserError if a label's numbers stand for other names than expected."""
    if [name.lower() for name in names] != [name.lower() for name in expected]:
        expected = ", ".join(expected)
        raise UserError(f"{where} numbers its {column} {', '.join(names)}; expected {expected}")


@dataclass(frozen=True)
class Parquet:
    """Parquet files as Hugging Face ships data sets: train-00000-of-00002.parquet and so on."""

    payload: str  # name of the column
    labels: tuple[str, ...]
    label: str = "label"
    picture: bool = False  # the payload is a picture ({"bytes": ...}), not a text
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
            hint = f"reading {source} needs pyarrow ({error}): pip install pyarrow"
            raise UserError(hint) from error
        for split in ("train", "test"):
            for path in self._shards(source, split):
                with _naming(path, "parquet file"):
                    try:
                        yield from self._rows(job, split, path, pyarrow.parquet.ParquetFile(path))
                    except pyarrow.ArrowException as error:
                        raise damaged(path, "parquet file", error) from error

    def _rows(self, job, split: str, path: Path, file) -> Iterator[Example]:
        schema = file.schema_arrow
        for column in (self.payload, self.label):
            if column not in schema.names:
                raise UserError(f"{path} has no column {column}, only {', '.join(schema.names)}")
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        label = about.get("info", {}).get("features", {}).get(self.label, {})
        check_names(path, self.label, label.get("names") or self.labels, self.labels)
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
    def _shards(source: Path, split: str) -> list[Path]:
        pattern = re.compile(rf"(?:^|[-_.]){split}(?:-(\d+)-of-(\d+)(?:-\w+)?)?\.parquet$")
        found = {p: m for p in sorted(source.rglob("*.parquet")) if (m := pattern.search(p.name))}
        number = {int(match[2] or 1) for match in found.values()}
        if number != {len(found)}:
            expected = max(number, default="one or more")
            have = f"{source} has {len(found)} parquet files of the split {split}"
            raise UserError(f"{have}, expected {expected}")
        return list(found)


@dataclass(frozen=True)
class Tfds:
    """A prepared TensorFlow Datasets folder. Nothing is downloaded here: TFDS retries for minutes
    without a network, and download.py fetches the same data with checks."""

    name: str  # with its configuration if it has several ("imdb_reviews/plain_text")
    payload: str  # a feature
    labels: tuple[str, ...]  # the names that the label's numbers must stand for
    label: str = "label"
    test: str = "test"  # name of the split
    encoded: bool = False  # the payload is a picture to give as the bytes of its file
    identity: str = ""  # the feature that names it
    batch: int = 256
    chunk: int = 0
    about: str = ""

    def find(self, folder: Path) -> Path | None:
        """Folder of the newest prepared version, None if there is none, in a folder that holds the
        data set, or is the data set itself, or a version of it."""

        def version(path: Path) -> tuple[int, ...]:
            return tuple(int(part) for part in path.name.split(".") if part.isdecimal())

        name, _, config = self.name.partition("/")
        found = (
            path.parent
            for depth in range(4)
            for path in folder.glob("*/" * depth + "dataset_info.json")
            if name in path.parts and path.parent.parent.name in (name, config)
        )
        whole = (place for place in found if not place.name.startswith("incomplete."))
        return max(whole, key=version, default=None)

    def read(self, job, folder: Path) -> Iterator[Example]:
        for split, name in (("train", "train"), ("test", self.test)):
            for number, row in enumerate(self._rows(folder, name)):
                if job.full(split):
                    break
                which = row[self.identity].decode() if self.identity else number
                yield split, f"{folder} {name}/{which}", row[self.payload], int(row[self.label])

    def _rows(self, folder: Path, split: str) -> Iterator[dict[str, Any]]:
        """Examples, file after file, as dicts of bytes and NumPy values. Raises: UserError if
        tensorflow or the split is missing, the labels have another order, a file is damaged."""
        # none of its notes on the hardware; what goes wrong is raised
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            import tensorflow as tf
            import tensorflow_datasets as tfds
        except ImportError as error:
            need = f"reading {folder} needs tensorflow and tensorflow-datasets ({error})"
            todo = "pip install -r requirements.txt, or use --source with the original files"
            raise UserError(f"{need}: {todo}") from error
        # reading data must not take a GPU's memory from somebody's training
        tf.config.set_visible_devices([], "GPU")

        def broken(what: str, error: Exception) -> UserError:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return UserError(f"{folder} is damaged or incomplete ({what}: {reason})")

        # tfds, tensorflow and protobuf raise many kinds of exceptions for one thing: damage
        try:
            info = tfds.builder_from_directory(str(folder)).info
        except Exception as error:
            raise broken("its metadata", error) from error
        if split not in info.splits:
            raise UserError(f"{folder} has no split {split}, only {sorted(info.splits)}")
        features = info.features
        keys = [key for key in (self.payload, self.label, self.identity) if key]
        for key in keys:
            if key not in features:
                raise UserError(f"{folder} has no feature {key}")
        check_names(folder, self.label, features[self.label].names, self.labels)
        if info.file_format != tfds.core.FileFormat.TFRECORD:
            raise UserError(f"{folder} is not in TFDS's tfrecord format; prepare it in that")
        # parsing whole batches takes a tenth of the time of `as_dataset`, which parses one by one
        wanted = {
            key: tf.io.FixedLenFeature([], tf.int64 if key == self.label else tf.string)
            for key in keys
        }
        decode = not self.encoded and isinstance(features[self.payload], tfds.features.Image)
        count, expected = 0, info.splits[split].num_examples
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
            raise broken(split, error) from error
        if count != expected:
            raise UserError(f"{folder} {split} holds {count:,} of {expected:,} examples")
