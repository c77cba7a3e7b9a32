"""What a caller may get wrong must not reach compiled code, and torch's defaults must not matter.

Right or refused in a sentence, never memory that is too small, of another type or elsewhere.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import emulated_cuda
import pytest
import torch

from kernels import (
    BlockLayout,
    DropoutKey,
    attention_output_feed_forward,
    attention_projections,
    attention_statistics,
    available_backends,
    block_sparse_attention,
    dense_attention,
    dropout_add_layer_norm,
    embedding_dropout_layer_norm,
    gelu_dropout,
    masked_mean,
    native,
)

B, H, N, d, E, V, bs = 2, 2, 64, 32, 64, 19, 16
KEY = DropoutKey(seed=1, step=2, first_example=3)
ACTIVE = {"cuda-emulated": ("cuda", emulated_cuda.active)}


@pytest.fixture(params=["reference", "cpu", "cuda-emulated"])
def backend(request):
    name, active = ACTIVE.get(request.param, (request.param, nullcontext))
    with active():
        if (reason := available_backends()[name]) is not True:
            pytest.skip(f"{name}: {reason}")
        yield name


@pytest.fixture
def cpu():
    if reason := native.reason_unavailable():
        pytest.skip(reason)
    return "cpu"


@contextmanager
def defaults(what: str):
    """torch's default dtype or device is another one."""
    if what == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, what))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def normal(*shape, shift=0.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + shift).requires_grad_()


