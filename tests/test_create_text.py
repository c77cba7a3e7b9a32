"""lra-text from aclImdb in every form that people have it in, and from TFDS."""

import collections
import io
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from preparing import error_of, examples, job, lay_out, padded, run, tar

from preprocess import driver, sources
from preprocess.tasks import text as create_text

ALL_BYTES = bytes(range(1, 256))
REVIEWS = {
    "train/neg/0_1.txt": b"bad",
    "train/neg/1_2.txt": ALL_BYTES,  # ends in no white space
    "train/neg/2_2.txt": b"b" * 3999,
    "train/pos/0_9.txt": b"\n good \xa0\n",  # \xa0 is no ASCII white space: it stays
    "train/pos/1_9.txt": b"a" * 3998 + "é€".encode(),  # cut inside é... and €
    "train/pos/2_9.txt": b"c" * 4001,
    "test/neg/0_2.txt": b"d" * 4000 + b" ",
    "test/pos/0_10.txt": b"<br /><br />It\xff\xfe is 'good' \"\\\"\r\nindeed",
    "test/pos/1_10.txt": b"same",
}
OTHERS = {
    "README": b"read me",
    "imdb.vocab": b"the\nand",
    "train/unsup/0_0.txt": b"no label",
    "train/labeledBow.feat": b"9 0:9",
    "train/urls_pos.txt": b"http://",
    "train/neg/._0_1.txt": b"what macOS adds",
    "train/neg/notes.md": b"no review",
}


def expected(split):
    found: collections.Counter = collections.Counter()
    for name, text in REVIEWS.items():
        if name.startswith(split):
            found[padded(text.strip(b" \t\n\r\x0b\x0c"), 4000, 4096), int("/pos/" in name)] += 1
    return found


@pytest.mark.parametrize("form", ["root", "folder", "above", "tar.gz", "tar", "dotted.tar.gz"])
def test_every_form_of_the_source(tmp_path, form, capsys):
    files = REVIEWS | OTHERS
    if form.endswith("gz") or form == "tar":
        prefix = {"tar": "", "dotted.tar.gz": "./aclImdb/"}.get(form, "aclImdb/")
        source = tmp_path / f"some.{form}"
        mode = "w" if form == "tar" else "w:gz"
        source.write_bytes(tar({prefix + name: data for name, data in files.items()}, mode))
    else:
        lay_out(tmp_path / "in" / ("" if form == "root" else "aclImdb"), files)
        source = tmp_path / "in" / ("aclImdb" if form == "folder" else "")
    assert run(create_text.TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    for split, origin in (("train", "train/"), ("dev", "test/"), ("test", "test/")):
        assert examples(tmp_path / "out", "lra-text", split) == expected(origin)
    out = capsys.readouterr().out
    assert out.count("dev and test will be the same examples") == 1
    assert "1 texts are not valid UTF-8" not in out
    assert "3 texts are not valid UTF-8" in out  # all bytes, \xa0 alone, \xff\xfe


def test_dev_from_train_and_limit(tmp_path, capsys):
    folders = ("train/neg", "train/pos", "test/neg", "test/pos")
    files = {f"{folder}/{i}_1.txt": b"%d" % i for folder in folders for i in range(50)}
    lay_out(tmp_path, files)
    options = ["--source", tmp_path, "--output_dir", tmp_path / "out"]
    assert run(create_text.TASK, *options, "--dev_from_train", "0.3") == 0
    train, dev, test = (
        examples(tmp_path / "out", "lra-text", s) for s in ("train", "dev", "test")
    )
    assert not train & dev and (train + dev) == test and 15 <= dev.total() <= 45
    assert "same examples" not in capsys.readouterr().out
    assert run(create_text.TASK, *options, "--dev_from_train", "0.3", "--limit", "7") == 0
    for split in ("train", "dev", "test"):
        found = examples(tmp_path / "out", "lra-text", split)
        assert sum(n for (_, label), n in found.items() if label == 0) == 4
        assert sum(n for (_, label), n in found.items() if label == 1) == 3


def broken(tmp_path, kind):
    """A source with one fault; returns it and what the message must say."""
    path = tmp_path / "source"
    good = {"aclImdb/" + name: data for name, data in (REVIEWS | OTHERS).items()}
    whole = tar(good)
    if kind == "missing":
        return path, "does not exist"
    if kind == "text file":
        path.write_bytes(b"hello")
        return path, "is neither a folder nor an archive"
    if kind == "empty file":
        path.write_bytes(b"")
        return path, "is neither a folder nor an archive"
    if kind == "empty folder":
        path.mkdir()
        return path, "no reviews in train/{neg,pos}"
    if kind == "no pos":
        lay_out(path, {n: d for n, d in REVIEWS.items() if "/pos/" not in n})
        return path, "no reviews in train/{pos}"
    if kind == "no test":
        path.write_bytes(tar({n: d for n, d in good.items() if "/test/" not in n}))
        return path, "no reviews in test/{neg,pos}"
    if kind == "cut gzip":
        path.write_bytes(whole[: len(whole) // 2])
        return path, "cut off, damaged or not a tar archive"
    if kind == "last bytes gone":
        path.write_bytes(whole[:-9])
        return path, "cut off, damaged"
    if kind == "cut tar":
        plain = tar(good, "w")
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            header = archive.getmember("aclImdb/README").offset
        path.write_bytes(plain[:header])  # at a border: tarfile itself would not mind
        return path, "no end-of-archive mark"
    if kind == "flipped bit":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :])
        return path, "cut off, damaged"
    if kind == "empty review":
        lay_out(path, REVIEWS | {"train/pos/0_9.txt": b" \n"})
        return path, "train/pos/0_9.txt: the text is empty (--on_error skip"
    raise AssertionError(kind)


KINDS = ["missing", "text file", "empty file", "empty folder", "no pos", "no test", "cut gzip"]
KINDS += ["last bytes gone", "cut tar", "flipped bit", "empty review"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_source_is_one_sentence_and_no_files(tmp_path, capsys, kind):
    source, says = broken(tmp_path, kind)
    assert run(create_text.TASK, "--source", source, "--output_dir", tmp_path / "out") == 2
    assert says in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))


