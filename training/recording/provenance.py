"""run.json: what ran, on what, and what came of it."""

from __future__ import annotations

import json
import platform
import sys
import time
from typing import Any

import numpy as np
import torch

from models.config import ModelConfig
from training.recording.log import write_json
from training.run import Run


def resolved_settings(run: Run) -> dict[str, Any]:
    """What was decided at the start and a resumed run takes over."""
    return {
        "seed": run.options.seed,
        "pattern": run.options.pattern,
        "when": run.criterion.when,
        "max_dense_steps": run.options.max_dense_steps,
        "patience": run.options.patience,
        "micro_batch_size": run.options.micro_batch_size,
        "precision": run.options.precision,
        "backend": run.model.backend,
        "device": run.device.type,
        "processes": run.world.size,
        "threads": torch.get_num_threads(),
        "train_examples": run.train_data.size,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


def flops(model: ModelConfig, batch_size: int, phase: str) -> dict[str, float]:
    """Floating-point operations of one training step, forward and backward, one multiply-add
    counted as two.

    attention: the two products forward (4 B H n d for n attended pairs) and the four backward;
    recomputation is not counted. statistics: the scores of a dense step's mean attention once
    more. step: all of it with the linear layers.
    """
    pairs: float = model.padded_length**2
    if phase == "sparse":
        pairs = model.num_active_blocks * model.block_size**2
    examples = batch_size * model.num_inputs
    inner = model.num_head * model.head_dim
    per_pass = 4.0 * examples * inner * pairs * model.num_layers
    attention = 3 * per_pass
    statistics = per_pass / 2 if phase == "dense" else 0.0
    weights = model.transformer_dim * (4 * inner + 2 * model.transformer_hidden_dim)
    linear = 3 * 2.0 * examples * model.padded_length * weights * model.num_layers
    return {
        "attention": attention,
        "statistics": statistics,
        "step": attention + statistics + linear,
    }


def write_run_json(run: Run, command: str | None = None, result: dict | None = None) -> None:
    """The facts of a run, readable without loading anything: configuration, versions, device,
    FLOPs, result."""
    if not run.world.is_main or run.paths is None:
        return
    path = run.paths.run_json
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if command is not None:
        facts = {
            "config": run.config.as_dict(),
            "command": command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            "device": device_name(run.device),
            "resolved": resolved_settings(run),
            "num_parameters": sum(p.numel() for p in run.model.parameters()),
            "flops_per_step": {
                phase: flops(run.config.model, run.config.training.batch_size, phase)
                for phase in ("dense", "sparse")
            },
            "result": None,
        }
    if result is not None:
        facts["result"] = result
    write_json(path, facts)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": sys.platform,
    }
