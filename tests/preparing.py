"""Helpers for the tests of the create scripts."""

import collections
import io
import pickle
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest

from preprocess import driver, sources


def run(task: driver.Task, *options, whole: bool = False) -> int:
    """The exit code of a task's command with these options.

    whole: without --allow_partial, which small sources need.
    """
    try:
        return driver.main(task, [*map(str, options), *([] if whole else ["--allow_partial"])])
    except SystemExit as stopped:  # argparse
        return stopped.code


def job(on_error: str = "stop"):
    """What a source needs of a run."""
    return types.SimpleNamespace(skips=driver.Skips(on_error), full=lambda split: False)


def csv_examples(task: driver.Task, data: bytes) -> list[tuple[bytes, int]]:
    """(text, label) of the rows of one CSV file. Raises ValueError."""
    source = next(source for source in task.sources if isinstance(source, sources.Csv))
    rows = source.read_file(job(), "train", "file", io.BytesIO(data), {})
    return [(text, label) for _, _, text, label in rows]


def examples(output_dir: Path, task: str, split: str) -> collections.Counter:
    """The multiset of (ids..., label) of a pickle, after checking that it is what the original
    code reads: a list of dicts of int32 arrays and a NumPy label."""
    with open(output_dir / f"{task}.{split}.pickle", "rb") as file:
        rows = pickle.load(file)
    assert type(rows) is list
    found: collections.Counter = collections.Counter()
    for row in rows:
        label = row.pop("label")
        assert isinstance(label, np.integer)
        ids = [row[key] for key in sorted(row)]
        assert all(type(i) is np.ndarray and i.dtype == np.int32 and i.ndim == 1 for i in ids)
        found[(*(tuple(i.tolist()) for i in ids), int(label))] += 1
    return found


def padded(text: bytes, cut: int, length: int) -> tuple[int, ...]:
    """The byte encoding said again: each of the first `cut` bytes plus one, zeros behind."""
    ids = [byte + 1 for byte in text[:cut]]
    return (*ids, *[0] * (length - len(ids)))


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """An archive of these files, in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    """These files below a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def error_of(capsys) -> str:
    """The one sentence on stderr."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def prepare_tfds(folder: Path, name: str, features: dict, splits: dict[str, list[dict]]) -> None:
    """A prepared TFDS folder of data set `name` with these rows, written by TFDS itself.

    features: feature name -> "text", "image" or the list of a label's names.
    """
    tfds = pytest.importorskip("tensorflow_datasets")

    def feature(kind):
        if kind == "text":
            return tfds.features.Text()
        return tfds.features.Image() if kind == "image" else tfds.features.ClassLabel(names=kind)

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            table = {key: feature(kind) for key, kind in features.items()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(table))

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            """Wanted by the base class, not used."""

    Prepared.name = name
    Prepared(data_dir=folder).download_and_prepare()
