"""Attention in C++ (csrc/cpu/attention*.cpp): the backend `cpu`.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.

The kernels are torch operators (sat::attention and its backward, sat::attention_statistics), so
autograd and torch.compile see them as one node. They allocate nothing larger than a block besides
their outputs, and give the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import native
from kernels.layout import BlockLayout
from kernels.operators import empty_like, empty_outputs, pad_head_dim, register_attention
from kernels.statistics import AttentionStatistics, real_row_weights

name = "cpu"

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # SatType in csrc/cpu/abi.h
GRANULE = 16  # head_dim and block_size are multiples of it in C++
LARGEST = 128
_CPU = torch.device("cpu")


@torch.compiler.assume_constant_result
def reason_unavailable() -> str | None:
    return native.reason_unavailable()


def supports(op: str, query: Tensor, layout: BlockLayout | None) -> str | None:
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}"
    if query.dtype not in TYPES:
        return f"dtype {query.dtype}, it computes float32 and bfloat16"
    if query.shape[3] > LARGEST:
        return f"head_dim {query.shape[3]}, it goes up to {LARGEST}"
    size = _dense_block(query.shape[2]) if layout is None else layout.block_size
    if size % GRANULE or not GRANULE <= size <= LARGEST:
        what = f"length {query.shape[2]}" if layout is None else f"block_size {size}"
        return f"{what}, it needs a multiple of {GRANULE}, for blocks at most {LARGEST}"
    return None


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
    size = _dense_block(query.shape[2])
    return _attention(query, key, value, key_padding_mask, [], size, scale, False)


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
    if full and mean_out is None:
        mean_out, mean_weight = query.new_zeros(groups, N, N, dtype=torch.float32), 1.0
    query, key = pad_head_dim(_padded(d), query, key)
    weights = None if key_padding_mask is None else real_row_weights(key_padding_mask)
    pooled_sum, square_sum, real_sum = torch.ops.sat.attention_statistics(
        query, key, key_padding_mask, weights, block_size, scale, groups, mean_out, mean_weight
    )
    pooled_mean = (pooled_sum.sum(0) / (B * H)).float()
    return AttentionStatistics(
        mean_attention=mean_out,
        pooled_mean=pooled_mean,
        pooled_square_mean=square_sum.sum() / (B * H * (N // block_size) ** 2),
        pooled_real=pooled_mean if weights is None else (real_sum.sum(0) / (B * H)).float(),
    )


def _dense_block(length: int) -> int:
    """Rows that dense attention takes together: the largest size that divides the length."""
    return next((size for size in (128, 64, 32, 16) if length % size == 0), length)


def _padded(head_dim: int) -> int:
    return -(-head_dim // GRANULE) * GRANULE


def _attention(query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero):
    d = query.shape[3]
    query, key, value = pad_head_dim(_padded(d), query, key, value)
    out, _ = _attention_operator(
        query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero
    )
    return out[..., :d]


# ---- the operators ----


def _forward(query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero):
    out, lse = empty_outputs(query)
    call = _Call(query, key, value, lse, key_padding_mask, lists, block_size, scale, pruned_zero)
    call.struct.out = _tensor(out, query)
    if query.numel():
        native.call("sat_attention_forward", bytes(call.struct))
    return out, lse


def _backward(
    dout, query, key, value, out, lse, key_padding_mask, lists, block_size, scale, pruned_zero
):
    dquery, dkey, dvalue = (empty_like(query) for _ in range(3))
    call = _Call(query, key, value, lse, key_padding_mask, lists, block_size, scale, pruned_zero)
    struct = call.struct
    struct.out, struct.dout = _tensor(out, query), _tensor(dout, query)
    struct.dquery, struct.dkey = _tensor(dquery, query), _tensor(dkey, query)
    struct.dvalue = _tensor(dvalue, query)
    if query.numel():
        native.call("sat_attention_backward", bytes(struct))
    return dquery, dkey, dvalue


def _statistics(
    query, key, key_padding_mask, weights, block_size, scale, groups, mean, mean_weight
):
    pooled_sum, square_sum, real_sum = _empty_pooled(query, block_size, groups)
    mask, (B, _, N, _) = _contiguous(key_padding_mask), query.shape
    nb = N // block_size
    struct = _SatStatistics(
        query=_tensor(query, query),
        key=_tensor(key, query),
        real=_at(mask, torch.bool, B, N),
        mean=_at(mean, torch.float32, groups, N, N),
        pooled_sum=_at(pooled_sum, torch.float64, groups, nb, nb),
        square_sum=_at(square_sum, torch.float64, groups, nb),
        row_weights=_at(weights, torch.float32, B, N),
        real_sum=_at(real_sum.zero_(), torch.float64, groups, nb, nb),
        bs=block_size,
        groups=groups,
        type=TYPES[query.dtype],
        threads=torch.get_num_threads(),
        scale=scale,
        weight=mean_weight,
    )
    struct.B, struct.H, struct.N, struct.d = query.shape
    native.call("sat_attention_statistics", bytes(struct))
    return pooled_sum, square_sum, real_sum


def _empty_pooled(query: Tensor, block_size: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the heads of each group: block means [groups, nb, nb], squares [groups, nb], block
    means of weighted rows [groups, nb, nb]."""
    nb = query.shape[2] // block_size
    pooled_sum = query.new_empty(groups, nb, nb, dtype=torch.float64)
    square_sum = query.new_empty(groups, nb, dtype=torch.float64)
    return pooled_sum, square_sum, torch.empty_like(pooled_sum)


