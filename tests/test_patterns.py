"""Which blocks are kept."""

import pytest
import torch

from sparsity import PATTERNS, Pattern, select_blocks
from sparsity.observe import Observation


def test_learned_takes_the_largest_scores():
    torch.manual_seed(0)
    pattern = torch.rand(2, 16, 8, dtype=torch.float64)
    scores = pattern @ pattern.transpose(1, 2)
    masks = select_blocks("learned", Observation(scores), 0.1)
    assert masks.shape == (2, 16, 16) and masks.dtype == torch.bool
    for layer in range(2):
        kept, dropped = scores[layer][masks[layer]], scores[layer][~masks[layer]]
        assert len(kept) == 25  # floor(.1 * 256)
        assert kept.min() >= dropped.max()


def test_learned_breaks_ties_by_the_lowest_flat_index():
    # a symmetric score has tied pairs; an odd number of kept blocks cuts one of them
    scores = torch.tensor([[[0.0, 3.0, 2.0], [3.0, 0.0, 1.0], [2.0, 1.0, 0.0]]])
    mask = select_blocks("learned", Observation(scores), 3 / 9)[0]
    assert mask.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    equal = select_blocks("learned", Observation(torch.zeros(1, 4, 4)), 0.5)[0]
    assert equal.flatten().tolist() == [True] * 8 + [False] * 8


def test_band_is_the_diagonal_then_its_neighbours():
    scores = torch.zeros(2, 4, 4)
    four = select_blocks("band", Observation(scores), 4 / 16)
    assert torch.equal(four[0], torch.eye(4, dtype=torch.bool)) and torch.equal(four[0], four[1])
    ten = select_blocks("band", Observation(scores), 10 / 16)[0]
    offsets = torch.arange(4)[None] - torch.arange(4)[:, None]
    assert torch.equal(ten, offsets.abs() <= 1)


def test_band_global_is_a_band_of_three_then_the_first_row_and_column():
    scores = torch.zeros(2, 6, 6)
    offsets = torch.arange(6)[None] - torch.arange(6)[:, None]
    band = offsets.abs() <= 1
    assert torch.equal(select_blocks("band_global", Observation(scores), 16 / 36)[1], band)
    wanted = band.clone()
    wanted[0], wanted[:, 0] = True, True
    assert wanted.sum() == 24
    assert torch.equal(select_blocks("band_global", Observation(scores), 24 / 36)[0], wanted)
    wider = select_blocks("band_global", Observation(scores), 30 / 36)[0]
    assert torch.equal(wider, wanted | (offsets.abs() <= 2))


def test_flood_fill_follows_paths_of_attention():
    """By hand: a path from the first row, one from the first column, and a large block that no
    path reaches, which comes last."""
    attention = torch.full((1, 6, 6), 0.01, dtype=torch.float64)
    paths = [(0, 3), (1, 4), (2, 4), (3, 5)], [(2, 0), (3, 1), (4, 2), (5, 2)]
    for weight, path in zip((0.5, 0.4), paths, strict=True):
        for place in path:
            attention[0][place] = weight
    attention[0, 0, 5] = 0.45  # no neighbour below or right of another block leads there
    attention[0, 1, 5] = 0.02
    observation = Observation(torch.zeros(1, 6, 6), pooled=attention)

    def kept(count):
        return select_blocks("flood_fill", observation, count / 36)[0]

    diagonal = {(i, i) for i in range(6)}
    first, second = map(set, paths)
    for count, wanted in ((10, diagonal | first), (14, diagonal | first | second)):
        assert {tuple(place) for place in kept(count).nonzero().tolist()} == wanted, count
    assert not kept(14)[0, 5] and kept(15)[0, 5]
    # fewer blocks than the diagonal has: its largest ones
    attention[0, 2, 2] = 0.3
    assert {tuple(place) for place in kept(1).nonzero().tolist()} == {(2, 2)}


def test_random_depends_on_seed_and_layer_only():
    observation = Observation(torch.zeros(2, 16, 16))
    one = select_blocks("random", observation, 0.25, 1)
    assert torch.equal(one, select_blocks("random", observation, 0.25, 1))
    other = select_blocks("random", observation, 0.25, 2)
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])


