"""Numbers computed from attention, and what of them is remembered from step to step.

Functions of tensors; every sum is taken in float64. L layers, N padded length, nb blocks a row.
`pooled` [L, nb, nb] is the mean attention of blocks over the real query rows of the whole batch.
Formulas and sources: docs/method.md, "Observations"; docs/semantics.md, "Transition criterion".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# elements converted to float64 at a time: bounds the extra memory at a few MB without costing time
CHUNK = 1 << 20
WINDOW = 20  # dense steps that are smoothed over, and that a choice is compared across

Values = dict[str, list[float | None]]


# ---- the whole matrix --------------------------------------------------------------


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


# ---- attention in blocks -----------------------------------------------------------


def uniform_attention(real_keys: Tensor, block_size: int) -> Tensor:
    """What `pooled` would be were attention uniform over real keys.

    Args:
        real_keys: bool [B, N], True = real token.
    Returns: float64 [nb, nb]; a block row without a real token is zero.
    """
    real = real_keys.double()
    length = real.shape[1]
    blocks = real.view(len(real), length // block_size, block_size).sum(2)
    count = real.sum(1).clamp(min=1)[:, None]
    # of B examples that weigh the same: real rows a block, and of each the share of real keys
    rows, keys = blocks * (length / count), blocks / count
    return rows.T @ keys / (len(real) * block_size**2)


def kept_mass(pooled: Tensor, masks: Tensor) -> Tensor:
    """Share of the attention that lies in the kept blocks.

    Args:
        pooled: [L, nb, nb], not negative; masks: bool [L, nb, nb], True = kept.
    Returns: float64 [L] in 0..1; NaN for a layer without attention.
    """
    weights = pooled.double()
    return (weights * masks).sum((1, 2)) / weights.sum((1, 2))


def row_mass(pooled: Tensor, masks: Tensor) -> Tensor:
    """`kept_mass` of each row of blocks, float64 [L, nb]: 0 for a row without a kept block, NaN
    for one without attention (padding in every example)."""
    weights = pooled.double()
    return (weights * masks).sum(2) / weights.sum(2)


def best_mass(pooled: Tensor, num_blocks: int | Tensor) -> Tensor:
    """The share of the attention in its `num_blocks` (one number, or one a layer) largest blocks:
    the most that a static mask shared by heads and examples can keep.

    Returns: float64 [L].
    """
    flat = pooled.double().flatten(1)
    running = flat.sort(1, descending=True).values.cumsum(1)
    count = torch.as_tensor(num_blocks, device=flat.device).expand(len(flat))
    best = running.gather(1, (count.clamp(min=1) - 1)[:, None])[:, 0]
    return torch.where(count > 0, best, 0.0) / flat.sum(1)


def chance_mass(masks: Tensor, real_keys: Tensor | None = None) -> Tensor:
    """`kept_mass` of attention that is uniform over real keys.

    Args:
        masks: bool [L, nb, nb].
        real_keys: bool [B, N], True = real token; or what `uniform_attention` gave for them,
            [nb, nb]; None: all real, which gives each mask's density.
    Returns: float64 [L].
    """
    if real_keys is None:
        return masks.double().mean((1, 2))
    if real_keys.dtype == torch.bool:
        real_keys = uniform_attention(real_keys, real_keys.shape[1] // masks.shape[1])
    return kept_mass(real_keys.expand(masks.shape), masks)


def agreement(masks: Tensor, before: Tensor) -> Tensor:
    """Intersection over union of two choices of each layer, float64 [L]; d / (2 - d) is what
    chance gives at density d, NaN if both are empty."""
    both, either = (masks & before).flatten(1).sum(1), (masks | before).flatten(1).sum(1)
    return both.double() / either


def best_blocks(pooled: Tensor, num_blocks: Tensor) -> Tensor:
    """The blocks of `best_mass`, bool [L, nb, nb]; num_blocks: int64 [L]."""
    order = pooled.double().flatten(1).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(order.shape[1]) < num_blocks[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen).view(pooled.shape)


def capture(pooled: Tensor, before: Tensor) -> Tensor:
    """Attention that earlier blocks hold now, over the most that as many blocks can hold;
    float64 [L], near 1 while attention is uniform."""
    return kept_mass(pooled, before) / best_mass(pooled, before.flatten(1).sum(1))


def describe_masks(pooled: Tensor, masks: Tensor, uniform: Tensor | None) -> Values:
    """How much attention masks keep, against chance and the best: lists of L."""
    kept, best = kept_mass(pooled, masks), best_mass(pooled, masks.flatten(1).sum(1))
    chance, rows = chance_mass(masks, uniform), row_mass(pooled, masks)
    return {
        "kept_mass": numbers(kept),
        "kept_mass_row_min": numbers(rows.nan_to_num(math.inf).amin(1)),
        "kept_mass_row_p10": numbers(rows.nanquantile(0.1, dim=1)),
        "best_mass": numbers(best),
        "chance_mass": numbers(chance),
        "lift": numbers(kept / chance),
    }


def numbers(values: Tensor) -> list[float | None]:
    """As a list, with None for what is undefined."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


# ---- from step to step -------------------------------------------------------------


