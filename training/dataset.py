"""A data pickle as batches of tensors.

The first time a pickle is opened its arrays are written once, as memory-mapped .npy files of the
smallest unsigned type that holds the ids; later starts map them, in milliseconds, and processes
share their pages. The cache `<pickle>.cache/` lies beside the pickle, or in the user's cache
folder if it cannot be written there; if neither can, the arrays stay in memory. It belongs to one
state of the pickle (size, modification time and inode; if only the last two differ, the content
decides).

A cache becomes valid by the atomic replacement of one small file, meta.json, which names its
arrays. So a process that is killed
while writing leaves nothing that counts, and processes that start at once cannot disturb each
other: one writes, the others wait for it as long as it makes progress, and write their own if it
hangs.

Shapes: B batch, N padded length.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
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
import torch

from training import safe_pickle

VERSION = 1  # of the cache's layout
CHUNK = 256  # examples converted at a time
HANGS_AFTER = 30.0  # seconds without progress of another process that writes the cache
TOO_LARGE = 8  # times the task's size: no longer a variant of it

_SCRIPTS = {
    "lra-image": "create_cifar10.py",
    "lra-listops": "create_listops.py",
    "lra-text": "create_text.py",
    "lra-retrieval": "create_retrieval.py",
    "lra-pathfinder32": "create_pathfinder.py",
    "lra-news1": "create_agnews.py",
    "lra-yelp1": "create_yelp.py",
    "lra-nature": "create_inaturalist.py",
}


class Dataset:
    """The examples of one split. Attributes: size, length (N), num_inputs, labels (unsigned array
    [size])."""

    def __init__(self, ids: list[np.ndarray], labels: np.ndarray):
        self._ids = ids
        self.labels = labels
        self.size, self.length = ids[0].shape
        self.num_inputs = len(ids)

    def __len__(self) -> int:
        return self.size

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The examples at `indices` (int64 array [B]): ids [B, N], second ids [B, N] or None,
        labels [B], all int64."""
        ids = [torch.from_numpy(column[indices].astype(np.int64)) for column in self._ids]
        labels = torch.from_numpy(self.labels[indices].astype(np.int64))
        return ids[0], ids[1] if self.num_inputs == 2 else None, labels


