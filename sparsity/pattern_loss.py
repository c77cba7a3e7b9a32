"""The reference's loss that teaches a pattern what the attention looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import AttentionStatistics


def pattern_loss(
    statistics: Sequence[AttentionStatistics], patterns: Sequence[Tensor], scale: float
) -> Tensor:
    """scale * L * sum over layers of MSE(block means of the attention, pattern @ pattern.T).

    The mean runs over examples, heads and blocks. It is computed from the mean block means and the
    mean of their squares alone, (mean of squares - mean(pooled_mean^2)) + mean((pooled_mean -
    P)^2): only the last term depends on the pattern, so its gradient is exact and no [B, H, nb,
    nb] is needed.

    Args:
        statistics, patterns: one of each layer; pattern [nb, d].

    Returns: float64 scalar; gradients reach the patterns only.
    Source: docs/semantics.md, "Pattern loss".
    """
    total = torch.zeros((), dtype=torch.float64, device=patterns[0].device)
    for layer, pattern in zip(statistics, patterns, strict=True):
        pooled = layer.pooled_mean.double()
        product = pattern.double() @ pattern.double().T
        spread = layer.pooled_square_mean - pooled.square().mean()
        total = total + spread + (pooled - product).square().mean()
    return scale * len(patterns) * total