def _mean(recent: deque[Tensor]) -> Tensor | None:
    if not recent:
        return None
    total = torch.zeros_like(recent[0], dtype=torch.float64)
    for one in recent:
        total += one
    return total / len(recent)


@dataclass
class Observation:
    """What patterns and criteria may look at after a dense step."""

    pattern_scores: Tensor  # [L, nb, nb] float64 on the CPU, pattern @ pattern.T
    pooled: Tensor | None = None  # [L, nb, nb], of this step's whole batch
    mean_attention: Tensor | None = None  # [L, groups, N, N] fp32, only where it is asked for
    smoothed: Tensor | None = None  # [L, nb, nb], mean of pooled over the last WINDOW dense steps
    # [nb, nb], see uniform_attention, smoothed as `smoothed` is; None: nothing is padded
    uniform: Tensor | None = None
    initial_scores: Tensor | None = None  # pattern_scores before the first step
    given: Tensor | None = None  # bool [L, nb, nb], masks of the user
    step: int = 0  # completed steps
    values: Values = field(default_factory=dict)  # lists of L, by their names in metrics.jsonl


class Observer:
    """Remembers pooled attention and the pattern's choices over the last WINDOW dense steps.

    Args:
        choose: the masks that the run's pattern would choose now, bool [L, nb, nb].
        moves: whether that choice can change.
    """

    def __init__(self, choose: Callable[[Observation], Tensor], moves: bool) -> None:
        self._choose = choose
        self._moves = moves
        self._pooled: deque[Tensor] = deque(maxlen=WINDOW)  # fp32
        # of the steps before this one: what the pattern chose, what held most, its capture
        self._masks: deque[Tensor] = deque(maxlen=WINDOW)
        self._best: deque[Tensor] = deque(maxlen=WINDOW)
        self._captures: deque[list[float | None]] = deque(maxlen=WINDOW)
        self._start: list[list[float]] = []  # lift of the best blocks in the first WINDOW steps
        self._uniform: deque[Tensor] = deque(maxlen=WINDOW)  # fp32; empty: nothing is padded

    @property
    def smoothed(self) -> Tensor | None:
        """Mean of the pooled attention over the last WINDOW dense steps, float64 [L, nb, nb]."""
        return _mean(self._pooled)

    @property
    def uniform(self) -> Tensor | None:
        """The same of what it would be were attention uniform; None where nothing is padded."""
        return _mean(self._uniform)

    def observe(self, observation: Observation) -> None:
        """Fills in `smoothed` and `values`, smooths `uniform` too, once a dense step."""
        assert observation.pooled is not None
        self._pooled.append(observation.pooled.float())
        if observation.uniform is not None:
            self._uniform.append(observation.uniform.float())
        smoothed, observation.uniform = self.smoothed, self.uniform
        observation.smoothed = smoothed
        assert smoothed is not None
        masks = self._masks[-1] if self._masks and not self._moves else self._choose(observation)
        values = describe_masks(smoothed, masks, observation.uniform)
        undefined: list[float | None] = [None] * len(masks)
        values |= {"concentration": self._concentration(values)}
        values |= dict.fromkeys(
            ("agreement", "agreement_1", "capture", "capture_before"), undefined
        )
        if self._masks:
            values["agreement_1"] = numbers(agreement(masks, self._masks[-1]))
        if len(self._masks) == WINDOW:
            values["agreement"] = numbers(agreement(masks, self._masks[0]))
        if len(self._best) == WINDOW:
            values["capture"] = numbers(capture(smoothed, self._best[0]))
        if len(self._captures) == WINDOW:
            values["capture_before"] = self._captures[0]
        self._masks.append(masks)
        self._best.append(best_blocks(smoothed, masks.flatten(1).sum(1)))
        self._captures.append(values["capture"])
        observation.values = values

    def _concentration(self, values: Values) -> list[float | None]:
        """best_mass over chance_mass, in multiples of its mean over the first WINDOW steps."""
        pairs = zip(values["best_mass"], values["chance_mass"], strict=True)
        levels = [(best or 0.0) / chance if chance else 0.0 for best, chance in pairs]
        if len(self._start) < WINDOW:
            self._start.append(levels)
            return [None] * len(levels)
        start = [sum(layer) / WINDOW for layer in zip(*self._start, strict=True)]
        return [now / then if then else None for now, then in zip(levels, start, strict=True)]

    def state_dict(self) -> dict[str, list]:
        """What a resumed run needs to go on as if it had never stopped."""
        return {
            "pooled": list(self._pooled),
            "masks": list(self._masks),
            "best": list(self._best),
            "captures": list(self._captures),
            "start": self._start,
            "uniform": list(self._uniform),
        }

    def load_state_dict(
        self, state: dict[str, Any], same_count: bool = True, same_pattern: bool = True
    ) -> None:
        """Inverse of `state_dict`. What depends on another pattern or on another number of blocks
        is left behind, and undefined until WINDOW steps have been seen."""
        self._pooled.extend(state["pooled"])
        self._uniform.extend(state["uniform"])
        if same_count:
            self._start = [list(levels) for levels in state["start"]]
            self._best.extend(state["best"])
            self._captures.extend(state["captures"])
        if same_count and same_pattern:
            self._masks.extend(state["masks"])
