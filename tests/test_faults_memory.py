"""Memory: what is expected of it, what happens where it runs out, and gradients that fp16 does
not hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import training.evaluation  # noqa: F401
from kernels import DropoutKey
from models import SequenceClassifier, build_model
from models.config import ModelConfig
from training import memory
from training.recording.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent

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


def test_a_checkpoint_that_memory_does_not_hold_is_not_damaged(fresh, capsys, monkeypatch):
    """To go back to the one before it would lose steps that were saved."""
    from training.recording import checkpoint

    assert tiny.train(fresh, "--stop_after", "12") == 0
    capsys.readouterr()
    verify, calls = checkpoint.verify_checksums, []

    def exhausted(file):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return verify(file)

    monkeypatch.setattr(checkpoint, "verify_checksums", exhausted)
    assert tiny.train(fresh, "--resume") == 1
    error = capsys.readouterr().err
    assert error == "error: there is not enough memory; nothing that was saved is lost\n"
    assert tiny.train(fresh, "--resume", "--stop_after", "13") == 0
    assert "resumed at step 12, " in capsys.readouterr().out


def test_exhaustion_is_known_by_what_it_led_to():
    """torch's writer of files fails once more as it is left."""

    def failing(suppressed):
        try:
            try:
                raise MemoryError
            finally:
                if suppressed:
                    raise RuntimeError("memory exhausted; said already") from None
                raise RuntimeError("unexpected pos 64 vs 0")
        except RuntimeError as error:
            return error

    assert memory.is_exhausted(failing(False)) and not memory.is_exhausted(failing(True))
    assert not memory.is_exhausted(RuntimeError("a bug of ours"))
    assert not memory.is_exhausted(ValueError("out of memory"))


# ---- what is expected --------------------------------------------------------------


def model_config(**more):
    return ModelConfig(**{**tiny.MODEL, "vocab_size": 20, "num_classes": 10, **more})


@pytest.mark.parametrize(
    "model, batch, processes, expected",
    [
        ({}, 4096, 1, 512),  # 32,768 tokens in sequences of 64
        ({}, 100, 1, 64),  # a power of two, and no more than there are
        ({}, 100, 3, 32),  # 34 for the largest share
        ({}, 1, 1, 1),
        ({"max_seq_len": 1000}, 512, 1, 32),  # padded to 1,024
        ({"num_inputs": 2, "max_seq_len": 4096}, 32, 1, 4),
        ({"max_seq_len": 65536, "block_size": 64}, 32, 1, 1),  # more than the caches hold
    ],
)
def test_a_micro_batch_fits_the_caches(model, batch, processes, expected):
    device = torch.device("cpu")
    assert memory.auto_micro_batch(model_config(**model), batch, device, processes) == expected


def test_a_micro_batch_fits_the_gpu(monkeypatch):
    model = model_config()
    # two residual sums, two norms, q, k, v, output of 16, and 2 x 2 x 16 hidden; by hand
    widths = 6 * 16 + 5 * 16 + 4 * 16
    per_example = 4 * 64 * (2 * widths + 4 * widths)
    assert memory.bytes_per_example(model) == per_example
    for free, expected in ((21 * per_example, 8), (0, 1), (1 << 40, 1024)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        assert memory.auto_micro_batch(model, 1024, torch.device("cuda")) == expected


@pytest.mark.parametrize("more", [{}, {"num_layers": 6}, {"head_dim": 32}])
def test_the_estimate_covers_what_a_step_saves(more):
    """Against the bytes that autograd keeps for the backward pass: never less, nor many times
    more."""
    config, storages = model_config(**more), {}
    model = build_model(config, "reference" if more.get("head_dim") else "auto")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, 20, (8, 64))
    masks = torch.ones(config.num_layers, 4, 4, dtype=torch.bool)
    model.enter_sparse_phase(masks.tril())
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        model(ids, dropout_key=DropoutKey(0, 0, 0)).logits.sum()
    _, estimated = memory.estimate_bytes(config, 0, 8)
    assert sum(storages.values()) < estimated < 8 * sum(storages.values())


def test_what_the_criterion_remembers(fresh):
    """To the byte, against a checkpoint of 25 dense steps."""
    assert tiny.train(fresh, "--stop_after", "25", "--sk", "1e6") == 0
    training = load_checkpoint(tiny.checkpoints(fresh) / "sat.last.model").training
    held = [training["criterion"]["previous"]] * 2  # and this step's, of the same shape
    for name in ("pooled", "masks", "best", "uniform"):
        assert len(training["observer"][name]) == 20
        held += training["observer"][name]
    assert sum(x.numel() * x.element_size() for x in held) == memory.criterion_bytes(
        model_config(key_padding=True), 4
    )


def test_peak_and_kept_memory():
    """What is freed stays with the process, once asked for, and the peak has seen it: this
    process's, whatever its parent holds."""
    parent = bytearray(600_000_000)
    parent[::4096] = b"x" * len(parent[::4096])
    program = """
import torch
from training import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def cycle():
    torch.ones(50_000_000)  # 200 MB
    return resident()
before, device = resident(), torch.device("cpu")
assert cycle() < before + 50e6
assert before + 190e6 < memory.peak_bytes(device) < before + 300e6
memory.keep_freed_memory()
assert cycle() > before + 190e6
"""
    if sys.platform != "linux":
        pytest.skip("glibc alone has the switch")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_bytes_for_people():
    said = [memory.human(count) for count in (0, 999, 1e3, 12_345_678, 2.4e9, 5e12)]
    assert said == ["0 B", "999 B", "1 kB", "12 MB", "2.40 GB", "5000.00 GB"]


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
