"""The layer's operations in Triton, run by its interpreter on the CPU: against float64, their
masks against the CPU's. What an interpreter cannot show: compiled code, bf16 products on tensor
cores (it multiplies them in fp32), races."""

import pytest
import torch
from test_fused import (
    KEY,
    PRODUCTS,
    SITES,
    TYPES,
    by_hand,
    compare,
    gradients,
    layer_by_hand,
    layer_inputs,
    layer_ours,
    layer_results,
    ours,
    run,
    typed,
    uncast,
)

from kernels.dropout import keep_mask
from kernels.layer import (
    attention_output_feed_forward,
    attention_projections,
    dropout_add_layer_norm,
    embedding_dropout_layer_norm,
    gelu_dropout,
    masked_mean,
)

pytest.importorskip("triton", reason="triton is not installed")

from kernels import triton, triton_layer

if not triton_layer.INTERPRETED:
    pytest.skip("Triton compiles here: it was imported before the tests", allow_module_level=True)


FUSED = {
    "embedding": "EmbedNormBackward",
    "add": "AddNormBackward",
    "gelu": "GeluDropoutBackward",
}


@pytest.fixture(autouse=True)
def on_cpu_tensors(monkeypatch):
    monkeypatch.setattr(triton, "DEVICE", "cpu")
    monkeypatch.setattr(triton_layer, "PROGRAMS", 3)  # so that a program walks several tiles
    # fp32 does not fit into a GPU, but shows in the interpreter that the algorithm is exact
    monkeypatch.setattr(triton_layer, "PRODUCTS", (torch.bfloat16, torch.float16, torch.float32))


@pytest.fixture(params=PRODUCTS)
def products(request):
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bf16"):
        yield PRODUCTS[request.param]


@pytest.mark.parametrize(
    "shape", [{}, {"b": 1, "n": 1}, {"b": 2, "n": 70, "e": 32, "v": 3}], ids=str
)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", FUSED)
def test_against_float64(name, types, shape):
    t = typed(types, **shape)
    got, plain = (run(name, t, types, 0.1, backend) for backend in ("triton", "reference"))
    assert got["out 0"].grad_fn.name() == FUSED[name]
    wide = {k: v if k == "ids" else v.detach().double().requires_grad_() for k, v in t.items()}
    exact = by_hand(name, {**wide, "x": wide["branch"]} if name == "gelu" else wide, 0.1)
    want = {f"out {i}": out for i, out in enumerate(exact)} | gradients(exact, wide)
    compare(got, plain, want, 4, TYPES[types][1])


@pytest.mark.parametrize("shape", ["task", "one token"])
def test_half_layer_against_float64(shape, products):
    got = layer_results(layer_ours("triton"), torch.float32, products, shape)
    plain = layer_results(layer_ours("reference"), torch.float32, products, shape)
    exact = layer_results, lambda *a: layer_by_hand(*a, 0.1)
    want = uncast(*exact, torch.float64, torch.float64, shape)
    assert got["out 0"].grad_fn.name() == "LayerBackward"
    compare(got, plain, want, 16, products)


