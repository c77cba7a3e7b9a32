"""A pickle's arrays as memory-mapped files: how they are written once, and opened.

The cache `<pickle>.cache/` lies beside the pickle, or in the user's cache folder if it cannot be
written there. It belongs to one state of the pickle (size, modification time and inode; if only
the last two differ, the content decides).

A cache becomes valid by the atomic replacement of one small file, meta.json, which names its
arrays. So a process that is killed while writing leaves nothing that counts, and processes that
start at once cannot disturb each other: one writes, the others wait for it as long as it makes
progress, and write their own if it hangs.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from training.data import manifest, safe_pickle
from training.data.examples import Dataset
from training.errors import UserError
from training.recording import files

VERSION = 1  # of the cache's layout


CHUNK = 256  # examples converted at a time


HANGS_AFTER = 30.0  # seconds without progress of another process that writes the cache


class Wanted:
    """What the task asks of a pickle, and the sentences for one that does not have it."""

    def __init__(
        self, path: Path, vocab_size: int, length: int, num_classes: int, num_inputs: int
    ):
        self.path = path
        self.vocab_size = vocab_size
        self.length = length
        self.num_classes = num_classes
        self.num_inputs = num_inputs
        self.keys = ("input_ids_0", "input_ids_1")[:num_inputs]
        self.sha256: str | None = None  # of the pickle, where its manifest says so

    def check_sha256(self, found: str) -> None:
        if self.sha256 not in (None, found):
            raise manifest.mixture(self.path)

    def error(self, item: int, what: str) -> UserError:
        return UserError(f"{self.path}: item {item:,} (counted from 0) {what}")

    def wrong_length(self, item: int, key: str, length: int) -> UserError:
        return self.error(
            item, f"has {length:,} {key}, the padded length of the task is {self.length:,}"
        )

    def wrong_id(self, item: int, key: str, value: int) -> UserError:
        return self.error(
            item,
            f"has the id {value:,} in {key}, "
            f"vocab_size {self.vocab_size:,} allows 0 to {self.vocab_size - 1:,}",
        )

    def wrong_label(self, item: int, value: int) -> UserError:
        return self.error(
            item,
            f"has the label {value:,}, "
            f"num_classes {self.num_classes:,} allows 0 to {self.num_classes - 1:,}",
        )

    def wrong_inputs(self, num_inputs: int) -> UserError:
        return UserError(
            f"{self.path} holds examples with {num_inputs} sequence(s) each, the task has "
            f"{self.num_inputs}: is it another task's file?"
        )


def cache_folders(path: Path, cache_dir) -> list[Path]:
    real = path.resolve()
    name = f"{real.name}.cache"
    # same names from other folders stay apart
    place = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    if cache_dir is not None:
        return [Path(cache_dir) / place / name]
    home = os.path.expanduser("~")  # stays ~ for a user without one
    at_home = [Path(home, ".cache", "sat", place, name)] if os.path.isabs(home) else []
    return [real.parent / name, *at_home]


def file_state(file: BinaryIO) -> dict[str, int]:
    status = os.fstat(file.fileno())
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _content_hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def open_cache(folder: Path, file: BinaryIO, wanted: Wanted) -> Dataset | None:
    """The cached arrays, or None if there are none of this state of the pickle."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["version"] != VERSION or meta["pickle"]["size"] != file_state(file)["size"]:
            return None
        if meta["pickle"] != file_state(file):
            if meta["sha256"] != _content_hash(file):
                return None
            meta["pickle"] = file_state(file)
            with contextlib.suppress(OSError):  # a folder we cannot write: hashed at every start
                files.write_file(folder / "meta.json", json.dumps(meta).encode())
        arrays = [_map(folder / name) for name in meta["files"]]
        labels = arrays.pop()
        if any(ids.shape != (len(labels), meta["length"]) for ids in arrays) or len(labels) == 0:
            return None
        largest = [tuple(entry) for entry in meta["largest"]]
        _, label, label_item = largest.pop()
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # absent, damaged, or removed at this moment
    wanted.check_sha256(meta["sha256"])
    if len(arrays) != wanted.num_inputs:
        raise wanted.wrong_inputs(len(arrays))
    if meta["length"] != wanted.length:
        raise wanted.wrong_length(0, "input_ids_0", meta["length"])
    for key, value, item in largest:
        if value >= wanted.vocab_size:
            raise wanted.wrong_id(item, key, value)
    if label >= wanted.num_classes:
        raise wanted.wrong_label(label_item, label)
    return Dataset(arrays, labels, meta["sha256"])


