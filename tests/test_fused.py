"""Fused operations: the masks' statistics and independence, the operations against float64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import BlockLayout, block_sparse_attention, native
from kernels.dropout import DropoutKey, dropout_scale, keep_mask
from kernels.layer import (
    attention_output_feed_forward,
    attention_projections,
    dropout_add_layer_norm,
    embedding_dropout_layer_norm,
    gelu_dropout,
    linear,
    masked_mean,
)

SHAPE = torch.Size([8, 64, 64])


def mask(seed=1, step=2, first=0, site=3, shape=SHAPE, p=0.1):
    return keep_mask(DropoutKey(seed, step, first), site, torch.Size(shape), p, "cpu")


# ---- the generator -----------------------------------------------------------------------------


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


# ---- the operations ----------------------------------------------------------------------------

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
    with pytest.raises(ValueError, match="backend must be one of"):
        ours("gelu", t, 0.1, backend="cpuu")


# ---- the compiled operations -------------------------------------------------------------------

needs_library = pytest.mark.skipif(
    native.reason_unavailable() is not None, reason=str(native.reason_unavailable())
)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request):
    """Each instruction set that this machine has, in turn."""
    if reason := native.reason_unavailable():
        pytest.skip(reason)
    if reason := native.list_isas().get(request.param, "not compiled in"):
        pytest.skip(f"{request.param}: {reason}")
    native.select_isa(request.param)
    yield request.param
    native.select_isa("")


TYPES = {  # of the residual stream and of the branch; autocast decides the norm's output
    "fp32": (torch.float32, torch.float32),
    "autocast": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}


def typed(types, **shape):
    stream, branch = TYPES[types]
    t = inputs(torch.float64, **shape, grad=False)
    dtypes = {"branch": branch, "weight": stream, "bias": stream}
    return {
        k: v if k == "ids" else v.to(dtypes.get(k, stream)).requires_grad_() for k, v in t.items()
    }


def gradients(outputs, t):
    """Of a fixed random functional of the outputs, for every input that they depend on."""
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for out in outputs:
        seed = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + (out.double() * seed.bfloat16().double()).sum()
    names = [k for k, v in t.items() if v.requires_grad]
    grads = torch.autograd.grad(loss, [t[k] for k in names], allow_unused=True)
    return {k: g for k, g in zip(names, grads, strict=True) if g is not None}


def run(name, t, types, p, backend):
    with torch.autocast("cpu", torch.bfloat16, enabled=types == "autocast"):
        outputs = ours(name, {**t, "x": t["branch"]} if name == "gelu" else t, p, backend)
    grads = gradients(outputs, t)
    return {f"out {i}": out for i, out in enumerate(outputs)} | grads


@pytest.mark.parametrize(
    "shape", [{}, {"b": 1, "n": 1}, {"b": 2, "n": 300, "e": 96, "v": 3}], ids=str
)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_against_float64(name, types, shape, isa):
    """At most twice the error of plain PyTorch in the same dtypes, and a rounding."""
    t = typed(types, **shape)
    got = run(name, t, types, 0.1, "cpu")
    plain = run(name, t, types, 0.1, "reference")
    wide = {k: v if k == "ids" else v.detach().double().requires_grad_() for k, v in t.items()}
    hand = by_hand(name, {**wide, "x": wide["branch"]} if name == "gelu" else wide, 0.1)
    want = {f"out {i}": out for i, out in enumerate(hand)} | gradients(hand, wide)
    assert got.keys() == plain.keys() == want.keys()
    for key, exact in want.items():
        assert got[key].dtype == plain[key].dtype and got[key].shape == exact.shape, key
        scale = exact.abs().max()
        error = (got[key].double() - exact).abs().max() / scale
        allowed = (plain[key].double() - exact).abs().max() / scale
        print(f"{key}: {error:.2e}, plain {allowed:.2e}")
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps, key


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 64 * 32, 64 * 32 + 5])
def test_compiled_masks_are_the_reference_s(size, isa):
    x = torch.ones(5, size)
    for p in (0.1, 0.5, 0.999):
        out = gelu_dropout(x, p=p, key=KEY, site=9, backend="cpu")
        assert torch.equal(out != 0, keep_mask(KEY, 9, x.shape, p, "cpu"))


def test_compiled_masks_of_rows(isa):
    """The same through the other two operations, whose rows are tokens."""
    ones, zeros = torch.ones(3, 70, 96), torch.zeros(3, 70, 96)
    want = keep_mask(KEY, 9, ones.shape, 0.3, "cpu")
    options = {"p": 0.3, "key": KEY, "site": 9, "backend": "cpu"}
    norm = torch.ones(96), torch.zeros(96)
    assert torch.equal(dropout_add_layer_norm(zeros, ones, *norm, **options)[0] != 0, want)
    ids, table = torch.zeros(3, 70, dtype=torch.int64), torch.ones(1, 96)
    x, _ = embedding_dropout_layer_norm(ids, table, zeros[0], *norm, **options)
    assert torch.equal(x != 0, want)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_at_any_thread_count(name, isa):
    t = typed("fp32", b=5, n=333, v=7)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(name, t, "fp32", 0.1, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_give_the_batch_s_bits(name, isa):
    t = typed("fp32", b=5, n=40)
    batch = {"ids", "x", "branch"}
    whole = ours(name, t, 0.1, "cpu")
    at = 0
    for count in (2, 1, 2):
        part = {k: v[at : at + count] if k in batch else v for k, v in t.items()}
        key = DropoutKey(KEY.seed, KEY.step, KEY.first_example + at)
        for got, want in zip(ours(name, part, 0.1, "cpu", key), whole, strict=True):
            assert torch.equal(got, want[at : at + count])
        at += count


def test_gelu_to_a_few_units_in_the_last_place(isa):
    """Everywhere, the negative tail included, where 1 + erf cancels."""
    x = torch.linspace(-12.5, 12.5, 200_001, dtype=torch.float64).float().requires_grad_()
    wide = x.detach().double()
    phi = torch.special.erfc(wide * -(0.5**0.5)) / 2
    want = wide * phi
    got = gelu_dropout(x[None], p=0.0, key=None, site=0, backend="cpu")[0]
    spacing = torch.maximum(want.abs(), torch.tensor(2.0**-126)) * 2**-23
    # the rounding of x * x is worth x * x / 4 units in the tail, that of its factor as much
    error = ((got.double() - want).abs() / spacing - wide * wide / 2).max().item()
    slope = phi + wide * torch.exp(-wide * wide / 2) / (2 * torch.pi) ** 0.5
    got.sum().backward()
    print(f"gelu {error:.2f} ulp, slope {(x.grad - slope).abs().max():.2e}")
    assert error < (6 if isa != "portable" else 12)  # fused multiply-adds round once
    assert (x.grad - slope).abs().max() < 4e-7
    special = torch.tensor([[0.0, float("inf"), float("nan"), 1e30, -1e30]])
    out = gelu_dropout(special, p=0.0, key=None, site=0, backend="cpu")[0]
    assert out[0] == 0 and out[1] == float("inf") and out[2].isnan() and out[3] == 1e30
    assert abs(out[4]) < 1e-6


@needs_library
def test_what_the_compiled_operations_refuse():
    t = typed("fp32", e=40)  # not compiled for this width or type: plain PyTorch
    for got, want in zip(
        ours("add", t, 0.1, "cpu"), ours("add", t, 0.1, "reference"), strict=True
    ):
        assert torch.equal(got, want)
    assert ours("gelu", inputs(torch.float64), 0.1, "cpu")[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        gelu_dropout(torch.zeros(2, 4, device="meta"), p=0.1, key=KEY, site=0, backend="cpu")
    t = typed("fp32")
    for bad in (-1, len(t["words"])):
        with pytest.raises(IndexError, match="outside the word table"):
            ours("embedding", {**t, "ids": torch.full_like(t["ids"], bad)}, 0.1, "cpu")
    for name in NAMES:
        loss = ours(name, t, 0.1, "cpu")[-1].square().sum()
        leaf = t["words" if name == "embedding" else "x"]
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(grad.square().sum(), leaf)


@needs_library
def test_missing_gradients_count_as_zero():
    """The last layer's residual stream is not used, an unused norm passes nothing."""
    for index in (0, 1):
        t = typed("fp32")
        ours("add", t, 0.1, "cpu")[index].square().sum().backward()
        got = {k: t[k].grad for k in ("x", "branch")}
        t = typed("fp32")
        ours("add", t, 0.1, "reference")[index].square().sum().backward()
        for key, value in got.items():
            torch.testing.assert_close(value, t[key].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 64), (1, 1, 96), (2, 1024, 32)], ids=str)
