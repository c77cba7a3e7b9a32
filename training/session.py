"""From parsed arguments to a run: checks everything first, writes only when all is well.

Both entry scripts come here. A mistake of the user is a ValueError with one sentence and ends in
exit code 2, a run that fails later in exit code 1; `guarded` turns exceptions into both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from models import SequenceClassifier, build_model
from training import loop, memory, report
from training.checkpoint import (
    CheckpointError,
    RunPaths,
    TrainState,
    check_fits,
    find_masks,
    load_checkpoint,
    load_last_checkpoint,
    mask_agreement,
    remove_stale_temporaries,
)
from training.config import TaskConfig, build_config, resolve_task, unused_fields
from training.dataset import Dataset, open_dataset
from training.distributed import PeerLostError, World, join_world
from training.evaluation import Evaluation, evaluate
from training.interrupt import StopSignal
from training.logging import NullLog, RunLog, say
from training.options import interrupted_early
from training.run import Run, RunOptions, TrainingFailed
from training.transition import TransitionCriterion

# share of a layer's mask that its pattern would choose; foreign masks reach about the density
FITTING_MASKS = 0.5


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
    """Runs `job`; what it may foresee ends in one sentence and an exit code."""
    try:
        return job()
    except ValueError as error:
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


# ---- training ----------------------------------------------------------------------


def train_run(
    args: argparse.Namespace,
    tasks: Mapping[str, Any],
    aliases: Mapping[str, str],
    launch: Launch,
    command: str,
) -> int:
    """--mode train: a new run, a resumed one, or a dry run; ends with the test result."""
    task = resolve_task(args.task, tasks, aliases)
    paths = RunPaths(Path(args.output_dir), args.random, task, args.name)
    if launch.restarts:  # the job was started anew after a failure: it goes on, whatever was typed
        args.resume = True
    state = None
    said: list[str] = []
    if not args.dry_run:
        state = _state_to_resume(args, paths, said)
    config, notices = _training_config(args, task, tasks[task], state)
    notices = said + notices
    stored = (state.training or {}).get("resolved", {}) if state is not None else {}
    device = resolve_device(args.device, launch)
    memory.keep_freed_memory()
    precision = _taken_over(
        args.precision, "auto", stored, "precision", lambda: resolve_precision("auto", device)
    )
    precision = resolve_precision(precision, device)
    pattern = _taken_over(args.pattern, None, stored, "pattern", lambda: "learned")
    when = _taken_over(args.transition_when, None, stored, "when", lambda: "settled")
    max_dense_steps = _taken_over(
        args.max_dense_steps, None, stored, "max_dense_steps", lambda: None
    )
    if max_dense_steps == 0 and pattern == "learned":
        raise ValueError(
            "--max_dense_steps 0 leaves nothing to learn a pattern from; add --pattern band or "
            "--pattern random"
        )
    backend = resolve_backend(args.backend, device)
    datasets: tuple[Dataset, Dataset]
    if args.dry_run:
        datasets = (made_up_data(config), made_up_data(config))
    else:
        train_data, dev_data, test_data = (
            open_split(args.data_dir, config, tasks[task], split, launch)
            for split in ("train", "dev", "test")
        )
        datasets = (train_data, dev_data)
        check_writable(paths.output_dir)
    world = join_world(launch.rank, launch.size, device)
    world.wait()  # all have looked for an earlier run before the first file of this one is there
    micro = args.micro_batch_size or stored.get("micro_batch_size")
    if micro is None or micro == "auto":
        micro = stored.get("micro_batch_size") or memory.auto_micro_batch(
            config.model, config.training.batch_size, device, world.size
        )

    torch.manual_seed(args.random)
    model = build_model(config.model, backend).to(device)
    options = RunOptions(
        seed=args.random,
        pattern=pattern,
        max_dense_steps=max_dense_steps,
        patience=stored.get("patience") if args.patience is None else args.patience,
        stop_after=args.stop_after,
        micro_batch_size=micro,
        precision=precision,
        resume_command=_resume_command(command),
    )
    log = NullLog()
    if world.is_main and not args.dry_run:
        resume_step = resume_position = None
        if args.resume:
            resume_step = state.step if state is not None else -1
            resume_position = (state.training or {})["log"] if state is not None else None
        log = RunLog(
            paths.log,
            metrics_path=paths.metrics,
            tensorboard_dir=paths.tensorboard,
            total_steps=config.training.num_train_steps,
            resume_step=resume_step,
            resume_position=resume_position,
        )
    run = Run(
        config=config,
        options=options,
        paths=None if args.dry_run else paths,
        device=device,
        world=world,
        log=log,
        model=model,
        train_data=datasets[0],
        dev_data=datasets[1],
        stop=StopSignal(),
        criterion=TransitionCriterion(config.training.skewness, config.training.distance, when),
    )
    try:
        if args.dry_run:
            return dry_run(run)
        run.stop.install()
        if state is None:
            report.run_started(run, notices, unused_fields(tasks[task]), command)
        else:
            check_fits(paths.last, state, model.state_dict())
            loop.restore(run, state)
            report.run_resumed(run, notices + _changed_circumstances(run, stored))
        # its tensors are the model's now; holding both would double the criterion's memory
        state = None
        return _train_and_test(run, test_data)
    except TrainingFailed as error:
        with contextlib.suppress(OSError):  # a full disk may be the very reason
            log.note(f"error: {error}")
        raise
    finally:
        run.stop.remove()
        log.close()
        world.close()


def _train_and_test(run: Run, test_data: Dataset) -> int:
    assert run.paths is not None
    try:
        outcome = loop.train(run)
    except CheckpointError as error:
        raise TrainingFailed(str(error)) from None
    except ValueError as error:
        # past the checks a ValueError is our mistake, not the user's: it deserves its traceback
        raise RuntimeError(f"internal error: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        last = run.paths.last
        remark = (
            f"the last checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        )
        raise TrainingFailed(f"writing failed at step {run.step}: {reason}; {remark}") from None
    if outcome == "interrupted":
        return run.stop.exit_code(run.stop.received or run.stop.default)
    if outcome == "stopped":
        return 0
    if run.stop.received:  # came too late for the loop
        name = run.stop.name_of(run.stop.received)
        report.resume_hint(run, f"stopped by {name}, before the test")
        return run.stop.exit_code(run.stop.received)
    run.stop.all_saved()
    run.world.wait()  # the first process has written the best model
    state = load_checkpoint(run.paths.model)
    model = model_of(state, run.config, run.model.backend, run.device)
    result, seconds = timed_test(
        model,
        test_data,
        run.options.micro_batch_size,
        run.device,
        run.options.precision,
        run.world,
    )
    report.test_done(run.log, result, seconds, state.phase)
    report.run_finished(run, result)
    return 0


def _state_to_resume(
    args: argparse.Namespace, paths: RunPaths, said: list[str]
) -> TrainState | None:
    """The checkpoint to go on from, or None for a start at step 0."""
    used = [p for p in (paths.last, paths.model, paths.metrics, paths.run_json) if p.exists()]
    if not args.resume:
        if used:
            raise ValueError(
                f"there is a run of --random {args.random} --task {paths.task} --name {args.name} "
                f"already ({used[0]}); "
                f"go on with it by adding --resume, or choose another --name"
            )
        return None
    remove_stale_temporaries(paths.last)
    if not paths.last.exists() and not paths.previous.exists():
        said.append(f"there is no checkpoint {paths.last}: --resume starts at step 0")
        return None
    state = load_last_checkpoint(paths.last, said.append)
    if state.training is None:
        raise ValueError(f"{paths.last} holds a model to evaluate, not a run to resume")
    if state.config is not None and state.config["task"] != paths.task:
        raise ValueError(f"{paths.last} belongs to task {state.config['task']}, not {paths.task}")
    if state.training["resolved"]["seed"] != args.random:
        raise ValueError(
            f"{paths.last} belongs to --random {state.training['resolved']['seed']}, not "
            f"{args.random}"
        )
    if args.stop_after is not None and args.stop_after <= state.step:
        raise ValueError(
            f"--stop_after {args.stop_after}: the run has {state.step} completed steps already; "
            f"give more or leave it out"
        )
    return state


def _resume_command(command: str) -> str:
    """`command` without --stop_after, which has done its part, and with --resume."""
    kept = []
    words = iter(shlex.split(command))
    for word in words:
        if word == "--stop_after":
            next(words)
        elif word != "--resume" and not word.startswith("--stop_after="):
            kept.append(word)
    return shlex.join([*kept, "--resume"])


def _training_config(
    args: argparse.Namespace, task: str, task_dict: Mapping[str, Any], state: TrainState | None
) -> tuple[TaskConfig, list[str]]:
    """The task's configuration, or on resuming the checkpoint's, which flags may repeat but not
    change."""
    base = task_dict if state is None else state.config
    assert base is not None
    flags = {
        "batch_size": args.batch_size,
        "train_steps": args.train_steps,
        "skewness": args.sk,
        "distance": args.ds,
    }
    config, notices = build_config(task, base, settings=args.set, **flags)
    if state is None:
        return config, notices
    resumed = TaskConfig.from_dict(base)
    for section in ("model", "training"):
        before, now = getattr(resumed, section).as_dict(), getattr(config, section).as_dict()
        for name, value in before.items():
            # how often a checkpoint is written changes nothing else
            if now[name] != value and name != "save_seconds":
                raise ValueError(
                    f"cannot resume with {section}.{name}={now[name]}: the run was started with "
                    f"{value}; "
                    f"leave it out, or start a new run under another --name"
                )
    save_seconds = config.training.save_seconds
    training = dataclasses.replace(resumed.training, save_seconds=save_seconds)
    return dataclasses.replace(resumed, training=training), []


def _taken_over(
    given: Any, unset: Any, stored: dict, name: str, default: Callable[[], Any]
) -> Any:
    """A flag's value; on resuming the stored one, which the flag may repeat but not change."""
    if name not in stored:
        return default() if given == unset else given
    if given not in (unset, stored[name]):
        raise ValueError(
            f"cannot resume with another {name}: the run was started with {stored[name]}, not "
            f"{given}"
        )
    return stored[name]


