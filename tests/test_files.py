"""training/recording/files.py through the commands: file systems that offer less than usual.

Nobody can mount them all in a test, so the calls answer what such file systems answer.
"""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny

from preprocess import driver
from preprocess.tasks import listops
from training.recording import files

ROOT = Path(__file__).resolve().parents[1]
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]


def refuse(code, *, folders_only=False):
    """A system call that is not offered, for all files or for folders."""

    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    def fsync(file, real=os.fsync):
        number = file if isinstance(file, int) else file.fileno()
        if not folders_only or stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, os.strerror(code))
        real(number)

    return flock, fsync


def prepare(folder):
    options = ["--generate", "--limit", "10", "--workers", "1", "--output_dir", str(folder)]
    return driver.main(listops.TASK, options)


def run_everything(folder):
    """Data, training with a transition, a resumed run and an evaluation: exit codes."""
    yield prepare(folder / "prepared")
    tiny.write_data(folder / "data")
    sparse = ["--max_dense_steps", "5"]
    yield tiny.train(folder, *sparse, "--stop_after", "10")
    yield tiny.train(folder, *sparse, "--resume")
    yield tiny.evaluate(folder)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(files, "_said", set())


@pytest.mark.parametrize("code", NO_LOCKS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["locks", "folder fsync", "fsync"])
def test_every_command_works_without(tmp_path, monkeypatch, capsys, call, code):
    flock, fsync = refuse(code, folders_only=call == "folder fsync")
    if call == "locks":
        monkeypatch.setattr(fcntl, "flock", flock)
    else:
        monkeypatch.setattr(os, "fsync", fsync)
    assert list(run_everything(tmp_path)) == [0, 0, 0, 0]
    err = capsys.readouterr().err
    what = "has no locks" if call == "locks" else "cannot flush"
    assert err.count(f"the file system {what}") == 1 and os.strerror(code) in err
    assert (tiny.checkpoints(tmp_path) / "sat.model").exists()
    assert "Accuracy" in (tiny.logs(tmp_path) / "eval.sat.log").read_text()
    assert not list(tmp_path.rglob("*.saving"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_is_no_missing_feature(tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(os, "fsync", refuse(code)[1])
    prepared, trained, *_ = run_everything(tmp_path)
    err = capsys.readouterr().err
    assert (prepared, trained) == (2, 2) and os.strerror(code) in err and "cannot flush" not in err


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "file"
    with files.open_locked(path) as file:
        file.write(b"mine")
        with pytest.raises(BlockingIOError):
            files.open_locked(path)
    with files.open_locked(path) as file:
        assert file.tell() == 4


def test_a_lock_is_of_the_file_that_has_the_name(tmp_path, monkeypatch):
    """Between opening and locking another process gives the file its final name."""
    path, real, moved = tmp_path / "file.part", files.lock, []

    def lock(file, name):
        if not moved:
            moved.append(os.replace(path, tmp_path / "file"))
        return real(file, name)

    monkeypatch.setattr(files, "lock", lock)
    with files.open_locked(path) as file:
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    assert (tmp_path / "file").exists()


def test_without_locks_no_file_of_another_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS)[0])
    living = tmp_path / ".a.json.01234567.saving"
    living.write_bytes(b"half")
    files.write_file(tmp_path / "a.json", b"{}")
    assert living.exists() and (tmp_path / "a.json").read_bytes() == b"{}"


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """Writing needs no right to read the folder."""
    real = os.open

    def open_(path, flags, *rest):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", open_)
    files.write_file(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_readers_see_the_old_or_the_new_file(tmp_path):
    path, seen, stop = tmp_path / "a.json", set(), threading.Event()
    files.write_file(path, b"0" * 5000)

    def read():
        while not stop.is_set():
            seen.add(path.read_bytes())

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(50):
        files.write_file(path, b"%d" % (number % 10) * 5000)
    stop.set()
    thread.join()
    assert seen <= {b"%d" % digit * 5000 for digit in range(10)}


COMMANDS = [
    ["main_learnable_skewness.py", "--dry_run"],
    ["main_inference.py"],
    ["preprocess/create_listops.py", "--limit", "1"],
    ["preprocess/download.py", "--task", "lra-text"],
    ["-m", "training.data.inspect", "--help"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_windows_gets_a_sentence(tmp_path, command):
    """There Python has none of the modules that Unix alone has."""
    site = "import sys\nfor name in ('fcntl', 'resource', 'termios', 'pwd'):\n"
    (tmp_path / "sitecustomize.py").write_text(site + "    sys.modules[name] = None\n")
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "on Windows use WSL" in run.stderr, run.stderr
    assert run.stderr.count("\n") == 1
