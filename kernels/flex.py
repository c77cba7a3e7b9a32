"""Block-sparse attention by torch's FlexAttention: what the backend `cuda` falls back on unbuilt.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.

FlexAttention computes an ordinary softmax over the kept blocks and can give its log-denominator
lse. That pruned scores count as logit 0 is then a factor a row: with n_i kept keys,

    exp(s) / (exp(lse) + N - n_i) = exp(s) / exp(lse) * sigmoid(lse - log(N - n_i))
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.layout import BlockLayout

TILE = (
    128  # its Triton kernels' tiles: no smaller block works in every dtype, forward and backward
)

_indices: WeakKeyDictionary[BlockLayout, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def is_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def reason_against(query: Tensor, layout: BlockLayout) -> str | None:
    """Why FlexAttention cannot do this call."""
    if not is_available():
        return "FlexAttention needs triton, which is not installed"
    if layout.block_size % TILE:
        return f"FlexAttention takes blocks of {TILE}, not {layout.block_size}"
    if query.shape[3] not in (16, 32, 64, 128):
        return f"FlexAttention takes head_dim 16, 32, 64 or 128, not {query.shape[3]}"
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
    """As kernels.block_sparse_attention; on the CPU forward only, and slow: for tests."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    bs = layout.block_size
    counts, columns = _block_indices(layout)
    block_mask = BlockMask.from_kv_blocks(
        counts[None, None],
        columns[None, None],
        BLOCK_SIZE=bs,
        mask_mod=_mask_mod(layout, key_padding_mask, blocks_known=query.is_cuda),
    )
    out, aux = _flex_attention(query.is_cuda)(
        query, key, value, block_mask=block_mask, scale=scale, return_aux=AuxRequest(lse=True)
    )
    if pruned == "masked":
        return out
    num_pruned = (layout.length - counts * bs).repeat_interleave(bs)
    # lse is -inf where nothing is attended: the factor is 0 there, and 1 where nothing is pruned.
    factor = torch.sigmoid(aux.lse - num_pruned.to(aux.lse.dtype).log())
    factor = torch.where(num_pruned > 0, factor, 1)
    return (out * factor[..., None]).to(query.dtype)


def _mask_mod(
    layout: BlockLayout, key_padding_mask: Tensor | None, blocks_known: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Which scores count, in FlexAttention's form; not compiled, it knows no blocks but this."""

    def real(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        assert key_padding_mask is not None
        return key_padding_mask[b, kv]

    def kept(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return layout.block_mask[q // layout.block_size, kv // layout.block_size]

    def both(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kept(b, h, q, kv) & real(b, h, q, kv)

    if key_padding_mask is not None:
        return real if blocks_known else both
    if blocks_known:
        return None
    return kept


def _block_indices(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Kept blocks of each row: how many, int32 [nb], and which first, int32 [nb, nb]."""
    if layout not in _indices:
        order = layout.block_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        _indices[layout] = layout.block_mask.sum(1, dtype=torch.int32), order.to(torch.int32)
    return _indices[layout]


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
