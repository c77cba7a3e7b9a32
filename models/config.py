"""The checked, frozen form of a task's `model` dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one model. Every field is in the task's dict or has its default here.

    Raises:
        ValueError: one sentence naming the field and what is allowed.
    """

    num_layers: int
    vocab_size: int
    max_seq_len: int  # before rounding; the model works on `padded_length`
    num_classes: int
    block_size: int
    density: float  # kept blocks / all blocks
    embedding_dim: int = 64
    transformer_dim: int = 64
    transformer_hidden_dim: int = 128
    head_dim: int = 32
    num_head: int = 2
    dropout_prob: float = 0.1
    learn_pos_emb: bool = True  # False: sinusoidal
    tied_weights: bool = False  # True: one layer used num_layers times
    pooling_mode: str = "MEAN"
    key_padding: bool = False  # True: attention ignores keys with id 0
    num_inputs: int = 1  # 2: two documents, one encoder
    attention_dropout: float = 0.1  # kept for compatibility, never used
    batch_size: int = 0  # kept for compatibility, derived from training.batch_size

    padded_length: int = dataclasses.field(init=False, default=0)  # N, the next power of two
    num_blocks: int = dataclasses.field(init=False, default=0)  # nb
    num_active_blocks: int = dataclasses.field(init=False, default=0)  # floor(density * nb^2)

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "vocab_size",
            "max_seq_len",
            "num_classes",
            "block_size",
            "embedding_dim",
            "transformer_dim",
            "transformer_hidden_dim",
            "head_dim",
            "num_head",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 <= self.dropout_prob < 1.0:
            raise ValueError(f"model.dropout_prob must lie in [0, 1), not {self.dropout_prob}")
        if self.dropout_prob > 0.999:  # nearer to 1, fp32 has no 1 / (1 - p) for it
            raise ValueError(f"model.dropout_prob must be at most 0.999, not {self.dropout_prob}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"model.density must lie in (0, 1], not {self.density}")
        if self.embedding_dim != self.transformer_dim:
            raise ValueError(
                f"model.embedding_dim ({self.embedding_dim}) must equal model.transformer_dim "
                f"({self.transformer_dim}): embeddings enter the encoder without a projection"
            )
        if self.pooling_mode not in ("MEAN", "CLS"):
            raise ValueError(f"model.pooling_mode must be MEAN or CLS, not {self.pooling_mode!r}")
        if self.num_inputs not in (1, 2):
            raise ValueError(f"model.num_inputs must be 1 or 2, not {self.num_inputs}")
        if not self.learn_pos_emb and self.embedding_dim % 2:
            raise ValueError(
                f"model.embedding_dim must be even for sinusoidal positions, not "
                f"{self.embedding_dim}"
            )
        length = 1 << (self.max_seq_len - 1).bit_length()
        if length % self.block_size:
            raise ValueError(
                f"model.block_size {self.block_size} does not divide the padded length {length} "
                f"(model.max_seq_len {self.max_seq_len} rounded up to a power of two)"
            )
        num_blocks = length // self.block_size
        active = int(num_blocks * num_blocks * self.density)
        if active < 1:
            raise ValueError(
                f"model.density {self.density} keeps no block: there are {num_blocks}^2 = "
                f"{num_blocks**2} blocks, so it must be at least {1 / num_blocks**2:.6f}"
            )
        object.__setattr__(self, "padded_length", length)
        object.__setattr__(self, "num_blocks", num_blocks)
        object.__setattr__(self, "num_active_blocks", active)

    def as_dict(self) -> dict[str, Any]:
        """The fields that can be set, without the derived ones: a dict that builds this object
        again."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.init
        }


def checked_fields(cls: type, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every key known to the dataclass `cls` and every value of the field's type.

    An int is taken where a float is meant; a bool is never taken for a number.

    Raises:
        ValueError: one sentence naming the unknown, missing or mistyped field.
    """
    import difflib

    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = (
                f"did you mean {section}.{close[0]}?" if close else f"known: {', '.join(fields)}"
            )
            raise ValueError(f"{section}.{key} is not a field; {hint}")
        wanted = str(fields[key].type)
        if wanted.endswith(" | None"):
            if value is None:
                checked[key] = value
                continue
            wanted = wanted.removesuffix(" | None")
        if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value).__name__ != wanted:
            raise ValueError(
                f"{section}.{key} must be of type {wanted}, not {value!r} ({type(value).__name__})"
            )
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ValueError(f"{section}.{key} must be a finite number, not {value}")
        checked[key] = value
    missing = [
        name
        for name, field in fields.items()
        if name not in checked and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{section}.{missing[0]} is missing from the configuration")
    return checked
