"""The story of a run, in the order things happen.

pickle -> dataset -> batch -> model -> attention -> loss -> statistics -> transition -> checkpoint
-> report. A step is numbered by the completed steps after it, from 1; lines that the reference
prints keep its numbers, from 0.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from sparsity import Verdict
from sparsity.observe import Observation
from training.data.order import evaluation_subset
from training.errors import TrainingFailed
from training.evaluation import evaluate
from training.probe import dense_pooled, probe
from training.recording import provenance, words
from training.recording.checkpoint import TrainState, load_checkpoint, save_checkpoint
from training.recording.files import CheckpointError
from training.recording.reference_files import save_masks
from training.run import Run, StepResult, not_finite
from training.settings import TaskConfig
from training.step import train_step

EVALUATION_SEED = 0  # the dev subset is the same for every run, so that runs can be compared
FIRST_BEST_STEP = 100  # as in the reference, earlier evaluations are not worth a checkpoint


# ---- the run -----------------------------------------------------------------------


def train(run: Run) -> str:
    """Trains until the schedule ends, patience runs out, --stop_after cuts it, or a signal asks
    for an end.

    Returns: "finished", "stopped" or "interrupted". In the last two cases a checkpoint to resume
    from has been written.
    Raises:
        TrainingFailed: loss or gradients are not finite, or memory is exhausted at a micro-batch
        of one example. CheckpointError: a checkpoint cannot be written.
    """
    config, options = run.config.training, run.options
    save_first(run)
    last_save = time.monotonic()
    # sparse from the start, or a fork of a dense prefix that is long enough
    if run.phase == "dense" and _is_over(run):
        enter_next_phase(run, f"--max_dense_steps {run.phases[0].max_steps}")
    while run.unfinished or (run.step < config.num_train_steps and not _out_of_patience(run)):
        stop_signal = 0
        if run.unfinished is None:
            started = time.perf_counter()
            result = train_step(run)
            verdict = decide(run, result) if run.phase == "dense" else None
            run.step += 1
            run.seconds += time.perf_counter() - started
            words.step_done(run, result, verdict)
            stop_signal = result.stop_signal
            run.unfinished = (verdict.ready, verdict.reason) if verdict else (False, "")

        last = run.step == config.num_train_steps
        evaluated = run.step % config.eval_frequency == 0 or last
        if evaluated and not evaluate_and_keep_best(run, final=last):
            save_last(run)  # the step is resumed at its evaluation
            name = run.stop.name_of(run.stop.received or run.stop.default)
            words.resume_hint(run, f"stopped by {name}, while evaluating,")
            return "interrupted"
        (ready, reason), run.unfinished = run.unfinished, None
        # after the last step nothing would train with the new blocks
        switched = (ready or _is_over(run)) and not last
        if switched:
            limit = "--max_dense_steps" if run.phase == "dense" else "--phase_steps"
            enter_next_phase(run, reason if ready else limit)
        elif run.phase == "sparse":
            reselected = _is_due(run, run.phases[run.phase_index].reselect_every) and not last
            if reselected:
                reselect(run)
            if evaluated or reselected or _is_due(run, run.config.sparsity.probe_every):
                words.probed(run, probe(run))

        finished = last or _out_of_patience(run)
        cut = run.step == options.stop_after and not finished
        save_due = time.monotonic() - last_save > config.save_seconds
        if evaluated or switched or finished or cut or stop_signal or save_due:
            save_last(run)
            last_save = time.monotonic()
        if finished:
            break
        if stop_signal:
            words.resume_hint(run, f"stopped by {run.stop.name_of(stop_signal)}")
            return "interrupted"
        if cut:
            words.resume_hint(run, "--stop_after reached")
            return "stopped"
    words.training_done(run)
    return "finished"


def decide(run: Run, result: StepResult) -> Verdict:
    """Observes the attention of the step just done and asks the criterion. Rank 0's verdict
    counts for all."""
    run.observation = _observation(run, result)
    run.observer.observe(run.observation)
    verdict = run.criterion.update(run.observation)
    ready = torch.tensor(int(verdict.ready), device=run.device)
    if bool(run.world.broadcast_(ready)) != verdict.ready:
        raise TrainingFailed("processes disagree on the transition; their attention differs")
    return verdict


def _observation_while_sparse(run: Run) -> Observation:
    pooled, uniform = dense_pooled(run)
    return replace(_observation(run, None), pooled=pooled, uniform=uniform, smoothed=None)


def _observation(run: Run, result: StepResult | None) -> Observation:
    pooled, uniform = (result and result.seen) or (None, run.observer.uniform)
    return Observation(
        pattern_scores=run.model.pattern_scores(),
        pooled=pooled,
        uniform=uniform,
        mean_attention=run.mean_attention,
        smoothed=run.observer.smoothed if result is None else None,
        initial_scores=run.initial_scores,
        given=run.given_masks,
        step=run.step + 1,
    )


def enter_next_phase(run: Run, reason: str) -> None:
    """Everything that changes at the transition to sparse attention, in order; and where a phase
    of lower density follows."""
    if run.phase == "dense":
        # a run that has not trained yet has seen nothing; a fork remembers what its origin saw
        observation = run.observation or _observation(run, None)
        run.transition_step = run.step
    else:
        observation = _observation_while_sparse(run)
    run.phase_index += 1
    run.phase_began = run.step
    masks = _keep(run, observation)
    run.optimizer = run.new_optimizer()
    # a denser model does not compete with the sparse one that this run is about
    run.best_accuracy = run.best_step = None
    run.evaluations_since_best = 0
    words.transition_done(run, reason, observation, masks)
    if run.step:
        words.probed(run, probe(run), said=True)
    run.mean_attention = run.observation = None
    run.criterion.release()


def _keep(run: Run, observation: Observation) -> torch.Tensor:
    """Chooses blocks, the first process for all, and attends to them from now on."""
    masks = run.choose(observation)
    masks = run.world.broadcast_(masks.to(run.device, torch.uint8)).bool().cpu()
    run.model.enter_sparse_phase(masks)  # builds the layouts, freezes the patterns
    if run.world.is_main and run.paths is not None:
        save_masks(run.paths.masks, masks)
    return masks


def reselect(run: Run) -> None:
    """Chooses the blocks anew, from dense attention of the step's whole batch. The optimizer, the
    best model and patience stay: the phase goes on."""
    started = time.perf_counter()
    before = run.model.block_masks
    assert before is not None
    observation = _observation_while_sparse(run)
    masks = _keep(run, observation)
    run.seconds += time.perf_counter() - started
    words.reselection_done(run, observation, before, masks)


def evaluate_and_keep_best(run: Run, final: bool) -> bool:
    """Evaluates on the dev set; writes the best model of the current phase. False if a signal
    stopped it: nothing has changed then."""
    count = min(run.config.num_eval_examples, run.dev_data.size)
    indices = evaluation_subset(run.dev_data.size, count, EVALUATION_SEED)
    result = evaluate(
        run.model,
        run.dev_data,
        indices,
        batch_size=run.options.micro_batch_size,
        device=run.device,
        precision=run.config.run.precision,
        world=run.world,
        attn_loss_scale=run.config.training.attn_loss_scale,
        stop=run.stop,
        notify=run.log.line,
    )
    if result is None:
        return False
    if not result.is_finite:
        raise not_finite(run, f"the evaluation loss after step {run.step}")
    better = run.best_accuracy is None or result.accuracy > run.best_accuracy
    keep = better and (run.step >= FIRST_BEST_STEP or final)
    if keep:
        run.best_accuracy, run.best_step = result.accuracy, run.step
        run.evaluations_since_best = 0
        if run.world.is_main and run.paths is not None:
            save_checkpoint(run.paths.model, best_state(run))
    elif run.best_accuracy is not None:
        run.evaluations_since_best += 1
    words.evaluation_done(run, result, keep)
    return True


# ---- what a run leaves behind ------------------------------------------------------

# of `TrainState.training`; checkpoints of older versions lack some of it
RESUMED_FROM = {
    *("log", "optimizer", "scaler", "criterion", "observer", "transition_step", "phase_index"),
    *("phase_began", "best_step", "evaluations_since_best", "unfinished", "skipped_in_a_row"),
    *("seconds", "rng_state", "resolved"),
}


def best_state(run: Run) -> TrainState:
    """What suffices to evaluate the model."""
    return TrainState(
        model_state_dict=run.model.state_dict(),
        phase=run.phase,
        block_masks=run.model.block_masks,
        config=run.config.as_dict(),
        step=run.step,
        best_accuracy=run.best_accuracy,
    )


def save_last(run: Run) -> None:
    """Writes what `resume` needs. All processes have the same state, so rank 0 writes it."""
    state = best_state(run)
    # an update may have broken what the step before it found whole
    if not all(bool(value.isfinite().all()) for value in state.model_state_dict.values()):
        raise not_finite(run, f"a weight after step {run.step}")
    if not run.world.is_main or run.paths is None:
        return
    state.training = {
        "log": run.log.sync(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "criterion": run.criterion.state_dict() if run.phase == "dense" else None,
        "observer": run.observer.state_dict() if run.phase == "dense" else None,
        "transition_step": run.transition_step,
        "phase_index": run.phase_index,
        "phase_began": run.phase_began,
        "best_step": run.best_step,
        "evaluations_since_best": run.evaluations_since_best,
        "unfinished": run.unfinished,
        "skipped_in_a_row": run.skipped_in_a_row,
        "seconds": run.seconds,
        # data order and dropout are functions of (seed, step); torch's generator has only drawn
        # the initial weights
        "examples_seen": run.step * run.config.training.batch_size,
        "rng_state": torch.get_rng_state(),
        "resolved": provenance.resolved_settings(run),
    }
    assert state.training.keys() >= RESUMED_FROM
    save_checkpoint(run.paths.last, state, keep_previous=True)
    provenance.record(run)


def save_first(run: Run) -> None:
    """Saves before a run's first step, so that it can be resumed from its first moment on, and
    loads it back: a model under names that no checkpoint is known by fails now, not after hours.

    Raises:
        TrainingFailed: it cannot be loaded; what was saved is removed.
    """
    if not run.world.is_main or run.paths is None or run.paths.last.exists():
        return
    save_last(run)
    try:
        load_checkpoint(run.paths.last)
    except CheckpointError as error:
        run.paths.last.unlink()
        raise TrainingFailed(
            f"a checkpoint of this model could not be loaded again ({error}); training stopped "
            f"before the first step"
        ) from None


def restore(run: Run, state: TrainState, fork: bool = False) -> None:
    """Puts a run back to where `save_last` left it, or another one, forked off there."""
    training = state.training
    assert training is not None
    run.step = state.step
    if state.phase == "sparse":
        assert state.block_masks is not None
        run.model.enter_sparse_phase(state.block_masks)
        run.phase_index, run.phase_began = training["phase_index"], training["phase_began"]
        run.optimizer = run.new_optimizer()
    run.model.load_state_dict(state.model_state_dict)
    run.optimizer.load_state_dict(training["optimizer"])
    run.scaler.load_state_dict(training["scaler"])
    if state.phase == "dense":
        assert state.config is not None
        origin = TaskConfig.from_dict(state.config)
        same = origin.sparsity.transition_when == run.config.sparsity.transition_when
        if same:  # a new criterion starts from here
            run.criterion.load_state_dict(training["criterion"], run.device)
        run.observer.load_state_dict(
            training["observer"],
            same_count=origin.model.density == run.config.model.density,
            same_pattern=origin.sparsity.pattern == run.config.sparsity.pattern,
        )
    if not fork:  # a fork keeps its own best model
        run.best_accuracy = state.best_accuracy
        run.best_step = training["best_step"]
        run.evaluations_since_best = training["evaluations_since_best"]
    run.transition_step = training["transition_step"]
    run.unfinished = training["unfinished"] and tuple(training["unfinished"])
    run.skipped_in_a_row = training["skipped_in_a_row"]
    run.seconds = training["seconds"]
    torch.set_rng_state(training["rng_state"])


# ---- small parts -------------------------------------------------------------------


def _is_due(run: Run, every: int | None) -> bool:
    """Whether another `every` steps of this phase are done."""
    return every is not None and (run.step - run.phase_began) % every == 0


def _is_over(run: Run) -> bool:
    """Whether all steps of the phase are done and another phase follows."""
    limit = run.phases[run.phase_index].max_steps
    return limit is not None and run.step - run.phase_began >= limit


def _out_of_patience(run: Run) -> bool:
    patience = run.config.run.patience
    return patience is not None and run.evaluations_since_best >= patience
