"""Memory that runs out at any moment, and gradients that fp16 does not hold."""

import json

import pytest
import tiny
import torch

import training.evaluation  # noqa: F401
from models import SequenceClassifier

WORDS = [
    "sat_attention_forward failed: no memory for scratch space",
    "sat_attention_forward failed: not enough memory for scratch space",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried",
]


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def records(folder, event="train"):
    lines = (tiny.logs(folder) / "sat.metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


@pytest.mark.parametrize("words", WORDS)
def test_every_wording_of_exhaustion_is_known(fresh, capsys, monkeypatch, words):
    if "scratch" in words and "not enough" in words:
        error = MemoryError(words)
    else:
        error = RuntimeError(words)
    forward = SequenceClassifier.forward

    def limited(self, ids, *arguments, **keywords):
        if keywords.get("dropout_key") and len(ids) > 2:
            raise error
        return forward(self, ids, *arguments, **keywords)

    monkeypatch.setattr(SequenceClassifier, "forward", limited)
    assert tiny.train(fresh, "--train_steps", "2") == 0
    assert "halved to 2" in capsys.readouterr().out


def test_an_update_that_was_begun_is_not_repeated(fresh, capsys, monkeypatch):
    """The optimizer's step fails after half of the moments: to retry it would apply them twice."""
    step, calls = torch.optim.AdamW.step, []

    def exhausted(self, closure=None):
        result = step(self, closure)
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", exhausted)
    assert tiny.train(fresh, "--train_steps", "6") == 1
    captured = capsys.readouterr()
    assert len(calls) == 3 and "halved" not in captured.out
    assert "memory exhausted" in captured.err and captured.err.count("\n") == 1
    assert str(tiny.checkpoints(fresh) / "sat.last.model") in captured.err
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert tiny.train(fresh, "--train_steps", "6", "--resume") == 0
    other = fresh / "undisturbed"
    tiny.write_data(other / "data")
    assert tiny.train(other, "--train_steps", "6") == 0
    losses = [[r["loss"] for r in records(folder)] for folder in (fresh, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("where", ["evaluation", "test"])
def test_evaluations_halve_their_batches_too(fresh, capsys, monkeypatch, where):
    other = fresh / "undisturbed"
    tiny.write_data(other / "data")
    assert tiny.train(other, "--train_steps", "4") == 0
    capsys.readouterr()
    forward = SequenceClassifier.forward

    def limited(self, ids, *arguments, **keywords):
        dense_statistics = keywords.get("statistics") is not None
        here = dense_statistics == (where == "evaluation")
        if not torch.is_grad_enabled() and here and len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(self, ids, *arguments, **keywords)

    monkeypatch.setattr(SequenceClassifier, "forward", limited)
    assert tiny.train(fresh, "--train_steps", "4") == 0
    assert "2 examples at a time" in capsys.readouterr().out
    for event in ("eval", "end"):
        (ours,), (expected,) = records(fresh, event), records(other, event)
        assert ours["accuracy"] == expected["accuracy"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_an_exhausted_criterion_is_a_sentence(fresh, capsys, monkeypatch):
    from training import loop

    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(loop, "decide", exhausted)
    assert tiny.train(fresh) == 1
    error = capsys.readouterr().err
    assert "memory exhausted" in error and error.count("\n") == 1


# ---- fp16 --------------------------------------------------------------------------


def with_scaler(monkeypatch, overflows):
    """fp16's scaler, which works on a CPU too; gradients are infinite where `overflows(step)`."""
    from training import loop
    from training.run import Run

    prepare, train_step = Run.__post_init__, loop.train_step

    def prepared(run):
        prepare(run)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflowing(run):
        weight = run.model.seq_classifer.mlpblock[2].weight
        hook = weight.register_hook(lambda g: g * torch.inf) if overflows(run.step) else None
        try:
            return train_step(run)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(Run, "__post_init__", prepared)
    monkeypatch.setattr(loop, "train_step", overflowing)


def test_a_run_that_only_skips_is_ended(fresh, capsys, monkeypatch):
    with_scaler(monkeypatch, lambda step: step >= 5)
    assert tiny.train(fresh, "--train_steps", "60") == 1
    error = capsys.readouterr().err
    assert "20 steps in a row" in error and "fp32" in error and error.count("\n") == 1
    skipped = [r["step"] for r in records(fresh) if r["skipped"]]
    assert skipped == list(range(6, 25))  # the twentieth ends the run


def test_the_schedule_does_not_advance_on_skipped_steps(fresh, monkeypatch):
    with_scaler(monkeypatch, lambda step: step in (2, 3))
    assert tiny.train(fresh, "--train_steps", "12", "--sk", "1e6") == 0
    rates = [r["learning_rate"] for r in records(fresh)]
    assert rates[2] == rates[3] == rates[4] and len(set(rates)) == 10
