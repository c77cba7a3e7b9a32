"""What sparse and dense attention mean, for every backend and code path alike.

The truth is the specification's formula, dense, in float64, differentiated by torch's autograd
(attention_backends.dense_restatement). Shape letters: B H N d as everywhere, bs block_size.
"""

from __future__ import annotations

import itertools
import logging
from functools import partial

import attention_backends as ab
import pytest
import torch
from attention_backends import (
    BF16,
    FP16,
    FP32,
    FP64,
    Case,
    dense_restatement,
    forward_backward,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import BlockLayout, available_backends, block_sparse_attention, dense_attention
from kernels import backends as backends_module

DTYPES = [pytest.param(t, id=str(t).removeprefix("torch.")) for t in (FP32, BF16, FP16, FP64)]
PRUNED = ["zero", "masked"]


@pytest.fixture(params=ab.pytest_params("sparse"))
def case(request):
    yield from ab.activated(request.param)


@pytest.fixture(params=ab.pytest_params("dense"))
def dense_case(request):
    yield from ab.activated(request.param)


# ---- inputs --------------------------------------------------------------------------


def make_mask(kind: str, nb: int, seed: int = 0) -> torch.Tensor:
    """Block masks whose rows and columns are special in one way each; "mixed" has all of them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(nb, nb, generator=generator) < 0.3
    if kind == "full":
        mask[:] = True
    elif kind == "empty":
        mask[:] = False
    elif kind == "single":
        mask[:] = False
        mask[nb // 2, nb - 1] = True
    elif kind == "diagonal":
        mask = torch.eye(nb, dtype=torch.bool)
    elif kind == "row":
        mask[:] = False
        mask[1] = True
    elif kind == "column":
        mask[:] = False
        mask[:, 1] = True
    else:
        mask[:, 2] = False
        mask[0] = False
        mask[1] = True
        mask[-1] = False
        mask[-1, 0] = True
    return mask


def make_inputs(B, H, N, d, dtype=FP32, seed=0, spread=2.0):
    """query, key, value, gradient of the output in `dtype`; scores deviate by spread**2."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (spread * torch.randn(B, H, N, d, generator=generator) for _ in range(2))
    value, dout = (torch.randn(B, H, N, d, generator=generator) for _ in range(2))
    return tuple(x.to(dtype) for x in (query, key, value, dout))


def compare(
    case: Case, inputs, dout, mask, bs, *, padding=None, pruned="zero", scale=None, causal=False
):
    """Output and gradients of `case` against the dense restatement; returns what `case` gave."""
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    arguments = (mask, bs, padding, factor, pruned, causal)
    layout = BlockLayout.from_mask(mask, bs, causal).to(case.device)
    device_padding = None if padding is None else padding.to(case.device)

    def of_case(*qkv):
        return block_sparse_attention(
            *qkv,
            layout,
            key_padding_mask=device_padding,
            scale=scale,
            pruned=pruned,
            backend=case.backend,
        )

    return ab.compare_with_float64(case, of_case, inputs, dout, arguments)


def assert_softmax_matters(inputs, mask, bs, padding, pruned):
    """Rows are neither nearly uniform nor nearly one-hot, so a wrong softmax cannot pass."""
    query, key = (x.double() for x in inputs[:2])
    probs = ab.dense_probs(query, key, mask, bs, padding, query.shape[-1] ** -0.5, pruned)
    rows = probs.sum(-1) > 0.05
    largest = probs.amax(-1)[rows].mean()
    assert 0.1 < largest < 0.9, f"mean of the largest probabilities is {largest:.3f}"
    if pruned == "zero" and not mask.all():
        pruned_mass = 1 - probs.sum(-1)[rows]
        assert (pruned_mass > 0.02).double().mean() > 0.1, "the pruned scores carry no mass"


# ---- values and gradients ------------------------------------------------------------


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("bs", [16, 32, 64])
@pytest.mark.parametrize("d", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_equals_float64(case, dtype, d, bs, pruned):
    B, H, nb = 3, 2, 4 if bs == 64 else 6
    mask = make_mask("mixed", nb)
    padding = ab.random_padding(B, nb * bs, torch.Generator().manual_seed(d + bs))
    *inputs, dout = make_inputs(B, H, nb * bs, d, dtype, seed=d + bs)
    assert_softmax_matters(inputs, mask, bs, padding, pruned)
    compare(case, inputs, dout, mask, bs, padding=padding, pruned=pruned)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("kind", ["full", "empty", "single", "diagonal", "row", "column", "mixed"])
def test_layouts(case, kind, pruned, padded):
    mask = make_mask(kind, 5)
    padding = ab.random_padding(2, 80, torch.Generator().manual_seed(1)) if padded else None
    *inputs, dout = make_inputs(2, 1, 80, 32, case.dtype)
    compare(case, inputs, dout, mask, 16, padding=padding, pruned=pruned)


@pytest.mark.parametrize("B, H", [(1, 1), (1, 2), (5, 1), (7, 3)])
def test_batches_and_heads(case, B, H):
    *inputs, dout = make_inputs(B, H, 128, 32, case.dtype)
    compare(case, inputs, dout, make_mask("mixed", 4), 32)


def test_one_block_is_the_whole_sequence(case):
    *inputs, dout = make_inputs(2, 2, 64, 32, case.dtype)
    compare(case, inputs, dout, torch.ones(1, 1, dtype=torch.bool), 64)


def test_scale(case):
    *inputs, dout = make_inputs(1, 2, 96, 32, case.dtype)
    for scale in (0.5, 0.0, -0.25):
        compare(case, inputs, dout, make_mask("mixed", 6), 16, scale=scale)


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("kind", ["mixed", "full"])
@pytest.mark.parametrize("size", [200.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(case, dtype, size, kind, pruned):
    """No overflow, and the right numbers, where a plain exp(score) would be infinite or zero."""
    *inputs, dout = make_inputs(2, 2, 96, 32, dtype, spread=1.0)
    largest = (inputs[0].double() @ inputs[1].double().mT).abs().max() * 32**-0.5
    inputs[0] = inputs[0] * (size / largest).item()
    padding = ab.random_padding(2, 96, torch.Generator().manual_seed(2))
    compare(case, inputs, dout, make_mask(kind, 6), 16, padding=padding, pruned=pruned)


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("offset", [-200.0, -90.0, 90.0, 200.0])
@pytest.mark.parametrize("kind", ["mixed", "full"])
def test_scores_far_from_zero(case, kind, offset, pruned):
    """All scores of a row near `offset`: only the row's own maximum keeps the exponentials alive.

    At -200 the pruned zeros take all the weight, except in rows that prune nothing.
    """
    *inputs, dout = make_inputs(2, 2, 96, 32, case.dtype, spread=1.0)
    inputs[0][..., 0] = 32.0
    inputs[1][..., 0] = offset * 32**0.5 / 32
    ours = compare(case, inputs, dout, make_mask(kind, 6), 16, pruned=pruned)
    if kind == "full" or pruned == "masked":
        assert ours[0].abs().mean() > 0.1


@pytest.mark.parametrize("pruned", PRUNED)
def test_rows_without_a_key_are_exactly_zero(case, pruned):
    B, H, N, d, bs = 3, 2, 96, 32, 16
    mask = make_mask("mixed", N // bs)
    padding = ab.random_padding(B, N, torch.Generator().manual_seed(3))
    padding[2] = torch.arange(N) >= N - bs  # the last row of blocks keeps only padding here
    *inputs, dout = make_inputs(B, H, N, d, case.dtype)
    out, dq, dk, dv = compare(case, inputs, dout, mask, bs, padding=padding, pruned=pruned)
    kept = mask.repeat_interleave(bs, 0).repeat_interleave(bs, 1)
    attended = kept & padding[:, None]  # [B, N, N]
    rows, keys = attended.any(2), attended.any(1)
    assert not rows[0, :bs].any() and not rows[1].any() and not rows[2, -bs:].any()
    for name, tensor, alive in (
        ("out", out, rows),
        ("dq", dq, rows),
        ("dk", dk, keys),
        ("dv", dv, keys),
    ):
        by_token = tensor.abs().amax((1, 3))
        assert (by_token[~alive] == 0).all(), f"{name} is not zero where nothing is attended"
        assert (by_token[alive] > 0).all(), f"{name} is zero where something is attended"


# ---- causal layouts, and the denominators ---------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("kind", ["full", "empty", "single", "diagonal", "row", "column", "mixed"])
def test_causal_layouts(case, kind, pruned, padded):
    """No query attends to a later key, and later keys do not count as pruned either."""
    *inputs, dout = make_inputs(2, 2, 80, 32, case.dtype)
    padding = ab.random_padding(2, 80, torch.Generator().manual_seed(1)) if padded else None
    mask = make_mask(kind, 5)
    compare(case, inputs, dout, mask, 16, padding=padding, pruned=pruned, causal=True)


@pytest.mark.parametrize("bs", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_equals_float64(case, dtype, bs):
    *inputs, dout = make_inputs(3, 2, 4 * bs, 48, dtype, seed=bs)
    padding = ab.random_padding(3, 4 * bs, torch.Generator().manual_seed(bs))
    compare(case, inputs, dout, make_mask("full", 4), bs, padding=padding, causal=True)


def test_causal_full_layout_is_what_torch_calls_causal():
    *inputs, _ = make_inputs(2, 2, 64, 32, FP64)
    layout = BlockLayout.from_mask(torch.ones(4, 4).bool(), 16, causal=True)
    out = block_sparse_attention(*inputs, layout, backend="reference")  # nothing is pruned
    exact = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("padded", [False, True])
def test_a_layout_for_each_head(case, padded, pruned, causal):
    *inputs, dout = make_inputs(2, 4, 64, 32, case.dtype)
    padding = ab.random_padding(2, 64, torch.Generator().manual_seed(1)) if padded else None
    mask = torch.stack([make_mask(kind, 4) for kind in ("mixed", "empty", "full", "column")])
    options = {"padding": padding, "pruned": pruned, "causal": causal}
    compare(case, inputs, dout, mask, 16, **options)


def test_heads_that_share_a_layout_need_not_know(case):
    """Given once or for each head, a layout is the same."""
    mask = make_mask("mixed", 6)
    *inputs, dout = (x.to(case.device) for x in make_inputs(2, 3, 96, 32, case.dtype))
    once, thrice = (
        BlockLayout.from_mask(given, 16).to(case.device) for given in (mask, mask.expand(3, 6, 6))
    )
    assert torch.equal(once.active, thrice.active) and thrice.num_active == 3 * once.num_active

    def run(layout, *qkv):
        return block_sparse_attention(*qkv, layout, backend=case.backend)

    expected = forward_backward(partial(run, once), inputs, dout)
    for got, wanted in zip(
        forward_backward(partial(run, thrice), inputs, dout), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("which", ["zero", "masked", "dense", "causal"])
def test_log_denominators(case, which, padded):
    *inputs, _ = make_inputs(3, 2, 96, 32, case.dtype)
    padding = ab.random_padding(3, 96, torch.Generator().manual_seed(9)) if padded else None
    mask = torch.ones(6, 6, dtype=torch.bool) if which == "dense" else make_mask("mixed", 6)
    pruned = "masked" if which in ("masked", "dense") else "zero"
    wide = [x.double() for x in inputs[:2]]
    settings = mask, 16, padding, 32**-0.5, pruned, which == "causal"
    expected = ab.log_denominators(*wide, *settings)
    on_device = [x.to(case.device).requires_grad_() for x in inputs]
    options = {"return_lse": True, "backend": case.backend}
    options["key_padding_mask"] = None if padding is None else padding.to(case.device)
    if which == "dense":
        out, lse = dense_attention(*on_device, **options)
    else:
        layout = BlockLayout.from_mask(mask, 16, which == "causal").to(case.device)
        out, lse = block_sparse_attention(*on_device, layout, pruned=pruned, **options)
    assert out.requires_grad and not lse.requires_grad
    assert lse.dtype == (FP64 if case.dtype == FP64 else FP32)
    assert torch.equal(lse.cpu() == -torch.inf, expected == -torch.inf)
    assert padded or which in ("dense", "causal") or (lse == -torch.inf).any()
    # kernels of bf16 may add up probabilities that are rounded as they multiply them
    rounding = 1e-5 if case.dtype in (FP32, FP64) else torch.finfo(case.dtype).eps / 2
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=rounding)


# ---- tensors as models make them -----------------------------------------------------


def strided_inputs(kind: str, dtype: torch.dtype, d: int = 32):
    """query, key, value [2, 3, 64, d] in unusual memory, and the leaves they come from."""
    generator = torch.Generator().manual_seed(4)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    if kind == "fused [B, N, 3, H, d]":
        fused = leaf(2, 64, 3, 3, d)
        return [fused[:, :, i].transpose(1, 2) for i in range(3)], [fused]
    if kind == "transposed d and N":
        leaves = [leaf(2, 3, d, 64) for _ in range(3)]
        return [x.mT for x in leaves], leaves
    if kind == "expanded over batch":
        leaves = [leaf(1, 3, 64, d) for _ in range(3)]
        return [x.expand(2, -1, -1, -1) for x in leaves], leaves
    if kind == "expanded over heads":
        leaves = [leaf(2, 1, 64, d) for _ in range(3)]
        return [x.expand(-1, 3, -1, -1) for x in leaves], leaves
    if kind == "one row expanded":
        leaves = [leaf(2, 3, 64, d), leaf(2, 3, 1, d), leaf(2, 3, 64, d)]
        return [x.expand(-1, -1, 64, -1) for x in leaves], leaves
    if kind == "sliced at an odd offset":
        leaves = [leaf(4, 3, 129, d + 3) for _ in range(3)]
        return [x[1::2, :, 1::2, 1 : d + 1] for x in leaves], leaves
    if kind == "the same tensor":
        both = leaf(2, 3, 64, d)
        return [both, both, both], [both]
    raise AssertionError(kind)


STRIDED = [
    "fused [B, N, 3, H, d]",
    "transposed d and N",
    "expanded over batch",
    "expanded over heads",
    "one row expanded",
    "sliced at an odd offset",
    "the same tensor",
]


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_strides(case, which, kind):
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)

    def run(make_contiguous):
        inputs, leaves = strided_inputs(kind, case.dtype)
        inputs = [x.to(case.device) for x in inputs]
        if make_contiguous:
            inputs = [x.contiguous() for x in inputs]
        if which == "sparse":
            out = block_sparse_attention(*inputs, layout, backend=case.backend)
        else:
            out = dense_attention(*inputs, backend=case.backend)
        dout = torch.linspace(-1, 1, 64, dtype=case.dtype)[:, None]
        dout = dout.expand_as(out)  # as strided as an input may be
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(case.device))]

    for strided, contiguous in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-6)


def test_a_fused_projection_that_is_viewed_from_float16(case):
    """Blocks of 16-bit rows that start at no multiple of 4 bytes."""
    *inputs, dout = make_inputs(2, 2, 64, 32, BF16)
    odd = [torch.cat([x[..., :1], x], -1)[..., 1:] for x in inputs]
    assert all(x.storage_offset() == 1 for x in odd)
    compare(case, odd, dout, make_mask("mixed", 4), 16)


@pytest.mark.parametrize("which", ["sparse", "dense"])
@pytest.mark.parametrize("wanted", [w for w in itertools.product([0, 1], repeat=3) if any(w)])
def test_gradients_of_any_subset(case, wanted, which):
    *inputs, dout = (x.to(case.device) for x in make_inputs(2, 2, 64, 32, case.dtype))
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)

    def run(*qkv):
        if which == "sparse":
            return block_sparse_attention(*qkv, layout, backend=case.backend)
        return dense_attention(*qkv, backend=case.backend)

    expected = forward_backward(run, inputs, dout)[1:]
    leaves = [x.detach().requires_grad_(bool(w)) for x, w in zip(inputs, wanted, strict=True)]
    run(*leaves).backward(dout)
    for leaf, want, grad in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == bool(want)
        if want:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=1e-6)


