"""lra-pathfinder32 from the release's layout and drawn: exact examples, every fault named."""

import io
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import preparing
import pytest
from PIL import Image

from preprocess import driver
from preprocess.tasks import pathfinder as create_pathfinder

LEVELS = create_pathfinder.LEVELS
ROOT = Path(__file__).parents[1]


def _png(pixels, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)


def _release(level="curv_contour_length_9", batches=2, size=10, end="\n") -> dict[str, bytes]:
    """A small release: path -> bytes. Sample k of batch b shows _pixels(100 * b + k)."""
    files = {}
    for batch in range(batches):
        rows = []
        for k in range(size):
            name = f"{level}/imgs/{batch}/sample_{k}.png"
            files[f"pathfinder32/{name}"] = _png(_pixels(100 * batch + k))
            rows.append(f"imgs/{batch} sample_{k}.png {k} {_label(batch, k)} 1.8 9 3 2 1 1 1")
        files[f"pathfinder32/{level}/metadata/{batch}.npy"] = ("\n".join(rows) + end).encode()
    return files


def _label(batch: int, k: int) -> int:
    return (batch * 7 + k * 3) // 2 % 2


def _expected(batches=2, size=10, without=()) -> list[tuple[bytes, int]]:
    """(ids as bytes, label) of all examples, sorted."""
    return sorted(
        (_pixels(100 * batch + k).astype("<i4").tobytes(), _label(batch, k))
        for batch in range(batches)
        for k in range(size)
        if (batch, k) not in without
    )


def _read(folder: Path, level="curv_contour_length_9") -> dict[str, list[tuple[bytes, int]]]:
    found = {}
    for split in ("train", "dev", "test"):
        with open(folder / f"lra-pathfinder32-{level}.{split}.pickle", "rb") as file:
            rows = pickle.load(file)
        assert type(rows) is list
        for row in rows:
            assert set(row) == {"input_ids_0", "label"}
            assert row["input_ids_0"].dtype == np.int32 and row["input_ids_0"].shape == (1024,)
            assert type(row["label"]) is int
        found[split] = [(row["input_ids_0"].tobytes(), row["label"]) for row in rows]
    return found


def _run(*options) -> int:
    return preparing.run(create_pathfinder.TASK, "--workers", 1, *options)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.p*"))}


# ---- the release ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_examples_are_the_pictures_and_labels(tmp_path, level, end):
    """Also the last row of a metadata file without a final newline, which the reference loses."""
    preparing.lay_out(tmp_path, _release(level, end=end))
    assert _run("--source", tmp_path, "--output_dir", tmp_path / "out") == 0
    found = _read(tmp_path / "out", level)
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 16,
        "dev": 2,
        "test": 2,
    }
    assert sorted(row for rows in found.values() for row in rows) == _expected()


def test_folder_task_level_and_archive_give_the_same_bytes(tmp_path):
    """Whatever order the files have, wherever the release is, whoever decodes."""
    files = _release()
    preparing.lay_out(tmp_path / "a" / "lra_release" / "lra_release", files)
    shuffled = list(files)
    random.Random(3).shuffle(shuffled)
    archive = {f"lra_release/{name}": files[name] for name in shuffled}
    # other sizes and other tasks of the release, and what macOS adds
    archive["lra_release/pathfinder64/curv_contour_length_9/imgs/0/sample_0.png"] = b"64"
    archive["lra_release/listops-1000/basic_train.tsv"] = b"Source\tTarget\n"
    archive["lra_release/pathfinder32/curv_contour_length_9/imgs/0/._sample_0.png"] = b"mac"
    (tmp_path / "lra_release.gz").write_bytes(preparing.tar(archive))
    (tmp_path / "plain.tar").write_bytes(preparing.tar(files, "w"))
    top = tmp_path / "a" / "lra_release" / "lra_release"
    sources = [tmp_path / "a", top, top / "pathfinder32"]
    sources += [top / "pathfinder32" / "curv_contour_length_9"]
    sources += [tmp_path / "lra_release.gz", tmp_path / "plain.tar"]
    outputs = []
    for i, source in enumerate(sources):
        workers = 2 if i == 4 else 1
        out = tmp_path / f"out{i}"
        options = ("--source", source, "--output_dir", out, "--workers", workers)
        assert preparing.run(create_pathfinder.TASK, *options) == 0, source
        outputs.append(_bytes(out))
    assert all(output == outputs[0] for output in outputs)
    assert len(outputs[0]) == 3, "no temporary file is left"


