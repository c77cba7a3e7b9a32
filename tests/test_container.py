"""The demo's commands, small, in a place that offers as little as a container does."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In its own mount namespace: the code read-only, /dev/shm of 64 MB; a private home, where Python
# may live, shows nothing but Python.
OUTSIDE = """
set -e
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount -o remount,bind,ro "$ROOT"
mkdir -p /dev/shm
mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm
for prefix in "$BASE" "$PREFIX"; do
    case $prefix in "$HOME"/*)
        mkdir -p "$FOLDER/python$prefix"
        mount --bind "$prefix" "$FOLDER/python$prefix";;
    esac
done
if [ -d "$FOLDER/python$HOME" ]; then
    mount --rbind "$FOLDER/python$HOME" "$HOME"
fi
cd "$ROOT"
exec setsid taskset -c "$CPU" setpriv --reuid 54321 --regid 54321 --clear-groups \\
    --bounding-set=-all --no-new-privs env -i PATH=/usr/bin:/bin LC_ALL=C PYTHONUTF8=0 \\
    PYTHONCOERCECLOCALE=0 PYTHONPATH="$FOLDER/site" "$@" < /dev/null
"""

# a file system without locks and without fsync of folders
NO_LOCKS = """
import errno, fcntl, os, stat
def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
def fsync(file, real=os.fsync):
    if stat.S_ISDIR(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    real(file)
os.fsync = fsync
"""

SMALL = [
    *("--set=model.max_seq_len=256", "--set=model.num_layers=2", "--set=model.block_size=16"),
    *("--set=model.density=0.1", "--set=training.warmup=3", "--set=training.eval_frequency=10"),
    *("--sk", "4.5", "--ds", "5", "--max_dense_steps", "8", "--batch_size", "8"),
]


@pytest.fixture
def folder():
    """Writable for everybody, reachable without passing through a private folder."""
    path = Path(tempfile.mkdtemp(prefix="sat-container-", dir="/tmp"))
    path.chmod(0o777)
    (path / "site").mkdir()
    (path / "site" / "sitecustomize.py").write_text(NO_LOCKS)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def run(folder):
    def run(*arguments, expected=0):
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.path.expanduser("~"),
            "ROOT": str(ROOT),
            "BASE": sys.base_prefix,
            "PREFIX": sys.prefix,
            "FOLDER": str(folder),
            "CPU": str(min(os.sched_getaffinity(0))),
        }
        command = ["unshare", "--mount", "sh", "-c", OUTSIDE, "sh", sys.executable, *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", timeout=600
        )
        if done.returncode and ("unshare: " in done.stderr or "mount: " in done.stderr):
            pytest.skip(f"needs root and its own mounts: {done.stderr.strip()[:200]}")
        assert done.returncode == expected, done.stdout[-2000:] + done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs root")
def test_the_demo_runs_through(folder, run):
    place = run(
        "-c",
        "import os, sys; print(os.getuid(), 'HOME' in os.environ, sys.stdout.encoding, "
        "len(os.sched_getaffinity(0)), os.access('.', os.W_OK), os.isatty(0))",
    )
    assert place.split() == ["54321", "False", "ascii", "1", "False", "False"], "not the place"
    data, out = str(folder / "data"), str(folder / "out")
    counts = ["--num_train", "64", "--num_dev", "16", "--num_test", "16"]
    lengths = ["--min_length", "10", "--max_length", "60", "--padded_length", "256"]
    run("preprocess/create_listops.py", "--output_dir", data, *counts, *lengths)
    common = ["--task", "lra-listops", "--data_dir", data, "--output_dir", out]
    train = ["main_learnable_skewness.py", "--mode", "train", *common, *SMALL]
    said = run(*train, "--train_steps", "30", "--stop_after", "20")
    assert "has no locks" in said and said.count("the file system") <= 2
    run(*train, "--train_steps", "30", "--resume")
    assert "Accuracy" in run("main_inference.py", "--mode", "eval", *common)
    logs = folder / "out" / "logs" / "log-0" / "lra-listops"
    names = {path.name for path in logs.iterdir()}
    assert {"train.sat.log", "sat.metrics.jsonl", "sat.run.json", "train.sat.html"} <= names
    assert "Evaluation Results" in (logs / "train.sat.log").read_text(encoding="utf-8")
    run("-m", "training.data.inspect", f"{data}/lra-listops.dev.pickle")