def test_no_gradient_wanted(case):
    *inputs, _ = (x.to(case.device) for x in make_inputs(1, 1, 64, 32, case.dtype))
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)
    assert not block_sparse_attention(*inputs, layout, backend=case.backend).requires_grad
    with torch.no_grad():
        inputs[0].requires_grad_()
        assert not block_sparse_attention(*inputs, layout, backend=case.backend).requires_grad


def test_twice_in_one_graph(case):
    """Output of one call is input of the next, and all share a key."""
    mask = make_mask("mixed", 4)
    layout = BlockLayout.from_mask(mask, 16).to(case.device)
    *inputs, dout = make_inputs(2, 2, 64, 32, case.dtype)

    def of_case(query, key, value):
        inner = block_sparse_attention(query, key, value, layout, backend=case.backend)
        outer = block_sparse_attention(inner + query, key, inner, layout, backend=case.backend)
        return outer + inner

    def restated(query, key, value):
        rest = (mask, 16, None, 32**-0.5, "zero")
        inner = dense_restatement(query, key, value, *rest)
        return dense_restatement(inner + query, key, inner, *rest) + inner

    score = ab.largest_score(*inputs[:2], 32**-0.5)
    ours = forward_backward(of_case, [x.to(case.device) for x in inputs], dout.to(case.device))
    plain = forward_backward(restated, inputs, dout)
    exact = forward_backward(restated, [x.double() for x in inputs], dout.double())
    for what, *tensors in zip(("out", "dq", "dk", "dv"), ours, plain, exact, exact, strict=True):
        ab.assert_as_exact_as_torch(*(x.cpu() for x in tensors), score, what)


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_second_derivative_is_refused(case, which):
    *inputs, dout = (x.to(case.device) for x in make_inputs(1, 1, 64, 32, case.dtype))
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        if which == "sparse":
            out = block_sparse_attention(*leaves, layout, backend=case.backend)
        else:
            out = dense_attention(*leaves, backend=case.backend)
        (grad,) = torch.autograd.grad(out, leaves[wanted], dout, create_graph=True)
        # torch's own kernel, which `reference` takes for dense attention, says it its way
        with pytest.raises(RuntimeError, match=r"twice|_backward is not implemented"):
            torch.autograd.grad(grad.square().sum(), leaves[wanted])


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_autocast(case, which):
    """Inputs are rounded to autocast's dtype, the arithmetic inside is the same as without it."""
    *inputs, dout = (x.to(case.device) for x in make_inputs(2, 2, 64, 32, FP32))
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)

    def run(*qkv):
        if which == "sparse":
            return block_sparse_attention(*qkv, layout, backend=case.backend)
        return dense_attention(*qkv, backend=case.backend)

    with torch.autocast(case.device, dtype=BF16):
        inside = forward_backward(run, inputs, dout)
    outside = forward_backward(lambda *qkv: run(*(x.to(BF16) for x in qkv)), inputs, dout)
    assert inside[0].dtype == BF16 and all(grad.dtype == FP32 for grad in inside[1:])
    for got, expected in zip(inside, outside, strict=True):
        assert torch.equal(got, expected)
    with torch.autocast(case.device, dtype=BF16):  # mixed dtypes are brought together
        assert run(inputs[0].to(BF16), inputs[1], inputs[2].to(BF16)).dtype == BF16


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_torch_compile(case, which):
    """One graph, no break; `aot_eager` traces everything but generates no code."""
    check_compiled(case, which, "aot_eager", "column")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_torch_compile_with_inductor(case, which):
    check_compiled(case, which, "inductor", "mixed")


