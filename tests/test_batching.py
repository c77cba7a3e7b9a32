"""Cutting the global batch: every example once, no micro-batch across statistics groups it does
not hold whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.batching import plan_chunks


@given(
    batch=st.integers(1, 70),
    groups=st.integers(1, 9),
    micro=st.integers(1, 80),
    processes=st.integers(1, 5),
)
def test_chunks_cover_the_batch_and_respect_groups(batch, groups, micro, processes):
    groups = min(groups, batch)
    bounds = [batch * group // groups for group in range(groups + 1)]
    seen = []
    weights = [0.0] * groups
    for rank in range(processes):
        begin, end = batch * rank // processes, batch * (rank + 1) // processes
        for chunk in plan_chunks(batch, groups, micro, begin, end):
            assert begin <= chunk.begin < chunk.end <= end
            assert chunk.end - chunk.begin <= micro
            seen += range(chunk.begin, chunk.end)
            first, last = chunk.first_group, chunk.first_group + chunk.num_groups
            assert bounds[first] <= chunk.begin and chunk.end <= bounds[last]
            if chunk.num_groups > 1:
                assert (chunk.begin, chunk.end) == (bounds[first], bounds[last])
                assert (chunk.end - chunk.begin) % chunk.num_groups == 0
            for group in range(first, last):
                weights[group] += chunk.group_weight
    assert seen == list(range(batch))
    assert weights == pytest.approx([1.0] * groups)


def test_whole_groups_go_together_when_they_fit():
    assert [(c.begin, c.end, c.num_groups) for c in plan_chunks(512, 4, 512)] == [(0, 512, 4)]
    assert [(c.begin, c.end, c.num_groups) for c in plan_chunks(8, 4, 4)] == [(0, 4, 2), (4, 8, 2)]
    assert len(plan_chunks(512, 4, 16)) == 32


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="3 examples cannot be split into 4 groups"):
        plan_chunks(3, 4, 1)
    with pytest.raises(ValueError, match="at least one example"):
        plan_chunks(4, 4, 0)
