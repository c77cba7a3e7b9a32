"""One training step: a global batch in micro-batches, one update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import DropoutKey
from models import StatisticsRequest
from training import memory
from training.batching import Chunk, plan_chunks
from training.data.order import training_indices
from training.distributed import PeerLostError
from training.errors import TrainingFailed
from training.forward import attention_loss, autocast, to_device
from training.probe import Pooled
from training.recording import words
from training.run import Run, StepResult, not_finite

# fp16: steps in a row whose gradient overflowed, after which none will fit any more
SKIPPED_AT_MOST = 20


@dataclass(frozen=True)
class _Sums:
    """What the micro-batches of one process have added up, besides their gradients."""

    totals: Tensor  # loss, correct answers, attention loss: summed on the device, read once
    pooled: Pooled | None


def train_step(run: Run) -> StepResult:
    """One optimizer step over the global batch, in micro-batches; halves them if the device's
    memory does not suffice. What follows the micro-batches happens once: to repeat an update that
    was begun would apply it twice."""
    while True:
        try:
            sums = _accumulate(run)
            break
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
        run.graphs.clear()
        run.optimizer.zero_grad()
        memory.release(run.device)
        words.micro_batch_halved(run)
    return _apply(run, sums)


def _accumulate(run: Run) -> _Sums:
    """Forward and backward over this process's part of the batch. Changes no weight."""
    config = run.config.training
    dense = run.phase == "dense"
    if dense and run.criterion.needs_mean_attention:
        _reset_mean_attention(run)
    run.optimizer.zero_grad(keep=run.graphs.captured)
    begin, end = run.world.part(config.batch_size)
    indices = training_indices(
        run.train_data.size,
        run.config.run.seed,
        run.step * config.batch_size + begin,
        end - begin,
    )
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)
    pooled = Pooled(run) if dense else None
    for chunk in plan_chunks(
        config.batch_size, config.statistics_groups, run.options.micro_batch_size, begin, end
    ):
        ids, ids_1, labels = to_device(
            run.train_data.batch(indices[chunk.begin - begin : chunk.end - begin]), run.device
        )
        batch = ids, ids_1, labels
        key = DropoutKey(run.config.run.seed, run.step, chunk.begin)
        share = len(labels) / config.batch_size
        if pooled is not None:
            request = _statistics_request(run, chunk)
            totals += _forward_backward(run, share, *batch, key, request, pooled)
        else:
            sparse = partial(_forward_backward, run, share)
            totals += run.graphs.call(sparse, batch, key, version=(share, *run.model.layouts))
    return _Sums(totals, pooled)


def _apply(run: Run, sums: _Sums) -> StepResult:
    """Sums over all processes, the checks, one update."""
    config, totals, pooled = run.config.training, sums.totals, sums.pooled
    dense = run.phase == "dense"
    gradients = [p.grad for p in run.optimizer.parameters if p.grad is not None]
    run.world.sum_(gradients)
    if dense and run.mean_attention is not None:
        run.world.sum_([run.mean_attention])
    run.scaler.unscale_(run.optimizer.optimizer)
    largest, norm = (
        torch.nn.utils.get_total_norm(gradients, order).double() for order in (math.inf, 2.0)
    )
    signal = torch.full((1,), float(run.stop.received), dtype=torch.float64, device=run.device)
    shared = torch.cat([totals, signal])
    run.world.sum_([shared, *(pooled.sums if pooled is not None else ())])
    numbers = torch.cat([shared, torch.stack([largest, norm])]).tolist()
    loss_sum, correct, attention_sum, signals, peak, gradient_norm = numbers
    # checked before the weights move: what is saved is good
    broken = not math.isfinite(loss_sum + attention_sum)
    if broken or (not math.isfinite(peak) and not run.scaler.is_enabled()):
        raise not_finite(run, f"the {'loss' if broken else 'gradient'} of step {run.step + 1}")
    learning_rate = run.optimizer.learning_rate
    loss_scale = run.scaler.get_scale() if run.scaler.is_enabled() else None
    skipped = not math.isfinite(peak)
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if skipped else 0
    run.optimizer.clip()
    try:
        run.scaler.step(run.optimizer.optimizer)
    except (RuntimeError, MemoryError) as error:
        # while it made its state, AdamW has not begun to update
        if not memory.is_exhausted(error) or not run.optimizer.drop_unfinished_state():
            raise
        run.options.micro_batch_size = max(1, run.options.micro_batch_size // 2)
        words.micro_batch_halved(run)
        run.graphs.clear()
        memory.release(run.device)
        run.scaler.step(run.optimizer.optimizer)
    run.scaler.update()
    if not skipped:  # the schedule counts updates
        run.optimizer.advance()
    elif run.skipped_in_a_row >= SKIPPED_AT_MOST:
        raise not_finite(
            run,
            f"the gradient of {SKIPPED_AT_MOST} steps in a row, up to step {run.step + 1}, "
            f"whatever the loss scale (now {run.scaler.get_scale():g}; --precision fp32 and bf16 "
            f"need none)",
        )
    return StepResult(
        loss=loss_sum,
        attention_loss=attention_sum if dense else None,
        accuracy=correct / config.batch_size,
        learning_rate=learning_rate,
        gradient_norm=gradient_norm if math.isfinite(gradient_norm) else None,
        loss_scale=loss_scale,
        skipped=skipped,
        # what was shared decides, so that all processes end after the same step
        stop_signal=(run.stop.received or run.stop.default) if signals > 0 else 0,
        seen=pooled.result() if pooled is not None else None,
    )


def _forward_backward(
    run: Run,
    share: float,
    ids: Tensor,
    ids_1: Tensor | None,
    labels: Tensor,
    key: DropoutKey,
    request: StatisticsRequest | None = None,
    pooled: Pooled | None = None,
) -> Tensor:
    """Adds a micro-batch's gradients; its share of loss, of correct answers and of the attention
    loss, [3] float64. request, pooled: in the dense phase."""
    with autocast(run.device, run.config.run.precision):
        output = run.model(ids, ids_1, dropout_key=key, statistics=request)
    loss = F.cross_entropy(output.logits.float(), labels) * share
    total, attention = loss, loss.new_zeros(())
    if pooled is not None:
        pooled.add(output, share)
        attention = attention_loss(run.model, output, run.config.training.attn_loss_scale) * share
        # only the patterns receive a gradient of it, and theirs is all they receive
        total = loss + attention.float()
    run.scaler.scale(total).backward()
    correct = (output.logits.detach().argmax(-1) == labels).sum()
    return torch.stack([loss.detach().double(), correct.double(), attention.detach().double()])


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
    if run.mean_attention is None:
        return StatisticsRequest(full=False)
    groups = slice(chunk.first_group, chunk.first_group + chunk.num_groups)
    return StatisticsRequest(
        groups=chunk.num_groups,
        mean_out=[layer[groups] for layer in run.mean_attention],
        mean_weight=chunk.group_weight,
    )