def test_projections_against_float64(products):
    def results(backend, dtype):
        generator = torch.Generator().manual_seed(5)
        x, *parameters = (
            torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().double()
            for shape in [(3, 40, 64), *[(32, 64), (32,)] * 3]
        )
        x = x.to(dtype).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t = {"x": x} | {f"p{i}": q.to(wide).requires_grad_() for i, q in enumerate(parameters)}
        pairs = [(t[f"p{i}"], t[f"p{i + 1}"]) for i in (0, 2, 4)]
        parts = attention_projections(x, *pairs, heads=2, backend=backend)
        return {f"out {i}": out for i, out in enumerate(parts)} | gradients(parts, t)

    got, plain = results("triton", products), results("reference", products)
    assert got["out 0"].grad_fn.name() == "ProjectBackward" and got["out 0"].shape == (
        3,
        2,
        40,
        16,
    )
    compare(got, plain, uncast(results, "reference", torch.float64), 16, products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_mean(dtype):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 75, generator=generator) < 0.6
    x = torch.randn(3, 75, 64, generator=generator).to(dtype)
    results = []
    for backend in ("triton", "reference"):
        t = {"x": x.clone().requires_grad_()}
        out = masked_mean(t["x"], mask, backend=backend)
        results.append((out.detach(), gradients([out], t)["x"]))
    assert out.dtype == torch.float32
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("p", [0.1, 0.999])
def test_masks_are_the_cpu_s(p):
    """Of every dropout, bit by bit."""
    shape, width = (3, 70, 32), 64
    norm, options = (torch.ones(32), torch.zeros(32)), {"p": p, "key": KEY, "backend": "triton"}
    ids, zeros = torch.zeros(3, 70, dtype=torch.int64), torch.zeros(*shape)
    x, _ = embedding_dropout_layer_norm(ids, torch.ones(1, 32), zeros[0], *norm, site=9, **options)
    assert torch.equal(x != 0, keep_mask(KEY, 9, x.shape, p, "cpu"))
    y, _ = dropout_add_layer_norm(zeros, zeros + 1, *norm, site=9, **options)
    assert torch.equal(y != 0, x != 0)
    for size in (1, 33, 5000):
        wide = gelu_dropout(torch.ones(3, size), site=9, **options)
        assert torch.equal(wide != 0, keep_mask(KEY, 9, wide.shape, p, "cpu"))

    def layer(output_bias, expand_bias, contract):
        parameters = (
            (torch.zeros(32, 32), torch.full((32,), output_bias)),
            norm,
            (torch.zeros(width, 32), torch.full((width,), expand_bias)),
            contract,
            norm,
        )
        return attention_output_feed_forward(zeros, zeros, *parameters, sites=SITES, **options)[0]

    nothing = torch.zeros(32, width), torch.zeros(32)
    after_attention = layer(1.0, 0.0, nothing) != 0
    assert torch.equal(after_attention, keep_mask(KEY, SITES[0], x.shape, p, "cpu"))
    after_feed_forward = layer(0.0, 0.0, (nothing[0], torch.ones(32))) != 0
    kept_outside = keep_mask(KEY, SITES[2], x.shape, p, "cpu")
    assert torch.equal(after_feed_forward, kept_outside)
    # inside it: the first half of the hidden values reaches the features one by one
    one_by_one = torch.eye(32, width), torch.zeros(32)
    inside = layer(0.0, 1.0, one_by_one) != 0
    kept = keep_mask(KEY, SITES[1], torch.Size((3, 70, width)), p, "cpu")[..., :32]
    assert torch.equal(inside, kept & kept_outside)


def test_missing_gradients_count_as_zero():
    """The last layer's residual sum has none; a caller may use that alone."""
    for which in (0, 1):
        results = []
        for backend in ("triton", "reference"):
            x, attended, parameters = layer_inputs(torch.float32, torch.float32, "task")
            out = layer_ours(backend)(x, attended, parameters)[which]
            t = typed("fp32")
            embedded = ours("embedding", t, 0.1, backend)[which]
            results.append(
                gradients([out], {"x": x, "attended": attended}) | gradients([embedded], t)
            )
        for key, want in results[1].items():
            torch.testing.assert_close(results[0][key], want, rtol=1e-4, atol=1e-4)


def test_wide_layers_fall_apart_into_their_parts():
    """Widths whose gradients would not fit into registers; widths that are no powers of two."""
    generator = torch.Generator().manual_seed(0)
    for E, name in ((256, "AddNormBackward"), (48, "AddBackward0")):
        x = torch.randn(2, 3, E, generator=generator, requires_grad=True)
        square, norm = (torch.eye(E), torch.zeros(E)), (torch.ones(E), torch.zeros(E))
        parameters = square, norm, square, square, norm
        got, want = (layer_ours(name)(x, x, parameters) for name in ("triton", "reference"))
        assert got[0].grad_fn.name() == name
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_foreign_id_gives_nan():
    """A kernel cannot raise; training stops at a loss that is not finite."""
    t = typed("fp32")
    t["ids"][1, 2] = 19
    x, _ = ours("embedding", t, 0.1, "triton")
    rows = x.isnan().any(-1)
    assert rows[1, 2] and rows.sum() == 1


def test_cannot_be_differentiated_twice():
    x, attended, parameters = layer_inputs(torch.float32, torch.float32, "one token")
    z, _ = layer_ours("triton")(x, attended, parameters)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(z.square().sum(), x, create_graph=True)