_library = torch.library.Library("sat", "FRAGMENT")
_attention_operator = register_attention(_library, _forward, _backward, "CPU")
_library.define(
    "attention_statistics(Tensor query, Tensor key, Tensor? key_padding_mask, "
    "Tensor? row_weights, int block_size, float scale, int groups, Tensor(a!)? mean, "
    "float mean_weight) "
    "-> (Tensor pooled_sum, Tensor square_sum, Tensor real_sum)"
)
_library.impl("attention_statistics", _statistics, "CPU")
torch.library.register_fake(
    "sat::attention_statistics",
    lambda query, key, mask, weights, bs, scale, groups, *rest: _empty_pooled(query, bs, groups),
)


# ---- the C side's structs (csrc/cpu/abi.h) ----


class _SatTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (stride, ctypes.c_int64) for stride in ("batch", "head", "row", "column")
    ]


class _SatAttention(ctypes.Structure):
    _fields_ = [
        *((tensor, _SatTensor) for tensor in ("query", "key", "value", "out")),
        *((tensor, _SatTensor) for tensor in ("dout", "dquery", "dkey", "dvalue")),
        ("lse", ctypes.c_void_p),
        ("real", ctypes.c_void_p),
        ("row_offsets", ctypes.c_void_p),
        ("row_columns", ctypes.c_void_p),
        ("column_offsets", ctypes.c_void_p),
        ("column_rows", ctypes.c_void_p),
        *((size, ctypes.c_int64) for size in ("B", "H", "N", "d", "bs", "layouts")),
        ("type", ctypes.c_int64),
        ("pruned_zero", ctypes.c_int64),
        ("causal", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _SatStatistics(ctypes.Structure):
    _fields_ = [
        ("query", _SatTensor),
        ("key", _SatTensor),
        *((pointer, ctypes.c_void_p) for pointer in ("real", "mean", "pooled_sum", "square_sum")),
        *((pointer, ctypes.c_void_p) for pointer in ("row_weights", "real_sum", "lse")),
        *((size, ctypes.c_int64) for size in ("B", "H", "N", "d", "bs", "groups")),
        ("type", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("weight", ctypes.c_float),
    ]


def _tensor(tensor: Tensor, query: Tensor) -> _SatTensor:
    address = native.pointer(tensor, query.shape, query.dtype, _CPU, strided=True)
    return _SatTensor(address, *tensor.stride())


def _at(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    return None if tensor is None else native.pointer(tensor, shape, dtype, _CPU)


def _contiguous(key_padding_mask: Tensor | None) -> Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous()


class _Call:
    """The fields that both passes need; keeps what they point to alive."""

    def __init__(
        self, query, key, value, lse, key_padding_mask, lists, block_size, scale, pruned_zero
    ):
        self.mask = _contiguous(key_padding_mask)
        self.struct = struct = _SatAttention()
        B, H, N, d = query.shape
        struct.query, struct.key, struct.value = (_tensor(x, query) for x in (query, key, value))
        struct.lse = _at(lse, torch.float32, B, H, N)
        struct.real = _at(self.mask, torch.bool, B, N)
        if lists:
            offsets, kept = N // block_size + 1, len(lists[1])
            struct.row_offsets = _at(lists[0], torch.int32, offsets)
            struct.row_columns = _at(lists[1], torch.int32, kept)
            struct.column_offsets = _at(lists[2], torch.int32, offsets)
            struct.column_rows = _at(lists[3], torch.int32, kept)
        struct.B, struct.H, struct.N, struct.d = B, H, N, d
        struct.bs, struct.layouts, struct.type = block_size, 1, TYPES[query.dtype]
        struct.pruned_zero, struct.scale = pruned_zero, scale
        struct.threads = torch.get_num_threads()
