"""When to switch to sparse attention. Knows attention matrices, no model.

A_l(t) is the mean attention of layer l at step t, skew_l its skewness, dist_l(t) the Frobenius
norm of A_l(t) - A_l(t-1), and change_l = |dist_l(t) - dist_l(t-1)| / dist_l(t-1) in percent. The
rule fires when every layer has skew_l >= skewness and change_l < distance on the same step
("settled": the paper and the reference's code), or change_l > distance ("shifting": how one of the
reference's notes words it).
Source: docs/semantics.md, "Transition criterion".
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsity.observe import frobenius_distance, skewness

RULES = ("settled", "shifting")
WINDOW = 200  # recent steps the outlook is based on


@dataclass(frozen=True)
class Decision:
    """One evaluation of the rule. Lists have one entry a layer; an undefined value is None."""

    transition: bool
    skewness: list[float | None]
    distance: list[float | None]
    change_percent: list[float | None]
    reason: str


class TransitionCriterion:
    """Evaluates the rule once a step.

    The first step only stores the attention and counts as distance 0, so the change is undefined
    on the second step too and the earliest possible transition is the third. Undefined values
    (deviation 0, previous distance 0, NaN) hold back.

    Args:
        skewness: threshold of the skewness.
        distance: threshold of the change of distance, in percent.
        when: "settled" (change below the threshold) or "shifting" (above it).
    """

    def __init__(self, skewness: float, distance: float, when: str = "settled") -> None:
        if when not in RULES:
            raise ValueError(f"unknown rule {when!r}; known: {', '.join(RULES)}")
        self.skewness = skewness
        self.distance = distance
        self.when = when
        self._previous: Tensor | None = None  # [L, groups, N, N]
        self._previous_distance: list[float] = []
        # of recent steps: per layer, does the skewness hold, does the change hold; skewness,
        # change
        self._history: deque[list[tuple[bool, bool, float | None, float | None]]] = deque(
            maxlen=WINDOW
        )

    def describe(self) -> str:
        """The rule in words, with its units."""
        verb = "below" if self.when == "settled" else "above"
        return (
            f"sparse once, on the same step and in every layer, skewness >= {self.skewness:g} (no "
            f"unit) and the "
            f"Frobenius distance between successive steps changes by {verb} {self.distance:g} "
            f"percent ({self.when})"
        )

    def update(self, mean_attention: Tensor) -> Decision:
        """Takes one step's mean attention and says whether to switch.

        Args:
            mean_attention: [L, groups, N, N]; skewness and distance run over all elements of a
                layer. It is copied; the caller may overwrite it afterwards.

        Returns: the decision, after one copy of 2 L numbers to the host.
        Raises:
            ValueError: not four dimensions, or a shape that differs from the previous step's.
        """
        if mean_attention.dim() != 4:
            raise ValueError(
                f"mean_attention must be [L, groups, N, N], not {list(mean_attention.shape)}"
            )
        num_layers = mean_attention.shape[0]
        skews = torch.stack([skewness(layer) for layer in mean_attention])
        if self._previous is None:
            distances = torch.zeros_like(skews)
            self._previous = mean_attention.clone()
        else:
            if self._previous.shape != mean_attention.shape:
                raise ValueError(
                    f"mean_attention changed its shape from {list(self._previous.shape)} to "
                    f"{list(mean_attention.shape)}"
                )
            distances = torch.stack(
                [
                    frobenius_distance(layer, old)
                    for layer, old in zip(mean_attention, self._previous, strict=True)
                ]
            )
            self._previous.copy_(mean_attention)
        skew, distance = torch.stack([skews, distances]).tolist()
        return self._decide(skew, distance, num_layers)

    def _decide(self, skew: list[float], distance: list[float], num_layers: int) -> Decision:
        change: list[float | None] = [None] * num_layers
        for layer, before in enumerate(self._previous_distance):
            if before > 0 and math.isfinite(before) and math.isfinite(distance[layer]):
                change[layer] = abs(distance[layer] - before) / before * 100
        self._previous_distance = distance

        holding = []
        record = []
        for layer in range(num_layers):
            skewed = skew[layer] >= self.skewness  # False for NaN
            now = change[layer]
            if now is None:
                moved = False
            elif self.when == "settled":
                moved = now < self.distance
            else:
                moved = now > self.distance
            record.append((skewed, moved, _finite(skew[layer]), now))
            if not skewed:
                if math.isfinite(skew[layer]):
                    holding.append(f"layer {layer} skewness {skew[layer]:.3f} < {self.skewness:g}")
                else:
                    holding.append(f"layer {layer} skewness undefined")
            if now is None:
                holding.append(f"layer {layer} change undefined")
            elif not moved:
                sign = ">=" if self.when == "settled" else "<="
                holding.append(f"layer {layer} change {now:.2f} % {sign} {self.distance:g} %")
        self._history.append(record)
        return Decision(
            transition=not holding,
            skewness=[_finite(value) for value in skew],
            distance=[_finite(value) for value in distance],
            change_percent=change,
            reason="; ".join(holding) or "every layer is skewed and " + self.when,
        )

    def outlook(self) -> str:
        """What held the rule back over the recent steps, and how likely it is to fire within 100
        more.

        The chance takes layers and steps as independent, each condition as frequent as it has been
        in the window.
        """
        steps = len(self._history)
        if not steps:
            return "no dense step yet"
        parts = []
        chance = 1.0
        for layer in range(len(self._history[0])):
            rows = [record[layer] for record in self._history]
            share_skew = sum(row[0] for row in rows) / steps
            share_change = sum(row[1] for row in rows) / steps
            chance *= share_skew * share_change
            skew = [row[2] for row in rows if row[2] is not None]
            change = [row[3] for row in rows if row[3] is not None]
            parts.append(
                f"layer {layer}: skewness {_spread(skew)} (holds {share_skew:.0%} of the time), "
                f"change {_spread(change)} % (holds {share_change:.0%})"
            )
        within = 1 - (1 - chance) ** 100
        return (
            f"over the last {steps} dense steps (10th, 50th, 90th percentile) "
            + "; ".join(parts)
            + f"; chance to fire within 100 steps about {within:.0%}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as if it had never stopped."""
        return {
            "previous": self._previous,
            "previous_distance": list(self._previous_distance),
            "history": [[list(entry) for entry in record] for record in self._history],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Inverse of `state_dict`."""
        previous = state["previous"]
        self._previous = None if previous is None else previous.to(device)
        self._previous_distance = list(state["previous_distance"])
        self._history.clear()
        self._history.extend([tuple(entry) for entry in record] for record in state["history"])

    def release(self) -> None:
        """Drops the stored attention once it is not needed any more."""
        self._previous = None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(values: list[float]) -> str:
    if not values:
        return "undefined"
    ordered = sorted(values)
    last = len(ordered) - 1
    return "/".join(f"{ordered[round(last * share)]:.2f}" for share in (0.1, 0.5, 0.9))
