"""Which blocks stay when training turns sparse.

A pattern is one entry of PATTERNS, from which options, log, figures and tests take it. All but
those with a count of their own keep floor(density * nb^2) blocks a layer, so that patterns can be
compared. Torch is imported where it is needed: --help reads this file.

L layers, nb blocks a row. Formulas and sources: docs/method.md, "Patterns".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A way to choose blocks.

    choose: (observation, count, seed) -> bool [L, nb, nb] on the CPU with `count` blocks a layer.
    description: a few words for --help and the log.
    needs: "attention", it looks at the attention; "training", at scores that the dense phase
        trains; None, at neither: its choice never changes and needs no dense phase.
    own_count: keeps as many blocks as it likes, whatever the density.
    least: the blocks it needs, of nb a row.
    """

    choose: Callable[[Any, int, int], Tensor]
    description: str
    needs: str | None = None
    own_count: bool = False
    least: Callable[[int], int] = lambda num_blocks: 1


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each layer's [nb, nb]; ties go to the lowest flat index."""
    import torch

    flat = scores.detach().cpu().double().flatten(1)
    order = torch.argsort(flat, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True).view(scores.shape)


def _learned(observation: Any, count: int, seed: int) -> Tensor:
    return largest(observation.pattern_scores, count)


def _untrained(observation: Any, count: int, seed: int) -> Tensor:
    return largest(observation.initial_scores, count)


def _random(observation: Any, count: int, seed: int) -> Tensor:
    """Uniformly drawn blocks, each layer its own."""
    import torch

    num_layers, num_blocks, _ = observation.pattern_scores.shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(num_layers, num_blocks * num_blocks, dtype=torch.bool)
    for layer in range(num_layers):
        mask[layer, torch.randperm(num_blocks**2, generator=generator)[:count]] = True
    return mask.reshape(num_layers, num_blocks, num_blocks)


