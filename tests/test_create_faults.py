"""Faults that are not one row's: of the environment, of a whole source, of a numbering; and the
other forms that people have data in."""

import bz2
import collections
import dataclasses
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import test_create_agnews as agnews
import test_create_cifar10 as cifar
import test_create_inaturalist as inaturalist
import test_create_pathfinder as pathfinder
import test_create_retrieval as retrieval
import test_create_text as text
from preparing import error_of, examples, lay_out, padded, prepare_tfds, run, tar

from preprocess import driver
from preprocess.tasks import image, nature, news, yelp
from preprocess.tasks import pathfinder as pathfinder_task
from preprocess.tasks import retrieval as retrieval_task
from preprocess.tasks import text as text_task

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/mem")
UNREADABLE = "/proc/self/mem"  # opens, and reading it is an input/output error


def old_set(folder: Path, task: str) -> dict[str, bytes]:
    """Pickles that must be there afterwards as they are."""
    lay_out(folder, {f"{task}.{split}.pickle": b"old" for split in ("train", "dev", "test")})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the environment's errors are not the data's ------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("task", "files", "name"),
    [
        (image.TASK, cifar.FILES, "train/cat/0003.png"),
        (
            nature.TASK,
            {"train/" + n: d for n, d in inaturalist.TRAIN.items()},
            "train/Aves/1/4.jpg",
        ),
        (text_task.TASK, text.REVIEWS, "train/pos/0_9.txt"),
    ],
)
def test_a_disk_that_cannot_be_read_is_never_skipped(tmp_path, capsys, task, files, name):
    lay_out(tmp_path / "in", files)
    (tmp_path / "in" / name).unlink(missing_ok=True)
    (tmp_path / "in" / name).symlink_to(UNREADABLE)
    before = old_set(tmp_path / "out", task.name)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(task, *options, "--on_error", "skip", "--force") == 2
    assert error_of(capsys) == f"error: {tmp_path}/in/{name}: Input/output error\n"
    assert content(tmp_path / "out") == before


