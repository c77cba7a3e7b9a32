"""Counter-based dropout: which elements are kept, bit by bit the same in every backend.

Whether an element is kept is a pure function of (seed, step, site, position of the example in the
global batch, index of the element within the example): no mask is stored, none depends on threads,
micro-batches or devices, and a resumed run draws the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's finaliser (Steele et al. 2014)
_MIX32 = (0x7FEB352D, 0x846CA68B)  # "lowbias32", C. Wellons, hash-prospector
LANES = 16  # 32-bit words of a hash block; each serves two elements, LANES apart


@dataclass(frozen=True)
class DropoutKey:
    """What a dropout mask depends on besides its site and the element.

    seed: the run's; step: completed steps of the run; first_example: position of this
    (micro-)batch's first example in the global batch.
    """

    seed: int
    step: int
    first_example: int
    # int64 [3], the same on a GPU, whose kernels read it: a captured graph draws the masks of what
    # is written there. None: uploaded when first asked for.
    words: Tensor | None = field(default=None, compare=False)


def key_words(key: DropoutKey, device: torch.device) -> Tensor:
    """int64 [3] on `device`: seed, step and first example."""
    if key.words is not None:
        return key.words
    return _uploaded(key.seed, key.step, key.first_example, device)


@lru_cache(maxsize=16)
def _uploaded(seed: int, step: int, first_example: int, device: torch.device) -> Tensor:
    words = torch.tensor([seed, step, first_example], dtype=torch.int64, device="cpu")
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words


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


def _example_keys(key: DropoutKey, site: int, count: int, device) -> Tensor:
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


def keep_mask(
    key: DropoutKey, site: int, shape: Sequence[int], p: float, device: torch.device | str
) -> Tensor:
    """bool, True where an element of [B, ...] is kept.

    Elements 32 b + j and 32 b + 16 + j (j < 16) of an example take the low and high 16 bits of one
    32-bit word, lowbias32(16 b + j + key 0) with key 1 added halfway. Two vectors of any width up
    to 16 lanes come out of one hash that way without a shuffle. (Thanks to key 1 two examples
    whose key 0 lie close together still share nothing.)
    """
    if key.words is not None:
        raise RuntimeError("a dropout in plain PyTorch would repeat its mask")
    if torch.compiler.is_compiling():  # which cannot hash numbers that it does not know
        numbers = key.seed, key.step, key.first_example, site
        return torch.ops.sat.keep_mask(*numbers, shape, p, torch.device(device))
    count, size = shape[0], math.prod(shape[1:])
    keys = _example_keys(key, site, count, device)
    blocks = -(-size // (2 * LANES))
    word = torch.arange(blocks * LANES, dtype=torch.int32, device=device) + keys[:, :1]
    word ^= (word >> 16) & 0xFFFF
    word *= _MIX32[0]
    word ^= keys[:, 1:]
    word ^= (word >> 15) & 0x1FFFF
    word *= _signed(_MIX32[1], 32)
    word ^= (word >> 16) & 0xFFFF
    word = word.view(count, blocks, 1, LANES)
    threshold = dropout_threshold(p)
    keep = torch.cat([word & 0xFFFF, (word >> 16) & 0xFFFF], dim=2) >= threshold
    return keep.view(count, -1)[:, :size].reshape(shape)


_library = torch.library.Library("sat", "FRAGMENT")
_library.define(
    "keep_mask(SymInt seed, SymInt step, SymInt first_example, int site, SymInt[] shape, float p, "
    "Device device) -> Tensor"
)
_library.impl(
    "keep_mask",
    lambda seed, step, first_example, *rest: keep_mask(
        DropoutKey(seed, step, first_example), *rest
    ),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "sat::keep_mask",
    lambda *arguments: torch.empty(arguments[4], dtype=torch.bool, device=arguments[6]),
)
