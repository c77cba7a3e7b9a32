"""What a run says and shows: the words of each event.

Called by the loop at fixed places; decides nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import kernels
from sparsity import PATTERNS, Verdict
from sparsity.observe import Observation, Values, describe_masks
from training import memory, shell
from training.evaluation import Evaluation
from training.recording.checkpoint import TrainState
from training.recording.figures import draw_blocks, save_png
from training.recording.page import duration, write_run_page
from training.recording.provenance import begin_session, device_name, record, resolved_settings
from training.run import Run, StepResult
from training.settings import SECTIONS

# ---- start -------------------------------------------------------------------------


def run_started(
    run: Run, notices: list[str], unused: list[str], command: str, origin: str | None = None
) -> None:
    """Rule, device, memory: what a reader of the log needs before the first step.

    origin: the checkpoint that the run is forked from.
    """
    config, log, options = run.config, run.log, run.options
    model, training = config.model, config.training
    log.line(
        f"task {config.task}, seed {config.run.seed}: {model.num_layers} layers, "
        f"{model.num_head} heads, length {model.padded_length}, "
        f"{model.num_blocks}x{model.num_blocks} blocks of {model.block_size}, "
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters"
    )
    log.line(
        f"data: {run.train_data.size:,} train, {run.dev_data.size:,} dev; "
        f"batch {training.batch_size}, {training.num_train_steps:,} steps, "
        f"learning rate {training.learning_rate:g} after {training.warmup} warm-up steps"
    )
    log.line(f"rule: {run.criterion.describe()}")
    limit = config.sparsity.max_dense_steps
    if limit is not None and not run.criterion.is_budget:
        log.line(f"      at the latest after {limit} dense steps (--max_dense_steps)")
    if len(run.phases) > 2 or run.phases[1].reselect_every is not None:
        log.line(f"phases: {'; then '.join(phase.describe() for phase in run.phases)}")
    pattern = PATTERNS[config.sparsity.pattern]
    count = f", {model.num_active_blocks} of {model.num_blocks**2} a layer"
    blocks = f"{config.sparsity.pattern} ({pattern.description})"
    log.line(
        f"blocks: {blocks}{'' if pattern.own_count else f'{count} (density {model.density:g})'}"
    )
    micro = options.micro_batch_size
    log.line(
        f"device {device_name(run.device)}, {processes_text(run)}, backend {backend_text(run)}, "
        f"precision {config.run.precision}, micro-batch {micro}"
    )
    groups = training.statistics_groups if run.criterion.needs_mean_attention else 0
    dense, sparse = memory.estimate_bytes(model, groups, micro)
    log.line(
        f"memory above libraries, estimated: {memory.human(dense)} dense, "
        f"{memory.human(sparse)} sparse; time: after the first steps"
    )
    if unused:
        log.line(f"kept for compatibility, not used: {', '.join(unused)}")
    for notice in notices:
        log.line(notice)
    if origin is not None:
        log.line(f"forked from {origin} after step {run.step}")
    log.event(
        "start",
        step=0,
        task=config.task,
        seed=config.run.seed,
        batch_size=training.batch_size,
        num_train_steps=training.num_train_steps,
        skewness=training.skewness,
        distance=training.distance,
        pattern=config.sparsity.pattern,
        when=config.sparsity.transition_when,
        thresholds=run.criterion.thresholds,
        forked_from=origin,
        forked_at=None if origin is None else run.step,
    )
    begin_session(run, command)
    log.hparams(hyperparameters(run))


def hyperparameters(run: Run) -> dict[str, Any]:
    """The configuration and what was resolved at the start, flat."""
    config = run.config
    sections = {name: config.section(name) for name in SECTIONS}
    flat = {f"{name}.{key}": v for name, values in sections.items() for key, v in values.items()}
    resolved = resolved_settings(run)
    del resolved["data_sha256"]  # no number to compare runs by
    return {"task": config.task, **flat, **resolved}


def run_resumed(run: Run, warnings: list[str], command: str) -> None:
    for warning in warnings:
        run.log.line(f"warning: {warning}")
    run.log.line(f"resumed at step {run.step}, {run.phase} phase")
    begin_session(run, command)


def processes_text(run: Run) -> str:
    return "1 process" if run.world.size == 1 else f"{run.world.size} processes"


def backend_text(run: Run) -> str:
    if run.model.backend != "auto":
        return run.model.backend
    found = kernels.available_backends()
    order = ["cuda", "triton"] if run.device.type == "cuda" else ["cpu"]
    taken = next((name for name in order if found[name] is True), "reference")
    missing = [f"{name}: {found[name]}" for name in order if found[name] is not True]
    return f"auto ({'; '.join([taken, *missing])})"


# ---- steps -------------------------------------------------------------------------

TIMED_STEPS = (3, 20)  # when the time to come is estimated


# lists of L in every training step's event, null where they are not defined (in the sparse phase)
OF_LAYERS = (
    *("skewness", "distance", "change_percent", "kept_mass", "best_mass", "chance_mass"),
    *("agreement", "capture"),
)


def _event(run: Run, event: str, values: dict[str, Any]) -> None:
    """With where the run is, when, and how much memory it took."""
    where = {"step": run.step, "phase": run.phase}
    cost = {"seconds": run.seconds, "peak_memory_bytes": memory.peak_bytes(run.device)}
    run.log.event(event, **{**where, **values, **cost})


def _scalars_of_layers(run: Run, group: str, values: Values) -> None:
    scalars = {
        f"{group}/layer{layer}/{name}": value
        for name, column in values.items()
        for layer, value in enumerate(column or ())
    }
    run.log.scalars(run.step, scalars)


def step_done(run: Run, result: StepResult, verdict: Verdict | None) -> None:
    num_layers = run.config.model.num_layers
    values: dict[str, list[float | None]] = {name: [None] * num_layers for name in OF_LAYERS}
    if verdict is not None and run.observation is not None:
        values |= run.observation.values
        values |= {name: column or [None] * num_layers for name, column in verdict.values.items()}
    measured: dict[str, float | None] = {
        "loss": result.loss,
        "attention_loss": result.attention_loss,
        "accuracy": result.accuracy,
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "loss_scale": result.loss_scale,
    }
    _event(run, "train", {**measured, "skipped": result.skipped, **values})
    run.log.scalars(run.step, {f"train/{name}": value for name, value in measured.items()})
    _scalars_of_layers(run, "criterion", values)

    per_step = run.seconds / run.step
    best = "" if run.best_accuracy is None else f" dev {run.best_accuracy:.3f}"
    held = f" | {verdict.reason}" if verdict is not None and not verdict.ready else ""
    run.log.progress(
        run.step, f"{run.phase} loss {result.loss:.3f}{best} {per_step * 1e3:.0f} ms/step{held}"
    )
    if run.step in TIMED_STEPS and run.phase == "dense":
        whole = duration(per_step * run.config.training.num_train_steps)
        run.log.line(
            f"step {run.step}: {per_step * 1e3:.0f} ms a dense step; the whole schedule would "
            f"take {whole} at this pace, sparse steps are faster; "
            f"peak memory {memory.human(memory.peak_bytes(run.device))}"
        )
    if verdict is not None and not verdict.ready and run.step % OUTLOOK_EVERY == 0:
        run.log.line(f"step {run.step}, still dense: {verdict.reason}")
        run.log.line(f"  {run.criterion.outlook()}")


OUTLOOK_EVERY = 200  # dense steps between two lines on what holds the transition back


def micro_batch_halved(run: Run) -> None:
    run.log.line(
        f"memory exhausted at step {run.step + 1}: "
        f"micro-batch halved to {run.options.micro_batch_size}, "
        f"the effective batch stays {run.config.training.batch_size}"
    )
    halved = {"step": run.step + 1, "micro_batch_size": run.options.micro_batch_size}
    record(run, halved=halved)


def evaluation_done(run: Run, result: Evaluation, saved: bool) -> None:
    """The reference's lines, with its numbering from 0."""
    index = run.step - 1
    log = run.log
    if saved:
        log.line(f"best model saved: step =  {index} dev accu =  {result.accuracy:.5f}")
    log.line("Validation Results")
    log.line(f"Global Steps: {index}")
    log.line(f"Valid Loss: {result.loss:2.5f}")
    log.line(f"Valid Accuracy: {result.accuracy:2.5f}")
    log.line(f"time stamp: {run.seconds:.2f}")
    _event(run, "eval", {**vars(result), "saved": saved})
    log.scalars(
        index,
        {
            "val/loss": result.loss,
            "val/accu": result.accuracy,
            "val/attn_loss": result.attention_loss or 0.0,
        },
    )


