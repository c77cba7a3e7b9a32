"""--mode train: from parsed arguments to a run.

Checks everything first and writes only when all is well.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsity.observe import Observer
from training import loop, memory
from training.commands.dry_run import dry_run, made_up_data
from training.commands.evaluate import model_of, timed_test
from training.commands.launch import (
    Launch,
    build,
    check_writable,
    digest,
    open_split,
    resolve_backend,
    resolve_device,
    resolve_precision,
)
from training.data import manifest
from training.data.examples import Dataset
from training.distributed import join_world
from training.errors import TrainingFailed, UserError
from training.interrupt import StopSignal
from training.recording import provenance, words
from training.recording.checkpoint import (
    TrainState,
    check_fits,
    load_checkpoint,
    load_last_checkpoint,
)
from training.recording.files import CheckpointError, remove_stale_temporaries
from training.recording.log import NullLog, RunLog
from training.recording.paths import RunPaths
from training.recording.reference_files import load_masks
from training.run import Run, RunOptions
from training.settings import (
    SECTIONS,
    SparsityConfig,
    TaskConfig,
    build_config,
    resolve_task,
    seed_of,
    unused_fields,
)

# flags, and the settings that they stand for
FLAGS = {
    "batch_size": "training.batch_size",
    "train_steps": "training.num_train_steps",
    "sk": "training.skewness",
    "ds": "training.distance",
    "random": "run.seed",
    "precision": "run.precision",
    "patience": "run.patience",
    **{field.name: f"sparsity.{field.name}" for field in dataclasses.fields(SparsityConfig)},
}


# on resume: they change no number of a step
CHANGEABLE = {"training.save_seconds", "sparsity.probe_every", "run.patience"}
# in a fork, besides all sparsity settings: what matters from the transition on only
FORKABLE = {"training.skewness", "training.distance", "model.density"}


def train_run(
    args: argparse.Namespace,
    tasks: Mapping[str, Any],
    aliases: Mapping[str, str],
    launch: Launch,
    command: str,
) -> int:
    """--mode train: a new run, a resumed one, or a dry run; ends with the test result."""
    task = resolve_task(args.task, tasks, aliases)
    args.random = seed_of(args.random, args.set)
    paths = RunPaths(Path(args.output_dir), args.random, task, args.name)
    if launch.restarts:  # the job was started anew after a failure: it goes on, whatever was typed
        args.resume = True
    device = resolve_device(args.device, launch)
    world = join_world(launch.rank, launch.size, device)
    with world.together():
        state = None
        said: list[str] = []
        if not args.dry_run:
            state = _state_to_resume(args, paths, said)
        forked = state is None and args.fork is not None and not args.dry_run
        if forked:
            state = _state_to_fork(args, task)
        config, notices = _training_config(args, task, tasks[task], state, forked)
        notices = said + notices
        given_masks = _given_masks(config)
        stored = (state.training or {}).get("resolved", {}) if state is not None else {}
        memory.keep_freed_memory()
        precision = resolve_precision(config.run.precision, device)
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, precision=precision)
        )
        backend, slow = resolve_backend(args.backend, device, config.model, precision)
        notices += slow
        datasets: tuple[Dataset, Dataset]
        if args.dry_run:
            datasets = (made_up_data(config), made_up_data(config))
            hashes: dict[str, str] = {}
        else:
            train_data, dev_data, test_data = (
                open_split(args.data_dir, config, tasks[task], split, launch)
                for split in ("train", "dev", "test")
            )
            datasets = (train_data, dev_data)
            opened = {"train": train_data, "dev": dev_data, "test": test_data}
            hashes = {split: data.sha256 for split, data in opened.items()}
            notices += _other_data(hashes, stored.get("data_sha256", hashes), task, args)
            notices += manifest.describe(args.data_dir, config.task)
            check_writable(paths.output_dir)
        if config.training.batch_size < world.size:
            raise UserError(
                f"training.batch_size {config.training.batch_size} leaves some of {world.size} "
                f"processes without an example; start at most that many"
            )
    micro = args.micro_batch_size or stored.get("micro_batch_size")
    if micro is None or micro == "auto":
        micro = stored.get("micro_batch_size") or memory.auto_micro_batch(
            config.model, config.training.batch_size, device, world.size
        )

    torch.manual_seed(args.random)
    model = build(config, backend, device)
    # and so all have looked for an earlier run before the first file of this one is there
    world.agree(
        {
            "step": str(state.step if state is not None else 0),
            "phase": state.phase if state is not None else "dense",
            "configuration": json.dumps(config.as_dict(), sort_keys=True),
            **{f"{task}.{split}.pickle": value for split, value in hashes.items()},
            "set of weights": digest(state.model_state_dict if state else model.state_dict()),
        }
    )
    options = RunOptions(
        stop_after=args.stop_after,
        micro_batch_size=micro,
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
            total_steps=config.training.num_train_steps if launch.redraws else 0,
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
        given_masks=given_masks,
        data_sha256=hashes,
    )
    try:
        if args.dry_run:
            return dry_run(run, notices)
        run.stop.install()
        if state is not None:
            check_fits(args.fork if forked else paths.last, state, model.state_dict())
            loop.restore(run, state, forked)
        if state is None or forked:
            origin = args.fork if forked else None
            words.run_started(run, notices, unused_fields(tasks[task]), command, origin)
        else:
            words.run_resumed(run, notices + _changed_circumstances(run, stored), command)
        # its tensors are the model's now; holding both would double the criterion's memory
        state = None
        if forked:
            loop.save_first(run)
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
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        # an update may be half done: nothing of this process is worth saving
        raise TrainingFailed(
            f"memory exhausted after the micro-batches of step {run.step + 1}, where smaller ones "
            f"do not help; the last checkpoint is {run.paths.last}"
        ) from None
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
    run.world.wait()  # the first process has written the best model
    state = load_checkpoint(run.paths.model)
    model = model_of(state, run.config, run.model.backend, run.device)
    tested = timed_test(
        model,
        test_data,
        run.options.micro_batch_size,
        run.device,
        run.config.run.precision,
        run.world,
        run.log,
        run.stop,
    )
    if tested is None:
        number = run.stop.received or run.stop.default
        words.resume_hint(run, f"stopped by {run.stop.name_of(number)}, while testing,")
        return run.stop.exit_code(number)
    result, seconds = tested
    words.test_done(run.log, result, seconds, state.phase)
    words.run_finished(run, result, state)
    return 0


def _state_to_resume(
    args: argparse.Namespace, paths: RunPaths, said: list[str]
) -> TrainState | None:
    """The checkpoint to go on from, or None for a start at step 0."""
    run = f"--random {args.random} --task {paths.task} --name {args.name}"
    resumable = next((p for p in (paths.last, paths.previous) if p.exists()), None)
    left = None if resumable else _left_behind(paths)
    if left is not None:
        raise UserError(
            f"there is {left} of an earlier run of {run} already, and no checkpoint to go on "
            f"from; it would be overwritten: choose another --name"
        )
    if not args.resume:
        begun = resumable or next((p for p in (paths.metrics, paths.run_json) if p.exists()), None)
        if begun is not None:
            raise UserError(
                f"there is a run of {run} already ({begun}); go on with it by adding --resume, or "
                f"choose another --name"
            )
        return None
    remove_stale_temporaries(paths.last)
    if resumable is None:
        said.append(f"there is no checkpoint {paths.last}: --resume starts at step 0")
        return None
    state = load_last_checkpoint(paths.last, said.append)
    _check_run(state, paths.last, paths.task, args)
    return state


def _state_to_fork(args: argparse.Namespace, task: str) -> TrainState:
    """The dense checkpoint of another run that a new one starts from."""
    state = load_checkpoint(args.fork)
    _check_run(state, args.fork, task, args)
    if state.phase != "dense":
        raise UserError(
            f"{args.fork} was saved after its transition; a fork starts from a dense prefix, "
            f"which --stop_after N before the transition leaves"
        )
    return state


def _check_run(state: TrainState, path: Path | str, task: str, args: argparse.Namespace) -> None:
    """Refuses a checkpoint that this task and seed cannot go on from."""
    if state.training is None:
        raise UserError(f"{path} holds a model to evaluate, not a run to go on with")
    observed = Observer(lambda _: torch.empty(0), True).state_dict().keys()
    lacks = loop.RESUMED_FROM - state.training.keys()
    if lacks or (state.phase == "dense" and state.training["observer"].keys() != observed):
        raise UserError(
            f"{path} was written by an older version, whose runs this one cannot resume"
        )
    if state.config is not None and state.config["task"] != task:
        raise UserError(f"{path} belongs to task {state.config['task']}, not {task}")
    seed = state.training["resolved"]["seed"]
    if seed != args.random:
        raise UserError(f"{path} belongs to --random {seed}, not {args.random}")
    if args.stop_after is not None and args.stop_after <= state.step:
        raise UserError(
            f"--stop_after {args.stop_after}: the run has {state.step} completed steps already; "
            f"give more or leave it out"
        )


def _left_behind(paths: RunPaths) -> Path | None:
    """Something of an earlier run, ours or the original's, that a start at step 0 would spoil.

    A run of ours writes metrics.jsonl before any other file but its log, and a checkpoint before
    its first step: without a step in it, it is a run that never began.
    """
    kept = [paths.model, paths.masks]
    if paths.metrics.exists():
        if '"event": "train"' in paths.metrics.read_text(encoding="utf-8", errors="replace"):
            kept.append(paths.metrics)
    else:
        kept += [paths.run_json, *paths.tensorboard.glob("events.out.tfevents.*")]
    return next((path for path in kept if path.exists()), None)


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
    args: argparse.Namespace,
    task: str,
    task_dict: Mapping[str, Any],
    state: TrainState | None,
    forked: bool,
) -> tuple[TaskConfig, list[str]]:
    """The task's configuration, or the checkpoint's, which flags may repeat but not change, but
    for what decides on the transition where a run is forked before it."""
    base = task_dict if state is None else state.config
    assert base is not None
    flags = {path: getattr(args, name) for name, path in FLAGS.items()}
    if args.precision == "auto":  # whatever the run has, or the device
        flags["run.precision"] = None
    config, notices = build_config(task, base, settings=args.set, flags=flags)
    if state is None:
        return config, notices
    resumed = TaskConfig.from_dict(base)
    for section in SECTIONS:
        before, now = resumed.section(section), config.section(section)
        for name, value in before.items():
            path = f"{section}.{name}"
            free = path in CHANGEABLE or (forked and (path in FORKABLE or section == "sparsity"))
            if now[name] != value and not free:
                what = "fork" if forked else "resume"
                raise UserError(
                    f"cannot {what} with {path}={now[name]}: the run was started with {value}; "
                    f"leave it out, or start a new run under another --name"
                )
    # how many examples are evaluated depends on the task's own batch size
    return dataclasses.replace(config, num_eval_examples=resumed.num_eval_examples), []


def _given_masks(config: TaskConfig) -> torch.Tensor | None:
    """bool [L, nb, nb] of --masks, checked against the model."""
    path, model = config.sparsity.masks, config.model
    if path is None:
        return None
    masks = load_masks(path)
    if len(masks) == 1:  # one for all layers
        masks = masks.expand(model.num_layers, -1, -1)
    shape = [model.num_layers, model.num_blocks, model.num_blocks]
    if list(masks.shape) != shape:
        raise UserError(f"the block masks in {path} are {list(masks.shape)}, the model's {shape}")
    if model.tied_weights and not bool((masks == masks[0]).all()):
        raise UserError(f"the block masks in {path} differ between layers, whose weights are tied")
    return masks


def _other_data(
    hashes: dict[str, str], stored: dict[str, str], task: str, args: argparse.Namespace
) -> list[str]:
    """What is to be said about pickles that are not those a run began with.

    Raises:
        UserError: they were not accepted.
    """
    others = [split for split in hashes if hashes[split] != stored[split]]
    paths = ", ".join(str(Path(args.data_dir) / f"{task}.{split}.pickle") for split in others)
    if others and not args.other_data:
        raise UserError(
            f"not the data that the run was started with (another SHA-256): {paths}; put the old "
            f"ones back, or accept these with --other_data"
        )
    return [f"other data from here on (--other_data): {paths}"] if others else []


def _changed_circumstances(run: Run, stored: dict) -> list[str]:
    """What may make a resumed run's bits differ from an uninterrupted one's."""
    now = provenance.resolved_settings(run)
    return [
        f"{name} was {stored[name]} when the run started and is {now[name]} now: results may "
        f"differ in the last bits"
        for name in (
            "threads",
            "processes",
            "device",
            "backend",
            "micro_batch_size",
        )
        if stored.get(name) != now[name]
    ]