def test_an_empty_review_can_be_skipped_and_is_counted(tmp_path, capsys):
    source, _ = broken(tmp_path, "empty review")
    options = ["--source", source, "--output_dir", tmp_path / "out", "--on_error", "skip"]
    assert run(create_text.TASK, *options) == 0
    assert examples(tmp_path / "out", "lra-text", "train").total() == 5
    out = capsys.readouterr().out
    assert "skipped 1: the text is empty" in out and "train/pos/0_9.txt" in out


def test_nothing_to_read_says_what_to_do_at_once(tmp_path):
    """As a user starts it: a folder without data, a home without TFDS; tensorflow not imported."""
    code = Path(driver.__file__).with_name("create_text.py")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", code, "--no_download"],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "import time:" in done.stderr and "tensorflow" not in done.stderr.split("error:")[0]
    message = done.stderr[done.stderr.index("error:") :]
    assert "without --no_download the data is fetched" in message and "--source" in message
    assert not list(tmp_path.iterdir())


def test_what_download_leaves_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "DATA", tmp_path / "data")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    lay_out(
        tmp_path, {"data/aclImdb_v1.tar.gz": tar({"aclImdb/" + n: d for n, d in REVIEWS.items()})}
    )
    assert run(create_text.TASK, "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-text", "train") == expected("train")


# ---- TFDS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_imdb(shared_data, tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    shutil.unpack_archive(shared_data / "data/tfds_imdb_small.tar.gz", folder)
    return folder


