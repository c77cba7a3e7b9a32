"""Multi-head attention, dense until a layout is there, block-sparse from then on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from kernels import AttentionStatistics, BlockLayout
from models.config import ModelConfig


@dataclass(frozen=True)
class StatisticsRequest:
    """What a dense forward reports about its attention.

    groups: equal parts of the examples whose means are kept apart.
    full: also the [groups, N, N] mean attention, not only what the pattern loss needs.
    mean_out: per layer a [groups, N, N] fp32 buffer into which mean_weight times the mean
        attention is added, so that micro-batches of one group accumulate in place; None allocates
        it.
    """

    groups: int = 1
    full: bool = True
    mean_out: list[Tensor] | None = None
    mean_weight: float = 1.0

    def pooled_only(self) -> StatisticsRequest:
        """The same request without the [groups, N, N] means."""
        return StatisticsRequest(groups=1, full=False)


class Attention(nn.Module):
    """Four projections with bias and the learned block pattern.

    `layout` is None in the dense phase. Only `pattern` learns from the pattern loss; no gradient
    of it reaches query or key.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        inner = config.num_head * config.head_dim
        self.num_head = config.num_head
        self.head_dim = config.head_dim
        self.block_size = config.block_size
        self.backend = backend
        self.pattern = nn.Parameter(torch.rand(config.num_blocks, config.head_dim))
        self.W_q = nn.Linear(config.transformer_dim, inner)
        self.W_k = nn.Linear(config.transformer_dim, inner)
        self.W_v = nn.Linear(config.transformer_dim, inner)
        self.ff = nn.Linear(inner, config.transformer_dim)
        self.layout: BlockLayout | None = None

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        request: StatisticsRequest | None,
        mean_out: Tensor | None,
    ) -> tuple[Tensor, AttentionStatistics | None]:
        """x [B, N, transformer_dim] -> [B, N, num_head * head_dim] before the output projection,
        and the statistics if dense and asked for."""
        batch, length, _ = x.shape
        query, key, value = kernels.attention_projections(
            x,
            *((map_.weight, map_.bias) for map_ in (self.W_q, self.W_k, self.W_v)),
            heads=self.num_head,
            layout=self.layout,
            backend=self.backend,
        )
        statistics = None
        if self.layout is not None:
            out = kernels.block_sparse_attention(
                query,
                key,
                value,
                self.layout,
                key_padding_mask=key_padding_mask,
                backend=self.backend,
            )
        else:
            out = kernels.dense_attention(
                query, key, value, key_padding_mask=key_padding_mask, backend=self.backend
            )
            if request is not None:
                statistics = kernels.attention_statistics(
                    query.detach(),
                    key.detach(),
                    block_size=self.block_size,
                    key_padding_mask=key_padding_mask,
                    groups=request.groups,
                    full=request.full,
                    backend=self.backend,
                    mean_out=mean_out,
                    mean_weight=request.mean_weight,
                )
        # the heads side by side; the output projection `ff` belongs to what follows
        out = out.transpose(1, 2).reshape(batch, length, self.num_head * self.head_dim)
        return out, statistics
