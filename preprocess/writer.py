"""Writes the data pickles, and what every create_*.py needs around that.

A data pickle is a list of dicts (docs/data.md, "The files"). `SplitWriter` streams it to disk one
example at a time, so memory stays the same for ten examples or ten million, and renames it into
place only when it is complete:

    with writer.open_splits(output_dir, "lra-text", ("train", "dev", "test")) as splits:
        splits["train"].add(input_ids_0=ids, label=np.int64(1))

The opcodes are written by hand: the standard pickler remembers every object it has seen until the
end of the list. They name `numpy.core`, which NumPy 1 and NumPy 2 both read (`numpy._core`, what
NumPy 2 writes, is unknown to NumPy 1.24).

The rest is shared by the scripts: options, `main` (errors as one sentence, exit codes), `Skips`,
`BalancedLimit`, `progress`, and `map_ordered`, a parallel map whose results do not depend on the
number of processes.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import multiprocessing.connection
import multiprocessing.pool
import os
import queue
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

DEFAULT_OUTPUT_DIR = Path("data/lra_processed")
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
    Raises: ValueError if the file cannot be made or if no example was added; OSError (disk full)
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
            while True:
                file = open(self._part, "ab", buffering=1 << 20)  # noqa: SIM115
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    raise ValueError(f"{self.path}: another run is writing this file") from None
                except OSError:
                    pass  # a file system without locks
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self._part)):
                        break
                file.close()  # between open and lock another run moved it into place
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from error
        if file.tell() > 0:
            self._notify(f"{self._part} was left by a run that did not finish: started anew")
            file.truncate(0)
        return file

    def add(
        self, *, input_ids_0: np.ndarray, label, input_ids_1: np.ndarray | None = None
    ) -> None:
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
            self._syncing = [self._threads.submit(os.fsync, self._file.fileno())]
            self._unsynced = 0

    def _wait(self, *works: concurrent.futures.Future) -> None:
        for work in works:
            work.result()  # raises what the disk refused: the system reports that only once

    def finish(self) -> None:
        """Everything on disk, still under the temporary name."""
        if self.count == 0:
            raise ValueError(f"{self.path}: there is no example to write")
        self._blocks[0].write(b"e.")
        self._write()
        self._wait(*self._writing, *self._syncing)
        self._threads.shutdown()
        self._file.flush()
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        """The file under its name."""
        size = self._file.tell()
        os.replace(self._part, self.path)
        self._file.close()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too survives a power cut
        finally:
            os.close(folder)
        self._notify(
            f"{self.path}: {self.count:,} examples, {size / 1e6:,.1f} MB, "
            f"sha256 {self._hash.hexdigest()}"
        )

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


@contextlib.contextmanager
def _discarding(writers: Iterable[SplitWriter]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for writer in writers:
            if not writer._file.closed:
                writer.discard()
        raise


@contextlib.contextmanager
def open_splits(
    output_dir, task: str, splits: Iterable[str] = ("train", "dev", "test"), *, notify=print
) -> Iterator[dict[str, SplitWriter]]:
    """One task's SplitWriters by split name; all files appear at the end of the block, or none."""
    writers: dict[str, SplitWriter] = {}
    with _discarding(writers.values()):
        for split in splits:
            writers[split] = SplitWriter(output_dir, task, split, notify=notify)
        yield writers
        for writer in writers.values():
            writer.finish()
        for writer in writers.values():
            writer.publish()


def check_free_space(output_dir, num_bytes: int) -> None:
    """Raises ValueError if `num_bytes` will not fit on the disk of `output_dir`."""
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"{output_dir} needs {num_bytes / 1e9:,.1f} GB, "
            f"only {free / 1e9:,.1f} GB are free on its disk"
        )


# ---- counting -----------------------------------------------------------------------------------


class Skips:
    """Counts the examples left out, by reason, and names the first few of each reason.

    on_error: "stop" raises ValueError at the first one, "skip" goes on.
    """

    NAMED = 3

    def __init__(self, on_error: str = "stop"):
        self.on_error = on_error
        self.counts: collections.Counter[str] = collections.Counter()
        self._names: dict[str, list[str]] = {}

    def skip(self, where: str, reason: str, *, always: bool = False) -> None:
        """Leaves out the example at `where` ("file.tsv, row 17") for a reason that can be counted.

        always: also under "stop" (for faults that the published sources are known to have).
        """
        if self.on_error == "stop" and not always:
            raise ValueError(
                f"{where}: {reason} (--on_error skip leaves such examples out and counts them)"
            )
        self.counts[reason] += 1
        names = self._names.setdefault(reason, [])
        if len(names) < self.NAMED:
            names.append(where)

    def report(self, notify: Callable[[str], None] = print) -> None:
        """One line a reason; nothing if nothing was skipped."""
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self._names[reason]) + (" ..." if count > self.NAMED else "")
            notify(f"skipped {count:,}: {reason} ({names})")


