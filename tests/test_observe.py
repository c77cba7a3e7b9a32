"""Observations of attention, against float64 by hand, and how they are remembered."""

import math

import pytest
import torch

import sparsity
from sparsity import CRITERIA, select_blocks
from sparsity.observe import (
    WINDOW,
    Observation,
    Observer,
    describe_masks,
    row_mass,
    uniform_attention,
)

NB, BS = 8, 4
N = NB * BS


def blocks(probs, real=None):
    """Pooled attention over real query rows of p [B, H, N, N], examples weighing the same."""
    batch = len(probs)
    real = torch.ones(batch, N, dtype=torch.bool) if real is None else real
    share = real.double() / real.sum(1, keepdim=True).clamp(min=1) * N
    rows = probs.double().mean(1) * share[:, :, None]
    return rows.view(batch, NB, BS, NB, BS).mean((0, 2, 4))


def random_masks(num_layers=2, kept=13, seed=0):
    return select_blocks(
        "random", Observation(torch.zeros(num_layers, NB, NB)), kept / NB**2, seed
    )


def test_uniform_attention_gives_every_pattern_chance():
    pooled = blocks(torch.full((2, 1, N, N), 1 / N)).expand(2, -1, -1)
    observation = Observation(
        torch.rand(2, NB, NB), pooled=pooled, initial_scores=torch.rand(2, NB, NB)
    )
    for name, pattern in sparsity.PATTERNS.items():
        if not pattern.own_count:
            density = max(13, pattern.least(NB)) / NB**2
            masks = select_blocks(name, observation, density)
            values = describe_masks(pooled, masks, None)
            assert values["kept_mass"] == pytest.approx([density] * 2, rel=1e-12)
            assert values["best_mass"] == pytest.approx([density] * 2, rel=1e-12)
            assert values["lift"] == pytest.approx([1, 1], rel=1e-12)


def test_one_hot_column_is_found_by_mass_and_missed_by_scores():
    # every query gives 0.9 to the 4 keys of block 5 and the rest evenly to the others
    probs = torch.full((1, 2, N, N), 0.1 / (N - BS), dtype=torch.float64)
    probs[..., 5 * BS : 6 * BS] = 0.9 / BS
    pooled = blocks(probs)[None]
    scores = torch.zeros(1, NB, NB)
    scores[0, :, 2] = 1  # what learned is given says column 2
    observation = Observation(scores, pooled=pooled)
    mass = select_blocks("mass", observation, NB / NB**2)
    learned = select_blocks("learned", observation, NB / NB**2)
    assert mass[0, :, 5].all() and learned[0, :, 2].all()
    assert sparsity.kept_mass(pooled, mass).item() == pytest.approx(0.9)
    assert sparsity.kept_mass(pooled, learned).item() == pytest.approx(0.1 / 7)
    assert sparsity.best_mass(pooled, NB).item() == pytest.approx(0.9)
    assert sparsity.best_mass(pooled, NB + 1).item() == pytest.approx(0.9 + 0.1 / 56)
    assert describe_masks(pooled, learned, None)["lift"] == pytest.approx([0.8 / 7])


def test_padding_counts_neither_as_query_nor_as_key():
    """Attention uniform over real keys is chance, whatever blocks are kept."""
    real = torch.arange(N) < torch.tensor([[N], [10], [3], [0]])
    probs = real[:, None, None, :] / real.sum(1).clamp(min=1)[:, None, None, None]
    pooled = blocks(probs.expand(4, 2, N, N), real)
    assert torch.allclose(uniform_attention(real, BS), pooled, atol=1e-12)
    masks = random_masks()
    chance = sparsity.chance_mass(masks, real)
    assert torch.allclose(chance, sparsity.kept_mass(pooled.expand(2, -1, -1), masks))
    assert torch.equal(chance, sparsity.chance_mass(masks, uniform_attention(real, BS)))
    assert not torch.allclose(chance, sparsity.chance_mass(masks))  # the density
    # micro-batches add up
    parts = uniform_attention(real[:1], BS) / 4 + uniform_attention(real[1:], BS) * 3 / 4
    assert torch.allclose(parts, pooled)


