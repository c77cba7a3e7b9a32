"""What a forward in training and one in evaluation share."""

from __future__ import annotations

import torch
from torch import Tensor

from models import ModelOutput, SequenceClassifier
from sparsity.pattern_loss import pattern_loss


def attention_loss(model: SequenceClassifier, output: ModelOutput, scale: float) -> Tensor:
    """The pattern loss of a dense forward; with two documents the mean of theirs."""
    assert output.statistics is not None
    loss = pattern_loss(output.statistics, model.patterns, scale)
    if output.statistics_1 is not None:
        loss = (loss + pattern_loss(output.statistics_1, model.patterns, scale)) / 2
    return loss


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context a forward runs in."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def to_device(batch, device: torch.device):
    """A batch of the dataset as int64 on the model's device. It is copied in its stored type, from
    pinned memory, and nothing waits for the copy."""
    if is_gpu(device):
        batch = [None if part is None else part.pin_memory() for part in batch]
    return tuple(None if part is None else _int64_on(part, device) for part in batch)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _int64_on(part: Tensor, device: torch.device) -> Tensor:
    return part.to(device, non_blocking=True).to(torch.int64)