@pytest.mark.parametrize("below", ["", "imdb_reviews", "imdb_reviews/plain_text/1.0.0"])
def test_tfds(tfds_imdb, tmp_path, below):
    import tensorflow_datasets as tfds

    place = tfds_imdb / below
    assert run(create_text.TASK, "--tfds_dir", place, "--output_dir", tmp_path / "out") == 0
    for split, origin in (("train", "train"), ("dev", "test"), ("test", "test")):
        rows = tfds.as_numpy(tfds.load("imdb_reviews", data_dir=tfds_imdb, download=False)[origin])
        wanted: collections.Counter = collections.Counter()
        for row in rows:
            wanted[padded(row["text"], 4000, 4096), int(row["label"])] += 1
        assert wanted.total() == 200
        assert examples(tmp_path / "out", "lra-text", split) == wanted


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("gone", "no prepared imdb_reviews"),
        ("cut", "damaged or incomplete (train"),
        ("labels", "numbers its label pos, neg; expected neg, pos"),
        ("split", "no split test"),
        ("info", "damaged or incomplete"),
        ("count", "train holds 200 of 250 examples"),
        ("format", "is not in TFDS's tfrecord format"),
    ],
)
def test_a_broken_tfds_folder(tfds_imdb, tmp_path, capsys, harm, says):
    folder = tmp_path / "tfds"
    shutil.copytree(tfds_imdb, folder)
    version = folder / "imdb_reviews/plain_text/1.0.0"
    if harm == "gone":
        shutil.rmtree(folder / "imdb_reviews")
    elif harm == "cut":
        path = version / "imdb_reviews-train.tfrecord-00000-of-00001"
        path.write_bytes(path.read_bytes()[:100_000])
    elif harm == "labels":
        (version / "label.labels.txt").write_text("pos\nneg\n")
    elif harm == "split":
        info = version / "dataset_info.json"
        info.write_text(info.read_text().replace('"name": "test"', '"name": "other"'))
    elif harm == "count":
        info = version / "dataset_info.json"
        info.write_text(info.read_text().replace('"200"', '"250"', 1))
    elif harm == "format":
        info = version / "dataset_info.json"
        info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    elif harm == "info":
        (version / "dataset_info.json").write_text("{")
    assert run(create_text.TASK, "--tfds_dir", folder, "--output_dir", tmp_path / "out") == 2
    assert says in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))


def test_tfds_strips_as_we_do(tmp_path):
    """TFDS's own reader of the archive, on our awkward reviews."""
    module = pytest.importorskip(
        "tensorflow_datasets.datasets.imdb_reviews.imdb_reviews_dataset_builder"
    )
    (tmp_path / "a.tar.gz").write_bytes(tar({"aclImdb/" + n: d for n, d in REVIEWS.items()}))
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "a.tar.gz") as archive:
            members = [(m.name, archive.extractfile(m)) for m in archive if m.isreg()]
            rows = module.Builder._generate_examples(None, members, f"aclImdb/{split}")
            theirs = collections.Counter((row["text"], row["label"]) for _, row in rows)
        ours = collections.Counter(
            (text, ("neg", "pos")[label])
            for s, _, text, label in create_text.read_reviews(job(), tmp_path / "a.tar.gz")
            if s == split
        )
        assert ours == theirs and ours.total() == sum(n.startswith(split) for n in REVIEWS)


# ---- the real data, and fuzz --------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_reviews(shared_data, tmp_path):
    source = shared_data / "data/aclImdb.tar.gz"
    assert run(create_text.TASK, "--source", source, "--output_dir", tmp_path) == 0
    with tarfile.open(source) as archive:
        wanted = {"train": collections.Counter(), "test": collections.Counter()}
        for member in archive:
            split, _, name = member.name.removeprefix("aclImdb/").partition("/")
            if member.isreg() and name[:4] in ("neg/", "pos/"):
                text = archive.extractfile(member).read().strip()
                wanted[split][hash(padded(text, 4000, 4096)), int(name[:3] == "pos")] += 1
    for split, origin in (("train", "train"), ("dev", "test"), ("test", "test")):
        found = examples(tmp_path, "lra-text", split)
        assert found.total() == 25_000
        assert sum(n for (_, label), n in found.items() if label) == 12_500
        hashed: collections.Counter = collections.Counter()
        for (ids, label), n in found.items():
            hashed[hash(ids), label] += n
        assert hashed == wanted[origin]


@pytest.mark.slow
def test_fuzzed_archives(tmp_path):
    """10,000 damaged archives: each gives reviews or ValueError, never anything else."""
    rng = random.Random(5)
    good = {"aclImdb/" + name: data for name, data in REVIEWS.items()}
    bases = [tar(good, "w"), tar(good, "w:gz"), tar(good | {"x" * 150: b"long name"}, "w")]
    path, refused = tmp_path / "fuzzed", 0
    for _ in range(10_000):
        data = bytearray(rng.choice(bases))
        kind = rng.randrange(4)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            start = rng.randrange(len(data))
            del data[start : start + rng.choice((1, 511, 512, 513, 1024))]
        else:
            start = rng.randrange(len(data))
            data[start : start + 512] = rng.randbytes(512)
        path.write_bytes(data)
        try:
            if not sources.is_archive(path):
                raise ValueError
            for split, _, text, label in create_text.read_reviews(job(), path):
                assert split in ("train", "test") and label in (0, 1) and type(text) is bytes
        except ValueError:
            refused += 1
    assert refused > 5000
