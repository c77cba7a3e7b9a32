"""What `python -m training.data.inspect` says of small files whose every number is known."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from training.data import inspect


def write(path, items):
    with open(path, "wb") as file:
        pickle.dump(items, file, protocol=4)
    return path


def example(text, label, length=16):
    ids = np.zeros(length, np.int32)
    ids[: len(text)] = np.frombuffer(text, np.uint8).astype(np.int32) + 1
    return {"input_ids_0": ids, "label": np.int64(label)}


def test_a_text_task_by_hand(tmp_path, capsys):
    items = [example(b"good film", 1), example(b"bad", 0), example(b"bad", 0), example(b"", 1)]
    path = write(tmp_path / "lra-text.train.pickle", items)
    write(tmp_path / "lra-text.dev.pickle", [example(b"good film", 1), example(b"other", 1)])
    assert inspect.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("4 examples")
    assert "array length: 16" in lines
    assert any(line.startswith("tokens: 0 to 9,") and "1 without any" in line for line in lines)
    # 15 letters and spaces of 64 ids; d of "good" and "bad" twice is the most frequent letter
    assert any("76.6% are 0" in line for line in lines)
    assert "most frequent ids: 0 (76.6%), 101 (4.7%)" in "\n".join(lines)
    assert "labels: 0: 2 (50.0%), 1: 2 (50.0%)" in lines
    assert "duplicates within the file: 1" in lines
    assert "also in dev: 1 of 4" in lines and not any("test" in x for x in lines if "also" in x)
    assert "label 1: good film" in lines and "label 0: bad" in lines


def test_dev_that_is_test_is_said(tmp_path, capsys):
    items = [example(b"one", 1), example(b"two", 0)]
    path = write(tmp_path / "lra-text.dev.pickle", items)
    write(tmp_path / "lra-text.test.pickle", items[::-1])
    assert inspect.main([str(path)]) == 0
    assert "also in test: 2 of 2 (dev and test are the same data)" in capsys.readouterr().out


def test_listops_is_shown_as_its_tokens(tmp_path, capsys):
    # the documented order of ids: see docs/data.md
    from preprocess.tasks import listops

    form_tokens = inspect.LISTOPS
    ids = np.array([form_tokens.index(t) + 1 for t in ("MAX", "2", "9")] + [0] * 5, np.int32)
    path = write(tmp_path / "lra-listops.test.pickle", [{"input_ids_0": ids, "label": 9}])
    assert inspect.main([str(path)]) == 0
    assert "label 9: MAX 2 9" in capsys.readouterr().out
    assert listops.evaluate("( ( ( [MAX 2 ) 9 ) ] )") == 9


def test_pictures_become_a_sheet(tmp_path, capsys):
    random = np.random.default_rng(0)
    items = [
        {"input_ids_0": random.integers(0, 256, 1024).astype(np.int32), "label": np.int64(i % 10)}
        for i in range(11)
    ]
    path = write(tmp_path / "lra-image.test.pickle", items)
    picture = tmp_path / "sheet.png"
    assert inspect.main([str(path), "--picture", str(picture), "--examples", "11"]) == 0
    pixels = np.asarray(Image.open(picture))
    # the first picture, enlarged three times, after a margin of six
    shown = pixels[6 : 6 + 96 : 3, 6 : 6 + 96 : 3]
    assert np.array_equal(shown, items[0]["input_ids_0"].reshape(32, 32))
    assert pixels.shape[0] > 2 * 96


def test_only_dev_and_test_are_called_the_same_data(tmp_path, capsys):
    """A pair that shares all examples with train, and a dev set that is a part of test."""
    one, two = example(b"one", 1), example(b"two", 0)
    for split, items in {"train": [one, two], "dev": [one, one], "test": [one, two]}.items():
        write(tmp_path / f"lra-text.{split}.pickle", items)
    for split in ("train", "dev", "test"):
        assert inspect.main([str(tmp_path / f"lra-text.{split}.pickle")]) == 0
    out = capsys.readouterr().out
    assert out.count("(all of them)") == 4 and "same data" not in out


def labelled(label, largest=1, length=5):
    ids = np.zeros(length, np.int64)
    ids[-1:] = largest
    return {"input_ids_0": ids, "label": label}


def test_labels_of_any_integer_type_and_no_ids(tmp_path, capsys):
    items = [labelled(label, 0) for label in (1, np.int8(1), np.uint64(1), np.array(1))]
    path = write(tmp_path / "lra-x.dev.pickle", [*items, labelled(1, length=0)])
    assert inspect.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "labels: 1: 5 (100.0%)" in out and "ids: 1 different, 0 to 0, 100.0% are 0" in out
    path = write(tmp_path / "lra-y.dev.pickle", [labelled(1, length=0)])
    assert inspect.main([str(path)]) == 0
    assert "ids: 0 different, 0.0% are 0" in capsys.readouterr().out


def test_a_picture_of_an_unknown_kind(tmp_path, capsys):
    path = write(tmp_path / "lra-image.dev.pickle", [labelled(1, length=4)])
    assert inspect.main([str(path), "--picture", str(tmp_path / "x.unknown")]) == 2
    assert "unknown file extension" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("lra-text.pickle", [], "is named <task>"),
        ("lra-text.dev.pickle", [{"label": 1}], "item 0 is no example"),
        (
            "lra-text.dev.pickle",
            [{"input_ids_0": np.array([-1], np.int32), "label": 1}],
            "input_ids_0 of item 0 has ids from -1 to -1, not from 0 to",
        ),
        ("lra-text.dev.pickle", [sys.exit], "sys"),
        (
            "lra-x.dev.pickle",
            [labelled(None)],
            "the label of item 0 is of type NoneType, not an integer",
        ),
        ("lra-x.dev.pickle", [labelled(True)], "is of type bool, not an integer"),
        ("lra-x.dev.pickle", [labelled(1.0)], "is of type float, not an integer"),
        (
            "lra-x.dev.pickle",
            [labelled(np.array([1, 2]))],
            "is of type array (2,), not an integer",
        ),
        ("lra-x.dev.pickle", [labelled(1, 1 << 40)], "has ids from 0 to 1,099,511,627,776, not"),
        ("lra-x.dev.pickle", [labelled(1, 1 << 31)], "has ids from 0 to 2,147,483,648, not"),
        ("lra-x.dev.pickle", [{"input_ids_0": [1, 2], "label": 1}], "is no row of ids"),
        ("lra-x.dev.pickle", [{"input_ids_0": [[1], []], "label": 1}], "is no row of ids"),
        ("lra-image.dev.pickle", [labelled(1)] * 2, "the first has 5 ids, and all need the same"),
        (
            "lra-image.dev.pickle",
            [labelled(1, length=4), labelled(1, length=9)],
            "the same square",
        ),
        ("lra-image.dev.pickle", [labelled(1, length=0)], "the same square"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, capsys, name, content, words):
    path = write(tmp_path / name, content)
    assert inspect.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_missing_file_is_named(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "lra-text.dev.pickle")]) == 2
    assert "lra-text.dev.pickle" in capsys.readouterr().err
