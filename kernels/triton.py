"""Attention in Triton: the backend `triton`, for GPUs where csrc/cuda is not built.

Shape letters: B batch, H heads, N padded length, d head_dim, D the power of two that d is padded
to, bs block_size, nb = N / bs, T side of a tile of scores.

The algorithm is that of csrc/cuda/attention_cuda.cuh, one program where that has a thread block:
T rows of one head walk the kept blocks of their row (or T keys those of their column), scores are
kept in base 2, the backward pass recomputes p = 2^(s scale log2(e) - lse), once by rows (dq) and
once by columns (dk, dv). No atomics: the same bits every time.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels import operators, reference
from kernels.backends import NEEDS_A_KERNEL, Call
from kernels.dropout import DropoutKey, dropout_scale, dropout_threshold, key_words
from kernels.statistics import from_pieces

name = "triton"

DEVICE = "cuda"  # the tests run the same kernels on CPU tensors, in Triton's interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULE = 16  # the smallest tile
MAX_HEAD_DIM = 128
OLDEST = (8, 0)  # compute capability: products of bf16 and tf32


def can_run(call: Call) -> str | None:
    if (reason := _reason_unavailable()) or call.device is None:
        return reason
    if call.device.type != DEVICE:
        return f"the tensors are on {call.device}"
    if call.device.type == "cuda" and _capability(call.device.index or 0) < OLDEST:
        return f"the GPU is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    if call.op is None:
        return None
    if call.dtypes[0] not in DTYPES:
        return f"dtype {call.dtypes[0]}, it computes float32, bfloat16 and float16"
    if call.op not in NEEDS_A_KERNEL:
        return _reason_against_layer(call)
    if call.sizes[0] > MAX_HEAD_DIM:
        return f"head_dim {call.sizes[0]}, it goes up to {MAX_HEAD_DIM}"
    if (size := call.block_size or call.length) % GRANULE:
        what = "block_size" if call.block_size else "length"
        return f"{what} {size}, it needs a multiple of {GRANULE}"
    return None


def _reason_against_layer(call: Call) -> str | None:
    layer, sizes, weights = _layer(), call.sizes, 0
    if call.op == "dropout_add_layer_norm":
        stream, branch, _ = call.dtypes
        if stream != torch.promote_types(stream, branch):
            return f"a branch of {branch} beside {stream}"
    if call.op == "embedding_dropout_layer_norm" and (
        call.words > layer.MAX_WORDS or sizes[0] > layer.MAX_EMBEDDING
    ):
        return f"{call.words} words of {sizes[0]}"
    if call.op in ("attention_projections", "attention_output_feed_forward"):
        operand, product, *norm = call.dtypes[:3]
        projections = call.op == "attention_projections"
        if operand not in layer.PRODUCTS:
            return f"products of {operand}, which do not fit"
        if operand != product or (not projections and [operand] != norm):
            return f"torch would multiply {operand} in {product}"
        E, K = sizes[:2]
        weights = 3 * E * K if projections else E * K + 2 * E * sizes[2]
    if not layer.fits(*sizes) or weights > layer.MAX_WEIGHTS:
        return f"rows of {sizes}"
    return None


@torch.compiler.assume_constant_result
def _reason_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


@torch.compiler.assume_constant_result
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _kernels() -> Any:
    """triton_attention.py, which imports triton."""
    return importlib.import_module("kernels.triton_attention")


def _layer() -> Any:
    """triton_layer.py, likewise."""
    return importlib.import_module("kernels.triton_layer")


# ---- attention --------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, *settings: Any
) -> tuple[Tensor, Tensor | None]:
    """settings: as in reference.attention."""
    layout, key_padding_mask, _, _, return_lse = settings
    if layout is None and query.is_cuda and key_padding_mask is None and not return_lse:
        return reference.attention(query, key, value, *settings)  # torch's is hard to beat
    _, _, N, d = query.shape
    size = layout.block_size if layout else N
    query, key, value = _same_strides(query, key, value)
    return operators.attention(name, _padded(d), size, query, key, value, *settings)


def _padded(head_dim: int) -> int:
    return max(GRANULE, 1 << (head_dim - 1).bit_length())


def _same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies, unless all have the same strides and rows without gaps."""
    strides = {tensor.stride() for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(3) == 1:
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def attention_forward(query, key, value, key_padding_mask, *lists_and_settings):
    *lists, block_size, scale, pruned_zero, causal = lists_and_settings
    out, lse = operators.attention_outputs(query)
    settings = lists, block_size, scale, pruned_zero, causal
    _kernels().forward(query, key, value, out, lse, lse, key_padding_mask, *settings)
    return out, lse


def attention_backward(dout, query, key, value, out, lse, key_padding_mask, *lists_and_settings):
    *lists, block_size, scale, _, causal = lists_and_settings
    grads = operators.attention_gradients(query)
    if dout.stride() != out.stride():
        dout = torch.empty_like(out).copy_(dout)
    settings = key_padding_mask, lists, block_size, scale, causal
    _kernels().backward(dout, query, key, value, out, lse, *grads, *settings)
    return grads


def statistics_forward(
    query, key, key_padding_mask, row_weights, lse, mean, block_size, scale, groups, accumulate,
    mean_weight,
):  # fmt: skip
    B, H, N, d = query.shape
    query, key = _same_strides(*operators.pad_head_dim(_padded(d), query, key))
    pieces = query.new_empty(B, H, N // GRANULE, N // GRANULE, dtype=torch.float32)
    factor = mean_weight / (B // groups * H)
    _kernels().statistics(
        query, key, key_padding_mask, lse, mean, pieces, scale, groups, accumulate, factor
    )
    return from_pieces(pieces, GRANULE, block_size, row_weights)


# ---- the rest of a layer, with derivatives of its own -----------------------------------------


def embed_norm(ids, words, positions, weight, bias, eps, p, *rest):
    *key, site, norm_dtype = rest
    drop, tensors = _drop(words, p, *key), (ids, words, positions, weight, bias)
    return _layer().EmbedNorm.apply(*tensors, eps, drop, site, norm_dtype)


def project(x, *rest):
    *parameters, _, _, heads = rest
    return _layer().Project.apply(x, heads, *parameters)


def layer(x, attended, *rest):
    parameters, (_, _, eps, p, *key, sites) = rest[:10], rest[10:]
    return _layer().Layer.apply(x, attended, _drop(x, p, *key), tuple(sites), eps, *parameters)


def add_norm(x, branch, weight, bias, eps, p, *rest):
    *key, site, norm_dtype = rest
    drop = _drop(x, p, *key)
    return _layer().AddNorm.apply(x, branch, weight, bias, eps, drop, site, norm_dtype)


def gelu(x, p, *rest):
    *key, site = rest
    return _layer().GeluDropout.apply(x, _drop(x, p, *key), site) if x.numel() else x.clone()


def masked_mean(x, mask, _):
    return _layer().MaskedMean.apply(x, mask)


def _drop(x: Tensor, p: float, *key: Any) -> Any:
    threshold = dropout_threshold(p)
    words = key_words(DropoutKey(*key), x.device) if threshold else x
    return _layer().Drop(words, threshold, dropout_scale(p))