def test_rows_without_a_block_count_as_empty_and_padded_rows_not():
    pooled = torch.rand(1, NB, NB, dtype=torch.float64)
    pooled[0, 7] = 0  # padding in every example
    masks = torch.zeros(1, NB, NB, dtype=torch.bool)
    masks[0, :3] = True
    rows = row_mass(pooled, masks)[0]
    assert rows[:3].tolist() == [1, 1, 1] and rows[3:7].tolist() == [0] * 4 and rows[7].isnan()
    values = describe_masks(pooled, masks, None)
    assert values["kept_mass_row_min"] == [0] and values["kept_mass_row_p10"] == [0]
    masks[0] = True
    masks[0, 0, 0] = False
    lost = (pooled[0, 0, 0] / pooled[0, 0].sum()).item()
    assert describe_masks(pooled, masks, None)["kept_mass_row_min"] == pytest.approx([1 - lost])


def test_agreement_and_capture_by_hand():
    now = torch.zeros(1, 4, 4, dtype=torch.bool)
    before = now.clone()
    now[0, 0, :3] = True
    before[0, 0, 1:4] = True
    assert sparsity.agreement(now, before).tolist() == [2 / 4]
    assert sparsity.agreement(now, now).tolist() == [1]
    pooled = torch.zeros(1, 4, 4)
    pooled[0, 0] = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert sparsity.capture(pooled, before).tolist() == pytest.approx([7 / 14])
    # two independent choices at density d agree by d / (2 - d)
    one, two = random_masks(400, 16, 1), random_masks(400, 16, 2)
    assert sparsity.agreement(one, two).mean() == pytest.approx(0.25 / 1.75, abs=0.01)


# ---- from step to step -------------------------------------------------------------


def moving(step):
    """Pooled attention whose heavy diagonal grows and then stays."""
    pooled = torch.full((2, NB, NB), 1.0, dtype=torch.float64)
    pooled[0] += torch.eye(NB) * min(step, 30)
    pooled += torch.rand(2, NB, NB, generator=torch.Generator().manual_seed(step)) / 100
    return Observation(torch.zeros(2, NB, NB), pooled=pooled, step=step)


def choose(observation):
    return select_blocks("mass", observation, 1 / NB)


def test_smoothed_is_the_mean_over_the_last_steps():
    observer, seen = Observer(choose, True), []
    for step in range(1, 50):
        observation = moving(step)
        observer.observe(observation)
        seen.append(observation)
        last = torch.stack([o.pooled.float().double() for o in seen[-WINDOW:]]).mean(0)
        assert torch.allclose(observation.smoothed, last, rtol=1e-12)
        now, values = choose(observation), observation.values
        if step > 1:
            earlier = choose(seen[-2])
            assert values["agreement_1"] == sparsity.agreement(now, earlier).tolist()
        if step > WINDOW:
            earlier = choose(seen[-1 - WINDOW])
            assert values["agreement"] == sparsity.agreement(now, earlier).tolist()
            assert values["capture"] == sparsity.capture(last, earlier).tolist()
        else:
            assert values["agreement"] == values["capture"] == [None, None]


def test_chance_is_smoothed_as_the_attention_is():
    """Batches that are padded differently: lift is that of the means, in float64 by hand, where
    one step's chance alone would make it jump."""
    random = torch.Generator().manual_seed(0)
    masks = random_masks(kept=NB)
    observer = Observer(lambda observation: masks, False)
    pooled, uniform, lifts, jumps = [], [], [], []
    for _ in range(45):
        real = torch.rand(2, NB * BS, generator=random) < torch.rand(1, generator=random)
        real[:, 0] = True
        uniform.append(uniform_attention(real, BS))
        # attention that is uniform but for a little more in the first block
        pooled.append(uniform[-1].expand(2, -1, -1).clone())
        pooled[-1][:, 0, 0] += 0.01
        observation = Observation(torch.zeros(2, NB, NB), pooled[-1], uniform=uniform[-1])
        observer.observe(observation)
        mean, chance = (torch.stack(x[-20:]).double().mean(0) for x in (pooled, uniform))
        kept = (mean * masks).sum((1, 2)) / mean.sum((1, 2))
        by_chance = (chance * masks).sum((1, 2)) / chance.sum()
        assert observation.values["chance_mass"] == pytest.approx(by_chance.tolist(), rel=1e-6)
        assert observation.values["lift"] == pytest.approx((kept / by_chance).tolist(), rel=1e-6)
        assert torch.allclose(observation.uniform, chance, rtol=1e-6)  # what the transition says
        lifts.append(max(observation.values["lift"]))
        of_step = (uniform[-1] * masks).sum((1, 2)) / uniform[-1].sum()
        jumps.append((kept / of_step).max().item())
    assert max(lifts[20:]) / min(lifts[20:]) < 1.2 < max(jumps[20:]) / min(jumps[20:])
    other = Observer(lambda observation: masks, False)
    other.load_state_dict(observer.state_dict())
    assert torch.equal(other.uniform, observer.uniform)


