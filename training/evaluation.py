"""Loss and accuracy of a model over a data set: shared by training and by both entry scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from models import SequenceClassifier, StatisticsRequest
from training.data.examples import Dataset
from training.distributed import World
from training.forward import attention_loss, autocast, to_device


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
) -> Evaluation:
    """Evaluates the given examples in the model's current phase, without dropout.

    Args:
        indices: int64, which examples; every process of `world` takes its share of them.
        batch_size: examples at a time; changes memory and time only.
        precision: "fp32", "bf16" or "fp16".
        attn_loss_scale: of the attention loss in the dense phase; None leaves it out.
    """
    dense = model.block_masks is None and attn_loss_scale is not None
    begin, end = world.part(len(indices))
    # loss, correct answers, attention loss
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()  # ours needs no such word, a layer that somebody added may
    for start in range(begin, end, batch_size):
        ids, ids_1, labels = to_device(
            data.batch(indices[start : min(start + batch_size, end)]), device
        )
        request = StatisticsRequest(full=False) if dense else None
        with autocast(device, precision):
            output = model(ids, ids_1, statistics=request)
        totals[0] += F.cross_entropy(output.logits.float(), labels, reduction="sum")
        totals[1] += (output.logits.argmax(-1) == labels).sum()
        if attn_loss_scale is not None and dense:
            totals[2] += attention_loss(model, output, attn_loss_scale) * len(labels)
    model.train(training)
    world.sum_([totals])
    loss, correct, attention = (totals / len(indices)).tolist()
    return Evaluation(loss, correct, attention if dense else None, len(indices))