def _map(path: Path) -> np.ndarray:
    """A .npy file, mapped. Plain ndarray: np.memmap's own indexing is slower."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


@contextlib.contextmanager
def writing(folder: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Waits for other processes that write this cache; then removes what killed ones left."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as lock:
        if _acquire(lock, folder, notify):
            _remove_unnamed(folder)
        with contextlib.suppress(OSError):
            os.utime(lock.fileno())
        try:
            yield
        finally:
            if not (folder / "meta.json").exists():  # nothing came of it: leave no trace
                with contextlib.suppress(OSError):
                    (folder / "lock").unlink()
                    folder.rmdir()


def _acquire(lock: BinaryIO, folder: Path, notify: Callable[[str], None]) -> bool:
    """True with the lock; False if its holder hangs or the file system has no locks."""
    waiting = False
    while True:
        try:
            return files.lock(lock, folder)
        except BlockingIOError:
            pass
        if not waiting:
            notify(f"{folder}: waiting for another process that writes it")
            waiting = True
        # The holder touches the lock file as it goes on (_Progress).
        if time.time() - os.fstat(lock.fileno()).st_mtime > HANGS_AFTER:
            notify(f"{folder}: that process makes no progress, not waiting for it any longer")
            return False
        time.sleep(0.1)


def _remove_unnamed(folder: Path) -> None:
    """Removes arrays that meta.json does not name."""
    named = {"lock", "meta.json"}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        named.update(json.loads((folder / "meta.json").read_text())["files"])
    for path in folder.iterdir():
        if path.name not in named:
            with contextlib.suppress(OSError):
                path.unlink()


def write_cache(folder: Path, file: BinaryIO, wanted: Wanted) -> None:
    """Converts the pickle to arrays in `folder`. Raises OSError (disk full, folder removed) and
    leaves nothing."""
    state = file_state(file)
    needed = state["size"] // 4  # a byte an id where the pickle has four
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    unique = uuid.uuid4().hex
    names = [f"{key}.{unique}.npy" for key in (*wanted.keys, "label")]
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(open(folder / name, "x+b")) for name in names]
            columns = [Column(f) for f in opened]
            digest = hashlib.sha256()
            convert(
                file,
                wanted,
                columns,
                on_read=digest.update,
                on_progress=_Progress(folder / "lock"),
            )
            for column in columns:
                column.finish()
            for f, name in zip(opened, names, strict=True):
                files.sync(f, folder / name)
                if not os.path.samestat(os.fstat(f.fileno()), os.stat(folder / name)):
                    raise FileNotFoundError(errno.ENOENT, "replaced while it was written")
        if file_state(file) != state:
            raise UserError(f"{wanted.path} was changed while it was read")
        wanted.check_sha256(digest.hexdigest())
        meta = {
            "version": VERSION,
            "pickle": state,
            "sha256": digest.hexdigest(),
            "length": wanted.length,
            "files": names,
            "largest": [
                (key, column.largest, column.largest_item)
                for key, column in zip((*wanted.keys, "label"), columns, strict=True)
            ],
        }
        files.write_file(folder / "meta.json", json.dumps(meta).encode())
    except BaseException:
        for name in names:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        raise
    _remove_unnamed(folder)


class _Progress:
    """Touches the lock file about once a second."""

    def __init__(self, path: Path):
        self._path = path
        self._last = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._path)


# ---- conversion ---------------------------------------------------------------------------------

NPY_HEADER = 128  # bytes: room for any shape, written at the end


class Column:
    """Writes one .npy file chunk by chunk, in the smallest unsigned type so far."""

    def __init__(self, file):
        self._file = file
        self.dtype = np.dtype("u1")
        self.shape: tuple[int, ...] = (0,)
        self.largest = -1
        self.largest_item = -1
        file.write(bytes(NPY_HEADER))

    def add(self, rows: np.ndarray) -> None:
        """rows: int64 [rows] or [rows, N], none negative."""
        first = self.shape[0]
        largest = int(rows.max())
        if largest > self.largest:
            self.largest = largest
            self.largest_item = first + int(np.argmax(rows.reshape(len(rows), -1).max(axis=1)))
            smallest = np.dtype(np.min_scalar_type(largest))
            if smallest.itemsize > self.dtype.itemsize:
                self._widen(smallest)
        self._file.write(rows.astype(self.dtype.newbyteorder("<")).data)
        self.shape = (first + len(rows), *rows.shape[1:])

    def _widen(self, dtype: np.dtype) -> None:
        """Rewrites what is there in a larger type, in place, from the end."""
        old, count, step = self.dtype, int(np.prod(self.shape)), 1 << 20
        self._file.flush()
        for end in range(count, 0, -step):
            start = max(0, end - step)
            self._file.seek(NPY_HEADER + start * old.itemsize)
            values = np.frombuffer(self._file.read((end - start) * old.itemsize), old)
            self._file.seek(NPY_HEADER + start * dtype.itemsize)
            self._file.write(values.astype(dtype).data)
        self._file.seek(0, os.SEEK_END)
        self.dtype = dtype

    def finish(self) -> None:
        text = (
            f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {self.shape!r}, }}"
        )
        header = text.encode().ljust(NPY_HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        self._file.flush()


def convert(
    file: BinaryIO,
    wanted: Wanted,
    columns: list[Column],
    on_read: Callable[[bytes], object] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Streams the pickle into one column for each kind of ids and one for the labels, checking
    everything."""
    *id_columns, label_column = columns
    chunk = np.empty((wanted.num_inputs, CHUNK, wanted.length), dtype=np.int64)
    labels = array("q")
    count = 0

    def flush() -> None:
        rows = len(labels)
        if rows == 0:
            return
        for key, ids, column in zip(wanted.keys, chunk, id_columns, strict=True):
            ids = ids[:rows]
            if ids.min() < 0 or ids.max() >= wanted.vocab_size:
                row, place = np.argwhere((ids < 0) | (ids >= wanted.vocab_size))[0]
                raise wanted.wrong_id(count - rows + int(row), key, int(ids[row, place]))
            column.add(ids)
        label_column.add(np.frombuffer(labels, np.int64))
        del labels[:]
        on_progress()

    for item in safe_pickle.iterate_file(file, str(wanted.path), on_read=on_read):
        _check_item(item, count, wanted)
        for i, key in enumerate(wanted.keys):
            chunk[i, len(labels)] = item[key]
        labels.append(int(item["label"]))
        count += 1
        if len(labels) == CHUNK:
            flush()
    flush()
    if count == 0:
        raise UserError(f"{wanted.path} holds no examples")


def _check_item(item: Any, number: int, wanted: Wanted) -> None:
    if type(item) is not dict:
        raise wanted.error(number, f"is a {type(item).__name__}, not a dict of arrays")
    num_inputs = 2 if "input_ids_1" in item else 1
    if "input_ids_0" in item and num_inputs != wanted.num_inputs:
        raise wanted.wrong_inputs(num_inputs)
    for key in (*wanted.keys, "label"):
        if key not in item:
            raise wanted.error(
                number, f"has no {key!r} (its keys: {', '.join(map(repr, item))[:100]})"
            )
    for key in wanted.keys:
        ids = item[key]
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
            what = (
                f"{ids.dtype} array {ids.shape}"
                if isinstance(ids, np.ndarray)
                else type(ids).__name__
            )
            raise wanted.error(
                number, f"has a {what} as {key}, not a one-dimensional array of integers"
            )
        if len(ids) != wanted.length:
            raise wanted.wrong_length(number, key, len(ids))
    label = item["label"]
    if isinstance(label, np.ndarray) and label.ndim == 0:
        label = label[()]
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise wanted.error(number, f"has a {type(label).__name__} as label, not an integer")
    if not 0 <= label < wanted.num_classes:
        raise wanted.wrong_label(number, int(label))