def check_compiled(case, which, compiler, kind):
    torch.compiler.reset()
    layout = BlockLayout.from_mask(make_mask(kind, 4), 16).to(case.device)

    def run(query, key, value, padding):
        arguments = {"key_padding_mask": padding, "backend": case.backend}
        if which == "sparse":
            return block_sparse_attention(query * 2, key, value, layout, **arguments) + 1
        return dense_attention(query * 2, key, value, **arguments) + 1

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    for B in (2, 3):
        *inputs, dout = (x.to(case.device) for x in make_inputs(B, 2, 64, 32, case.dtype))
        padding = ab.random_padding(B, 64, torch.Generator().manual_seed(5)).to(case.device)
        eager = forward_backward(lambda *qkv: run(*qkv, padding), inputs, dout)  # noqa: B023
        traced = forward_backward(lambda *qkv: compiled(*qkv, padding), inputs, dout)  # noqa: B023
        for got, expected in zip(traced, eager, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    query = inputs[0].requires_grad_()
    out = compiled(query, *inputs[1:], padding)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("apart", ["examples", "rows"])
@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_strides_beyond_int32(case, which, apart):
    """Views into one buffer whose examples, or first and last rows, lie 2**31 elements apart."""
    B, H, N, d = 2, 2, 64, 32
    *inputs, dout = make_inputs(B, H, N, d, case.dtype)
    size = B * H * N * d
    # only its used pages get memory
    buffer = torch.empty(2**31 + 8 * size, dtype=case.dtype, device=case.device)
    row = 2**31 // (N - 1) + d
    strides = {
        "examples": (2**31 + 64, N * d, d, 1),
        "rows": (4 * H * d, 4 * d, row, 1),
    }[apart]
    views = []
    for i, tensor in enumerate((*inputs, dout)):
        first = i * (size if apart == "examples" else d)
        views.append(buffer.as_strided((B, H, N, d), strides, first).copy_(tensor))
    pairs = zip(views, (*inputs, dout), strict=True)
    assert all(view.cpu().equal(x) for view, x in pairs), "overlap"
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)

    def run(*qkv):
        if which == "sparse":
            return block_sparse_attention(*qkv, layout, backend=case.backend)
        return dense_attention(*qkv, backend=case.backend)

    near = forward_backward(run, [x.to(case.device) for x in inputs], dout.to(case.device))
    for got, expected in zip(forward_backward(run, views[:3], views[3]), near, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ---- properties ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_same_bits(case, dtype):
    *inputs, dout = (x.to(case.device) for x in make_inputs(3, 2, 128, 32, dtype))
    layout = BlockLayout.from_mask(make_mask("mixed", 8), 16).to(case.device)

    def run(*qkv):
        return block_sparse_attention(*qkv, layout, backend=case.backend)

    first = forward_backward(run, inputs, dout)
    for _ in range(3):
        for got, expected in zip(forward_backward(run, inputs, dout), first, strict=True):
            assert torch.equal(got, expected)


def test_order_and_company_of_examples_do_not_matter(case):
    inputs = [x.to(case.device) for x in make_inputs(5, 2, 64, 32, case.dtype)]
    padding = ab.random_padding(5, 64, torch.Generator().manual_seed(6)).to(case.device)
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)

    def run(chosen):
        *qkv, dout = (x[chosen] for x in inputs)
        return forward_backward(
            lambda *qkv: block_sparse_attention(
                *qkv, layout, key_padding_mask=padding[chosen], backend=case.backend
            ),
            qkv,
            dout,
        )

    whole = run(torch.arange(5))
    for chosen in (torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2]), torch.tensor([4, 4, 0])):
        for got, expected in zip(run(chosen), whole, strict=True):
            torch.testing.assert_close(got, expected[chosen], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["sparse", "dense"])
