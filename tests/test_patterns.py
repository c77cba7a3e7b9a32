"""Which blocks are kept."""

import pytest
import torch

from sparsity import PATTERNS, select_blocks


def test_learned_takes_the_largest_scores():
    torch.manual_seed(0)
    pattern = torch.rand(2, 16, 8, dtype=torch.float64)
    scores = pattern @ pattern.transpose(1, 2)
    masks = select_blocks("learned", pattern_scores=scores, density=0.1)
    assert masks.shape == (2, 16, 16) and masks.dtype == torch.bool
    for layer in range(2):
        kept, dropped = scores[layer][masks[layer]], scores[layer][~masks[layer]]
        assert len(kept) == 25  # floor(.1 * 256)
        assert kept.min() >= dropped.max()


def test_learned_breaks_ties_by_the_lowest_flat_index():
    # a symmetric score has tied pairs; an odd number of kept blocks cuts one of them
    scores = torch.tensor([[[0.0, 3.0, 2.0], [3.0, 0.0, 1.0], [2.0, 1.0, 0.0]]])
    mask = select_blocks("learned", pattern_scores=scores, density=3 / 9)[0]
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    equal = select_blocks("learned", pattern_scores=torch.zeros(1, 4, 4), density=0.5)[0]
    assert equal.flatten().tolist() == [True] * 8 + [False] * 8


def test_band_is_the_diagonal_then_its_neighbours():
    scores = torch.zeros(2, 4, 4)
    four = select_blocks("band", pattern_scores=scores, density=4 / 16)
    assert torch.equal(four[0], torch.eye(4, dtype=torch.bool)) and torch.equal(four[0], four[1])
    ten = select_blocks("band", pattern_scores=scores, density=10 / 16)[0]
    offsets = torch.arange(4)[None] - torch.arange(4)[:, None]
    assert torch.equal(ten, offsets.abs() <= 1)


def test_random_depends_on_seed_and_layer_only():
    scores = torch.zeros(2, 16, 16)
    one = select_blocks("random", pattern_scores=scores, density=0.25, seed=1)
    assert torch.equal(one, select_blocks("random", pattern_scores=scores, density=0.25, seed=1))
    other = select_blocks("random", pattern_scores=scores, density=0.25, seed=2)
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_keeps_the_same_number(name):
    scores = torch.rand(3, 10, 10)
    for density, kept in ((0.01, 1), (0.05, 5), (0.999, 99), (1.0, 100)):
        masks = select_blocks(name, pattern_scores=scores, density=density)
        assert masks.sum(dim=(1, 2)).tolist() == [kept] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "bigbird"}, "unknown pattern 'bigbird'; known: learned, random, band"),
        ({"density": 0.0}, "density must lie in"),
        ({"density": 0.001}, "keeps none of 4"),
        ({"pattern_scores": torch.zeros(4, 4)}, r"must be \[L, nb, nb\]"),
        ({"pattern_scores": torch.full((1, 4, 4), torch.nan)}, "must be finite"),
    ],
)
def test_mistakes_are_named(change, words):
    arguments = {"name": "learned", "pattern_scores": torch.zeros(1, 4, 4), "density": 0.5}
    arguments.update(change)
    with pytest.raises(ValueError, match=words):
        select_blocks(arguments.pop("name"), **arguments)
