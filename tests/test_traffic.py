"""What a sparse training step on a GPU moves: the counter itself, and the goals."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import traffic


def test_counts_a_linear_layer():
    count = traffic.Count()
    x, weight = torch.zeros(6, 4), torch.zeros(3, 4)
    with traffic.Operators(count):
        (x @ weight.T).sum(0)
    sizes = {"aten.mm": 6 * 4 + 3 * 4 + 6 * 3, "aten.sum": 6 * 3 + 3}
    assert count.traffic == {name: 4 * size for name, size in sizes.items()}
    assert sum(count.launches.values()) == 2


def test_a_sparse_step_of_lra_image():
    """Plain PyTorch: 26 GB, 216 launches."""
    count = traffic.count_step("ours", "lra-image", 512, "cuda")
    assert 6e9 < sum(count.traffic.values()) < 7.5e9
    assert sum(count.launches.values()) <= 90
    assert dict(count.waits) == {"read of a tensor": 1}
