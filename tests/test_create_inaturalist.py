"""lra-nature from folders, annotations and TFDS, with the faults that picture collections have."""

import collections
import io
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparing import error_of, examples, lay_out, prepare_tfds, run

from preprocess import driver, encode, sources
from preprocess.tasks import nature


def picture(color, size=(64, 64), form="PNG", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(buffer, form)
    return buffer.getvalue()


def noise(seed, size=(90, 70), form="JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def flat(gray):
    """Ids of a picture of one gray value."""
    return (gray,) * 1024


def expected(files: dict[str, bytes]) -> collections.Counter:
    """By path: the supercategory in it is the label."""
    found: collections.Counter = collections.Counter()
    for name, data in files.items():
        (label,) = (nature.LABELS[part] for part in name.split("/") if part in nature.LABELS)
        found[tuple(nature.encode_picture(data).tolist()), label] += 1
    return found


TRAIN = {f"{name}/{i % 3}/{i}.jpg": noise(i) for i, name in enumerate(nature.SUPERCATEGORIES * 2)}
VAL = {f"{name}/x/{i}.jpg": noise(100 + i) for i, name in enumerate(nature.SUPERCATEGORIES)}


def annotations(files, prefix="train_val2018/"):
    """A competition json for these files; ids are not their positions, on purpose."""
    names = list(nature.SUPERCATEGORIES)
    images, entries = [], []
    for i, name in enumerate(files):
        (label,) = (names.index(part) for part in name.split("/") if part in nature.LABELS)
        images.append({"id": 1000 - i, "file_name": prefix + name, "license": 3, "width": 90})
        entries.append({"id": i, "image_id": 1000 - i, "category_id": 50 + label})
    categories = [
        {"id": 50 + i, "name": str(i), "supercategory": name} for i, name in enumerate(names)
    ]
    return {"images": images, "annotations": entries[::-1], "categories": categories, "info": {}}


def with_json(train=None, val=None):
    """The files of the competition's layout."""
    files = {"train_val2018/" + name: data for name, data in (TRAIN | VAL).items()}
    files["train2018.json"] = json.dumps(train or annotations(TRAIN)).encode()
    files["val2018.json"] = json.dumps(val or annotations(VAL)).encode()
    return files


@pytest.mark.parametrize("form", ["train and val", "train and test", "annotations"])
def test_every_form_with_a_split(tmp_path, form):
    if form == "annotations":
        lay_out(tmp_path / "in", with_json())
    else:
        lay_out(tmp_path / "in/train", TRAIN | {"Aves/readme.txt": b"hello"})
        lay_out(tmp_path / "in" / form.split()[-1], VAL)
    assert run(nature.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-nature", "train") == expected(TRAIN)
    for split in ("dev", "test"):
        assert examples(tmp_path / "out", "lra-nature", split) == expected(VAL)


def test_a_lone_tree_is_split_by_the_seed(tmp_path, capsys):
    colors = list(itertools.product(range(0, 256, 29), range(0, 256, 29), (0, 90, 180)))
    files = {f"Aves/x/{i}.png": picture(c, (2, 2)) for i, c in enumerate(colors)}
    lay_out(tmp_path / "in", files)
    found = {}
    for seed, workers in (("0", "1"), ("0", "2"), ("1", "1")):  # several chunks in flight
        options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out", "--seed", seed]
        assert run(nature.TASK, *options, "--workers", workers) == 0
        train, dev, test = (
            examples(tmp_path / "out", "lra-nature", split) for split in ("train", "dev", "test")
        )
        assert dev == test and train + test == expected(files)
        assert 1 <= test.total() <= 40
        assert found.setdefault(seed, test) == test
    assert found["0"] != found["1"]
    assert (
        "does not say which pictures are the test set: about 53 of every 1,000"
        in capsys.readouterr().out
    )


def test_the_result_does_not_depend_on_the_processes(tmp_path):
    lay_out(tmp_path / "in/train", TRAIN)
    lay_out(tmp_path / "in/val", VAL)
    for workers in ("1", "2", "3"):
        out = tmp_path / workers
        options = ["--source", tmp_path / "in", "--output_dir", out, "--workers", workers]
        assert run(nature.TASK, *options, "--dev_from_train", "0.4") == 0
    for split in ("train", "dev", "test"):
        name = f"lra-nature.{split}.pickle"
        assert len({(tmp_path / w / name).read_bytes() for w in ("1", "2", "3")}) == 1


def test_limit_is_balanced_over_the_supercategories(tmp_path):
    lay_out(tmp_path / "in/train", TRAIN)
    lay_out(tmp_path / "in/val", VAL)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out", "--limit", "15"]
    assert run(nature.TASK, *options) == 0
    labels = collections.Counter(
        label for _, label in examples(tmp_path / "out", "lra-nature", "train").elements()
    )
    assert labels == {label: 2 if label == 0 else 1 for label in range(14)}


# ---- one picture --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        picture((0, 255, 0), form="JPEG"),
        picture((0, 255, 0), mode="RGBA"),
        picture((0, 255, 0), mode="P"),
        picture((0, 255, 0), size=(1, 1)),
        picture((0, 255, 0), size=(5, 300)),
        picture((0, 255, 0), size=(2000, 1500), form="JPEG"),
    ],
)
def test_kinds_of_pictures(data):
    ids = nature.encode_picture(data)
    assert ids.dtype == np.int32 and ids.shape == (1024,)
    assert len(set(ids.tolist())) == 1 and abs(int(ids[0]) - 149) <= 1  # 0.587 * 255.5


def test_gray_and_cmyk_jpegs():
    for mode in ("L", "CMYK"):
        ids = nature.encode_picture(picture((200, 200, 200), form="JPEG", mode=mode))
        assert set(np.abs(ids - 200).tolist()) <= {0, 1}


def test_black_and_white():
    assert tuple(nature.encode_picture(picture((0, 0, 0))).tolist()) == flat(0)
    assert tuple(nature.encode_picture(picture((255, 255, 255))).tolist()) == flat(255)


def triangle(size: int) -> np.ndarray:
    """Antialiased bilinear weights [32, size], said again in float64."""
    scale = size / 32
    distance = np.abs(np.arange(size) + 0.5 - (np.arange(32)[:, None] + 0.5) * scale)
    weights = np.maximum(0, 1 - distance / max(scale, 1))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(96, 64), (100, 75), (33, 300)])
