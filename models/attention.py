"""Multi-head attention, dense until a layout is there, block-sparse from then on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels import AttentionStatistics, BlockLayout
from kernels.statistics import real_row_weights
from models.config import ModelConfig


@dataclass(frozen=True)
class StatisticsRequest:
    """What a forward reports about its attention: statistics if it is dense, with `probe` an
    AttentionProbe if it is sparse; a probe ends with the last attention and gives no logits.

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
    probe: bool = False

    def pooled_only(self) -> StatisticsRequest:
        """The same request without the [groups, N, N] means."""
        return StatisticsRequest(groups=1, full=False, probe=self.probe)


@dataclass(frozen=True)
class AttentionProbe:
    """What one layer's sparse attention leaves out: dense attention of the same query, key and
    value, over real query rows, examples weighing the same. No gradient.

    pooled_real: [nb, nb] fp32, of the dense probabilities, as in AttentionStatistics.
    used_mass: float64 scalar, share of the softmax's weight that real values get; the rest are
        pruned scores, which count as logit 0.
    squared_error, squared_norm: float64 scalars, of sparse minus dense output and of the dense.
    """

    pooled_real: Tensor
    used_mass: Tensor
    squared_error: Tensor
    squared_norm: Tensor


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
    ) -> tuple[Tensor, AttentionStatistics | AttentionProbe | None]:
        """x [B, N, transformer_dim] -> [B, N, num_head * head_dim] before the output projection,
        and what was asked for."""
        batch, length, _ = x.shape
        probed = self.layout is not None and request is not None and request.probe
        query, key, value = kernels.attention_projections(
            x,
            *((map_.weight, map_.bias) for map_ in (self.W_q, self.W_k, self.W_v)),
            heads=self.num_head,
            # a probe compares with dense attention, which reads what sparse attention leaves out
            layout=None if probed else self.layout,
            backend=self.backend,
        )
        statistics: AttentionStatistics | AttentionProbe | None = None
        if self.layout is not None:
            out = kernels.block_sparse_attention(
                query,
                key,
                value,
                self.layout,
                key_padding_mask=key_padding_mask,
                return_lse=probed,
                backend=self.backend,
            )
            if probed:
                out, lse = out
                statistics = self._probe(query, key, value, out, lse, key_padding_mask)
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

    @torch.no_grad()
    def _probe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
    ) -> AttentionProbe:
        """out, lse: of sparse attention, the logarithm of its denominators."""
        assert self.layout is not None
        given: dict[str, Any] = {"key_padding_mask": mask, "backend": self.backend}
        dense, dense_lse = kernels.dense_attention(query, key, value, return_lse=True, **given)
        pooled = kernels.attention_statistics(
            query, key, block_size=self.block_size, full=False, lse=dense_lse, **given
        ).pooled_real
        # each pruned score has added exp(0) to the denominator
        pruned = (~self.layout.block_mask).sum(1).repeat_interleave(self.block_size)
        rest = pruned * (self.block_size * (-lse.double()).exp())
        of_rows = (1 - rest).masked_fill_(lse.isinf(), 0.0).mean(1)
        error = out.float() - dense.float()
        # of each row in its own type, over rows in float64
        squares = [
            torch.linalg.vector_norm(x, dim=-1).double().square() for x in (error, dense.float())
        ]
        if mask is not None:
            of_rows = of_rows * real_row_weights(mask)
            squares = [square * mask[:, None] for square in squares]
        return AttentionProbe(pooled, of_rows.mean(), *(square.sum() for square in squares))