def transition_done(run: Run, reason: str, observation: Observation, masks: Tensor) -> None:
    log = run.log
    values = {}
    attention = observation.pooled if observation.smoothed is None else observation.smoothed
    if attention is not None:
        values = describe_masks(attention, masks, observation.uniform)
    density = run.phases[run.phase_index].density or 0
    if run.phase_index == 1:
        log.line(f"transition to sparse attention after step {run.step} ({reason})")
    else:
        log.line(f"transition to density {density:g} after step {run.step} ({reason})")
    for layer, mask in enumerate(masks):
        empty = int((~mask.any(dim=1)).sum())
        log.line(
            f"  layer {layer}: {int(mask.sum())} of {mask.numel()} blocks kept, {empty} of "
            f"{len(mask)} block rows without one"
        )
        if values:
            kept, best = (values[name][layer] or 0 for name in ("kept_mass", "best_mass"))
            log.line(
                f"  layer {layer} keeps {kept:.1%} of the attention in "
                f"{mask.double().mean():.1%} of the blocks; the best blocks hold {best:.1%}"
            )
    scores, chosen = observation.pattern_scores, _chosen(masks, attention)
    log.event(
        "transition",
        step=run.step,
        phase=run.phase,
        reason=reason,
        seconds=run.seconds,
        density=density,
        **values,
        **chosen,
        pattern_scores=for_pictures(scores),
    )
    if not run.world.is_main or run.paths is None:
        return
    log.line(f"block masks: {run.paths.masks}")
    path = run.paths.log.with_suffix(".transition.png")

    if run.mean_attention is not None:  # shows what lies within the blocks
        attention = reduced(run.mean_attention.mean(dim=1), 256).cpu()

    def draw() -> None:
        title = f"transition after step {run.step}"
        kept = chosen["kept_blocks"]
        figure = draw_blocks(masks.shape[-1], attention, scores, kept, title)
        log.image(run.step, "transition", save_png(figure, path))

    _decorate(run, f"picture of attention and kept blocks: {path}", draw)


