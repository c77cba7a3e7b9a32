"""The whole model: encoder, head, and the change from dense to sparse attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels import BlockLayout, DropoutKey
from models.attention import StatisticsRequest
from models.config import ModelConfig, checked_fields
from models.encoder import SITES_PER_LAYER, Encoder
from models.heads import ClassifierHead

DENSE_STATISTICS = StatisticsRequest()


@dataclass(frozen=True)
class ModelOutput:
    """logits [B, num_classes] fp32, empty of a probe; statistics of each layer's attention (in the
    dense phase; in the sparse one an AttentionProbe of each layer if asked for, else None); with
    two inputs `statistics` is that of document 0 and `statistics_1` holds the pooled statistics of
    document 1. real_keys: bool [B, N] of each document, which keys attention looks at; empty where
    it looks at all.
    """

    logits: Tensor
    statistics: list[Any] | None = None
    statistics_1: list[Any] | None = None
    real_keys: tuple[Tensor, ...] = ()


class SequenceClassifier(nn.Module):
    """A transformer encoder with a classifier head.

    Parameter names are the reference's without `module.`, so that its checkpoints load as they are
    (`seq_classifer` is spelled as published).
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.model = Encoder(config, backend)
        self.seq_classifer = ClassifierHead(config)

    def forward(
        self,
        ids: Tensor,
        ids_1: Tensor | None = None,
        *,
        dropout_key: DropoutKey | None = None,
        statistics: StatisticsRequest | None = DENSE_STATISTICS,
    ) -> ModelOutput:
        """Logits, and in the dense phase what the attention looked like.

        Args:
            ids, ids_1: int64 [B, N]; ids_1 for models with two inputs.
            dropout_key: which dropout masks to draw; None: no dropout (evaluation).
            statistics: what to report in the dense phase; None: nothing.

        Raises:
            ValueError: the number or the length of the inputs does not fit the model.
        """
        config = self.config
        if (ids_1 is not None) != (config.num_inputs == 2):
            raise ValueError(f"this model takes {config.num_inputs} input(s) for each example")
        for given in (ids, ids_1):
            if given is not None and given.shape[-1] != config.padded_length:
                raise ValueError(
                    f"sequences must have length {config.padded_length}, not {given.shape[-1]}"
                )
        pooled, collected, real = self.model(ids, dropout_key, statistics, 0)
        pooled_1 = collected_1 = real_1 = None
        if ids_1 is not None:
            second_site = 1 + SITES_PER_LAYER * config.num_layers
            only = statistics.pooled_only() if statistics is not None else None
            pooled_1, collected_1, real_1 = self.model(ids_1, dropout_key, only, second_site)
        logits = ids.new_empty(0) if pooled is None else self.seq_classifer(pooled, pooled_1)
        real_keys = tuple(keys for keys in (real, real_1) if keys is not None)
        return ModelOutput(logits, collected, collected_1, real_keys)

    @property
    def patterns(self) -> list[nn.Parameter]:
        """The learned [nb, d] pattern of each layer; the same one every time if weights are
        tied."""
        return [layer.mha.pattern for layer in self.model.layers]

    def pattern_scores(self) -> Tensor:
        """pattern @ pattern.T of each layer, [L, nb, nb] float64 on the CPU (its order decides
        which blocks are kept)."""
        with torch.no_grad():
            patterns = torch.stack([pattern.detach().cpu().double() for pattern in self.patterns])
            return patterns @ patterns.transpose(1, 2)

    @property
    def layouts(self) -> list[BlockLayout | None]:
        """Of each layer; None in the dense phase."""
        return [layer.mha.layout for layer in self.model.layers]

    @property
    def block_masks(self) -> Tensor | None:
        """bool [L, nb, nb] on the CPU; None in the dense phase."""
        masks = [layout.block_mask.cpu() for layout in self.layouts if layout is not None]
        return torch.stack(masks) if masks else None

    def enter_sparse_phase(self, block_masks: Tensor) -> None:
        """Attend to the given blocks only, from now on, and stop learning the pattern. May be
        called again.

        Args:
            block_masks: [L, nb, nb], nonzero = kept.

        Raises:
            ValueError: wrong shape, or different masks for layers with tied weights.
        """
        config = self.config
        expected = (config.num_layers, config.num_blocks, config.num_blocks)
        if tuple(block_masks.shape) != expected:
            raise ValueError(
                f"block masks must have the shape {list(expected)}, not {list(block_masks.shape)}"
            )
        block_masks = block_masks.detach().cpu() != 0
        if config.tied_weights and not (block_masks == block_masks[0]).all():
            raise ValueError("layers with tied weights share one mask; the given masks differ")
        device = self.model.norm.weight.device
        for layer, mask in zip(self.model.layers, block_masks, strict=True):
            layer.mha.layout = BlockLayout.from_mask(mask, config.block_size).to(device)
            layer.mha.pattern.requires_grad_(False)
            layer.mha.pattern.grad = None


def build_model(
    config: ModelConfig | Mapping[str, Any], backend: str = "auto"
) -> SequenceClassifier:
    """A freshly initialised model in the dense phase (torch's global generator decides the
    weights).

    Args:
        config: a ModelConfig or the `model` part of a task's dict.
        backend: of the kernels; see kernels.available_backends().

    Raises:
        ValueError: one sentence naming the field and what is allowed.
    """
    if not isinstance(config, ModelConfig):
        config = ModelConfig(**checked_fields(ModelConfig, "model", config.get("model", config)))
    return SequenceClassifier(config, backend)
