"""The public attention functions: check the arguments, choose a backend, call it.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.backends import Call, choose
from kernels.layout import BlockLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    pruned: str = "zero",
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention over the key blocks that `layout` keeps for each query block.

    Args:
        query, key, value: [B, H, N, d] fp32, bf16 or fp16 (fp64 too on "reference") on one
            device; any strides; B may differ per call. Under autocast they are rounded to its
            dtype, as torch's own attention does.
        layout: BlockLayout with num_blocks * block_size == N, on the same device, for all heads
            or for each its own. A causal one keeps no key behind its query.
        key_padding_mask: bool [B, N], True = real token; None means all real.
        scale: factor on the scores; None means 1 / sqrt(d).
        pruned: "zero", a pruned score counts as logit 0 in the denominator; "masked", it counts
            as minus infinity.
        return_lse: also give the logarithm of each row's denominator, the pruned zeros included:
            [B, H, N] fp32 (fp64 for fp64), -inf in rows without an attended key, no gradient.
        backend: "reference", "cpu", "triton", "cuda" or "auto" (choice said once); a named backend
            never falls back.
    Returns: [B, H, N, d], dtype of query; with return_lse a pair. A row without an attended real
        key is zero and passes no gradient.
    Raises: ValueError if shapes, dtypes or devices disagree; RuntimeError if the named backend is
        not built or cannot do this call, and if the result is differentiated twice; MemoryError or
        torch.OutOfMemoryError if there is no memory.
    Source: docs/semantics.md, "Sparse phase".
    """
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"layout must be a BlockLayout, not {type(layout).__name__}")
    if pruned not in ("zero", "masked"):
        raise ValueError(f'pruned must be "zero" or "masked", not {pruned!r}')
    op = "block_sparse_attention"
    arguments = query, key, value, layout, key_padding_mask, scale, pruned == "zero"
    return _attention(op, *arguments, return_lse, backend)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention over all keys that are not padded; nothing of size B * H * N * N is kept.

    Args, Returns, Raises: as for `block_sparse_attention`.
    Source: docs/semantics.md, "Dense phase".
    """
    arguments = query, key, value, None, key_padding_mask, scale, False
    return _attention("dense_attention", *arguments, return_lse, backend)


def _attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
    pruned_zero: bool,
    return_lse: bool,
    backend: str,
) -> Any:
    query, key, value = autocast_inputs(query, key, value)
    check_inputs(query=query, key=key, value=value)
    check_padding(key_padding_mask, query)
    _, H, N, d = query.shape
    size = layout.block_size if layout is not None else None
    call = Call(op, query.device, (query.dtype,), (d,), N, size)
    if layout is not None:
        layout.check(N, query.device)
        if layout.heads not in (None, H):
            raise ValueError(f"layout is for {layout.heads} heads, but there are {H}")
    module = choose(call, backend)
    rest = layout, key_padding_mask, check_scale(scale, query), pruned_zero
    out, lse = module.attention(query, key, value, *rest, return_lse)
    return (out, lse) if return_lse else out


def check_scale(scale: float | None, query: Tensor) -> float:
    """`scale` as a float, 1 / sqrt(d) for None."""
    if scale is None:
        return 1 / math.sqrt(query.shape[3])
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, not {scale}")
    return float(scale)


def check_padding(key_padding_mask: Tensor | None, query: Tensor) -> None:
    if key_padding_mask is None:
        return
    expected = [query.shape[0], query.shape[2]]
    if key_padding_mask.dtype != torch.bool or list(key_padding_mask.shape) != expected:
        raise ValueError(
            f"key_padding_mask must be bool {expected} (True = real token), "
            f"not {key_padding_mask.dtype} {list(key_padding_mask.shape)}"
        )
    if key_padding_mask.device != query.device:
        raise ValueError(
            f"key_padding_mask is on {key_padding_mask.device}, query on {query.device}"
        )


def check_inputs(**tensors: Tensor) -> None:
    """All [B, H, N, d] of one shape, one floating dtype, on one device."""
    (first, query), *others = tensors.items()
    shape, dtype, device = query.shape, query.dtype, query.device
    for _, x in others:
        if x.shape != shape or x.dtype != dtype or x.device != device:
            break
    else:
        if len(shape) == 4 and dtype in DTYPES and 0 not in shape:
            return
    if query.dim() != 4:
        raise ValueError(f"{first} must be [B, H, N, d], not {list(query.shape)}")
    if query.numel() == 0:
        raise ValueError(f"{first} is empty: {list(query.shape)}")
    if query.dtype not in DTYPES:
        raise ValueError(
            f"{first} must be float32, bfloat16, float16 or float64, not {query.dtype}"
        )
    for name, tensor in others:
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(query, what), getattr(tensor, what)
            if ours != theirs:
                raise ValueError(
                    f"{first} and {name} must agree in {what}, found {ours} and {theirs}"
                )


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inputs in autocast's dtype where it is on; fp64 stays, as in torch's own rule."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