def _changed_circumstances(run: Run, stored: dict) -> list[str]:
    """What may make a resumed run's bits differ from an uninterrupted one's."""
    now = report.resolved_settings(run)
    return [
        f"{name} was {stored[name]} when the run started and is {now[name]} now: results may "
        f"differ in the last bits"
        for name in (
            "threads",
            "processes",
            "device",
            "backend",
            "micro_batch_size",
            "train_examples",
        )
        if stored.get(name) != now[name]
    ]


# ---- dry run -----------------------------------------------------------------------


class MadeUpData:
    """Random ids and labels of a task's shape, for a dry run."""

    def __init__(self, config: TaskConfig) -> None:
        self._model = config.model
        self.size = config.training.batch_size

    def batch(self, indices: np.ndarray):
        """As training.dataset.Dataset.batch."""
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


def dry_run(run: Run) -> int:
    """One step of each phase (and the criterion twice, as from the second step on); prints what a
    run would take."""
    training = run.config.training
    print(
        f"dry run of {run.config.task}: batch {training.batch_size}, micro-batch "
        f"{run.options.micro_batch_size}, "
        f"{report.device_name(run.device)}, precision {run.options.precision}; nothing is written"
    )
    before = memory.peak_bytes(run.device)
    seconds = {}
    peaks = {}
    for phase in ("dense", "sparse"):
        loop.train_step(run)  # warms up
        if phase == "dense":
            loop.decide(run)
        started = time.perf_counter()
        loop.train_step(run)
        if phase == "dense":
            loop.decide(run)
        seconds[phase] = time.perf_counter() - started
        peaks[phase] = memory.peak_bytes(run.device)
        if phase == "dense":
            loop.switch_to_sparse(run, "dry run")
    flops = {
        phase: report.flops(run.config.model, training.batch_size, phase)["step"]
        for phase in seconds
    }
    for phase, duration in seconds.items():
        print(
            f"{phase} step: {duration * 1e3:,.0f} ms, {flops[phase] / 1e9:,.1f} GFLOP, "
            f"{flops[phase] / duration / 1e9:,.1f} GFLOP/s"
        )
    steps = training.num_train_steps
    print(
        f"all {steps:,} steps: {report.duration(steps * seconds['sparse'])} sparse, "
        f"{report.duration(steps * seconds['dense'])} dense; "
        f"a run lies between, by when it switches (evaluation not counted)"
    )
    print(
        f"peak memory: {memory.human(peaks['dense'])} ({memory.human(before)} before the first "
        f"step); set by the dense phase"
    )
    return 0


