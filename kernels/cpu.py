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
from kernels.statistics import AttentionStatistics

name = "cpu"

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # SatType in csrc/cpu/abi.h
GRANULE = 16  # head_dim and block_size are multiples of it in C++
LARGEST = 128


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
    pooled_sum, square_sum = torch.ops.sat.attention_statistics(
        query, key, key_padding_mask, block_size, scale, groups, mean_out, mean_weight
    )
    return AttentionStatistics(
        mean_attention=mean_out,
        pooled_mean=(pooled_sum.sum(0) / (B * H)).float(),
        pooled_square_mean=square_sum.sum() / (B * H * (N // block_size) ** 2),
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
    call.struct.out = _tensor(out)
    if query.numel():
        status = native.load().sat_attention_forward(ctypes.byref(call.struct))
        native.check(status, "sat_attention_forward")
    return out, lse


def _backward(
    dout, query, key, value, out, lse, key_padding_mask, lists, block_size, scale, pruned_zero
):
    dquery, dkey, dvalue = (empty_like(query) for _ in range(3))
    call = _Call(query, key, value, lse, key_padding_mask, lists, block_size, scale, pruned_zero)
    struct = call.struct
    struct.out, struct.dout = _tensor(out), _tensor(dout)
    struct.dquery, struct.dkey, struct.dvalue = _tensor(dquery), _tensor(dkey), _tensor(dvalue)
    if query.numel():
        status = native.load().sat_attention_backward(ctypes.byref(struct))
        native.check(status, "sat_attention_backward")
    return dquery, dkey, dvalue


def _statistics(query, key, key_padding_mask, block_size, scale, groups, mean, mean_weight):
    pooled_sum, square_sum = _empty_pooled(query, block_size, groups)
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    struct = _SatStatistics(
        query=_tensor(query),
        key=_tensor(key),
        real=None if mask is None else mask.data_ptr(),
        mean=None if mean is None else mean.data_ptr(),
        pooled_sum=pooled_sum.data_ptr(),
        square_sum=square_sum.data_ptr(),
        bs=block_size,
        groups=groups,
        type=TYPES[query.dtype],
        threads=torch.get_num_threads(),
        scale=scale,
        weight=mean_weight,
    )
    struct.B, struct.H, struct.N, struct.d = query.shape
    status = native.load().sat_attention_statistics(ctypes.byref(struct))
    native.check(status, "sat_attention_statistics")
    return pooled_sum, square_sum


def _empty_pooled(query: Tensor, block_size: int, groups: int) -> tuple[Tensor, Tensor]:
    """Sums over the heads of each group: block means [groups, nb, nb], squares [groups, nb]."""
    nb = query.shape[2] // block_size
    pooled_sum = query.new_empty(groups, nb, nb, dtype=torch.float64)
    return pooled_sum, query.new_empty(groups, nb, dtype=torch.float64)


_library = torch.library.Library("sat", "FRAGMENT")
_attention_operator = register_attention(_library, _forward, _backward, "CPU")
_library.define(
    "attention_statistics(Tensor query, Tensor key, Tensor? key_padding_mask, int block_size, "
    "float scale, int groups, Tensor(a!)? mean, float mean_weight) "
    "-> (Tensor pooled_sum, Tensor square_sum)"
)
_library.impl("attention_statistics", _statistics, "CPU")
torch.library.register_fake(
    "sat::attention_statistics",
    lambda query, key, mask, bs, scale, groups, *rest: _empty_pooled(query, bs, groups),
)


# ---- the C side's structs (csrc/cpu/attention.h) ----


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
        *((size, ctypes.c_int64) for size in ("B", "H", "N", "d", "bs")),
        ("type", ctypes.c_int64),
        ("pruned_zero", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _SatStatistics(ctypes.Structure):
    _fields_ = [
        ("query", _SatTensor),
        ("key", _SatTensor),
        *((pointer, ctypes.c_void_p) for pointer in ("real", "mean", "pooled_sum", "square_sum")),
        *((size, ctypes.c_int64) for size in ("B", "H", "N", "d", "bs", "groups")),
        ("type", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("weight", ctypes.c_float),
    ]


def _tensor(tensor: Tensor) -> _SatTensor:
    return _SatTensor(tensor.data_ptr(), *tensor.stride())


class _Call:
    """The fields that both passes need; keeps what they point to alive."""

    def __init__(
        self, query, key, value, lse, key_padding_mask, lists, block_size, scale, pruned_zero
    ):
        self.mask = None if key_padding_mask is None else key_padding_mask.contiguous()
        self.struct = struct = _SatAttention()
        struct.query, struct.key, struct.value = _tensor(query), _tensor(key), _tensor(value)
        struct.lse = lse.data_ptr()
        struct.real = None if self.mask is None else self.mask.data_ptr()
        if lists:
            struct.row_offsets, struct.row_columns = lists[0].data_ptr(), lists[1].data_ptr()
            struct.column_offsets, struct.column_rows = lists[2].data_ptr(), lists[3].data_ptr()
        struct.B, struct.H, struct.N, struct.d = query.shape
        struct.bs, struct.type = block_size, TYPES[query.dtype]
        struct.pruned_zero, struct.scale = pruned_zero, scale
        struct.threads = torch.get_num_threads()
