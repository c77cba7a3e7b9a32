"""preprocess/create_planted.py: what the planted set promises, and that nothing else gives the
label away."""

import collections
import pickle

import numpy as np
import pytest
import torch
from preparing import run

from preprocess import planted
from preprocess.tasks import planted as create_planted

MARKERS = range(planted.MARKER, planted.MARKER + 8)


def make(folder, *options) -> int:
    return run(create_planted.TASK, "--output_dir", folder, *options, whole=True)


@pytest.fixture(scope="module")
def drawn():
    pairs = planted.planted_pairs(0)
    return pairs, *planted.draw_examples(pairs, 4000, planted.Random(0, 9, 0), most_marked=4)


def test_conditions_of_the_pairs():
    for seed in range(50):
        pairs = [tuple(pair) for pair in planted.planted_pairs(seed).tolist()]
        assert len(set(pairs)) == 51
        rows = [row for row, _ in pairs]
        columns = {c: [r for r, other in pairs if other == c] for _, c in pairs}
        assert sorted(map(len, columns.values())) == [5, 5, 5, 5, 5, 5, 6, 15]
        assert all(1 <= rows.count(row) <= 2 for row in range(32))
        assert not any((c, r) in pairs for r, c in pairs)  # the diagonal among them
        reach = sorted(max(abs(r - c) for r in rs) for c, rs in columns.items())
        closest = [min(abs(r - c) for r in rs) for c, rs in columns.items()]
        assert reach[1] <= 3 and sorted(closest)[2] >= 8
    assert not np.array_equal(planted.planted_pairs(0), planted.planted_pairs(1))


@pytest.mark.parametrize("most", [None, 4])
def test_the_marked_rows_lead_to_the_label(most):
    """What an ideal reader does, said slowly: a marker names a column, the column's value is the
    label; the columns that nobody asks for never show it."""
    pairs = planted.planted_pairs(0)
    ids, labels = planted.draw_examples(pairs, 500, planted.Random(0, 9, 0), most_marked=most)
    times_marked = collections.Counter()
    columns = list(dict.fromkeys(pairs[:, 1].tolist()))
    for row_ids, label in zip(ids, labels, strict=True):
        blocks = row_ids.reshape(32, 16).tolist()
        values = []
        for block in blocks:
            shown = {token for token in block if token <= 4}
            assert len(shown) == 1 and sum(token <= 4 for token in block) == 6
            values.append(shown.pop() - 1)
        asked = {t - planted.MARKER for block in blocks for t in block if t in MARKERS}
        assert len(asked) == 2
        for place, column in enumerate(columns):
            assert (values[column] == label) == (place in asked)
            marked = [r for r, block in enumerate(blocks) if planted.MARKER + place in block]
            needing = [r for r, c in pairs.tolist() if c == column]
            times_marked.update((row, column) for row in marked)
            if most is None or place not in asked:
                assert marked == (needing if place in asked else [])
            else:
                assert len(marked) == 4 and set(marked) <= set(needing)
    # an asked column (of two in eight) marks four of its 5 or 15 rows, each equally often
    hub = [times_marked[pair] for pair in map(tuple, pairs[:15].tolist())]
    last = [times_marked[pair] for pair in map(tuple, pairs[-5:].tolist())]
    share = [1, 1] if most is None else [4 / 15, 4 / 5]
    assert np.allclose(hub, 125 * share[0], atol=20) and np.allclose(last, 125 * share[1], atol=35)


def test_easy_examples_show_the_label_more_often():
    pairs = planted.planted_pairs(0)
    ids, labels = planted.draw_examples(pairs, 4000, planted.Random(0, 9, 1), easy_share=1.0)
    blocks = ids.reshape(-1, 32, 16)
    values = np.where(blocks <= 4, blocks, 0).max(axis=2) - 1
    shares = (values == labels[:, None]).mean(axis=0)
    columns = np.unique(pairs[:, 1])
    others = np.setdiff1d(np.arange(32), columns)
    # asked in 2 of 8 examples, else with probability 0.4; other blocks 0.5
    assert np.allclose(shares[columns], 0.25 + 0.75 * 0.4, atol=0.04)
    assert np.allclose(shares[others], 0.5, atol=0.04)


def regression_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Test accuracy of a linear classifier fitted to three quarters of the examples."""
    cut = len(labels) * 3 // 4
    x, y = torch.from_numpy(features).float(), torch.from_numpy(labels)
    x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-6)
    layer = torch.nn.Linear(x.shape[1], 4)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(layer(x[:cut]), y[:cut])
        value = value + 1e-2 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((layer(x[cut:]).argmax(1) == y[cut:]).float().mean())


def test_no_bag_of_tokens_tells_the_label(drawn):
    """Chance is 0.25: neither counts of tokens over the sequence nor values by block say it."""
    _, ids, labels = drawn
    counts = np.stack([(ids == token).sum(axis=1) for token in range(1, 21)], axis=1)
    assert regression_accuracy(counts, labels) < 0.32
    by_block = np.stack(
        [(ids.reshape(-1, 32, 16) == value).sum(axis=2) for value in range(1, 5)], axis=2
    )
    assert regression_accuracy(by_block.reshape(len(ids), -1), labels) < 0.32
    # and the check could fail: with the asked columns named, the same regression reads the label
    pairs = planted.planted_pairs(0)
    columns = list(dict.fromkeys(pairs[:, 1].tolist()))
    asked = np.stack([(ids == marker).any(axis=1) for marker in MARKERS], axis=1)
    told = (by_block[:, columns] * asked[:, :, None]).sum(axis=1)
    assert regression_accuracy(told, labels) > 0.99


def test_same_seed_same_bytes_and_the_mask_beside_them(tmp_path):
    for name in ("a", "b"):
        assert make(tmp_path / name, "--limit", 30) == 0
    assert make(tmp_path / "c", "--limit", 30, "--seed", 1) == 0
    first, second, other = (
        (tmp_path / name / "planted.train.pickle").read_bytes() for name in ("a", "b", "c")
    )
    assert first == second != other
    items = pickle.loads(first)
    assert len(items) == 30 and items[0]["input_ids_0"].shape == (512,)
    assert items[0]["input_ids_0"].dtype == np.int32
    mask = np.load(tmp_path / "a" / "planted.blocks.npy")
    assert mask.dtype == bool and mask.shape == (32, 32) and mask.sum() == 51
    most = []  # blocks with a marker, in an example of each split
    for split in ("train", "dev", "test"):
        items = pickle.loads((tmp_path / "a" / f"planted.{split}.pickle").read_bytes())
        blocks = np.stack([item["input_ids_0"] for item in items]).reshape(30, 32, 16)
        most.append(np.isin(blocks, MARKERS).any(axis=2).sum(axis=1).max())
    assert most[0] > 15 and most[1] <= 8 and most[2] <= 8


def test_negative_seed(tmp_path, capsys):
    assert make(tmp_path, "--seed", -1) == 2
    assert f"argument --seed: -1 is not between 0 and {2**64 - 1}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
