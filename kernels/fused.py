"""The step's operations beside attention: dropout with its neighbours, layer norm, GELU, linear.

Once attention is sparse, most of a training step on a CPU is spent here. Each function below is
one pass over memory where plain PyTorch makes three to six. The plain PyTorch versions (backend
"reference", any device) define what is right; the compiled ones (backend "cpu") give the same
masks bit by bit and the same numbers up to rounding.

Dropout is counter-based. Whether an element is kept is a pure function of (seed, step, site,
position of the example in the global batch, index of the element within the example): no mask is
stored, none depends on threads, micro-batches or devices, and a resumed run draws the same ones.

Shape letters: B examples, N tokens, E features, V words.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.layout import BlockLayout

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's finaliser (Steele et al. 2014)
_MIX32 = (0x7FEB352D, 0x846CA68B)  # "lowbias32", C. Wellons, hash-prospector
_LANES = 16  # 32-bit words of a hash block; each serves two elements, _LANES apart


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout mask depends on beside its site and the element.

    seed: the run's; step: completed steps of the run; first_example: position of this
    (micro-)batch's first example in the global batch.
    """

    seed: int
    step: int
    first_example: int
    # int64 [3], the same on a GPU, whose kernels read it: a captured graph draws the masks of what
    # is written there. None: uploaded when first asked for.
    words: Tensor | None = field(default=None, compare=False)


# ---- the generator -------------------------------------------------------------------


def dropout_threshold(p: float) -> int:
    """p in units of 2**-16, rounded: an element whose 16 random bits lie below it is dropped."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    threshold = round(p * 65536)
    if threshold == 65536:
        raise ValueError(f"dropout probability {p} leaves nothing at a resolution of 2**-16")
    return threshold


def dropout_scale(p: float) -> float:
    """1 / keep probability as realised, 65536 / (65536 - threshold): the kept elements' factor."""
    return 65536 / (65536 - dropout_threshold(p))


def _mix64(word: int) -> int:
    word ^= word >> 30
    word = word * _MIX64[0] & _WORD
    word ^= word >> 27
    word = word * _MIX64[1] & _WORD
    return word ^ word >> 31


def site_key(key: DropoutKey, site: int) -> int:
    """64 bits for (seed, step, site); example i of the global batch adds i before mixing."""
    word = 0
    for part in (key.seed, key.step, site):
        word = _mix64((word + part + _GOLDEN) & _WORD)
    return word


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def _example_keys(key: DropoutKey, site: int, count: int, device: torch.device) -> Tensor:
    """int32 [count, 2]: two 32-bit keys for each example."""
    first = _signed((site_key(key, site) + key.first_example + _GOLDEN) & _WORD, 64)
    word = torch.arange(count, dtype=torch.int64, device=device).add_(first)
    # torch has no logical shift of signed words: shift, then mask the sign's copies away.
    word ^= (word >> 30) & ((1 << 34) - 1)
    word *= _signed(_MIX64[0], 64)
    word ^= (word >> 27) & ((1 << 37) - 1)
    word *= _signed(_MIX64[1], 64)
    word ^= (word >> 31) & ((1 << 33) - 1)
    return word.view(torch.int32).view(count, 2)  # little-endian: the low half first


