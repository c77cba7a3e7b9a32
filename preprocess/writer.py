"""Writes the data pickles of a task and its manifest, all of them or none.

A data pickle is a list of dicts (docs/data.md, "The files"), streamed to disk one example at a
time, so memory stays the same for ten examples or ten million:

    with writer.open_set(output_dir, "lra-text", ("train", "dev", "test")) as files:
        files["train"].add(input_ids_0=ids, label=np.int64(1))

The opcodes are written by hand: the standard pickler remembers every object it has seen until the
end of the list. They name `numpy.core`, which NumPy 1 and NumPy 2 both read (`numpy._core`, what
NumPy 2 writes, is unknown to NumPy 1.24).
"""

import concurrent.futures
import contextlib
import hashlib
import io
import os
import shutil
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from training.data import manifest
from training.errors import UserError
from training.recording.files import open_locked, sync, sync_folder

# items between two APPENDS, as the standard pickler does: bounds the unpickler's stack
BATCH = 1000
# Threads hash and write blocks of this size while the next examples are made: a third of the time
# of lra-retrieval otherwise.
BLOCK = 2 << 20
# And send them to the disk after this many bytes: at the end little is left to wait for.
SYNC = 16 << 20


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()  # SHORT_BINUNICODE


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"  # STACK_GLOBAL


def _dtype(code: str) -> bytes:
    """np.dtype(code), little-endian: REDUCE, then BUILD with the state that NumPy writes."""
    state = b"(K\x03" + _text("<") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    return _global("numpy", "dtype") + _text(code) + b"\x89\x88\x87R" + state


# What every example refers to, built once, remembered under these memo numbers (BINGET) and taken
# off the stack again.
_SHARED = (
    _global("numpy.core.multiarray", "_reconstruct"),
    _global("numpy", "ndarray") + b"K\x00\x85C\x01b\x87",  # (ndarray, (0,), b"b")
    _dtype("i4"),
    _dtype("i8"),
    _global("numpy.core.multiarray", "scalar"),
    _text("input_ids_0"),
    _text("input_ids_1"),
    _text("label"),
)
_RECONSTRUCT, _ARGUMENTS, _INT32, _INT64, _SCALAR, _IDS_0, _IDS_1, _LABEL = (
    b"h" + bytes([i]) for i in range(len(_SHARED))
)
# PROTO 4, MEMOIZE POP for each, EMPTY_LIST
_HEADER = b"\x80\x04" + b"".join(part + b"\x940" for part in _SHARED) + b"]"


def _array(ids: np.ndarray) -> tuple:
    """Parts of an array's opcodes; its data is not copied."""
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 1:
        raise TypeError(f"ids must be int32 [n], not {type(ids).__name__} {ids!r:.80}")
    data = np.ascontiguousarray(ids, dtype="<i4").data
    head = _RECONSTRUCT + _ARGUMENTS + b"R(K\x01J" + struct.pack("<i", len(ids))
    return head, b"\x85" + _INT32 + b"\x89B" + struct.pack("<I", data.nbytes), data, b"tb"


def _label(label) -> bytes:
    if isinstance(label, np.int64):
        return _SCALAR + _INT64 + b"C\x08" + struct.pack("<q", label) + b"\x86R"
    if isinstance(label, np.int32):
        return _SCALAR + _INT32 + b"C\x04" + struct.pack("<i", label) + b"\x86R"
    if type(label) is int:
        return b"J" + struct.pack("<i", label)
    raise TypeError(f"a label is np.int64, np.int32 or int, not {type(label).__name__}")


def _example(input_ids_0: np.ndarray, label, input_ids_1: np.ndarray | None) -> tuple:
    """Parts of an example's opcodes."""
    second = () if input_ids_1 is None else (_IDS_1, *_array(input_ids_1))
    return (b"}(", _IDS_0, *_array(input_ids_0), *second, _LABEL, _label(label), b"u")


def encode_example(input_ids_0: np.ndarray, label, input_ids_1: np.ndarray | None = None) -> bytes:
    """One example as pickle opcodes (in a worker process); `SplitWriter.add_encoded` takes it."""
    return b"".join(_example(input_ids_0, label, input_ids_1))


