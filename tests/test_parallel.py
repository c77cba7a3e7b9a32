"""preprocess/parallel.py: ordered results, and processes that die at any moment."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from preprocess import driver, parallel

REPOSITORY = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def square(x: int) -> int:
    if x == 77:
        raise ValueError("77 is not liked")
    if x < 0:
        os._exit(-x)
    return x * x


@pytest.mark.parametrize("workers", [1, 3])
def test_map_ordered(workers):
    def mapped(items):
        with parallel.map_ordered(square, items, workers) as results:
            yield from results

    assert list(mapped(range(50))) == [x * x for x in range(50)]
    endless = mapped(itertools.count(100))
    assert list(itertools.islice(endless, 5)) == [x * x for x in range(100, 105)]
    endless.close()
    with pytest.raises(ValueError, match="77 is not liked"):
        list(mapped(range(70, 90)))


def fill(megabytes: int) -> int:
    return len(bytearray(b"x") * (megabytes << 20))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_peak_memory_counts_the_workers(monkeypatch):
    monkeypatch.setattr(parallel, "_workers_peak", 0)
    alone = parallel.peak_memory()
    with parallel.map_ordered(fill, [150, 1, 150, 1], 2) as results:
        assert list(results) == [150 << 20, 1 << 20, 150 << 20, 1 << 20]
    assert 150 << 20 < parallel.peak_memory() - alone < 900 << 20


def test_a_dead_worker_is_one_sentence(capsys):
    def run():
        with parallel.map_ordered(square, [1, -9, 2, 3], 2) as results:
            list(results)

    assert driver.guarded(run) == 1
    assert capsys.readouterr().err.startswith("error: a worker process was killed")


def test_chunks():
    assert list(parallel.chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(parallel.chunks([], 2)) == []


LONG_RUN = """
import itertools, os, sys, time
sys.path.insert(0, {repository!r})
import numpy as np
from preprocess import driver, parallel, writer
def slow_pid(x):
    time.sleep(0.05)
    return os.getpid()
def run():
    with (
        writer.open_set({folder!r}, "lra-x", ("train", "dev")) as splits,
        parallel.map_ordered(slow_pid, itertools.count(), 2) as pids,
    ):
        for pid in pids:
            splits["train"].add(input_ids_0=np.zeros(9, np.int32), label=1)
            print(pid, flush=True)
if __name__ == "__main__":
    sys.exit(driver.guarded(run))
"""


WORKERS_DIE = """
import itertools, os, sys
sys.path.insert(0, {repository!r})
import numpy as np
from preprocess import driver, parallel, writer
def pid_and_much(x):
    return os.getpid(), bytes(8 << 20)  # an answer that takes a while to send
def run():
    with (
        writer.open_set({folder!r}, "lra-x", ("train", "dev")) as splits,
        parallel.map_ordered(pid_and_much, itertools.count(), 2) as answers,
    ):
        for pid, much in answers:
            splits["train"].add(input_ids_0=np.zeros(9, np.int32), label=1)
            print(pid, flush=True)
if __name__ == "__main__":
    sys.exit(driver.guarded(run))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes")
@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_workers_that_are_killed_at_any_moment(tmp_path, rounds):
    """One or both, most often in the middle of an answer: one sentence within seconds."""
    folder, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(WORKERS_DIE.format(repository=str(REPOSITORY), folder=str(folder)))
    rng = random.Random(0)
    for number in range(rounds):
        run = subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        workers = set()
        while len(workers) < 2:
            workers.add(int(run.stdout.readline()))
        reader = threading.Thread(target=run.stdout.read, daemon=True)
        reader.start()  # nothing waits for us
        time.sleep(rng.random() / 10)
        for pid in sorted(workers)[: 1 + number % 2]:
            os.kill(pid, signal.SIGKILL)
        try:
            run.wait(timeout=20)
        finally:
            run.kill()
        assert run.returncode == 1
        err = run.stderr.read()
        assert err.startswith("error: a worker process was killed (exit code -9;"), err
        assert err.count("\n") == 1 and names(folder) == []
        run.stderr.close()
        reader.join()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
@pytest.mark.parametrize("number, code", [("INT", 130), ("TERM", 143), ("KILL", -9)])
def test_signals(tmp_path, number, code):
    """Nothing half-written, no process left behind, one sentence."""
    folder, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(LONG_RUN.format(repository=str(REPOSITORY), folder=str(folder)))
    run = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background may have been told to ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workers = {int(run.stdout.readline()) for _ in range(10)}
    assert names(folder) == ["lra-x.dev.pickle.part", "lra-x.train.pickle.part"]
    os.kill(run.pid, getattr(signal, f"SIG{number}"))
    _, err = run.communicate(timeout=30)
    assert run.returncode == code
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    if number != "KILL":
        assert names(folder) == []
        assert err.endswith("nothing half-written is left, run it again\n")
        assert err.count("\n") == 1, err
    else:
        assert all(name.endswith(".part") for name in names(folder))