def test_masked_mean_against_float64(shape, dtype, isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    seed = torch.randn(shape[0], shape[2], generator=generator)
    out = masked_mean(x, mask, backend="cpu")
    assert out.dtype == torch.float32 and out.grad_fn.name() == "masked_meanBackward"
    exact = (x.double() * mask[..., None]).sum(1) / shape[1]
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    (dx,) = torch.autograd.grad(out, x, seed)
    assert dx.dtype == dtype
    want = seed.double()[:, None] * mask[..., None] / shape[1]
    torch.testing.assert_close(dx.double(), want, rtol=torch.finfo(dtype).eps, atol=0)
    plain = masked_mean(x, mask, backend="reference")
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mask bool"):
        masked_mean(x, mask.long())


@needs_library
def test_non_contiguous_inputs():
    t = typed("fp32", b=4)
    flipped = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim == 3 else v
        for k, v in t.items()
    }
    for name in ("add", "gelu"):
        for got, want in zip(
            ours(name, flipped, 0.1, "cpu"), ours(name, t, 0.1, "cpu"), strict=True
        ):
            assert torch.equal(got, want)


# ---- the whole half layer ---------------------------------------------------------------------

# what products read: fp32, or bf16 under autocast beside an fp32 residual stream
PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=PRODUCTS)
def products(request, isa):
    """Each type of products that this instruction set has, autocast on for bf16."""
    bfloat = request.param == "bf16"
    if bfloat and not native.load().sat_layer_has_bfloat():
        pytest.skip(f"{isa} on this CPU has no products of bf16")
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat):
        yield PRODUCTS[request.param]