# ---- evaluation --------------------------------------------------------------------


def evaluate_run(
    args: argparse.Namespace, tasks: Mapping[str, Any], aliases: Mapping[str, str], launch: Launch
) -> int:
    """--mode eval of both entry scripts: the saved model on the test set. Writes eval.{name}.log
    and nothing else."""
    task = resolve_task(args.task, tasks, aliases)
    paths = RunPaths(Path(args.output_dir), args.random, task, args.name, mode="eval")
    notices: list[str] = []
    state = load_checkpoint(paths.model, getattr(args, "masks", None))
    if state.config is not None and state.config["task"] != task:
        raise ValueError(f"{paths.model} belongs to task {state.config['task']}, not {task}")
    config = _evaluation_config(args, task, tasks[task], state, paths)
    attention = getattr(args, "attention", "auto")
    state, notes = _with_attention(state, attention, paths, args)
    notices += notes
    device = resolve_device(args.device, launch)
    memory.keep_freed_memory()
    precision = resolve_precision(args.precision, device)
    backend = resolve_backend(args.backend, device)
    model = model_of(state, config, backend, device, paths.model)
    test_data = open_split(args.data_dir, config, tasks[task], "test", launch)
    check_writable(paths.output_dir)
    world = join_world(launch.rank, launch.size, device)
    micro = args.batch_size or args.micro_batch_size
    if micro is None or micro == "auto":
        micro = memory.auto_micro_batch(config.model, test_data.size, device, world.size)
    log: NullLog = RunLog(paths.log) if world.is_main else NullLog()
    try:
        log.line(
            f"model {paths.model}, task {task}, {report.device_name(device)}, precision "
            f"{precision}, backend "
            f"{backend}, {test_data.size:,} test examples"
        )
        for notice in notices:
            log.line(notice)
        result, seconds = timed_test(model, test_data, micro, device, precision, world)
        report.test_done(log, result, seconds, state.phase)
    finally:
        log.close()
        world.close()
    return 0


