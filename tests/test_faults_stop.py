"""Signals in the long parts of a run: evaluation and test stop at their next batch."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from models import SequenceClassifier

ROOT = Path(__file__).resolve().parent.parent
GIVEN = ["--max_dense_steps", "12", "--micro_batch_size", "2", "--train_steps", "20"]


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny.write_data(folder / "data")
    assert tiny.train(folder, *GIVEN) == 0
    return folder


def results(folder):
    """All numbers but times."""
    lines = (tiny.logs(folder) / "sat.metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


MEASURED = ("seconds", "peak_memory_bytes")


def signalled(monkeypatch, number, when):
    """Sends a signal in the second batch of an evaluation with `when(statistics, count)`."""
    forward, seen = SequenceClassifier.forward, []

    def forwarded(self, ids, *arguments, **keywords):
        if not torch.is_grad_enabled() and keywords.get("dropout_key") is None:
            seen.append(keywords.get("statistics") is not None)
            if when(seen):
                os.kill(os.getpid(), number)
        return forward(self, ids, *arguments, **keywords)

    monkeypatch.setattr(SequenceClassifier, "forward", forwarded)
    return seen


@pytest.mark.parametrize(
    "name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 138)]
)
def test_an_evaluation_stops_at_the_next_batch(
    fresh, undisturbed, capsys, monkeypatch, name, code
):
    number = getattr(signal, name)
    seen = signalled(monkeypatch, number, lambda seen: len(seen) == 2)
    assert tiny.train(fresh, *GIVEN) == code
    assert len(seen) == 2  # of 15 batches
    output = capsys.readouterr().out
    assert re.search(f"stopped by {name}, while evaluating, after step 10; go on with: ", output)
    monkeypatch.undo()
    assert tiny.train(fresh, *GIVEN, "--resume") == 0
    assert results(fresh) == results(undisturbed)
    weights = [
        torch.load(tiny.checkpoints(f) / "sat.last.model")["model_state_dict"]
        for f in (fresh, undisturbed)
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("more", [["--pattern", "mass"], ["--set", "training.eval_frequency=12"]])
def test_a_switch_at_the_same_step_is_made_on_resume(tmp_path, monkeypatch, more):
    """The evaluation that is stopped belongs to the step of the transition."""
    given = ["--max_dense_steps", "12", "--micro_batch_size", "2", "--train_steps", "20"]
    given += ["--set", "training.eval_frequency=12", *more]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        tiny.write_data(folder / "data")
    signalled(monkeypatch, signal.SIGTERM, lambda seen: len(seen) == 2)
    assert tiny.train(folders[0], *given) == 143
    monkeypatch.undo()
    assert tiny.train(folders[0], *given, "--resume") == 0
    assert tiny.train(folders[1], *given) == 0
    masks = [torch.load(tiny.checkpoints(f) / "sat.model")["block_masks"] for f in folders]
    assert torch.equal(*masks)
    losses = [[r["loss"] for r in results(f) if r["event"] == "train"] for f in folders]
    assert losses[0] == losses[1]


def test_the_test_stops_at_the_next_batch(fresh, undisturbed, capsys, monkeypatch):
    dev_batches, evaluations = 15, 2
    probes = []

    def in_test(seen):
        probes.append(1)
        return seen[-1] is False and seen.count(False) == dev_batches + 2

    signalled(monkeypatch, signal.SIGTERM, in_test)
    code = tiny.train(fresh, *GIVEN)
    output = capsys.readouterr().out
    assert code == 143, output
    assert evaluations == output.count("Validation Results")
    assert "Evaluation Results" not in output
    assert re.search("stopped by SIGTERM, while testing, after step 20; go on with: ", output)
    monkeypatch.undo()
    assert tiny.train(fresh, *GIVEN, "--resume") == 0
    assert results(fresh) == results(undisturbed)


def test_what_nohup_ignores_stays_ignored(tmp_path):
    code = (
        "import os, signal\n"
        "from training.interrupt import StopSignal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "stop = StopSignal()\n"
        "stop.install()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "assert not stop.received\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "assert stop.received == signal.SIGUSR1\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
