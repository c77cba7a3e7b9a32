"""What the commands share: this process's place, exit codes, and what arguments stand for."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from models import ModelConfig, SequenceClassifier, build_model
from training import memory, shell
from training.data.dataset import open_dataset, script_of
from training.data.examples import Dataset
from training.distributed import PeerLostError
from training.errors import TrainingFailed, UserError
from training.options import interrupted_early
from training.settings import TaskConfig

DEFAULT_DATA = shell.ROOT / "data" / "lra_processed"


@dataclass(frozen=True)
class Launch:
    """What the environment says: this process's place among those torchrun started, and whether
    its terminal can redraw a line."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0  # how often torchrun has started the job anew
    torchrun: tuple[str, ...] = ()  # the words that start such a job
    redraws: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """An empty variable counts as absent.

        Raises:
            UserError: variables that do not go together.
        """
        numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "TORCHELASTIC_RESTART_COUNT": 0}
        numbers |= {"LOCAL_WORLD_SIZE": 0, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_MAX_RESTARTS": 0}
        found = {name: environment[name] for name in numbers if environment.get(name)}
        remedy = "torchrun sets them together; to train in one process, unset RANK and WORLD_SIZE"
        for name, text in found.items():
            if not text.isdecimal():
                raise UserError(f"{name}={text} is no number; {remedy}")
            numbers[name] = int(text)
        rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
        if rank >= size or (size > 1 and "RANK" not in found):
            given = ", ".join(f"{name}={found[name]}" for name in sorted(found))
            raise UserError(f"{given} do not make a place among processes; {remedy}")
        if size > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
            raise UserError(f"WORLD_SIZE={size} without MASTER_ADDR and MASTER_PORT; {remedy}")
        return cls(
            rank,
            size,
            numbers["LOCAL_RANK"],
            numbers["TORCHELASTIC_RESTART_COUNT"],
            _torchrun(numbers, environment) if size > 1 else (),
            redraws=environment.get("TERM") != "dumb",
        )


def _torchrun(numbers: Mapping[str, int], environment: Mapping[str, str]) -> tuple[str, ...]:
    nodes = numbers["GROUP_WORLD_SIZE"]
    meeting = ["--standalone"]
    if nodes > 1:
        meeting = [f"--nnodes={nodes}", "--rdzv_backend=c10d"]
        meeting += [f"--rdzv_endpoint={environment['MASTER_ADDR']}:29400", "--rdzv_id=resumed"]
    processes = f"--nproc_per_node={numbers['LOCAL_WORLD_SIZE'] or numbers['WORLD_SIZE']}"
    restarts = numbers["TORCHELASTIC_MAX_RESTARTS"]
    again = [f"--max_restarts={restarts}"] if restarts else []
    return ("-m", "torch.distributed.run", *meeting, processes, *again)


def guarded(job: Callable[[], int]) -> int:
    """Runs `job`; what its user can mend, and what may happen to any run, ends in one sentence and
    an exit code. Our own mistakes keep their traceback."""
    shell.prepare_streams()
    try:
        return job()
    except UserError as error:
        shell.say(f"error: {error}", sys.stderr)
        return 2
    except (TrainingFailed, PeerLostError) as error:
        shell.say(f"error: {error}", sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not memory.is_exhausted(error):
            raise
        shell.say("error: there is not enough memory; nothing that was saved is lost", sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        shell.say(f"error: {where}{error.strerror or error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted_early()


def check_text(arguments: Sequence[str]) -> None:
    """Raises UserError for an argument that is not UTF-8: logs and JSON could not hold it."""
    for place, word in enumerate(arguments):
        try:
            word.encode()
        except UnicodeEncodeError:
            given = " ".join(arguments[max(0, place - 1) : place + 1])
            raise UserError(
                f"{given!a} is not UTF-8, or the locale is not: choose another name"
            ) from None


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


def resolve_backend(
    name: str, device: torch.device, model: ModelConfig, precision: str
) -> tuple[str, list[str]]:
    """The backend, and a sentence if "auto" ends at the slow one because of the model's shapes.

    Raises:
        UserError: a named backend cannot run here, or not this model; says why not.
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
    asked = device.type if name == "auto" else name
    if kernels.available_backends().get(asked) is not True:
        return name, []  # the line about the device says why it is missing
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    shape = (model.head_dim,), model.padded_length
    ops = {"dense_attention": None, "attention_statistics": model.block_size}
    ops["block_sparse_attention"] = model.block_size
    against = {
        op: kernels.can_run(asked, kernels.Call(op, device, (dtype,), *shape, block_size))
        for op, block_size in ops.items()
    }
    reasons = "; ".join(dict.fromkeys(reason for reason in against.values() if reason))
    if not reasons:
        return name, []
    if name != "auto":
        raise UserError(f"--backend {name} cannot compute this model: {reasons}")
    slow = " and ".join(op.replace("_", " ") for op, reason in against.items() if reason)
    return name, [
        f"backend reference, plain PyTorch, does {slow}, 3 to 10 times slower than {asked} would: "
        f"{reasons}"
    ]


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
    about = task_dict.get("dataset") or {}  # for information: a dict may leave it out
    if not path.exists():
        script = about.get("create") or script_of(config.task)
        remedy = ""
        if script is not None:
            to = ["--output_dir", data_dir] if path.parent.resolve() != DEFAULT_DATA else []
            remedy = f"; make it with: {shell.command(shell.ROOT / script, to)}"
        raise UserError(f"there is no {path}{remedy}")
    model = config.model
    return open_dataset(
        path,
        vocab_size=model.vocab_size,
        length=model.padded_length,
        num_classes=model.num_classes,
        num_inputs=model.num_inputs,
        expected_size=about.get(split),
        # at once, not with the log's first lines: converting a large pickle takes a while
        notify=shell.say if launch.rank == 0 else lambda text: None,
    )


def build(config: TaskConfig, backend: str, device: torch.device) -> SequenceClassifier:
    """The model of a configuration.

    Raises:
        UserError: there is not enough memory for it.
    """
    try:
        return build_model(config.model, backend).to(device)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        raise UserError("there is not enough memory for a model of this size") from None


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A checksum of a model's weights, to compare processes by."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        found.update(name.encode() + value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be made below `folder` (which need not exist yet)."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: cannot write there; choose another folder")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise UserError(f"--output_dir {folder}: the file system is read-only")
