"""A parallel map whose results do not depend on the number of processes."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing.connection
import multiprocessing.pool
import os
import queue
import signal
from collections.abc import Callable, Iterable, Iterator

from training.peak import peak_resident_bytes

_workers_peak = 0  # bytes: the most that the workers of one map had together


def num_cores() -> int:
    """Cores this process may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def peak_memory() -> int:
    """Bytes that this process and its workers had at most, each at its own peak."""
    return peak_resident_bytes() + _workers_peak


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` consecutive items (the last may be shorter)."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class WorkerDied(Exception):
    """A worker process ended without an answer."""


def _work(connection: multiprocessing.connection.Connection) -> None:
    """A worker's life: (function, item) in; (done, result or exception, peak bytes) out."""
    # the end of the pipe: the parent is done, or gone
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, item = connection.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                with_trace = multiprocessing.pool.ExceptionWithTraceback
                answer = False, with_trace(error, error.__traceback__)
            connection.send((*answer, peak_resident_bytes()))


def _start_workers(count: int) -> list[tuple]:
    """(process, connection) each. Spawned, not forked: tensorflow's threads do not survive a fork.
    SIGINT and SIGTERM are blocked in them from their first instruction on: the parent decides."""
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
    """map(function, items) over processes, for a `with` block whose end ends them, whatever they
    are at: results in order, a few items per process in flight. items: best chunks that take some
    10 ms or more. function: of a module. Raises: what `function` raises; WorkerDied.

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
    peaks: dict[int, int] = {}

    def call(item):
        process, connection = idle.get()
        try:
            connection.send((function, item))
            done, answer, peaks[process.pid] = connection.recv()
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
        global _workers_peak
        _workers_peak = max(_workers_peak, sum(peaks.values()))
        for process, _ in started:
            process.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for process, connection in started:
            process.join()
            connection.close()