def observed(num_layers=3, num_blocks=10, seed=0):
    """Everything a pattern can look at, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_blocks, num_blocks)
    numbers = [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return Observation(
        numbers[0], pooled=numbers[1], initial_scores=numbers[2], given=numbers[0] > 0.7
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_keeps_the_same_number(name):
    for density, kept in ((0.01, 1), (0.05, 5), (0.1, 10), (0.25, 25), (0.999, 99), (1.0, 100)):
        if kept < PATTERNS[name].least(10):
            with pytest.raises(ValueError, match=r"needs 28 of 10\^2 blocks.* 0.2800, not"):
                select_blocks(name, observed(), density)
            continue
        masks = select_blocks(name, observed(), density)
        assert masks.dtype == torch.bool and masks.shape == (3, 10, 10)
        if not PATTERNS[name].own_count:
            assert masks.sum(dim=(1, 2)).tolist() == [kept] * 3


def test_all_and_given_have_a_count_of_their_own():
    assert select_blocks("all", observed(), 0.1).all()
    assert torch.equal(select_blocks("given", observed(), 0.1), observed().given)


def test_mass_keeps_what_holds_most_attention():
    observation = observed()
    masks = select_blocks("mass", observation, 0.2)
    for pooled, mask in zip(observation.pooled, masks, strict=True):
        assert pooled[mask].min() > pooled[~mask].max()
    # smoothed over steps where that is known; where it is not the scores decide nothing
    observation.smoothed = observation.pooled.flip(1)
    assert torch.equal(select_blocks("mass", observation, 0.2), masks.flip(1))
    untrained = select_blocks("untrained", observation, 0.2)
    assert observation.initial_scores[untrained].min() > 0.7


@pytest.mark.parametrize("name", ["mass_rows", "random_rows"])
@pytest.mark.parametrize(("kept", "share"), [(9, 0), (10, 1), (25, 2), (99, 9)])
def test_rows_get_equal_shares(name, kept, share):
    masks = select_blocks(name, observed(), kept / 100)
    rows = masks.sum(dim=2)
    assert rows.min() >= share and rows.sum(1).tolist() == [kept] * 3
    if share == 0:
        return
    # among what a row holds stand its `share` best; the rest went to the best blocks left
    pooled = observed().pooled
    if name == "mass_rows":
        own = torch.zeros_like(masks).scatter_(2, pooled.topk(share, dim=2).indices, True)
        assert (masks & own).sum() == own.sum()
        rest = pooled.masked_fill(own, -1)
        for layer in range(3):
            extra = masks[layer] & ~own[layer]
            if extra.any():
                assert rest[layer][extra].min() > rest[layer][~masks[layer]].max()
    else:
        assert not torch.equal(masks, select_blocks(name, observed(), kept / 100, 1))


@pytest.mark.parametrize(
    ("name", "scores", "density", "words"),
    [
        ("bigbird", torch.zeros(1, 4, 4), 0.5, "unknown pattern 'bigbird'; known: learned, ran"),
        ("learned", torch.zeros(1, 4, 4), 0.0, "density must lie in"),
        ("learned", torch.zeros(1, 4, 4), 0.001, "keeps none of 4"),
        ("learned", torch.zeros(4, 4), 0.5, r"must be \[L, nb, nb\]"),
        ("learned", torch.full((1, 4, 4), torch.nan), 0.5, "must be finite"),
    ],
)
def test_mistakes_are_named(name, scores, density, words):
    with pytest.raises(ValueError, match=words):
        select_blocks(name, Observation(scores), density)


def test_a_pattern_that_miscounts_is_refused(monkeypatch):
    nothing = Pattern(lambda seen, count, seed: seen.pattern_scores > 2, "none at all")
    monkeypatch.setitem(PATTERNS, "nothing", nothing)
    with pytest.raises(ValueError, match="keeps another number of blocks than 10"):
        select_blocks("nothing", observed(), 0.1)