def open_dataset(
    path,
    *,
    vocab_size: int,
    length: int,
    num_classes: int,
    num_inputs: int,
    expected_size: int | None = None,
    cache_dir=None,
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Opens a data pickle (docs/data.md), by its cache if there is a valid one.

    Args:
        vocab_size, length, num_classes: what the ids (0..vocab_size-1), their number in every
        example, and the labels
            (0..num_classes-1) are checked against.
        num_inputs: 2 if the examples have input_ids_1 as well, else 1.
        expected_size: examples that the task has; a pickle TOO_LARGE times as large is refused
        before it is read.
        cache_dir: folder of the cache instead of the pickle's own folder and the user's cache
        folder.
        notify: gets one line about anything that takes time or differs from the usual.
    Raises: ValueError, one sentence naming file, item and value; OSError if the pickle cannot be
    read.
    """
    wanted = _Wanted(Path(path), vocab_size, length, num_classes, num_inputs)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise ValueError(_missing(Path(path))) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a data pickle") from None
    with file:
        _check_size(file, wanted, expected_size)
        for folder in _cache_folders(Path(path), cache_dir):
            dataset = _open_cache(folder, file, wanted)
            if dataset is not None:
                return dataset
        reasons = []
        for folder in _cache_folders(Path(path), cache_dir):
            try:
                with _writing(folder, notify):
                    dataset = _open_cache(
                        folder, file, wanted
                    )  # another process may have written it
                    if dataset is not None:
                        return dataset
                    notify(f"{path}: converting once to memory-mapped arrays in {folder}")
                    _write_cache(folder, file, wanted)
                dataset = _open_cache(folder, file, wanted)
                if dataset is not None:
                    return dataset
                reasons.append(f"{folder}: removed while it was written")
            except OSError as error:
                dataset = _open_cache(folder, file, wanted)  # while we hung, another wrote it
                if dataset is not None:
                    return dataset
                reasons.append(f"{folder}: {error.strerror or error}")
        notify(f"{path}: kept in memory, no cache could be written ({'; '.join(reasons)})")
        return _read_into_memory(file, wanted)


class _Wanted:
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

    def error(self, item: int, what: str) -> ValueError:
        return ValueError(f"{self.path}: item {item:,} (counted from 0) {what}")

    def wrong_length(self, item: int, key: str, length: int) -> ValueError:
        return self.error(
            item, f"has {length:,} {key}, the padded length of the task is {self.length:,}"
        )

    def wrong_id(self, item: int, key: str, value: int) -> ValueError:
        return self.error(
            item,
            f"has the id {value:,} in {key}, "
            f"vocab_size {self.vocab_size:,} allows 0 to {self.vocab_size - 1:,}",
        )

    def wrong_label(self, item: int, value: int) -> ValueError:
        return self.error(
            item,
            f"has the label {value:,}, "
            f"num_classes {self.num_classes:,} allows 0 to {self.num_classes - 1:,}",
        )

    def wrong_inputs(self, num_inputs: int) -> ValueError:
        return ValueError(
            f"{self.path} holds examples with {num_inputs} sequence(s) each, the task has "
            f"{self.num_inputs}: is it another task's file?"
        )


def _missing(path: Path) -> str:
    for task, script in _SCRIPTS.items():
        if path.name.startswith(task):
            return f"{path} does not exist: make it with `python preprocess/{script}`"
    return f"{path} does not exist"


def _check_size(file: BinaryIO, wanted: _Wanted, expected_size: int | None) -> None:
    if expected_size is None:
        return
    size = os.fstat(file.fileno()).st_size
    task = (
        expected_size * wanted.num_inputs * (4 * wanted.length + 150)
    )  # 4 bytes an id and what surrounds them
    if size > TOO_LARGE * task:
        raise ValueError(
            f"{wanted.path} has {size / 1e9:,.1f} GB, {size / task:,.0f} times what the task's "
            f"{expected_size:,} examples need (the original create_cifar10.py repeats its train "
            "split without end): make it again, or set the task's dataset size if it is meant"
        )


# ---- the cache ----------------------------------------------------------------------------------


def _cache_folders(path: Path, cache_dir) -> list[Path]:
    real = path.resolve()
    name = f"{real.name}.cache"
    place = hashlib.sha256(os.fsencode(real)).hexdigest()[
        :16
    ]  # same names from other folders stay apart
    if cache_dir is not None:
        return [Path(cache_dir) / place / name]
    return [real.parent / name, Path("~/.cache/sat").expanduser() / place / name]


def _state(file: BinaryIO) -> dict[str, int]:
    status = os.fstat(file.fileno())
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _content_hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def _open_cache(folder: Path, file: BinaryIO, wanted: _Wanted) -> Dataset | None:
    """The cached arrays, or None if there are none of this state of the pickle."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["version"] != VERSION or meta["pickle"]["size"] != _state(file)["size"]:
            return None
        if meta["pickle"] != _state(file):
            if meta["sha256"] != _content_hash(file):
                return None
            meta["pickle"] = _state(file)
            with contextlib.suppress(OSError):  # a folder we cannot write: hashed at every start
                _replace(folder / "meta.json", json.dumps(meta))
        arrays = [_map(folder / name) for name in meta["files"]]
        labels = arrays.pop()
        if any(ids.shape != (len(labels), meta["length"]) for ids in arrays) or len(labels) == 0:
            return None
        largest = [tuple(entry) for entry in meta["largest"]]
        _, label, label_item = largest.pop()
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # absent, damaged, or removed at this moment
    if len(arrays) != wanted.num_inputs:
        raise wanted.wrong_inputs(len(arrays))
    if meta["length"] != wanted.length:
        raise wanted.wrong_length(0, "input_ids_0", meta["length"])
    for key, value, item in largest:
        if value >= wanted.vocab_size:
            raise wanted.wrong_id(item, key, value)
    if label >= wanted.num_classes:
        raise wanted.wrong_label(label_item, label)
    return Dataset(arrays, labels)


def _map(path: Path) -> np.ndarray:
    """A .npy file, mapped. Plain ndarray: np.memmap's own indexing is slower."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


@contextlib.contextmanager
def _writing(folder: Path, notify: Callable[[str], None]) -> Iterator[None]:
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:
            return False
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


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _write_cache(folder: Path, file: BinaryIO, wanted: _Wanted) -> None:
    """Converts the pickle to arrays in `folder`. Raises OSError (disk full, folder removed) and
    leaves nothing."""
    state = _state(file)
    needed = state["size"] // 4  # a byte an id where the pickle has four
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    unique = uuid.uuid4().hex
    names = [f"{key}.{unique}.npy" for key in (*wanted.keys, "label")]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(folder / name, "x+b")) for name in names]
            columns = [_Column(f) for f in files]
            digest = hashlib.sha256()
            _convert(
                file,
                wanted,
                columns,
                on_read=digest.update,
                on_progress=_Progress(folder / "lock"),
            )
            for column in columns:
                column.finish()
            for f, name in zip(files, names, strict=True):
                os.fsync(f.fileno())
                if not os.path.samestat(os.fstat(f.fileno()), os.stat(folder / name)):
                    raise FileNotFoundError(errno.ENOENT, "replaced while it was written")
        if _state(file) != state:
            raise ValueError(f"{wanted.path} was changed while it was read")
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
        _replace(folder / "meta.json", json.dumps(meta))
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


def _read_into_memory(file: BinaryIO, wanted: _Wanted) -> Dataset:
    needed, available = _state(file)["size"] // 4, _available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"{wanted.path} needs {needed / 1e9:,.1f} GB of memory, {available / 1e9:,.1f} GB are "
            "available: free some disk space for its cache instead"
        )
    files = [io.BytesIO() for _ in (*wanted.keys, "label")]
    columns = [_Column(f) for f in files]
    _convert(file, wanted, columns)
    arrays = []
    for column, f in zip(columns, files, strict=True):
        column.finish()
        flat = np.frombuffer(f.getbuffer(), column.dtype, offset=_NPY_HEADER)
        arrays.append(flat.reshape(column.shape))
    labels = arrays.pop()
    return Dataset(arrays, labels)


def _available_memory() -> int | None:
    """Bytes, where the system says so."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# ---- conversion ---------------------------------------------------------------------------------

_NPY_HEADER = 128  # bytes: room for any shape, written at the end


class _Column:
    """Writes one .npy file chunk by chunk, in the smallest unsigned type so far."""

    def __init__(self, file):
        self._file = file
        self.dtype = np.dtype("u1")
        self.shape: tuple[int, ...] = (0,)
        self.largest = -1
        self.largest_item = -1
        file.write(bytes(_NPY_HEADER))

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
            self._file.seek(_NPY_HEADER + start * old.itemsize)
            values = np.frombuffer(self._file.read((end - start) * old.itemsize), old)
            self._file.seek(_NPY_HEADER + start * dtype.itemsize)
            self._file.write(values.astype(dtype).data)
        self._file.seek(0, os.SEEK_END)
        self.dtype = dtype

    def finish(self) -> None:
        text = (
            f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {self.shape!r}, }}"
        )
        header = text.encode().ljust(_NPY_HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        self._file.flush()


def _convert(
    file: BinaryIO,
    wanted: _Wanted,
    columns: list[_Column],
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
        raise ValueError(f"{wanted.path} holds no examples")


def _check_item(item: Any, number: int, wanted: _Wanted) -> None:
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


# ---- the order of examples ----------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, number: int) -> np.ndarray:
    """Permutation `number` of 0..size-1, int64, read-only: the order of random keys.

    Written out (splitmix64 of a counter) rather than NumPy's permutation, whose result may change
    with its version.
    """
    counter = np.arange(size, dtype=np.uint64)
    key = counter * np.uint64(0x9E3779B97F4A7C15)
    for word in (seed % 2**64, number):
        key = _mix(key ^ _mix(np.full(1, word, dtype=np.uint64)))
    order = np.argsort(key, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, uint64 -> uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def training_indices(size: int, seed: int, first_example: int, count: int) -> np.ndarray:
    """Which examples stand at places first_example .. first_example + count - 1 of an endless
    training order, int64 [count].

    The order is one permutation of 0..size-1 after another, each example once in each; permutation
    number e depends on (seed, e) alone. Batches cross their borders. A pure function of its
    arguments.
    """
    parts = []
    while count > 0:
        number, place = divmod(first_example, size)
        part = _permutation(size, seed, number)[place : place + count]
        parts.append(part)
        first_example += len(part)
        count -= len(part)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def evaluation_subset(size: int, count: int, seed: int) -> np.ndarray:
    """A fixed choice of min(count, size) different examples, ascending, int64."""
    return np.sort(_permutation(size, seed, 2**63)[: min(count, size)])
