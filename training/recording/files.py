"""Files written so that no moment can lose one, and locks, for the whole project.

Writing goes to a temporary file in the same folder, which is flushed to the disk before it takes
the file's name; whoever kills the process, pulls the plug or fills the disk leaves the old file
or the new one, whole. A file system that offers no locks, or cannot flush a folder, is said once
and worked with.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from training.errors import UserError

# what file systems answer that do not offer a call, instead of failing in it
NOT_OFFERED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)
_said: set[str] = set()


class CheckpointError(UserError):
    """A checkpoint or mask file cannot be read or written; the message is one sentence."""


def _say_once(path: str | Path, what: str, error: OSError) -> None:
    if what not in _said:
        _said.add(what)
        with contextlib.suppress(OSError, ValueError):  # stderr may be gone
            print(f"{path}: the file system {what} ({error.strerror})", file=sys.stderr)


def lock(file: int | IO, path: str | Path) -> bool:
    """Locks an open file of this name until it is closed or the process ends, however it ends.

    Returns: False if the file system offers no locks.
    Raises: BlockingIOError if another process has the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except OSError as error:
        _say_once(path, "has no locks: nothing keeps two processes from writing one file", error)
        return False


def open_locked(path: Path, buffering: int = -1) -> BinaryIO:
    """Opens a file for appending and for reading anywhere, makes it if need be, and locks it.

    Raises: BlockingIOError if another process has the lock; OSError.
    """
    while True:
        file = open(path, "a+b", buffering)  # noqa: SIM115 (the caller closes it)
        try:
            lock(file, path)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # between opening and locking it was given another name


def sync(file: int | IO, path: str | Path) -> None:
    """Waits until an open file of this name is on the disk. Raises OSError if it cannot get
    there."""
    try:
        os.fsync(file if isinstance(file, int) else file.fileno())
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        _say_once(path, "cannot flush: a power cut may lose what was written last", error)


def sync_folder(folder: Path) -> None:
    """Waits until new names in a folder are on the disk, as far as its file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder to write in but not to list
        return
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(path: str | Path) -> None:
    """Remove the temporary files for `path` that no living process is writing."""
    path = Path(path)
    for temporary in path.parent.glob(f".{_glob_escape(path.name)}.*.saving"):
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary, os.O_RDWR)  # NFS locks only what may be written
            try:
                if lock(descriptor, temporary):
                    temporary.unlink()
            finally:
                os.close(descriptor)


class _Sink:
    """The file torch.save writes to.

    It keeps the first error for later instead of raising it: torch's C++ writer turns an exception
    of its sink into a RuntimeError without the errno, so "disk full" could not be told from a bug.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | MemoryError | None = None

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[os.write(self.descriptor, rest) :]
        except (OSError, MemoryError) as error:
            self.error = error
        return size

    def flush(self) -> None:
        pass  # nothing is buffered here


def replace_file(path: Path, write: Callable[[_Sink], Any], previous: Path | None = None) -> None:
    """Have `write` produce a file that takes the place of `path` at once, or not at all.

    write: is given an object with a method write(bytes).
    previous: where the whole checkpoint that `path` was stays.
    Raises: CheckpointError if the disk is full, the folder is not writable, ...
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, write, previous)
    except OSError as error:
        kept = "; the file of that name is unchanged" if path.exists() else ""
        reason = error.strerror or error
        raise CheckpointError(f"could not save {path}: {reason}{kept}") from error


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file in an existing folder by `data`, at once. Raises OSError."""
    _replace(path, lambda sink: sink.write(data))


def _replace(path: Path, write: Callable[[_Sink], Any], previous: Path | None = None) -> None:
    remove_stale_temporaries(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.saving")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        lock(descriptor, temporary)  # nobody else has it: the name is new
        sink = _Sink(descriptor)
        write(sink)
        if sink.error is not None:
            raise sink.error
        sync(descriptor, path)
        # a damaged file must not push out the good one before it
        if previous is not None and path.exists() and _is_whole(path):
            _keep_as(path, previous)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def _keep_as(path: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous` too: both names are whole at every moment."""
    # under the name of `path`, so that the next save removes what a kill leaves here
    link = path.with_name(f".{path.name}.{secrets.token_hex(4)}.saving")
    try:
        os.link(path, link)
    except OSError:
        # No hard links here (FAT, some network file systems): for a moment only `previous` exists,
        # and load_last_checkpoint finds it.
        os.replace(path, previous)
        return
    try:
        os.replace(link, previous)
    finally:
        # A rename onto another name of the same file does nothing and leaves both names.
        link.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            verify_checksums(file)
        return True
    except MemoryError:
        raise
    except Exception:  # a damaged zip can raise almost anything
        return False


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def verify_checksums(file: Any) -> None:
    """Read the whole zip against its CRCs, which torch.load does not look at. Raises whatever is
    wrong.

    What no CRC covers (headers, padding) either does not reach the loaded values or breaks the
    zip: the tests flip every such bit.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise zipfile.BadZipFile("two records of one name")
        for record in records:
            stored = record.compress_type == zipfile.ZIP_STORED
            if not stored or record.file_size != record.compress_size:
                raise zipfile.BadZipFile("torch stores its records as they are")
            # One flipped bit makes a record a folder for torch's reader, which then leaves the
            # tensor's memory as it happens to be; Python's zipfile does not look at that bit.
            if record.external_attr & 0x10:
                raise zipfile.BadZipFile("torch writes no folders")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("checksum")
