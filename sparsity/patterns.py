"""Scores to block masks: which blocks stay when training turns sparse."""

from __future__ import annotations

import torch
from torch import Tensor


def _learned(pattern_scores: Tensor, num_active: int, seed: int) -> Tensor:
    """The largest scores of each layer; ties go to the lowest flat index."""
    num_layers, num_blocks, _ = pattern_scores.shape
    flat = pattern_scores.detach().cpu().double().reshape(num_layers, -1)
    order = torch.argsort(flat, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask.scatter_(1, order[:, :num_active], True)
    return mask.reshape(num_layers, num_blocks, num_blocks)


def _random(pattern_scores: Tensor, num_active: int, seed: int) -> Tensor:
    """Uniformly drawn blocks, each layer its own."""
    num_layers, num_blocks, _ = pattern_scores.shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(num_layers, num_blocks * num_blocks, dtype=torch.bool)
    for layer in range(num_layers):
        mask[layer, torch.randperm(num_blocks**2, generator=generator)[:num_active]] = True
    return mask.reshape(num_layers, num_blocks, num_blocks)


def _band(pattern_scores: Tensor, num_active: int, seed: int) -> Tensor:
    """Blocks nearest to the diagonal, from the first row on where the last diagonal is not
    full."""
    num_layers, num_blocks, _ = pattern_scores.shape
    index = torch.arange(num_blocks)
    offset = index[None, :] - index[:, None]
    # distance first, the lower diagonal before the upper one, then the row
    rank = (offset.abs() * 2 + (offset > 0)).reshape(-1)
    order = torch.argsort(rank, stable=True)
    mask = torch.zeros(num_blocks * num_blocks, dtype=torch.bool)
    mask[order[:num_active]] = True
    return mask.reshape(1, num_blocks, num_blocks).repeat(num_layers, 1, 1)


PATTERNS = {"learned": _learned, "random": _random, "band": _band}


def select_blocks(
    name: str,
    *,
    pattern_scores: Tensor,
    mean_attention: Tensor | None = None,
    density: float,
    seed: int = 0,
) -> Tensor:
    """The blocks each layer keeps: floor(density * nb^2) of them, whatever the rule.

    Args:
        name: "learned" (largest pattern_scores, the reference's rule; the mask need not be
            symmetric when the cut divides a tied pair), "random" or "band".
        pattern_scores: [L, nb, nb], pattern @ pattern.T of each layer; float64 on the CPU decides.
        mean_attention: [L, groups, N, N] or None; for rules that look at the attention itself
        (none of the above). density: kept blocks / all blocks, in (0, 1].
        seed: for "random".

    Returns: bool [L, nb, nb] on the CPU.

    Raises:
        ValueError: unknown name, density out of range or too small to keep a block, scores that
        are not finite.
    """
    if name not in PATTERNS:
        raise ValueError(f"unknown pattern {name!r}; known: {', '.join(PATTERNS)}")
    if pattern_scores.dim() != 3 or pattern_scores.shape[1] != pattern_scores.shape[2]:
        raise ValueError(f"pattern_scores must be [L, nb, nb], not {list(pattern_scores.shape)}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    num_active = int(pattern_scores.shape[1] ** 2 * density)
    if num_active < 1:
        raise ValueError(f"density {density} keeps none of {pattern_scores.shape[1]}^2 blocks")
    if not torch.isfinite(pattern_scores).all():
        raise ValueError("pattern_scores must be finite")
    return PATTERNS[name](pattern_scores, num_active, seed)
