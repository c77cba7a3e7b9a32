"""The training loop: memory that runs out, numbers that break, and splits that must not matter."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch

from models import SequenceClassifier
from training import loop
from training.interrupt import StopSignal
from training.recording.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FAST_TRANSITION = ["--sk", "-100", "--ds", "1e9"]


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def train_records(folder):
    lines = (tiny.logs(folder) / "sat.metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "train"]


def losses(folder):
    return [record["loss"] for record in train_records(folder)]


# ---- the same mathematics in other pieces ------------------------------------------


def test_micro_batches_change_nothing_but_rounding(fresh):
    runs = {}
    for micro in (1, 3, 8):
        folder = fresh / str(micro)
        tiny.write_data(folder / "data")
        given = ["--sk", "-100", "--ds", "60", "--train_steps", "20"]
        assert tiny.train(folder, *given, "--micro_batch_size", str(micro)) == 0
        records = train_records(folder)
        runs[micro] = records
    one = runs[8]
    assert {r["phase"] for r in one} == {"dense", "sparse"}
    for micro in (1, 3):
        for ours, whole in zip(runs[micro], one, strict=True):
            assert ours["phase"] == whole["phase"]
            assert ours["loss"] == pytest.approx(whole["loss"], rel=1e-4)
            for name in ("skewness", "distance"):
                if whole[name][0] is not None:
                    assert ours[name] == pytest.approx(whole[name], rel=1e-3)
            if whole["attention_loss"] is not None:
                assert ours["attention_loss"] == pytest.approx(whole["attention_loss"], rel=1e-4)


# ---- faults ------------------------------------------------------------------------


def test_exhausted_memory_halves_the_micro_batch(fresh, capsys, monkeypatch):
    expected = fresh / "expected"
    tiny.write_data(expected / "data")
    assert tiny.train(expected, *FAST_TRANSITION) == 0
    capsys.readouterr()
    forward = SequenceClassifier.forward

    def limited(self, ids, *arguments, **keywords):
        if self.training and keywords.get("dropout_key") and len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(self, ids, *arguments, **keywords)

    monkeypatch.setattr(SequenceClassifier, "forward", limited)
    assert tiny.train(fresh, *FAST_TRANSITION) == 0
    output = capsys.readouterr().out
    # 8 -> 4 -> 2, each said once; training goes on from there
    assert output.count("memory exhausted at step 1") == 2
    assert "halved to 2, the effective batch stays 8" in output
    assert losses(fresh) == pytest.approx(losses(expected), rel=1e-4)
    state = load_checkpoint(tiny.checkpoints(fresh) / "sat.last.model")
    assert state.training["resolved"]["micro_batch_size"] == 2


def test_memory_exhausted_in_the_first_optimizer_step(fresh, capsys, monkeypatch):
    tiny.exhaust_memory_in_optimizer(monkeypatch)
    assert tiny.train(fresh, *FAST_TRANSITION, "--train_steps", "3") == 0
    assert capsys.readouterr().out.count("memory exhausted at step 1") == 1
    assert len(losses(fresh)) == 3


def test_memory_that_holds_no_example_fails_in_a_sentence(fresh, capsys, monkeypatch):
    def never(self, *arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(SequenceClassifier, "forward", never)
    assert tiny.train(fresh) == 1
    assert "even with a micro-batch of one example" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_memory(fresh, monkeypatch):
    def broken(self, *arguments, **keywords):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(SequenceClassifier, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        tiny.train(fresh)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_numbers_that_break_stop_before_the_weights_move(fresh, capsys, monkeypatch, part):
    train_one = loop.train_step

    def poisoned(run):
        if run.step == 17:
            weight = run.model.seq_classifer.mlpblock[2].weight
            if part == "loss":
                with torch.no_grad():
                    weight[0, 0] = torch.inf
            else:
                weight.register_hook(lambda gradient: gradient * torch.nan)
        return train_one(run)

    monkeypatch.setattr(loop, "train_step", poisoned)
    assert tiny.train(fresh, *FAST_TRANSITION) == 1
    error = capsys.readouterr().err
    last = tiny.checkpoints(fresh) / "sat.last.model"
    assert f"the {part} of step 18 (sparse phase) is not finite" in error
    assert f"the last good checkpoint is {last}" in error and error.count("\n") == 1
    assert error in (tiny.logs(fresh) / "train.sat.log").read_text()
    state = load_checkpoint(last)
    assert state.step == 10
    assert all(value.isfinite().all() for value in state.model_state_dict.values())


def test_a_signal_ends_the_run_after_its_step(fresh, capsys, monkeypatch):
    train_one = loop.train_step

    def interrupted(run):
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return train_one(run)

    monkeypatch.setattr(loop, "train_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert tiny.train(fresh, *FAST_TRANSITION) == 130
    assert signal.getsignal(signal.SIGINT) is before
    output = capsys.readouterr().out
    assert re.search("stopped by SIGINT after step 8; go on with: .*main_learn", output)
    assert load_checkpoint(tiny.checkpoints(fresh) / "sat.last.model").step == 8


def test_a_second_signal_exits_at_once():
    code = (
        "import os, signal, time\n"
        "from training.interrupt import StopSignal\n"
        "StopSignal().install()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 143
    assert "once more to exit at once" in result.stderr


def test_two_processes_cannot_train_one_run(fresh, capsys):
    assert tiny.train(fresh, "--stop_after", "5") == 0
    import fcntl

    capsys.readouterr()
    with open(tiny.logs(fresh) / "train.sat.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert tiny.train(fresh, "--resume") == 2
    assert "another process is training this run" in capsys.readouterr().err


def test_a_closed_pipe_does_not_end_training(fresh):
    given = tiny.arguments(fresh, "--train_steps", "20", "--batch_size", "8", *tiny.SETTINGS)
    process = subprocess.Popen(
        [sys.executable, "main_learnable_skewness.py", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    reader = threading.Thread(target=process.stderr.read)
    reader.start()
    assert process.wait(120) in (0, 120)  # 120: python's own complaint about the pipe at exit
    reader.join()
    assert "Evaluation Results" in (tiny.logs(fresh) / "train.sat.log").read_text()


def test_stop_signal_names():
    assert StopSignal.name_of(15) == "SIGTERM" and StopSignal.exit_code(15) == 143


# ---- golden numbers ----------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden_losses.txt"


def golden_run(folder):
    """fp32, reference backend, one thread: 30 steps, the transition at the twelfth."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        code = tiny.train(
            folder,
            *("--backend", "reference", "--precision", "fp32", "--device", "cpu"),
            *("--sk", "1e6", "--max_dense_steps", "12"),
        )
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    return losses(folder)


def test_losses_of_a_seeded_run_stay_what_they_were(fresh):
    """After a change that is meant to change them: python tests/test_loop.py writes the file
    anew."""
    lines = [x for x in GOLDEN.read_text().splitlines() if not x.startswith("#")]
    expected = [float(x) for x in lines]
    assert len(expected) == 30 and len(set(expected)) == 30
    assert golden_run(fresh) == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_data(folder / "data")
        numbers = golden_run(folder)
    head = "# training losses of 30 seeded steps; made by: python tests/test_loop.py\n"
    GOLDEN.write_text(head + "".join(f"{number:.8f}\n" for number in numbers))
