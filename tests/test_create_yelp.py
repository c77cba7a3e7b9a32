"""lra-yelp1 from the published CSV files, with TFDS's own reader as the judge."""

import collections
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import csv_examples, error_of, examples, lay_out, padded, prepare_tfds, run, tar

from preprocess.tasks.yelp import TASK

LINES = [
    b'"1","Bad.\\n\\nReally ""bad"", I say."',
    b'"2","Good, and cheap"',
    b'"2","' + b"a" * 999 + b'"',
    b'"2","' + b"b" * 1000 + b'"',
    b'"1","' + b"c" * 1001 + b'"',
    b'"1","' + b"d" * 999 + "é".encode() + b'"',  # cut inside the character
    b'"2"," white space goes \t"',
    '"2","\u3000also this one\u00a0"'.encode(),
    b'"1",""',
    b'"1","""quoted"""',
]


def expected(lines):
    """By the definition: between the quotes, stripped, class minus one."""
    found: collections.Counter = collections.Counter()
    for line in lines:
        text = line[5:-1].decode().strip().encode()
        found[padded(text, 1000, 1024), int(line[1:2]) - 1] += 1
    return found


def join(lines, line_end=b"\n"):
    return b"".join(line + line_end for line in lines)


FILES = {"train.csv": join(LINES), "test.csv": join(LINES[:3]), "readme.txt": b"hello"}


def theirs(path):
    """Lines as TFDS reads them, or None if it cannot."""
    module = pytest.importorskip("tensorflow_datasets.text.yelp_polarity")
    try:
        rows = list(module.YelpPolarityReviews._generate_examples(None, path))
    except (ValueError, IndexError):
        return None
    if not all(row["label"] in ("1", "2") for _, row in rows):
        return None  # TFDS itself refuses these when it writes them
    return [(row["text"].encode(), int(row["label"]) - 1) for _, row in rows]


def ours(data: bytes):
    try:
        return csv_examples(TASK, data)
    except ValueError:
        return None


@pytest.mark.parametrize("form", ["folder", "folder above", "tgz"])
def test_every_form_of_the_source(tmp_path, form):
    if form == "tgz":
        source = tmp_path / "yelp_review_polarity_csv.tgz"
        named = {"yelp_review_polarity_csv/" + name: data for name, data in FILES.items()}
        source.write_bytes(tar(named))
    else:
        lay_out(tmp_path / "in" / ("yelp_review_polarity_csv" if "above" in form else ""), FILES)
        source = tmp_path / "in"
    assert run(TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-yelp1", "train") == expected(LINES)
    for split in ("dev", "test"):
        assert examples(tmp_path / "out", "lra-yelp1", split) == expected(LINES[:3])


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_tfds_agrees(tmp_path, line_end):
    path = tmp_path / "train.csv"
    path.write_bytes(join(LINES, line_end))
    assert ours(path.read_bytes()) == theirs(path) is not None


def test_a_missing_last_line_end_costs_no_letter(tmp_path):
    """TFDS cuts two characters off every line, of a last line without an end too many."""
    assert ours(join(LINES).rstrip(b"\n")) == ours(join(LINES))


BAD = {
    "blank line": (b"", "blank line"),
    "class 3": (b'"3","text"', "the class is '3', not 1 or 2"),
    "no quotes": (b"1,text", "not of the form"),
    "one column": (b'"1"', "not of the form"),
    "three columns": (b'"1","text","more"', "not two columns"),
    "cut off": (b'"1","tex', "not of the form"),
    "carriage return": (b'"1","te\rxt"', "not of the form"),
    "header": (b'"label","text"', "not of the form"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_lines_stop_or_are_skipped_counted_and_named(tmp_path, capsys, kind):
    line, says = BAD[kind]
    lay_out(tmp_path / "in", FILES | {"test.csv": join([*LINES[:3], line, b'"1","last"'])})
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(TASK, *options) == 2
    assert "test.csv, line 4: " + says in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))
    assert run(TASK, *options, "--on_error", "skip") == 0
    found = examples(tmp_path / "out", "lra-yelp1", "test")
    assert found == expected([*LINES[:3], b'"1","last"'])
    number = 2 if kind == "carriage return" else 1  # it makes two lines
    assert f"skipped {number}: {says}" in capsys.readouterr().out


def test_other_encodings_keep_their_bytes(tmp_path, capsys):
    data = b'"1"," caf\xe9 "\n"2","\xff\xfe"\n'
    lay_out(tmp_path / "in", {"train.csv": data, "test.csv": data})
    assert run(TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    found = examples(tmp_path / "out", "lra-yelp1", "train")
    assert found == {
        (padded(b"caf\xe9", 1000, 1024), 0): 1,
        (padded(b"\xff\xfe", 1000, 1024), 1): 1,
    }
    assert "4 texts are not valid UTF-8" in capsys.readouterr().out


def test_tfds(tmp_path):
    """The rows that TFDS's own reader gives, through a prepared folder."""
    (tmp_path / "train.csv").write_bytes(FILES["train.csv"])
    rows = [{"text": text, "label": label} for text, label in theirs(tmp_path / "train.csv")]
    features = {"text": "text", "label": ["1", "2"]}
    splits = {"train": rows, "test": rows[:3]}
    prepare_tfds(tmp_path, "yelp_polarity_reviews", features, splits)
    assert run(TASK, "--tfds_dir", tmp_path, "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-yelp1", "train") == expected(LINES)
    assert examples(tmp_path / "out", "lra-yelp1", "dev") == expected(LINES[:3])


@given(st.lists(st.tuples(st.sampled_from("12"), st.text(max_size=30))))
def test_published_lines_are_read_back(rows):
    """Escaped as the data set's authors describe: quotes doubled, line feeds as backslash n."""

    def kept(text):
        return "".join(c for c in text if c not in "\r" and not "\ud800" <= c <= "\udfff")

    rows = [(number, kept(text)) for number, text in rows]
    escaped = [(n, t.replace('"', '""').replace("\n", "\\n")) for n, t in rows]
    data = "".join(f'"{number}","{text}"\n' for number, text in escaped).encode()
    assert ours(data) == [(text.strip().encode(), int(n) - 1) for n, text in escaped]


@pytest.mark.slow
def test_fuzzed_files(tmp_path):
    """10,000 files of valid UTF-8: whatever we read, TFDS reads the same."""
    rng = random.Random(4)
    pieces = ['"1","', '"2","', '"\n', '"\n', '""', '"', ",", "\n", "\r", "a", "é", " ", "\u3000"]
    path, read = tmp_path / "fuzzed.csv", 0
    for _ in range(10_000):
        middle = "".join(rng.choices(pieces, k=rng.randrange(6)))
        data = ('"1","first"\n' + f'"2","{middle}"\n' + '"2","last"\n').encode()
        if rng.random() < 0.2:
            data = "".join(rng.choices(pieces, k=rng.randrange(12))).encode() + b"\n"
        path.write_bytes(data)
        found = ours(data)
        if found is not None:
            assert found == theirs(path), data
            read += 1
    assert read > 1000