@pytest.mark.parametrize("place", ["lra_release", "lra_release.gz"])
def test_what_download_leaves_is_found(tmp_path, monkeypatch, place):
    files = {f"lra_release/{name}": data for name, data in _release().items()}
    if place == "lra_release":
        preparing.lay_out(tmp_path / "data/lra_release", files)
    else:
        preparing.lay_out(tmp_path, {"data/lra_release.gz": preparing.tar(files)})
    monkeypatch.setattr(driver, "DATA", tmp_path / "data")
    monkeypatch.setattr(create_pathfinder, "COUNT", 0)  # all levels are whole
    assert preparing.run(create_pathfinder.TASK, "--output_dir", tmp_path / "out") == 0
    assert len(_bytes(tmp_path / "out")) == 3


def test_the_seed_decides_the_split(tmp_path):
    preparing.lay_out(tmp_path, _release())
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(found)}"
        assert _run("--source", tmp_path, "--output_dir", out, "--seed", seed) == 0
        found.append(_read(out))
    assert found[0] == found[1] != found[2]
    for output in found:
        assert sorted(row for rows in output.values() for row in rows) == _expected()


def test_split_sizes_are_the_published_ones():
    for count, sizes in (
        (200_000, [160_000, 20_000, 20_000]),
        (199_999, [159_999, 20_000, 20_000]),
    ):
        splits = create_pathfinder.split_indices(count, 0)
        assert [len(indices) for indices in splits.values()] == sizes
        everything = np.sort(np.concatenate(list(splits.values())))
        assert np.array_equal(everything, np.arange(count))
    # the same split for everybody
    assert create_pathfinder.split_indices(200_000, 0)["dev"][:4].tolist() == [
        29652,
        53317,
        192888,
        184628,
    ]


def test_limit_is_balanced(tmp_path):
    preparing.lay_out(tmp_path, _release(size=60))
    assert _run("--source", tmp_path, "--output_dir", tmp_path / "out", "--limit", 4) == 0
    for rows in _read(tmp_path / "out").values():
        assert sorted(label for _, label in rows) == [0, 0, 1, 1]


def test_zero_byte_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    """As curv_baseline/imgs/0/sample_172.png in the release: without --on_error skip too."""
    files = _release()
    files["pathfinder32/curv_contour_length_9/imgs/0/sample_4.png"] = b""
    preparing.lay_out(tmp_path, files)
    assert _run("--source", tmp_path, "--output_dir", tmp_path / "out") == 0
    found = _read(tmp_path / "out")
    assert sorted(row for rows in found.values() for row in rows) == _expected(without=[(0, 4)])
    said = capsys.readouterr().out
    assert "skipped 1: the picture file is empty" in said and "imgs/0/sample_4.png" in said


