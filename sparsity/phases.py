"""The order of phases: dense until a criterion fires, then sparse; the reference's run has two.

A phase that follows another chooses its blocks when it begins; its optimizer, best model and
patience start anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    name: "dense" or "sparse". pattern, density: of the blocks that a sparse phase attends to.
    criterion: what ends a dense phase, max_steps: what ends any; neither: the end of the run.
    optimizer: "one-cycle" or "constant", see training/optim.py.
    reselect_every: steps of the phase between two choices of blocks.
    """

    name: str
    optimizer: str
    pattern: str | None = None
    density: float | None = None
    criterion: str | None = None
    max_steps: int | None = None
    reselect_every: int | None = None

    def describe(self) -> str:
        if self.name == "dense":
            limit = "" if self.max_steps is None else f", at most {self.max_steps} steps"
            return f"dense until {self.criterion}{limit}"
        parts = [f"sparse ({self.pattern}, density {self.density:g}"]
        if self.reselect_every is not None:
            parts.append(f"chosen anew every {self.reselect_every} steps")
        end = "to the end" if self.max_steps is None else f"for {self.max_steps} steps"
        return f"{', '.join(parts)}) {end}"


def plan(
    *,
    criterion: str,
    max_dense_steps: int | None,
    pattern: str,
    densities: Sequence[float],
    phase_steps: int | None,
    reselect_every: int | None,
) -> list[Phase]:
    """Dense until the criterion fires or max_dense_steps are done, then one sparse phase for each
    density, all but the last for phase_steps steps."""
    dense = Phase("dense", "one-cycle", criterion=criterion, max_steps=max_dense_steps)
    sparse = [
        Phase(
            "sparse",
            "constant",
            pattern,
            density,
            max_steps=phase_steps if index < len(densities) - 1 else None,
            reselect_every=reselect_every,
        )
        for index, density in enumerate(densities)
    ]
    return [dense, *sparse]