def test_the_resize_is_antialiased_bilinear(size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    ids = nature.encode_picture(buffer.getvalue()).reshape(32, 32)
    small = np.einsum("yh,hwc,xw->yxc", triangle(height), pixels.astype(float), triangle(width))
    gray = small @ np.array([0.2989, 0.5870, 0.1140]) * 255.5 / 255
    assert gray.std() > 8, "not a test of a flat picture"
    assert np.abs(ids + 0.5 - gray).max() < 2  # two roundings of Pillow's, one truncation of ours


def test_orientation_rows_first():
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[0, 5] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    ids = nature.encode_picture(buffer.getvalue())
    assert np.flatnonzero(ids).tolist() == [5]


def test_a_reduced_decode_is_close_to_a_full_one():
    """draft() changes the decoder's arithmetic, not the picture."""
    tiny = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(tiny).resize((800, 600), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", quality=92)
    whole = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    small = whole.resize((32, 32), Image.Resampling.BILINEAR)
    full = encode.gray(np.asarray(small)).reshape(-1).astype(int)
    difference = np.abs(nature.encode_picture(buffer.getvalue()) - full)
    assert full.std() > 30 and difference.max() <= 6 and difference.mean() < 1


# ---- faults -------------------------------------------------------------------------------------


def test_broken_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    whole = noise(0)
    broken = {
        "Aves/x/empty.jpg": b"",
        "Aves/x/zeros.jpg": b"\0" * 500,
        "Fungi/x/cut.jpg": whole[: len(whole) // 2],
        "Fungi/x/text.jpg": b"<html>not found</html>",
        "Fungi/x/cut.png": noise(1, form="PNG")[:2000],
    }
    lay_out(tmp_path / "in/train", TRAIN | broken)
    lay_out(tmp_path / "in/val", VAL)
    assert run(nature.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-nature", "train") == expected(TRAIN)
    out = capsys.readouterr().out
    assert "skipped 1: the picture file is empty" in out and "empty.jpg" in out
    assert "skipped 4: the picture is cut off or cannot be decoded" in out and "cut.jpg" in out


def changed(**changes):
    table = annotations(TRAIN)
    for key, change in changes.items():
        change(table[key])
    return table


def exchanged_categories(categories):
    categories[0]["supercategory"], categories[4]["supercategory"] = "Aves", "Fungi"


FIRST = next(iter(TRAIN))
BAD_ROWS = {
    "missing": (None, "the picture is missing"),
    "no annotation": (changed(annotations=list.clear), "no annotation for the picture"),
    "no category": (changed(categories=list.pop), "no known supercategory"),
    "exchanged": (changed(categories=exchanged_categories), "the folder says Fungi, the annot"),
    "escape": (
        changed(images=lambda rows: rows[0].update(file_name="../../x.jpg")),
        "the file name leaves the folder",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_annotations_that_do_not_fit_stop_or_are_skipped(tmp_path, capsys, kind):
    train, says = BAD_ROWS[kind]
    files = with_json(train=train)
    if kind == "missing":
        del files["train_val2018/" + FIRST]
    lay_out(tmp_path / "in", files)
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(nature.TASK, *options) == 2
    err = error_of(capsys)
    assert says in err and "--on_error skip" in err
    assert not list((tmp_path / "out").glob("*"))
    if kind != "no annotation":  # that leaves no picture at all
        assert run(nature.TASK, *options, "--on_error", "skip") == 0
        assert says in capsys.readouterr().out


BAD_SOURCES = {
    "missing": ({}, "does not exist"),
    "archive": ({"in": b"\x1f\x8b"}, "is cut off, damaged or not a tar archive"),
    "nothing": ({"in/readme": b""}, "has no supercategory folders"),
    "unknown": (
        {"in/Dragons/x/1.jpg": TRAIN[FIRST]},
        "is in none of the folders Fungi",
    ),
    "one json": ({"in/train2018.json": b"{}"}, "has train2018.json but no val2018.json"),
    "swapped": (
        {"in/" + n: d for n, d in with_json(annotations(VAL), annotations(TRAIN)).items()},
        "are the two exchanged?",
    ),
    "overlap": (
        {"in/" + n: d for n, d in with_json(val=annotations(TRAIN)).items()},
        "both list train_val2018/",
    ),
    "no json": ({"in/train2018.json": b"{", "in/val2018.json": b"{"}, "not an annotations file"),
    "other json": ({"in/train2018.json": b"[]", "in/val2018.json": b"[]"}, "not an annotations"),
    "deep json": (
        {"in/train2018.json": b"[" * 100_000, "in/val2018.json": b"{}"},
        "not an annotations",
    ),
    "latin-1 json": ({"in/train2018.json": b'"\xff"', "in/val2018.json": b""}, "not an annotati"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_broken_source_is_one_sentence_and_no_files(tmp_path, capsys, kind):
    files, says = BAD_SOURCES[kind]
    lay_out(tmp_path, files)
    assert run(nature.TASK, "--source", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert says in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))


def test_nothing_to_read_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert run(nature.TASK) == 2
    assert "no prepared TFDS i_naturalist2018" in error_of(capsys)


def test_tfds(tmp_path, capsys):
    names = list(nature.SUPERCATEGORIES)
    splits = {
        split: [
            {"id": name, "image": io.BytesIO(data), "supercategory": name.split("/")[0]}
            for name, data in files.items()
        ]
        for split, files in (("train", TRAIN), ("validation", VAL))
    }
    features = {"id": "text", "image": "image", "supercategory": names}
    prepare_tfds(tmp_path, "i_naturalist2018", features, splits)
    options = ["--tfds_dir", tmp_path, "--output_dir", tmp_path / "out"]
    assert run(nature.TASK, *options) == 0
    assert examples(tmp_path / "out", "lra-nature", "train") == expected(TRAIN)
    assert examples(tmp_path / "out", "lra-nature", "test") == expected(VAL)
    labels = next(Path(tmp_path).rglob("supercategory.labels.txt"))
    labels.write_text("\n".join(sorted(names)))
    capsys.readouterr()
    assert run(nature.TASK, *options) == 2
    assert "numbers its supercategory Actinopterygii, " in error_of(capsys)


@pytest.mark.slow
def test_fuzzed_pictures():
    """10,000 damaged pictures: ids in range, or one of the two reasons; never an exception."""
    rng = random.Random(9)
    bases = [noise(1), noise(2, form="PNG"), noise(3, (300, 200)), picture((1, 2, 3), mode="P")]
    results = collections.Counter()
    for _ in range(10_000):
        data = bytearray(rng.choice(bases))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(6)):
            if data:
                data[rng.randrange(min(len(data), rng.choice((100, 10_000))))] = rng.randrange(256)
        (result,), _ = driver._encode_chunk(nature.encode_picture, np.int64, [(bytes(data), 3)])
        results[isinstance(result, sources.Fault)] += 1
    assert results[True] > 1000 and results[False] > 1000


@pytest.mark.slow
def test_fuzzed_annotations(tmp_path):
    """10,000 damaged annotation files: rows with known labels, or ValueError."""
    rng = random.Random(10)
    base = json.dumps(annotations(dict(list(TRAIN.items())[:4]))).encode()
    path = tmp_path / "train2018.json"
    refused = 0
    for _ in range(10_000):
        data = bytearray(base)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.choice(
                (b"", b"[", b"}", b'"', b"null", b"1e999", b"{}", b"\xff", b"[[1,2]]", b"..")
            )
        path.write_bytes(data)
        try:
            for name, label in nature.read_annotations(path, driver.Skips("skip")):
                assert type(name) is str and 0 <= label < 14
        except ValueError:
            refused += 1
    assert 1000 < refused < 10_000
