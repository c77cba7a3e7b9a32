"""Classifiers on top of the encoder, under the reference's parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import ModelConfig


class ClassifierHead(nn.Module):
    """Linear, ReLU, Linear. Two documents enter as [a, b, a * b, a - b]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.transformer_dim * (1 if config.num_inputs == 1 else 4)
        self.mlpblock = nn.Sequential(
            nn.Linear(width, config.transformer_hidden_dim),
            nn.ReLU(),
            nn.Linear(config.transformer_hidden_dim, config.num_classes),
        )

    def forward(self, pooled: Tensor, pooled_1: Tensor | None = None) -> Tensor:
        """[B, transformer_dim], once or twice -> logits [B, num_classes]."""
        if pooled_1 is not None:
            pooled = torch.cat([pooled, pooled_1, pooled * pooled_1, pooled - pooled_1], dim=-1)
        return self.mlpblock(pooled)
