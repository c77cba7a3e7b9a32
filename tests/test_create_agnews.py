"""lra-news1 from AG News CSV files, with TFDS's own reader as the judge."""

import collections
import csv
import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import csv_examples, error_of, examples, lay_out, padded, prepare_tfds, run, tar

from preprocess.tasks.news import TASK

ROWS = [
    (1, "Title, with comma", 'World "news", here'),
    (2, 'Quoted "title"', "Sports <b>&lt;\\b</b> #39;s \\ text"),
    (3, "t", "B" * 999),
    (4, "t", "S" * 1000),
    (1, "t", "T" * 1001),
    (2, "t", "é" * 499 + "a€"),  # the cut at 1,000 falls into the last character
    (3, "t", "  spaces stay  "),
    (4, "t", ""),  # TFDS keeps an empty description, so do we
    (1, "", "no title"),
    (2, "t", "line\nbreak"),
]


def csv_bytes(rows, line_end="\n") -> bytes:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=line_end).writerows(rows)
    return text.getvalue().encode()


def expected(rows):
    return collections.Counter(
        (padded(text.encode(), 1000, 1024), number - 1) for number, _, text in rows
    )


FILES = {"train.csv": csv_bytes(ROWS), "test.csv": csv_bytes(ROWS[:4]), "classes.txt": b"World\n"}


def theirs(path):
    """Rows as TFDS reads them, or None if it cannot."""
    module = pytest.importorskip(
        "tensorflow_datasets.datasets.ag_news_subset.ag_news_subset_dataset_builder"
    )
    try:
        rows = list(module.Builder._generate_examples(None, path))
    except (ValueError, IndexError, csv.Error):
        return None
    if not all(0 <= row["label"] < 4 for _, row in rows):
        return None  # TFDS itself refuses these when it writes them
    return [(row["description"].encode(), row["label"]) for _, row in rows]


def ours(data: bytes):
    try:
        return csv_examples(TASK, data)
    except ValueError:
        return None


