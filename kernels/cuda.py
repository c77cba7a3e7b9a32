"""Attention on NVIDIA GPUs (csrc/cuda): the backend `cuda`.

The kernels run on the current stream, never wait for the GPU, allocate nothing larger than their
outputs (but [B, H, N/16, N/16] for the statistics), use no atomics, and give the same bits every
time. Shape letters as in operators.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import native, operators, reference
from kernels.backends import NEEDS_A_KERNEL, Call
from kernels.statistics import from_pieces, largest_and_inverse

name = "cuda"

ABI = 2  # sat_abi_version() in csrc/cuda/attention_cuda.cu
DEVICE = "cuda"  # the tests run the same kernels emulated on the CPU
LIBRARY = Path(__file__).resolve().parent / "libsat_cuda.so"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HEAD_DIMS = (32, 64, 128)  # others are padded with zeros
GRANULE = 16  # rows of a warp: block_size is a multiple of it
OUT_OF_MEMORY, NO_KERNEL_IMAGE = 2, 209  # cudaErrorMemoryAllocation, ...NoKernelImageForDevice


def can_run(call: Call) -> str | None:
    if (reason := _reason_unavailable()) or call.device is None:
        return reason
    if call.device.type != DEVICE:
        return f"the tensors are on {call.device}"
    if call.op is None:
        return None
    if call.op not in NEEDS_A_KERNEL:
        return "there is no such kernel"
    if call.dtypes[0] not in TYPES:
        return f"dtype {call.dtypes[0]}, it computes float32, bfloat16 and float16"
    (d,), N, block_size = call.sizes, call.length, call.block_size or _dense_block(call.length)
    if d > HEAD_DIMS[-1]:
        return f"head_dim {d}, it goes up to {HEAD_DIMS[-1]}"
    if N % GRANULE or block_size % GRANULE:
        what = f"block_size {block_size}" if call.block_size else f"length {N}"
        return f"{what}, it needs a multiple of {GRANULE}"
    return _reason_too_large(call.device.index or 0, TYPES[call.dtypes[0]], d, block_size)


# Constants to torch.compile, which can trace neither the loading of a library nor a cache.
@torch.compiler.assume_constant_result
def _reason_unavailable() -> str | None:
    return _no_device() or _load()[1]


@torch.compiler.assume_constant_result
def _reason_too_large(device: int, type: int, head_dim: int, block_size: int) -> str | None:
    return _cached_reason_too_large(device, type, head_dim, block_size)


@functools.cache
def _cached_reason_too_large(device: int, type: int, head_dim: int, block_size: int) -> str | None:
    library, reason = _load()
    if library is None:
        return reason
    shape = (1, 1, 1, _padded(head_dim))
    packed = _ATTENTION.pack(*(0,) * 43, *shape, block_size, type, *(0,) * 3, 1, 0, 0.0, 0.0)
    status = _on_device(library.sat_cuda_fits, packed, device)
    if status == NO_KERNEL_IMAGE:
        return f"{LIBRARY.name} was built for newer GPUs: run `sh compile.sh` on this machine"
    return None if status == 0 else library.sat_cuda_error(status).decode()


def attention(
    query: Tensor, key: Tensor, value: Tensor, *settings: Any
) -> tuple[Tensor, Tensor | None]:
    """settings: as in reference.attention."""
    layout, key_padding_mask, _, _, return_lse = settings
    # torch's flash attention takes no padding and no fp32; where it works it is hard to beat.
    unpadded = layout is None and key_padding_mask is None and not return_lse
    if unpadded and query.is_cuda and query.dtype != torch.float32:
        return reference.attention(query, key, value, *settings)
    _, _, N, d = query.shape
    size = layout.block_size if layout else _dense_block(N)
    return operators.attention(name, _padded(d), size, query, key, value, *settings)


def _dense_block(length: int) -> int:
    """Dense attention takes any rows together: the size that gives the largest tiles."""
    return next((size for size in (64, 32) if length % size == 0), GRANULE)


def _padded(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if head_dim <= size)


# ---- the operators -------------------------------------------------------------------


def attention_forward(query, key, value, key_padding_mask, *lists_and_settings):
    out, lse = operators.attention_outputs(query)
    tensors = query, key, value, out, None, None, None, None
    offsets, columns, _, _, *settings = lists_and_settings
    lists = offsets, columns, None, None
    _run("forward", tensors, (lse, None), key_padding_mask, *lists, *settings)
    return out, lse


def attention_backward(dout, query, key, value, out, lse, key_padding_mask, *lists_and_settings):
    grads = operators.attention_gradients(query)
    tensors, rows = (query, key, value, out, dout, *grads), (lse, torch.empty_like(lse))
    _run("backward", tensors, rows, key_padding_mask, *lists_and_settings)
    return grads


def statistics_forward(
    query, key, key_padding_mask, row_weights, lse, mean, block_size, scale, groups, accumulate,
    mean_weight,
):  # fmt: skip
    B, H, N, d = query.shape
    query, key = operators.pad_head_dim(_padded(d), query, key)
    pieces = query.new_empty(B, H, N // GRANULE, N // GRANULE, dtype=torch.float32)
    rows = query.new_empty(2, B, H, N, dtype=torch.float32)
    tensors = (query, key) + (None,) * 6
    settings = *(None,) * 4, _dense_block(N), scale, False, False
    if lse is None:
        _run("denominators", tensors, rows, key_padding_mask, *settings)
    else:
        largest_and_inverse(lse, rows)
    _run(
        "statistics", tensors, rows, key_padding_mask, *settings, mean=mean, pieces=pieces,
        groups=groups, accumulate=accumulate, mean_factor=mean_weight / (B // groups * H),
    )  # fmt: skip
    return from_pieces(pieces, GRANULE, block_size, row_weights)


# ---- the library -----------------------------------------------------------------------

# SatAttention in csrc/cuda/attention_cuda.cuh: 8 tensors (address, 3 strides); lse, delta, mask
# and its 2 strides; lists; mean, pooled; sizes and settings; factors
_ATTENTION = native.Struct("32q" + "5q" + "4q" + "2q" + "11q" + "2d")


def _run(
    what: str, tensors, rows, key_padding_mask, *lists_and_settings, mean=None, pieces=None,
    groups=1, accumulate=False, mean_factor=0.0,
) -> None:  # fmt: skip
    """One call of the library; tensors: in the order of the struct, None where it needs none."""
    *lists, block_size, scale, pruned_zero, causal = lists_and_settings
    query, mask = tensors[0], key_padding_mask
    shape, dtype, device = query.shape, query.dtype, query.device
    B, H, N, _ = shape
    size, pointer = dtype.itemsize, native.pointer
    copies: list[Tensor] = []  # alive meanwhile
    numbers: list[int] = []

    def at(x: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        return 0 if x is None else pointer(x, shape, dtype, device)

    for x in tensors:
        if x is None:
            numbers += (0, 0, 0, 0)
            continue
        address = pointer(x, shape, dtype, device, strided=True)
        batch, head, row, inner = x.stride()
        if inner != 1 or ((batch | head | row) * size | address) % 16:
            # rows have to be whole and to start at multiples of 16 bytes
            x = x.clone(memory_format=torch.contiguous_format)
            copies.append(x)
            address = pointer(x, shape, dtype, device)
            batch, head, row, _ = x.stride()
        numbers += (address, batch, head, row)
    numbers += at(rows[0], B, H, N), at(rows[1], B, H, N)
    if mask is None:
        numbers += (0, 0, 0)
    else:
        address = pointer(mask, (B, N), torch.bool, device, strided=True)
        numbers += (address, *mask.stride())
    nb = N // block_size
    layouts, kept = native.list_pointers(lists, nb, device)
    numbers += kept
    head_lists = nb + 1 if layouts > 1 else 0
    packed = _ATTENTION.pack(
        *numbers, at(mean, groups, N, N), at(pieces, B, H, N // GRANULE, N // GRANULE), *shape,
        block_size, TYPES[dtype], pruned_zero, causal, head_lists, groups, accumulate, scale,
        mean_factor,
    )  # fmt: skip
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    function = getattr(library, f"sat_cuda_{what}")
    if query.is_cuda:
        stream = torch.cuda.current_stream(device).cuda_stream
        status = _on_device(function, packed, device.index, stream)
    else:
        status = function(packed, 0, None)
    if status != 0:
        error = torch.OutOfMemoryError if status == OUT_OF_MEMORY else RuntimeError
        raise error(f"CUDA attention failed ({what}): {library.sat_cuda_error(status).decode()}")


def _on_device(function, packed: bytes, device: int, *stream: int | None) -> int:
    """The library sets its device behind torch's back: the guard puts it right again."""
    if not torch.cuda.is_initialized():
        return function(packed, device, *stream)
    with torch.cuda.device(device):
        return function(packed, device, *stream)


def source_hash() -> str | None:
    """As build_cuda.sh has it."""
    return native.hash_of(LIBRARY.parent / "csrc" / "cuda", "*.cu", "*.cuh")


def _no_device() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason in one sentence why there is none."""
    where = " where nvcc is installed"
    return native.open_library(LIBRARY, ABI, source_hash(), where, declare)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions set."""
    library.sat_cuda_error.restype = ctypes.c_char_p
    for what in ("forward", "backward", "denominators", "statistics"):
        function = getattr(library, f"sat_cuda_{what}")
        function.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
    library.sat_cuda_fits.argtypes = (ctypes.c_char_p, ctypes.c_int)
    return library
