"""The story of a run, in the order things happen.

pickle -> dataset -> batch -> model -> attention -> loss -> statistics -> transition -> checkpoint
-> report. A step is numbered by the completed steps after it, from 1; lines that the reference
prints keep its numbers, from 0.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F

from kernels import DropoutKey
from models import StatisticsRequest, select_blocks
from training import memory, report
from training.batching import Chunk, plan_chunks
from training.checkpoint import TrainState, save_checkpoint, save_masks
from training.dataset import evaluation_subset, training_indices
from training.distributed import PeerLostError
from training.evaluation import attention_loss, autocast, evaluate, to_device
from training.run import Run, StepResult, TrainingFailed
from training.transition import Decision

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
    last_save = time.monotonic()
    if run.phase == "dense" and options.max_dense_steps == run.step == 0:
        switch_to_sparse(run, "--max_dense_steps 0")
    while run.step < config.num_train_steps and not _out_of_patience(run):
        started = time.perf_counter()
        result = train_step(run)
        decision = decide(run) if run.phase == "dense" else None
        run.step += 1
        run.seconds += time.perf_counter() - started
        report.step_done(run, result, decision)

        last = run.step == config.num_train_steps
        evaluated = run.step % config.eval_frequency == 0 or last
        if evaluated:
            evaluate_and_keep_best(run, final=last)
        switched = run.phase == "dense" and _must_switch(run, decision)
        if switched:
            assert decision is not None
            switch_to_sparse(run, decision.reason if decision.transition else "--max_dense_steps")

        finished = last or _out_of_patience(run)
        cut = run.step == options.stop_after and not finished
        save_due = time.monotonic() - last_save > config.save_seconds
        if evaluated or switched or finished or cut or result.stop_signal or save_due:
            save_last(run)
            last_save = time.monotonic()
        if finished:
            break
        if result.stop_signal:
            report.resume_hint(run, f"stopped by {run.stop.name_of(result.stop_signal)}")
            return "interrupted"
        if cut:
            report.resume_hint(run, "--stop_after reached")
            return "stopped"
    report.training_done(run)
    return "finished"


def train_step(run: Run) -> StepResult:
    """One optimizer step over the global batch, in micro-batches; halves them if the device's
    memory does not suffice."""
    while True:
        try:
            return _train_step(run)
        except PeerLostError:
            raise
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            if run.world.size > 1:
                raise TrainingFailed(
                    "memory exhausted in one of several processes; give a smaller "
                    "--micro_batch_size"
                ) from None
            if run.options.micro_batch_size <= 1:
                raise TrainingFailed(
                    "memory exhausted even with a micro-batch of one example"
                ) from None
            run.options.micro_batch_size //= 2
        # outside the handler: the exception's traceback would keep the failed step's tensors alive
        run.optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        report.micro_batch_halved(run)


def _train_step(run: Run) -> StepResult:
    config = run.config.training
    dense = run.phase == "dense"
    if dense:
        _reset_mean_attention(run)
    run.optimizer.zero_grad()
    begin, end = run.world.part(config.batch_size)
    indices = training_indices(
        run.train_data.size,
        run.options.seed,
        run.step * config.batch_size + begin,
        end - begin,
    )
    # loss, correct answers, attention loss: summed on the device, read once
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)
    for chunk in plan_chunks(
        config.batch_size, config.statistics_groups, run.options.micro_batch_size, begin, end
    ):
        ids, ids_1, labels = to_device(
            run.train_data.batch(indices[chunk.begin - begin : chunk.end - begin]), run.device
        )
        with autocast(run.device, run.options.precision):
            output = run.model(
                ids,
                ids_1,
                dropout_key=DropoutKey(run.options.seed, run.step, chunk.begin),
                statistics=_statistics_request(run, chunk) if dense else None,
            )
        share = len(labels) / config.batch_size
        loss = F.cross_entropy(output.logits.float(), labels) * share
        total = loss
        if dense:
            attention = attention_loss(run.model, output, config.attn_loss_scale) * share
            totals[2] += attention.detach()
            # only the patterns receive a gradient of it, and theirs is all they receive
            total = loss + attention.float()
        run.scaler.scale(total).backward()
        totals[0] += loss.detach()
        totals[1] += (output.logits.detach().argmax(-1) == labels).sum()

    gradients = [p.grad for p in run.optimizer.parameters if p.grad is not None]
    run.world.sum_(gradients)
    if dense and run.mean_attention is not None:
        run.world.sum_([run.mean_attention])
    run.scaler.unscale_(run.optimizer.optimizer)
    largest = torch.nn.utils.get_total_norm(gradients, float("inf")).double()
    signal = torch.tensor(float(run.stop.received), dtype=torch.float64, device=run.device)
    shared = torch.cat([totals, signal[None]])
    run.world.sum_([shared])
    loss_sum, correct, attention_sum, signals, peak = torch.cat([shared, largest[None]]).tolist()
    # checked before the weights move: what is saved is good
    if not math.isfinite(loss_sum) or (not math.isfinite(peak) and not run.scaler.is_enabled()):
        what = "loss" if not math.isfinite(loss_sum) else "gradient"
        raise TrainingFailed(_not_finite(run, what))
    learning_rate = run.optimizer.learning_rate
    run.optimizer.clip()
    run.scaler.step(run.optimizer.optimizer)
    run.scaler.update()
    run.optimizer.advance()
    return StepResult(
        loss=loss_sum,
        attention_loss=attention_sum if dense else None,
        accuracy=correct / config.batch_size,
        learning_rate=learning_rate,
        # what was shared decides, so that all processes end after the same step
        stop_signal=(run.stop.received or run.stop.default) if signals > 0 else 0,
    )


def decide(run: Run) -> Decision:
    """The rule's word on this step's attention; rank 0 speaks for all."""
    assert run.mean_attention is not None
    decision = run.criterion.update(run.mean_attention)
    verdict = torch.tensor(int(decision.transition), device=run.device)
    if bool(run.world.broadcast_(verdict)) != decision.transition:
        raise TrainingFailed("processes disagree on the transition; their attention differs")
    return decision


def switch_to_sparse(run: Run, reason: str) -> None:
    """Everything that changes at the transition, in order."""
    scores = run.model.pattern_scores()
    masks = select_blocks(
        run.options.pattern,
        pattern_scores=scores,
        mean_attention=run.mean_attention,
        density=run.config.model.density,
        seed=run.options.seed,
    )
    masks = run.world.broadcast_(masks.to(run.device, torch.uint8)).bool().cpu()
    run.model.enter_sparse_phase(masks)  # builds the layouts, freezes the patterns
    run.phase = "sparse"
    run.transition_step = run.step
    run.optimizer = run.new_optimizer()
    # a dense model is no competitor of the sparse one that this run is about
    run.best_accuracy = run.best_step = None
    run.evaluations_since_best = 0
    if run.world.is_main and run.paths is not None:
        save_masks(run.paths.masks, masks)
    report.transition_done(run, reason, scores, masks)
    run.mean_attention = None
    run.criterion.release()


def evaluate_and_keep_best(run: Run, final: bool) -> None:
    """Evaluates on the dev set; writes the best model of the current phase."""
    count = min(run.config.num_eval_examples, run.dev_data.size)
    indices = evaluation_subset(run.dev_data.size, count, EVALUATION_SEED)
    result = evaluate(
        run.model,
        run.dev_data,
        indices,
        batch_size=run.options.micro_batch_size,
        device=run.device,
        precision=run.options.precision,
        world=run.world,
        attn_loss_scale=run.config.training.attn_loss_scale,
    )
    better = run.best_accuracy is None or result.accuracy > run.best_accuracy
    keep = better and (run.step >= FIRST_BEST_STEP or final)
    if keep:
        run.best_accuracy, run.best_step = result.accuracy, run.step
        run.evaluations_since_best = 0
        if run.world.is_main and run.paths is not None:
            save_checkpoint(run.paths.model, best_state(run))
    elif run.best_accuracy is not None:
        run.evaluations_since_best += 1
    report.evaluation_done(run, result, keep)


# ---- what a run leaves behind ------------------------------------------------------


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
    """Writes what `resume` needs. Every process's state is the same but for nothing: rank 0 writes
    for all."""
    if not run.world.is_main or run.paths is None:
        return
    state = best_state(run)
    state.training = {
        "log": run.log.sync(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "criterion": run.criterion.state_dict() if run.phase == "dense" else None,
        "transition_step": run.transition_step,
        "best_step": run.best_step,
        "evaluations_since_best": run.evaluations_since_best,
        "seconds": run.seconds,
        # data order and dropout are functions of (seed, step); torch's generator has only drawn
        # the initial weights
        "examples_seen": run.step * run.config.training.batch_size,
        "rng_state": torch.get_rng_state(),
        "resolved": report.resolved_settings(run),
    }
    save_checkpoint(run.paths.last, state, keep_previous=True)


def restore(run: Run, state: TrainState) -> None:
    """Puts a run back to where `save_last` left it."""
    training = state.training
    assert training is not None
    run.step = state.step
    if state.phase == "sparse":
        assert state.block_masks is not None
        run.model.enter_sparse_phase(state.block_masks)
        run.phase = "sparse"
        run.optimizer = run.new_optimizer()
    run.model.load_state_dict(state.model_state_dict)
    run.optimizer.load_state_dict(training["optimizer"])
    run.scaler.load_state_dict(training["scaler"])
    if training["criterion"] is not None:
        run.criterion.load_state_dict(training["criterion"], run.device)
    run.best_accuracy = state.best_accuracy
    run.best_step = training["best_step"]
    run.evaluations_since_best = training["evaluations_since_best"]
    run.transition_step = training["transition_step"]
    run.seconds = training["seconds"]
    torch.set_rng_state(training["rng_state"])


# ---- small parts -------------------------------------------------------------------


def _out_of_patience(run: Run) -> bool:
    patience = run.options.patience
    return patience is not None and run.evaluations_since_best >= patience


def _must_switch(run: Run, decision: Decision | None) -> bool:
    assert decision is not None
    limit = run.options.max_dense_steps
    return decision.transition or (limit is not None and run.step >= limit)


def _reset_mean_attention(run: Run) -> None:
    if run.mean_attention is None:
        model = run.config.model
        run.mean_attention = torch.empty(
            model.num_layers,
            run.config.training.statistics_groups,
            model.padded_length,
            model.padded_length,
            device=run.device,
        )
    run.mean_attention.zero_()


def _statistics_request(run: Run, chunk: Chunk) -> StatisticsRequest:
    assert run.mean_attention is not None
    groups = slice(chunk.first_group, chunk.first_group + chunk.num_groups)
    return StatisticsRequest(
        groups=chunk.num_groups,
        mean_out=[layer[groups] for layer in run.mean_attention],
        mean_weight=chunk.group_weight,
    )


def _not_finite(run: Run, what: str) -> str:
    where = f"the {what} of step {run.step + 1} ({run.phase} phase) is not finite"
    remedy = "try a lower learning rate (--set training.learning_rate=...)"
    if run.paths is not None and run.paths.last.exists():
        return f"{where}; training stopped, the last good checkpoint is {run.paths.last}; {remedy}"
    return f"{where}; training stopped before a checkpoint was written; {remedy}"