def test_a_full_memory_is_not_a_broken_picture(tmp_path, capsys, monkeypatch):
    def full(image):
        raise MemoryError

    monkeypatch.setattr(image, "_decode", full)
    lay_out(tmp_path / "in", cifar.FILES)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out", "--workers", 1]
    assert run(image.TASK, *options, "--on_error", "skip") == 1
    assert error_of(capsys).startswith("error: the memory is full, nothing half-written is left")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, capsys, monkeypatch):
    lay_out(tmp_path / "in/train", inaturalist.TRAIN)
    lay_out(tmp_path / "in/val", inaturalist.VAL)
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith("train/Aves/1"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out", "--workers", 1]
    assert run(nature.TASK, *options, "--on_error", "skip") == 2
    assert error_of(capsys).endswith("train/Aves/1: Permission denied\n")


def test_linked_folders_are_read(tmp_path, capsys):
    lay_out(tmp_path / "in/train", inaturalist.TRAIN)
    lay_out(tmp_path / "in/val", inaturalist.VAL)
    shutil.move(tmp_path / "in/train/Aves", tmp_path / "birds")
    (tmp_path / "in/train/Aves").symlink_to(tmp_path / "birds")
    shutil.move(tmp_path / "birds/1", tmp_path / "species")
    (tmp_path / "birds/1").symlink_to(tmp_path / "species")
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(nature.TASK, *options) == 0
    found = examples(tmp_path / "out", "lra-nature", "train")
    assert found == inaturalist.expected(inaturalist.TRAIN)
    (tmp_path / "birds/again").symlink_to(tmp_path / "birds")
    assert run(nature.TASK, *options) == 2
    assert "is a link to a folder that it lies in" in error_of(capsys)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_an_archive_are_the_files_they_mean(tmp_path, capsys, kind):
    """Some archivers store equal files once, as hard links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in text.REVIEWS.items():
            member = tarfile.TarInfo("aclImdb/" + name)
            if name == "test/pos/1_10.txt":
                member.type = kind
                hard = kind == tarfile.LNKTYPE
                member.linkname = "aclImdb/test/neg/0_2.txt" if hard else "../neg/0_2.txt"
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (tmp_path / "a.tar.gz").write_bytes(buffer.getvalue())
    options = ["--source", tmp_path / "a.tar.gz", "--output_dir", tmp_path / "out"]
    assert run(text_task.TASK, *options) == 0
    found = examples(tmp_path / "out", "lra-text", "test")
    assert found[padded(text.REVIEWS["test/neg/0_2.txt"].strip(), 4000, 4096), 1] == 1
    assert found.total() == 3


# ---- duplicate and cut sources ------------------------------------------------------------------

COUNTS = {"train": 20, "test": 8}
SMALL = dataclasses.replace(text_task.TASK, counts=COUNTS)


def reviews(train: int = 20, test: int = 8) -> dict[str, bytes]:
    return {
        f"{split}/{name}/{i}_1.txt": f"{split} {name} {i}".encode()
        for split, count in (("train", train), ("test", test))
        for name in ("neg", "pos")
        for i in range(count // 2)
    }


ALMOST = {n: d for n, d in reviews().items() if n != "train/neg/3_1.txt"}
TWICE = {f"{top}{n}": d for n, d in reviews().items() for top in ("aclImdb/", "aclImdb/aclImdb/")}
LEAKED = reviews() | {f"test/pos/{i}_1.txt": b"train pos %d" % i for i in range(4)}
EMPTY = {f"train/neg/{i}_1.txt": b"" for i in range(3)}
WRONG = {
    "cut": (ALMOST, "lra-text has 19 / 8 examples, known are 20 / 8 (train, test): the source"),
    "holds itself": (TWICE, "has 40 / 16 examples, known are 20 / 8"),
    "larger": (reviews(22), "has 22 / 8 examples, known are 20 / 8"),
    "leaked": (LEAKED, "4 of 8 examples of test are in train too"),
    "many skipped": (reviews() | EMPTY, "3 of 28 examples had to be skipped"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_source_that_is_not_whole_is_refused_unless_allowed(tmp_path, capsys, kind):
    files, says = WRONG[kind]
    (tmp_path / "a.tar").write_bytes(tar(files, "w"))
    before = old_set(tmp_path / "out", "lra-text")
    options = ["--source", tmp_path / "a.tar", "--output_dir", tmp_path / "out"]
    options += ["--on_error", "skip"]
    assert run(SMALL, *options, whole=True) == 2
    err = error_of(capsys)
    assert says in err and "nothing is written (--allow_partial takes it as it is)" in err
    assert content(tmp_path / "out") == before
    partial = kind in ("cut", "holds itself", "larger")
    assert run(SMALL, *options, "--allow_partial") == (2 if partial else 0)
    if partial:  # a trial: that does not replace what may be whole
        assert "holds the whole set of lra-text" in error_of(capsys)
        assert run(SMALL, *options, "--allow_partial", "--force") == 0
    assert "warning: " in capsys.readouterr().out
    facts = json.loads((tmp_path / "out/lra-text.json").read_text())
    assert says in "".join(facts["warnings"]) and bool(facts["trial"]) == partial


def test_few_skipped_examples_are_no_reason_to_stop(tmp_path):
    task = dataclasses.replace(text_task.TASK, counts={"train": 300, "test": 8})
    lay_out(tmp_path / "in", reviews(300) | {"train/pos/7_1.txt": b" "})
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(task, *options, "--on_error", "skip", whole=True) == 0
    facts = json.loads((tmp_path / "out/lra-text.json").read_text())
    assert facts["skipped"] == {"the text is empty": 1} and facts["trial"] == ""


def test_a_class_that_never_comes_is_noticed(tmp_path, capsys):
    task = dataclasses.replace(news.TASK, counts={"train": 300, "test": 300})
    rows = agnews.csv_bytes([(i % 3 + 1, "t", f"{i}") for i in range(300)])
    other = agnews.csv_bytes([(i % 4 + 1, "t", f"x{i}") for i in range(300)])
    lay_out(tmp_path / "in", {"train.csv": rows, "test.csv": other})
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(task, *options, whole=True) == 2
    assert "train has no example of Sci/Tech" in error_of(capsys)


def test_a_picture_folder_inside_itself(tmp_path, capsys):
    files = cifar.FILES | {"copy/" + name: data for name, data in cifar.FILES.items()}
    lay_out(tmp_path / "in", files)
    assert run(image.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "a copy of the data set lies inside it" in error_of(capsys)


def test_a_pair_cut_off_inside_its_second_text(tmp_path, capsys):
    whole = b"0.0\ta\tb\tb'first'\tb'it''s whole'\r\n1.0\ta\tb\tb'first'\tb'second"
    files = retrieval.ROWS | {"new_aan_pairs.test.tsv": whole}
    lay_out(tmp_path / "in", files)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(retrieval_task.TASK, *options, "--on_error", "skip") == 2
    assert "test.tsv, line 2: the file ends inside a text: it is cut off" in error_of(capsys)
    lay_out(tmp_path / "in", {"new_aan_pairs.test.tsv": whole + b"'"})
    assert run(retrieval_task.TASK, *options) == 0


def test_a_missing_level_is_never_left_out_without_a_word(tmp_path, capsys):
    two = pathfinder._release("curv_baseline") | pathfinder._release("curv_contour_length_9")
    lay_out(tmp_path / "in", two)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out", "--workers", 1]
    assert run(pathfinder_task.TASK, *options, whole=True) == 2
    assert "does not have curv_contour_length_14 with imgs and metadata" in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))
    assert run(pathfinder_task.TASK, *options) == 0
    assert "curv_contour_length_14 with imgs and metadata: left out" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.pickle"))) == 6


@pytest.mark.parametrize("kind", ["retrieval", "pathfinder"])
def test_a_partly_unpacked_release_does_not_hide_the_archive(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(driver, "DATA", tmp_path)
    if kind == "retrieval":
        files, task = {"tsv_data/" + n: d for n, d in retrieval.ROWS.items()}, retrieval_task.TASK
        there = {"listops-1000/basic_train.tsv": b""}
    else:
        files, task, there = {}, pathfinder_task.TASK, {}
        for level in pathfinder.LEVELS:
            files |= pathfinder._release(level)
        there = dict(list(files.items())[:50])
        monkeypatch.setattr(pathfinder_task, "COUNT", 20)
    (tmp_path / "lra_release.gz").write_bytes(
        tar({"lra_release/" + n: d for n, d in files.items()})
    )
    lay_out(tmp_path / "lra_release", there)
    assert run(task, "--output_dir", tmp_path / "out", "--workers", 1) == 0
    out = capsys.readouterr().out
    assert "lra_release has not all of" in out and "reading " in out and "release.gz" in out
    lay_out(tmp_path / "lra_release", files)
    assert run(task, "--output_dir", tmp_path / "out", "--workers", 1) == 0
    assert f"reading {tmp_path}/lra_release\n" in capsys.readouterr().out


def test_what_is_not_needed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("_PATHFINDER_TFDS_PATH", "/some/place")
    lay_out(tmp_path, {**pathfinder._release(), "pathfinder_tfds/x": b"unpacked"})
    options = ["--output_dir", tmp_path / "out", "--workers", 1]
    assert run(pathfinder_task.TASK, "--source", tmp_path, *options) == 0
    out = capsys.readouterr().out
    assert "_PATHFINDER_TFDS_PATH (/some/place) is not needed" in out
    assert f"{tmp_path}/pathfinder_tfds is not needed" in out
    assert run(pathfinder_task.TASK, "--source", tmp_path / "pathfinder_tfds", *options) == 2
    assert "is not needed: give lra_release.gz" in error_of(capsys)


# ---- numberings ---------------------------------------------------------------------------------


def numbered(task, first: int, count: int, header: bytes = b"") -> bytes:
    """CSV rows of all classes in turn, numbered from `first`."""
    middle = b'"t",' if task is news.TASK else b""
    classes = len(task.classes)
    rows = (b'"%d",%b"text %d"\n' % (first + i % classes, middle, i) for i in range(count))
    return header + b"".join(rows)


@pytest.mark.parametrize("task", [news.TASK, yelp.TASK], ids=lambda task: task.name)
def test_classes_from_zero_are_recognised(tmp_path, task):
    found = []
    for first in (1, 0):
        files = {"train.csv": numbered(task, first, 40), "test.csv": numbered(task, first, 4)}
        lay_out(tmp_path / "in", files)
        options = ["--source", tmp_path / "in", "--output_dir", tmp_path / f"out{first}"]
        assert run(task, *options, "--on_error", "skip") == 0
        found.append([examples(tmp_path / f"out{first}", task.name, s) for s in ("train", "test")])
    assert found[0] == found[1] and found[0][0].total() == 40
    assert {label for _, label in found[0][0]} == set(range(len(task.classes)))


@pytest.mark.parametrize("task", [news.TASK, yelp.TASK], ids=lambda task: task.name)
def test_a_numbering_that_is_not_certain_stops(tmp_path, task, capsys):
    """The other numbering's class appears late, or in the other file."""
    late = numbered(task, 1, 1200) + numbered(task, 0, 2)
    other = {"train.csv": numbered(task, 1, 40), "test.csv": numbered(task, 0, 40)}
    for files in ({"train.csv": late, "test.csv": numbered(task, 1, 4)}, other):
        lay_out(tmp_path / "in", files)
        options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
        assert run(task, *options, "--on_error", "skip") == 2
        assert "which class is which is not certain" in error_of(capsys)
        assert not list((tmp_path / "out").glob("*"))


# ---- draws --------------------------------------------------------------------------------------


def test_dev_sets_of_one_seed_are_the_same_for_folder_archive_and_tfds(tmp_path):
    files = reviews(400, 20)
    lay_out(tmp_path / "folder", files)
    (tmp_path / "a.tar").write_bytes(tar(dict(reversed(files.items())), "w"))
    rows = {
        split: [
            {"text": data, "label": name.split("/")[1]}
            for name, data in files.items()
            if name.startswith(split)
        ]
        for split in ("train", "test")
    }
    prepare_tfds(
        tmp_path / "tfds", "imdb_reviews", {"text": "text", "label": ["neg", "pos"]}, rows
    )
    sources = ("--source", tmp_path / "folder"), ("--source", tmp_path / "a.tar")
    found = []
    for option, path in (*sources, ("--tfds_dir", tmp_path / "tfds")):
        out = tmp_path / f"out{len(found)}"
        options = ["--dev_from_train", 0.2, "--seed", 7, "--output_dir", out]
        assert run(text_task.TASK, option, path, *options) == 0
        found.append([examples(out, "lra-text", split) for split in ("train", "dev", "test")])
    assert found[0] == found[1] == found[2]
    train, dev, _ = found[0]
    assert 40 < dev.total() < 120 and train.total() + dev.total() == 400 and not train & dev


def test_iNaturalist_streams_from_its_archives(tmp_path):
    """train_val2018.tar.gz and the annotations' archives give what the unpacked folder gives."""
    files = inaturalist.with_json()
    lay_out(tmp_path / "folder", files)
    pictures = {n: d for n, d in files.items() if n.startswith("train_val2018")}
    packed = {"train_val2018.tar.gz": tar(dict(reversed(pictures.items())))}
    for name in ("train2018.json", "val2018.json"):
        packed[name + ".tar.gz"] = tar({name: files[name]})
    lay_out(tmp_path / "archives", packed)
    sources = ("folder", "archives", "archives/train_val2018.tar.gz")
    for number, source in enumerate(sources):
        options = ["--source", tmp_path / source, "--output_dir", tmp_path / str(number)]
        assert run(nature.TASK, *options, "--dev_from_train", 0.3) == 0
        for split in ("train", "dev", "test"):
            found = examples(tmp_path / str(number), "lra-nature", split)
            assert found == examples(tmp_path / "0", "lra-nature", split)
    # without annotations: a lone tree, from the archive as from the folder
    for number, source in enumerate(("folder/train_val2018", "lone.tar.gz")):
        (tmp_path / "lone.tar.gz").write_bytes(packed["train_val2018.tar.gz"])
        task = dataclasses.replace(nature.TASK, test_part=0.4)
        options = ["--source", tmp_path / source, "--output_dir", tmp_path / f"lone{number}"]
        assert run(task, *options) == 0
        for split in ("train", "test"):
            found = examples(tmp_path / f"lone{number}", "lra-nature", split)
            assert found == examples(tmp_path / "lone0", "lra-nature", split) != {}


# ---- other forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_other_compressions(tmp_path, pack, capsys):
    data = pack(tar({"aclImdb/" + n: d for n, d in text.REVIEWS.items()}, "w"))
    for name, cut in (("whole", len(data)), ("cut", len(data) // 2), ("end", len(data) - 9)):
        (tmp_path / name).write_bytes(data[:cut])
        options = ["--source", tmp_path / name, "--output_dir", tmp_path / "out"]
        assert run(text_task.TASK, *options) == (0 if name == "whole" else 2)
    assert capsys.readouterr().err.count("cut off, damaged or not a tar archive") == 2
    assert examples(tmp_path / "out", "lra-text", "train") == text.expected("train/")


def test_a_zip_of_reviews_and_of_csv_files(tmp_path):
    (tmp_path / "r.zip").write_bytes(
        cifar.zipped({"aclImdb/" + n: d for n, d in text.REVIEWS.items()})
    )
    options = ["--source", tmp_path / "r.zip", "--output_dir", tmp_path / "out"]
    assert run(text_task.TASK, *options) == 0
    assert examples(tmp_path / "out", "lra-text", "train") == text.expected("train/")
    (tmp_path / "n.zip").write_bytes(
        cifar.zipped({f"ag_news_csv/{n}": d for n, d in agnews.FILES.items()})
    )
    assert run(news.TASK, "--source", tmp_path / "n.zip", "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-news1", "train") == agnews.expected(agnews.ROWS)


HEADER = b"Class Index,Title,Description\r\n"


@pytest.mark.parametrize("kind", ["header", "mark", "mark and header", "gz", "other columns"])
def test_csv_files_with_header_byte_order_mark_or_packed(tmp_path, kind):
    mark = b"\xef\xbb\xbf" if "mark" in kind else b""
    start = mark + (HEADER if "header" in kind else b"")
    files = {name: start + data for name, data in agnews.FILES.items() if name.endswith(".csv")}
    if kind == "gz":
        files = {name + ".gz": gzip.compress(data) for name, data in files.items()}
    if kind == "other columns":
        rows = [(text, "more", "x", number - 1) for number, _, text in agnews.ROWS]
        data = b"Description,extra,id,label\n" + agnews.csv_bytes(rows)
        files = {"train.csv": data, "test.csv": data}
    lay_out(tmp_path / "in", files)
    assert run(news.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-news1", "train") == agnews.expected(agnews.ROWS)


def test_utf_16_is_named(tmp_path, capsys):
    lay_out(tmp_path / "in", {n: d.decode().encode("utf-16") for n, d in agnews.FILES.items()})
    assert run(news.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "is UTF-16: write it again as UTF-8" in error_of(capsys)


def parquet(path: Path, names: list[str], **columns) -> None:
    """As Hugging Face's datasets writes them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def test_parquet_texts(tmp_path, capsys):
    """In two shards; a missing shard, other class names and a damaged file are named."""
    rows = [(f"caf\u00e9 {i}", i % 2) for i in range(50)]
    names, folder = ["neg", "pos"], tmp_path / "in/plain_text"
    splits = {"train-00000-of-00002": rows[:30], "train-00001-of-00002": rows[30:]}
    splits |= {
        "test-00000-of-00001": [("x" + t, n) for t, n in rows],
        "unsupervised-00000-of-00001": rows,
    }
    for name, part in splits.items():
        texts, labels = zip(*part, strict=True)
        parquet(folder / f"{name}.parquet", names, text=list(texts), label=list(labels))
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(text_task.TASK, *options) == 0
    wanted = collections.Counter((padded(t.encode(), 4000, 4096), n) for t, n in rows)
    assert examples(tmp_path / "out", "lra-text", "train") == wanted
    harms = {
        "expected 2": lambda path: path.unlink(),
        "is cut off, damaged": lambda path: path.write_bytes(path.read_bytes()[:-50]),
        "numbers its label pos, neg": lambda path: parquet(
            path, ["pos", "neg"], text=["a"], label=[0]
        ),
        "has no column text": lambda path: parquet(path, names, review=["a"], label=[0]),
    }
    for says, harm in harms.items():
        shutil.rmtree(tmp_path / "harmed", ignore_errors=True)
        shutil.copytree(tmp_path / "in", tmp_path / "harmed")
        harm(tmp_path / "harmed/plain_text/train-00001-of-00002.parquet")
        assert run(text_task.TASK, "--source", tmp_path / "harmed", *options[2:], "--force") == 2
        assert says in error_of(capsys)


def test_parquet_pictures_and_news(tmp_path):
    for split, part in (("train", cifar.TRAIN), ("test", cifar.TEST)):
        parquet(
            tmp_path / f"in/{split}-00000-of-00001.parquet",
            list(image.CLASSES),
            img=[{"bytes": cifar.encoded(pixels), "path": None} for pixels, _ in part],
            label=[label for _, label in part],
        )
    assert run(image.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    train = [cifar.row(pixels, label) for pixels, label in cifar.TRAIN]
    assert cifar.in_order(tmp_path / "out", "train") == train[:135]
    assert cifar.in_order(tmp_path / "out", "dev") == train[135:]
    for split in ("train", "test"):
        parquet(tmp_path / f"news/{split}.parquet", list(news.CLASSES), text=["a"], label=[3])
    assert run(news.TASK, "--source", tmp_path / "news", "--output_dir", tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out/lra-news1.json").read_text())
    assert facts["about"] == ["title and description in one text"]


def test_shorter_texts(tmp_path):
    lay_out(tmp_path / "in", text.REVIEWS)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(text_task.TASK, *options, "--padded_length", 512) == 0
    found = examples(tmp_path / "out", "lra-text", "test")
    review = text.REVIEWS["test/neg/0_2.txt"].strip()
    assert (padded(review, 512, 512), 0) in found
    facts = json.loads((tmp_path / "out/lra-text.json").read_text())
    assert facts["trial"] == "--padded_length 512, not 4096"


# ---- TFDS ---------------------------------------------------------------------------------------


def test_configurations_of_one_tfds_name(tmp_path, shared_data):
    """subwords8k beside plain_text, as older tutorials leave it."""
    pytest.importorskip("tensorflow_datasets")
    shutil.unpack_archive(shared_data / "data/tfds_imdb_small.tar.gz", tmp_path)
    other = tmp_path / "imdb_reviews/subwords8k/2.0.0"
    lay_out(other, {"dataset_info.json": b'{"name": "imdb_reviews"}', "features.json": b"{}"})
    options = ["--tfds_dir", tmp_path, "--output_dir", tmp_path / "out"]
    assert run(text_task.TASK, *options) == 0
    assert examples(tmp_path / "out", "lra-text", "train").total() == 200


def test_a_user_without_a_home(tmp_path):
    """HOME unset and a user number that the system does not know, as in containers."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    )
    lay_out(tmp_path / "in", text.REVIEWS)
    command = [sys.executable, Path(driver.__file__).with_name("create_text.py")]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*map(str, command), "--no_download", "--output_dir", str(tmp_path / "out")],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: there is nothing to read")
    assert done.stderr.count("\n") == 1
