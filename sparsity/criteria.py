"""When to switch to sparse attention.

A criterion is one class in CRITERIA, from which options, log, figures and tests take it. Most say
which values they measure and which conditions these must meet, in every layer or in some layer;
`update` may be written out instead. Torch is imported where it is needed: --help reads this file.

L layers. Formulas and sources: docs/method.md, "Criteria"; docs/semantics.md.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WINDOW = 200  # recent steps the outlook is based on
SPAN = 20  # steps that attention has to stay as it is
CAPTURED = 0.95  # share of the best mass that an earlier choice still holds once it is settled
_OPPOSITE = {">=": "<", "<": ">=", ">": "<="}

Values = dict[str, list[float | None] | None]


@dataclass(frozen=True)
class Verdict:
    """One evaluation of a criterion.

    values: name -> list of L, None where undefined; thresholds: what they are held against;
    reason: what holds the switch back, or why it comes.
    """

    ready: bool
    values: Values
    thresholds: dict[str, float]
    reason: str


@dataclass(frozen=True)
class Condition:
    """What a value has to be, and how both are written. An undefined value never meets it."""

    value: str
    sign: str
    threshold: float
    label: str
    form: str = ".3f"
    unit: str = ""

    def holds(self, value: float | None) -> bool:
        if value is None:
            return False
        if self.sign == ">=":
            return value >= self.threshold
        return value < self.threshold if self.sign == "<" else value > self.threshold

    def failure(self, layer: int, value: float | None) -> str:
        if value is None:
            return f"layer {layer} {self.label} undefined"
        return (
            f"layer {layer} {self.label} {value:{self.form}}{self.unit} {_OPPOSITE[self.sign]} "
            f"{self.threshold:g}{self.unit}"
        )


class Criterion:
    """Says after each dense step whether to switch. A new one gives a description and either
    conditions and `measure`, or an `update` of its own."""

    description = ""  # a few words for --help and the log
    options: tuple[str, ...] = ()  # settings that its constructor takes, by keyword
    conditions: tuple[Condition, ...] = ()
    everywhere = True  # conditions hold in every layer, or (False) all of them in some layer
    fired = "all conditions hold"
    remedy = "another threshold"  # what may make it fire earlier
    needs_mean_attention = False  # looks at the [L, groups, N, N] mean attention
    needs_moving_choice = False  # of use only for patterns that look at the attention
    is_budget = False  # --max_dense_steps is what it waits for

    def __init__(self) -> None:
        # of recent steps: of each layer the value of each condition
        self._history: deque[list[list[float | None]]] = deque(maxlen=WINDOW)

    @property
    def thresholds(self) -> dict[str, float]:
        return {condition.value: condition.threshold for condition in self.conditions}

    def describe(self) -> str:
        """The rule in words, with its units."""
        return self.description

    def measure(self, observation: Any) -> Values:
        """The values that the conditions are about, and others to be logged: lists of L."""
        raise NotImplementedError

    def update(self, observation: Any) -> Verdict:
        """Takes one dense step's sparsity.observe.Observation and says whether to switch."""
        values = self.measure(observation)
        columns = [values[condition.value] or [] for condition in self.conditions]
        rows = [list(row) for row in zip(*columns, strict=True)]
        self._history.append(rows)
        failures = [
            [
                c.failure(layer, v)
                for c, v in zip(self.conditions, row, strict=True)
                if not c.holds(v)
            ]
            for layer, row in enumerate(rows)
        ]
        ready = (all if self.everywhere else any)(not failed for failed in failures)
        held = "; ".join(text for failed in failures for text in failed)
        return Verdict(ready, values, self.thresholds, self.fired if ready else held)

    def outlook(self) -> str:
        """What held the rule back over the recent steps, and how likely it is to fire within 100
        more.

        The chance takes layers and steps as independent, each condition as frequent as it has been
        in the window.
        """
        steps = len(self._history)
        if not steps:
            return "no dense step yet"
        parts, chances = [], []
        for layer in range(len(self._history[0])):
            texts, chance = [], 1.0
            for index, condition in enumerate(self.conditions):
                column = [record[layer][index] for record in self._history]
                share = sum(condition.holds(value) for value in column) / steps
                chance *= share
                spread = _spread([value for value in column if value is not None])
                texts.append(
                    f"{condition.label} {spread}{condition.unit} (holds {share:.0%} of the time)"
                )
            parts.append(f"layer {layer}: " + ", ".join(texts))
            chances.append(chance)
        chance = math.prod(chances)
        if not self.everywhere:
            chance = 1 - math.prod(1 - of_layer for of_layer in chances)
        return (
            f"over the last {steps} dense steps (10th, 50th, 90th percentile) "
            + "; ".join(parts)
            + f"; chance to fire within 100 steps about {1 - (1 - chance) ** 100:.0%}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as if it had never stopped."""
        return {"history": [[list(row) for row in record] for record in self._history]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Inverse of `state_dict`."""
        self._history.clear()
        self._history.extend(state["history"])

    def release(self) -> None:
        """Frees what is large once it is no longer needed."""


class Settled(Criterion):
    """The reference's rule.

    A_l(t) is the mean attention of layer l at step t, skew_l its skewness, dist_l(t) the Frobenius
    norm of A_l(t) - A_l(t-1), and change_l = |dist_l(t) - dist_l(t-1)| / dist_l(t-1) in percent.
    It fires when every layer has skew_l >= skewness and change_l < distance on the same step (the
    paper and the reference's code).

    The first step only stores the attention and counts as distance 0, so the change is undefined
    on the second step too and the earliest possible transition is the third. Undefined values
    (deviation 0, previous distance 0, NaN) hold back.

    Args:
        skewness: threshold of the skewness; distance: of the change of distance, in percent.
    """

    name, sign, verb = "settled", "<", "less than"
    description = "skewed in every layer, and its change below --ds (the reference's)"
    options = ("skewness", "distance")
    remedy = "a lower --sk, a higher --ds"
    needs_mean_attention = True

    def __init__(self, skewness: float, distance: float) -> None:
        super().__init__()
        self.conditions = (
            Condition("skewness", ">=", skewness, "skewness"),
            Condition("change_percent", self.sign, distance, "change", ".2f", " %"),
        )
        self.fired = f"every layer is skewed and {self.name}"
        self._previous: Tensor | None = None  # [L, groups, N, N]
        self._previous_distance: list[float] = []

    def describe(self) -> str:
        skewness, change = self.conditions
        return (
            f"sparse as soon as, in every layer on the same step, skewness >= "
            f"{skewness.threshold:g} and the Frobenius distance between successive "
            f"steps changes by {self.verb} {change.threshold:g} percent ({self.name})"
        )

    def measure(self, observation: Any) -> Values:
        """Of mean_attention [L, groups, N, N], over all elements of a layer. It is copied; the
        caller may overwrite it afterwards. One copy of 2 L numbers goes to the host.

        Raises:
            ValueError: not four dimensions, or a shape that differs from the previous step's.
        """
        import torch

        from sparsity.observe import frobenius_distance, skewness

        attention = observation.mean_attention
        if attention.dim() != 4:
            raise ValueError(
                f"mean_attention must be [L, groups, N, N], not {list(attention.shape)}"
            )
        skews = torch.stack([skewness(layer) for layer in attention])
        if self._previous is None:
            distances = torch.zeros_like(skews)
            self._previous = attention.clone()
        else:
            if self._previous.shape != attention.shape:
                raise ValueError(
                    f"mean_attention changed its shape from {list(self._previous.shape)} to "
                    f"{list(attention.shape)}"
                )
            pairs = zip(attention, self._previous, strict=True)
            distances = torch.stack([frobenius_distance(layer, old) for layer, old in pairs])
            self._previous.copy_(attention)
        skew, distance = torch.stack([skews, distances]).tolist()
        change: list[float | None] = [None] * len(skew)
        for layer, before in enumerate(self._previous_distance):
            if before > 0 and math.isfinite(before) and math.isfinite(distance[layer]):
                change[layer] = abs(distance[layer] - before) / before * 100
        self._previous_distance = distance
        return {
            "skewness": [_finite(value) for value in skew],
            "distance": [_finite(value) for value in distance],
            "change_percent": change,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "previous": self._previous,
            "previous_distance": list(self._previous_distance),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        super().load_state_dict(state)
        previous = state["previous"]
        self._previous = None if previous is None else previous.to(device)
        self._previous_distance = list(state["previous_distance"])

    def release(self) -> None:
        self._previous = None


class Shifting(Settled):
    """As Settled, with change_l > distance: how one of the reference's notes words it."""

    name, sign, verb = "shifting", ">", "more than"
    description = "skewed in every layer, and its change above --ds"


class Concentrated(Criterion):
    """Attention has moved away from where it began, and has stayed where it went.

    In some layer, the best blocks hold `lift` times as much attention, against chance, as they did
    on average in steps 1 to 20, and those of 20 steps ago hold all but 5 % of what the best hold
    now, both at this step and 20 steps ago. It does not depend on the pattern, so that patterns
    can be compared.

    Args:
        lift: threshold of best_mass / chance_mass, in multiples of its mean over steps 1 to 20.
    """

    description = "some layer's attention has concentrated --lift times and stays where it is"
    options = ("lift",)
    everywhere = False
    fired = "a layer's attention has concentrated and stays where it is"
    remedy = "a lower --lift"

    def __init__(self, lift: float) -> None:
        super().__init__()
        self.conditions = (
            Condition("concentration", ">=", lift, "concentration"),
            Condition("capture", ">=", CAPTURED, "capture"),
            Condition("capture_before", ">=", CAPTURED, f"capture {SPAN} steps before"),
        )

    def describe(self) -> str:
        lift = self.conditions[0].threshold
        return (
            f"sparse once, in some layer, the best blocks hold {lift:g} times as much attention "
            f"against chance as in steps 1 to {SPAN}, and those of {SPAN} steps before hold "
            f"{CAPTURED:.0%} of what the best hold, now and {SPAN} steps ago (concentrated)"
        )

    def measure(self, observation: Any) -> Values:
        names = ("concentration", "capture", "capture_before")
        return {name: observation.values[name] for name in names}


class Agreeing(Criterion):
    """The pattern's choice has settled: in some layer it agrees with that of 20 steps before
    (intersection over union) by `agreement` or more, on 20 steps in a row."""

    description = "some layer's choice of blocks agrees with an earlier one by --agreement"
    options = ("agreement",)
    everywhere = False
    fired = "a layer's choice of blocks has settled"
    remedy = "a lower --agreement"
    needs_moving_choice = True

    def __init__(self, agreement: float) -> None:
        super().__init__()
        self.conditions = (
            Condition("lowest_agreement", ">=", agreement, f"agreement over {SPAN} steps"),
        )
        self._recent: deque[list[float | None]] = deque(maxlen=SPAN)

    def describe(self) -> str:
        return (
            f"sparse once, in some layer, the choice of blocks has agreed with that of {SPAN} "
            f"steps before by {self.conditions[0].threshold:g} (intersection over union) on "
            f"{SPAN} steps in a row (agreeing)"
        )

    def measure(self, observation: Any) -> Values:
        self._recent.append(observation.values["agreement"])
        lowest: list[float | None] = []
        for layer in zip(*self._recent, strict=True):
            known = [value for value in layer if value is not None]
            lowest.append(min(known) if len(known) == SPAN else None)
        return {"lowest_agreement": lowest}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        super().load_state_dict(state)
        self._recent.extend(state["recent"])


class After(Criterion):
    """A fixed budget of dense steps, as most of the field has it."""

    description = "after --max_dense_steps dense steps"
    options = ("max_dense_steps",)
    is_budget = True

    def __init__(self, max_dense_steps: int) -> None:
        super().__init__()
        self.budget = max_dense_steps

    def describe(self) -> str:
        return f"sparse after {self.budget} dense steps (after)"

    def update(self, observation: Any) -> Verdict:
        done = observation.step >= self.budget
        word = f"after {self.budget} dense steps"
        return Verdict(done, {}, {}, word if done else f"step {observation.step} of {self.budget}")

    def outlook(self) -> str:
        return f"it fires at step {self.budget}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(values: list[float]) -> str:
    if not values:
        return "undefined"
    ordered = sorted(values)
    last = len(ordered) - 1
    return "/".join(f"{ordered[round(last * share)]:.2f}" for share in (0.1, 0.5, 0.9))


CRITERIA: dict[str, type[Criterion]] = {
    "settled": Settled,
    "shifting": Shifting,
    "concentrated": Concentrated,
    "agreeing": Agreeing,
    "after": After,
}
