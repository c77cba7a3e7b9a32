"""Attention as a torch operator: what the compiled backends share of it.

A backend brings the two functions that call its library; here are their schemas, the tensors they
fill, and what autograd and torch.compile need to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INPUTS = "Tensor query, Tensor key, Tensor value, "
SETTINGS = (
    "Tensor? key_padding_mask, Tensor[] lists, int block_size, float scale, bool pruned_zero"
)


def register_attention(
    library: torch.library.Library, forward: Callable, backward: Callable, dispatch_key: str
) -> Any:
    """Defines <namespace>::attention and <namespace>::attention_backward and ties them together.

    lists: a BlockLayout's row_offsets, row_columns, column_offsets and column_rows, or none of
    them for dense attention.
    Returns: the operator `attention`, which gives (out [B, H, N, d], lse [B, H, N] fp32).
    """
    library.define(f"attention({INPUTS}{SETTINGS}) -> (Tensor out, Tensor lse)")
    library.define(
        f"attention_backward(Tensor dout, {INPUTS}Tensor out, Tensor lse, {SETTINGS}) "
        "-> (Tensor dquery, Tensor dkey, Tensor dvalue)"
    )
    library.impl("attention", forward, dispatch_key)
    library.impl("attention_backward", backward, dispatch_key)
    operators = getattr(torch.ops, library.ns)

    def setup_context(ctx, inputs, output):
        query, key, value, mask, ctx.lists, *ctx.settings = inputs
        # The mask too: saved, it is refused if it has been edited in between.
        ctx.save_for_backward(query, key, value, *output, mask)

    def differentiate(ctx, dout, dlse):
        grads = operators.attention_backward(dout, *ctx.saved_tensors, ctx.lists, *ctx.settings)
        return *grads, None, [None] * len(ctx.lists), None, None, None

    name = f"{library.ns}::attention"
    torch.library.register_fake(name, lambda query, *rest: empty_outputs(query))
    torch.library.register_fake(
        f"{name}_backward", lambda dout, query, *rest: tuple(empty_like(query) for _ in "qkv")
    )
    torch.library.register_autograd(name, differentiate, setup_context=setup_context)
    return operators.attention


def empty_like(query: Tensor) -> Tensor:
    """[B, H, N, d]; in memory [B, N, H, d] if query's heads lie together (a projection)."""
    B, H, N, d = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(B, N, H, d).transpose(1, 2)
    return query.new_empty(B, H, N, d)


def empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """out like `query`, lse [B, H, N] fp32."""
    return empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def pad_head_dim(width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[..., d] -> [..., width]: zeros change no score, and add columns of zeros to the output."""
    more = width - tensors[0].shape[-1]
    return tuple(F.pad(x, (0, more)) for x in tensors) if more else tensors