def test_content_of_padding_does_not_matter(case, which):
    *inputs, dout = (x.to(case.device) for x in make_inputs(3, 2, 64, 32, case.dtype))
    padding = ab.random_padding(3, 64, torch.Generator().manual_seed(7)).to(case.device)
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16).to(case.device)

    def run(*qkv):
        arguments = {"key_padding_mask": padding, "backend": case.backend}
        if which == "sparse":
            return block_sparse_attention(*qkv, layout, **arguments)
        return dense_attention(*qkv, **arguments)

    expected = forward_backward(run, inputs, dout)
    absent = ~padding[:, None, :, None]
    inputs[1] = inputs[1].masked_fill(absent, 3e3)
    inputs[2] = inputs[2].masked_fill(absent, -7e3)
    for got, wanted in zip(forward_backward(run, inputs, dout), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@st.composite
def problems(draw):
    bs = draw(st.sampled_from([16, 32]))
    nb = draw(st.integers(1, 128 // bs))
    mask = draw(st.lists(st.booleans(), min_size=nb * nb, max_size=nb * nb))
    return {
        "mask": torch.tensor(mask).view(nb, nb),
        "bs": bs,
        "B": draw(st.integers(1, 3)),
        "H": draw(st.integers(1, 2)),
        "d": draw(st.sampled_from([16, 32, 48, 64])),
        "dtype": draw(st.sampled_from([FP32, BF16, FP16])),
        "pruned": draw(st.sampled_from(PRUNED)),
        "padding": draw(st.sampled_from([None, "lengths", "scattered"])),
        "spread": draw(st.sampled_from([0.5, 2.0, 6.0])),
        "seed": draw(st.integers(0, 2**20)),
    }


def check_problem(case, problem):
    B, bs, N = problem["B"], problem["bs"], problem["bs"] * len(problem["mask"])
    for what, claimed in (
        (problem["dtype"], case.dtypes),
        (problem["d"], case.head_dims),
        (bs, case.block_sizes),
    ):
        if what not in claimed:
            return
    generator = torch.Generator().manual_seed(problem["seed"])
    padding = None
    if problem["padding"] == "lengths":
        padding = torch.arange(N) < torch.randint(0, N + 1, (B, 1), generator=generator)
    elif problem["padding"] == "scattered":
        padding = torch.rand(B, N, generator=generator) < 0.5
    *inputs, dout = make_inputs(
        B, problem["H"], N, problem["d"], problem["dtype"], problem["seed"], problem["spread"]
    )
    compare(case, inputs, dout, problem["mask"], bs, padding=padding, pruned=problem["pruned"])


def run_hypothesis(case, num_examples):
    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)
    @given(problems())
    def run(problem):
        check_problem(case, problem)

    run()


def test_any_layout_and_shape(case):
    run_hypothesis(case, case.num_examples)


@pytest.mark.slow
def test_any_layout_and_shape_at_length(case):
    run_hypothesis(case, 2000)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pruned", PRUNED)
def test_gradcheck_of_the_reference(pruned, causal):
    mask = make_mask("mixed", 4)
    layout = BlockLayout.from_mask(mask, 4, causal)
    padding = ab.random_padding(3, 16, torch.Generator().manual_seed(8))
    *inputs, _ = make_inputs(3, 1, 16, 3, FP64, spread=1.0)
    assert torch.autograd.gradcheck(
        lambda *qkv: block_sparse_attention(
            *qkv, layout, key_padding_mask=padding, pruned=pruned, backend="reference"
        ),
        [x.requires_grad_() for x in inputs],
    )


# ---- dense attention -----------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("d", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_equals_float64(dense_case, dtype, d, padded):
    B, H, N = 3, 2, 96
    padding = ab.random_padding(B, N, torch.Generator().manual_seed(d)) if padded else None
    *inputs, dout = make_inputs(B, H, N, d, dtype, seed=d)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert_softmax_matters(inputs, mask, N, padding, "masked")
    check_dense(dense_case, inputs, dout, padding)


@pytest.mark.parametrize("size", [200.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_with_large_scores(dense_case, dtype, size):
    *inputs, dout = make_inputs(2, 2, 96, 32, dtype, spread=1.0)
    largest = (inputs[0].double() @ inputs[1].double().mT).abs().max() * 32**-0.5
    inputs[0] = inputs[0] * (size / largest).item()
    check_dense(dense_case, inputs, dout, ab.random_padding(2, 96, torch.Generator()))


def check_dense(dense_case, inputs, dout, padding):
    device_padding = None if padding is None else padding.to(dense_case.device)

    def of_case(*qkv):
        return dense_attention(*qkv, key_padding_mask=device_padding, backend=dense_case.backend)

    N, d = inputs[0].shape[2:]
    arguments = (torch.ones(1, 1, dtype=torch.bool), N, padding, d**-0.5, "masked")
    # torch's fused kernel takes exponentials with 20 bits, as if scores were larger by 8.
    ours = ab.compare_with_float64(dense_case, of_case, inputs, dout, arguments, score_slack=8)
    if padding is not None and len(padding) > 1:
        assert not padding[1].any()
        assert all((x[1] == 0).all() for x in ours), "a fully padded example is not exactly zero"


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("tokens", [8 * 512])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_keeps_nothing_of_size_n_squared(dense_case, padded, strided, tokens):
    B, H, N, d = 8, 2, tokens // 8, 32
    padding = ab.random_padding(B, N, torch.Generator()).to(dense_case.device) if padded else None
    *inputs, dout = (x.to(dense_case.device) for x in make_inputs(B, H, N, d, dense_case.dtype))
    if strided:  # along d, where torch's fused kernel would not be taken
        inputs = [x.mT.contiguous().mT for x in inputs]
    with LargestTensor() as largest:
        forward_backward(
            lambda *qkv: dense_attention(
                *qkv, key_padding_mask=padding, backend=dense_case.backend
            ),
            inputs,
            dout,
        )
    assert largest.elements <= B * H * N * d


def test_sparse_memory_is_that_of_the_kept_blocks(case):
    B, H, N, d, bs = 2, 2, 512, 32, 16
    mask = torch.eye(N // bs, dtype=torch.bool) | torch.eye(N // bs, dtype=torch.bool).roll(1, 0)
    layout = BlockLayout.from_mask(mask, bs).to(case.device)
    *inputs, dout = (x.to(case.device) for x in make_inputs(B, H, N, d, case.dtype))
    with LargestTensor() as largest:
        forward_backward(
            lambda *qkv: block_sparse_attention(*qkv, layout, backend=case.backend), inputs, dout
        )
    assert largest.elements <= B * H * layout.num_active * bs * max(bs, d)


# ---- layouts, choice of backend, mistakes --------------------------------------------


def test_layout_lists():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    layout = BlockLayout.from_mask(mask, 8)
    row_offsets, row_columns, column_offsets, column_rows = layout.lists
    assert row_offsets.tolist() == [0, 2, 2, 6, 7]
    assert row_columns[:7].tolist() == [1, 3, 0, 1, 2, 3, 1]
    assert column_offsets.tolist() == [0, 1, 4, 5, 7]
    assert column_rows[:7].tolist() == [2, 0, 2, 3, 2, 0, 2]
    assert all(x.dtype == torch.int32 for x in layout.lists) and len(row_columns) == 20
    assert row_columns[16:].tolist() == [2, 0, 3, 1], "rows, those that keep most first"
    assert column_rows[16:].tolist() == [1, 3, 0, 2]
    both = torch.stack([mask, mask.mT])
    assert BlockLayout.from_mask(both, 8).lists[1][32:].tolist() == [2, 0, 3, 1, 1, 3, 0, 2]
    assert (layout.num_blocks, layout.num_active, layout.length) == (4, 7, 32)
    assert [(r.tolist(), c.tolist()) for r, c in layout.row_groups] == [
        ([3], [[1]]),
        ([0], [[1, 3]]),
        ([2], [[0, 1, 2, 3]]),
    ]
    assert layout.to("cpu") is layout
    mask[1] = True
    assert layout.num_active == 7 and not layout.block_mask[1].any(), "the mask is not copied"
    assert BlockLayout.full(3, 16).num_active == 9
    causal = BlockLayout.from_mask(torch.ones(3, 3).bool(), 16, causal=True)
    assert causal.num_active == 6 and causal.causal and causal.to("meta").causal
    assert torch.equal(causal.block_mask, torch.ones(3, 3).bool().tril())


def test_a_layout_never_waits_for_the_device():
    """Nothing reads a value: fake tensors have none."""
    with FakeTensorMode():
        layout = BlockLayout.from_mask(torch.ones(4, 4, dtype=torch.bool), 16, causal=True)
        assert [len(x) for x in layout.lists] == [5, 20, 5, 20] and len(layout.active) == 4


@pytest.mark.parametrize(
    "mask, block_size, message",
    [
        (torch.ones(4, 4), 16, "must be a bool tensor, not torch.float32"),
        ([[True]], 16, "must be a bool tensor, not list"),
        (torch.ones(2, 4).bool(), 16, r"must be square, \[nb, nb\] or .*, not \[2, 4\]"),
        (torch.ones(1, 2, 4, 4).bool(), 16, r"must be square, .*, not \[1, 2, 4, 4\]"),
        (torch.ones(4, 4).bool(), 0, "positive whole number, not 0"),
        (torch.ones(4, 4).bool(), 1.5, "positive whole number, not 1.5"),
    ],
)
def test_layout_mistakes(mask, block_size, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.from_mask(mask, block_size)


def good_call():
    query, key, value, _ = make_inputs(2, 2, 64, 32)
    layout = BlockLayout.from_mask(make_mask("mixed", 4), 16)
    return {"query": query, "key": key, "value": value, "layout": layout}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(2, 64, 32)}, r"query must be \[B, H, N, d\], not \[2, 64, 32\]"),
        ({"query": torch.zeros(2, 2, 64, 32).int()}, "query must be float32, .* not torch.int32"),
        ({"key": torch.zeros(2, 2, 64, 32).half()}, "query and key must agree in dtype"),
        ({"value": torch.zeros(2, 2, 64, 16)}, "query and value must agree in shape"),
        ({"value": torch.zeros(2, 2, 64, 32, device="meta")}, "must agree in device"),
        ({"layout": BlockLayout.full(4, 32)}, "4 blocks of 32 = 128 tokens, but there are 64"),
        (
            {"layout": BlockLayout.from_mask(torch.ones(3, 4, 4).bool(), 16)},
            "layout is for 3 heads, but there are 2",
        ),
        ({"layout": torch.ones(4, 4).bool()}, "layout must be a BlockLayout, not Tensor"),
        ({"key_padding_mask": torch.ones(2, 64)}, r"must be bool \[2, 64\] .* not torch.float32"),
        ({"key_padding_mask": torch.ones(2, 32).bool()}, r"must be bool \[2, 64\] .*\[2, 32\]"),
        ({"pruned": "none"}, 'pruned must be "zero" or "masked", not \'none\''),
        ({"scale": float("inf")}, "scale must be a finite number, not inf"),
        (
            {"backend": "gpu"},
            "backend must be one of auto, cuda, triton, cpu, reference, not 'gpu'",
        ),
        (
            dict.fromkeys(("query", "key", "value"), torch.zeros(0, 2, 64, 32)),
            "query is empty",
        ),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**{**good_call(), **change})


def test_available_backends_names_a_reason():
    backends = available_backends()
    assert list(backends) == list(backends_module.BACKENDS) and backends["reference"] is True
    assert all(reason is True or isinstance(reason, str) for reason in backends.values())


def test_a_named_backend_never_falls_back():
    query = torch.zeros(1, 1, 64, 32, dtype=FP64)
    for name, usable in available_backends().items():
        if name == "reference":
            continue
        reason = "cannot do dense_attention" if usable is True else usable
        with pytest.raises(RuntimeError, match=f"backend {name} cannot do") as caught:
            dense_attention(query, query, query, backend=name)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_auto_says_its_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(backends_module, "_said", set())
    query = torch.zeros(1, 1, 64, 32, dtype=FP64)
    with caplog.at_level(logging.INFO, logger="sat.kernels"):
        for _ in range(3):
            dense_attention(query, query, query)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("dense_attention uses backend reference (cuda: ")
    with caplog.at_level(logging.INFO, logger="sat.kernels"):
        dense_attention(query, query, query, backend="reference")
    assert len(caplog.messages) == 1


def test_public_names():
    assert set(kernels.__all__) <= set(dir(kernels))
