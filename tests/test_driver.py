"""The byte encoding and its padding; what the driver does for every task."""

import argparse
import collections
import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import padded

from preprocess import driver, writer
from preprocess.encode import encode_bytes
from preprocess.tasks import text as text_task
from training.errors import UserError


@given(st.binary(max_size=70), st.integers(0, 64), st.integers(0, 16))
def test_encoding_and_padding(text, max_ids, extra):
    ids = encode_bytes(max_ids, max_ids + extra, text)
    assert ids.dtype == np.int32
    assert tuple(ids.tolist()) == padded(text, max_ids, max_ids + extra)
    kept = ids[: min(len(text), max_ids)]
    assert bytes((kept - 1).astype(np.uint8)) == text[:max_ids], "the text can be read back"
    assert (kept != 0).all(), "padding never occurs inside a text"


@pytest.mark.parametrize("size", [0, 1, 3999, 4000, 4001, 13704])
def test_sizes_around_the_cut(size):
    text = bytes(1 + i % 255 for i in range(size))
    ids = encode_bytes(4000, 4096, text)
    assert tuple(ids.tolist()) == padded(text, 4000, 4096)
    assert np.count_nonzero(ids) == min(size, 4000)


def test_every_byte_has_its_id():
    ids = encode_bytes(256, 300, bytes(range(256)))
    assert ids[:256].tolist() == list(range(1, 257))


def test_a_cut_inside_a_character_keeps_its_first_bytes():
    text = b"a" * 3999 + "€".encode()
    ids = encode_bytes(4000, 4096, text)
    assert ids[3998:4001].tolist() == [ord("a") + 1, 0xE2 + 1, 0]


@pytest.mark.parametrize("part", [0.01, 0.3])
def test_a_draw_takes_its_part_and_depends_on_seed_and_content_alone(part):
    texts = [b"review %d" % i for i in range(20_000)]
    chosen = {text for text in texts if driver.drawn("dev 0", part, text)}
    spread = (20_000 * part * (1 - part)) ** 0.5
    assert abs(len(chosen) - 20_000 * part) < 4 * spread
    assert chosen == {text for text in reversed(texts) if driver.drawn("dev 0", part, text)}
    other = {text for text in texts if driver.drawn("dev 1", part, text)}
    assert abs(len(chosen & other) - 20_000 * part**2) < 5 * spread


def test_draws_stay_what_they_are():
    chosen = [i for i in range(500) if driver.drawn("dev 0", 0.01, b"%d" % i)]
    assert chosen == [77, 339, 380, 447]


def silent(text: str) -> None:
    pass


def router_of(**options):
    defaults = {"limit": None, "seed": 0, "dev_from_train": None, "on_error": "stop"}
    options = defaults | options
    return driver.Job(text_task.TASK, argparse.Namespace(**options))


def count(router, stream):
    found = collections.Counter()
    for number, (split, label) in enumerate(stream):
        target = router.route(split, "", b"%d" % number)
        if router.limits[target].take(label):
            found[target, label] += 1
    return found


STREAM = [("train", 0)] * 3000 + [("train", 1)] * 1000 + [("test", 0)] * 40 + [("test", 1)] * 60


def test_all_stay_where_they_are_by_default():
    router = router_of()
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
        with writer.open_set(tmp_path, "task", ("train", "test"), notify=silent) as writers:
            for split in ("train", "test"):
                ids = encode_bytes(20, 32, text + split.encode())
                writers[split].add(input_ids_0=ids, label=np.int64(1))
        names = {path.name.split(".", 1)[1] for path in tmp_path.iterdir()}
        assert names == {"train.pickle", "dev.pickle", "test.pickle", "json"}
        dev, test = (tmp_path / f"task.{split}.pickle" for split in ("dev", "test"))
        assert dev.read_bytes() == test.read_bytes()
        assert dev.samefile(test) == links


def test_dev_from_train_takes_from_train_alone():
    found = count(router_of(dev_from_train=0.25, seed=3), STREAM)
    assert found["train", 0] + found["dev", 0] == 3000 and abs(found["dev", 0] - 750) < 100
    assert found["train", 1] + found["dev", 1] == 1000 and abs(found["dev", 1] - 250) < 60
    assert found["test", 0] == 40 and found["test", 1] == 60


@pytest.mark.parametrize("part", [None, 0.5])
def test_a_limit_is_balanced_in_every_split(part):
    router = router_of(limit=5, dev_from_train=part)
    found = count(router, STREAM)
    for split in router.splits:
        assert found[split, 0] == 3 and found[split, 1] == 2
    assert router.full("train") and router.full("test")


@pytest.mark.parametrize("text", ["0", "1", "-0.1", "0.0001", "nan", "x"])
def test_fractions_that_cannot_be(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        driver.fraction(text)


# ---- the frame ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, text",
    [
        (UserError("a sentence"), "a sentence"),
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "reading or writing: Input/output error"),
    ],
)
def test_errors_are_one_sentence(capsys, error, text):
    def run():
        raise error

    assert driver.guarded(run) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {text}") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_faults_of_our_own_keep_their_traceback():
    with pytest.raises(KeyError):
        driver.guarded(lambda: {}["x"])


def test_skips():
    skips, lines = driver.Skips("skip"), []
    for i in range(5):
        skips.skip(f"row {i}", "is empty")
    skips.skip("row 9", "has no label")
    skips.report(lines.append)
    assert lines == [
        "skipped 1: has no label (row 9)",
        "skipped 5: is empty (row 0, row 1, row 2 ...)",
    ]
    stop = driver.Skips("stop")
    stop.skip("a.png", "the picture file is empty", always=True)
    with pytest.raises(ValueError, match=r"row 3: is empty .*--on_error skip"):
        stop.skip("row 3", "is empty")


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 12))
def test_balanced_limit(labels, limit):
    chooser = driver.BalancedLimit(limit, 5)
    kept = [label for label in labels if chooser.take(label)]
    shares = [limit // 5 + (label < limit % 5) for label in range(5)]
    expected = [min(share, labels.count(label)) for label, share in enumerate(shares)]
    assert [kept.count(label) for label in range(5)] == expected
    assert chooser.full == (len(kept) == limit)


def test_no_limit_takes_all():
    chooser = driver.BalancedLimit(None, 2)
    assert all(chooser.take(label) for label in (0, 0, 0, 5)) and not chooser.full
