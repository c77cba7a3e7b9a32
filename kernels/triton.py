"""Attention in Triton: the backend `triton`, for GPUs where csrc/cuda is not built.

Shape letters: B batch, H heads, N padded length, d head_dim, D the power of two that d is padded
to, bs block_size, nb = N / bs, T side of a tile of scores.

The algorithm is that of csrc/cuda/attention_cuda.cuh, one program where that has a thread block:
T rows of one head walk the kept blocks of their row (or T keys those of their column), scores are
kept in base 2, the backward pass recomputes p = 2^(s scale log2(e) - lse), once by rows (dq) and
once by columns (dk, dv). No atomics: the same bits every time.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from kernels import reference
from kernels.layout import BlockLayout
from kernels.operators import empty_like, empty_outputs, pad_head_dim, register_attention
from kernels.statistics import AttentionStatistics, from_pieces

name = "triton"

DEVICE = "cuda"  # the tests run the same kernels on CPU tensors, in Triton's interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRANULE = 16  # the smallest tile
MAX_HEAD_DIM = 128
OLDEST = (8, 0)  # compute capability: products of bf16 and tf32


def reason_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def supports(op: str, query: Tensor, layout: BlockLayout | None) -> str | None:
    if query.device.type != DEVICE:
        return f"the tensors are on {query.device}"
    if query.is_cuda and _capability(query.device.index or 0) < OLDEST:
        return f"the GPU is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype}, it computes float32, bfloat16 and float16"
    N, d = query.shape[2:]
    if d > MAX_HEAD_DIM:
        return f"head_dim {d}, it goes up to {MAX_HEAD_DIM}"
    size = N if layout is None else layout.block_size
    if size % GRANULE:
        what = "length" if layout is None else "block_size"
        return f"{what} {size}, it needs a multiple of {GRANULE}"
    return None


@torch.compiler.assume_constant_result
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    key_padding_mask: Tensor | None,
    scale: float,
    pruned: str,
) -> Tensor:
    lists = [layout.row_offsets, layout.row_columns, layout.column_offsets, layout.column_rows]
    zero = pruned == "zero"
    return _attention(query, key, value, key_padding_mask, lists, layout.block_size, scale, zero)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, scale: float
) -> Tensor:
    if query.is_cuda and key_padding_mask is None:  # torch's flash attention is hard to beat
        return reference.dense_attention(query, key, value, None, scale)
    return _attention(query, key, value, key_padding_mask, [], query.shape[2], scale, False)


@torch.compiler.disable
def attention_statistics(
    query: Tensor,
    key: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    scale: float,
    groups: int,
    full: bool,
    mean_out: Tensor | None,
    mean_weight: float,
) -> AttentionStatistics:
    B, H, N, d = query.shape
    query, key = _same_strides(*pad_head_dim(_padded(d), query, key))
    accumulate = mean_out is not None
    if full and mean_out is None:
        mean_out, mean_weight = query.new_empty(groups, N, N, dtype=torch.float32), 1.0
    pieces = query.new_empty(B, H, N // GRANULE, N // GRANULE, dtype=torch.float32)
    factor = mean_weight / (B // groups * H)
    _kernels().statistics(
        query, key, key_padding_mask, mean_out, pieces, scale, groups, accumulate, factor
    )
    return from_pieces(pieces, GRANULE, block_size, key_padding_mask, mean_out)


def _kernels() -> ModuleType:
    """triton_attention.py, which imports triton."""
    return importlib.import_module("kernels.triton_attention")


def _padded(head_dim: int) -> int:
    return max(GRANULE, 1 << (head_dim - 1).bit_length())


def _attention(query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero):
    d = query.shape[3]
    query, key, value = _same_strides(*pad_head_dim(_padded(d), query, key, value))
    out, _ = _attention_operator(
        query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero
    )
    return out[..., :d]


def _same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies, unless all have the same strides and rows without gaps."""
    strides = {tensor.stride() for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(3) == 1:
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def _forward(query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero):
    out, lse = empty_outputs(query)
    _kernels().forward(
        query, key, value, out, lse, key_padding_mask, lists, block_size, scale, pruned_zero
    )
    return out, lse


def _backward(
    dout, query, key, value, out, lse, key_padding_mask, lists, block_size, scale, pruned_zero
):
    grads = tuple(empty_like(query) for _ in range(3))
    if dout.stride() != out.stride():
        dout = torch.empty_like(out).copy_(dout)
    _kernels().backward(
        dout, query, key, value, out, lse, *grads, key_padding_mask, lists, block_size, scale
    )
    return grads


_library = torch.library.Library("sat_triton", "FRAGMENT")
# For any device, not "CUDA" alone: the tests run the same operators interpreted on the CPU.
_attention_operator = register_attention(
    _library, _forward, _backward, "CompositeExplicitAutograd"
)