@pytest.mark.parametrize("form", ["folder", "folder above", "tar.gz", "flat tar"])
def test_every_form_of_the_source(tmp_path, form, capsys):
    if form.startswith("folder"):
        lay_out(tmp_path / "in" / ("ag_news_csv" if "above" in form else ""), FILES)
        source = tmp_path / "in"
    else:
        source = tmp_path / "ag.gz"
        folder = "" if form == "flat tar" else "ag_news_csv/"
        named = {folder + name: data for name, data in reversed(FILES.items())}
        source.write_bytes(tar(named, "w" if form == "flat tar" else "w:gz"))
    assert run(TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-news1", "train") == expected(ROWS)
    for split in ("dev", "test"):
        assert examples(tmp_path / "out", "lra-news1", split) == expected(ROWS[:4])
    out = capsys.readouterr().out
    assert "1 texts are empty and kept" in out and "not valid UTF-8" not in out


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_tfds_agrees(tmp_path, line_end):
    path = tmp_path / "train.csv"
    for data in (csv_bytes(ROWS, line_end), csv_bytes(ROWS, line_end).rstrip(), b"1,a,b\n2,c,d"):
        path.write_bytes(data)
        assert ours(data) == theirs(path) is not None


BAD = {
    "blank line": (b"", "blank line"),
    "two columns": (b'"1","title"', "2 columns, expected class, title and description"),
    "four columns": (b'"1","title","text","more"', "4 columns, expected"),
    "class 5": (b'"5","title","text"', "the class is '5', not 1, 2, 3 or 4"),
    "header": (
        b'"Class Index","Title","Description"',
        "the class is 'Class Index', not 1",
    ),
    "no class": (b'"","title","text"', "the class is '', not 1, 2, 3 or 4"),
    "endless field": (b'"1","title","' + b"x" * 200_000 + b'"', "not CSV (field larger than"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_stop_or_are_skipped_counted_and_named(tmp_path, capsys, kind):
    row, says = BAD[kind]
    data = FILES["test.csv"] + row + b'\n"1","t","last"\n'
    lay_out(tmp_path / "in", FILES | {"test.csv": data})
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(TASK, *options) == 2
    assert "test.csv, line 5: " + says in error_of(capsys)
    if kind != "four columns":  # TFDS overlooks the fourth
        assert theirs(tmp_path / "in/test.csv") is None
    assert not list((tmp_path / "out").glob("*"))
    assert run(TASK, *options, "--on_error", "skip") == 0
    found = examples(tmp_path / "out", "lra-news1", "test")
    assert found == expected(ROWS[:4]) + expected([(1, "t", "last")])
    assert "skipped 1: " + says in capsys.readouterr().out


def test_a_file_cut_off_inside_a_field_is_noticed(tmp_path, capsys):
    """TFDS would take the shortened text for a whole one."""
    lay_out(tmp_path / "in", FILES | {"test.csv": FILES["test.csv"][:-20]})
    assert run(TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "test.csv, line 4: the file ends inside a quoted field" in error_of(capsys)


def test_other_encodings_keep_their_bytes(tmp_path, capsys):
    data = '"1","t","caf\xe9"\n'.encode("latin-1")
    lay_out(tmp_path / "in", {"train.csv": data, "test.csv": data})
    assert run(TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    found = examples(tmp_path / "out", "lra-news1", "train")
    assert found == {(padded(b"caf\xe9", 1000, 1024), 0): 1}
    assert "2 texts are not valid UTF-8" in capsys.readouterr().out


def test_a_line_that_never_ends_does_not_fill_the_memory(tmp_path, capsys):
    lay_out(tmp_path / "in", {"train.csv": b"x" * (1 << 21), "test.csv": FILES["test.csv"]})
    assert run(TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "train.csv, line 1: longer than 1,048,576 bytes" in error_of(capsys)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "(it is empty)"),
        ({"train.csv": b""}, "has train.csv but no test.csv"),
        ({"train.csv": b"", "test.csv": b""}, "there is no example to write"),
    ],
)
def test_incomplete_folders(tmp_path, capsys, files, says):
    (tmp_path / "in").mkdir()
    lay_out(tmp_path / "in", files)
    assert run(TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert says in error_of(capsys)


def test_tfds(tmp_path):
    labels = ["World", "Sports", "Business", "Sci/Tech"]
    rows = [
        {"title": title, "description": text, "label": number - 1} for number, title, text in ROWS
    ]
    features = {"title": "text", "description": "text", "label": labels}
    prepare_tfds(tmp_path, "ag_news_subset", features, {"train": rows, "test": rows[:4]})
    assert run(TASK, "--tfds_dir", tmp_path, "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-news1", "train") == expected(ROWS)
    assert examples(tmp_path / "out", "lra-news1", "dev") == expected(ROWS[:4])


@given(st.lists(st.tuples(st.integers(1, 4), st.text(max_size=20), st.text(max_size=20))))
def test_what_a_csv_writer_writes_is_read_back(rows):
    # a carriage return is read as a line end, as TFDS does; NUL is no CSV before Python 3.11
    def kept(text):
        return "".join(c for c in text if c not in "\r\0" and not "\ud800" <= c <= "\udfff")

    rows = [(number, kept(title), kept(text)) for number, title, text in rows]
    assert ours(csv_bytes(rows)) == [(text.encode(), number - 1) for number, _, text in rows]


@pytest.mark.slow
def test_fuzzed_files(tmp_path):
    """10,000 files of valid UTF-8: whatever we read, TFDS reads the same; what we refuse and TFDS
    takes is cut off or has columns too many."""
    rng = random.Random(3)
    pieces = ['"1"', '"4","t","x"\n', ",", '"', '""', "\n", "\r\n", "\r", "a", "é", " ", "5", "\\"]
    pieces += ['"2","a, ""b""","c\\d"\n'] * 20
    path, both = tmp_path / "fuzzed.csv", 0
    for _ in range(10_000):
        data = "".join(rng.choices(pieces, k=rng.randrange(1, 8))).encode()
        path.write_bytes(data)
        wanted, found = theirs(path), ours(data)
        if found is None and wanted is not None:
            with pytest.raises(ValueError, match=r"ends inside a quoted field|[4-9] columns"):
                csv_examples(TASK, data)
        else:
            assert found == wanted, data
            both += wanted is not None
    assert both > 1000
