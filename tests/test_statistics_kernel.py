"""Statistics of dense attention against the whole [B, H, N, N] in float64, for every backend."""

from __future__ import annotations

import attention_backends as ab
import pytest
import torch
from attention_backends import BF16, FP16, FP32, FP64
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention_statistics, dense_attention

DTYPES = [pytest.param(t, id=str(t).removeprefix("torch.")) for t in (FP32, BF16, FP16, FP64)]


@pytest.fixture(params=ab.pytest_params("statistics"))
def case(request):
    yield from ab.activated(request.param)


def make_inputs(B=4, H=2, N=96, d=32, dtype=FP32, spread=2.0, padded=False):
    """query and key, whose scores deviate by spread**2, and a padding mask or None."""
    generator = torch.Generator().manual_seed(B * N + d)
    query, key = (spread * torch.randn(B, H, N, d, generator=generator) for _ in range(2))
    padding = ab.random_padding(B, N, generator) if padded else None
    return query.to(dtype), key.to(dtype), padding


def restated(query, key, padding, bs, groups, scale=None):
    """mean_attention, pooled_mean, pooled_square_mean, pooled_real and p, from the whole p in
    float64."""
    B, H, N, d = query.shape
    scale = d**-0.5 if scale is None else scale
    everything = torch.ones(1, 1, dtype=torch.bool)
    probs = ab.dense_probs(query.double(), key.double(), everything, N, padding, scale, "masked")
    pooled = probs.view(B, H, N // bs, bs, N // bs, bs).mean((3, 5))
    mean = probs.view(groups, B // groups, H, N, N).mean((1, 2))
    real = torch.ones(B, N, dtype=torch.bool) if padding is None else padding
    # the mean over an example's real rows, of examples that all weigh the same
    of_real = probs.mean(1) * (real[:, :, None] * N / real.sum(1).clamp(min=1)[:, None, None])
    pooled_real = of_real.view(B, N // bs, bs, N // bs, bs).mean((0, 2, 4))
    return mean, pooled.mean((0, 1)), pooled.square().mean(), pooled_real, probs


def run(case, query, key, padding, **arguments):
    padding = None if padding is None else padding.to(case.device)
    return attention_statistics(
        query.to(case.device),
        key.to(case.device),
        key_padding_mask=padding,
        backend=case.backend,
        **arguments,
    )


def check(case, query, key, padding, bs, groups=1, scale=None):
    got = run(case, query, key, padding, block_size=bs, groups=groups, scale=scale)
    mean, pooled_mean, square_mean, pooled_real, _ = restated(
        query, key, padding, bs, groups, scale
    )
    d = query.shape[-1]
    score = ab.largest_score(query, key, d**-0.5 if scale is None else scale)
    # fp32 arithmetic whatever the inputs; p is known to the rounding of its score.
    tolerance = {"rtol": 1e-5 + 3e-7 * score, "atol": 1e-7}
    assert got.mean_attention.dtype == got.pooled_mean.dtype == FP32
    assert got.pooled_square_mean.dtype == FP64 and got.pooled_square_mean.dim() == 0
    torch.testing.assert_close(got.mean_attention.cpu().double(), mean, **tolerance)
    torch.testing.assert_close(got.pooled_mean.cpu().double(), pooled_mean, **tolerance)
    torch.testing.assert_close(got.pooled_square_mean.cpu(), square_mean, rtol=1e-5, atol=0)
    if padding is None:
        assert got.pooled_real is got.pooled_mean
    elif case.backend in ("cpu", "reference") or ends_on_16(padding):
        torch.testing.assert_close(got.pooled_real.cpu().double(), pooled_real, **tolerance)
    return got


def ends_on_16(padding):
    """Whether no 16 rows hold real and padded tokens: what the GPU kernels tell apart."""
    pieces = padding.view(len(padding), -1, 16)
    return bool((pieces.all(-1) | ~pieces.any(-1)).all())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bs", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(case, dtype, bs, groups, padded):
    query, key, padding = make_inputs(dtype=dtype, padded=padded)
    probs = restated(query, key, padding, bs, groups)[-1]
    assert 0.1 < probs.amax(-1).mean() < 0.9, "softmax must matter"
    got = check(case, query, key, padding, bs, groups)
    # Padded queries count, padded keys do not, an example of padding alone counts with zeros.
    rows = got.mean_attention.cpu().double().sum(-1)
    examples = torch.ones(4) if padding is None else padding.any(1).double()
    expected = examples.view(groups, -1).mean(1, keepdim=True).expand_as(rows)
    torch.testing.assert_close(rows, expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [16, 48, 64, 128])
def test_head_dims(case, d):
    query, key, padding = make_inputs(d=d, padded=True, dtype=case.dtype)
    check(case, query, key, padding, 16, 2)


@pytest.mark.parametrize(
    "B, H, N, bs", [(1, 1, 64, 64), (1, 3, 128, 16), (5, 1, 64, 16), (2, 2, 1024, 64)]
)
def test_shapes(case, B, H, N, bs):
    query, key, padding = make_inputs(B, H, N, padded=B > 1, dtype=case.dtype)
    check(case, query, key, padding, bs)


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_large_scores(case, size):
    query, key, padding = make_inputs(spread=1.0, padded=True, dtype=case.dtype)
    query = query * (size / ab.largest_score(query, key, 32**-0.5))
    check(case, query, key, padding, 16, 2)


def test_scale_and_strides(case):
    fused = torch.randn(4, 96, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    query, key = (fused[:, :, i].transpose(1, 2) for i in range(2))
    check(case, query, key, None, 16, 2, scale=0.5)
    check(case, query.transpose(2, 3).contiguous().mT, key[:1].expand(4, -1, -1, -1), None, 16)


def test_without_the_full_mean(case):
    query, key, padding = make_inputs(padded=True, dtype=case.dtype)
    pooled = run(case, query, key, padding, block_size=16, groups=2, full=False)
    whole = run(case, query, key, padding, block_size=16, groups=2)
    assert pooled.mean_attention is None
    torch.testing.assert_close(pooled.pooled_mean, whole.pooled_mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        pooled.pooled_square_mean, whole.pooled_square_mean, rtol=1e-6, atol=0
    )


def test_pattern_loss_from_the_statistics(case):
    """MSE over [B, H, nb, nb] from mean and mean square alone, value and gradient."""
    query, key, padding = make_inputs(padded=True, dtype=case.dtype)
    bs, nb = 16, 6
    pattern = torch.rand(nb, 32, generator=torch.Generator().manual_seed(1), dtype=FP64) / 8
    pattern.requires_grad_()
    pooled = restated(query, key, padding, bs, 1)[-1].view(4, 2, nb, bs, nb, bs).mean((3, 5))
    exact = (pooled - pattern @ pattern.t()).square().mean()
    (exact_gradient,) = torch.autograd.grad(exact, pattern)

    got = run(case, query, key, padding, block_size=bs, full=False)
    mean = got.pooled_mean.cpu().double()
    spread = got.pooled_square_mean.cpu() - mean.square().mean()
    ours = spread + (mean - pattern @ pattern.t()).square().mean()
    (gradient,) = torch.autograd.grad(ours, pattern)
    size = pooled.square().mean() + (pattern @ pattern.t()).square().mean()
    assert abs(ours - exact) < 1e-6 * size
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-5, atol=1e-9)


def test_denominators_that_are_given(case):
    """lse of the dense pass changes nothing but rounding, whether it is used or not."""
    query, key, padding = make_inputs(padded=True, dtype=case.dtype)
    on_device = [x.to(case.device) for x in (query, key)]
    _, lse = dense_attention(
        *on_device, on_device[0], key_padding_mask=padding.to(case.device), return_lse=True,
        backend=case.backend,
    )  # fmt: skip
    given = run(case, query, key, padding, block_size=16, groups=2, lse=lse)
    alone = run(case, query, key, padding, block_size=16, groups=2)
    for name in ("mean_attention", "pooled_mean", "pooled_square_mean", "pooled_real"):
        got, expected = getattr(given, name), getattr(alone, name)
        # kernels of bf16 may add up probabilities that are rounded as they multiply them
        rounding = 1e-5 if case.dtype in (FP32, FP64) else torch.finfo(case.dtype).eps
        torch.testing.assert_close(got, expected, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 2])
def test_micro_batches_add_up_in_one_buffer(case, groups):
    """Each group in two unequal micro-batches equals the whole batch at once."""
    query, key, padding = make_inputs(B=groups * 4, padded=True, dtype=case.dtype)
    N = query.shape[2]
    whole = run(case, query, key, padding, block_size=16, groups=groups).mean_attention
    buffer = torch.zeros(groups, N, N, device=case.device)
    for group in range(groups):
        first = group * 4
        for micro in (slice(first, first + 1), slice(first + 1, first + 4)):
            part = buffer[group : group + 1]
            got = run(
                case,
                query[micro],
                key[micro],
                padding[micro],
                block_size=16,
                mean_out=part,
                mean_weight=(micro.stop - micro.start) / 4,
            )
            assert got.mean_attention is part
    torch.testing.assert_close(buffer, whole, rtol=1e-5, atol=1e-7)
    # Pooled values are those of the micro-batch alone, whatever the weight.
    alone = run(case, query[micro], key[micro], padding[micro], block_size=16, full=False)
    torch.testing.assert_close(got.pooled_mean, alone.pooled_mean, rtol=1e-6, atol=1e-9)


def test_no_gradient(case):
    query, key, _ = make_inputs(dtype=case.dtype)
    got = run(case, query.requires_grad_(), key.requires_grad_(), None, block_size=16)
    assert not (got.mean_attention.requires_grad or got.pooled_mean.requires_grad)
    assert not got.pooled_square_mean.requires_grad


def test_autocast(case):
    """As dense_attention: the probabilities of the rounded inputs, in fp32 arithmetic."""
    query, key, _ = make_inputs()
    with torch.autocast(case.device, dtype=BF16):
        inside = run(case, query, key, None, block_size=16)
    outside = run(case, query.to(BF16), key.to(BF16), None, block_size=16)
    assert torch.equal(inside.mean_attention, outside.mean_attention)
    assert torch.equal(inside.pooled_square_mean, outside.pooled_square_mean)


def test_torch_compile(case):
    query, key, _ = (x if x is None else x.to(case.device) for x in make_inputs(dtype=case.dtype))

    def total(query, key):
        got = attention_statistics(query * 1, key, block_size=16, backend=case.backend)
        return got.pooled_mean.sum() + got.mean_attention.sum()

    torch.compiler.reset()
    compiled = torch.compile(total, backend="aot_eager")(query, key)
    torch.testing.assert_close(compiled, total(query, key))


def test_same_input_same_bits(case):
    query, key, padding = make_inputs(padded=True, dtype=case.dtype)
    first = run(case, query, key, padding, block_size=16)
    again = run(case, query, key, padding, block_size=16)
    assert torch.equal(first.mean_attention, again.mean_attention)
    assert torch.equal(first.pooled_mean, again.pooled_mean)
    assert torch.equal(first.pooled_square_mean, again.pooled_square_mean)


@pytest.mark.parametrize("tokens, N, groups", [(8 * 256, 256, 4), (16 * 512, 512, 1)])
def test_memory(case, tokens, N, groups):
    """Statistics and attention of a dense step stay below max(2 groups N^2, 4 B N hidden)."""
    B = tokens // N
    query, key, padding = make_inputs(B, N=N, padded=True, dtype=case.dtype)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Largest():
        run(case, query, key, padding, block_size=32, groups=groups)
        if "dense" in case.ops:
            query = query.to(case.device).requires_grad_()
            dense_attention(query, query, query, backend=case.backend).sum().backward()
    assert largest <= max(2 * groups * N * N, 4 * B * N * 2 * 32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 40}, "block_size must divide the length 96, 40 does not"),
        ({"block_size": 0}, "block_size must divide the length 96, 0 does not"),
        ({"groups": 3}, "groups must divide the batch of 4 examples, 3 does not"),
        ({"mean_out": torch.zeros(1, 96, 95)}, r"mean_out must be float32 \[1, 96, 96\]"),
        ({"mean_out": torch.zeros(1, 96, 96, dtype=FP64)}, "not torch.float64"),
        ({"mean_out": torch.zeros(1, 96, 96).mT}, "mean_out must be contiguous"),
        ({"mean_out": torch.zeros(1, 96, 96), "full": False}, "mean_out needs full=True"),
        ({"key_padding_mask": torch.ones(4, 95).bool()}, r"must be bool \[4, 96\]"),
        ({"key": torch.zeros(4, 2, 96, 16)}, "query and key must agree in shape"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"lse": torch.zeros(4, 2, 95)}, r"lse must be \[4, 2, 96\] on cpu"),
    ],
)
def test_mistakes(change, message):
    query, key, _ = make_inputs()
    with pytest.raises(ValueError, match=message):
        attention_statistics(**{"query": query, "key": key, "block_size": 16, **change})


def test_padded_queries_do_not_count_as_real(case):
    """Examples that end on 16 tokens, which every backend tells apart, and one without any."""
    query, key, _ = make_inputs(dtype=case.dtype)
    padding = torch.arange(96) < torch.tensor([16, 64, 96, 0])[:, None]
    got = check(case, query, key, padding, 32)
    assert (got.pooled_real.sum() * 32**2 / 96).item() == pytest.approx(3 / 4, rel=1e-5)
    assert not torch.allclose(got.pooled_real, got.pooled_mean)
