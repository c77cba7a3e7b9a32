"""lra-retrieval from the LRA release in every form, and the rows that stop the reference."""

import collections
import io
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import error_of, examples, lay_out, padded, run, tar

from preprocess import driver
from preprocess.tasks import retrieval as create_retrieval

LONG = b"b'" + b"word " * 2500 + b"'"  # 12,503 bytes: cut at 10,000, then at 4,000
ROWS = {
    "new_aan_pairs.train.tsv": (
        b"1.0\tP1\tP2\tb'one \\n'\tb'two'\n"
        b"0.0\tP1\tP3\t" + LONG + b"\t" + b"x" * 4000 + b"\n"
        b"1\t1\t2\t" + b"y" * 3999 + b"\t" + b"z" * 4001 + b"\r\n"
        b'0.7\ta"b\tc\t"quotes" are \'ordinary\'\t spaces stay \n'
        b"0\ta\tb\t" + bytes(i for i in range(1, 256) if i not in b"\t\n\r") + b"\t\xff\xfe\n"
        b"1e0\ta\tb\t" + b"u" * 3999 + "é".encode() + b"\tlast, no line end"
    ),
    "new_aan_pairs.eval.tsv": b"1.0\ta\tb\tc\td\r\n" * 3,
    "new_aan_pairs.test.tsv": b"0.0\ta\tb\tc\td\n",  # four rows or fewer crash the reference
}
LABELS = [1, 0, 1, 0, 0, 1]
OTHERS = {"new_aan_pairs.README": b"hello", "other.tsv": b"a\tb"}


def expected(name):
    """By the definition: split on line feeds and tabs, encode columns 3 and 4."""
    found: collections.Counter = collections.Counter()
    lines = [line.removesuffix(b"\r") for line in ROWS[name].split(b"\n") if line]
    for number, line in enumerate(lines):
        text1, text2 = line.split(b"\t")[3:]
        label = LABELS[number] if "train" in name else int("eval" in name)
        found[padded(text1, 4000, 4096), padded(text2, 4000, 4096), label] += 1
    return found


FORMS = {
    "release root": ("in/lra_release/lra_release/tsv_data/", "in"),
    "half way": ("in/lra_release/tsv_data/", "in/lra_release"),
    "task folder": ("in/tsv_data/", "in/tsv_data"),
    "any folder": ("in/mine/", "in/mine"),
}