class SplitWriter:
    """Streams `<output_dir>/<task>.<split>.pickle`, as `<name>.part` until it is published. What a
    killed run left there is overwritten; of two runs at once the second stops. Raises: UserError
    if the file cannot be made or if no example was added; OSError (disk full)."""

    def __init__(self, output_dir: Path, task: str, split: str, notify: Callable[[str], None]):
        self.path = output_dir / f"{task}.{split}.pickle"
        self.part = output_dir / f"{task}.{split}.pickle.part"
        self.count = 0  # examples so far
        # what was written, for who writes it: labels, and a fingerprint of each example
        self.labels, self.prints = array("i"), array("q")
        # filled in turn and used again: fresh memory for each block costs more than filling it
        self._blocks = [io.BytesIO(_HEADER), io.BytesIO()]
        self._blocks[0].seek(0, os.SEEK_END)
        self._view = memoryview(b"")  # of the block that the threads work on
        self._hash = hashlib.sha256()
        self._unsynced = 0
        self._writing: list[concurrent.futures.Future] = []
        self._syncing: list[concurrent.futures.Future] = []
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(self.part, buffering=1 << 20)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing this file") from None
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        if self._file.tell() > 0:
            notify(f"{self.part} was left by a run that did not finish: started anew")
            self._file.truncate(0)
        self._threads = concurrent.futures.ThreadPoolExecutor(3)

    def add(self, input_ids_0: np.ndarray, label, input_ids_1: np.ndarray | None = None) -> None:
        """One example: int32 arrays of the padded length; label np.int64, np.int32 or int."""
        self.add_encoded(*_example(input_ids_0, label, input_ids_1))

    def add_encoded(self, *parts: bytes) -> None:
        """One example that `encode_example` made."""
        write = self._blocks[0].write
        if self.count % BATCH == 0:
            write(b"e(" if self.count else b"(")
        for part in parts:
            write(part)
        self.count += 1
        if self._blocks[0].tell() >= BLOCK:
            self._write()

    def _write(self) -> None:
        """Hands the block to the threads; waits for the one before."""
        self._wait(*self._writing)
        self._view.release()
        block = self._blocks[0]
        with block.getbuffer() as whole:
            self._view = whole[: block.tell()]
        self._unsynced += len(self._view)
        self._writing = [
            self._threads.submit(self._hash.update, self._view),
            self._threads.submit(self._file.write, self._view),
        ]
        self._blocks.reverse()
        self._blocks[0].seek(0)
        if self._unsynced >= SYNC and all(work.done() for work in self._syncing):
            self._wait(*self._syncing)
            self._syncing = [self._threads.submit(sync, self._file, self.part)]
            self._unsynced = 0

    def _wait(self, *works: concurrent.futures.Future) -> None:
        for work in works:
            try:
                work.result()  # raises what the disk refused: the system reports that only once
            except OSError as error:
                error.filename = error.filename or str(self.part)
                raise

    def finish(self) -> None:
        """Everything on disk, still under the temporary name."""
        if self.count == 0:
            raise UserError(f"{self.path}: there is no example to write")
        self._blocks[0].write(b"e.")
        self._write()
        self._wait(*self._writing, *self._syncing)
        self._threads.shutdown()
        self._file.flush()
        sync(self._file, self.part)

    def facts(self) -> dict:
        """What the manifest says about the finished file."""
        size = self._file.tell()
        return {"size": size, "sha256": self._hash.hexdigest(), "examples": self.count}

    def publish(self) -> None:
        """The file under its name."""
        os.replace(self.part, self.path)
        self._file.close()

    def discard(self) -> None:
        """Nothing remains, unless it is published."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.part)  # first: a close that fails (full disk) must not keep it
        # before its file number belongs to another file
        self._threads.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def open_set(
    output_dir,
    task: str,
    splits: Iterable[str] = ("train", "dev", "test"),
    facts: Callable[[], dict] = lambda: {"about": [], "trial": "", "warnings": []},
    *,
    notify: Callable[[str], None] = print,
) -> Iterator[dict[str, SplitWriter]]:
    """A task's files by split, which appear at the end of the block, or none: the pickles, then
    the manifest `<task>.json`. With test and without dev, dev is test's file: a link, or a copy.

    While the pickles get their names the manifest says so: whoever finds it in that state knows
    that a killed run left a mixture. facts: called when all files are on the disk, none under its
    name yet, for what the manifest says besides; what it raises leaves everything as it was."""
    folder, files = Path(output_dir), {}
    # of test, as dev; not dev's .part: what a kill leaves would be the same file as test's
    copy = folder / f"{task}.dev.pickle.copy"
    try:
        for split in splits:
            files[split] = SplitWriter(folder, task, split, notify)
        copy.unlink(missing_ok=True)
        yield files
        for file in files.values():
            file.finish()
        about = facts()
        found = {split: file.facts() for split, file in files.items()}
        same = "dev" not in files and "test" in files
        if same:
            found["dev"] = found["test"]
            _duplicate(files["test"].part, copy)
        manifest.write(folder, task, {"replacing": True})
        for file in files.values():
            file.publish()
        if same:
            os.replace(copy, copy.with_suffix(""))
        sync_folder(folder)
        manifest.write(folder, task, about | {"splits": found})
    except BaseException:
        for file in files.values():
            file.discard()
        copy.unlink(missing_ok=True)
        raise
    for split, fact in found.items():
        note = "" if split in files else " (the same file as test)"
        notify(
            f"{folder / f'{task}.{split}.pickle'}: {fact['examples']:,} examples, "
            f"{fact['size'] / 1e6:,.1f} MB, sha256 {fact['sha256']}{note}"
        )


def _duplicate(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # a file system without links
        shutil.copyfile(path, copy)
        with open(copy, "rb") as file:
            sync(file, copy)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_free_space(output_dir, num_bytes: int) -> None:
    """Raises UserError if `num_bytes` will not fit on the disk of `output_dir`."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needs = f"needs {num_bytes / 1e9:,.1f} GB, only {free / 1e9:,.1f} GB are free on its disk"
        raise UserError(f"{output_dir} {needs}: make room")
