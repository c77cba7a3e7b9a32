"""run.json: what ran, on what, and what came of it."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.config import ModelConfig
from training.recording.log import write_json
from training.run import Run

ROOT = Path(__file__).resolve().parents[2]


def resolved_settings(run: Run) -> dict[str, Any]:
    """What was decided at the start and a resumed run takes over."""
    return {
        "seed": run.config.run.seed,
        "pattern": run.config.sparsity.pattern,
        "when": run.config.sparsity.transition_when,
        "max_dense_steps": run.config.sparsity.max_dense_steps,
        "patience": run.config.run.patience,
        "micro_batch_size": run.options.micro_batch_size,
        "precision": run.config.run.precision,
        "backend": run.model.backend,
        "device": run.device.type,
        "processes": run.world.size,
        "threads": torch.get_num_threads(),
        "data_sha256": run.data_sha256,
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


def begin_session(run: Run, command: str) -> None:
    """Writes the facts of a run at its start, and of every start and resume what it ran on."""
    if not run.world.is_main or run.paths is None:
        return
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": run.step,
        "command": command,
        **commit(),
        "device": device_name(run.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "versions": versions(),
        "wall_seconds": 0.0,
    }
    path = run.paths.run_json
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    facts = {
        "config": run.config.as_dict(),
        "command": command,
        **{name: session[name] for name in ("started", "device", "versions")},
        "resolved": resolved_settings(run),
        "num_parameters": sum(p.numel() for p in run.model.parameters()),
        "flops_per_step": {
            phase: flops(run.config.model, run.config.training.batch_size, phase)
            for phase in ("dense", "sparse")
        },
        "halved_micro_batches": [],
        "result": None,
    }
    # a run killed before its first checkpoint begins anew, but it did run before
    facts |= before if run.step else {}
    write_json(path, {**facts, "sessions": [*before.get("sessions", []), session]})


def record(run: Run, result: dict | None = None, halved: dict | None = None) -> None:
    """Brings run.json up to date: the session's wall-clock time, and what is given."""
    if not run.world.is_main or run.paths is None:
        return
    facts = json.loads(run.paths.run_json.read_text())
    facts["sessions"][-1]["wall_seconds"] = time.monotonic() - run.session_began
    if halved is not None:
        facts.setdefault("halved_micro_batches", []).append(halved)
    if result is not None:
        facts["result"] = result
    write_json(run.paths.run_json, facts)


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The git commit of this code and whether its files are as committed; None where that cannot
    be told (no git, no clone)."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout

    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root:  # unpacked inside another project's clone
            return {"commit": None, "clean": None}
        return {"commit": head, "clean": not git("status", "--porcelain", "--untracked-files=no")}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"commit": None, "clean": None}


def processor() -> str:
    """The model of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "platform": sys.platform,
    }
