"""What the criterion and the pattern loss need to know about dense attention probabilities.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import autocast_inputs, check_inputs, check_padding, check_scale
from kernels.backends import Call, choose
from kernels.operators import run


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """Means of the probabilities p [B, H, N, N] of one layer, which never exists as a whole."""

    mean_attention: Tensor | None  # [groups, N, N] fp32, over heads and each part of the batch
    pooled_mean: Tensor  # [nb, nb] fp32, over batch and heads of the block means of p
    pooled_square_mean: Tensor  # fp64 scalar, over [B, H, nb, nb] of the squared block means
    # [nb, nb] fp32, as pooled_mean but of the queries that are not padded: an example with n real
    # tokens counts N / n times, so that all weigh the same; pooled_mean itself without padding
    pooled_real: Tensor


@torch.no_grad()
def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    groups: int = 1,
    full: bool = True,
    lse: Tensor | None = None,
    backend: str = "auto",
    mean_out: Tensor | None = None,
    mean_weight: float = 1.0,
) -> AttentionStatistics:
    """Statistics of p = softmax(scale * query key^T) over the keys that are not padded.

    Args:
        query, key: [B, H, N, d] as in `dense_attention`.
        block_size: side of the pooled blocks in tokens; divides N.
        key_padding_mask: bool [B, N], True = real token; p is 0 at padded keys. Padded queries
            count like all others, but not in pooled_real.
        scale: factor on the scores; None means 1 / sqrt(d).
        groups: number of equal consecutive parts of the batch that get a mean each; divides B.
        full: False leaves mean_attention out (None), and with it the N * N memory.
        lse: fp32 [B, H, N], what `dense_attention` of the same arguments gave with return_lse: a
            backend may take the denominators from it instead of computing them again.
        backend: as in `block_sparse_attention`.
        mean_out: fp32 [groups, N, N], contiguous. If given, mean_attention * mean_weight is added
            to it and it is returned as mean_attention: micro-batches of one group accumulate
            without a second N * N buffer.
        mean_weight: see mean_out; has no effect on pooled_mean and pooled_square_mean.
    Returns: AttentionStatistics, without gradient. An example without a real key has p = 0.
    Raises: ValueError if shapes, dtypes or devices disagree; RuntimeError if the named backend
        cannot do it.
    Source: docs/semantics.md, "Statistics of the dense phase".
    """
    query, key = autocast_inputs(query.detach(), key.detach())
    check_inputs(query=query, key=key)
    check_padding(key_padding_mask, query)
    B, _, N, _ = query.shape
    if not isinstance(block_size, int) or block_size < 1 or N % block_size:
        raise ValueError(f"block_size must divide the length {N}, {block_size!r} does not")
    if not isinstance(groups, int) or groups < 1 or B == 0 or B % groups:
        raise ValueError(f"groups must divide the batch of {B} examples, {groups!r} does not")
    if mean_out is not None:
        _check_mean_out(mean_out, [groups, N, N], query, full)
    if lse is not None and (
        lse.shape != query.shape[:3] or lse.device != query.device or not lse.is_floating_point()
    ):
        raise ValueError(f"lse must be {list(query.shape[:3])} on {query.device}")
    call = Call(
        "attention_statistics", query.device, (query.dtype,), (query.shape[3],), N, block_size
    )
    accumulate = mean_out is not None
    if full and mean_out is None:
        mean_out, mean_weight = query.new_empty(groups, N, N, dtype=torch.float32), 1.0
    weights = None if key_padding_mask is None else real_row_weights(key_padding_mask)
    pooled_mean, pooled_square_mean, pooled_real = run(
        "statistics", choose(call, backend), query, key, key_padding_mask, weights, lse, mean_out,
        block_size, check_scale(scale, query), groups, accumulate, mean_weight,
    )  # fmt: skip
    if weights is None:
        pooled_real = pooled_mean
    return AttentionStatistics(mean_out, pooled_mean, pooled_square_mean, pooled_real)


def real_row_weights(key_padding_mask: Tensor) -> Tensor:
    """What a query row counts in pooled_real: N / n for a real one of n, 0 for a padded one.

    Args:
        key_padding_mask: bool [B, N], True = real token.
    Returns: [B, N] fp32.
    """
    real = key_padding_mask.float()
    return real * (real.shape[1] / real.sum(1, keepdim=True).clamp(min=1))


def largest_and_inverse(lse: Tensor, rows: Tensor) -> None:
    """What kernels keep of each row's denominator, from `lse` as callers have it.

    rows: [2, B, H, N] fp32: something near the largest score in base 2, and what exponentials
        relative to it are multiplied by to be probabilities.
    """
    torch.mul(lse, 1 / math.log(2), out=rows[0])
    torch.gt(lse, -math.inf, out=rows[1])
    rows[0].masked_fill_(lse == -math.inf, 0)


def from_pieces(
    pieces: Tensor, side: int, block_size: int, row_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pooled statistics from sums of p over squares of `side`, fp32 [B, H, N/side, N/side].

    pooled_real is exact to `side` rows: where an example ends within a square, its padded rows
    count as the real ones beside them do.
    """
    parts = block_size // side

    def pooled(pieces: Tensor) -> Tensor:
        blocks = pieces.unflatten(3, (-1, parts)).unflatten(2, (-1, parts))
        return blocks.sum((3, 5), dtype=torch.float64) / block_size**2

    of_all = of_real = pooled(pieces)
    if row_weights is not None:
        weights = row_weights.unflatten(1, (-1, side)).mean(-1)
        of_real = pooled(pieces * weights[:, None, :, None])
    return of_all.mean((0, 1)).float(), of_all.square().mean(), of_real.mean((0, 1)).float()


def _check_mean_out(mean_out: Tensor, shape: list[int], query: Tensor, full: bool) -> None:
    if not full:
        raise ValueError("mean_out needs full=True: without it no mean is taken")
    if list(mean_out.shape) != shape or mean_out.dtype != torch.float32:
        raise ValueError(
            f"mean_out must be float32 {shape}, not {mean_out.dtype} {list(mean_out.shape)}"
        )
    if mean_out.device != query.device or not mean_out.is_contiguous():
        raise ValueError(f"mean_out must be contiguous and on {query.device}")
