"""Reading what people have on disk: folders and tar archives (plain or gzip), not unpacked.

A damaged archive must never look like a short one: tarfile ends quietly at a header that is cut
off, so `archive_members` checks the end of the archive itself.
"""

import contextlib
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

TAR_BLOCK = 512
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
# what zipfile raises for damaged archives, found by fuzzing; RuntimeError: a password
ZIP_DAMAGE = (
    *(zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, struct.error),
    *(UnicodeDecodeError, NotImplementedError, RuntimeError, OverflowError, OSError),
)


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


class _Member(io.RawIOBase):
    """A file in an archive whose reader gets ValueError, as from `archive_members`, for damage."""

    def __init__(self, file: BinaryIO, archive: Path, name: str):
        self.file, self.archive, self.name = file, archive, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(-1)

    def _read(self, size: int) -> bytes:
        try:
            return self.file.read(size)
        except DAMAGE as error:
            raise _damaged(self.archive, f"in {self.name}", error) from error


def _damaged(archive: Path, where: str, error: Exception) -> ValueError:
    return ValueError(
        f"{archive} is cut off, damaged or not a tar archive ({where}: {error}): get it again"
    )


def is_archive(path: Path) -> bool:
    """Whether a file starts like gzip or tar (the LRA release is a tar that ends in .gz)."""
    with open(path, "rb") as file:
        head = file.read(TAR_BLOCK)
    return head[:2] == b"\x1f\x8b" or head[257:262] == b"ustar"


def archive_members(path: Path) -> Iterator[tuple[str, int, BinaryIO]]:
    """(name, bytes, file) of the regular files of a tar archive, in its order, in one pass.

    Each file must be read before the next is asked for. Stopping early is fine and skips the check
    of the rest.

    Raises: ValueError naming the archive if it is cut off, damaged or no tar archive.
    """
    where = "at its start"
    try:
        with open(path, "rb") as file:
            head = file.read(2)
            file.seek(0)
            opened = gzip.GzipFile(fileobj=file) if head == b"\x1f\x8b" else file
            stream = _WatchedStream(opened)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                while (member := archive.next()) is not None:
                    # tarfile keeps every header it has seen: 600,000 pictures would take 500 MB
                    archive.members = []
                    if member.isreg():
                        where = f"after {member.name}"
                        extracted = archive.extractfile(member)
                        assert extracted is not None
                        raw = _Member(extracted, path, member.name)
                        yield member.name, member.size, io.BufferedReader(raw)
                while stream.read(1 << 20):
                    pass
            if stream.tail.strip(b"\0"):
                raise EOFError("no end-of-archive mark")
    except DAMAGE as error:
        raise _damaged(path, where, error) from error


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive; reading it too belongs into the block.

    Raises: ValueError naming the archive if it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ZIP_DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is a damaged zip archive ({reason}): get it again") from error


def split_files(
    source: Path, folder: str, names: Mapping[str, str]
) -> Iterator[tuple[str, str, BinaryIO]]:
    """The files of a task, each once: (split, name to show in messages, open binary file).

    Args:
        source: the folder with the files, a folder above it (the LRA release's root), or a tar
            archive with `folder` in it. An archive is read in one pass and gives its own order.
        folder: the task's folder in the release, such as tsv_data.
        names: split -> file name.
    Raises: ValueError naming what is missing and what was expected.
    """
    expected = f"{folder}/{{{','.join(names.values())}}}"
    if not source.exists():
        raise ValueError(f"{source} does not exist; expected a folder or archive with {expected}")
    if source.is_dir():
        base = find_folder(source, folder, list(names.values()))
        for split, name in names.items():
            with open(base / name, "rb", buffering=1 << 20) as file:
                yield split, str(base / name), file
        return
    if not is_archive(source):
        raise ValueError(f"{source} is neither a folder nor a tar archive with {expected}")
    missing = {name: split for split, name in names.items()}
    for member, _, file in archive_members(source):
        path = PurePosixPath(member)
        # ._name files are what macOS adds to archives
        if path.name in missing and (path.parent.name == folder or len(path.parts) == 1):
            yield missing.pop(path.name), f"{source}:{member}", file
            if not missing:
                return
    raise ValueError(f"{source} has no {', no '.join(f'{folder}/{name}' for name in missing)}")


def find_folder(source: Path, folder: str, needed: list[str]) -> Path:
    """The folder with `needed`: `source` or, up to two levels of lra_release below, `folder`."""
    candidates = [
        source,
        source / folder,
        source / "lra_release" / folder,
        source / "lra_release" / "lra_release" / folder,
    ]
    for candidate in candidates:
        if all((candidate / name).exists() for name in needed):
            return candidate
    for candidate in candidates:
        present = [name for name in needed if (candidate / name).exists()]
        if present:
            absent = [name for name in needed if name not in present]
            raise ValueError(f"{candidate} has {', '.join(present)} but no {', '.join(absent)}")
    raise ValueError(
        f"{source} holds neither {', '.join(needed)} nor a folder {folder} with them"
        + (" (it is empty)" if not any(source.iterdir()) else "")
    )


def default_release() -> Path:
    """Where download.py leaves the LRA release: unpacked, else its archive.

    Raises: ValueError saying how to get it.
    """
    for path in (Path("data/lra_release"), Path("data/lra_release.gz")):
        if path.exists():
            return path
    raise ValueError(
        "neither data/lra_release nor data/lra_release.gz is here: python preprocess/download.py "
        "fetches the release, --source names one you have elsewhere"
    )