def uncast(function, *arguments):
    with torch.autocast("cpu", enabled=False):
        return function(*arguments)


SITES = (4, 5, 6)
SHAPES = {  # B, N, E, K, F
    "task": (3, 70, 64, 64, 128),
    "one token": (1, 1, 64, 64, 128),
    "other widths": (2, 1100, 96, 32, 160),
}


def layer_inputs(dtype, attended_dtype, shape):
    B, N, E, K, F_ = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)

    def normal(*size, shift=0.0):
        x = torch.randn(size, generator=generator, dtype=torch.float64) * 0.3 + shift
        return x.float().to(dtype).requires_grad_()

    parameters = [
        (normal(E, K), normal(E)),
        (normal(E, shift=1.0), normal(E)),
        (normal(F_, E), normal(F_)),
        (normal(E, F_), normal(E)),
        (normal(E, shift=1.0), normal(E)),
    ]
    x, attended = normal(B, N, E), normal(B, N, K)
    # rounded for every dtype, so that all compute the same
    attended = attended.detach().to(torch.bfloat16).to(attended_dtype).requires_grad_()
    return x, attended, parameters


def layer_by_hand(x, attended, parameters, p):
    output, norm, expand, contract, next_norm = parameters

    def drop(value, site):
        keep = keep_mask(KEY, site, value.shape, p, "cpu")
        return value * keep.to(value.dtype) * dropout_scale(p)

    y = x + drop(F.linear(attended, *output), SITES[0])
    hidden = F.gelu(F.linear(F.layer_norm(y, y.shape[-1:], *norm), *expand))
    z = y + drop(F.linear(drop(hidden, SITES[1]), *contract), SITES[2])
    return z, F.layer_norm(z, z.shape[-1:], *next_norm)


def layer_results(function, dtype, attended_dtype, shape):
    x, attended, parameters = layer_inputs(dtype, attended_dtype, shape)
    outputs = function(x, attended, parameters)
    t = {"x": x, "attended": attended}
    for name, (weight, bias) in zip(
        ["output", "norm", "expand", "contract", "next"], parameters, strict=True
    ):
        t |= {f"{name} weight": weight, f"{name} bias": bias}
    return {f"out {i}": out for i, out in enumerate(outputs)} | gradients(outputs, t)