def _random_rows(observation: Any, count: int, seed: int) -> Tensor:
    """As mass_rows, of random numbers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = observation.pattern_scores.shape
    return _by_rows(torch.rand(shape, generator=generator, dtype=torch.float64), count)


def _band(observation: Any, count: int, seed: int) -> Tensor:
    """Blocks nearest to the diagonal, from the first row on where the last diagonal is not
    full."""
    import torch

    num_layers, num_blocks, _ = observation.pattern_scores.shape
    index = torch.arange(num_blocks)
    offset = index[None, :] - index[:, None]
    # distance first, the lower diagonal before the upper one
    rank = offset.abs() * 2 + (offset > 0)
    return largest(-rank.repeat(num_layers, 1, 1), count)


def _band_global(observation: Any, count: int, seed: int) -> Tensor:
    """The diagonal and its two neighbours, then the first row and column, then what is nearest to
    the diagonal."""
    import torch

    num_layers, num_blocks, _ = observation.pattern_scores.shape
    index = torch.arange(num_blocks)
    rank = (index[None, :] - index[:, None]).abs()
    rank[rank > 1] += num_blocks
    rank[0, 2:] = rank[2:, 0] = index[2:]
    return largest(-rank.repeat(num_layers, 1, 1), count)


def _flood_fill(observation: Any, count: int, seed: int) -> Tensor:
    """Paths of attention: from each block of the first row and column to whichever of its lower,
    right and lower right neighbours holds most, as long as that holds more than a threshold, which
    is the lowest that leaves at most `count`; the diagonal is kept too, and what is left of the
    count goes to the largest blocks."""
    import torch

    attention = _attention(observation).detach().cpu().double()
    masks = []
    for layer in attention:
        low, high = 0, layer.numel()  # thresholds by their rank among the blocks
        levels = torch.cat([layer.flatten().sort(descending=True).values, layer.new_tensor([-1])])
        while low < high:
            middle = (low + high + 1) // 2
            fits = int(_filled(layer, levels[middle].item()).sum()) <= count
            low, high = (middle, high) if fits else (low, middle - 1)
        filled = _filled(layer, levels[low].item())
        # the diagonal alone may be too much for the density
        masks.append(largest((layer + filled * (1 + layer.max()))[None], count))
    return torch.cat(masks)


def _filled(attention: Tensor, threshold: float) -> Tensor:
    import torch

    size = len(attention)
    values, filled = attention.tolist(), torch.eye(size, dtype=torch.bool)
    for start in range(size):
        for row, column in ((0, start), (start, 0)):
            while row + 1 < size and column + 1 < size:
                below, right, both = (row + 1, column), (row, column + 1), (row + 1, column + 1)
                row, column = max((both, below, right), key=lambda at: values[at[0]][at[1]])
                if values[row][column] <= threshold:
                    break
                filled[row, column] = True
    return filled


def _mass(observation: Any, count: int, seed: int) -> Tensor:
    return largest(_attention(observation), count)


def _mass_rows(observation: Any, count: int, seed: int) -> Tensor:
    return _by_rows(_attention(observation), count)


def _attention(observation: Any) -> Tensor:
    """Smoothed over steps where it is known, else of this step."""
    smoothed = getattr(observation, "smoothed", None)
    return observation.pooled if smoothed is None else smoothed


def _by_rows(scores: Tensor, count: int) -> Tensor:
    """The same number of largest scores in every row, rounded down; the rest by score."""
    num_blocks = scores.shape[1]
    share = count // num_blocks
    rows = largest(scores.reshape(-1, num_blocks), share).view(scores.shape)
    return rows | largest(
        scores.detach().cpu().double().masked_fill(rows, -float("inf")), count - share * num_blocks
    )


def _all(observation: Any, count: int, seed: int) -> Tensor:
    return observation.pattern_scores.detach().cpu() == observation.pattern_scores.detach().cpu()


def _given(observation: Any, count: int, seed: int) -> Tensor:
    return observation.given


PATTERNS = {
    "learned": Pattern(_learned, "the largest learned scores, the reference's", needs="training"),
    "random": Pattern(_random, "drawn at random"),
    "band": Pattern(_band, "nearest to the diagonal"),
    "mass": Pattern(_mass, "those that hold most attention", needs="attention"),
    "mass_rows": Pattern(
        _mass_rows, "those that hold most attention, equally many a row", needs="attention"
    ),
    "random_rows": Pattern(_random_rows, "drawn at random, equally many a row"),
    "untrained": Pattern(_untrained, "the largest scores before training"),
    "band_global": Pattern(
        _band_global,
        "beside the diagonal, and the first row and column",
        least=lambda num_blocks: 3 * num_blocks - 2,
    ),
    "flood_fill": Pattern(_flood_fill, "paths of most attention, after SPION", needs="attention"),
    "all": Pattern(_all, "every block, whatever the density", own_count=True),
    "given": Pattern(_given, "those of the file --masks", own_count=True),
}


def too_few(name: str, num_blocks: int, density: float) -> str:
    """The sentence about a pattern that the density is too low for."""
    least = PATTERNS[name].least(num_blocks)
    return (
        f"pattern {name} needs {least} of {num_blocks}^2 blocks, a density of at least "
        f"{least / num_blocks**2:.4f}, not {density:g}"
    )


def select_blocks(name: str, observation: Any, density: float, seed: int = 0) -> Tensor:
    """The blocks each layer keeps.

    Args:
        name: a key of PATTERNS.
        observation: an object with pattern_scores [L, nb, nb], pattern @ pattern.T of each layer
            (float64 on the CPU decides), and, for the patterns that look at it, pooled or
            smoothed [L, nb, nb]; sparsity.observe.Observation is one.
        density: kept blocks / all blocks, in (0, 1].
        seed: for the random ones.

    Returns: bool [L, nb, nb] on the CPU, True = kept: floor(density * nb^2) of each layer, unless
        the pattern has a count of its own.
    Raises:
        ValueError: unknown name, density out of range or too low for the pattern, scores that are
        not finite, or a pattern that keeps another number.
    """
    import torch

    if name not in PATTERNS:
        raise ValueError(f"unknown pattern {name!r}; known: {', '.join(PATTERNS)}")
    scores = observation.pattern_scores
    if scores.dim() != 3 or scores.shape[1] != scores.shape[2]:
        raise ValueError(f"pattern_scores must be [L, nb, nb], not {list(scores.shape)}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    count = int(scores.shape[1] ** 2 * density)
    if count < 1:
        raise ValueError(f"density {density} keeps none of {scores.shape[1]}^2 blocks")
    if count < PATTERNS[name].least(scores.shape[1]):
        raise ValueError(too_few(name, scores.shape[1], density))
    if not torch.isfinite(scores).all():
        raise ValueError("pattern_scores must be finite")
    pattern = PATTERNS[name]
    masks = pattern.choose(observation, count, seed)
    if masks.shape != scores.shape or masks.dtype != torch.bool:
        raise ValueError(f"pattern {name} gave {masks.dtype} {list(masks.shape)}, not masks")
    if not pattern.own_count and not bool((masks.flatten(1).sum(1) == count).all()):
        raise ValueError(f"pattern {name} keeps another number of blocks than {count}")
    return masks
