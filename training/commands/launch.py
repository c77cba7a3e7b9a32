"""What the commands share: this process's place, exit codes, and what arguments stand for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from training.data.dataset import open_dataset
from training.data.examples import Dataset
from training.distributed import PeerLostError
from training.errors import UserError
from training.options import interrupted_early
from training.recording.log import say
from training.run import TrainingFailed
from training.settings import TaskConfig


@dataclass(frozen=True)
class Launch:
    """This process's place among those torchrun started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0  # how often torchrun has started the job anew

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        return cls(
            int(environment.get("RANK", 0)),
            int(environment.get("WORLD_SIZE", 1)),
            int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


def guarded(job: Callable[[], int]) -> int:
    """Runs `job`; what its user can mend, and what may happen to any run, ends in one sentence and
    an exit code. Our own mistakes keep their traceback."""
    try:
        return job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, PeerLostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted_early()


# ---- what arguments stand for ------------------------------------------------------


def resolve_device(name: str, launch: Launch) -> torch.device:
    """auto: this process's GPU if there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device that torch can use")
    index = launch.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the hardware multiplies it, else fp16 on CUDA and fp32 on a CPU.

    Raises:
        UserError: fp16 on a CPU.
    """
    if device.type == "cuda":
        if name == "auto":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return name
    if name == "fp16":
        raise UserError("--precision fp16 needs a CUDA device; on a CPU use bf16 or fp32")
    if name == "auto":
        native = any(
            getattr(torch.cpu, probe, lambda: False)()
            for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        )
        return "bf16" if native else "fp32"
    return name


def resolve_backend(name: str, device: torch.device) -> str:
    """Refuses a named backend that cannot run here.

    Raises:
        UserError: says why not.
    """
    if name != "auto":
        reason = kernels.available_backends().get(name)
        if reason is not True:
            raise UserError(f"--backend {name} cannot be used: {reason}")
        if (
            device.type != ("cuda" if name in ("cuda", "triton") else "cpu")
            and name != "reference"
        ):
            raise UserError(f"--backend {name} does not run on --device {device.type}")
    return name


def open_split(
    data_dir: str,
    config: TaskConfig,
    task_dict: Mapping[str, Any],
    split: str,
    launch: Launch,
) -> Dataset:
    """One of a task's three data sets.

    Raises:
        UserError: missing (names the script that makes it), damaged, or not fitting the model.
    """
    path = Path(data_dir) / f"{config.task}.{split}.pickle"
    if not path.exists():
        script = task_dict["dataset"]["create"]
        raise UserError(f"there is no {path}; make it with: python {script}")
    model = config.model
    return open_dataset(
        path,
        vocab_size=model.vocab_size,
        length=model.padded_length,
        num_classes=model.num_classes,
        num_inputs=model.num_inputs,
        expected_size=task_dict["dataset"][split],
        # at once, not with the log's first lines: converting a large pickle takes a while
        notify=say if launch.rank == 0 else lambda text: None,
    )


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be made below `folder` (which need not exist yet)."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: cannot write there; choose another folder")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise UserError(f"--output_dir {folder}: the file system is read-only")
