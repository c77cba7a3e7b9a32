"""The model's expensive operations as functions of tensors: attention, statistics, the rest."""

from kernels.attention import (
    available_backends,
    block_sparse_attention,
    dense_attention,
    reason_against,
)
from kernels.fused import (
    DropoutKey,
    attention_output_feed_forward,
    attention_projections,
    dropout_add_layer_norm,
    embedding_dropout_layer_norm,
    gelu_dropout,
    key_words,
    linear,
    masked_mean,
)
from kernels.layout import BlockLayout
from kernels.statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "BlockLayout",
    "DropoutKey",
    "attention_output_feed_forward",
    "attention_projections",
    "attention_statistics",
    "available_backends",
    "block_sparse_attention",
    "dense_attention",
    "dropout_add_layer_norm",
    "embedding_dropout_layer_norm",
    "gelu_dropout",
    "key_words",
    "linear",
    "masked_mean",
    "reason_against",
]
