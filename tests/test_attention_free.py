"""experiments/attention_free.py: published patterns, rebuilt without data or attention."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "attention_free.py"
specification = importlib.util.spec_from_file_location("attention_free", SCRIPT)
attention_free = importlib.util.module_from_spec(specification)
specification.loader.exec_module(attention_free)

# last dense steps of test_results.csv count from 0
PUBLISHED = [(1, "lra-image", 158), (1001, "lra-image", 190), (1001, "lra-nature", 460)]


@pytest.mark.parametrize("seed, task, steps", PUBLISHED)
def test_published_patterns_need_no_attention(shared_data, seed, task, steps):
    path = shared_data / "reference" / f"seed-{seed}" / task / "learnable.model"
    for row in attention_free.compare(path, task, seed, steps):
        assert row["attention_free"] >= 0.95
        assert row["untrained"] < row["attention_free"]
        assert row["shift_rebuilt"] == pytest.approx(row["shift_found"], abs=4e-4)


def test_another_seed_or_length_rebuilds_something_else(shared_data):
    """The comparison can fail. Other seeds share a third of the blocks: every P P^T is large on
    its diagonal."""
    path = shared_data / "reference" / "seed-1" / "lra-image" / "learnable.model"
    other = attention_free.compare(path, "lra-image", 2, 158)
    assert max(row["attention_free"] for row in other) < 0.5
    shorter = attention_free.compare(path, "lra-image", 1, 80)
    assert min(row["shift_found"] - row["shift_rebuilt"] for row in shorter) > 0.02


def test_wrong_task_is_a_sentence(shared_data, capsys):
    path = shared_data / "reference" / "seed-1" / "lra-image" / "learnable.model"
    options = [str(path), "--task", "lra-text", "--random", "1", "--steps", "1"]
    assert attention_free.main(options) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