def layer_ours(backend):
    def function(x, attended, parameters):
        return attention_output_feed_forward(
            x, attended, *parameters, p=0.1, key=KEY, sites=SITES, backend=backend
        )

    return function


def compare(got, plain, want, slack, products):
    """Errors against float64: at most twice that of plain PyTorch in the same dtypes, and a few
    roundings in fp32 or one in bf16."""
    eps = 2**-9 if products == torch.bfloat16 else slack * torch.finfo(torch.float32).eps
    assert got.keys() == plain.keys() == want.keys()
    for key, exact in want.items():
        scale = exact.abs().max()
        error = (got[key].double() - exact).abs().max() / scale
        allowed = (plain[key].double() - exact).abs().max() / scale
        print(f"{key}: {error:.2e}, plain {allowed:.2e}")
        assert got[key].dtype == plain[key].dtype, key
        assert error <= 2 * allowed + eps, key


@pytest.mark.parametrize("shape", SHAPES)
def test_half_layer_against_float64(shape, products):
    got = layer_results(layer_ours("cpu"), torch.float32, products, shape)
    plain = layer_results(layer_ours("reference"), torch.float32, products, shape)
    by_hand = layer_results, lambda *a: layer_by_hand(*a, 0.1)
    want = uncast(*by_hand, torch.float64, torch.float64, shape)
    assert got["out 0"].grad_fn.name() == "layerBackward"  # not its parts
    compare(got, plain, want, 16, products)