NAME = "pathfinder32/curv_contour_length_9"
ROW = b"imgs/0 sample_3.png 3 "


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("imgs/0/sample_3.png", None, b"\x89PNG\r\n", "cut off or cannot be decoded"),
        ("imgs/0/sample_3.png", None, _png(_pixels(3))[:200], "cut off or cannot be decoded"),
        ("imgs/0/sample_3.png", None, b"GIF89a" + bytes(100), "cut off or cannot be decoded"),
        ("imgs/0/sample_3.png", None, _png(_pixels(3)[:31]), "not a 32x32 8-bit gray picture"),
        ("imgs/0/sample_3.png", None, _png(np.zeros((32, 32, 3), np.uint8)), "not a 32x32"),
        ("imgs/0/sample_3.png", None, _png(np.zeros((32, 32), np.uint16)), "not a 32x32"),
        ("imgs/0/sample_3.png", None, ..., "the metadata's row has no picture"),
        ("metadata/0.npy", ROW, b"\n" + ROW, "row 4: the row is blank"),
        ("metadata/0.npy", ROW, b"imgs/0 sample_3.png ", "row 4: the row does not have 11"),
        ("metadata/0.npy", ROW, b"imgs/0 sample_3.png 3 1 ", "row 4: the row does not have 11"),
        ("metadata/0.npy", ROW, b"imgs/0 sample_3.p\rng 3 ", "row 4: the row does not have 11"),
        ("metadata/0.npy", ROW + b"0", ROW + b"2", "row 4: the label (fourth column) is neither"),
        ("metadata/0.npy", ROW + b"0", ROW + b"0.0", "row 4: the label (fourth column)"),
        ("metadata/0.npy", ROW + b"0", ROW + b"\xff", "row 4: the label (fourth column)"),
        ("metadata/0.npy", ROW, b"../../x sample_3.png 3 ", "row 4: the first column is not"),
        ("metadata/0.npy", ROW, b"imgs/0 sample_2.png 3 ", "a second row for the same picture"),
        ("metadata/0.npy", ROW, b"imgs/0 other.png 3 ", "the picture has no row"),
    ],
)
def test_faults_stop_or_are_skipped_and_counted(tmp_path, capsys, path, old, new, message):
    files = _release()
    assert _label(0, 3) == 0
    if new is ...:
        del files[f"{NAME}/{path}"]
    elif old is None:
        files[f"{NAME}/{path}"] = new
    else:
        assert files[f"{NAME}/{path}"].count(old) == 1
        files[f"{NAME}/{path}"] = files[f"{NAME}/{path}"].replace(old, new)
    preparing.lay_out(tmp_path, files)
    out = tmp_path / "out"
    assert _run("--source", tmp_path, "--output_dir", out) == 2
    error = capsys.readouterr().err
    assert message in error and "--on_error skip" in error and error.count("\n") == 1
    assert list(out.iterdir()) == [], "nothing half-written"
    assert _run("--source", tmp_path, "--output_dir", out, "--on_error", "skip") == 0
    found = _read(out)
    without = [] if message.endswith("blank") else [(0, 3)]
    assert sorted(row for rows in found.values() for row in rows) == _expected(without=without)
    assert "skipped 1: " in capsys.readouterr().out


def test_metadata_of_another_level_is_noticed(tmp_path, capsys):
    files = _release("curv_contour_length_14")  # whose rows say contour length 9
    preparing.lay_out(tmp_path, files)
    assert _run("--source", tmp_path, "--output_dir", tmp_path / "out") == 0
    assert "says contour length 9: is it another level's metadata?" in capsys.readouterr().out


def test_path_x_is_the_same_with_larger_pictures(tmp_path):
    """From an archive that has both sizes; those of another size are a fault there."""
    rows = _release()[f"{NAME}/metadata/0.npy"]
    pixels = {
        k: np.random.default_rng(k).integers(0, 256, (128, 128), np.uint8) for k in range(10)
    }
    folder = f"pathfinder128/{LEVELS[1]}"
    files = {f"{folder}/imgs/0/sample_{k}.png": _png(picture) for k, picture in pixels.items()}
    files = _release() | files | {f"{folder}/metadata/0.npy": rows}
    (tmp_path / "a.gz").write_bytes(preparing.tar(files))
    options = ("--source", tmp_path / "a.gz", "--output_dir", tmp_path / "out", "--workers", 1)
    assert preparing.run(create_pathfinder.PATH_X, *options) == 0
    found = []
    for split in ("train", "dev", "test"):
        with open(tmp_path / f"out/lra-pathx-{LEVELS[1]}.{split}.pickle", "rb") as file:
            found += [(row["input_ids_0"].tobytes(), row["label"]) for row in pickle.load(file)]
    expected = [(p.astype("<i4").tobytes(), _label(0, k)) for k, p in pixels.items()]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    "case", ["absent", "empty", "level", "npy", "text", "cut", "tfds", "file"]
)
def test_wrong_sources_are_one_sentence(tmp_path, capsys, case):
    files = _release()
    options: tuple = ()
    source = tmp_path / "lra_release.gz"
    if case == "absent":
        message = "does not exist; expected the LRA release"
    elif case == "empty":
        source.mkdir()
        message = "does not have curv_baseline, curv_contour_length_9, curv"
    elif case == "level":
        source.write_bytes(preparing.tar(files))
        options, message = ("--level", "curv_baseline"), "does not have curv_baseline with imgs"
    elif case == "npy":
        files[f"{NAME}/metadata/0.npy"] = b"\x93NUMPY\x01\x00v\x00{'descr'"
        source.write_bytes(preparing.tar(files))
        message = "is a NumPy file; the release's metadata is text"
    elif case == "text":
        source.write_bytes(b"<html>404</html>" * 100)
        message = "is neither a folder nor an archive"
    elif case == "cut":
        source.write_bytes(preparing.tar(files)[:-400])
        message = "is cut off, damaged or not a tar archive"
    elif case == "tfds":
        source = tmp_path / "pathfinder_tfds.gz"
        source.write_bytes(preparing.tar(files))
        message = "is not needed: give lra_release.gz"
    else:
        preparing.lay_out(tmp_path / "r", {f"{NAME}/imgs/0/readme.txt": b""})
        source, message = tmp_path / "r", "does not have curv_baseline, "
    out = tmp_path / "out"
    started = time.monotonic()
    assert _run("--source", source, "--output_dir", out, *options) == 2
    assert time.monotonic() - started < 5
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not out.exists() or list(out.iterdir()) == []


