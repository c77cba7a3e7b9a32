"""The step's operations beside attention: dropout with its neighbours, layer norm, GELU, linear.

Once attention is sparse, most of a training step on a CPU is spent here. Each function below is
one pass over memory where plain PyTorch makes three to six. The plain PyTorch versions (backend
"reference", any device) define what is right; the compiled ones (backend "cpu") give the same
masks bit by bit and the same numbers up to rounding.

Dropout is counter-based. Whether an element is kept is a pure function of (seed, step, site,
position of the example in the global batch, index of the element within the example): no mask is
stored, none depends on threads, micro-batches or devices, and a resumed run draws the same ones.

Shape letters: B examples, N tokens, E features, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's finaliser (Steele et al. 2014)
_MIX32 = (0x7FEB352D, 0x846CA68B)  # "lowbias32", C. Wellons, hash-prospector
_LANES = 16  # 32-bit words of a hash block; each serves two elements, _LANES apart


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout mask depends on beside its site and the element.

    seed: the run's; step: completed steps of the run; first_example: position of this
    (micro-)batch's first example in the global batch.
    """

    seed: int
    step: int
    first_example: int


# ---- the generator -------------------------------------------------------------------


def dropout_threshold(p: float) -> int:
    """p in units of 2**-16, rounded: an element whose 16 random bits lie below it is dropped."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    threshold = round(p * 65536)
    if threshold == 65536:
        raise ValueError(f"dropout probability {p} leaves nothing at a resolution of 2**-16")
    return threshold


def dropout_scale(p: float) -> float:
    """1 / keep probability as realised, 65536 / (65536 - threshold): the kept elements' factor."""
    return 65536 / (65536 - dropout_threshold(p))


def _mix64(word: int) -> int:
    word ^= word >> 30
    word = word * _MIX64[0] & _WORD
    word ^= word >> 27
    word = word * _MIX64[1] & _WORD
    return word ^ word >> 31


def site_key(key: DropoutKey, site: int) -> int:
    """64 bits for (seed, step, site); example i of the global batch adds i before mixing."""
    word = 0
    for part in (key.seed, key.step, site):
        word = _mix64((word + part + _GOLDEN) & _WORD)
    return word


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def _example_keys(key: DropoutKey, site: int, count: int, device: torch.device) -> Tensor:
    """int32 [count, 2]: two 32-bit keys for each example."""
    first = _signed((site_key(key, site) + key.first_example + _GOLDEN) & _WORD, 64)
    word = torch.arange(count, dtype=torch.int64, device=device).add_(first)
    # torch has no logical shift of signed words: shift, then mask the sign's copies away.
    word ^= (word >> 30) & ((1 << 34) - 1)
    word *= _signed(_MIX64[0], 64)
    word ^= (word >> 27) & ((1 << 37) - 1)
    word *= _signed(_MIX64[1], 64)
    word ^= (word >> 31) & ((1 << 33) - 1)
    return word.view(torch.int32).view(count, 2)  # little-endian: the low half first