def test_half_layer_has_the_same_bits_at_any_thread_count(products):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            case = torch.float32, products, "other widths"
            results.append(layer_results(layer_ours("cpu"), *case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


def test_half_layer_in_micro_batches_gives_the_batch_s_bits(products):
    """Wherever a tile's or a piece's border falls."""
    x, attended, parameters = layer_inputs(torch.float32, products, "task")
    whole = layer_ours("cpu")(x, attended, parameters)
    for part in ((0, 1), (1, 3)):
        key = DropoutKey(KEY.seed, KEY.step, KEY.first_example + part[0])
        got = attention_output_feed_forward(
            x[slice(*part)], attended[slice(*part)], *parameters, p=0.1, key=key, sites=SITES,
            backend="cpu",
        )  # fmt: skip
        for a, b in zip(got, whole, strict=True):
            assert torch.equal(a, b[slice(*part)])


@needs_library
def test_half_layer_falls_apart_into_its_parts_for_other_types():
    x, attended, parameters = layer_inputs(torch.float32, torch.float32, "task")
    with torch.autocast("cpu", torch.bfloat16):  # attended is not what autocast would have given
        got = layer_ours("cpu")(x, attended, parameters)
        want = layer_ours("reference")(x, attended, parameters)
    assert got[0].grad_fn.name() == "add_normBackward"
    assert [out.dtype for out in got] == [torch.float32, torch.bfloat16]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="need parameters of shapes"):
        layer_ours("auto")(x, attended[..., :32], parameters)


@needs_library
def test_bf16_products_without_bf16_instructions():
    """linear is rounded once whatever the CPU has; PyTorch's own error is the measure."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator).bfloat16() for s in ((40, 64), (32, 64), (32,)))
    want = F.linear(x.double(), w.double(), b.double())
    assert (linear(x, w, b).double() - want).abs().max() <= 2**-8 * want.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x.float(), w.float().requires_grad_(), b.float())
    assert out.dtype == torch.bfloat16 and out.requires_grad
    assert torch.equal(out, linear(x, w, b))


# ---- projections, and what a layout leaves out ------------------------------------------------


def sparse_case(dtype, products, block_size, E=64, K=64, heads=2, nb=6, B=3):
    """A layout with empty rows and columns, an input and the parameters of a whole half layer."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(nb, nb, generator=generator) < 0.25
    mask[1], mask[:, 2], mask[4], mask[:, 4] = False, False, False, False
    mask[0, 0] = True
    layout = BlockLayout.from_mask(mask, block_size)

    def normal(*size, shift=0.0):
        x = torch.randn(size, generator=generator, dtype=torch.float64) * 0.3 + shift
        return x.float().to(dtype).requires_grad_()

    maps = [(normal(K, E), normal(K)) for _ in range(3)]
    rest = [
        (normal(E, K), normal(E)),
        (normal(E, shift=1.0), normal(E)),
        (normal(2 * E, E), normal(2 * E)),
        (normal(E, 2 * E), normal(E)),
        (normal(E, shift=1.0), normal(E)),
    ]
    x = normal(B, nb * block_size, E)
    normed = normal(B, nb * block_size, E).detach().to(torch.bfloat16).to(products)
    return layout, x, normed.requires_grad_(), maps, rest, heads


def through_attention(dtype, products, block_size, backend, use_layout, **shape):
    """Outputs and gradients of projections, sparse attention and the rest of the layer."""
    layout, x, inputs, maps, rest, heads = sparse_case(dtype, products, block_size, **shape)
    known = layout if use_layout else None
    q, k, v = attention_projections(inputs, *maps, heads=heads, layout=known, backend=backend)
    out = block_sparse_attention(q, k, v, layout, backend=backend)
    attended = out.transpose(1, 2).reshape(*x.shape[:2], -1)
    z, normed = attention_output_feed_forward(
        x, attended, *rest, p=0.1, key=KEY, sites=SITES, layout=known, backend=backend
    )
    t = {"x": x, "input": inputs}
    for number, (weight, bias) in enumerate(maps + rest):
        t |= {f"weight {number}": weight, f"bias {number}": bias}
    return {"z": z, "normed": normed} | gradients((z, normed), t)


@pytest.mark.parametrize(
    "shape", [{}, {"E": 96, "K": 32, "heads": 1}], ids=["task", "other widths"]
)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_layout_leaves_out_only_what_nobody_reads(block_size, shape, products):
    """A layer with products left out against the whole layer in float64."""
    got = through_attention(torch.float32, products, block_size, "cpu", True, **shape)
    plain = through_attention(torch.float32, products, block_size, "reference", False, **shape)
    wide = torch.float64, torch.float64, block_size, "reference", False
    want = uncast(lambda: through_attention(*wide, **shape))
    compare(got, plain, want, 32, products)


def test_projections_are_linear_maps_split_into_heads(products):
    _, _, x, maps, _, heads = sparse_case(torch.float32, products, 16)
    parts = attention_projections(x, *maps, heads=heads, backend="cpu")
    for part, (weight, bias) in zip(parts, maps, strict=True):
        want = F.linear(x, weight, bias).view(*x.shape[:2], heads, -1).transpose(1, 2)
        assert part.shape == want.shape and part.stride(1) < part.stride(2)
        assert part.dtype == want.dtype == products
        tolerance = 1e-5 if products == torch.float32 else 2**-7
        torch.testing.assert_close(part, want, rtol=tolerance, atol=tolerance)


def test_left_out_rows_are_zero(products):
    layout, _, x, maps, _, heads = sparse_case(torch.float32, products, 32)
    q, k, v = attention_projections(x, *maps, heads=heads, layout=layout, backend="cpu")
    for block in range(layout.num_blocks):
        rows = slice(32 * block, 32 * block + 32)
        for part, used in ((q, layout.block_mask[block]), (k, layout.block_mask[:, block])):
            assert bool((part[:, :, rows] != 0).any()) == bool(used.any())
        assert torch.equal(v[:, :, rows] != 0, (k[:, :, rows] != 0) & (v[:, :, rows] != 0))


def test_projections_have_the_same_bits_at_any_thread_count(products):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(through_attention(torch.float32, products, 128, "cpu", True, B=4))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


def test_projections_refuse_shapes_that_disagree():
    _, _, x, maps, _, _ = sparse_case(torch.float32, torch.float32, 16)
    with pytest.raises(ValueError, match="3 heads need three weights"):
        attention_projections(x, *maps, heads=3)
    with pytest.raises(ValueError, match="need three weights"):
        attention_projections(x[..., :32], *maps, heads=2)
