"""The compiled C++ (csrc/cpu): the backend `cpu`, for attention and the rest of a layer.

The kernels allocate nothing larger than a block besides their outputs, and give the same bits for
any number of threads. Shape letters as in operators.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import native, operators
from kernels.backends import Call
from kernels.dropout import LANES, DropoutKey, dropout_scale, dropout_threshold, site_key
from kernels.layout import BlockLayout

name = "cpu"

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # SatType in csrc/cpu/abi.h
# Types of (residual stream, branch, norm's output) that are compiled: SatTypes in abi.h.
NORM_TYPES = {
    (torch.float32, torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16, torch.bfloat16): 1,  # autocast
    (torch.bfloat16, torch.bfloat16, torch.bfloat16): 2,
}
GRANULE = 16  # head_dim and block_size are multiples of it in C++
LARGEST = 128
MASK_BLOCK = 2 * LANES  # row widths are multiples of it
MAX_FEATURES = 4096
PIECE = 256  # SAT_PIECE: tokens whose parameter gradients are summed in one go
LAYER_PIECE = 1024  # SAT_LAYER_PIECE
EMPTY = 1e30  # SAT_EMPTY: lse of rows without a key
_CPU = torch.device("cpu")
_FP32 = torch.float32


def can_run(call: Call) -> str | None:
    if (reason := _reason_unavailable()) or call.device is None:
        return reason
    if call.device.type != "cpu":
        return f"the tensors are on {call.device}"
    if call.op in ("block_sparse_attention", "dense_attention", "attention_statistics"):
        return _reason_against_attention(call)
    if call.op in ("embedding_dropout_layer_norm", "dropout_add_layer_norm"):
        typed = call.dtypes in NORM_TYPES
    elif call.op in ("attention_projections", "attention_output_feed_forward"):
        operand, product, norm, *rest = call.dtypes
        typed = operand == product == norm and set(rest) == {_FP32} and _multiplies(product)
    else:
        typed = all(dtype in TYPES for dtype in call.dtypes)
    if not typed:
        return f"not compiled for {', '.join(str(dtype) for dtype in call.dtypes)}"
    if any(width % MASK_BLOCK or not 0 < width <= MAX_FEATURES for width in call.sizes):
        return f"not compiled for rows of {call.sizes}, but for multiples of {MASK_BLOCK}"
    return None


def _reason_against_attention(call: Call) -> str | None:
    if call.dtypes[0] not in TYPES:
        return f"dtype {call.dtypes[0]}, it computes float32 and bfloat16"
    if call.sizes[0] > LARGEST:
        return f"head_dim {call.sizes[0]}, it goes up to {LARGEST}"
    size = call.block_size or _dense_block(call.length)
    if size % GRANULE or not GRANULE <= size <= LARGEST:
        what = f"block_size {size}" if call.block_size else f"length {call.length}"
        return f"{what}, it needs a multiple of {GRANULE}, for blocks at most {LARGEST}"
    return None


# Constants to torch.compile, which cannot trace the loading of a library.
@torch.compiler.assume_constant_result
def _reason_unavailable() -> str | None:
    return native.reason_unavailable()


@torch.compiler.assume_constant_result
def _multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(native.load().sat_layer_has_bfloat())
    return dtype == _FP32


# ---- the structs of csrc/cpu/abi.h; what follows in them are addresses and 64-bit numbers ----

_TENSOR = "5q"  # SatTensor: address and strides
_DROP = "IfQq"  # threshold, scale, site key, first example
# tensors, addresses, sizes, type and more, factors
_ATTENTION = native.Struct(_TENSOR * 8 + "6q" + "10q" + "f")
_STATISTICS = native.Struct(_TENSOR * 2 + "7q" + "8q" + "2f")
_NORM = native.Struct("3qi2qf" + _DROP + "i")
_GELU = native.Struct("2qi" + _DROP + "i")
_MEAN = native.Struct("3qiqi")
_LAYER = native.Struct("i5q10q2qfIf3Qqi")
_PROJECT = native.Struct("i4q6q2qi")


def _at(x: Tensor | None, *shape: int, dtype: torch.dtype = _FP32) -> int:
    """Address of contiguous x, checked; 0 for None."""
    return 0 if x is None else native.pointer(x, shape, dtype, _CPU)


def _rows(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> int:
    """The same for a tensor of the shape of `like`."""
    return 0 if x is None else native.pointer(x, like.shape, dtype or like.dtype, _CPU)


def _fp32(*shape: int) -> Tensor:
    """Space for numbers that compiled code writes, whatever torch's default dtype and device."""
    return torch.empty(shape, dtype=_FP32, device=_CPU)