def _chosen(masks: Tensor, attention: Tensor | None) -> dict[str, Any]:
    """What events say of a choice of blocks, and what the report pictures of it."""
    kept_blocks = [mask.flatten().nonzero().flatten().tolist() for mask in masks]
    return {
        "active_blocks": [len(blocks) for blocks in kept_blocks],
        "kept_blocks": kept_blocks,
        "num_blocks": masks.shape[-1],
        "pooled": for_pictures(attention),
    }


def reduced(matrices: Tensor, size: int) -> Tensor:
    """[L, n, n] averaged down to at most `size` rows and columns, by a whole factor."""
    factor = -(-matrices.shape[-1] // size)
    while matrices.shape[-1] % factor:
        factor += 1
    return F.avg_pool2d(matrices[:, None], factor)[:, 0]


def for_pictures(matrices: Tensor | None) -> list | None:
    """[L, n, n] as lists for metrics.jsonl, at most 64 rows and columns of three digits."""
    if matrices is None:
        return None
    rows = reduced(matrices.float(), 64).tolist()
    return [[[float(f"{value:.3g}") for value in row] for row in layer] for layer in rows]


def _still_dense(run: Run) -> dict[str, Any]:
    """What a run that never switched says and shows of its attention."""
    if run.phase != "dense":
        return {}
    pooled = for_pictures(run.observer.smoothed)
    num_blocks = run.config.model.num_blocks
    return {"outlook": run.criterion.outlook(), "num_blocks": num_blocks, "pooled": pooled}


def _decorate(run: Run, what: str, make: Callable[[], None]) -> None:
    """Makes what nothing depends on: if it fails, for whatever reason, training goes on."""
    try:
        make()
    except Exception as error:
        run.log.line(f"could not make the {what} ({type(error).__name__}: {error})")
    else:
        run.log.line(what)


def reselection_done(run: Run, observation: Observation, before: Tensor, masks: Tensor) -> None:
    """How many blocks were exchanged, and what the old and the new ones hold."""
    assert observation.pooled is not None
    exchanged = (masks & ~before).flatten(1).sum(1).tolist()
    old = describe_masks(observation.pooled, before, observation.uniform)
    new = describe_masks(observation.pooled, masks, observation.uniform)
    parts = [
        f"layer {layer} exchanges {count} of {int(mask.sum())}, which keeps {now or 0:.1%} of the "
        f"attention instead of {then or 0:.1%}"
        for layer, (count, mask, then, now) in enumerate(
            zip(exchanged, masks, old["kept_mass"], new["kept_mass"], strict=True)
        )
    ]
    run.log.line(f"blocks chosen anew after step {run.step}: {'; '.join(parts)}")
    run.log.event(
        "reselection",
        step=run.step,
        phase=run.phase,
        exchanged=exchanged,
        kept_mass_before=old["kept_mass"],
        seconds=run.seconds,
        **new,
        **_chosen(masks, observation.pooled),
    )


def probed(run: Run, values: Values, said: bool = False) -> None:
    """What sparse attention leaves out, see training.probe."""
    if said and values:
        for layer, (used, error) in enumerate(
            zip(values["used_mass"], values["output_error"], strict=True)
        ):
            run.log.line(
                f"  layer {layer}: {used or 0:.1%} of the softmax's weight goes to values, the "
                f"rest to pruned scores; its output is {error or 0:.2f} of dense attention's norm "
                f"away from it"
            )
    run.log.event("probe", step=run.step, phase=run.phase, **values)
    _scalars_of_layers(run, "probe", values)


def resume_hint(run: Run, why: str) -> None:
    run.log.line(f"{why} after step {run.step}; go on with: {run.options.resume_command}")


def training_done(run: Run) -> None:
    log = run.log
    training = run.config.training
    if run.step < training.num_train_steps:
        log.line(
            f"training ended after step {run.step}: {run.evaluations_since_best} evaluations "
            f"without a better one (--patience)"
        )
    log.line(f"total training step (k): {run.step / 1000.0}")
    log.line(f"total training time (s): {run.seconds:.2f}")
    log.line(f"peak memory usage (MB): {memory.peak_bytes(run.device) >> 20}")
    if run.phase == "dense":
        log.line("the run ended without a transition: its whole training was dense")
        log.line(f"  {run.criterion.outlook()}")
        log.line(
            f"  try {run.criterion.remedy}, more steps, a larger batch (less noise), or "
            f"--max_dense_steps N"
        )


def test_done(log, result: Evaluation, seconds: float, phase: str) -> None:
    """The reference's lines of a test."""
    log.line(f"total eval time (s): {seconds:.2f}")
    log.line("Evaluation Results")
    log.line(f"Loss: {result.loss:2.5f}")
    log.line(f"Accuracy: {result.accuracy:2.5f}")
    log.line(f"examples: {result.num_examples}, attention: {phase}")


def run_finished(run: Run, result: Evaluation, tested: TrainState) -> None:
    """The last event, the result in run.json, the picture of the run. What is reported is the
    checkpoint that was tested, whatever the run did after it."""
    outcome = {"phase": tested.phase, "loss": result.loss, "accuracy": result.accuracy}
    _event(run, "end", {**outcome, **_still_dense(run)})
    record(
        run,
        result={
            "test_accuracy": result.accuracy,
            "test_loss": result.loss,
            "num_test_examples": result.num_examples,
            "attention": tested.phase,
            "best_dev_accuracy": tested.best_accuracy,
            "best_step": tested.step,
            "steps": run.step,
            "transition_step": run.transition_step,
            "seconds": run.seconds,
            "peak_memory_bytes": memory.peak_bytes(run.device),
        },
    )
    run.log.scalars(run.step - 1, {"test/accuracy": result.accuracy, "test/loss": result.loss})
    run.log.hparams(hyperparameters(run), ended=True)
    if not run.world.is_main or run.paths is None:
        return
    run.log.sync()
    paths, page = run.paths, run.paths.log.with_suffix(".html")
    _decorate(
        run,
        f"report of the run: {page}",
        lambda: write_run_page(paths.metrics, paths.run_json, page),
    )
    run.log.line(f"numbers: {run.paths.metrics}, {run.paths.run_json}")
    curves = ["-m", "tensorboard.main", "--logdir", str(run.paths.tensorboard)]
    run.log.line(f"curves: {shlex.join([shell.python(), *curves])}")
