"""Attention on NVIDIA GPUs (csrc/cuda/attention_cuda.cuh): the backend `cuda`.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.

The kernels are torch operators (sat_cuda::attention and its backward, sat_cuda::statistics), so
autograd and torch.compile see them as one node. They run on the current stream, never wait for the
GPU, allocate nothing larger than their outputs (but [B, H, N/16, N/16] for the statistics), use no
atomics, and give the same bits every time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from kernels import native, reference
from kernels.layout import BlockLayout
from kernels.operators import empty_like, empty_outputs, pad_head_dim, register_attention
from kernels.statistics import AttentionStatistics, from_pieces

name = "cuda"

ABI = 1  # sat_abi_version() in csrc/cuda/attention_cuda.cu
DEVICE = "cuda"
LIBRARY = Path(__file__).resolve().parent / "libsat_cuda.so"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HEAD_DIMS = (32, 64, 128)  # others are padded with zeros
NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
GRANULE = 16  # rows of a warp: block_size is a multiple of it


@torch.compiler.assume_constant_result
def reason_unavailable() -> str | None:
    return _no_device() or _load()[1]


def supports(op: str, query: Tensor, layout: BlockLayout | None) -> str | None:
    if query.device.type != DEVICE:
        return f"the tensors are on {query.device}"
    if query.dtype not in TYPES:
        return f"dtype {query.dtype}, it computes float32, bfloat16 and float16"
    N, d = query.shape[2:]
    if d > HEAD_DIMS[-1]:
        return f"head_dim {d}, it goes up to {HEAD_DIMS[-1]}"
    block_size = _dense_block(N) if layout is None else layout.block_size
    if N % GRANULE or block_size % GRANULE:
        what = f"length {N}" if layout is None else f"block_size {block_size}"
        return f"{what}, it needs a multiple of {GRANULE}"
    return _reason_too_large(query.device.index or 0, TYPES[query.dtype], d, block_size)


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
    # torch's flash attention takes no padding and no fp32; where it works it is hard to beat.
    if query.is_cuda and key_padding_mask is None and query.dtype != torch.float32:
        return reference.dense_attention(query, key, value, None, scale)
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
    N, d = query.shape[2:]
    query, key = pad_head_dim(_padded(d), query, key)
    accumulate = mean_out is not None
    if full and mean_out is None:
        mean_out, mean_weight = query.new_empty(groups, N, N, dtype=torch.float32), 1.0
    pieces = torch.ops.sat_cuda.statistics(
        query, key, key_padding_mask, mean_out, scale, groups, accumulate, mean_weight
    )
    return from_pieces(pieces, GRANULE, block_size, key_padding_mask, mean_out)


def _dense_block(length: int) -> int:
    """Dense attention takes any rows together: the size that gives the largest tiles."""
    return next((size for size in (64, 32) if length % size == 0), GRANULE)


def _padded(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if head_dim <= size)


def _attention(query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero):
    d = query.shape[3]
    query, key, value = pad_head_dim(_padded(d), query, key, value)
    out, _ = _attention_operator(
        query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero
    )
    return out[..., :d]


# ---- the operators -------------------------------------------------------------------


def _forward(query, key, value, key_padding_mask, lists, block_size, scale, pruned_zero):
    out, lse = empty_outputs(query)
    call = _Call(query, key, key_padding_mask, block_size, scale)
    call.set_lists(lists)
    call.set(value=value, out=out)
    call.struct.lse, call.struct.pruned_zero = call.rows(lse), pruned_zero
    call.run("forward")
    return out, lse


def _backward(
    dout, query, key, value, out, lse, key_padding_mask, lists, block_size, scale, pruned_zero
):
    dq, dk, dv = (empty_like(query) for _ in range(3))
    delta = torch.empty_like(lse)
    call = _Call(query, key, key_padding_mask, block_size, scale)
    call.set_lists(lists)
    call.set(value=value, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
    call.struct.lse, call.struct.delta = call.rows(lse), call.rows(delta)
    call.struct.pruned_zero = pruned_zero
    call.run("backward")
    return dq, dk, dv


def _statistics(query, key, key_padding_mask, mean, scale, groups, accumulate, mean_weight):
    B, H, N, _ = query.shape
    rows = query.new_empty(2, B, H, N, dtype=torch.float32)
    pieces = _empty_pieces(query)
    call = _Call(query, key, key_padding_mask, _dense_block(N), scale)
    struct = call.struct
    struct.lse, struct.delta = call.rows(rows[0]), call.rows(rows[1])
    struct.pooled = call.at(pieces, torch.float32, B, H, N // GRANULE, N // GRANULE)
    struct.mean = None if mean is None else call.at(mean, torch.float32, groups, N, N)
    struct.groups, struct.accumulate = groups, accumulate
    struct.mean_factor = mean_weight / (B // groups * H)
    call.run("statistics")
    return pieces


def _empty_pieces(query: Tensor) -> Tensor:
    B, H, N, _ = query.shape
    return query.new_empty(B, H, N // GRANULE, N // GRANULE, dtype=torch.float32)


_library = torch.library.Library("sat_cuda", "FRAGMENT")
# For any device, not "CUDA" alone: the tests run the same operators emulated on the CPU.
_dispatch_key = "CompositeExplicitAutograd"
_attention_operator = register_attention(_library, _forward, _backward, _dispatch_key)
_library.define(
    "statistics(Tensor query, Tensor key, Tensor? key_padding_mask, Tensor(a!)? mean, "
    "float scale, int groups, bool accumulate, float mean_weight) -> Tensor pieces"
)
_library.impl("statistics", _statistics, _dispatch_key)
torch.library.register_fake("sat_cuda::statistics", lambda query, *rest: _empty_pieces(query))


# ---- the library (structs as in csrc/cuda/attention_cuda.cuh) ------------------------------


class _SatTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3))


class _SatAttention(ctypes.Structure):
    _fields_ = (
        *((tensor, _SatTensor) for tensor in ("query", "key", "value", "out")),
        *((tensor, _SatTensor) for tensor in ("dout", "dq", "dk", "dv")),
        *((pointer, ctypes.c_void_p) for pointer in ("lse", "delta", "key_padding_mask")),
        ("mask_strides", ctypes.c_int64 * 2),
        *((pointer, ctypes.c_void_p) for pointer in ("row_offsets", "row_columns")),
        *((pointer, ctypes.c_void_p) for pointer in ("column_offsets", "column_rows")),
        *((pointer, ctypes.c_void_p) for pointer in ("mean", "pooled")),
        *((size, ctypes.c_int64) for size in ("batch", "heads", "length", "head_dim")),
        *((number, ctypes.c_int64) for number in ("block_size", "type", "pruned_zero")),
        *((number, ctypes.c_int64) for number in ("groups", "accumulate")),
        *((number, ctypes.c_double) for number in ("scale", "mean_factor")),
    )


class _Call:
    """One call of the library; keeps what it points to alive until it is enqueued."""

    def __init__(self, query, key, key_padding_mask, block_size, scale):
        self.struct = struct = _SatAttention()
        self.query, self.kept = query, []
        self.set(query=query, key=key)
        if key_padding_mask is not None:
            self.kept.append(key_padding_mask)
            struct.key_padding_mask = native.pointer(
                key_padding_mask, query.shape[::2], torch.bool, query.device, strided=True
            )
            struct.mask_strides[:] = key_padding_mask.stride()
        struct.batch, struct.heads, struct.length, struct.head_dim = query.shape
        struct.block_size, struct.type, struct.scale = block_size, TYPES[query.dtype], scale

    def set(self, **tensors: Tensor) -> None:
        for field, tensor in tensors.items():
            tensor, query = _with_aligned_rows(tensor), self.query
            self.kept.append(tensor)
            at = native.pointer(tensor, query.shape, query.dtype, query.device, strided=True)
            setattr(self.struct, field, _SatTensor(at, tensor.stride()[:3]))

    def at(self, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
        return native.pointer(tensor, shape, dtype, self.query.device)

    def rows(self, tensor: Tensor) -> int:
        return self.at(tensor, torch.float32, *self.query.shape[:3])

    def set_lists(self, lists: list[Tensor]) -> None:
        if lists:
            self.kept += lists
            names = ("row_offsets", "row_columns", "column_offsets", "column_rows")
            for name, tensor in zip(names, lists, strict=True):
                setattr(self.struct, name, self.at(tensor, torch.int32, *tensor.shape))

    def run(self, what: str) -> None:
        library, reason = _load()
        if library is None:
            raise RuntimeError(reason)
        function = getattr(library, f"sat_cuda_{what}")
        if self.query.is_cuda:
            device = self.query.device
            # The library sets its device too, behind torch's back: the guard puts it right again.
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                status = function(ctypes.byref(self.struct), device.index, stream)
        else:
            status = function(ctypes.byref(self.struct), 0, None)
        if status != 0:
            reason = _error(library, status)
            kind = torch.OutOfMemoryError if "out of memory" in reason else RuntimeError
            raise kind(f"CUDA attention failed ({what}): {reason}")


def _with_aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its rows are not whole or do not start at multiples of 16 bytes."""
    *outer, inner = tensor.stride()
    address = native.pointer(tensor, tensor.shape, tensor.dtype, tensor.device, strided=True)
    aligned = inner == 1 and address % 16 == 0
    if aligned and all(stride * tensor.element_size() % 16 == 0 for stride in outer):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


