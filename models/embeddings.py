"""Token and position tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.config import ModelConfig


class Embeddings(nn.Module):
    """Holds the two tables; the encoder adds them in one fused operation.

    Both start at normal(0, 0.02). With learn_pos_emb False the positions are sinusoidal and no
    parameter.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_dim)
        nn.init.normal_(self.word_embeddings.weight, std=0.02)
        self.learned_positions = config.learn_pos_emb
        if config.learn_pos_emb:
            self.position_embeddings = nn.Embedding(config.padded_length, config.embedding_dim)
            nn.init.normal_(self.position_embeddings.weight, std=0.02)
        else:
            table = sinusoidal_positions(config.padded_length, config.embedding_dim)
            self.register_buffer("sinusoidal_table", table, persistent=False)

    @property
    def word_table(self) -> Tensor:
        """[vocab_size, embedding_dim]"""
        return self.word_embeddings.weight

    @property
    def position_table(self) -> Tensor:
        """[N, embedding_dim]"""
        if self.learned_positions:
            return self.position_embeddings.weight
        return self.sinusoidal_table  # type: ignore[return-value]


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """[length, dim] fp32: sine in even and cosine in odd columns, wavelengths from 2 pi to 10,000
    * 2 pi."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    frequency = torch.exp(
        torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim)
    )
    angle = position * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).reshape(length, dim).float()
