"""--dry_run: what a run would take, on made-up data."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from training import loop, memory
from training.data.examples import Dataset
from training.recording import provenance
from training.recording.page import duration
from training.run import Run
from training.settings import TaskConfig


class MadeUpData:
    """Random ids and labels of a task's shape, for a dry run."""

    sha256 = ""

    def __init__(self, config: TaskConfig) -> None:
        self._model = config.model
        self.size = config.training.batch_size

    def batch(self, indices: np.ndarray):
        """As training.data.examples.Dataset.batch."""
        model = self._model
        generator = torch.Generator().manual_seed(int(indices[0]))
        shape = (len(indices), model.padded_length)
        ids = [
            torch.randint(1, model.vocab_size, shape, generator=generator)
            for _ in range(model.num_inputs)
        ]
        labels = torch.randint(0, model.num_classes, (len(indices),), generator=generator)
        return ids[0], (ids[1] if len(ids) == 2 else None), labels


def made_up_data(config: TaskConfig) -> Dataset:
    return MadeUpData(config)  # type: ignore[return-value]


def dry_run(run: Run, notices: Sequence[str] = ()) -> int:
    """One step of each phase (and the criterion twice, as from the second step on); prints what a
    run would take."""
    training = run.config.training
    print(
        f"dry run of {run.config.task}: batch {training.batch_size}, "
        f"micro-batch {run.options.micro_batch_size}, {provenance.device_name(run.device)}, "
        f"precision {run.config.run.precision}; nothing is written"
    )
    for notice in notices:
        print(notice)
    before = memory.peak_bytes(run.device)
    seconds = {}
    peaks = {}
    for phase in ("dense", "sparse"):
        result = loop.train_step(run)  # warms up
        if phase == "dense":
            loop.decide(run, result)
        started = time.perf_counter()
        result = loop.train_step(run)
        if phase == "dense":
            loop.decide(run, result)
        seconds[phase] = time.perf_counter() - started
        peaks[phase] = memory.peak_bytes(run.device)
        if phase == "dense":
            loop.enter_next_phase(run, "dry run")
    flops = {
        phase: provenance.flops(run.config.model, training.batch_size, phase)["step"]
        for phase in seconds
    }
    for phase, took in seconds.items():
        print(
            f"{phase} step: {took * 1e3:,.0f} ms, {flops[phase] / 1e9:,.1f} GFLOP, "
            f"{flops[phase] / took / 1e9:,.1f} GFLOP/s"
        )
    steps = training.num_train_steps
    print(
        f"all {steps:,} steps: {duration(steps * seconds['sparse'])} sparse, "
        f"{duration(steps * seconds['dense'])} dense; "
        "a run takes a time in between, depending on when it switches (without evaluations)"
    )
    print(
        f"peak memory: {memory.human(peaks['dense'])} ({memory.human(before)} before the first "
        f"step); set by the dense phase"
    )
    return 0