def keep_mask(key: DropoutKey, site: int, shape: torch.Size, p: float, device) -> Tensor:
    """bool, True where an element of [B, ...] is kept.

    Elements 32 b + j and 32 b + 16 + j (j < 16) of an example take the low and high 16 bits of one
    32-bit word, lowbias32(16 b + j + key 0) with key 1 added halfway. Two vectors of any width up
    to 16 lanes come out of one hash that way without a shuffle. (Thanks to key 1 two examples
    whose key 0 lie close together still share nothing.)
    """
    if key.words is not None:
        raise RuntimeError("a dropout in plain PyTorch would repeat its mask")
    count, size = shape[0], shape[1:].numel()
    keys = _example_keys(key, site, count, device)
    blocks = -(-size // (2 * _LANES))
    word = torch.arange(blocks * _LANES, dtype=torch.int32, device=device) + keys[:, :1]
    word ^= (word >> 16) & 0xFFFF
    word *= _MIX32[0]
    word ^= keys[:, 1:]
    word ^= (word >> 15) & 0x1FFFF
    word *= _signed(_MIX32[1], 32)
    word ^= (word >> 16) & 0xFFFF
    word = word.view(count, blocks, 1, _LANES)
    threshold = dropout_threshold(p)
    keep = torch.cat([word & 0xFFFF, (word >> 16) & 0xFFFF], dim=2) >= threshold
    return keep.view(count, -1)[:, :size].reshape(shape)


# ---- reference ---------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """Half precisions are computed in fp32 and rounded once, at the end of each operation."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _dropout(x: Tensor, p: float, key: DropoutKey | None, site: int) -> Tensor:
    if key is None or dropout_threshold(p) == 0:
        return x
    keep = keep_mask(key, site, x.shape, p, x.device)
    return torch.where(keep, x * dropout_scale(p), 0.0)


def _norm_dtype(x: Tensor) -> torch.dtype:
    """Under autocast the norm comes out in autocast's type: only products read it."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = _norm_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        wide = _wide(x)
        normed = F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
        return normed.to(dtype)


# ---- cpu: csrc/cpu/abi.h ------------------------------------------------------------

# Types of (residual stream, branch, norm's output) that are compiled: SatTypes.
_TYPES = {
    (torch.float32, torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16, torch.bfloat16): 1,  # autocast
    (torch.bfloat16, torch.bfloat16, torch.bfloat16): 2,
}
_TYPE = {torch.float32: 0, torch.bfloat16: 1}  # SatType
_MASK_BLOCK = 2 * _LANES
_MAX_FEATURES = 4096
_LAYER_PIECE = 1024  # SAT_LAYER_PIECE
_PIECE = 256  # SAT_PIECE: tokens whose parameter gradients are summed in one go


class _Norm(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("types", ctypes.c_int),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("site_key", ctypes.c_uint64),
        ("first_example", ctypes.c_int64),
        ("threads", ctypes.c_int),
    ]


class _Gelu(ctypes.Structure):
    _fields_ = [
        ("examples", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("site_key", ctypes.c_uint64),
        ("first_example", ctypes.c_int64),
        ("threads", ctypes.c_int),
    ]


class _Mean(ctypes.Structure):
    _fields_ = [
        *((size, ctypes.c_int64) for size in ("examples", "length", "features")),
        ("type", ctypes.c_int),
        ("mask", ctypes.c_void_p),
        ("threads", ctypes.c_int),
    ]


_PARAMETERS = ("output", "norm", "expand", "contract", "next_norm")  # of a layer, weight and bias


class _Layer(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        *((size, ctypes.c_int64) for size in ("rows", "length", "features", "attended", "hidden")),
        *((f"{name}_{part}", ctypes.c_void_p) for name in _PARAMETERS for part in "wb"),
        ("active", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("site_key", ctypes.c_uint64 * 3),
        ("first_example", ctypes.c_int64),
        ("threads", ctypes.c_int),
    ]


class _Projections(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        *((size, ctypes.c_int64) for size in ("rows", "length", "features", "attended")),
        ("weight", ctypes.c_void_p * 3),
        ("bias", ctypes.c_void_p * 3),
        ("active", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("threads", ctypes.c_int),
    ]


def _compiled_widths(*widths: int) -> bool:
    return all(width % _MASK_BLOCK == 0 and 0 < width <= _MAX_FEATURES for width in widths)


def _drop(p: float, key: DropoutKey | None, site: int) -> tuple[int, float, int, int]:
    """threshold, scale, site key, first example, as the structures above have them."""
    threshold = dropout_threshold(p)
    if key is None or threshold == 0:
        return 0, 1.0, 0, 0
    return threshold, dropout_scale(p), site_key(key, site), key.first_example


def _refuse_twice() -> None:
    """First line of each backward. (once_differentiable would let a constant gradient through.)"""
    if torch.is_grad_enabled():
        raise RuntimeError("the compiled operations cannot be differentiated twice (create_graph)")


_CPU = torch.device("cpu")
_FP32 = torch.float32


def _at(x: Tensor | None, *shape: int, dtype: torch.dtype = _FP32) -> int | None:
    """Address of contiguous x, checked; None for None."""
    return None if x is None else native.pointer(x, shape, dtype, _CPU)


def _fp32(*shape: int) -> Tensor:
    """Space for numbers that compiled code writes, whatever torch's default dtype and device."""
    return torch.empty(shape, dtype=_FP32, device=_CPU)


def _norm_call(x: Tensor, types: int, weight: Tensor, bias: Tensor | None, eps: float, drop):
    rows, length, width = x.shape[0] * x.shape[1], x.shape[1], x.shape[2]
    return _Norm(
        rows, length, width, types, _at(weight, width), _at(bias, width), eps, *drop,
        torch.get_num_threads(),
    )  # fmt: skip


class _AddNorm(torch.autograd.Function):
    """dropout_add_layer_norm; keeps y and two numbers a token."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, drop, norm_dtype):
        x, branch, wide_weight = x.contiguous(), branch.contiguous(), weight.float().contiguous()
        types = _TYPES[x.dtype, branch.dtype, norm_dtype]
        y, normed = torch.empty_like(x), torch.empty_like(x, dtype=norm_dtype)
        stats = _fp32(*x.shape[:2], 2)
        wide_bias = bias.float().contiguous()
        call = _norm_call(x, types, wide_weight, wide_bias, eps, drop)
        native.call(
            "sat_add_norm", bytes(call), _at(x, *x.shape, dtype=x.dtype),
            _at(branch, *x.shape, dtype=branch.dtype), _at(y, *x.shape, dtype=x.dtype),
            _at(normed, *x.shape, dtype=norm_dtype), _at(stats, *x.shape[:2], 2),
        )  # fmt: skip
        ctx.save_for_backward(y, stats, wide_weight)
        ctx.rest = types, branch.dtype, norm_dtype, weight.dtype, bias.dtype, eps, drop
        ctx.set_materialize_grads(False)
        return y, normed

    @staticmethod
    def backward(ctx, dy, dnormed):
        _refuse_twice()
        y, stats, weight = ctx.saved_tensors
        types, branch_dtype, norm_dtype, weight_dtype, bias_dtype, eps, drop = ctx.rest
        dy, dnormed = _grads(y, dy, dnormed, norm_dtype)
        dx, dbranch = torch.empty_like(y), torch.empty_like(y, dtype=branch_dtype)
        call = _norm_call(y, types, weight, None, eps, drop)
        pieces, dparameters = _norm_gradients(call)
        native.call(
            "sat_add_norm_backward", bytes(call), _at(y, *y.shape, dtype=y.dtype),
            _at(stats, *y.shape[:2], 2), _at(dy, *y.shape, dtype=y.dtype),
            _at(dnormed, *y.shape, dtype=norm_dtype), _at(dx, *y.shape, dtype=y.dtype),
            _at(dbranch, *y.shape, dtype=branch_dtype), _at(pieces, *pieces.shape),
            _at(dparameters, 2, call.features),
        )  # fmt: skip
        dweight, dbias = dparameters[0].to(weight_dtype), dparameters[1].to(bias_dtype)
        return dx, dbranch, dweight, dbias, None, None, None


def _norm_gradients(call: _Norm) -> tuple[Tensor, Tensor]:
    """Space for the sums of pieces of the tokens, and for dweight and dbias."""
    return _fp32(-(-call.rows // _PIECE), 2, call.features), _fp32(2, call.features)


def _grads(y: Tensor, dy: Tensor | None, dnormed: Tensor | None, norm_dtype: torch.dtype):
    """The two incoming gradients, contiguous; that of y may be missing (the last layer's is)."""
    dy = None if dy is None else dy.contiguous()
    dnormed = torch.zeros_like(y, dtype=norm_dtype) if dnormed is None else dnormed.contiguous()
    return dy, dnormed


class _EmbedNorm(torch.autograd.Function):
    """embedding_dropout_layer_norm; keeps x and two numbers a token."""

    @staticmethod
    def forward(ctx, ids, words, positions, weight, bias, eps, drop, norm_dtype):
        ids = ids.to(torch.int64).contiguous()  # int32 is as good
        words, positions = words.contiguous(), positions.contiguous()
        wide_weight, wide_bias = weight.float().contiguous(), bias.float().contiguous()
        types = _TYPES[words.dtype, norm_dtype, norm_dtype]
        x = words.new_empty(*ids.shape, words.shape[1])
        normed = torch.empty_like(x, dtype=norm_dtype)
        stats = _fp32(*ids.shape, 2)
        call = _norm_call(x, types, wide_weight, wide_bias, eps, drop)
        length, width = x.shape[1:]
        native.call(
            "sat_embed_norm", bytes(call), _at(ids, *ids.shape, dtype=torch.int64),
            len(words), _at(words, len(words), width, dtype=x.dtype),
            _at(positions, length, width, dtype=x.dtype), _at(x, *x.shape, dtype=x.dtype),
            _at(normed, *x.shape, dtype=norm_dtype), _at(stats, *ids.shape, 2),
        )  # fmt: skip
        ctx.save_for_backward(ids, x, stats, wide_weight)
        ctx.rest = types, norm_dtype, len(words), weight.dtype, bias.dtype, eps, drop
        ctx.set_materialize_grads(False)
        return x, normed

    @staticmethod
    def backward(ctx, dx, dnormed):
        _refuse_twice()
        ids, x, stats, weight = ctx.saved_tensors
        types, norm_dtype, vocabulary, weight_dtype, bias_dtype, eps, drop = ctx.rest
        dx, dnormed = _grads(x, dx, dnormed, norm_dtype)
        call = _norm_call(x, types, weight, None, eps, drop)
        dsum = torch.empty_like(x, dtype=torch.float32)
        pieces, dparameters = _norm_gradients(call)
        length, width = x.shape[1:]
        dwords = _fp32(vocabulary, width)
        dpositions = _fp32(length, width) if ctx.needs_input_grad[2] else None
        native.call(
            "sat_embed_norm_backward", bytes(call), _at(ids, *ids.shape, dtype=ids.dtype),
            vocabulary, _at(x, *x.shape, dtype=x.dtype), _at(stats, *ids.shape, 2),
            _at(dx, *x.shape, dtype=x.dtype), _at(dnormed, *x.shape, dtype=norm_dtype),
            _at(dsum, *x.shape), _at(pieces, *pieces.shape), _at(dparameters, 2, width),
            _at(dwords, vocabulary, width), _at(dpositions, length, width),
        )  # fmt: skip
        if dpositions is not None:
            dpositions = dpositions.to(x.dtype)
        dweight, dbias = dparameters[0].to(weight_dtype), dparameters[1].to(bias_dtype)
        return None, dwords.to(x.dtype), dpositions, dweight, dbias, None, None, None


class _GeluDropout(torch.autograd.Function):
    """gelu_dropout; keeps x."""

    @staticmethod
    def forward(ctx, x, drop):
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.drop = drop
        return _gelu_call(x, None, drop)

    @staticmethod
    def backward(ctx, dout):
        _refuse_twice()
        return _gelu_call(ctx.saved_tensors[0], dout.contiguous(), ctx.drop), None


def _gelu_call(x: Tensor, grad: Tensor | None, drop) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        size = x.numel() // x.shape[0]
        call = _Gelu(x.shape[0], size, _TYPE[x.dtype], *drop, torch.get_num_threads())
        tensors = (_at(tensor, *x.shape, dtype=x.dtype) for tensor in (x, grad, out))
        native.call("sat_gelu", bytes(call), *tensors)
    return out


class _MaskedMean(torch.autograd.Function):
    """masked_mean; keeps the mask."""

    @staticmethod
    def forward(ctx, x, mask):
        x, mask, ctx.dtype = x.contiguous(), mask.contiguous(), x.dtype
        ctx.save_for_backward(mask)
        out = _fp32(x.shape[0], x.shape[2])
        _mean_call("sat_mean", mask, x, out, backward=False)
        return out

    @staticmethod
    def backward(ctx, dout):
        _refuse_twice()
        dout = dout.contiguous()
        (mask,) = ctx.saved_tensors
        dx = dout.new_empty(*mask.shape, dout.shape[1], dtype=ctx.dtype)
        _mean_call("sat_mean_backward", mask, dx, dout, backward=True)
        return dx, None


def _mean_call(function: str, mask: Tensor, tokens: Tensor, mean: Tensor, backward: bool) -> None:
    B, N, E = tokens.shape
    real = _at(mask, B, N, dtype=torch.bool)
    call = _Mean(B, N, E, _TYPE[tokens.dtype], real, torch.get_num_threads())
    both = _at(tokens, B, N, E, dtype=tokens.dtype), _at(mean, B, E)
    native.call(function, bytes(call), *(both[::-1] if backward else both))


class _LayerRest(torch.autograd.Function):
    """attention_output_feed_forward; keeps y, the hidden values before GELU, 4 numbers a token."""

    @staticmethod
    def forward(ctx, x, attended, layout, p, key, sites, eps, *parameters):
        x, attended = x.contiguous(), attended.contiguous()
        parameters = tuple(parameter.contiguous() for parameter in parameters)
        rest = layout, p, key, sites, eps
        call, _keep_alive = _layer_call(x, attended, parameters, *rest)
        y, z = torch.empty_like(x), torch.empty_like(x)
        normed = torch.empty_like(x, dtype=attended.dtype)
        hidden = attended.new_empty(*x.shape[:2], call.hidden)
        stats = x.new_empty(*x.shape[:2], 4)
        narrow = attended.dtype
        native.call(
            "sat_layer_forward", bytes(call), _at(x, *x.shape),
            _at(attended, *x.shape[:2], call.attended, dtype=narrow), _at(y, *x.shape),
            _at(hidden, *x.shape[:2], call.hidden, dtype=narrow), _at(z, *x.shape),
            _at(normed, *x.shape, dtype=narrow), _at(stats, *x.shape[:2], 4),
        )  # fmt: skip
        ctx.save_for_backward(attended, y, hidden, z, stats, *parameters)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        return z, normed

    @staticmethod
    def backward(ctx, dz, dnormed):
        _refuse_twice()
        attended, y, hidden, z, stats, *parameters = ctx.saved_tensors
        dz, dnormed = _grads(y, dz, dnormed, attended.dtype)
        call, _keep_alive = _layer_call(y, attended, parameters, *ctx.rest)
        dx, dattended = torch.empty_like(y), torch.empty_like(attended)
        pieces, flat, gradients = _parameter_gradients(call.rows, parameters)
        tokens, narrow = y.shape[:2], attended.dtype
        native.call(
            "sat_layer_backward", bytes(call),
            _at(attended, *tokens, call.attended, dtype=narrow), _at(y, *y.shape),
            _at(hidden, *tokens, call.hidden, dtype=narrow), _at(z, *y.shape),
            _at(stats, *tokens, 4), _at(dz, *y.shape), _at(dnormed, *y.shape, dtype=narrow),
            _at(dx, *y.shape), _at(dattended, *tokens, call.attended, dtype=narrow),
            _at(pieces, *pieces.shape), _at(flat, *flat.shape),
        )  # fmt: skip
        return dx, dattended, None, None, None, None, None, *gradients


def _layer_call(
    x, attended, parameters, layout, p, key, sites, eps
) -> tuple[_Layer, Tensor | None]:
    drops = [_drop(p, key, site) for site in sites]
    threshold, scale, _, first_example = drops[0]
    site_keys = (ctypes.c_uint64 * 3)(*(drop[2] for drop in drops))
    batch, length, width = x.shape
    active, block_size = _active_blocks(layout)
    call = _Layer(
        _TYPE[attended.dtype], batch * length, length, width, attended.shape[2],
        len(parameters[4]), *(_at(parameter, *parameter.shape) for parameter in parameters),
        _at(active, length // block_size, dtype=torch.uint8), block_size, eps,
        threshold, scale, site_keys, first_example, torch.get_num_threads(),
    )  # fmt: skip
    return call, active


def _parameter_gradients(rows: int, parameters) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Space for the pieces' sums and for their total; the total as gradients of each parameter."""
    sizes = [parameter.numel() for parameter in parameters]
    pieces, flat = _fp32(-(-rows // _LAYER_PIECE), sum(sizes)), _fp32(sum(sizes))
    parts = flat.split(sizes)
    return pieces, flat, [q.view_as(p) for q, p in zip(parts, parameters, strict=True)]


_active: WeakKeyDictionary[BlockLayout, Tensor] = WeakKeyDictionary()


def _active_blocks(layout: BlockLayout | None) -> tuple[Tensor | None, int]:
    """uint8 [nb], and the block size: bit 0, the block's queries attend to something; bit 1, its
    keys are attended to. None without a layout: everything."""
    if layout is None:
        return None, 1
    if layout not in _active:
        queries, keys = layout.row_offsets.diff() > 0, layout.column_offsets.diff() > 0
        _active[layout] = queries.to(torch.uint8) + 2 * keys.to(torch.uint8)
    return _active[layout], layout.block_size


class _Project(torch.autograd.Function):
    """attention_projections; keeps its arguments."""

    @staticmethod
    def forward(ctx, x, heads, layout, *parameters):
        x = x.contiguous()
        parameters = tuple(parameter.contiguous() for parameter in parameters)
        call, _keep_alive = _projections_call(x, parameters, layout)
        parts = [x.new_empty(*x.shape[:2], call.attended) for _ in range(3)]
        shape = *x.shape[:2], call.attended
        pointers = (_at(part, *shape, dtype=x.dtype) for part in parts)
        native.call("sat_project", bytes(call), _at(x, *x.shape, dtype=x.dtype), *pointers)
        ctx.save_for_backward(x, *parameters)
        ctx.layout = layout
        return tuple(_split_heads(part, heads) for part in parts)

    @staticmethod
    def backward(ctx, *grads):
        _refuse_twice()
        x, *parameters = ctx.saved_tensors
        dparts = [grad.transpose(1, 2).contiguous() for grad in grads]  # [B, N, H, d], no copy
        call, _keep_alive = _projections_call(x, parameters, ctx.layout)
        dx = torch.empty_like(x)
        pieces, flat, gradients = _parameter_gradients(call.rows, parameters)
        heads = dparts[0].shape[2]
        shape = *x.shape[:2], heads, call.attended // heads
        native.call(
            "sat_project_backward", bytes(call), _at(x, *x.shape, dtype=x.dtype),
            *(_at(part, *shape, dtype=x.dtype) for part in dparts),
            _at(dx, *x.shape, dtype=x.dtype), _at(pieces, *pieces.shape), _at(flat, *flat.shape),
        )  # fmt: skip
        return dx, None, None, *gradients


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * d] -> [B, H, N, d], the same memory."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _projections_call(x, parameters, layout) -> tuple[_Projections, Tensor | None]:
    batch, length, width = x.shape
    active, block_size = _active_blocks(layout)
    triple = ctypes.c_void_p * 3
    pointers = [_at(parameter, *parameter.shape) for parameter in parameters]
    call = _Projections(
        _TYPE[x.dtype], batch * length, length, width, len(parameters[0]),
        triple(*pointers[::2]), triple(*pointers[1::2]),
        _at(active, length // block_size, dtype=torch.uint8), block_size, torch.get_num_threads(),
    )  # fmt: skip
    return call, active


# ---- triton: triton_layer.py -------------------------------------------------------


@functools.cache
def _triton_layer() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("kernels.triton_layer")


def _in_triton(backend: str, x: Tensor, *widths: int) -> Any:
    """The module whose operation runs, or None: on a GPU where Triton is installed, for widths
    that its kernels take. (Backends "cuda" and "triton" differ in attention alone.)"""
    if backend not in ("cuda", "triton") and not (backend == "auto" and x.is_cuda):
        return None
    module = _triton_layer()
    if module is None or x.device.type != module.DEVICE or not module.fits(*widths):
        return None
    return module if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else None


def _triton_products(operand: Tensor) -> bool:
    """Whether torch would multiply `operand` in its own dtype, and the kernels do so too."""
    device, module = operand.device.type, _triton_layer()
    if module is None or operand.dtype not in module.PRODUCTS:
        return False
    return not torch.is_autocast_enabled(device) or (
        operand.dtype == torch.get_autocast_dtype(device)
    )


def _triton_drop(x: Tensor, p: float, key: DropoutKey | None) -> Any:
    module = _triton_layer()
    threshold = dropout_threshold(p)
    if key is None or threshold == 0:
        return module.Drop(x, 0, 1.0)  # type: ignore[union-attr]
    return module.Drop(key_words(key, x.device), threshold, dropout_scale(p))  # type: ignore[union-attr]


def key_words(key: DropoutKey, device: torch.device) -> Tensor:
    """int64 [3] on `device`: seed, step and first example."""
    return _uploaded(key, device) if key.words is None else key.words


@functools.lru_cache(maxsize=16)
def _uploaded(key: DropoutKey, device: torch.device) -> Tensor:
    words = torch.tensor([key.seed, key.step, key.first_example])
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words


# ---- public ------------------------------------------------------------------------


def _compiled_products(operand: Tensor, rest: list[Tensor]) -> bool:
    """Whether products of `operand` with fp32 parameters are compiled: in fp32, or under autocast
    in bf16 where the CPU multiplies that."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
    if operand.dtype != dtype or any(tensor.dtype != torch.float32 for tensor in rest):
        return False
    if dtype == torch.bfloat16 and native.reason_unavailable() is None:
        return bool(native.load().sat_layer_has_bfloat())
    return dtype == torch.float32


def _check(x: Tensor, layout: BlockLayout | None = None, /, **others: Tensor | None) -> None:
    """Everything lies on x's device, and the layout covers x's tokens. ValueError if not."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, the tokens are on {x.device}")
    if layout is not None:
        layout.check(x.shape[1], x.device)


def _check_norm(width: int, norm_weight: Tensor, norm_bias: Tensor) -> None:
    found = tuple(norm_weight.shape), tuple(norm_bias.shape)
    if found != ((width,), (width,)):
        raise ValueError(f"norm_weight and norm_bias must be [{width}], got {found}")


def _use_cpu(backend: str, x: Tensor, compiled: bool) -> bool:
    """Whether the compiled operation runs; `compiled`: there is one for these types and widths.

    A named backend must be there (RuntimeError if not), but leaves shapes and types that it is not
    compiled for to plain PyTorch: unlike attention, that costs time only, never memory. "cuda" has
    no compiled version of these operations yet.
    """
    if backend not in ("auto", "reference", "cpu", "cuda", "triton"):
        raise ValueError(
            f"unknown backend {backend!r}: choose auto, cpu, cuda, triton or reference"
        )
    if backend not in ("auto", "cpu"):
        return False
    reason = native.reason_unavailable()
    if x.device.type != "cpu":
        reason = f"the tensors are on {x.device}"
    if backend == "cpu" and reason:
        raise RuntimeError(f"backend cpu: {reason}")
    return reason is None and compiled


def embedding_dropout_layer_norm(
    ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float,
    key: DropoutKey | None,
    site: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x = dropout(word_table[ids] + position_table) and its layer norm.

    Args:
        ids: int64 or int32 [B, N], each in 0 .. V - 1.
        word_table, position_table: [V, E], [N, E] of one dtype.
        norm_weight, norm_bias: [E].
        p: dropout probability, realised as a multiple of 2**-16.
        key: None (evaluation) means no dropout.
        site: names this place in the model; two places never share one.
    Returns: (x [B, N, E] in the tables' dtype, LayerNorm(x) in that, or autocast's if it is on).
    Raises: ValueError if shapes, devices or p in [0, 1) disagree; IndexError for a foreign id.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int64 or int32 [B, N], not {ids.dtype} {list(ids.shape)}")
    if word_table.dim() != 2:
        raise ValueError(f"word_table must be [V, E], not {list(word_table.shape)}")
    _check_norm(word_table.shape[1], norm_weight, norm_bias)
    _check(
        ids, word_table=word_table, position_table=position_table, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip
    if position_table.shape != (ids.shape[1], word_table.shape[1]):
        raise ValueError(
            f"position_table must be [{ids.shape[1]}, {word_table.shape[1]}] for ids "
            f"{list(ids.shape)}, got {list(position_table.shape)}"
        )
    norm_dtype = _norm_dtype(word_table)
    compiled = (
        (word_table.dtype, norm_dtype, norm_dtype) in _TYPES
        and position_table.dtype == word_table.dtype
        and _compiled_widths(word_table.shape[1])
    )
    if _use_cpu(backend, word_table, compiled):
        drop = _drop(p, key, site)
        return _EmbedNorm.apply(
            ids, word_table, position_table, norm_weight, norm_bias, eps, drop, norm_dtype
        )
    V, E = word_table.shape
    triton_layer = _in_triton(backend, word_table, E)
    if triton_layer and V <= triton_layer.MAX_WORDS and E <= triton_layer.MAX_EMBEDDING:
        return triton_layer.EmbedNorm.apply(
            ids, word_table, position_table, norm_weight, norm_bias, eps,
            _triton_drop(word_table, p, key), site, norm_dtype,
        )  # fmt: skip
    x = _wide(F.embedding(ids, word_table)) + _wide(position_table)
    x = _dropout(x, p, key, site).to(word_table.dtype)
    return x, _layer_norm(x, norm_weight, norm_bias, eps)


def dropout_add_layer_norm(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float,
    key: DropoutKey | None,
    site: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + dropout(branch) and its layer norm: one pre-norm branch ends, the next one starts.

    Args:
        x, branch: [B, N, E]; dtypes may differ (an fp32 stream with bf16 branches).
        norm_weight, norm_bias: [E]; p, key, site: as in embedding_dropout_layer_norm.
    Returns: (y in the wider of the two dtypes, LayerNorm(y) in that, or autocast's if it is on).
    Raises: ValueError if shapes disagree or p is not in [0, 1).
    """
    if x.dim() != 3 or x.shape != branch.shape:
        raise ValueError(
            f"x {list(x.shape)} and branch {list(branch.shape)} must agree and be [B, N, E]"
        )
    _check_norm(x.shape[-1], norm_weight, norm_bias)
    _check(x, branch=branch, norm_weight=norm_weight, norm_bias=norm_bias)
    norm_dtype = _norm_dtype(x)
    types = x.dtype, branch.dtype, norm_dtype
    if _use_cpu(backend, x, types in _TYPES and _compiled_widths(x.shape[-1])):
        drop = _drop(p, key, site)
        return _AddNorm.apply(x, branch, norm_weight, norm_bias, eps, drop, norm_dtype)
    triton_layer = _in_triton(backend, x, x.shape[-1])
    if triton_layer and x.dtype == torch.promote_types(x.dtype, branch.dtype):
        drop = _triton_drop(x, p, key)
        return triton_layer.AddNorm.apply(
            x, branch, norm_weight, norm_bias, eps, drop, site, norm_dtype
        )
    y = _wide(x) + _dropout(_wide(branch), p, key, site)
    y = y.to(torch.promote_types(x.dtype, branch.dtype))
    return y, _layer_norm(y, norm_weight, norm_bias, eps)


def gelu_dropout(
    x: Tensor, *, p: float, key: DropoutKey | None, site: int, backend: str = "auto"
) -> Tensor:
    """dropout(gelu(x)), gelu(x) = x * Phi(x) with the exact normal distribution (erf).

    x: [B, ...]; p, key, site: as in embedding_dropout_layer_norm. Returns x's shape and dtype.
    """
    if _use_cpu(backend, x, x.dtype in _TYPE):
        return _GeluDropout.apply(x, _drop(p, key, site))
    if x.numel() and (triton_layer := _in_triton(backend, x)):
        return triton_layer.GeluDropout.apply(x, _triton_drop(x, p, key), site)
    return _dropout(F.gelu(_wide(x)), p, key, site).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean over the tokens of each example; those with mask False count as zero.

    x: [B, N, E]; mask: bool [B, N]. Returns [B, E] fp32 (fp64 for fp64).
    """
    if x.dim() != 3 or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"x must be [B, N, E] and mask bool [B, N], not {list(x.shape)} and {mask.dtype} "
            f"{list(mask.shape)}"
        )
    _check(x, mask=mask)
    if _use_cpu(backend, x, x.dtype in _TYPE and _compiled_widths(x.shape[-1])):
        return _MaskedMean.apply(x, mask)
    if triton_layer := _in_triton(backend, x, x.shape[-1]):
        return triton_layer.MaskedMean.apply(x, mask)
    with torch.autocast(x.device.type, enabled=False):
        # as a product: one pass over x, forward and backward
        weights = mask.unsqueeze(1).to(_wide(x).dtype)
        return (weights @ _wide(x)).squeeze(1) / x.shape[1]


def attention_projections(
    x: Tensor,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    *,
    heads: int,
    layout: BlockLayout | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three linear maps before an attention, their columns split into heads.

    Args:
        x: [B, N, E]; query, key, value: weight [H * d, E] and bias [H * d] of each.
        layout: of the attention that follows. What it never reads (queries without an active
            block, keys and values of blocks that nobody attends to) may be left out: zeros.
    Returns: query, key, value [B, H, N, d]; in memory [B, N, H, d].
    Raises: ValueError if shapes disagree.
    """
    parameters = [*query, *key, *value]
    E, K = x.shape[-1], len(query[0])
    found = [tuple(parameter.shape) for parameter in parameters]
    if x.dim() != 3 or found != [(K, E), (K,)] * 3 or K % heads:
        raise ValueError(
            f"x {list(x.shape)} and {heads} heads need three weights [heads * head_dim, {E}] and "
            f"their biases, got {found}"
        )
    _check(x, layout, **{f"parameter {i}": q for i, q in enumerate(parameters)})
    if _use_cpu(backend, x, _compiled_products(x, parameters) and _compiled_widths(E, K)):
        return _Project.apply(x, heads, layout, *parameters)
    triton_layer = _in_triton(backend, x, E, K)
    if triton_layer and _triton_products(x) and 3 * K * E <= triton_layer.MAX_WEIGHTS:
        return triton_layer.Project.apply(x, heads, *parameters)
    # one product; the attention kernels read the strided parts without a copy
    weight, bias = torch.cat(parameters[::2]), torch.cat(parameters[1::2])
    parts = linear(x, weight, bias, backend=backend).view(*x.shape[:2], 3, heads, K // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_output_feed_forward(
    x: Tensor,
    attended: Tensor,
    output: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    expand: tuple[Tensor, Tensor],
    contract: tuple[Tensor, Tensor],
    next_norm: tuple[Tensor, Tensor],
    *,
    p: float,
    key: DropoutKey | None,
    sites: tuple[int, int, int],
    layout: BlockLayout | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What stands between two attentions: output projection and feed-forward block.

        y = x + dropout(linear(attended, *output))
        hidden = dropout(gelu(linear(LayerNorm(y, *norm), *expand)))
        z = y + dropout(linear(hidden, *contract))

    Args:
        x: [B, N, E], the residual stream; attended: [B, N, K], the heads' values side by side.
        output, norm, expand, contract, next_norm: weight and bias of each; [E, K], [E], [F, E],
            [E, F], [E].
        p, key: as in embedding_dropout_layer_norm; sites: of the three dropouts, in order.
        layout: of the attention; `attended` is zero where it leaves a query without a block, so
            products with those rows are left out.
    Returns: (z, LayerNorm(z, *next_norm)), dtypes as dropout_add_layer_norm gives them.
    Raises: ValueError if shapes disagree or p is not in [0, 1).
    """
    parameters = [*output, *norm, *expand, *contract, *next_norm]
    E, K, hidden = x.shape[-1], attended.shape[-1], len(expand[0])
    expected = [(E, K), (E,), (E,), (E,), (hidden, E), (hidden,), (E, hidden), (E,), (E,), (E,)]
    found = [tuple(parameter.shape) for parameter in parameters]
    if x.dim() != 3 or found != expected or attended.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"x {list(x.shape)} and attended {list(attended.shape)} need parameters of shapes "
            f"{expected}, got {found}"
        )
    _check(x, layout, attended=attended, **{f"parameter {i}": q for i, q in enumerate(parameters)})
    compiled = _compiled_products(attended, [x, *parameters]) and _compiled_widths(E, K, hidden)
    if _use_cpu(backend, x, compiled):  # else the compiled parts one after the other
        return _LayerRest.apply(x, attended, layout, p, key, sites, eps, *parameters)
    triton_layer = _in_triton(backend, x, E, K, hidden)
    if (
        triton_layer
        and _triton_products(attended)
        and _norm_dtype(x) == attended.dtype
        and E * K + 2 * E * hidden <= triton_layer.MAX_WEIGHTS
    ):
        drop = _triton_drop(x, p, key)
        return triton_layer.Layer.apply(x, attended, drop, sites, eps, *parameters)
    rest: dict[str, Any] = {"p": p, "key": key, "backend": backend}
    branch = linear(attended, *output, backend=backend)
    y, normed = dropout_add_layer_norm(x, branch, *norm, site=sites[0], eps=eps, **rest)
    wide = linear(normed, *expand, backend=backend)
    branch = linear(gelu_dropout(wide, site=sites[1], **rest), *contract, backend=backend)
    return dropout_add_layer_norm(y, branch, *next_norm, site=sites[2], eps=eps, **rest)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto") -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear (autocast included).

    x: [..., E]; weight: [O, E]; bias: [O] or None. Returns [..., O]. Every backend uses torch's
    product: in fp32 MKL's reaches 93 % of what the machine can do at the model's sizes. The one
    exception is bf16 on a CPU that cannot multiply it: PyTorch would take a hundred times longer
    than in fp32, so the product is taken in fp32 and rounded once.
    """
    if x.device.type == "cpu" and backend != "reference" and not _multiplies_bf16():
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                # rounded to bf16 as autocast would, then widened
                bias = None if bias is None else bias.to(dtype).float()
                return F.linear(x.to(dtype).float(), weight.to(dtype).float(), bias).to(dtype)
    return F.linear(x, weight, bias)


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
