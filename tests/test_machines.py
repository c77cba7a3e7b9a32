"""The commands on machines that differ from a developer's: odd paths, terminals, bare systems,
other versions of the libraries.

The slow tests install packages from the network; each says how long it takes on two cores.
"""

import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tiny
from checkout import ROOT, copy_checkout
from test_cpu_kernel import clone, compile_sh, keep_only_the_frame

ODD = "Mein Käse & 数据"
STEPS = ["--train_steps", "12", "--batch_size", "8", *tiny.SETTINGS]


def run(*command, folder, **environment):
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- paths and terminals -----------------------------------------------------------


def test_a_checkout_in_a_folder_with_spaces_and_foreign_letters(tmp_path):
    checkout = copy_checkout(tmp_path / ODD)
    tiny.write_data(checkout / "die daten ü" / "data")
    common = tiny.arguments(Path("die daten ü"))
    train = ["main_learnable_skewness.py", *common, *STEPS]
    said = run(sys.executable, *train, "--stop_after", "6", folder=checkout)
    (command,) = re.findall(r"^.*--resume.*$", said, flags=re.M)
    command = command[command.index("main_learnable") :]
    resumed = run("sh", "-c", f"{shlex.quote(sys.executable)} {command}", folder=checkout)
    assert "resumed at step 6" in resumed
    infer = ["main_inference.py", *tiny.arguments(Path("die daten ü"), mode="eval")]
    assert "Accuracy" in run(sys.executable, *infer, folder=checkout)
    assert (checkout / "die daten ü/out/logs/log-0/lra-listops/train.sat.html").exists()


def test_compile_sh_in_such_a_folder(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    (tmp_path / ODD).mkdir()
    copy = clone(tmp_path / ODD)
    keep_only_the_frame(copy)
    result = compile_sh(copy, NVCC="no-nvcc")
    assert result.returncode == 0, result.stderr
    assert "built: kernels/libsat_cpu.so" in result.stdout


def on_a_terminal(command: list[str], **environment: str) -> str:
    """What a command writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, said.decode()
    return said.decode()


@pytest.mark.parametrize("terminal", ["xterm", "dumb", "pipe"])
def test_only_a_terminal_that_can_redraw_a_line_gets_a_bar(terminal, tmp_path):
    tiny.write_data(tmp_path / "data")
    command = [sys.executable, "main_learnable_skewness.py", *tiny.arguments(tmp_path), *STEPS]
    if terminal == "pipe":
        said = run(*command, folder=ROOT, TERM="xterm")
    else:
        said = on_a_terminal(command, TERM=terminal).replace("\r\n", "\n")
    assert "Evaluation Results" in said
    if terminal == "xterm":
        assert "\r" in said and "/12 [" in said
    else:
        assert "\r" not in said and "\x1b" not in said and "/12 [" not in said


# ---- bare systems and other versions -----------------------------------------------

# In its own mount namespace, so that nothing stays mounted: a root that has what a command needs
# to run, and the folders of wheels that pip is told to look in.
INSIDE = """
set -e
mount --make-rprivate /
mount -t proc proc "$BASE/proc"
mount --rbind /dev "$BASE/dev"
for folder in $PIP_FIND_LINKS; do
    if [ -d "$folder" ]; then
        mkdir -p "$BASE$folder"
        mount --bind "$folder" "$BASE$folder"
    fi
done
exec chroot "$BASE" env -i HOME=/home/me PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \\
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_FIND_LINKS="$PIP_FIND_LINKS" \\
    sh -c "cd /home/me/sat && $1"
"""
SOME_TESTS = [
    f"tests/test_{name}.py"
    for name in ("commands", "dataset", "safe_pickle", "checkpoint", "operators", "models", "loop")
]


def in_root(base: Path, command: str) -> str:
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", INSIDE, "sh", command],
        env={"PATH": os.environ["PATH"], "BASE": str(base), "PIP_FIND_LINKS": wheels},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_demo_and_tests_on_a_bare_debian(suite, tmp_path):
    """Python, its venv package and make alone: no compiler, no git. Half an hour each, 3 GB of
    downloads where torch comes with CUDA."""
    if os.geteuid() != 0 or not shutil.which("debootstrap") or not shutil.which("unshare"):
        pytest.skip("needs root, debootstrap and unshare")
    base = tmp_path / suite
    packages = "--include=python3,python3-venv,make,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, suite, base], check=True)
    for file in ("resolv.conf", "hosts", "ssl/certs/ca-certificates.crt"):
        shutil.copy(Path("/etc") / file, base / "etc" / file)
    checkout = copy_checkout(base / "home" / "me" / "sat")
    for library in (checkout / "kernels").glob("*.so"):
        library.unlink()

    said = in_root(base, "make demo").splitlines()
    assert said[-1].startswith("compile.sh: no C++ compiler found"), said[-8:]
    assert said[-2].startswith("next, a real task"), said[-8:]
    assert (checkout / "runs" / "demo" / "demo.png").exists()
    in_root(base, "make dev-env")
    in_root(base, f".venv/bin/python -m pytest -q -x {' '.join(SOME_TESTS)} tests/test_docs.py")


@pytest.mark.slow
@pytest.mark.parametrize("pin", ["numpy==1.26.4", "torch==2.14.1"])
def test_other_versions(pin, tmp_path):
    """An environment of its own: some eight minutes each; torch comes with CUDA, 5 GB of disk."""
    if pin.startswith("numpy") and sys.version_info >= (3, 13):
        pytest.skip("NumPy 1.26 has no wheels for this Python")
    name = pin.split("==")[0]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    others = [line for line in lines if not line.startswith(f"{name}==")]
    (tmp_path / "constraints.txt").write_text("\n".join(others))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["-m", "pip", "install", "-q", "-c", str(tmp_path / "constraints.txt"), pin]
    install += ["-r", "requirements-train.txt", "pytest", "hypothesis"]
    subprocess.run([python, *install], cwd=ROOT, check=True)
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SOME_TESTS]
    subprocess.run(command, cwd=ROOT, check=True)
