"""preprocess/writer.py: pickles that everybody reads, whole or not at all."""

import contextlib
import errno
import hashlib
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import writer
from training.data import manifest, safe_pickle

REPOSITORY = Path(__file__).resolve().parents[1]


def silent(text: str) -> None:
    pass


@contextlib.contextmanager
def one(folder: Path, notify=silent):
    """The writer of lra-x.dev.pickle, alone in its set."""
    with writer.open_set(folder, "lra-x", ("dev",), notify=notify) as files:
        yield files["dev"]


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
    with one(folder) as out:
        for first, second, label in examples:
            out.add(input_ids_0=first, label=label, input_ids_1=second)
    with open(folder / "lra-x.dev.pickle", "rb") as file:
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
    with writer.open_set(tmp_path, "lra-x", ("train", "test"), notify=notices.append) as files:
        out = files["train"]
        for i in range(2 * writer.BATCH + 1):
            out.add(input_ids_0=np.full(3, i, np.int32), label=np.int64(i))
        files["test"].add(input_ids_0=np.zeros(3, np.int32), label=np.int64(0))
    with open(out.path, "rb") as file:
        read = pickle.load(file)
    assert [int(item["label"]) for item in read] == list(range(2 * writer.BATCH + 1))
    assert all((item["input_ids_0"] == item["label"]).all() for item in read)
    assert sum(1 for _ in safe_pickle.iterate(out.path)) == len(read)
    digest = hashlib.sha256(out.path.read_bytes()).hexdigest()
    assert notices[0] == f"{out.path}: 2,001 examples, 0.1 MB, sha256 {digest}"
    fact = manifest.read(tmp_path, "lra-x")["splits"]["train"]
    assert fact == {"size": out.path.stat().st_size, "sha256": digest, "examples": 2001}


def test_names_that_numpy_1_and_2_both_read(tmp_path):
    with one(tmp_path) as out:
        out.add(input_ids_0=np.zeros(3, np.int32), label=np.int64(1))
    data = out.path.read_bytes()
    assert data[:2] == b"\x80\x04" and b"numpy.core.multiarray" in data and b"_core" not in data


def test_constant_memory(tmp_path):
    row = np.zeros(1024, np.int32)
    tracemalloc.start()
    with one(tmp_path) as out:
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
    with one(tmp_path / "a" / "b") as out:
        add_one(out)
        assert names(out.path.parent) == ["lra-x.dev.pickle.part"]
    assert names(out.path.parent) == ["lra-x.dev.pickle", "lra-x.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_leaves_the_old_file(tmp_path, error):
    (tmp_path / "lra-x.dev.pickle").write_text("old")
    with pytest.raises(error), one(tmp_path) as out:
        add_one(out)
        raise error
    assert names(tmp_path) == ["lra-x.dev.pickle"] and out.path.read_text() == "old"


def test_splits_appear_together_or_not_at_all(tmp_path):
    with (
        pytest.raises(ValueError, match=r"lra-x\.test\.pickle: there is no example"),
        writer.open_set(tmp_path, "lra-x", notify=silent) as splits,
    ):
        add_one(splits["train"])
        add_one(splits["dev"])
    assert names(tmp_path) == []
    with writer.open_set(tmp_path, "lra-x", notify=silent) as splits:
        for out in splits.values():
            add_one(out)
        assert all(name.endswith(".part") for name in names(tmp_path))
    pickles = [f"lra-x.{split}.pickle" for split in ("dev", "test", "train")]
    assert names(tmp_path) == [pickles[0], "lra-x.json", *pickles[1:]]


def test_the_first_split_goes_if_the_second_cannot_be_made(tmp_path):
    (tmp_path / "lra-x.dev.pickle.part").mkdir()
    with (
        pytest.raises(ValueError, match=r"cannot write .*lra-x\.dev\.pickle: Is a directory"),
        writer.open_set(tmp_path, "lra-x", notify=silent),
    ):
        pass
    assert names(tmp_path) == ["lra-x.dev.pickle.part"]


@pytest.mark.parametrize("where", ["add", "flush", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(OSError, match="No space left"),
        one(tmp_path) as out,
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
        one(tmp_path) as out,
    ):
        add_one(out)
    assert len(calls) == 1 and names(tmp_path) == []


FULL = """
import resource, signal, sys
sys.path.insert(0, {repository!r})
import numpy as np
from preprocess import driver, parallel, writer
def array(i):
    return np.zeros(1024, np.int32)
def run():
    with (
        writer.open_set({folder!r}, "lra-x", ("dev",)) as files,
        parallel.map_ordered(array, range(9000), {workers}) as arrays,
    ):
        for ids in arrays:
            files["dev"].add(input_ids_0=ids, label=1)
if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000,) * 2)
    sys.exit(driver.guarded(run))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limited_file_size(tmp_path, workers):
    """The real thing: a file that the system does not let grow, while workers are at work."""
    folder, script = tmp_path / "out", tmp_path / "run.py"
    text = FULL.format(repository=str(REPOSITORY), folder=str(folder), workers=workers)
    script.write_text(text)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr == f"error: {folder}/lra-x.dev.pickle.part: File too large\n"
    assert names(folder) == []


def test_the_rest_of_a_killed_run_is_said_and_replaced(tmp_path):
    (tmp_path / "lra-x.dev.pickle.part").write_bytes(b"x" * 10_000)
    notices = []
    with one(tmp_path, notices.append) as out:
        add_one(out)
    assert "did not finish: started anew" in notices[0]
    assert names(tmp_path) == ["lra-x.dev.pickle", "lra-x.json"]
    assert len(safe_pickle.load(out.path)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_link_that_a_killed_run_left(tmp_path):
    """Killed between the link that makes test's file dev's and their names: a run with a dev of
    its own takes it for no file of its own."""
    if os.fork() == 0:
        os.replace = lambda *names: os._exit(0)
        with writer.open_set(tmp_path, "lra-x", ("train", "test"), notify=silent) as files:
            for out in files.values():
                add_one(out)
        os._exit(1)
    assert os.wait()[1] == 0
    with writer.open_set(tmp_path, "lra-x", notify=silent) as files:
        for out in files.values():
            add_one(out)
    pickles = [f"lra-x.{split}.pickle" for split in ("dev", "test", "train")]
    assert [name for name in names(tmp_path) if "pickle" in name] == pickles


def test_two_runs_at_once(tmp_path):
    with one(tmp_path) as out:
        add_one(out)
        with pytest.raises(ValueError, match="another run is writing this file"):
            writer.SplitWriter(tmp_path, "lra-x", "dev", silent)
    assert len(safe_pickle.load(out.path)) == 1


def test_free_space(tmp_path):
    writer.check_free_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(ValueError, match=r"needs 1,000,000.0 GB, only .* GB are free"):
        writer.check_free_space(tmp_path / "not" / "there", 10**15)
