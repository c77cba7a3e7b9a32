"""--mode eval: a saved model on the test set."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import SequenceClassifier, build_model
from training import memory
from training.commands.launch import (
    Launch,
    digest,
    open_split,
    resolve_backend,
    resolve_device,
    resolve_precision,
)
from training.data import manifest
from training.data.examples import Dataset
from training.distributed import World, join_world
from training.errors import TrainingFailed, UserError
from training.evaluation import Evaluation, evaluate
from training.interrupt import StopSignal
from training.recording import provenance, words
from training.recording.checkpoint import TrainState, check_fits, load_checkpoint
from training.recording.files import CheckpointError
from training.recording.log import NullLog, RunLog
from training.recording.paths import RunPaths
from training.recording.reference_files import find_masks, mask_agreement
from training.settings import TaskConfig, build_config, resolve_task, seed_of

# share of a layer's mask that its pattern would choose; foreign masks reach about the density
FITTING_MASKS = 0.5


def evaluate_run(
    args: argparse.Namespace, tasks: Mapping[str, Any], aliases: Mapping[str, str], launch: Launch
) -> int:
    """--mode eval of both entry scripts: the saved model on the test set. Writes eval.{name}.log
    and nothing else."""
    task = resolve_task(args.task, tasks, aliases)
    args.random = seed_of(args.random, args.set)
    paths = RunPaths(Path(args.output_dir), args.random, task, args.name, mode="eval")
    device = resolve_device(args.device, launch)
    world = join_world(launch.rank, launch.size, device)
    with world.together():
        state = load_checkpoint(paths.model, getattr(args, "masks", None))
        if state.config is not None and state.config["task"] != task:
            raise UserError(f"{paths.model} belongs to task {state.config['task']}, not {task}")
        config, notices = _evaluation_config(args, task, tasks[task], state, paths)
        attention = getattr(args, "attention", "auto")
        state, notes = _with_attention(state, attention, paths, args)
        notices += notes
        memory.keep_freed_memory()
        precision, notes = _precision(args.precision, state, device)
        notices += notes
        backend, notes = resolve_backend(args.backend, device, config.model, precision)
        notices += notes
        model = model_of(state, config, backend, device, paths.model)
        test_data = open_split(args.data_dir, config, tasks[task], "test", launch)
        notices += manifest.describe(args.data_dir, config.task)
    world.agree(
        {
            "phase": state.phase,
            f"{task}.test.pickle": test_data.sha256,
            "set of weights": digest(state.model_state_dict),
        }
    )
    micro = args.batch_size or args.micro_batch_size
    if micro is None or micro == "auto":
        micro = memory.auto_micro_batch(config.model, test_data.size, device, world.size)
    log = NullLog()
    if world.is_main:
        try:
            log = RunLog(paths.log)
        except OSError as error:  # a model published on a read-only mount, for instance
            log = RunLog(None)
            notices.append(f"there will be no {paths.log}: {error.strerror or error}")
    try:
        log.line(
            f"model {paths.model}, task {task}, {provenance.device_name(device)}, "
            f"precision {precision}, backend {backend}, {test_data.size:,} test examples"
        )
        for notice in notices:
            log.line(notice)
        tested = timed_test(model, test_data, micro, device, precision, world, log)
        assert tested is not None  # no signal is caught here: it ends the process
        words.test_done(log, *tested, state.phase)
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
) -> tuple[TaskConfig, list[str]]:
    """Our checkpoints bring their own configuration; those of the reference take the task's. And
    what is to be said about it."""
    if state.config is None:
        return build_config(task, task_dict, settings=args.set)
    if args.set:
        raise UserError(
            f"{paths.model} brings its own configuration; --set is for the reference's "
            f"checkpoints, which have none"
        )
    return TaskConfig.from_dict(state.config), []


def _precision(given: str, state: TrainState, device: torch.device) -> tuple[str, list[str]]:
    """The run's precision where none is given and this device has it, and what is to be said."""
    trained = (state.config or {}).get("run", {}).get("precision")
    wanted = trained if given == "auto" and trained is not None else given
    if wanted == "fp16" and given == "auto" and device.type == "cpu":
        wanted = "auto"
    precision = resolve_precision(wanted, device)
    if trained is None or precision == trained:
        return precision, []
    return precision, [f"trained in {trained}, evaluated in {precision} (--precision)"]


def _with_attention(
    state: TrainState, attention: str, paths: RunPaths, args: argparse.Namespace
) -> tuple[TrainState, list[str]]:
    """The state in the phase it is to be evaluated in, and what is to be said about it."""
    notices = []
    masks_from = getattr(args, "masks", None)
    if state.config is None and state.block_masks is None and attention != "dense":
        # A checkpoint of the reference does not tell its phase, and the published masks carry the
        # name of no run: whichever run of this task and seed wrote last. How well they agree with
        # the model's patterns cannot decide: foreign masks reach 0.9, true ones go down to 0.5.
        try:
            found, slip = find_masks(paths.output_dir, paths.task, args.name, args.random)
        except CheckpointError as error:
            if attention == "sparse":
                raise
            notices.append(
                f"{error}: evaluated with dense attention; if {paths.model.name} was trained with "
                f"sparse attention, give its masks with --masks FILE"
            )
        else:
            if attention == "sparse" or not slip or "learnable" in args.name:
                what = "the published name, which is no run's" if slip else "of this very name"
                notices.append(
                    f"block masks: {found} ({what}); if {paths.model.name} was trained with dense "
                    f"attention, add --attention dense"
                )
                state = load_checkpoint(paths.model, found)
                masks_from = found
            else:
                notices.append(
                    f"evaluated with dense attention: the block masks {found} carry no run's name "
                    f"and {paths.model.name} no sign of being theirs; if it is, add --attention "
                    f"sparse"
                )
    if attention == "dense" and state.phase == "sparse":
        notices.append(
            "warning: the model was trained with sparse attention and is evaluated with dense "
            "attention"
        )
        return dataclasses.replace(state, phase="dense", block_masks=None), notices
    if attention == "sparse" and state.block_masks is None:
        raise UserError(
            f"{paths.model} was saved in the dense phase and has no block masks; give some with "
            f"--masks, or use --attention dense"
        )
    if masks_from is not None and state.block_masks is not None:
        agreement = min(mask_agreement(state.model_state_dict, state.block_masks))
        if agreement < FITTING_MASKS:
            notices.append(
                f"warning: the masks of {masks_from} fit the checkpoint badly (its own patterns "
                f"would choose only {agreement:.0%} of a layer's blocks); they may belong to "
                "another run"
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
    log: NullLog,
    stop: StopSignal | None = None,
) -> tuple[Evaluation, float] | None:
    """Every example of the test set once, and the seconds it took; None if a signal stopped it.

    Raises:
        TrainingFailed: the loss is not finite.
    """
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
        stop=stop,
        notify=log.line,
    )
    if result is None:
        return None
    if not result.is_finite:
        raise TrainingFailed(
            f"the loss on the test set is not finite in {precision}: the model's numbers have "
            f"broken"
        )
    return result, time.perf_counter() - started
