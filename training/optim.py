"""Each phase's optimizer and learning-rate schedule.

Dense: AdamW under one-cycle with torch's defaults (from learning_rate / 25 up over `warmup` steps,
down to learning_rate / 250,000; beta1 cycles 0.95, 0.85, 0.95). Sparse: a new AdamW at a constant
0.5 * learning_rate with beta1 0.9, because in the reference the schedule goes on driving the
optimizer that was left behind.
Source: docs/semantics.md, "Optimisation".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from training.settings import TrainingConfig

GRADIENT_CLIP = 1.0  # each gradient value is clipped to [-1, 1]


class PhaseOptimizer:
    """AdamW and, in the dense phase, its schedule: stepped together, saved together."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: TrainingConfig,
        phase: str,
        fused: bool | None = None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.phase = phase
        if fused is None:  # one launch on a GPU
            fused = all(p.is_cuda for p in self.parameters) or None
        learning_rate = config.learning_rate * (1.0 if phase == "dense" else 0.5)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=config.weight_decay,
            fused=fused,
        )
        self.schedule = None
        # one step has no cycle: torch divides by the length of a phase
        if phase == "dense" and config.num_train_steps > 1:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                max_lr=config.learning_rate,
                # torch divides by zero for a warmup of exactly one step: its only step is the peak
                # either way
                pct_start=(config.warmup if config.warmup > 1 else 0) / config.num_train_steps,
                anneal_strategy="linear",
                total_steps=config.num_train_steps,
            )
            self._steps_left = config.num_train_steps - 1

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def zero_grad(self, keep: bool = False) -> None:
        """keep: gradients stay where they are in memory: captured graphs add to them there."""
        self.optimizer.zero_grad(set_to_none=not keep)

    def drop_unfinished_state(self) -> bool:
        """Of parameters for which memory ended while their state was made, before any update; the
        next step makes it anew. (AdamW takes whatever is there for the whole of it.) Whether there
        was any."""
        state = self.optimizer.state
        unfinished = [p for p in state if "exp_avg_sq" not in state[p]]
        for parameter in unfinished:
            del state[parameter]
        return bool(unfinished)

    def clip(self) -> None:
        nn.utils.clip_grad_value_(self.parameters, GRADIENT_CLIP)

    def advance(self) -> None:
        """Moves the schedule on, after a step. It is defined for num_train_steps steps and stays
        at its end after them."""
        if self.schedule is not None and self._steps_left > 0:
            self._steps_left -= 1
            self.schedule.step()

    def state_dict(self) -> dict:
        state = {"phase": self.phase, "optimizer": self.optimizer.state_dict(), "schedule": None}
        if self.schedule is not None:
            state["schedule"] = {
                "state": self.schedule.state_dict(),
                "steps_left": self._steps_left,
            }
        return state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"]["state"])
            self._steps_left = state["schedule"]["steps_left"]