# ---- attention --------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout | None,
    *settings,
) -> tuple[Tensor, Tensor | None]:
    size = layout.block_size if layout else _dense_block(query.shape[2])
    return operators.attention(
        name, _padded(query.shape[3]), size, query, key, value, layout, *settings
    )


def _padded(head_dim: int) -> int:
    return -(-head_dim // GRANULE) * GRANULE


def _dense_block(length: int) -> int:
    """Rows that dense attention takes together: the largest size that divides the length."""
    return next((size for size in (128, 64, 32, 16) if length % size == 0), length)


def _tensor(x: Tensor, query: Tensor) -> tuple[int, ...]:
    """SatTensor of x, which may have other strides than query."""
    return native.pointer(x, query.shape, query.dtype, _CPU, strided=True), *x.stride()


def _attention(tensors, lse, mask, *lists_and_settings) -> bytes:
    *lists, block_size, scale, pruned_zero, causal = lists_and_settings
    query = tensors[0]
    B, H, N, d = query.shape
    shape, dtype, nb = query.shape, query.dtype, N // block_size
    strided: list[int] = []
    for x in tensors:
        if x is None:
            strided += 0, 0, 0, 0, 0
        else:
            strided += native.pointer(x, shape, dtype, _CPU, strided=True), *x.stride()
    layouts, kept = native.list_pointers(lists, nb, _CPU)
    return _ATTENTION.pack(
        *strided, _at(lse, B, H, N), _at(mask, B, N, dtype=torch.bool), *kept,
        B, H, N, d, block_size, layouts, TYPES[query.dtype], pruned_zero, causal,
        torch.get_num_threads(), scale,
    )  # fmt: skip


def attention_forward(query, key, value, key_padding_mask, *lists_and_settings):
    out, lse = operators.attention_outputs(query)
    mask = _contiguous(key_padding_mask)
    tensors = query, key, value, out, None, None, None, None
    offsets, columns, _, _, *settings = lists_and_settings
    packed = _attention(tensors, lse, mask, offsets, columns, None, None, *settings)
    native.call("sat_attention_forward", packed)
    return out, lse


def attention_backward(dout, query, key, value, out, lse, key_padding_mask, *lists_and_settings):
    grads = operators.attention_gradients(query)
    mask = _contiguous(key_padding_mask)
    packed = _attention((query, key, value, out, dout, *grads), lse, mask, *lists_and_settings)
    native.call("sat_attention_backward", packed)
    return grads


def _contiguous(key_padding_mask: Tensor | None) -> Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous()


def _log2(lse: Tensor | None) -> Tensor | None:
    """Of callers' lse, as kernels keep it."""
    if lse is None:
        return None
    lse = lse.float() / math.log(2)
    return lse.masked_fill_(lse == -math.inf, EMPTY)


def statistics_forward(
    query, key, key_padding_mask, row_weights, lse, mean, block_size, scale, groups, accumulate,
    mean_weight,
):  # fmt: skip
    B, H, N, d = query.shape
    nb, width = N // block_size, _padded(d)
    query, key = operators.pad_head_dim(width, query, key)
    if mean is not None and not accumulate:
        mean.zero_()
    # sums over the heads of each group
    pooled = query.new_empty(groups, nb, nb, dtype=torch.float64)
    real = query.new_zeros(groups, nb, nb, dtype=torch.float64)
    squares = query.new_empty(groups, nb, dtype=torch.float64)
    mask, lse = _contiguous(key_padding_mask), _log2(lse)
    packed = _STATISTICS.pack(
        *_tensor(query, query), *_tensor(key, query), _at(mask, B, N, dtype=torch.bool),
        _at(mean, groups, N, N), _at(pooled, groups, nb, nb, dtype=torch.float64),
        _at(squares, groups, nb, dtype=torch.float64), _at(row_weights, B, N),
        _at(real, groups, nb, nb, dtype=torch.float64), _at(lse, B, H, N),
        B, H, N, width, block_size, groups, TYPES[query.dtype], torch.get_num_threads(),
        scale, mean_weight,
    )  # fmt: skip
    native.call("sat_attention_statistics", packed)
    pooled_mean, pooled_real = ((x.sum(0) / (B * H)).float() for x in (pooled, real))
    return pooled_mean, squares.sum() / (B * H * nb * nb), pooled_real


# ---- the rest of a layer -----------------------------------------------------------------


def _drop(p: float, seed: int, step: int, first_example: int, *rest) -> tuple:
    """threshold, scale, site key, first example, as the structs have them."""
    threshold, site = dropout_threshold(p), rest[-1]
    if threshold == 0:
        return 0, 1.0, 0, 0
    key = DropoutKey(seed, step, first_example)
    return threshold, dropout_scale(p), site_key(key, site), first_example


def _norm(x, types, weight, bias, eps, drop) -> bytes:
    B, N, E = x.shape
    return _NORM.pack(
        B * N, N, E, types, _at(weight, E), _at(bias, E), eps, *drop, torch.get_num_threads()
    )


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float().contiguous() for x in tensors)


