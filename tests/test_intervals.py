"""experiments/intervals.py against tabulated quantiles of Student's t."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import intervals

# two-sided, from the usual tables
TABLE = [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 11, 2.201)]
TABLE += [(0.99, 5, 4.032), (0.90, 30, 1.697), (0.95, 1000, 1.962)]


@pytest.mark.parametrize("confidence, freedom, value", TABLE)
def test_quantiles(confidence, freedom, value):
    assert intervals.t_quantile(confidence, freedom) == pytest.approx(value, abs=6e-4)
    assert intervals.t_tail(value, freedom) == pytest.approx((1 - confidence) / 2, rel=1e-3)


def test_mean_of():
    found = intervals.mean_of([1.0, 2.0, 3.0, 4.0])
    # sd sqrt(5/3), t 3.182 with 3 degrees of freedom, over sqrt(4)
    assert found.mean == 2.5 and found.count == 4
    assert found.deviation == pytest.approx(1.290994)
    assert found.half_width == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    assert intervals.mean_of([7.0]) == intervals.Mean(7.0, None, None, 1)
    with pytest.raises(ValueError):
        intervals.mean_of([])


def test_paired_takes_the_seeds_that_both_have():
    found = intervals.paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 1.5, 1: 2.7, 3: 0.0})
    assert found.mean == pytest.approx(0.6) and found.count == 2
    assert intervals.paired({0: 1.0}, {1: 1.0}) is None
