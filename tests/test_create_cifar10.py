"""lra-image from pictures, the original batches and TFDS: gray values, order, splits, faults."""

import collections
import dataclasses
import io
import itertools
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparing import error_of, examples, lay_out, run, tar

from preprocess import driver, encode, writer
from preprocess.tasks import image as cifar

SPLITS = ("train", "dev", "test")


def step_by_step(rgb: np.ndarray) -> np.ndarray:
    """The gray values of docs/data.md from float64: products and sums of two float32 are exact in
    it, so rounding each to float32 is what float32 arithmetic does."""

    def rounded(values):
        return values.astype(np.float32).astype(np.float64)

    weights = [float(np.float32(w)) for w in (0.2989, 0.5870, 0.1140)]
    scale = float(np.float32(1 / 255))
    red, green, blue = (
        rounded(rounded(rgb[..., i].astype(np.float64) * scale) * w) for i, w in enumerate(weights)
    )
    return np.floor(rounded(rounded(rounded(red + green) + blue) * 255.5)).astype(np.int64)


def in_integers(rgb: np.ndarray) -> np.ndarray:
    """(0.2989 R + 0.5870 G + 0.1140 B) / 255 * 255.5, cut off, without any rounding."""
    red, green, blue = (rgb[..., i].astype(np.int64) for i in range(3))
    return (2989 * red + 5870 * green + 1140 * blue) * 511 // (10_000 * 2 * 255)


def colours(reds) -> np.ndarray:
    """All colours with these reds, uint8 [len(reds) * 65536, 3]."""
    axes = np.meshgrid(reds, np.arange(256), np.arange(256), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 3).astype(np.uint8)


def differing(reds) -> int:
    """How many of these colours have another gray value than in exact arithmetic; none by more
    than 1."""
    count = 0
    for red in reds:
        rgb = colours([red])
        gray = encode.gray(rgb).astype(np.int64)
        assert np.array_equal(gray, step_by_step(rgb))
        difference = np.abs(gray - in_integers(rgb))
        assert difference.max() <= 1
        count += int(difference.sum())
    return count


def test_gray_values():
    assert differing(range(0, 256, 51)) == 8
    assert encode.gray(np.array([[0, 0, 0], [255, 255, 255]], np.uint8)).tolist() == [0, 255]


@pytest.mark.slow
def test_gray_values_of_all_colours():
    assert differing(range(256)) == 237


# ---- pictures of class folders ------------------------------------------------------------------


def pixels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def row(pixels: np.ndarray, label: int) -> tuple:
    return tuple(step_by_step(pixels).reshape(-1).tolist()), label


# split -> (class, number) -> pixels; train has 20 pictures of each class, test 3
PICTURES = {
    split: {
        (name, number): pixels_of(1000 * label + 100 * (split == "test") + number)
        for label, name in enumerate(cifar.CLASSES)
        for number in range(count)
    }
    for split, count in (("train", 20), ("test", 3))
}


def path_of(split: str, name: str, number: int, end: str = "png") -> str:
    return f"{split}/{name}/{number:04}.{end}"


FILES = {
    path_of(split, name, number): encoded(pixels)
    for split, pictures in PICTURES.items()
    for (name, number), pixels in pictures.items()
}


def expected(split: str) -> collections.Counter:
    """dev: the last 10 % of each training class by file name."""
    origin = "test" if split == "test" else "train"
    return collections.Counter(
        row(pixels, cifar.CLASSES.index(name))
        for (name, number), pixels in PICTURES[origin].items()
        if split == "test" or (split == "dev") == (number >= 18)
    )


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def place(tmp_path: Path, files: dict[str, bytes], form: str) -> Path:
    if form == "folder":
        lay_out(tmp_path / "in", files)
        return tmp_path / "in"
    (tmp_path / "pictures.zip").write_bytes(zipped(files))
    return tmp_path / "pictures.zip"


