"""A console, a terminal or TensorBoard that fails ends no training, and its files are complete."""

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
GIVEN = ["--train_steps", "12", "--max_dense_steps", "5", "--batch_size", "8", *tiny.SETTINGS]


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def command(folder, *more):
    words = [sys.executable, str(ROOT / "main_learnable_skewness.py")]
    return [*words, *tiny.arguments(folder, *GIVEN, *more)]


def is_complete(folder, name="sat"):
    lines = (tiny.logs(folder) / f"{name}.metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if r["event"] == "train"] == list(range(1, 13))
    assert records[-1]["event"] == "end"
    assert json.loads((tiny.logs(folder) / f"{name}.run.json").read_text())["result"]
    assert (tiny.logs(folder) / f"train.{name}.html").exists()
    return (tiny.logs(folder) / f"train.{name}.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("stream", ["1", "2", "1 2"])
@pytest.mark.parametrize("end", [">/dev/full", ">&-"], ids=["full", "closed"])
def test_a_stream_that_is_full_or_closed(fresh, stream, end):
    redirect = " ".join(number + end for number in stream.split())
    words = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command(fresh)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    log_text = is_complete(fresh)
    assert "Evaluation Results" in log_text
    # said once, and only where something was lost
    assert log_text.count("the console takes no more lines") == (
        1 if "1" in stream and end == ">/dev/full" else 0
    )
    # nothing of a library's got into a file that has the number of a closed stream
    assert all(line.isprintable() for line in log_text.splitlines())


def test_a_terminal_that_is_closed(fresh):
    """Reading and writing fail with EIO from then on, the progress bar's too."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(fresh), cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    seen = b""
    while b"rule:" not in seen:
        seen += os.read(ours, 1024)
    os.close(ours)
    assert process.wait(300) == 0  # seconds; a busy machine takes minutes
    assert is_complete(fresh).count("the console takes no more lines") == 1


def test_a_name_that_the_console_cannot_write(fresh):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = command(fresh, "--name", "größe")
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert b"gr\\xf6\\xdfe" in ended.stdout  # escaped there, whole in the log
    assert "größe" in is_complete(fresh, "größe")


@pytest.mark.parametrize("part", ["SummaryWriter", "add_scalar", "flush", "add_image"])
def test_tensorboard_that_fails(fresh, monkeypatch, capsys, part):
    def broken(*arguments, **keywords):
        raise OSError(5, "Input/output error")

    from training.recording import log

    module = log.import_tensorboard()
    owner = module if part == "SummaryWriter" else module.SummaryWriter
    monkeypatch.setattr(owner, part, broken)
    assert tiny.train(fresh, *GIVEN) == 0
    assert capsys.readouterr().out.count("TensorBoard's curves end here") == 1
    is_complete(fresh)


def test_curves_survive_a_session_without_them(fresh, monkeypatch):
    """What TensorBoard wrote before it failed is there when a later session goes on."""
    from training.recording import log

    assert tiny.train(fresh, *GIVEN, "--stop_after", "4") == 0
    module = log.import_tensorboard()
    with monkeypatch.context() as patch:
        patch.setattr(module, "SummaryWriter", None)
        assert tiny.train(fresh, *GIVEN, "--resume", "--stop_after", "8") == 0
    assert tiny.train(fresh, *GIVEN, "--resume") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tiny.logs(fresh) / "sat.tensorboard")).Reload()
    steps = [e.step for e in events.Scalars("train/loss")]
    assert steps == [1, 2, 3, 4, 9, 10, 11, 12]


def test_training_off_the_main_thread(fresh):
    """Python hears signals in its main thread only; a notebook's cell may be another one."""
    codes = []

    def work():
        codes.append(tiny.train(fresh, *GIVEN))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]
    is_complete(fresh)


@pytest.mark.parametrize("entry", ["main_learnable_skewness.py", "main_inference.py"])
def test_windows_is_told_in_a_sentence(entry):
    """Which has neither fcntl nor resource."""
    program = (
        "import runpy, sys; sys.modules['fcntl'] = None; sys.path.insert(0, '.'); "
        f"sys.argv = ['{entry}']; runpy.run_path('{entry}', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "Windows" in ended.stderr
