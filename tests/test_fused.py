"""Fused operations: the masks' statistics and independence, the operations against float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.fused import (
    DropoutKey,
    dropout_add_layer_norm,
    dropout_scale,
    embedding_dropout_layer_norm,
    gelu_dropout,
    keep_mask,
    linear,
)

SHAPE = torch.Size([8, 64, 64])


def mask(seed=1, step=2, first=0, site=3, shape=SHAPE, p=0.1):
    return keep_mask(DropoutKey(seed, step, first), site, torch.Size(shape), p, "cpu")


# ---- the generator ---------------------------------------------------------------------------


def test_mask_restated_with_python_integers():
    """The definition, written a second time without tensors: what C++ and CUDA must reproduce."""
    word64, word32 = (1 << 64) - 1, (1 << 32) - 1

    def mix64(z):
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & word64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & word64
        return z ^ z >> 31

    golden, seed, step, site, first, size = 0x9E3779B97F4A7C15, -7, 1 << 40, 11, 509, 75
    state = 0
    for part in (seed, step, site):
        state = mix64((state + part + golden) & word64)
    got = mask(seed, step, first, site, (5, size), 0.3)
    for example in range(5):
        z = mix64((state + first + example + golden) & word64)
        key0, key1 = z & word32, z >> 32
        for element in range(size):
            block, lane = divmod(element, 32)
            x = (16 * block + lane % 16 + key0) & word32
            x = ((x ^ x >> 16) * 0x7FEB352D) & word32
            x ^= key1
            x = ((x ^ x >> 15) * 0x846CA68B) & word32
            x ^= x >> 16
            bits = x >> 16 if lane >= 16 else x & 0xFFFF
            assert got[example, element].item() == (bits >= round(0.3 * 65536))


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.9])
def test_mean_is_the_realised_keep_probability(p):
    keep = mask(shape=(64, 1024, 64), p=p)
    expected = 1 / dropout_scale(p)
    sigma = (expected * (1 - expected) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - expected) < 4.5 * sigma
    assert abs(expected - (1 - p)) < 2**-17 + 1e-12
    # ... of every example and of every feature column as well: the spread is binomial.
    for dims in [(1, 2), (0, 1), (0, 2)]:
        means = keep.double().mean(dims)
        count = keep.numel() / means.numel()
        z = (means - expected) / (expected * (1 - expected) / count) ** 0.5
        assert z.abs().max() < 5.5, dims
        assert 0.6 < z.std() < 1.4, dims


def correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm())).item() * a.numel() ** 0.5  # in standard deviations


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence_between_sites_steps_seeds_examples_and_neighbours(p):
    base = mask(p=p)
    others = {
        "seed": mask(seed=2, p=p),
        "step": mask(step=3, p=p),
        "site": mask(site=4, p=p),
        "seed and step swapped": mask(seed=2, step=1, p=p),
        "batch": mask(first=8, p=p),
    }
    for name, other in others.items():
        assert abs(correlation(base, other)) < 4.5, name
    for distance in (1, 3):
        assert abs(correlation(base[:-distance], base[distance:])) < 4.5, f"example {distance}"
    flat = base.flatten(1)
    # 16: the two halves of one word; 32: the next word; 64: the next token
    for distance in (1, 2, 4, 8, 15, 16, 17, 32, 64, 128, 1024):
        assert abs(correlation(flat[:, :-distance], flat[:, distance:])) < 4.5, distance


def test_windows_of_elements_take_every_value_equally_often():
    """Eight consecutive elements as a byte: chi-square over the 256 patterns, p = 1/2."""
    keep = mask(shape=(64, 1024, 64), p=0.5).view(-1, 8).long()
    values = (keep << torch.arange(8)).sum(1)
    counts = torch.bincount(values, minlength=256).double()
    expected = values.numel() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_masks_do_not_depend_on_the_micro_batch_split():
    whole = mask(first=100, shape=(12, 33, 5))
    for split in ([12], [1] * 12, [5, 7], [3, 3, 6]):
        first, parts = 100, []
        for count in split:
            parts.append(mask(first=first, shape=(count, 33, 5)))
            first += count
        assert torch.equal(torch.cat(parts), whole)
    # ... nor on the length: a shorter sequence has the longer one's first elements.
    assert torch.equal(mask(shape=(4, 20, 5)), mask(shape=(4, 33, 5))[:, :20])


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), 1 - 1e-9])
def test_impossible_probability_is_named(p):
    with pytest.raises(ValueError, match="probability"):
        gelu_dropout(torch.zeros(2, 4), p=p, key=DropoutKey(0, 0, 0), site=0)


# ---- the operations --------------------------------------------------------------------------

KEY = DropoutKey(seed=5, step=17, first_example=3)


def inputs(dtype, b=3, n=40, e=64, v=19, grad=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, shift=0.0):
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift).to(
            dtype
        )
        return x.requires_grad_(grad)

    return {
        "ids": torch.randint(0, v, (b, n), generator=generator),
        "words": normal(v, e),
        "positions": normal(n, e),
        "weight": normal(e, scale=0.3, shift=1.0),
        "bias": normal(e, scale=0.3),
        "x": normal(b, n, e, scale=2.0),
        "branch": normal(b, n, e),
    }


def by_hand(name, t, p):
    """The operation in torch's own words, the mask applied as a product."""
    shape = t["x"].shape
    factor = keep_mask(KEY, 9, shape, p, "cpu").to(t["x"].dtype) * dropout_scale(p)
    e = shape[-1]
    if name == "gelu":
        return (F.gelu(t["x"]) * factor,)
    if name == "add":
        y = t["x"] + t["branch"] * factor
    else:
        y = (F.embedding(t["ids"], t["words"]) + t["positions"]) * factor
    return y, F.layer_norm(y, (e,), t["weight"], t["bias"], 1e-5)