@pytest.mark.parametrize("form", ["folder", "zip", "zip below a folder"])
def test_every_form_of_pictures(tmp_path, form, capsys):
    top = "cifar/" if "below" in form else ""
    others = {"README": b"read me", "train/cat/Thumbs.db": b"x", "train/cat/._0001.png": b"x"}
    files = {top + name: data for name, data in (others | FILES).items()}
    source = place(tmp_path, files, form)
    assert run(cifar.TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    for split in SPLITS:
        assert examples(tmp_path / "out", "lra-image", split) == expected(split)
    assert "ignored 3 files that are no pictures" in capsys.readouterr().out


def test_other_picture_formats(tmp_path):
    files = FILES | {
        path_of("test", "cat", 7, "bmp"): encoded(pixels_of(1), "BMP"),
        path_of("test", "cat", 8, "JPG"): encoded(pixels_of(2), "JPEG"),
        path_of("test", "cat", 9): encoded(pixels_of(3)[..., 0]),  # one gray channel
    }
    source = place(tmp_path, files, "folder")
    assert run(cifar.TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    found = examples(tmp_path / "out", "lra-image", "test") - expected("test")
    jpeg = np.asarray(Image.open(io.BytesIO(files[path_of("test", "cat", 8, "JPG")])))
    gray = np.repeat(pixels_of(3)[..., :1], 3, axis=2)
    assert found == collections.Counter([row(pixels_of(1), 3), row(jpeg, 3), row(gray, 3)])


def test_the_result_depends_on_the_seed_alone(tmp_path, monkeypatch):
    small = tuple(dataclasses.replace(source, chunk=7) for source in cifar.TASK.sources[2:])
    task = dataclasses.replace(cifar.TASK, sources=small)  # several pieces of work in flight
    contents = {}
    for form, workers, seed in itertools.product(("folder", "zip"), ("1", "2"), ("0", "1")):
        source = place(tmp_path, dict(reversed(FILES.items())), form)
        out = tmp_path / "out"
        options = ["--source", source, "--output_dir", out, "--workers", workers, "--seed", seed]
        assert run(task, *options) == 0
        data = [(out / f"lra-image.{split}.pickle").read_bytes() for split in SPLITS]
        assert contents.setdefault(seed, data) == data
    assert contents["0"] != contents["1"]


@pytest.mark.parametrize("form", ["pictures", "batches"])
def test_limit_is_balanced(tmp_path, form):
    if form == "pictures":
        source = place(tmp_path, FILES, "zip")
    else:
        source = tmp_path / "batches"
        lay_out(source, batches("binary"))
    options = ["--source", source, "--output_dir", tmp_path / "out", "--limit", "13"]
    assert run(cifar.TASK, *options) == 0
    found = examples(tmp_path / "out", "lra-image", "train")
    counts = collections.Counter(label for _, label in found.elements())
    assert counts == {label: 2 if label < 3 else 1 for label in range(10)}


# ---- the original batches -----------------------------------------------------------------------

# (pixels, label) in the order of the archive: 30 to train on in each batch, 40 to test on
TRAIN = [(pixels_of(5000 + i), i * 7 % 10) for i in range(150)]
TEST = [(pixels_of(6000 + i), i * 3 % 10) for i in range(40)]
PARTS = {f"data_batch_{i + 1}": TRAIN[30 * i : 30 * i + 30] for i in range(5)}
PARTS["test_batch"] = TEST


def planes(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1).reshape(-1)


def batches(form: str) -> dict[str, bytes]:
    """The six files; "python": as Python 2 pickled them, with byte strings as keys."""
    files = {}
    for name, part in PARTS.items():
        if form == "binary":
            records = (bytes([label]) + planes(pixels).tobytes() for pixels, label in part)
            files[name + ".bin"] = b"".join(records)
        else:
            data = np.stack([planes(pixels) for pixels, _ in part])
            batch = {b"data": data, b"labels": [label for _, label in part], b"batch_label": b"x"}
            if form == "python 3":
                batch = {key.decode(): value for key, value in batch.items()}
            files[name] = pickle.dumps(batch, 4 if form == "python 3" else 2)
    files["readme.html"] = b"<html>"
    return files


@pytest.fixture(scope="module")
def in_tfds_order(tmp_path_factory) -> dict[str, list]:
    """The rows as TFDS's own builder of cifar10 stores them: TFDS decides the order."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.image_classification import cifar as theirs

    folder = tmp_path_factory.mktemp("prepared")
    lay_out(folder / "raw", batches("binary"))

    class Prepared(theirs.Cifar10, skip_registration=True):
        pkg_dir_path = folder

        def _split_generators(self, dl_manager):
            self.info.features["label"].names = list(cifar.CLASSES)
            names = {
                "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
                "test": ["test_batch.bin"],
            }
            return {
                split: self._generate_examples(split + "_", [folder / "raw" / f for f in files])
                for split, files in names.items()
            }

    Prepared.name = "cifar10"
    builder = Prepared(data_dir=folder / "tfds")
    builder.download_and_prepare()
    rows = {
        split: [
            row(np.asarray(example["image"]), int(example["label"]))
            for example in tfds.as_numpy(builder.as_dataset(split=split))
        ]
        for split in ("train", "test")
    }
    return {"train": rows["train"][:135], "dev": rows["train"][135:], "test": rows["test"]} | {
        "folder": folder / "tfds"
    }


def in_order(output_dir: Path, split: str) -> list:
    with open(output_dir / f"lra-image.{split}.pickle", "rb") as file:
        return [(tuple(r["input_ids_0"].tolist()), int(r["label"])) for r in pickle.load(file)]


@pytest.mark.parametrize("form", ["binary", "python", "python 3"])
@pytest.mark.parametrize("packed", ["folder", "folder above", "tar.gz", "zip"])
def test_every_form_of_the_batches_is_what_tfds_gives(tmp_path, in_tfds_order, form, packed):
    inner = "cifar-10-batches-bin/" if form == "binary" else "cifar-10-batches-py/"
    files = batches(form)
    source = tmp_path / "in"
    if packed.startswith("folder"):
        lay_out(source / (inner if "above" in packed else ""), files)
    else:
        named = {inner + name: data for name, data in reversed(files.items())}
        source.write_bytes(tar(named) if packed == "tar.gz" else zipped(named))
    assert run(cifar.TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    for split in SPLITS:
        assert in_order(tmp_path / "out", split) == in_tfds_order[split]


def test_a_prepared_folder_gives_the_same(tmp_path, in_tfds_order):
    options = ["--tfds_dir", in_tfds_order["folder"], "--output_dir", tmp_path / "out"]
    assert run(cifar.TASK, *options) == 0
    for split in SPLITS:
        assert in_order(tmp_path / "out", split) == in_tfds_order[split]


def test_the_published_order():
    """The train split of the published cifar10 3.0.2 begins with these."""
    assert cifar.tfds_order("train", 50_000)[:3] == [16399, 1680, 47917]


# ---- the real data ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_tfds(shared_data, tmp_path_factory) -> Path:
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    shutil.unpack_archive(shared_data / "data/tfds_cifar10_small.tar.gz", folder)
    return folder


def test_tfds(small_tfds, tmp_path):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    for below, out in (("", "out"), ("cifar10/3.0.2", "again")):
        options = ["--tfds_dir", small_tfds / below, "--output_dir", tmp_path / out]
        assert run(cifar.TASK, *options) == 0
    data = tfds.load("cifar10", data_dir=small_tfds, download=False)
    parts = {"train": ("train", 0, 450), "dev": ("train", 450, 500), "test": ("test", 0, 200)}
    for split, (origin, first, end) in parts.items():
        rows = list(tfds.as_numpy(data[origin]))[first:end]
        found = in_order(tmp_path / "out", split)
        assert found == in_order(tmp_path / "again", split) and len(rows) == end - first
        assert found == [row(r["image"], int(r["label"])) for r in rows]
        # TensorFlow's own sum is a matrix product, whose rounding depends on the machine
        theirs = tf.image.rgb_to_grayscale(np.stack([r["image"] for r in rows])).numpy()
        difference = np.abs(theirs.reshape(len(rows), -1) - np.array([ids for ids, _ in found]))
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 5


def test_the_real_pictures(shared_data, tmp_path):
    """A few of each class of the 60,000; all of them in the slow set."""
    check_real_pictures(shared_data, tmp_path, 50)


@pytest.mark.slow
def test_all_the_real_pictures(shared_data, tmp_path):
    check_real_pictures(shared_data, tmp_path, None)


def check_real_pictures(shared_data, tmp_path, limit):
    source = shared_data / "data/cifar10_images.zip"
    options = ["--source", source, "--output_dir", tmp_path / "out"]
    assert run(cifar.TASK, *options, *(["--limit", limit] if limit else [])) == 0
    counts = {"train": 4500, "dev": 500, "test": 1000}  # a class
    with zipfile.ZipFile(source) as archive:
        for split, count in counts.items():
            wanted: collections.Counter = collections.Counter()
            for label, name in enumerate(cifar.CLASSES):
                first = 4500 if split == "dev" else 0
                origin = "test" if split == "test" else "train"
                for number in range(first, first + (limit // 10 if limit else count)):
                    data = archive.read(f"{origin}/{name}/{number:04}.jpg")
                    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                    wanted[step_by_step(pixels).astype(np.int32).tobytes(), label] += 1
            with open(tmp_path / f"out/lra-image.{split}.pickle", "rb") as file:
                found = collections.Counter(
                    (r["input_ids_0"].tobytes(), int(r["label"])) for r in pickle.load(file)
                )
            assert found == wanted and found.total() == (limit or 10 * count)


# ---- faults -------------------------------------------------------------------------------------


def transparent() -> bytes:
    return encoded(np.dstack([pixels_of(4), np.full((32, 32), 9, np.uint8)]))


WHOLE = encoded(pixels_of(9), "JPEG")
DAMAGED = {
    "cut JPEG": (WHOLE[: len(WHOLE) // 2], "cut off or cannot be decoded"),
    "cut PNG": (encoded(pixels_of(9))[:-40], "cut off or cannot be decoded"),
    "text": (b"<html>not found</html>", "cut off or cannot be decoded"),
    "too small": (encoded(pixels_of(9)[:31]), "is not 32x32 pixels"),
    "large file": (b"\x89PNG" + bytes(2 << 20), "has more than 1,048,576 bytes"),
    "large picture": (encoded(np.zeros((2000, 2000), np.uint8)), "is not 32x32 pixels"),
}


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_pictures_stop_or_are_skipped_counted_and_named(tmp_path, capsys, kind, form):
    data, says = DAMAGED[kind]
    source = place(tmp_path, FILES | {path_of("test", "cat", 77, "jpg"): data}, form)
    options = ["--source", source, "--output_dir", tmp_path / "out"]
    assert run(cifar.TASK, *options, "--workers", "1") == 2
    err = error_of(capsys)
    assert "test/cat/0077.jpg: " in err and says in err and "--on_error skip" in err
    assert not list((tmp_path / "out").glob("*"))
    assert run(cifar.TASK, *options, "--workers", "1", "--on_error", "skip") == 0
    assert examples(tmp_path / "out", "lra-image", "test") == expected("test")
    out = capsys.readouterr().out
    assert "skipped 1: the " in out and says in out and "test/cat/0077.jpg" in out


def test_empty_pictures_are_always_skipped_counted_and_named(tmp_path, capsys):
    empty = {path_of("train", name, 3): b"" for name in ("cat", "dog")}
    source = place(tmp_path, FILES | empty, "zip")
    assert run(cifar.TASK, "--source", source, "--output_dir", tmp_path / "out") == 0
    assert examples(tmp_path / "out", "lra-image", "train").total() == 178
    out = capsys.readouterr().out
    assert "skipped 2: the picture file is empty" in out and "train/cat/0003.png" in out


def test_a_member_of_the_zip_that_fails_its_checksum(tmp_path, capsys):
    name = path_of("train", "frog", 5)
    data = bytearray(zipped(FILES))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        data[archive.getinfo(name).header_offset + 200] ^= 255
    (tmp_path / "pictures.zip").write_bytes(data)
    options = ["--source", tmp_path / "pictures.zip", "--output_dir", tmp_path / "out"]
    assert run(cifar.TASK, *options) == 2
    assert f"{name}: the zip archive is damaged at this file" in error_of(capsys)
    assert run(cifar.TASK, *options, "--on_error", "skip") == 0
    assert examples(tmp_path / "out", "lra-image", "train").total() == 179


def without(start: str) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if not name.startswith(start)}


def moved(old: str, new: str) -> dict[str, bytes]:
    return {name.replace(old, new): data for name, data in FILES.items()}


def changed(name: str, data: bytes | None) -> dict[str, bytes]:
    files = batches("python") if name in PARTS else batches("binary")
    if data is None:
        del files[name]
    else:
        files[name] = data
    return files


def python_batch(**changes) -> dict[str, bytes]:
    batch = pickle.loads(batches("python 3")["test_batch"]) | changes
    return changed("test_batch", pickle.dumps(batch, 2))


BAD_SOURCES = {
    "missing": (None, "does not exist"),
    "empty folder": ({}, "holds no pictures in train/airplane"),
    "no class": (without("test/ship/"), "holds no pictures in test/ship (expected:"),
    "no test": (without("test/"), "holds no pictures in test/airplane"),
    "another class": (moved("/frog/", "/toad/"), "train/toad is none of airplane, automobile"),
    "another split": (moved("test/", "val/"), "is not below {train,test}/<class>/"),
    "no split": (moved("train/", ""), "holds no pictures in train/airplane"),
    "batch missing": (changed("data_batch_3.bin", None), "lacks data_batch_3 of the original"),
    "test missing": (changed("test_batch.bin", None), "lacks test_batch of the original"),
    "batch cut": (
        changed("data_batch_2.bin", batches("binary")["data_batch_2.bin"][:-1]),
        "data_batch_2.bin has 92,189 bytes, not a multiple of 3,073",
    ),
    "batch empty": (changed("data_batch_2.bin", b""), "has 0 bytes, not a multiple"),
    "pickle cut": (
        changed("data_batch_2", batches("python")["data_batch_2"][:-1]),
        "data_batch_2: the file is cut short",
    ),
    "pickle of evil": (
        changed("data_batch_2", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R."),
        "refused: it wants to use 'os.system'",
    ),
    "pickle of something": (changed("test_batch", pickle.dumps([1, 2], 2)), "no data and labels"),
    "fewer labels": (python_batch(labels=[1, 2]), "has 40 pictures and 2 labels"),
    "labels as text": (python_batch(labels=["1"] * 40), "not uint8 [n, 3072] and n labels"),
    "data as floats": (python_batch(data=np.zeros((40, 3072))), "not uint8 [n, 3072]"),
    "CIFAR-100": (python_batch(data=np.zeros((40, 99), np.uint8)), "not uint8 [n, 3072]"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_broken_source_is_one_sentence_and_no_files(tmp_path, capsys, kind):
    files, says = BAD_SOURCES[kind]
    source = tmp_path / "in"
    if files is not None:
        source.mkdir()
        lay_out(source, files)
    assert run(cifar.TASK, "--source", source, "--output_dir", tmp_path / "out") == 2
    assert says in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("kind", ["text", "empty", "cut zip", "cut tar.gz", "zip of nothing"])
def test_a_broken_archive_is_one_sentence_and_no_files(tmp_path, capsys, kind):
    source = tmp_path / "in"
    data, says = {
        "text": (b"hello", "is neither a folder nor an archive"),
        "empty": (b"", "is neither a folder nor an archive"),
        "cut zip": (zipped(FILES)[:-5000], "is neither a folder nor an archive"),
        "cut tar.gz": (tar(batches("binary"))[:-5000], "cut off, damaged or not a tar archive"),
        "zip of nothing": (zipped({}), "holds no pictures in train/airplane"),
    }[kind]
    source.write_bytes(data)
    assert run(cifar.TASK, "--source", source, "--output_dir", tmp_path / "out") == 2
    assert says in error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))


def test_labels_that_cannot_be_stop_or_are_skipped(tmp_path, capsys):
    files = batches("binary")
    harmed = bytearray(files["data_batch_4.bin"])
    harmed[5 * 3073] = 200
    lay_out(tmp_path / "in", files | {"data_batch_4.bin": bytes(harmed)})
    options = ["--source", tmp_path / "in", "--output_dir", tmp_path / "out"]
    assert run(cifar.TASK, *options) == 2
    assert "train picture 95: the label is not in 0..9" in error_of(capsys)
    assert run(cifar.TASK, *options, "--on_error", "skip") == 0
    total = sum(
        examples(tmp_path / "out", "lra-image", split).total() for split in ("train", "dev")
    )
    assert total == 149 and "skipped 1: the label" in capsys.readouterr().out


def test_swapped_class_names_of_tfds(small_tfds, tmp_path, capsys):
    folder = tmp_path / "tfds"
    shutil.copytree(small_tfds, folder)
    names = folder / "cifar10/3.0.2/label.labels.txt"
    names.write_text("\n".join(reversed(cifar.CLASSES)) + "\n")
    assert run(cifar.TASK, "--tfds_dir", folder, "--output_dir", tmp_path / "out") == 2
    assert "numbers its label truck, ship" in error_of(capsys)


def test_nothing_to_read_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "DATA", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert run(cifar.TASK, "--no_download") == 2
    err = error_of(capsys)
    assert "no prepared TFDS cifar10" in err and "no cifar-10-binary.tar.gz" in err


# ---- fuzz ---------------------------------------------------------------------------------------


def harm(rng: random.Random, data: bytes) -> bytes:
    """Cut, changed, doubled or deleted bytes; most changes near the ends, where headers are."""
    harmed = bytearray(data)
    if rng.random() < 0.2:
        del harmed[rng.randrange(len(harmed)) :]
    for _ in range(rng.randrange(5)):
        if harmed:
            reach = min(len(harmed), rng.choice((40, 400, 1 << 30)))
            place = rng.randrange(reach)
            if rng.random() < 0.3:
                place = len(harmed) - 1 - place
            kind = rng.randrange(4)
            if kind == 0:
                del harmed[place : place + rng.choice((1, 16, 3073))]
            elif kind == 1:
                harmed[place:place] = harmed[place : place + rng.choice((1, 16, 3073))]
            else:
                harmed[place] = rng.randrange(256)
    return bytes(harmed)


@pytest.mark.slow
def test_fuzzed_pictures():
    """10,000 damaged pictures: ids in range or one of two reasons, never another exception."""
    rng = random.Random(1)
    bases = [encoded(pixels_of(i), form) for i, form in enumerate(("JPEG", "PNG", "BMP", "JPEG"))]
    bases += [encoded(np.full((32, 32, 3), 77, np.uint8), "JPEG"), transparent()]
    refused = 0
    for _ in range(10_000):
        try:
            ids = cifar.encode_picture(harm(rng, rng.choice(bases)))
            assert ids.dtype == np.int32 and ids.shape == (1024,)
            assert 0 <= ids.min() <= ids.max() <= 255
        except ValueError:
            refused += 1
    assert 1000 < refused < 9000


@pytest.mark.slow
def test_fuzzed_batches():
    """10,000 damaged batches: pictures and labels, or ValueError."""
    rng = random.Random(2)
    bases = [batches(form) for form in ("binary", "python", "python 3")]
    bases = [files.get("test_batch") or files["test_batch.bin"] for files in bases]
    refused = 0
    for _ in range(10_000):
        try:
            pixels, labels = cifar.read_batch(harm(rng, rng.choice(bases)), "batch")
            assert pixels.dtype == labels.dtype == np.uint8
            assert pixels.shape == (len(labels), 1024)
        except ValueError:
            refused += 1
    assert 1000 < refused < 9000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pictures.zip", "batches.zip", "batches.tar.gz", "batches.tar"])
def test_fuzzed_archives(tmp_path, kind, monkeypatch, capsys):
    """10,000 damaged archives of each kind through the whole script: pickles or one sentence."""
    monkeypatch.setattr(writer.os, "fsync", lambda number: None)
    rng = random.Random(3)
    # one picture in each class and batch: the archive's own structure is the most of it
    flat = encoded(np.zeros((32, 32, 3), np.uint8))
    if kind == "pictures.zip":
        files = {path_of(s, c, i): flat for s in PICTURES for c in cifar.CLASSES for i in (1, 2)}
    else:
        files = {f"c/{name}.bin": bytes(3073) for name in PARTS}
    base = tar(files, "w:gz" if "gz" in kind else "w") if "tar" in kind else zipped(files)
    source, done = tmp_path / kind, collections.Counter()
    for _ in range(10_000):
        source.write_bytes(harm(rng, base))
        options = ["--source", source, "--output_dir", tmp_path / "out", "--workers", "1"]
        code = run(cifar.TASK, *options, "--on_error", rng.choice(("stop", "skip")))
        captured = capsys.readouterr()
        assert code in (0, 2) and captured.err.count("\n") == (code == 2), captured.err
        assert not list((tmp_path / "out").glob("*.part"))
        done[code] += 1
    # a zip has its names twice and is small here: most changes are noticed
    assert min(done[0], done[2]) > 50, done