def keep_mask(key: DropoutKey, site: int, shape: torch.Size, p: float, device) -> Tensor:
    """bool, True where an element of [B, ...] is kept.

    Elements 32 b + j and 32 b + 16 + j (j < 16) of an example take the low and high 16 bits of one
    32-bit word, lowbias32(16 b + j + key 0) with key 1 added halfway. Two vectors of any width up
    to 16 lanes come out of one hash that way without a shuffle. (Thanks to key 1 two examples
    whose key 0 lie close together still share nothing.)
    """
    count, size = shape[0], shape[1:].numel()
    keys = _example_keys(key, site, count, device)
    blocks = -(-size // (2 * _LANES))
    word = torch.arange(blocks * _LANES, dtype=torch.int32, device=device) + keys[:, :1]
    word ^= (word >> 16) & 0xFFFF
    word *= _MIX32[0]
    word ^= keys[:, 1:]
    word ^= (word >> 15) & 0x1FFFF
    word *= _signed(_MIX32[1], 32)
    word ^= (word >> 16) & 0xFFFF
    word = word.view(count, blocks, 1, _LANES)
    threshold = dropout_threshold(p)
    keep = torch.cat([word & 0xFFFF, (word >> 16) & 0xFFFF], dim=2) >= threshold
    return keep.view(count, -1)[:, :size].reshape(shape)


# ---- reference ---------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """Half precisions are computed in fp32 and rounded once, at the end of each operation."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _dropout(x: Tensor, p: float, key: DropoutKey | None, site: int) -> Tensor:
    if key is None or dropout_threshold(p) == 0:
        return x
    keep = keep_mask(key, site, x.shape, p, x.device)
    return torch.where(keep, x * dropout_scale(p), 0.0)


def _norm_dtype(x: Tensor) -> torch.dtype:
    """Under autocast the norm comes out in autocast's type: only products read it."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = _norm_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        wide = _wide(x)
        normed = F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
        return normed.to(dtype)


# ---- public ------------------------------------------------------------------------


def _check(backend: str) -> None:
    if backend not in ("auto", "reference"):
        raise ValueError(f"unknown backend {backend!r}: choose auto or reference")


def embedding_dropout_layer_norm(
    ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float,
    key: DropoutKey | None,
    site: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x = dropout(word_table[ids] + position_table) and its layer norm.

    Args:
        ids: int64 [B, N], each in 0 .. V - 1.
        word_table, position_table: [V, E], [N, E] of one dtype.
        norm_weight, norm_bias: [E].
        p: dropout probability, realised as a multiple of 2**-16.
        key: None (evaluation) means no dropout.
        site: names this place in the model; two places never share one.
    Returns: (x [B, N, E] in the tables' dtype, LayerNorm(x) in that, or autocast's if it is on).
    Raises: ValueError if shapes disagree or p is not in [0, 1).
    """
    _check(backend)
    if position_table.shape != (ids.shape[1], word_table.shape[1]):
        raise ValueError(
            f"position_table must be [{ids.shape[1]}, {word_table.shape[1]}] for ids "
            f"{list(ids.shape)}, got {list(position_table.shape)}"
        )
    x = _wide(F.embedding(ids, word_table)) + _wide(position_table)
    x = _dropout(x, p, key, site).to(word_table.dtype)
    return x, _layer_norm(x, norm_weight, norm_bias, eps)


def dropout_add_layer_norm(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float,
    key: DropoutKey | None,
    site: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + dropout(branch) and its layer norm: one pre-norm branch ends, the next one starts.

    Args:
        x, branch: [B, N, E]; dtypes may differ (an fp32 stream with bf16 branches).
        norm_weight, norm_bias: [E]; p, key, site: as in embedding_dropout_layer_norm.
    Returns: (y in the wider of the two dtypes, LayerNorm(y) in that, or autocast's if it is on).
    Raises: ValueError if shapes disagree or p is not in [0, 1).
    """
    _check(backend)
    if x.shape != branch.shape:
        raise ValueError(f"x {list(x.shape)} and branch {list(branch.shape)} must agree")
    y = _wide(x) + _dropout(_wide(branch), p, key, site)
    y = y.to(torch.promote_types(x.dtype, branch.dtype))
    return y, _layer_norm(y, norm_weight, norm_bias, eps)


def gelu_dropout(
    x: Tensor, *, p: float, key: DropoutKey | None, site: int, backend: str = "auto"
) -> Tensor:
    """dropout(gelu(x)), gelu(x) = x * Phi(x) with the exact normal distribution (erf).

    x: [B, ...]; p, key, site: as in embedding_dropout_layer_norm. Returns x's shape and dtype.
    """
    _check(backend)
    return _dropout(F.gelu(_wide(x)), p, key, site).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto") -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear (autocast included).

    x: [..., E]; weight: [O, E]; bias: [O] or None. Returns [..., O].
    """
    _check(backend)
    return F.linear(x, weight, bias)
