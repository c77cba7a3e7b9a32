"""The model's expensive operations as functions of tensors: attention, statistics, the rest."""

from kernels.attention import block_sparse_attention, dense_attention
from kernels.backends import Call, available_backends, can_run
from kernels.dropout import DropoutKey, key_words
from kernels.layer import (
    attention_output_feed_forward,
    attention_projections,
    dropout_add_layer_norm,
    embedding_dropout_layer_norm,
    gelu_dropout,
    linear,
    masked_mean,
)
from kernels.layout import BlockLayout
from kernels.statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "BlockLayout",
    "Call",
    "DropoutKey",
    "attention_output_feed_forward",
    "attention_projections",
    "attention_statistics",
    "available_backends",
    "block_sparse_attention",
    "can_run",
    "dense_attention",
    "dropout_add_layer_norm",
    "embedding_dropout_layer_norm",
    "gelu_dropout",
    "key_words",
    "linear",
    "masked_mean",
]
