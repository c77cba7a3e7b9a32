"""Numbers computed from attention. Pure functions of tensors; every sum is taken in float64."""

from __future__ import annotations

import torch
from torch import Tensor

# elements converted to float64 at a time: bounds the extra memory at a few MB without costing time
CHUNK = 1 << 20


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