def test_what_concentrated_looks_at_does_not_depend_on_the_pattern():
    random = random_masks(kept=NB)
    observers = [Observer(choose, True), Observer(lambda observation: random, False)]
    for step in range(1, 60):
        seen = [moving(step), moving(step)]
        for observer, observation in zip(observers, seen, strict=True):
            observer.observe(observation)
        for name in ("best_mass", "concentration", "capture", "capture_before"):
            assert seen[0].values[name] == seen[1].values[name]
    assert None not in seen[0].values["capture_before"]
    assert seen[1].values["kept_mass"] < seen[0].values["kept_mass"]


@pytest.mark.parametrize(
    ("name", "option"), [("concentrated", {"lift": 1.5}), ("agreeing", {"agreement": 0.9})]
)
def test_criteria_of_the_attention_fire_in_the_layer_that_concentrates(name, option):
    observer, criterion = Observer(choose, True), CRITERIA[name](**option)
    for step in range(1, 200):
        observation = moving(step)
        observer.observe(observation)
        verdict = criterion.update(observation)
        if verdict.ready:
            break
    assert step < 150 and "layer" in verdict.reason
    name, threshold = next(iter(verdict.thresholds.items()))
    first, second = verdict.values[name]
    assert first >= threshold and not (second is not None and second >= threshold)
    if name == "concentration":
        # diagonal blocks hold (1 + s) of 8 + s a row; chance 1 / 8; best over chance at step t
        level = [min(t, 30) for t in range(1, step + 1)]
        smooth = [
            sum(level[max(0, t - 20) : t]) / len(level[max(0, t - 20) : t])
            for t in range(1, step + 1)
        ]
        ratio = [8 * (1 + s) / (8 + s) for s in smooth]
        assert first == pytest.approx(ratio[-1] / (sum(ratio[:20]) / 20), rel=0.01)
        assert verdict.values["capture"][0] >= 0.95 and verdict.values["capture_before"][0] >= 0.95


@pytest.mark.parametrize("stop", [1, 19, 20, 21, 45])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("concentrated", {"lift": 1.5}),
        ("agreeing", {"agreement": 0.9}),
        ("after", {"max_dense_steps": 50}),
    ],
)
def test_a_restored_observer_and_criterion_go_on_where_they_stopped(name, option, stop):
    def run(first, last, observer, criterion):
        out = []
        for step in range(first, last + 1):
            observation = moving(step)
            observer.observe(observation)
            out.append((observation.values, criterion.update(observation)))
        return out

    whole = run(1, 60, Observer(choose, True), CRITERIA[name](**option))
    parts = [(Observer(choose, True), CRITERIA[name](**option)) for _ in range(2)]
    run(1, stop, *parts[0])
    for old, new in zip(*parts, strict=True):
        new.load_state_dict(old.state_dict())
    assert run(stop + 1, 60, *parts[1]) == whole[stop:]


def test_agreeing_and_concentrated_say_what_holds_them_back():
    observer = Observer(choose, True)
    criteria = [CRITERIA["concentrated"](lift=2.0), CRITERIA["agreeing"](agreement=0.9)]
    for step in range(1, 25):
        observation = moving(step)
        observer.observe(observation)
        reasons = [criterion.update(observation).reason for criterion in criteria]
    assert (
        "layer 0 concentration" in reasons[0] and "layer 1 capture 20 steps before" in reasons[0]
    )
    assert "layer 1 agreement over 20 steps undefined" in reasons[1]
    for criterion in criteria:
        assert "chance to fire within 100 steps" in criterion.outlook()
        assert math.isfinite(len(criterion.describe()))


def test_after_is_a_budget():
    criterion = CRITERIA["after"](max_dense_steps=3)
    ready = [criterion.update(moving(step)).ready for step in range(1, 5)]
    assert ready == [False, False, True, True] and criterion.outlook() == "it fires at step 3"
