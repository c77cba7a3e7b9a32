"""The byte encoding, its padding, and who becomes a development example."""

import collections
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import padded

from preprocess import routing
from preprocess.bytes_encoder import encode_bytes


@given(st.binary(max_size=70), st.integers(0, 64), st.integers(0, 16))
def test_encoding_and_padding(text, max_ids, extra):
    ids = encode_bytes(text, max_ids=max_ids, length=max_ids + extra)
    assert ids.dtype == np.int32
    assert tuple(ids.tolist()) == padded(text, max_ids, max_ids + extra)
    kept = ids[: min(len(text), max_ids)]
    assert bytes((kept - 1).astype(np.uint8)) == text[:max_ids], "the text can be read back"
    assert (kept != 0).all(), "padding never occurs inside a text"


@pytest.mark.parametrize("size", [0, 1, 3999, 4000, 4001, 13704])
def test_sizes_around_the_cut(size):
    text = bytes(1 + i % 255 for i in range(size))
    ids = encode_bytes(text, max_ids=4000, length=4096)
    assert tuple(ids.tolist()) == padded(text, 4000, 4096)
    assert np.count_nonzero(ids) == min(size, 4000)


def test_every_byte_has_its_id():
    ids = encode_bytes(bytes(range(256)), max_ids=256, length=300)
    assert ids[:256].tolist() == list(range(1, 257))


def test_a_cut_inside_a_character_keeps_its_first_bytes():
    text = b"a" * 3999 + "€".encode()
    ids = encode_bytes(text, max_ids=4000, length=4096)
    assert ids[3998:4001].tolist() == [ord("a") + 1, 0xE2 + 1, 0]


def test_lengths_that_cannot_be():
    with pytest.raises(ValueError, match="max_ids 5 does not fit the padded length 4"):
        encode_bytes(b"", max_ids=5, length=4)


@given(st.integers(1, 999), st.integers(0, 5), st.integers(0, 10**6))
def test_a_draw_is_exact_in_every_thousand(thousandths, seed, block):
    indices = range(block * 1000, block * 1000 + 1000)
    draws = [routing.drawn(i, thousandths / 1000, seed) for i in indices]
    assert sum(draws) == thousandths
    assert draws == [routing.drawn(i, thousandths / 1000, seed) for i in indices]


def test_draws_differ_between_seeds_and_blocks_and_stay_what_they_are():
    def chosen(seed, block):
        return [i for i in range(1000) if routing.drawn(1000 * block + i, 0.01, seed)]

    assert len({tuple(chosen(seed, block)) for seed in (0, 1) for block in (0, 1)}) == 4
    # the same development set for everybody: NumPy keeps the sequence of raw draws
    assert chosen(0, 0) == [11, 196, 269, 403, 600, 608, 657, 850, 855, 921]


def count(router, stream):
    found = collections.Counter()
    for split, label in stream:
        target = router.route(split, label)
        if target is not None:
            found[target, label] += 1
    return found


STREAM = [("train", 0)] * 3000 + [("train", 1)] * 1000 + [("test", 0)] * 40 + [("test", 1)] * 60


def test_all_stay_where_they_are_by_default():
    router = routing.Router(2)
    assert router.splits == ("train", "test")
    assert count(router, STREAM) == {
        ("train", 0): 3000,
        ("train", 1): 1000,
        ("test", 0): 40,
        ("test", 1): 60,
    }


@pytest.mark.parametrize("links", [True, False])
def test_dev_is_the_file_of_test(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for text in (b"first", b"second run"):
        with routing.open_splits(tmp_path, "task", routing.Router(2)) as writers:
            for split in ("train", "test"):
                ids = encode_bytes(text + split.encode(), max_ids=20, length=32)
                writers[split].add(input_ids_0=ids, label=np.int64(1))
        names = {path.name.split(".", 1)[1] for path in tmp_path.iterdir()}
        assert names == {"train.pickle", "dev.pickle", "test.pickle"}
        dev, test = (tmp_path / f"task.{split}.pickle" for split in ("dev", "test"))
        assert dev.read_bytes() == test.read_bytes()
        assert dev.samefile(test) == links


def test_dev_from_train_takes_from_train_alone():
    found = count(routing.Router(2, dev_from_train=0.25, seed=3), STREAM)
    assert found["train", 0] == 2250 and found["train", 1] == 750
    assert found["dev", 0] == 750 and found["dev", 1] == 250
    assert found["test", 0] == 40 and found["test", 1] == 60


@pytest.mark.parametrize("part", [None, 0.5])
def test_a_limit_is_balanced_in_every_split(part):
    router = routing.Router(2, limit=5, dev_from_train=part)
    found = count(router, STREAM)
    for split in router.splits:
        assert found[split, 0] == 3 and found[split, 1] == 2
    assert router.full("train") and router.full("test")


@pytest.mark.parametrize("text", ["0", "1", "-0.1", "0.0001", "nan", "x"])
def test_fractions_that_cannot_be(text):
    with pytest.raises((ValueError, routing.argparse.ArgumentTypeError)):
        routing.fraction(text)
