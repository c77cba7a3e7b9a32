"""The compiled operations as torch operators: what torch demands of one, and a whole model in one
graph."""

from __future__ import annotations

from contextlib import nullcontext

import emulated_cuda
import pytest
import torch
from test_kernel_checks import B, N, inputs, operations

from kernels import (
    BlockLayout,
    DropoutKey,
    block_sparse_attention,
    native,
)
from models import build_model
from models.config import ModelConfig, checked_fields

needs_library = pytest.mark.skipif(
    native.reason_unavailable() is not None, reason=str(native.reason_unavailable())
)
COMPILED = [("cpu", name) for name in operations(inputs(), "cpu")]
COMPILED += [("cuda", name) for name in ("sparse", "dense", "statistics")]


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sat":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@needs_library
@pytest.mark.parametrize("backend, name", COMPILED)
def test_opcheck(backend, name):
    """Schema, fake, autograd and what torch.compile makes of it agree with the real thing."""
    with emulated_cuda.active() if backend == "cuda" else nullcontext():
        with Recorder() as recorder:
            operations(inputs(), backend)[name]()
        (operator, args) = next(call for call in recorder.calls)
        assert operator.name().startswith("sat::")
        fresh = [
            x.detach().clone().requires_grad_(x.is_floating_point() and name != "statistics")
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        ]
        torch.library.opcheck(operator, tuple(fresh))


@needs_library
@pytest.mark.parametrize("name", ["sparse", "dense", "add", "gelu", "mean"])
def test_torch_func(name):
    """grad and vjp see through an operator, as backward() does."""
    t = inputs()
    (first, *_), where = (t["qkv"], "qkv") if name in ("sparse", "dense") else ([t["x"]], "x")

    layout = BlockLayout.from_mask(t["mask"], N // 4)

    def loss(x):
        if name == "sparse":
            return block_sparse_attention(x, *t["qkv"][1:], layout, backend="cpu").square().sum()
        changed = {**t, where: [x, *t["qkv"][1:]] if where == "qkv" else x}
        return sum(out.square().sum() for out in operations(changed, "cpu")[name]())

    got = torch.func.grad(loss)(first.detach())
    (expected,) = torch.autograd.grad(loss(first), first)
    assert torch.equal(got, expected)
    value, pull = torch.func.vjp(loss, first.detach())
    assert torch.equal(pull(torch.ones_like(value))[0], expected)


@needs_library
@pytest.mark.parametrize("padded", [False, True])
def test_each_input_is_saved_once(padded):
    t, packed = inputs(), []
    layout = BlockLayout.from_mask(t["mask"], N // 4)
    mask = t["padding"] if padded else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        block_sparse_attention(*t["qkv"], layout, key_padding_mask=mask, backend="cpu")
    # query, key, value, out, lse, the layout's lists and the mask
    assert len(packed) == len({id(x) for x in packed}) == 9 + padded


@needs_library
def test_saved_tensors_may_be_moved():
    """As offloading does: what backward gets lies elsewhere."""
    t = inputs()
    (expected,) = torch.autograd.grad(operations(t, "cpu")["sparse"]()[0].sum(), t["qkv"][:1])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        (out,) = operations(t, "cpu")["sparse"]()
    (got,) = torch.autograd.grad(out.sum(), t["qkv"][:1])
    assert torch.equal(got, expected)


@needs_library
def test_a_failed_allocation_is_a_memory_error():
    with pytest.raises(MemoryError, match="not enough memory for scratch space"):
        native.check(1, "sat_attention_forward")


# ---- a whole model ---------------------------------------------------------------------------


MODEL = {
    "num_layers": 2,
    "vocab_size": 16,
    "max_seq_len": 60,
    "num_classes": 3,
    "block_size": 16,
    "density": 0.4,
    "transformer_dim": 32,
    "embedding_dim": 32,
    "transformer_hidden_dim": 64,
    "head_dim": 16,
    "num_head": 2,
}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_whole_model_is_one_graph(backend, phase, dropout):
    """No graph break, and the same results; the next steps of training compile nothing anew."""
    if backend == "cpu" and (reason := native.reason_unavailable()):
        pytest.skip(reason)
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build_model(ModelConfig(**checked_fields(ModelConfig, "model", MODEL)), backend)
    if phase == "sparse":
        nb = model.config.num_blocks
        model.enter_sparse_phase(torch.rand(MODEL["num_layers"], nb, nb) < 0.5)
    ids = torch.randint(1, 10, (B, model.config.padded_length))
    ids[1, 40:] = 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for step in (3, 4, 5, 6):
        key = DropoutKey(1, step, 0) if dropout else None
        results = []
        for function in (model, compiled):
            output = function(ids, dropout_key=key)
            logits = output.logits
            grads = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
            results.append([logits.detach(), *(g for g in grads if g is not None)])
            if phase == "dense":
                results[-1] += [layer.mean_attention for layer in output.statistics]
        for got, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if backend == "cpu":
        assert len(graphs) <= 2  # the step number becomes an input at the second one
