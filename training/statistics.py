"""Numbers computed from attention: the pattern loss, skewness and the Frobenius distance.

Pure functions of tensors; every sum is taken in float64. L layers, N padded length, nb blocks a
row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import AttentionStatistics

# elements converted to float64 at a time: bounds the extra memory at a few MB without costing time
CHUNK = 1 << 20


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


def skewness(values: Tensor) -> Tensor:
    """mean(((x - mean) / std)^3) over all elements, population std; NaN if all elements are equal.

    Returns: float64 scalar on the device of `values`.
    Source: docs/semantics.md, "Transition criterion".
    """
    flat = values.reshape(-1)
    mean = flat.sum(dtype=torch.float64) / flat.numel()
    second = torch.zeros((), dtype=torch.float64, device=flat.device)
    third = torch.zeros_like(second)
    for part in flat.split(CHUNK):
        centred = part.double() - mean
        square = centred * centred
        second += square.sum()
        third += torch.dot(square, centred)
    variance = second / flat.numel()
    # below this the deviation is the rounding of the mean, not a property of the data
    equal = variance.sqrt() <= 1e-12 * mean.abs()
    skew = (third / flat.numel()) / variance.pow(1.5)
    return torch.where(equal, torch.full_like(skew, torch.nan), skew)


def frobenius_distance(values: Tensor, previous: Tensor) -> Tensor:
    """sqrt(sum((x - y)^2)) over all elements, a float64 scalar on their device.

    Source: docs/semantics.md, "Transition criterion".
    """
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for part, old in zip(
        values.reshape(-1).split(CHUNK), previous.reshape(-1).split(CHUNK), strict=True
    ):
        difference = part.double() - old.double()
        total += torch.dot(difference, difference)
    return total.sqrt()