# Two functions: torch.compile looks through a cache at what it wraps, and cannot trace that.
@torch.compiler.assume_constant_result
def _reason_too_large(device: int, type: int, head_dim: int, block_size: int) -> str | None:
    return _cached_reason_too_large(device, type, head_dim, block_size)


@functools.cache
def _cached_reason_too_large(device: int, type: int, head_dim: int, block_size: int) -> str | None:
    library, reason = _load()
    if library is None:
        return reason
    struct = _SatAttention()
    struct.type, struct.head_dim, struct.block_size = type, _padded(head_dim), block_size
    struct.length = struct.groups = 1
    if torch.cuda.is_initialized():  # the library sets its device behind torch's back
        with torch.cuda.device(device):
            status = library.sat_cuda_fits(ctypes.byref(struct), device)
    else:
        status = library.sat_cuda_fits(ctypes.byref(struct), device)
    if status == NO_KERNEL_IMAGE:
        return f"{LIBRARY.name} was built for newer GPUs: run `sh compile.sh` on this machine"
    return None if status == 0 else _error(library, status)


def _error(library: ctypes.CDLL, status: int) -> str:
    return library.sat_cuda_error(status).decode()


def source_hash() -> str | None:
    """sha256 over csrc/cuda/*.cu, then its *.cuh, as build_cuda.sh has it. None without."""
    sources = LIBRARY.parent / "csrc" / "cuda"
    files = sorted(sources.glob("*.cu")) + sorted(sources.glob("*.cuh"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _no_device() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason in one sentence why there is none."""
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} is not built: run `sh compile.sh` where nvcc is installed"
    try:
        library = declare(ctypes.CDLL(str(LIBRARY)))
        abi, built_from = library.sat_abi_version(), library.sat_source_hash().decode()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded ({error}): run `sh compile.sh` again"
    if abi != ABI or source_hash() not in (None, built_from):
        return None, f"{LIBRARY.name} was built from other sources than these: run `sh compile.sh`"
    return library, None


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions set."""
    library.sat_source_hash.restype = ctypes.c_char_p
    library.sat_cuda_error.restype = ctypes.c_char_p
    attention = ctypes.POINTER(_SatAttention)
    for what in ("forward", "backward", "statistics"):
        function = getattr(library, f"sat_cuda_{what}")
        function.argtypes = (attention, ctypes.c_int, ctypes.c_void_p)
    library.sat_cuda_fits.argtypes = (attention, ctypes.c_int)
    return library
