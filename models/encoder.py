"""The pre-norm encoder.

Every addition to the residual stream is followed by a layer norm (the next half layer's, or the
last one), and all that stands between two attentions works on one token at a time, so it is one
operation: x, normed = attention_output_feed_forward(x, attended).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels import DropoutKey
from models.attention import Attention, StatisticsRequest
from models.config import ModelConfig
from models.embeddings import Embeddings

SITES_PER_LAYER = (
    3  # dropouts of one layer: after attention, inside the feed-forward block, after it
)


class EncoderLayer(nn.Module):
    """Parameters of one layer, under the reference's names."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        dim, hidden = config.transformer_dim, config.transformer_hidden_dim
        self.norm1 = nn.LayerNorm(dim)
        self.mha = Attention(config, backend)
        self.norm2 = nn.LayerNorm(dim)
        # indices 0 and 3 carry parameters; the encoder applies GELU and dropout between and after
        # them
        self.mlpblock = nn.ModuleDict({"0": nn.Linear(dim, hidden), "3": nn.Linear(hidden, dim)})


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(module, nn.Linear | nn.LayerNorm)
    return module.weight, module.bias


class Encoder(nn.Module):
    """ids -> pooled representation of each example.

    Positions with id 0 are zeroed after the last layer norm, for every task; MEAN pooling still
    divides by N.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.embeddings = Embeddings(config)
        if config.tied_weights:
            self.transformer = EncoderLayer(config, backend)
        else:
            for index in range(config.num_layers):
                setattr(self, f"transformer_{index}", EncoderLayer(config, backend))
        self.norm = nn.LayerNorm(config.transformer_dim)

    @property
    def layers(self) -> list[EncoderLayer]:
        """The layer each of the num_layers passes uses; the same one every time if weights are
        tied."""
        if self.config.tied_weights:
            return [self.transformer] * self.config.num_layers
        return [getattr(self, f"transformer_{i}") for i in range(self.config.num_layers)]

    def forward(
        self,
        ids: Tensor,
        dropout_key: DropoutKey | None,
        request: StatisticsRequest | None,
        first_site: int,
    ) -> tuple[Tensor | None, list[Any] | None, Tensor | None]:
        """ids int64 [B, N] -> [B, transformer_dim] (None of a probe), what was asked for of each
        layer's attention, and which keys are real, bool [B, N], if not all count as such."""
        config = self.config
        if config.pooling_mode == "CLS":
            start = ids.new_full((ids.shape[0], 1), config.vocab_size - 1)
            ids = torch.cat([start, ids[:, :-1]], dim=1)
        token_mask = ids != 0
        key_padding_mask = token_mask if config.key_padding else None
        # the same dropout everywhere, at its own site
        drop: dict[str, Any] = {
            "p": config.dropout_prob if dropout_key is not None else 0.0,
            "key": dropout_key,
            "backend": self.backend,
        }
        layers = self.layers
        # the norm applied to the residual stream after each half layer
        norms = [layer.norm1 for layer in layers[1:]] + [self.norm]

        x, normed = kernels.embedding_dropout_layer_norm(
            ids,
            self.embeddings.word_table,
            self.embeddings.position_table,
            layers[0].norm1.weight,
            layers[0].norm1.bias,
            site=first_site,
            **drop,
        )
        collected = []
        for index, (layer, next_norm) in enumerate(zip(layers, norms, strict=True)):
            site = first_site + 1 + index * SITES_PER_LAYER
            mean_out = request.mean_out[index] if request and request.mean_out else None
            attended, statistics = layer.mha(normed, key_padding_mask, request, mean_out)
            if statistics is not None:
                collected.append(statistics)
            if index + 1 == len(layers) and request and request.probe and layer.mha.layout:
                return None, collected, key_padding_mask  # nothing more is asked for
            x, normed = kernels.attention_output_feed_forward(
                x,
                attended,
                _parameters(layer.mha.ff),
                _parameters(layer.norm2),
                _parameters(layer.mlpblock["0"]),
                _parameters(layer.mlpblock["3"]),
                _parameters(next_norm),
                sites=(site, site + 1, site + 2),
                layout=layer.mha.layout,
                **drop,
            )
        if config.pooling_mode == "CLS":
            pooled = normed[:, 0] * token_mask[:, :1]
        else:
            pooled = kernels.masked_mean(normed, token_mask, backend=self.backend)
        return pooled, collected or None, key_padding_mask
