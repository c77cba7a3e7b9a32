"""Writes the data pickles of a task and its manifest, all of them or none.

A data pickle is a list of dicts (docs/data.md, "The files"). `SplitWriter` streams it to disk one
example at a time, so memory stays the same for ten examples or ten million:

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from training.data import manifest
from training.errors import UserError
from training.recording.files import open_locked, sync, sync_folder

BATCH = (
    1000  # items between two APPENDS, as the standard pickler does: bounds the unpickler's stack
)

# Threads hash and write blocks of this size while the next examples are made: a third of the time
# of lra-retrieval otherwise.
BLOCK = 2 << 20
# And send them to the disk after this many bytes: at the end little is left to wait for.
SYNC = 16 << 20


# ---- the pickle ---------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data  # SHORT_BINUNICODE


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
_HEADER = (
    b"\x80\x04" + b"".join(part + b"\x940" for part in _SHARED) + b"]"
)  # MEMOIZE POP ... EMPTY_LIST


def _array(ids: np.ndarray) -> tuple:
    """Parts of an array's opcodes; its data is not copied."""
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 1:
        raise TypeError(
            f"ids must be a one-dimensional int32 array, not {type(ids).__name__} {ids!r:.80}"
        )
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
    """Streams `<output_dir>/<task>.<split>.pickle`, which appears when the `with` block succeeds.

    Until then it is `<name>.part`, removed on any error. What a killed run left there is
    overwritten, and that is said. Two runs
    at once: the second stops. Attributes: path, count (examples so far).
    Raises: UserError if the file cannot be made or if no example was added; OSError (disk full)
    from `add` or at the end.
    """

    def __init__(
        self, output_dir, task: str, split: str, *, notify: Callable[[str], None] = print
    ):
        self.path = Path(output_dir) / f"{task}.{split}.pickle"
        self.count = 0
        self._notify = notify
        self._part = self.path.with_name(self.path.name + ".part")
        # filled in turn and used again: fresh memory for each block costs more than filling it
        self._blocks = [io.BytesIO(_HEADER), io.BytesIO()]
        self._blocks[0].seek(0, os.SEEK_END)
        self._view = memoryview(b"")  # of the block that the threads work on
        self._hash = hashlib.sha256()
        self._unsynced = 0
        self._writing: list[concurrent.futures.Future] = []
        self._syncing: list[concurrent.futures.Future] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(3)
        self._file = self._open()

    def _open(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open_locked(self._part, buffering=1 << 20)
        except BlockingIOError:
            raise UserError(f"{self.path}: another run is writing this file") from None
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        if file.tell() > 0:
            self._notify(f"{self._part} was left by a run that did not finish: started anew")
            file.truncate(0)
        return file

    def add(self, input_ids_0: np.ndarray, label, input_ids_1: np.ndarray | None = None) -> None:
        """One example: int32 arrays of the padded length; label np.int64, np.int32 or int."""
        self._add(_example(input_ids_0, label, input_ids_1))

    def add_encoded(self, example: bytes) -> None:
        """One example that `encode_example` made."""
        self._add((example,))

    def _add(self, parts: tuple) -> None:
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
            self._syncing = [self._threads.submit(sync, self._file, self._part)]
            self._unsynced = 0

    def _wait(self, *works: concurrent.futures.Future) -> None:
        for work in works:
            try:
                work.result()  # raises what the disk refused: the system reports that only once
            except OSError as error:
                error.filename = error.filename or str(self._part)
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
        sync(self._file, self._part)

    def facts(self) -> dict:
        """What the manifest says about the finished file."""
        size = self._file.tell()
        return {"size": size, "sha256": self._hash.hexdigest(), "examples": self.count}

    def publish(self) -> None:
        """The file under its name."""
        os.replace(self._part, self.path)
        self._file.close()

    def discard(self) -> None:
        """Nothing remains."""
        with contextlib.suppress(OSError):
            os.unlink(self._part)  # first: a close that fails (full disk) must not keep it
        # before its file number belongs to another file
        self._threads.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with _discarding([self]):
            if error is not None:
                self.discard()
                return
            self.finish()
            self.publish()
            sync_folder(self.path.parent)


@contextlib.contextmanager
def _discarding(writers: Iterable[SplitWriter]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for writer in writers:
            if not writer._file.closed:
                writer.discard()
        raise


class DataSet(dict[str, SplitWriter]):
    """A task's SplitWriters by split name; `facts` is what the manifest says besides the files.

    before_publishing: called when all files are on the disk, none under its name yet; what it
    raises leaves everything as it was.
    """

    def __init__(self):
        self.facts: dict = {"about": [], "trial": "", "warnings": []}
        self.before_publishing: Callable[[], None] = lambda: None


@contextlib.contextmanager
def open_set(
    output_dir, task: str, splits: Iterable[str] = ("train", "dev", "test"), *, notify=print
) -> Iterator[DataSet]:
    """A task's files, which appear at the end of the block, or none: the pickles, then the
    manifest `<task>.json`. Without a split dev, dev is test's file: a hard link, or a copy.

    While the pickles get their names the manifest says so: whoever finds it in that state knows
    that a killed run left a mixture.
    """
    folder, files = Path(output_dir), DataSet()
    with _discarding(files.values()):
        for split in splits:
            files[split] = SplitWriter(folder, task, split, notify=notify)
        yield files
        for file in files.values():
            file.finish()
        files.before_publishing()
        facts = {split: file.facts() for split, file in files.items()}
        with _dev_beside(files) as publish_dev:
            manifest.write(folder, task, {"replacing": True})
            for file in files.values():
                file.publish()
            publish_dev()
        if "dev" not in facts:
            facts["dev"] = facts["test"]
        sync_folder(folder)
        manifest.write(folder, task, files.facts | {"splits": facts})
    for split, fact in facts.items():
        path = folder / f"{task}.{split}.pickle"
        same = " (the same file as test)" if split not in files else ""
        notify(
            f"{path}: {fact['examples']:,} examples, {fact['size'] / 1e6:,.1f} MB, "
            f"sha256 {fact['sha256']}{same}"
        )


@contextlib.contextmanager
def _dev_beside(files: DataSet) -> Iterator[Callable[[], None]]:
    """Makes test's file ready as dev's, if dev has none; gives the function that names it."""
    if "dev" in files:
        yield lambda: None
        return
    test, dev = files["test"]._part, files["test"].path
    dev = dev.with_name(dev.name.replace(".test.", ".dev."))
    part = dev.with_name(dev.name + ".part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(test, part)
        except OSError:  # a file system without links
            shutil.copyfile(test, part)
            with open(part, "rb") as copy:
                sync(copy, part)
        yield lambda: os.replace(part, dev)
    finally:
        part.unlink(missing_ok=True)


def check_free_space(output_dir, num_bytes: int) -> None:
    """Raises UserError if `num_bytes` will not fit on the disk of `output_dir`."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{output_dir} needs {num_bytes / 1e9:,.1f} GB, "
            f"only {free / 1e9:,.1f} GB are free on its disk"
        )
