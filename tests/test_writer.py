"""preprocess/writer.py: pickles that everybody reads, whole or not at all."""

import argparse
import errno
import hashlib
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import writer
from training.data import safe_pickle

REPOSITORY = Path(__file__).resolve().parents[1]


def silent(text: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20).map(lambda x: np.array(x, np.int32))
labels = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
)


@given(st.lists(st.tuples(ids, st.none() | ids, labels), min_size=1, max_size=8))
@settings(deadline=None)
def test_pickle_reads_what_was_added(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("x")
    with writer.SplitWriter(folder, "lra-x", "train", notify=silent) as out:
        for first, second, label in examples:
            out.add(input_ids_0=first, label=label, input_ids_1=second)
    with open(folder / "lra-x.train.pickle", "rb") as file:
        read = pickle.load(file)
    for item, (first, second, label) in zip(read, examples, strict=True):
        expected = {"input_ids_0": first, "input_ids_1": second, "label": label}
        assert list(item) == [key for key in expected if expected[key] is not None]
        for key, value in item.items():
            assert type(value) is type(expected[key]) and np.array_equal(value, expected[key])
            if isinstance(value, np.ndarray):
                assert value.dtype == np.int32 and value.flags.writeable


@pytest.mark.parametrize("block", [100, 5000, 2 << 20])
def test_a_list_longer_than_a_batch(tmp_path, monkeypatch, block):
    monkeypatch.setattr(writer, "BLOCK", block)
    monkeypatch.setattr(writer, "SYNC", 3 * block)
    notices = []
    with writer.SplitWriter(tmp_path, "lra-x", "train", notify=notices.append) as out:
        for i in range(2 * writer.BATCH + 1):
            out.add(input_ids_0=np.full(3, i, np.int32), label=np.int64(i))
    with open(out.path, "rb") as file:
        read = pickle.load(file)
    assert [int(item["label"]) for item in read] == list(range(2 * writer.BATCH + 1))
    assert all((item["input_ids_0"] == item["label"]).all() for item in read)
    assert sum(1 for _ in safe_pickle.iterate(out.path)) == len(read)
    digest = hashlib.sha256(out.path.read_bytes()).hexdigest()
    assert notices == [f"{out.path}: 2,001 examples, 0.1 MB, sha256 {digest}"]


def test_names_that_numpy_1_and_2_both_read(tmp_path):
    with writer.SplitWriter(tmp_path, "lra-x", "train", notify=silent) as out:
        out.add(input_ids_0=np.zeros(3, np.int32), label=np.int64(1))
    data = out.path.read_bytes()
    assert data[:2] == b"\x80\x04" and b"numpy.core.multiarray" in data and b"_core" not in data


def test_constant_memory(tmp_path):
    row = np.zeros(1024, np.int32)
    tracemalloc.start()
    with writer.SplitWriter(tmp_path, "lra-x", "train", notify=silent) as out:
        for i in range(10_000):
            out.add(input_ids_0=row, label=np.int64(i))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.path.stat().st_size > 40e6 and peak < 12e6, peak


@pytest.mark.parametrize(
    "example",
    [
        {"input_ids_0": np.zeros(3, np.int64), "label": 1},
        {"input_ids_0": np.zeros((3, 1), np.int32), "label": 1},
        {"input_ids_0": [1, 2], "label": 1},
        {"input_ids_0": np.zeros(3, np.int32), "label": 1.0},
        {"input_ids_0": np.zeros(3, np.int32), "label": True},
    ],
)
def test_refuses_other_types(example):
    with pytest.raises(TypeError):
        writer.encode_example(**example)


# ---- whole or not at all ------------------------------------------------------------------------


def add_one(out: writer.SplitWriter) -> None:
    out.add(input_ids_0=np.ones(3, np.int32), label=np.int64(1))


def test_the_file_appears_at_the_end(tmp_path):
    with writer.SplitWriter(tmp_path / "a" / "b", "lra-x", "dev", notify=silent) as out:
        add_one(out)
        assert names(out.path.parent) == ["lra-x.dev.pickle.part"]
    assert names(out.path.parent) == ["lra-x.dev.pickle"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_leaves_the_old_file(tmp_path, error):
    (tmp_path / "lra-x.dev.pickle").write_text("old")
    with pytest.raises(error), writer.SplitWriter(tmp_path, "lra-x", "dev", notify=silent) as out:
        add_one(out)
        raise error
    assert names(tmp_path) == ["lra-x.dev.pickle"] and out.path.read_text() == "old"


def test_splits_appear_together_or_not_at_all(tmp_path):
    with (
        pytest.raises(ValueError, match=r"lra-x\.test\.pickle: there is no example"),
        writer.open_splits(tmp_path, "lra-x", notify=silent) as splits,
    ):
        add_one(splits["train"])
        add_one(splits["dev"])
    assert names(tmp_path) == []
    with writer.open_splits(tmp_path, "lra-x", notify=silent) as splits:
        for out in splits.values():
            add_one(out)
        assert all(name.endswith(".part") for name in names(tmp_path))
    assert names(tmp_path) == [f"lra-x.{s}.pickle" for s in ("dev", "test", "train")]


def test_the_first_split_goes_if_the_second_cannot_be_made(tmp_path):
    (tmp_path / "lra-x.dev.pickle.part").mkdir()
    with (
        pytest.raises(ValueError, match=r"cannot write .*lra-x\.dev\.pickle: Is a directory"),
        writer.open_splits(tmp_path, "lra-x", notify=silent),
    ):
        pass
    assert names(tmp_path) == ["lra-x.dev.pickle.part"]


@pytest.mark.parametrize("where", ["add", "flush", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(OSError, match="No space left"),
        writer.SplitWriter(tmp_path, "lra-x", "dev", notify=silent) as out,
    ):
        add_one(out)
        if where == "fsync":
            monkeypatch.setattr(os, "fsync", full)
        else:  # the file's own buffer hides it until later
            monkeypatch.setattr(out, "_write" if where == "add" else "finish", full)
            add_one(out)
    assert names(tmp_path) == []


def test_a_disk_that_refuses_early_is_not_forgotten(tmp_path, monkeypatch):
    """The system reports a failed write-back once: to the thread that syncs ahead."""
    calls = []

    def once(number):
        calls.append(number)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writer, "SYNC", 1)
    monkeypatch.setattr(os, "fsync", once)
    with (
        pytest.raises(OSError, match="Input/output error"),
        writer.SplitWriter(tmp_path, "lra-x", "dev", notify=silent) as out,
    ):
        add_one(out)
    assert len(calls) == 1 and names(tmp_path) == []


FULL = """
import resource, signal, sys
sys.path.insert(0, {repository!r})
import numpy as np
from preprocess import writer
def array(i):
    return np.zeros(1024, np.int32)
def run():
    with (
        writer.SplitWriter({folder!r}, "lra-x", "dev") as out,
        writer.map_ordered(array, range(9000), {workers}) as arrays,
    ):
        for ids in arrays:
            out.add(input_ids_0=ids, label=1)
if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000,) * 2)
    sys.exit(writer.main(run))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limited_file_size(tmp_path, workers):
    """The real thing: a file that the system does not let grow, while workers are at work."""
    folder, script = tmp_path / "out", tmp_path / "run.py"
    text = FULL.format(repository=str(REPOSITORY), folder=str(folder), workers=workers)
    script.write_text(text)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr == "error: cannot write: File too large\n"
    assert names(folder) == []


def test_the_rest_of_a_killed_run_is_said_and_replaced(tmp_path):
    (tmp_path / "lra-x.dev.pickle.part").write_bytes(b"x" * 10_000)
    notices = []
    with writer.SplitWriter(tmp_path, "lra-x", "dev", notify=notices.append) as out:
        add_one(out)
    assert "did not finish: started anew" in notices[0] and names(tmp_path) == ["lra-x.dev.pickle"]
    assert len(safe_pickle.load(out.path)) == 1


def test_two_runs_at_once(tmp_path):
    with writer.SplitWriter(tmp_path, "lra-x", "dev", notify=silent) as out:
        add_one(out)
        with pytest.raises(ValueError, match="another run is writing this file"):
            writer.SplitWriter(tmp_path, "lra-x", "dev")
    assert len(safe_pickle.load(out.path)) == 1


def test_free_space(tmp_path):
    writer.check_free_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(ValueError, match=r"needs 1,000,000.0 GB, only .* GB are free"):
        writer.check_free_space(tmp_path / "not" / "there", 10**15)


# ---- the frame ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("a sentence"), "a sentence"),
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
    ],
)
def test_errors_are_one_sentence(capsys, error, text):
    def run():
        raise error

    assert writer.main(run) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {text}") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_faults_of_our_own_keep_their_traceback():
    with pytest.raises(KeyError):
        writer.main(lambda: {}["x"])


def test_skips():
    skips, lines = writer.Skips("skip"), []
    for i in range(5):
        skips.skip(f"row {i}", "is empty")
    skips.skip("row 9", "has no label")
    skips.report(lines.append)
    assert lines == [
        "skipped 1: has no label (row 9)",
        "skipped 5: is empty (row 0, row 1, row 2 ...)",
    ]
    stop = writer.Skips("stop")
    stop.skip("a.png", "the picture file is empty", always=True)
    with pytest.raises(ValueError, match=r"row 3: is empty .*--on_error skip"):
        stop.skip("row 3", "is empty")


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 12))
def test_balanced_limit(labels, limit):
    chooser = writer.BalancedLimit(limit, 5)
    kept = [label for label in labels if chooser.take(label)]
    shares = [limit // 5 + (label < limit % 5) for label in range(5)]
    expected = [min(share, labels.count(label)) for label, share in enumerate(shares)]
    assert [kept.count(label) for label in range(5)] == expected
    assert chooser.full == (len(kept) == limit)


def test_no_limit_takes_all():
    chooser = writer.BalancedLimit(None, 2)
    assert all(chooser.take(label) for label in (0, 0, 0, 5)) and not chooser.full


def test_common_options():
    parser = argparse.ArgumentParser()
    writer.add_common_options(parser, seed="the order")
    arguments = parser.parse_args([])
    assert arguments.output_dir == Path("data/lra_processed") and arguments.limit is None
    assert (arguments.on_error, arguments.seed) == ("stop", 0) and arguments.workers >= 1
    for bad in (["--limit", "0"], ["--workers", "x"], ["--on_error", "go"]):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(bad)
        assert caught.value.code == 2


# ---- parallel work ------------------------------------------------------------------------------


def square(x: int) -> int:
    if x == 77:
        raise ValueError("77 is not liked")
    if x < 0:
        os._exit(-x)
    return x * x


@pytest.mark.parametrize("workers", [1, 3])
def test_map_ordered(workers):
    def mapped(items):
        with writer.map_ordered(square, items, workers) as results:
            yield from results

    assert list(mapped(range(50))) == [x * x for x in range(50)]
    endless = mapped(itertools.count(100))
    assert list(itertools.islice(endless, 5)) == [x * x for x in range(100, 105)]
    endless.close()
    with pytest.raises(ValueError, match="77 is not liked"):
        list(mapped(range(70, 90)))


def test_a_dead_worker_is_one_sentence(capsys):
    def run():
        with writer.map_ordered(square, [1, -9, 2, 3], 2) as results:
            list(results)

    assert writer.main(run) == 1
    assert capsys.readouterr().err.startswith("error: a worker process was killed")


def test_chunks():
    assert list(writer.chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(writer.chunks([], 2)) == []


LONG_RUN = """
import itertools, os, sys, time
sys.path.insert(0, {repository!r})
import numpy as np
from preprocess import writer
def slow_pid(x):
    time.sleep(0.05)
    return os.getpid()
def run():
    with (
        writer.open_splits({folder!r}, "lra-x", ("train", "dev")) as splits,
        writer.map_ordered(slow_pid, itertools.count(), 2) as pids,
    ):
        for pid in pids:
            splits["train"].add(input_ids_0=np.zeros(9, np.int32), label=1)
            print(pid, flush=True)
if __name__ == "__main__":
    sys.exit(writer.main(run))
"""


WORKERS_DIE = """
import itertools, os, sys
sys.path.insert(0, {repository!r})
import numpy as np
from preprocess import writer
def pid_and_much(x):
    return os.getpid(), bytes(8 << 20)  # an answer that takes a while to send
def run():
    with (
        writer.open_splits({folder!r}, "lra-x", ("train", "dev")) as splits,
        writer.map_ordered(pid_and_much, itertools.count(), 2) as answers,
    ):
        for pid, much in answers:
            splits["train"].add(input_ids_0=np.zeros(9, np.int32), label=1)
            print(pid, flush=True)
if __name__ == "__main__":
    sys.exit(writer.main(run))
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
        assert err.endswith("nothing half-written is left, run it again to start anew\n")
        assert err.count("\n") == 1, err
    else:
        assert all(name.endswith(".part") for name in names(folder))