@pytest.mark.parametrize("form", [*FORMS, "archive", "plain tar", "archive of the folder"])
def test_every_form_of_the_source(tmp_path, form):
    files = dict(reversed(list((ROWS | OTHERS).items())))  # an archive has its own order
    if form in FORMS:
        below, source = FORMS[form]
        lay_out(tmp_path, {below + name: data for name, data in files.items()})
        source = tmp_path / source
    else:
        below = "tsv_data/" if "folder" in form else "lra_release/lra_release/tsv_data/"
        source = tmp_path / "lra_release.gz"
        decoys = {"lra_release/lra_release/listops-1000/new_aan_pairs.train.tsv": b"no"}
        named = decoys | {below + name: data for name, data in files.items()}
        source.write_bytes(tar(named, "w" if form == "plain tar" else "w:gz"))
    assert run(create_retrieval.TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    for split, name in create_retrieval.FILES.items():
        assert examples(tmp_path / "out", "lra-retrieval", split) == expected(name)


BAD = {
    "blank line": (b"", "blank line"),
    "carriage return": (b"1.0\ta\tb\tc\rc\td", "a carriage return inside the line"),
    "two carriage returns": (b"1.0\ta\tb\tc\td\r\r", "a carriage return inside"),
    "four columns": (b"1.0\ta\tb\tc", "4 columns, expected 5"),
    "six columns": (b"1.0\ta\tb\tc\td\te", "6 columns, expected 5"),
    "empty text": (b"1.0\ta\tb\t\td", "column 4 is empty"),
    "empty id": (b"1.0\t\tb\tc\td", "column 2 is empty"),
    "empty label": (b"\ta\tb\tc\td", "column 1 is empty"),
    "word label": (b"label\ta\tb\tc\td", "the label is not 0 or 1"),
    "label 2": (b"2.0\ta\tb\tc\td", "the label is not 0 or 1"),
    "label nan": (b"nan\ta\tb\tc\td", "the label is not 0 or 1"),
    "label 1e999": (b"1e999\ta\tb\tc\td", "the label is not 0 or 1"),
    "label 1_0": (b"1_0\ta\tb\tc\td", "the label is not 0 or 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_stop_or_are_skipped_counted_and_named(tmp_path, capsys, kind):
    row, says = BAD[kind]
    files = dict(ROWS)
    files["new_aan_pairs.eval.tsv"] = ROWS["new_aan_pairs.eval.tsv"] + row + b"\n1\ta\tb\tc\td\n"
    lay_out(tmp_path / "in", files)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(create_retrieval.TASK, *options) == 2
    err = error_of(capsys)
    assert "new_aan_pairs.eval.tsv, line 4: " + says in err and "--on_error skip" in err
    assert not list((tmp_path / "out").glob("*"))
    assert run(create_retrieval.TASK, *options, "--on_error", "skip") == 0
    assert examples(tmp_path / "out", "lra-retrieval", "dev").total() == 4
    out = capsys.readouterr().out
    assert "skipped 1: " + says in out and "eval.tsv, line 4" in out


def test_limit_is_balanced(tmp_path):
    lines = [b"%d\ta\tb\t%d\td" % (i % 7 == 0, i) for i in range(100)]
    lay_out(tmp_path, dict.fromkeys(create_retrieval.FILES.values(), b"\n".join(lines)))
    options = ["--source", tmp_path, "--output_dir", tmp_path / "out", "--limit", "9"]
    assert run(create_retrieval.TASK, *options) == 0
    for split in create_retrieval.FILES:
        labels = [label for *_, label in examples(tmp_path / "out", "lra-retrieval", split)]
        assert sorted(labels) == [0] * 5 + [1] * 4


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds neither new_aan_pairs.train.tsv, "),
        ({"tsv_data/new_aan_pairs.train.tsv": b""}, "but no new_aan_pairs.eval.tsv"),
        (dict.fromkeys(create_retrieval.FILES.values(), b""), "there is no example to write"),
    ],
)
def test_incomplete_folders(tmp_path, capsys, files, says):
    lay_out(tmp_path, {"in/x": b"", **{"in/" + name: data for name, data in files.items()}})
    source, out = tmp_path / "in", tmp_path / "out"
    assert run(create_retrieval.TASK, "--source", source, "--output_dir", out) == 2
    assert says in error_of(capsys)


def test_an_empty_folder_is_called_empty(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    out = tmp_path / "out"
    assert run(create_retrieval.TASK, "--source", tmp_path / "in", "--output_dir", out) == 2
    assert "(it is empty)" in error_of(capsys)


@pytest.mark.parametrize("harm", ["cut", "no file", "no archive"])
def test_broken_archives(tmp_path, capsys, harm):
    source, out = tmp_path / "lra_release.gz", tmp_path / "out"
    rng = random.Random(0)  # not compressible: the cut falls into the last file
    big = b"0\ta\tb\tc\t" + bytes(rng.choice(b"abcdefgh") for _ in range(300_000)) + b"\n"
    data = tar(
        {"tsv_data/" + n: d for n, d in ROWS.items()} | {"tsv_data/" + n: big for n in ROWS}
    )
    if harm == "cut":
        source.write_bytes(data[: len(data) - 50_000])
    elif harm == "no archive":
        source.write_bytes(b"<html>")
    says = {"cut": "cut off", "no file": "does not exist", "no archive": "neither a folder nor"}
    assert run(create_retrieval.TASK, "--source", source, "--output_dir", out) == 2
    assert says[harm] in error_of(capsys)
    assert not list(out.glob("*"))


@pytest.mark.parametrize("place", ["lra_release/tsv_data", "lra_release/lra_release/tsv_data"])
def test_what_is_in_data_is_found(tmp_path, capsys, monkeypatch, place):
    monkeypatch.setattr(driver, "DATA", tmp_path)
    options = ["--no_download", "--output_dir", tmp_path / "out"]
    assert run(create_retrieval.TASK, *options) == 2
    assert "no lra_release, no lra_release.gz" in error_of(capsys)
    lay_out(tmp_path / place, ROWS)
    assert run(create_retrieval.TASK, *options) == 0
    assert examples(tmp_path / "out", "lra-retrieval", "dev") == expected("new_aan_pairs.eval.tsv")


def float32(text: str) -> float:
    """Rounded once more through C, not through NumPy."""
    return struct.unpack("<f", struct.pack("<f", float(text)))[0]


@given(st.from_regex(r"[+-]?[0-9]{1,4}(\.[0-9]{0,12})?(e[+-]?[0-9])?", fullmatch=True))
def test_labels_are_cut_to_integers(text):
    value = int(float32(text))
    assert create_retrieval.parse_label(text.encode()) == (value if value in (0, 1) else None)


def test_a_label_is_rounded_to_float32_first():
    assert create_retrieval.parse_label(b"0.99999999") == 1  # nearest float32: 1
    assert create_retrieval.parse_label(b"0.9999999") == 0


def tensorflow_rows(path):
    """How the reference reads it: a list of (label, text1, text2), or None if it stops."""
    tf = pytest.importorskip("tensorflow")
    columns = ["label", "id1", "id2", "text1", "text2"]
    data = tf.data.experimental.make_csv_dataset(
        str(path),
        1,
        column_names=columns,
        column_defaults=[tf.float32, *[tf.string] * 4],
        field_delim="\t",
        use_quote_delim=False,
        header=False,
        shuffle=False,
        num_epochs=1,
    )
    try:
        return [
            (
                int(tf.cast(row["label"], tf.int32).numpy()[0]),
                row["text1"].numpy()[0],
                row["text2"].numpy()[0],
            )
            for row in data
        ]
    except tf.errors.InvalidArgumentError:
        return None


def our_rows(data: bytes):
    try:
        rows = create_retrieval.read_rows(io.BytesIO(data), "file", driver.Skips())
        return [(label, *texts) for _, texts, label in rows]
    except ValueError:
        return None


def test_tensorflow_agrees_on_every_row_above(tmp_path):
    """Same rows from the same bytes, and a stop at the same bad rows."""
    path = tmp_path / "file.tsv"
    for data in ROWS.values():
        path.write_bytes(data)
        assert our_rows(data) == tensorflow_rows(path) is not None
    for kind, (row, _) in BAD.items():
        data = b"1.0\ta\tb\tc\td\n" + row + b"\n1.0\ta\tb\tc\td\n"
        path.write_bytes(data)
        assert our_rows(data) is None, kind
        if not kind.startswith("label"):  # the reference takes any number as a label
            assert tensorflow_rows(path) is None, kind


@pytest.mark.slow
def test_fuzzed_rows():
    """10,000 files: every line is either read as split on tabs, or counted as skipped."""
    rng = random.Random(7)
    pieces = [b"1.0", b"0", b"\t", b"\t", b"\t", b"\t", b"\n", b"\r\n", b"\r", b"a", b"\xff", b"'"]
    pieces += [b"\0", b"\xe2\x82\xac", b" ", b'"', b"1.0\ta\tb\tc\td", b"0.0\tx\ty\tz\tw\n"]
    read = skipped = 0
    for _ in range(10_000):
        data = b"".join(rng.choices(pieces, k=rng.randrange(40)))
        if rng.random() < 0.3:
            data += rng.randbytes(rng.randrange(30))
        skips = driver.Skips("skip")
        rows = list(create_retrieval.read_rows(io.BytesIO(data), "file", skips))
        lines = data.split(b"\n")
        num_lines = len(lines) - (lines[-1] == b"")
        assert len(rows) + skips.counts.total() == num_lines
        for _, (text1, text2), label in rows:
            assert label in (0, 1) and text1 and text2
            assert b"\t" + text1 + b"\t" + text2 in data
        read, skipped = read + len(rows), skipped + skips.counts.total()
    assert read > 3000 and skipped > 5000