def test_the_tfds_archive_beside_the_release_is_skipped_with_a_word(tmp_path, capsys):
    preparing.lay_out(tmp_path, {**_release(), "pathfinder_tfds.gz": b"huge"})
    assert _run("--source", tmp_path, "--output_dir", tmp_path / "out") == 0
    assert "pathfinder_tfds.gz is not needed: skipped" in capsys.readouterr().out


def test_unwritable_output_is_one_sentence(tmp_path, capsys):
    (tmp_path / "out").write_bytes(b"a file")
    preparing.lay_out(tmp_path / "r", _release())
    assert _run("--source", tmp_path / "r", "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_fuzzed_pictures_and_rows_never_end_in_another_error():
    """10,000 damaged pictures and 10,000 damaged metadata files."""
    rng = random.Random(0)
    good = _png(_pixels(0))
    rows = _release(batches=1)[f"{NAME}/metadata/0.npy"]
    reasons = set()
    for _ in range(10_000):
        picture = create_pathfinder.decode_picture(_damage(good, rng))
        reasons.add(picture if isinstance(picture, str) else "decoded")
        if not isinstance(picture, str):
            assert picture.shape == (1024,) and picture.dtype == np.uint8
        skips = driver.Skips("skip")
        try:
            found = list(create_pathfinder._rows(_damage(rows, rng), "0.npy", LEVELS[1], skips))
        except ValueError as error:
            assert "is a NumPy file" in str(error)
            continue
        assert all(label in (0, 1) for _, label in found)
    print(sorted(reasons))
    assert len(reasons) >= 3


def _damage(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        what = rng.randrange(4)
        if what == 0:
            data[place] = rng.randrange(256)
        elif what == 1:
            del data[place : place + rng.randint(1, 40)]
        elif what == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 20))
        else:
            del data[place + 1 :]
        if not data:
            break
    return bytes(data)


# ---- the generator ----------------------------------------------------------------------------


def test_drawn_pictures_do_not_depend_on_workers(tmp_path):
    common = ("--generate", "--level", "curv_baseline", "--count", 600, "--seed", 5)
    for workers in (1, 2):
        options = ("--output_dir", tmp_path / str(workers), "--workers", workers)
        assert preparing.run(create_pathfinder.TASK, *common, *options) == 0
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "2")
    found = _read(tmp_path / "1", "curv_baseline")
    assert [len(rows) for rows in found.values()] == [480, 60, 60]
    assert len({ids for rows in found.values() for ids, _ in rows}) == 600, "no picture twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--generate", "--source", "x"), "not allowed with argument --generate"),
        (("--generate", "--seed", "-1"), "argument --seed: -1 is not between"),
        (("--generate", "--count", "0"), "0 is not at least 1"),
        (("--level", "hard"), "invalid choice: 'hard'"),
    ],
)
def test_wrong_options(capsys, options, message):
    assert _run(*options) == 2
    assert message in capsys.readouterr().err


def test_interrupted_drawing_leaves_nothing(tmp_path):
    script = ROOT / "preprocess" / "create_pathfinder.py"
    command = [sys.executable, script, "--generate", "--output_dir", tmp_path / "out"]
    command += ["--level", "curv_baseline", "--workers", "1"]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # of the minutes that drawing takes
    process.terminate()
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error == "terminated: nothing half-written is left, run it again\n"
    assert list((tmp_path / "out").iterdir()) == []
