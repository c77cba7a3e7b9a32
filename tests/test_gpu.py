"""Whole runs on a GPU: what only a card can get wrong. `make test-gpu`."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from test_fused import (
    PRODUCTS,
    TYPES,
    by_hand,
    compare,
    gradients,
    layer_by_hand,
    layer_ours,
    layer_results,
    ours,
    run,
    typed,
    uncast,
)

from kernels.dropout import DropoutKey, keep_mask
from kernels.layer import gelu_dropout

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROOT = Path(__file__).resolve().parent.parent
RULE = ["--sk", "-100", "--ds", "60", "--device", DEVICE]  # sparse after three steps
WIDTHS = [f"--set=model.{name}=32" for name in ("embedding_dim", "transformer_dim", "head_dim")]


@pytest.fixture
def folder(tmp_path):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    tiny.write_data(tmp_path / "data")
    return tmp_path


def records(folder, event="train"):
    lines = (tiny.logs(folder) / "sat.metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def losses(folder):
    return [record["loss"] for record in records(folder)]


# ---- training ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 2e-3), ("bf16", 5e-2)])
def test_a_run_loses_what_the_cpu_loses(folder, capsys, backend, precision, tolerance):
    """Same masks, same data; steps on the GPU go through captured graphs."""
    on_cpu = folder / "cpu"
    tiny.write_data(on_cpu / "data")
    given = [*RULE, *WIDTHS, "--precision", precision, "--train_steps", "20"]
    assert tiny.train(folder, *given, "--backend", backend) == 0
    assert "not captured" not in capsys.readouterr().out or backend == "reference"
    assert tiny.train(on_cpu, *given, "--device", "cpu") == 0
    assert losses(folder) == pytest.approx(losses(on_cpu), rel=tolerance)
    assert records(folder)[-1]["phase"] == "sparse"


def test_fp16_skips_a_step_and_goes_on(folder):
    """The scaler starts at 65,536, where these gradients overflow."""
    given = [*RULE, *WIDTHS, "--precision", "fp16", "--set=training.attn_loss_scale=1e4"]
    assert tiny.train(folder, *given) == 0
    steps = records(folder)
    assert all(torch.tensor(r["loss"]).isfinite() for r in steps)
    scales = [r["loss_scale"] for r in steps]
    skipped = [r for r in steps if r["gradient_norm"] is None]
    assert len(skipped) == sum(b < a for a, b in pairwise(scales)) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_killed_and_resumed_ends_with_the_same_bits(folder, precision):
    whole, cut = folder / "whole", folder / "cut"
    given = [*RULE, *WIDTHS, "--precision", precision, "--set=training.save_seconds=0.000001"]
    for each in (whole, cut):
        tiny.write_data(each / "data")
    assert tiny.train(whole, *given) == 0
    program = (
        f"import sys, tiny; from pathlib import Path; tiny.train(Path({str(cut)!r}), *{given})"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}
    )
    end = time.monotonic() + 100
    while not (tiny.logs(cut) / "sat.metrics.jsonl").exists() or len(records(cut)) < 9:
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert tiny.train(cut, *given, "--resume") == 0
    assert losses(cut) == losses(whole)


def test_memory_exhausted_in_the_first_optimizer_step(folder, capsys, monkeypatch):
    undisturbed = folder / "undisturbed"
    tiny.write_data(undisturbed / "data")
    assert tiny.train(undisturbed, *RULE, *WIDTHS) == 0
    capsys.readouterr()
    tiny.exhaust_memory_in_optimizer(monkeypatch)
    assert tiny.train(folder, *RULE, *WIDTHS) == 0
    assert capsys.readouterr().out.count("memory exhausted at step 1") == 1
    assert losses(folder) == pytest.approx(losses(undisturbed), rel=1e-3)


def test_two_processes_on_two_gpus(folder, capsys):
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    from test_distributed import Job

    alone, together = folder / "alone", folder / "together"
    for each in (alone, together):
        tiny.write_data(each / "data")
    given = [*RULE, *WIDTHS, "--train_steps", "20", "--batch_size", "8", *tiny.SETTINGS]
    code, output = Job(folder, tiny.arguments(together, *given)).wait()
    assert code == 0, output
    assert tiny.train(alone, *given) == 0
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)


# ---- the layer's operations, compiled ------------------------------------------------


def to_gpu(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else tuple(map(to_gpu, value))


@pytest.fixture(params=PRODUCTS)
def products(request):
    with (
        torch.autocast(DEVICE, torch.bfloat16, enabled=request.param == "bf16"),
        torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bf16"),
    ):
        yield PRODUCTS[request.param]


@pytest.mark.parametrize("shape", ["task", "one token"])
def test_half_layer_against_float64(folder, products, shape):
    def on_gpu(x, attended, parameters):
        outputs = layer_ours("triton")(*map(to_gpu, (x, attended, parameters)))
        assert outputs[0].grad_fn.name() == "LayerBackward"
        return [out.cpu() for out in outputs]

    got = layer_results(on_gpu, torch.float32, products, shape)
    plain = layer_results(layer_ours("reference"), torch.float32, products, shape)
    exact = layer_results, lambda *a: layer_by_hand(*a, 0.1)
    compare(got, plain, uncast(*exact, torch.float64, torch.float64, shape), 64, products)


@pytest.mark.parametrize("types", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["embedding", "add", "gelu"])
def test_parts_against_float64(folder, name, types):
    t = typed(types)
    given = {**t, "x": t["branch"]} if name == "gelu" else t
    on_gpu = {key: to_gpu(value) for key, value in given.items()}
    outputs = [out.cpu() for out in ours(name, on_gpu, 0.1, "triton")]
    got = {f"out {i}": out for i, out in enumerate(outputs)} | gradients(outputs, t)
    plain = run(name, t, types, 0.1, "reference")
    wide = {k: v if k == "ids" else v.detach().double().requires_grad_() for k, v in t.items()}
    exact = by_hand(name, {**wide, "x": wide["branch"]} if name == "gelu" else wide, 0.1)
    want = {f"out {i}": out for i, out in enumerate(exact)} | gradients(exact, wide)
    compare(got, plain, want, 16, TYPES[types][1])


@pytest.mark.parametrize("p", [0.1, 0.999])
def test_masks_are_the_cpu_s(folder, p):
    for first, size in ((0, 33), (1 << 33, 5000)):
        key = DropoutKey(-3, 1 << 40, first)
        x = gelu_dropout(torch.ones(5, size, device=DEVICE), p=p, key=key, site=9)
        assert torch.equal((x != 0).cpu(), keep_mask(key, 9, x.shape, p, "cpu"))