class BalancedLimit:
    """Which examples `--limit` keeps: the first of each label 0..num_classes-1, `limit` in all.

    limit None keeps all. `full` is True once every label has its share, so that reading can stop.
    """

    def __init__(self, limit: int | None, num_classes: int):
        self._left: dict[int, int] | None = None
        if limit is not None:
            share, rest = divmod(limit, num_classes)
            self._left = {label: share + (label < rest) for label in range(num_classes)}

    @property
    def full(self) -> bool:
        return self._left is not None and not any(self._left.values())

    def take(self, label) -> bool:
        """Whether this example is kept; counts it if so."""
        if self._left is None:
            return True
        if self._left.get(int(label), 0) == 0:
            return False
        self._left[int(label)] -= 1
        return True


# ---- the scripts' frame -------------------------------------------------------------------------


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_common_options(
    parser: argparse.ArgumentParser,
    *,
    errors: bool = True,
    seed: str | None = None,
    workers: bool = True,
) -> None:
    """--output_dir, --limit; --on_error if `errors`; --seed if `seed` says what it seeds;
    --workers."""
    group = parser.add_argument_group("common to all create_*.py")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=DEFAULT_OUTPUT_DIR,
        help="folder of the pickles (default: %(default)s)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="a quick look: at most N examples a split, evenly over the classes (default: all)",
    )
    if errors:
        group.add_argument(
            "--on_error",
            choices=("stop", "skip"),
            default="stop",
            help="stop at a broken example, or skip, count and report it (default: %(default)s)",
        )
    if seed is not None:
        group.add_argument(
            "--seed", type=int, default=0, help=f"seeds {seed} (default: %(default)s)"
        )
    if workers:
        group.add_argument(
            "--workers",
            type=positive,
            default=num_cores(),
            metavar="N",
            help="processes; the result does not depend on it (default: all %(default)s cores)",
        )


def num_cores() -> int:
    """Cores this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def progress(total: int | None, description: str, unit: str = "example"):
    """A tqdm bar on stderr; silent where stderr is no terminal."""
    return tqdm(
        total=total, desc=description, unit=unit, unit_scale=True, disable=None, leave=False
    )


class _Terminated(BaseException):
    """SIGTERM, as an exception: the same way out as SIGINT."""


def _raise_terminated(number, frame):
    raise _Terminated


def main(function: Callable[[], None]) -> int:
    """Runs a script's body; its exit code: 0; 2 or, if a worker died, 1 (one sentence on
    stderr); 130 or 143 (a signal)."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    sys.setswitchinterval(1e-4)  # seconds: threads that write or wait for workers get their turn
    try:
        function()
    except KeyboardInterrupt:
        print(
            "interrupted: nothing half-written is left, run it again to start anew",
            file=sys.stderr,
        )
        return 130
    except _Terminated:
        print(
            "terminated: nothing half-written is left, run it again to start anew", file=sys.stderr
        )
        return 143
    except WorkerDied as error:
        print(
            f"error: a worker process was killed (exit code {error}; -9: most often because the "
            "memory is full), nothing half-written is left; try --workers 1",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing half-written is left (--output_dir names another place)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'cannot write'}: {error.strerror}"
    return str(error)


# ---- parallel work ------------------------------------------------------------------------------


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` consecutive items (the last may be shorter)."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class WorkerDied(Exception):
    """A worker process ended without an answer."""


def _work(connection: multiprocessing.connection.Connection) -> None:
    """A worker's life: (function, item) in; (True, result) or (False, exception) out."""
    # the end of the pipe: the parent is done, or gone
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, item = connection.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                answer = (
                    False,
                    multiprocessing.pool.ExceptionWithTraceback(error, error.__traceback__),
                )
            connection.send(answer)


def _start_workers(count: int) -> list[tuple]:
    """(process, connection) each. Spawned, not forked: tensorflow's threads do not survive a fork.

    SIGINT and SIGTERM are blocked in them from their first instruction on: the parent decides.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # ours alone: a dead worker is the end of the pipe
            started.append((process, ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return started


@contextlib.contextmanager
def map_ordered(function: Callable, items: Iterable, workers: int) -> Iterator[Iterator]:
    """map(function, items) over processes: results in order, a few items per process in flight.

        with map_ordered(function, items, workers) as results:
            for result in results: ...

    items: best chunks that take some 10 ms or more. function: a module-level function (it is sent
    by name). Leaving the block ends the processes, whatever they are at.
    Raises: what `function` raises; WorkerDied.

    A pipe and a thread for each process, nothing shared: a process that is killed at any moment,
    also in the middle of its answer, is the end of its pipe and of nothing else. (The executor of
    the standard library shares one pipe for all answers and waits for ever for the rest of one.)
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    if workers == 1 or len(first) < 2:
        yield map(function, items)
        return
    idle: queue.SimpleQueue = queue.SimpleQueue()

    def call(item):
        process, connection = idle.get()
        try:
            connection.send((function, item))
            done, answer = connection.recv()
        except (EOFError, OSError) as error:
            process.join()
            raise WorkerDied(process.exitcode) from error
        finally:
            idle.put((process, connection))
        if not done:
            raise answer
        return answer

    def results():
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for item in items:
            pending.append(threads.submit(call, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    started = _start_workers(workers)
    threads = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for worker in started:
            idle.put(worker)
        yield results()
    finally:
        for process, _ in started:
            process.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for process, connection in started:
            process.join()
            connection.close()
