"""Means with confidence intervals, for sweeps and results: Student's t, plain and paired."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)


def t_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t with `freedom` degrees, t >= 0.

    With t = sqrt(freedom) tan(a) the density is proportional to cos(a)^(freedom - 1), which is
    smooth on [0, pi/2]: Gauss-Legendre gives twelve digits.
    """

    def integral(begin: float, end: float) -> float:
        angle = begin + (NODES + 1) * (end - begin) / 2
        return float((WEIGHTS * np.cos(angle) ** (freedom - 1)).sum() * (end - begin) / 2)

    cut = math.atan(t / math.sqrt(freedom))
    return integral(cut, math.pi / 2) / (2 * integral(0, math.pi / 2))


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with probability `confidence`: 2.776 for 0.95 and 4."""
    low, high = 0.0, math.pi / 2  # the angle of t_tail
    for _ in range(50):
        angle = (low + high) / 2
        above = 2 * t_tail(math.sqrt(freedom) * math.tan(angle), freedom) > 1 - confidence
        low, high = (angle, high) if above else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


@dataclass(frozen=True)
class Mean:
    """Mean, standard deviation and half width of the 95 % interval (None for a single value)."""

    mean: float
    deviation: float | None
    half_width: float | None
    count: int


def mean_of(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Of independent values.

    Raises: ValueError if there is none.
    """
    if not values:
        raise ValueError("no values to average")
    count = len(values)
    if count == 1:
        return Mean(float(values[0]), None, None, 1)
    deviation = statistics.stdev(values)
    half = t_quantile(confidence, count - 1) * deviation / math.sqrt(count)
    return Mean(statistics.fmean(values), deviation, half, count)


def paired(first: dict[int, float], second: dict[int, float]) -> Mean | None:
    """second - first over the seeds that both have; None without any."""
    both = sorted(first.keys() & second.keys())
    return mean_of([second[seed] - first[seed] for seed in both]) if both else None