def ours(name, t, p, backend="auto", key=KEY):
    options = {"p": p, "key": key, "site": 9, "backend": backend}
    if name == "gelu":
        return (gelu_dropout(t["x"], **options),)
    if name == "add":
        return dropout_add_layer_norm(t["x"], t["branch"], t["weight"], t["bias"], **options)
    return embedding_dropout_layer_norm(
        t["ids"], t["words"], t["positions"], t["weight"], t["bias"], **options
    )


NAMES = ["embedding", "add", "gelu"]


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_torch_with_the_mask_by_hand(name):
    t = inputs(torch.float64)
    for got, want in zip(ours(name, t, 0.1, "reference"), by_hand(name, t, 0.1), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_reference(name):
    t = inputs(torch.float64, b=2, n=3, e=5, v=4)
    floats = {k: v for k, v in t.items() if v.dtype == torch.float64}

    def function(*values):
        return ours(name, {**t, **dict(zip(floats, values, strict=True))}, 0.3, "reference")

    assert torch.autograd.gradcheck(function, tuple(floats.values()))


@pytest.mark.parametrize("name", NAMES)
def test_no_key_means_no_dropout(name):
    t = inputs(torch.float32)
    for a, b in zip(ours(name, t, 0.5, key=None), ours(name, t, 0.0), strict=True):
        assert torch.equal(a, b)


def test_dtypes_under_autocast():
    """The residual stream stays fp32; what the next product reads comes out in autocast's type."""
    t = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        branch = linear(t["x"], torch.eye(64), None)
        assert branch.dtype == torch.bfloat16
        y, normed = ours("add", {**t, "branch": branch}, 0.1)
        assert (y.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
        x, normed = ours("embedding", t, 0.1)
        assert (x.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
        assert ours("gelu", {**t, "x": branch}, 0.1)[0].dtype == torch.bfloat16
        (y.sum() + normed.float().sum()).backward()
    assert t["x"].grad is not None and t["x"].grad.dtype == torch.float32


def test_shapes_that_disagree_are_named():
    t = inputs(torch.float32)
    with pytest.raises(ValueError, match="position_table must be"):
        ours("embedding", {**t, "positions": t["positions"][:-1]}, 0.1)
    with pytest.raises(ValueError, match="must agree"):
        ours("add", {**t, "branch": t["branch"][:1]}, 0.1)
    with pytest.raises(ValueError, match="unknown backend"):
        ours("gelu", t, 0.1, backend="cpuu")
