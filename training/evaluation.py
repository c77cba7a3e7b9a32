"""Loss and accuracy of a model over a data set: shared by training and by both entry scripts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from models import SequenceClassifier, StatisticsRequest
from training import memory
from training.data.examples import Dataset
from training.distributed import World
from training.errors import TrainingFailed
from training.forward import attention_loss, autocast, to_device
from training.interrupt import StopSignal


@dataclass(frozen=True)
class Evaluation:
    """Means over examples, each counted once."""

    loss: float
    accuracy: float
    attention_loss: float | None  # None with sparse attention, and where it was not asked for
    num_examples: int

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers."""
        return math.isfinite(self.loss + (self.attention_loss or 0.0))


@torch.no_grad()
def evaluate(
    model: SequenceClassifier,
    data: Dataset,
    indices: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    precision: str,
    world: World,
    attn_loss_scale: float | None,
    stop: StopSignal | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Evaluation | None:
    """Evaluates the given examples in the model's current phase, without dropout.

    Args:
        indices: int64, which examples; every process of `world` takes its share of them.
        batch_size: examples at a time; changes memory and time only.
        precision: "fp32", "bf16" or "fp16".
        attn_loss_scale: of the attention loss in the dense phase; None leaves it out.
        stop: a signal, to any process, ends the evaluation at the next batch.
        notify: told when a batch did not fit in memory and was halved.

    Returns: None if it was stopped.
    Raises:
        TrainingFailed: one example does not fit in memory.
    """
    dense = model.block_masks is None and attn_loss_scale is not None
    begin, end = world.part(len(indices))
    # loss, correct answers, attention loss; how many processes were stopped
    totals = torch.zeros(4, dtype=torch.float64, device=device)

    def add(batch: np.ndarray) -> None:
        ids, ids_1, labels = to_device(data.batch(batch), device)
        request = StatisticsRequest(full=False) if dense else None
        with autocast(device, precision):
            output = model(ids, ids_1, statistics=request)
        sums = [
            F.cross_entropy(output.logits.float(), labels, reduction="sum").double(),
            (output.logits.argmax(-1) == labels).sum().double(),
        ]
        if attn_loss_scale is not None and dense:
            attention = attention_loss(model, output, attn_loss_scale) * len(labels)
            sums.append(attention.double())
        totals[: len(sums)] += torch.stack(sums)  # all of a batch or nothing

    training = model.training
    model.eval()  # ours does not need it, a layer that somebody adds may
    while begin < end:
        if stop is not None and stop.received:
            totals[3] += 1
            break
        try:
            add(indices[begin : min(begin + batch_size, end)])
            begin += batch_size
            continue
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            if batch_size == 1:
                raise TrainingFailed("memory exhausted by evaluating one example") from None
        # outside the handler: the exception's traceback keeps the failed batch's tensors alive
        batch_size //= 2
        memory.release(device)
        notify(f"memory exhausted in evaluation: {batch_size} examples at a time")
    model.train(training)
    world.sum_([totals])
    loss, correct, attention, stopped = (totals / len(indices)).tolist()
    if stopped:
        return None
    return Evaluation(loss, correct, attention if dense else None, len(indices))
