"""What a run consists of; the loop changes it, the report reads it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models import SequenceClassifier
from sparsity import Criterion, select_blocks
from sparsity.observe import Observation, Observer
from sparsity.patterns import PATTERNS
from sparsity.phases import Phase
from training.data.examples import Dataset
from training.distributed import World
from training.errors import TrainingFailed
from training.graphs import MicroBatchGraphs
from training.interrupt import StopSignal
from training.optim import PhaseOptimizer
from training.recording.log import NullLog
from training.recording.paths import RunPaths
from training.settings import TaskConfig


@dataclass
class RunOptions:
    """What the command line decides besides the configuration, and may change on resume."""

    stop_after: int | None = None  # a cut through the full schedule, to be resumed
    micro_batch_size: int = 16
    resume_command: str = ""


@dataclass
class Run:
    """Everything a run consists of. The loop changes `step` and what follows it; the rest
    stays."""

    config: TaskConfig
    options: RunOptions
    paths: RunPaths | None  # None: a dry run, which writes nothing
    device: torch.device
    world: World
    log: NullLog
    model: SequenceClassifier
    train_data: Dataset
    dev_data: Dataset
    stop: StopSignal
    given_masks: Tensor | None = None  # bool [L, nb, nb], of --masks
    criterion: Criterion = field(init=False)  # ends the dense phase
    observer: Observer = field(init=False)
    observation: Observation | None = None  # of the last dense step
    initial_scores: Tensor = field(init=False)  # [L, nb, nb], before the first step
    optimizer: PhaseOptimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    graphs: MicroBatchGraphs = field(init=False)
    phases: list[Phase] = field(init=False)
    phase_index: int = 0
    phase_began: int = 0  # completed steps when the phase began
    step: int = 0
    transition_step: int | None = None
    best_accuracy: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    # of a step whose evaluation a signal stopped: whether the criterion was ready, and why
    unfinished: tuple[bool, str] | None = None
    skipped_in_a_row: int = 0  # steps up to now whose gradient overflowed fp16
    seconds: float = 0.0  # spent training, over all its sessions
    session_began: float = field(default_factory=time.monotonic)
    data_sha256: dict[str, str] = field(default_factory=dict)  # split -> that of its pickle
    mean_attention: Tensor | None = None  # [L, groups, N, N] fp32, dense phase only

    def __post_init__(self) -> None:
        self.phases = self.config.phases()
        self.criterion = self.config.new_criterion()
        self.observer = Observer(
            self.choose, PATTERNS[self.config.sparsity.pattern].needs is not None
        )
        self.initial_scores = self.model.pattern_scores()
        self.optimizer = self.new_optimizer()
        # fp16 alone has too small a range for gradients
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.config.run.precision == "fp16"
        )
        off = "fp16 scales its loss" if self.scaler.is_enabled() else None
        self.graphs = MicroBatchGraphs(list(self.model.parameters()), off, self.log.line)

    def choose(self, observation: Observation) -> Tensor:
        """The blocks that the next sparse phase, or this one, would keep now: bool
        [L, nb, nb]."""
        phase = self.phases[max(self.phase_index, 1)]
        assert phase.pattern is not None and phase.density is not None
        return select_blocks(phase.pattern, observation, phase.density, self.config.run.seed)

    @property
    def phase(self) -> str:
        """ "dense" or "sparse"."""
        return self.phases[self.phase_index].name

    def new_optimizer(self) -> PhaseOptimizer:
        return PhaseOptimizer(self.model.parameters(), self.config.training, self.phase)


def not_finite(run: Run, what: str) -> TrainingFailed:
    """What to raise when numbers have broken: says where, and what there is to go on from."""
    last = f", the last good checkpoint is {run.paths.last}" if run.paths is not None else ""
    return TrainingFailed(
        f"{what} ({run.phase} phase) is not finite; training stopped{last}; try a lower learning "
        f"rate (--set training.learning_rate=...)"
    )


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch of one training step."""

    loss: float
    attention_loss: float | None  # None in the sparse phase
    accuracy: float
    learning_rate: float
    gradient_norm: float | None  # L2, before clipping; None if it is not finite
    loss_scale: float | None  # of the GradScaler; None but in fp16
    skipped: bool  # the gradient overflowed fp16, so that no weight moved
    stop_signal: int  # of any process; 0: none
    # `pooled` and `uniform` of sparsity.observe.Observation, in the dense phase
    seen: tuple[Tensor, Tensor | None] | None = None