def inputs():
    """Arguments of every operation, by name."""
    linear = {"query": (E, E), "key": (E, E), "value": (E, E), "output": (E, E)}
    linear |= {"expand": (2 * E, E), "contract": (E, 2 * E)}
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    return {
        "qkv": [normal(B, H, N, d) for _ in range(3)],
        "mask": mask,
        "padding": torch.arange(N) < torch.tensor([[N], [N // 2]]),
        "ids": torch.arange(B * N).view(B, N) % V,
        "words": normal(V, E),
        "positions": normal(N, E),
        "x": normal(B, N, E),
        "branch": normal(B, N, E),
        "norm": (normal(E, shift=1.0), normal(E)),
        **{k: (normal(*v), normal(v[0])) for k, v in linear.items()},
    }


def operations(t, backend):
    """Each operation as a function of the inputs `t`, giving a tuple of tensors."""
    drop = {"p": 0.1, "key": KEY, "backend": backend}

    def layout():
        return BlockLayout.from_mask(t["mask"], bs)

    def statistics():
        got = attention_statistics(
            *t["qkv"][:2], block_size=bs, key_padding_mask=t["padding"], backend=backend
        )
        return got.mean_attention, got.pooled_mean, got.pooled_square_mean

    padded = {"key_padding_mask": t["padding"], "backend": backend}
    return {
        "sparse": lambda: (block_sparse_attention(*t["qkv"], layout(), **padded),),
        "dense": lambda: (dense_attention(*t["qkv"], **padded),),
        "statistics": statistics,
        "embedding": lambda: embedding_dropout_layer_norm(
            t["ids"], t["words"], t["positions"], *t["norm"], site=1, **drop
        ),
        "add": lambda: dropout_add_layer_norm(t["x"], t["branch"], *t["norm"], site=1, **drop),
        "gelu": lambda: (gelu_dropout(t["x"], site=1, **drop),),
        "mean": lambda: (masked_mean(t["x"], t["padding"], backend=backend),),
        "projections": lambda: attention_projections(
            t["x"], t["query"], t["key"], t["value"], heads=H, layout=layout(), backend=backend
        ),
        "half layer": lambda: attention_output_feed_forward(
            t["x"], t["branch"], t["output"], t["norm"], t["expand"], t["contract"], t["norm"],
            sites=(1, 2, 3), layout=layout(), **drop,
        ),
    }  # fmt: skip


NAMES = list(operations(inputs(), "reference"))


def leaves(t):
    """Every tensor of `t` that takes a gradient."""
    flat = torch.utils._pytree.tree_leaves(t)
    return [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]


def results(name, backend):
    """Outputs and gradients of one operation."""
    t = inputs()
    out = operations(t, backend)[name]()
    total = sum((x * torch.linspace(-1, 1, x.numel(), device="cpu").view_as(x)).sum() for x in out)
    grads = []
    if total.requires_grad:
        grads = torch.autograd.grad(total, leaves(t), allow_unused=True)
    return [*(x.detach() for x in out), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("what", ["float64", "bfloat16", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_defaults_of_torch_do_not_matter(name, what, backend):
    expected = results(name, backend)
    t = inputs()
    with defaults(what):
        operation = operations(t, backend)[name]
        out = operation()
    weights = [torch.linspace(-1, 1, x.numel()).view_as(x) for x in out]
    got = [x.detach() for x in out]
    if any(x.requires_grad for x in out):
        total = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
        with defaults(what):
            grads = torch.autograd.grad(total, leaves(t), allow_unused=True)
        got += [g for g in grads if g is not None]
    assert len(got) == len(expected)
    for ours, wanted in zip(got, expected, strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


WRONG = {
    "norm weight too short": ("add", {"norm": (normal(8), normal(8))}, r"must be \[64\]"),
    "norm bias too short": ("embedding", {"norm": (normal(E), normal(8))}, r"must be \[64\]"),
    "ids of floats": ("embedding", {"ids": torch.zeros(B, N)}, "ids must be int64 or int32"),
    "ids without a batch": ("embedding", {"ids": torch.zeros(N).long()}, "ids must be int64"),
    "norm elsewhere": (
        "add",
        {"norm": (torch.ones(E, device="meta"), normal(E))},
        "norm_weight is on meta",
    ),
    "positions elsewhere": (
        "embedding",
        {"positions": torch.ones(N, E, device="meta")},
        "position_table is on meta",
    ),
    "branch elsewhere": ("add", {"branch": torch.ones(B, N, E, device="meta")}, "branch is on"),
    "mask elsewhere": (
        "mean",
        {"padding": torch.ones(B, N, dtype=torch.bool, device="meta")},
        "mask is on meta",
    ),
    "padding elsewhere": (
        "sparse",
        {"padding": torch.ones(B, N, dtype=torch.bool, device="meta")},
        "key_padding_mask is on meta",
    ),
    "padding of the statistics elsewhere": (
        "statistics",
        {"padding": torch.ones(B, N, dtype=torch.bool, device="meta")},
        "key_padding_mask is on meta",
    ),
    "flat tokens": ("gelu", {"x": normal(E)}, None),
    "tokens without a batch": ("mean", {"x": normal(N, E)}, r"x must be \[B, N, E\]"),
    "weight elsewhere": (
        "projections",
        {"value": (torch.ones(E, E, device="meta"), normal(E))},
        "is on meta, the tokens are on cpu",
    ),
    "attended elsewhere": (
        "half layer",
        {"branch": torch.ones(B, N, E, device="meta")},
        "attended is on meta",
    ),
    **{
        f"{what} of {name}": (name, {"mask": mask}, message)
        for name in ("projections", "half layer", "sparse")
        for what, mask, message in (
            ("long layout", torch.ones(8, 8).bool(), "covers 8 blocks of 16 = 128 tokens"),
            ("short layout", torch.ones(2, 2).bool(), "covers 2 blocks of 16 = 32 tokens"),
            ("foreign layout", torch.ones(4, 4, device="meta").bool(), "layout is on meta"),
        )
    },
}


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_refused_before_memory_is_touched(mistake, backend):
    if backend == "cpu" and (reason := native.reason_unavailable()):
        pytest.skip(reason)
    name, change, message = WRONG[mistake]
    if message is None:  # nothing is wrong with it: an example of one row
        assert operations({**inputs(), **change}, backend)[name]()[0].shape == (E,)
        return
    if "foreign layout" in mistake:
        layout = BlockLayout.full(4, bs)
        object.__setattr__(layout, "block_mask", layout.block_mask.to("meta"))
        t = inputs()
        call = {
            "projections": lambda: attention_projections(
                t["x"], t["query"], t["key"], t["value"], heads=H, layout=layout, backend=backend
            ),
            "half layer": lambda: attention_output_feed_forward(
                t["x"], t["branch"], t["output"], t["norm"], t["expand"], t["contract"],
                t["norm"], p=0.1, key=KEY, sites=(1, 2, 3), layout=layout, backend=backend,
            ),
            "sparse": lambda: block_sparse_attention(*t["qkv"], layout, backend=backend),
        }[name]  # fmt: skip
    else:
        call = operations({**inputs(), **change}, backend)[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_int32_ids_are_ids(cpu):
    t = inputs()
    wide = operations(t, cpu)["embedding"]()
    narrow = operations({**t, "ids": t["ids"].int()}, cpu)["embedding"]()
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@pytest.mark.parametrize("name", ["sparse", "dense", "mean"])
def test_a_mask_edited_before_backward_is_right_or_refused(name, backend):
    expected = results(name, backend)[1]
    t = inputs()
    (out,) = operations(t, backend)[name]()
    t["padding"].logical_not_()
    total = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    try:
        grads = torch.autograd.grad(total, leaves(t), allow_unused=True)
    except RuntimeError as refusal:
        assert "modified by an inplace operation" in str(refusal)
        return
    assert torch.equal(next(g for g in grads if g is not None), expected)


GOOD = torch.zeros(2, 3)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "tensor, message",
    [
        (GOOD[:1], r"needs torch.float32 \[2, 3\] on cpu, contiguous, not torch.float32 \[1, 3\]"),
        (GOOD.double(), "not torch.float64"),
        (GOOD.to("meta"), "on meta"),
        (torch.zeros(3, 2).t(), r"with strides \(1, 2\)"),
    ],
)
def test_pointer_checks_what_it_hands_out(tensor, message):
    assert native.pointer(GOOD, (2, 3), torch.float32, CPU) == GOOD.data_ptr()
    with pytest.raises(ValueError, match=message):
        native.pointer(tensor, (2, 3), torch.float32, CPU)
    strided = torch.zeros(3, 2).t()
    assert native.pointer(strided, (2, 3), torch.float32, CPU, strided=True)


def test_nothing_else_takes_an_address():
    sources = native.LIBRARY.parent.glob("*.py")
    counts = {path.name: path.read_text().count("data_ptr") for path in sources}
    assert {name: count for name, count in counts.items() if count} == {"native.py": 1}
