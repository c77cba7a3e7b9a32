"""The criterion on sequences whose every number was computed by hand."""

import math

import pytest
import torch

from sparsity.criteria import Settled, Shifting
from sparsity.observe import Observation, frobenius_distance, skewness


def seen(mean_attention):
    """What a criterion is given, with this mean attention."""
    return Observation(torch.zeros(1, 1, 1), mean_attention=mean_attention)


def layer(*values):
    """One layer, one group, a 2 x 2 matrix."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 2, 2)


# 0, 0, 0, 4: mean 1, deviations -1, -1, -1, 3; variance 12/4 = 3; third moment 24/4 = 6; 6 / 3^1.5
# = 2/sqrt(3)
SKEW_ONE_HIGH = 2 / math.sqrt(3)


def test_skewness_by_hand():
    assert skewness(torch.tensor([0.0, 0.0, 0.0, 4.0])).item() == pytest.approx(SKEW_ONE_HIGH)
    assert skewness(torch.tensor([0.0, 4.0, 4.0, 4.0])).item() == pytest.approx(-SKEW_ONE_HIGH)
    assert skewness(torch.tensor([1.0, 2.0, 3.0, 4.0])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1 / 1024, 7.3])
def test_skewness_of_equal_values_is_undefined(value):
    assert math.isnan(skewness(torch.full((33, 33), value)).item())


def test_skewness_does_not_depend_on_chunks_or_scale():
    torch.manual_seed(0)
    values = torch.rand(3 * (1 << 20) + 17) ** 8
    wide = values.double()
    centred = wide - wide.mean()
    expected = (centred**3).mean() / (centred**2).mean() ** 1.5
    assert expected > 2  # peaked enough to mean something
    assert skewness(values).item() == pytest.approx(expected.item(), rel=1e-9)
    assert skewness(values * 1e-6).item() == pytest.approx(expected.item(), rel=1e-5)


def test_distance_by_hand():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 5.0, -1.0])
    assert frobenius_distance(a, b).item() == pytest.approx(5.0)


# Distances between successive matrices: step 2: 1, step 3: 1.01 (change 1 %), step 4: 2.02 (change
# 100 %)
SEQUENCE = [
    layer(0, 0, 0, 4.0),
    layer(0, 0, 0, 5.0),
    layer(0, 0, 0, 6.01),
    layer(0, 0, 0, 8.03),
]


def test_settled_fires_on_the_third_step_at_the_earliest():
    criterion = Settled(skewness=1.0, distance=1.3)
    first, second, third, fourth = (criterion.update(seen(matrix)) for matrix in SEQUENCE)
    assert (
        not first.ready
        and first.values["distance"] == [0.0]
        and first.values["change_percent"] == [None]
    )
    assert not second.ready and second.values["change_percent"] == [None]
    assert second.values["distance"][0] == pytest.approx(1.0)
    assert third.ready and third.values["change_percent"][0] == pytest.approx(1.0, rel=1e-3)
    assert third.values["skewness"][0] == pytest.approx(SKEW_ONE_HIGH)
    assert not fourth.ready and fourth.values["change_percent"][0] == pytest.approx(
        100.0, rel=1e-3
    )
    assert "change 100.00 % >= 1.3 %" in fourth.reason


def test_shifting_is_the_other_side():
    criterion = Shifting(skewness=1.0, distance=1.3)
    decisions = [criterion.update(seen(matrix)).ready for matrix in SEQUENCE]
    assert decisions == [False, False, False, True]


def test_skewness_holds_back_and_equality_is_enough():
    held = Settled(skewness=1.2, distance=1.3)
    decision = [held.update(seen(matrix)) for matrix in SEQUENCE[:3]][-1]
    assert not decision.ready and "layer 0 skewness 1.155 < 1.2" in decision.reason
    exact = Settled(skewness=decision.values["skewness"][0], distance=1.3)
    assert [exact.update(seen(matrix)) for matrix in SEQUENCE[:3]][-1].ready


def test_change_equal_to_the_threshold_is_not_settled():
    # distances 1 and 1.5: the change is 50 % exactly
    sequence = [layer(0, 0, 0, 4.0), layer(0, 0, 0, 5.0), layer(0, 0, 0, 6.5)]
    criterion = Settled(skewness=1.0, distance=50.0)
    assert not [criterion.update(seen(matrix)) for matrix in sequence][-1].ready
    above = Shifting(skewness=1.0, distance=50.0)
    assert not [above.update(seen(matrix)) for matrix in sequence][-1].ready


def test_zero_distance_holds_back():
    criterion = Settled(skewness=1.0, distance=1000.0)
    still = layer(0, 0, 0, 4.0)
    decisions = [criterion.update(seen(still)) for _ in range(4)]
    assert not any(decision.ready for decision in decisions)
    assert decisions[-1].values["distance"] == [0.0] and decisions[-1].values[
        "change_percent"
    ] == [None]
    assert "change undefined" in decisions[-1].reason


def test_zero_deviation_and_nan_hold_back():
    criterion = Settled(skewness=-10.0, distance=1e9)
    flat = [torch.full((1, 1, 2, 2), value) for value in (1.0, 2.0, 3.5, 5.5)]
    decisions = [criterion.update(seen(matrix)) for matrix in flat]
    assert not any(decision.ready for decision in decisions)
    assert (
        decisions[-1].values["skewness"] == [None] and "skewness undefined" in decisions[-1].reason
    )

    criterion = Settled(skewness=1.0, distance=1.3)
    broken = [*SEQUENCE[:2], layer(0, 0, float("nan"), 6.01)]
    decision = [criterion.update(seen(matrix)) for matrix in broken][-1]
    assert not decision.ready
    assert decision.values["skewness"] == [None] and decision.values["distance"] == [None]
    assert decision.values["change_percent"] == [None]


def test_one_layer_holds_all_back():
    moving = [layer(0, 0, 0, 4.0), layer(0, 0, 0, 5.0), layer(0, 0, 0, 6.01)]
    jumping = [layer(0, 0, 0, 4.0), layer(0, 0, 0, 5.0), layer(0, 0, 0, 9.0)]
    criterion = Settled(skewness=1.0, distance=1.3)
    pairs = [torch.cat(pair) for pair in zip(moving, jumping, strict=True)]
    decision = [criterion.update(seen(pair)) for pair in pairs][-1]
    assert not decision.ready
    assert decision.values["change_percent"][0] == pytest.approx(1.0, rel=1e-3)
    assert decision.values["change_percent"][1] == pytest.approx(300.0)
    assert decision.reason.startswith("layer 1 change") and "layer 0" not in decision.reason


def test_groups_are_stacked():
    # group 0: 0 0 0 4, group 1: 0 0 0 0; over all eight: mean .5, variance 14/8 = 1.75, third
    # moment (7 * -.125 + 42.875) / 8
    matrix = torch.cat([layer(0, 0, 0, 4.0), layer(0, 0, 0, 0.0)], dim=1)
    assert matrix.shape == (1, 2, 2, 2)
    decision = Settled(1.0, 1.3).update(seen(matrix))
    assert decision.values["skewness"][0] == pytest.approx((42.0 / 8) / 1.75**1.5)
    four = torch.cat([layer(0, 0, 0, value) for value in (4.0, 4.0, 4.0, 4.0)], dim=1)
    assert Settled(1.0, 1.3).update(seen(four)).values["skewness"][0] == pytest.approx(
        SKEW_ONE_HIGH
    )
    # four groups that each move by 1 are at distance 2
    criterion = Settled(1.0, 1.3)
    criterion.update(seen(four))
    assert criterion.update(seen(four + 0.5)).values["distance"][0] == pytest.approx(
        math.sqrt(16 * 0.25)
    )


def test_the_caller_may_reuse_its_buffer():
    criterion = Settled(skewness=1.0, distance=1.3)
    buffer = torch.empty(1, 1, 2, 2)
    decisions = []
    for matrix in SEQUENCE:
        buffer.copy_(matrix)
        decisions.append(criterion.update(seen(buffer)))
    assert [decision.ready for decision in decisions] == [False, False, True, False]


def test_a_restored_criterion_goes_on_where_it_stopped():
    whole = Settled(skewness=1.0, distance=1.3)
    expected = [whole.update(seen(matrix)) for matrix in SEQUENCE]
    for stop in range(1, 4):
        before = Settled(skewness=1.0, distance=1.3)
        for matrix in SEQUENCE[:stop]:
            before.update(seen(matrix))
        after = Settled(skewness=1.0, distance=1.3)
        after.load_state_dict(before.state_dict())
        assert [after.update(seen(matrix)) for matrix in SEQUENCE[stop:]] == expected[stop:]
        assert after.outlook() == whole.outlook()


def test_outlook_names_layer_share_and_chance():
    criterion = Settled(skewness=1.0, distance=1.3)
    assert criterion.outlook() == "no dense step yet"
    for matrix in SEQUENCE:
        criterion.update(seen(matrix))
    text = criterion.outlook()
    # skewness always holds; the change held on one step of four: 1 - .75^100 is all but certain
    assert (
        "layer 0" in text
        and "holds 100% of the time" in text
        and "(holds 25% of the time)" in text
    )
    assert "within 100 steps about 100%" in text


def test_wrong_arguments_are_refused():
    criterion = Settled(1.0, 1.0)
    with pytest.raises(ValueError, match=r"must be \[L, groups, N, N\]"):
        criterion.update(seen(torch.zeros(2, 2)))
    criterion.update(seen(torch.zeros(1, 1, 2, 2)))
    with pytest.raises(ValueError, match="changed its shape"):
        criterion.update(seen(torch.zeros(1, 1, 4, 4)))