def _evaluation_config(
    args: argparse.Namespace,
    task: str,
    task_dict: Mapping[str, Any],
    state: TrainState,
    paths: RunPaths,
) -> TaskConfig:
    """Our checkpoints bring their own configuration; those of the reference take the task's."""
    if state.config is None:
        return build_config(task, task_dict, settings=args.set)[0]
    if args.set:
        raise ValueError(
            f"{paths.model} brings its own configuration; --set is for the reference's "
            f"checkpoints, which have none"
        )
    return TaskConfig.from_dict(state.config)


def _with_attention(
    state: TrainState, attention: str, paths: RunPaths, args: argparse.Namespace
) -> tuple[TrainState, list[str]]:
    """The state in the phase it is to be evaluated in, and what is to be said about it."""
    notices = []
    masks_from = getattr(args, "masks", None)
    if state.config is None and state.block_masks is None and attention != "dense":
        try:
            found, slip = find_masks(paths.output_dir, paths.task, args.name, args.random)
        except CheckpointError as error:
            if attention == "sparse":
                raise
            notices.append(f"{error}: evaluated with dense attention")
        else:
            notices.append(f"block masks: {found}" + (" (the published name)" if slip else ""))
            state = load_checkpoint(paths.model, found)
            masks_from = found
    if attention == "dense" and state.phase == "sparse":
        notices.append(
            "warning: the model was trained with sparse attention and is evaluated with dense "
            "attention"
        )
        return dataclasses.replace(state, phase="dense", block_masks=None), notices
    if attention == "sparse" and state.block_masks is None:
        raise ValueError(
            f"{paths.model} was saved in the dense phase and has no block masks; give some with "
            f"--masks, or use --attention dense"
        )
    if masks_from is not None and state.block_masks is not None:
        agreement = min(mask_agreement(state.model_state_dict, state.block_masks))
        if agreement < FITTING_MASKS:
            notices.append(
                f"warning: the masks of {masks_from} fit the checkpoint badly (its own patterns "
                f"would choose only "
                f"{agreement:.0%} of a layer's blocks); they may belong to another run"
            )
    return state, notices


def model_of(
    state: TrainState,
    config: TaskConfig,
    backend: str,
    device: torch.device,
    path: Path | str = "the checkpoint",
) -> SequenceClassifier:
    """The saved model, in the phase it was saved in."""
    model = build_model(config.model, backend)
    check_fits(path, state, model.state_dict())
    model.load_state_dict(state.model_state_dict)
    model.to(device)
    if state.block_masks is not None:
        model.enter_sparse_phase(state.block_masks)
    return model


def timed_test(
    model: SequenceClassifier,
    data: Dataset,
    batch_size: int,
    device: torch.device,
    precision: str,
    world: World,
) -> tuple[Evaluation, float]:
    """Every example of the test set once; and the seconds it took."""
    started = time.perf_counter()
    result = evaluate(
        model,
        data,
        np.arange(data.size),
        batch_size=batch_size,
        device=device,
        precision=precision,
        world=world,
        attn_loss_scale=None,
    )
    return result, time.perf_counter() - started


# ---- what arguments stand for ------------------------------------------------------


def resolve_device(name: str, launch: Launch) -> torch.device:
    """auto: this process's GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; use cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"--device {name}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA device that torch can use")
    index = launch.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the hardware multiplies it, else fp16 on CUDA and fp32 on a CPU.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if device.type == "cuda":
        if name == "auto":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return name
    if name == "fp16":
        raise ValueError("--precision fp16 needs a CUDA device; on a CPU use bf16 or fp32")
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
        ValueError: says why not.
    """
    if name != "auto":
        reason = kernels.available_backends().get(name)
        if reason is not True:
            raise ValueError(f"--backend {name} cannot be used: {reason}")
        if name in ("cpu", "cuda") and name != device.type:
            raise ValueError(f"--backend {name} does not run on --device {device.type}")
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
        ValueError: missing (names the script that makes it), damaged, or not fitting the model.
    """
    path = Path(data_dir) / f"{config.task}.{split}.pickle"
    if not path.exists():
        script = task_dict["dataset"]["create"]
        raise ValueError(f"there is no {path}; make it with: python {script}")
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
    """Raises ValueError unless files can be made below `folder` (which need not exist yet)."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--output_dir {folder}: cannot write there; choose another folder")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise ValueError(f"--output_dir {folder}: the file system is read-only")
