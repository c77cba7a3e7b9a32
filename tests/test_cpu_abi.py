"""What the C ABI offers beyond the public functions: causal layouts, layouts per head, statistics
from a forward pass's lse. Against the formulas in float64, on every instruction set.

Shape letters as in csrc/cpu/abi.h.
"""

from __future__ import annotations

import itertools
import struct

import emulated_amx
import pytest
import torch

from kernels import native

pytestmark = pytest.mark.skipif(
    native.reason_unavailable() is not None, reason=str(native.reason_unavailable())
)
LOG2E = 1.4426950408889634
TYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx-emulated")


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param == "amx-emulated":
        if reason := emulated_amx.reason_unavailable():
            pytest.skip(reason)
        with emulated_amx.active():
            yield request.param
        return
    if reason := native.list_isas().get(request.param, "not compiled in"):
        pytest.skip(f"{request.param}: {reason}")
    native.select_isa(request.param)
    yield request.param
    native.select_isa("")


def tensor(x) -> bytes:
    return struct.pack("5q", x.data_ptr(), *x.stride())


def lists(masks):
    """Offsets and indices of the kept blocks, through all masks [layouts, nb, nb]."""
    counts = masks.sum(2)
    ends = counts.flatten().cumsum(0).view_as(counts)
    starts = torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1)
    return starts.int().contiguous(), masks.nonzero()[:, 2].int().contiguous()


def attention(query, key, value, dout, masks, real, zero, causal, threads):
    """out, dq, dk, dv, lse; what is not written stays NaN."""
    B, H, N, d = query.shape
    out, *grads = (torch.full_like(query, torch.nan) for _ in range(4))
    lse = torch.full((B, H, N), torch.nan)
    kept = [*lists(masks), *lists(masks.mT)]
    packed = b"".join(map(tensor, (query, key, value, out, dout, *grads))) + struct.pack(
        "16qf4x", lse.data_ptr(), real.data_ptr(), *(x.data_ptr() for x in kept),
        B, H, N, d, N // masks.shape[2], len(masks), TYPES[query.dtype], zero, causal, threads,
        d**-0.5,
    )  # fmt: skip
    native.call("sat_attention_forward", packed)
    native.call("sat_attention_backward", packed)
    return out, *grads, lse


def formula(query, key, value, masks, real, zero, causal):
    """out, lse (+inf without a key), probabilities."""
    N, bs = query.shape[2], query.shape[2] // masks.shape[2]
    kept = masks.repeat_interleave(bs, 1).repeat_interleave(bs, 2)
    allowed = torch.full((N,), N)
    if causal:
        kept = kept & torch.ones(N, N, dtype=torch.bool).tril()
        allowed = torch.arange(1, N + 1)
    pruned = (allowed - kept.sum(2)).double()[None] * zero
    seen = kept[None] & real[:, None, None]
    scores = (query @ key.mT) * query.shape[3] ** -0.5
    some = seen.any(3)
    top = scores.masked_fill(~seen, -torch.inf).amax(3).detach()
    top = torch.where(pruned > 0, top.clamp(min=0), top).masked_fill(~some, 0)
    exps = torch.where(seen, (scores - top[..., None]).exp(), 0.0)
    total = exps.sum(3) + pruned * (-top).exp()
    probs = torch.where(some[..., None], exps / total.masked_fill(~some, 1)[..., None], 0.0)
    return probs @ value, (total.log() + top).masked_fill(~some, torch.inf), probs


def inputs(dtype, bs, peaked=1.0, heads=3):
    generator = torch.Generator().manual_seed(bs)
    B, N, d = 2, 192, 32
    tensors = [torch.randn(B, heads, N, d, generator=generator) * 1.5 for _ in range(4)]
    tensors[0] *= peaked
    real = torch.rand(B, N, generator=generator) < 0.8
    real[0, : N // 3] = False  # queries that see no key, within a block too
    real[1, N // 2 :] = False
    nb = N // bs
    masks = torch.rand(heads, nb, nb, generator=generator) < 0.4
    masks[0, 0] = masks[0, nb - 1] = False
    masks[0, nb - 1, nb - 1] = True
    return [x.to(dtype) for x in tensors], masks, real


@pytest.mark.parametrize("bs", [16, 64])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [0, 1])
def test_causal_layouts_and_layouts_per_head(isa, dtype, bs, causal):
    tolerance = 3e-5 if dtype == torch.float32 else 2e-2
    for per_head, zero, peaked in itertools.product((False, True), (0, 1), (1, 40)):
        tensors, masks, real = inputs(dtype, bs, peaked)
        masks = masks if per_head else masks[:1]
        *found, lse = attention(*tensors, masks, real, zero, causal, threads=1)
        leaves = [x.double().requires_grad_() for x in tensors[:3]]
        out, expected_lse, _ = formula(*leaves, masks, real, zero, causal)
        expected = [out, *torch.autograd.grad(out, leaves, tensors[3].double())]
        for ours, theirs in zip(found, expected, strict=True):
            error = (ours.double() - theirs).abs().max() / theirs.abs().max()
            assert error < tolerance, (per_head, zero, peaked)
        blind = expected_lse.isinf()
        assert blind.any() and torch.equal(lse >= 1e29, blind)
        assert (found[0][blind] == 0).all() and (found[1][blind] == 0).all()
        error = (lse / LOG2E - expected_lse)[~blind].abs().max()
        assert error < tolerance * max(1, expected_lse[~blind].abs().max())
        # rows and columns of heads spread over threads: the same bits
        again = attention(*tensors, masks, real, zero, causal, threads=9)
        assert all(torch.equal(*pair) for pair in zip(again, (*found, lse), strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("groups, mean_wanted", [(1, True), (2, True), (1, False)])
def test_statistics_from_the_lse_of_a_forward_pass(isa, dtype, groups, mean_wanted):
    bs, tolerance = 32, 2e-5 if dtype == torch.float32 else 1e-2
    tensors, _, real = inputs(dtype, bs)
    B, H, N, d = tensors[0].shape
    nb = N // bs
    masks = torch.ones(1, nb, nb, dtype=torch.bool)
    real[0] = False
    *_, lse = attention(*tensors, masks, real, 0, 0, threads=1)
    *_, probs = formula(*(x.double() for x in tensors[:3]), masks, real, 0, 0)
    mean = torch.zeros(groups, N, N) if mean_wanted else None
    pooled, weighted = (torch.zeros(groups, nb, nb, dtype=torch.float64) for _ in range(2))
    squares = torch.full((groups, nb), torch.nan, dtype=torch.float64)
    weights = torch.rand(B, N)
    addresses = [0 if x is None else x.data_ptr() for x in (real, mean, pooled, squares)]
    packed = tensor(tensors[0]) + tensor(tensors[1]) + struct.pack(
        "15q2f", *addresses, weights.data_ptr(), weighted.data_ptr(), lse.data_ptr(),
        B, H, N, d, bs, groups, TYPES[dtype], 2, d**-0.5, 1.0,
    )  # fmt: skip
    native.call("sat_attention_statistics", packed)

    def close(ours, theirs):
        return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()

    probs = probs.view(groups, -1, N, N)
    blocks = probs.view(groups, -1, nb, bs, nb, bs).mean((3, 5))
    assert close(pooled, blocks.sum(1)) and close(squares, blocks.square().sum((1, 3)))
    rows = weights.repeat_interleave(H, 0).view(groups, -1, N, 1)
    assert close(weighted, (probs * rows).view(groups, -1, nb, bs, nb, bs).mean((3, 5)).sum(1))
    assert mean is None or close(mean, probs.mean(1))