def _norm_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Space for the sums of pieces of the tokens, and for dweight and dbias."""
    B, N, E = x.shape
    return _fp32(-(-B * N // PIECE), 2, E), _fp32(2, E)


def _dense_grads(y: Tensor, dy: Tensor | None, dnormed: Tensor | None, dtype: torch.dtype):
    """The two incoming gradients, contiguous; that of y may be missing (the last layer's is)."""
    dy = None if dy is None else dy.contiguous()
    dnormed = torch.zeros_like(y, dtype=dtype) if dnormed is None else dnormed.contiguous()
    return dy, dnormed


def embed_norm_forward(ids, words, positions, weight, bias, eps, *drop_and_dtype):
    *drop, norm_dtype = drop_and_dtype
    ids = ids.to(torch.int64).contiguous()  # int32 is as good
    words, positions = words.contiguous(), positions.contiguous()
    wide_weight, wide_bias = _widened(weight, bias)
    x = words.new_empty(*ids.shape, words.shape[1])
    normed = torch.empty_like(x, dtype=norm_dtype)
    (B, N, E), V, stats = x.shape, len(words), _fp32(*ids.shape, 2)
    types = NORM_TYPES[words.dtype, norm_dtype, norm_dtype]
    native.call(
        "sat_embed_norm", _norm(x, types, wide_weight, wide_bias, eps, _drop(*drop)),
        _at(ids, B, N, dtype=torch.int64), V, _at(words, V, E, dtype=x.dtype),
        _at(positions, N, E, dtype=x.dtype), _rows(x, x), _rows(normed, x, norm_dtype),
        _at(stats, B, N, 2),
    )  # fmt: skip
    return x, normed, stats


def embed_norm_backward(
    dx, dnormed, ids, x, stats, words, positions, weight, bias, eps, *drop_and_dtype
):
    *drop, norm_dtype = drop_and_dtype
    ids = ids.to(torch.int64).contiguous()
    (B, N, E), V = x.shape, len(words)
    dx, dnormed = _dense_grads(x, dx, dnormed, norm_dtype)
    (wide_weight,) = _widened(weight)
    dsum, dwords, dpositions = _fp32(B, N, E), _fp32(V, E), _fp32(N, E)
    pieces, dparameters = _norm_gradients(x)
    types = NORM_TYPES[x.dtype, norm_dtype, norm_dtype]
    native.call(
        "sat_embed_norm_backward", _norm(x, types, wide_weight, None, eps, _drop(*drop)),
        _at(ids, B, N, dtype=torch.int64), V, _rows(x, x), _at(stats, B, N, 2), _rows(dx, x),
        _rows(dnormed, x, norm_dtype), _at(dsum, B, N, E), _at(pieces, *pieces.shape),
        _at(dparameters, 2, E), _at(dwords, V, E), _at(dpositions, N, E),
    )  # fmt: skip
    dweight, dbias = dparameters[0].to(weight.dtype), dparameters[1].to(bias.dtype)
    return dwords.to(x.dtype), dpositions.to(x.dtype), dweight, dbias


def add_norm_forward(x, branch, weight, bias, eps, *drop_and_dtype):
    *drop, norm_dtype = drop_and_dtype
    x, branch = x.contiguous(), branch.contiguous()
    wide_weight, wide_bias = _widened(weight, bias)
    y, normed = torch.empty_like(x), torch.empty_like(x, dtype=norm_dtype)
    stats = _fp32(*x.shape[:2], 2)
    types = NORM_TYPES[x.dtype, branch.dtype, norm_dtype]
    native.call(
        "sat_add_norm", _norm(x, types, wide_weight, wide_bias, eps, _drop(*drop)), _rows(x, x),
        _rows(branch, x, branch.dtype), _rows(y, x), _rows(normed, x, norm_dtype),
        _at(stats, *x.shape[:2], 2),
    )  # fmt: skip
    return y, normed, stats


def add_norm_backward(dy, dnormed, y, stats, weight, bias, eps, *drop_and_dtype):
    *drop, norm_dtype = drop_and_dtype
    dy, dnormed = _dense_grads(y, dy, dnormed, norm_dtype)
    dx, dbranch = torch.empty_like(y), torch.empty_like(y, dtype=norm_dtype)
    (wide_weight,) = _widened(weight)
    pieces, dparameters = _norm_gradients(y)
    types = NORM_TYPES[y.dtype, norm_dtype, norm_dtype]
    native.call(
        "sat_add_norm_backward", _norm(y, types, wide_weight, None, eps, _drop(*drop)),
        _rows(y, y), _at(stats, *y.shape[:2], 2), _rows(dy, y), _rows(dnormed, y, norm_dtype),
        _rows(dx, y), _rows(dbranch, y, norm_dtype), _at(pieces, *pieces.shape),
        _at(dparameters, 2, y.shape[2]),
    )  # fmt: skip
    dweight, dbias = dparameters[0].to(weight.dtype), dparameters[1].to(bias.dtype)
    return dx, dbranch, dweight, dbias


def gelu_forward(x, *drop):
    return _gelu(x, None, drop)


def gelu_backward(dout, x, *drop):
    return _gelu(x, dout.contiguous(), drop)


def _gelu(x: Tensor, grad: Tensor | None, drop) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        size, threads = x.numel() // x.shape[0], torch.get_num_threads()
        packed = _GELU.pack(x.shape[0], size, TYPES[x.dtype], *_drop(*drop), threads)
        native.call("sat_gelu", packed, _rows(x, x), _rows(grad, x), _rows(out, x))
    return out


def masked_mean_forward(x, mask, dtype):
    out = _fp32(x.shape[0], x.shape[2])
    _mean("sat_mean", mask, x.contiguous(), out, backward=False)
    return out


def masked_mean_backward(dmean, mask, dtype):
    dx = dmean.new_empty(*mask.shape, dmean.shape[1], dtype=dtype)
    _mean("sat_mean_backward", mask, dx, dmean.contiguous(), backward=True)
    return dx


def _mean(function: str, mask: Tensor, tokens: Tensor, mean: Tensor, backward: bool) -> None:
    (B, N, E), mask = tokens.shape, mask.contiguous()
    real, threads = _at(mask, B, N, dtype=torch.bool), torch.get_num_threads()
    both = _rows(tokens, tokens), _at(mean, B, E)
    packed = _MEAN.pack(B, N, E, TYPES[tokens.dtype], real, threads)
    native.call(function, packed, *(both[::-1] if backward else both))


def _parameter_gradients(rows: int, parameters) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Space for the pieces' sums and for their total; the total as gradients of each parameter."""
    sizes = [parameter.numel() for parameter in parameters]
    pieces, flat = _fp32(-(-rows // LAYER_PIECE), sum(sizes)), _fp32(sum(sizes))
    parts = flat.split(sizes)
    return pieces, flat, [q.view_as(p) for q, p in zip(parts, parameters, strict=True)]


def _project(x, parameters, active, block_size) -> bytes:
    B, N, E = x.shape
    addresses = [_at(parameter, *parameter.shape) for parameter in parameters]
    return _PROJECT.pack(
        TYPES[x.dtype], B * N, N, E, len(parameters[0]), *addresses[::2], *addresses[1::2],
        _at(active, N // block_size, dtype=torch.uint8), block_size, torch.get_num_threads(),
    )  # fmt: skip


def project_forward(x, *rest):
    *parameters, active, block_size, heads = rest
    x, parameters = x.contiguous(), [parameter.contiguous() for parameter in parameters]
    (B, N, _), K = x.shape, len(parameters[0])
    parts = [x.new_empty(B, N, heads, K // heads) for _ in range(3)]
    pointers = (_at(part, B, N, heads, K // heads, dtype=x.dtype) for part in parts)
    native.call("sat_project", _project(x, parameters, active, block_size), _rows(x, x), *pointers)
    return tuple(part.transpose(1, 2) for part in parts)


def project_backward(dq, dk, dv, x, *rest):
    *parameters, active, block_size, heads = rest
    x, parameters = x.contiguous(), [parameter.contiguous() for parameter in parameters]
    (B, N, _), K = x.shape, len(parameters[0])
    shape, dx = (B, N, heads, K // heads), torch.empty_like(x)
    dparts = [  # no copy of what attention gives
        x.new_zeros(shape) if grad is None else grad.transpose(1, 2).contiguous()
        for grad in (dq, dk, dv)
    ]
    pieces, flat, gradients = _parameter_gradients(B * N, parameters)
    native.call(
        "sat_project_backward", _project(x, parameters, active, block_size), _rows(x, x),
        *(_at(part, *shape, dtype=x.dtype) for part in dparts), _rows(dx, x),
        _at(pieces, *pieces.shape), _at(flat, *flat.shape),
    )  # fmt: skip
    return dx, *gradients


def _layer(x, attended, parameters, active, block_size, eps, p, seed, step, first, *rest):
    (B, N, E), K, hidden = x.shape, attended.shape[2], len(parameters[4])
    drops = [_drop(p, seed, step, first, site) for site in rest[-1]]
    threshold, scale, _, first_example = drops[0]
    return _LAYER.pack(
        TYPES[attended.dtype], B * N, N, E, K, hidden,
        *(_at(parameter, *parameter.shape) for parameter in parameters),
        _at(active, N // block_size, dtype=torch.uint8), block_size, eps, threshold, scale,
        *(drop[2] for drop in drops), first_example, torch.get_num_threads(),
    )  # fmt: skip


def layer_forward(x, attended, *rest):
    parameters = [parameter.contiguous() for parameter in rest[:10]]
    x, attended = x.contiguous(), attended.contiguous()
    narrow, tokens, hidden = attended.dtype, x.shape[:2], len(parameters[4])
    y, z, normed = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=narrow)
    h, stats = attended.new_empty(*tokens, hidden), _fp32(*tokens, 4)
    native.call(
        "sat_layer_forward", _layer(x, attended, parameters, *rest[10:]), _rows(x, x),
        _rows(attended, attended), _rows(y, x), _at(h, *tokens, hidden, dtype=narrow),
        _rows(z, x), _rows(normed, x, narrow), _at(stats, *tokens, 4),
    )  # fmt: skip
    return z, normed, y, h, stats


def layer_backward(dz, dnormed, y, attended, *rest):
    parameters, (h, z, stats) = [q.contiguous() for q in rest[:10]], rest[10:13]
    attended, narrow, tokens = attended.contiguous(), attended.dtype, y.shape[:2]
    dz, dnormed = _dense_grads(y, dz, dnormed, narrow)
    dx, dattended = torch.empty_like(y), torch.empty_like(attended)
    pieces, flat, gradients = _parameter_gradients(y.shape[0] * y.shape[1], parameters)
    native.call(
        "sat_layer_backward", _layer(y, attended, parameters, *rest[13:]),
        _rows(attended, attended), _rows(y, y),
        _at(h, *tokens, len(parameters[4]), dtype=narrow), _rows(z, y),
        _at(stats, *tokens, 4), _rows(dz, y), _rows(dnormed, y, narrow), _rows(dx, y),
        _rows(dattended, attended), _at(pieces, *pieces.shape), _at(flat, *flat.shape),
    )  # fmt: skip
    return dx, dattended, *gradients
