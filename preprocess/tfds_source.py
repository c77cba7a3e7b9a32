"""Prepared TensorFlow Datasets folders, read without any attempt to download.

tensorflow is imported when an example is read, not before. Nothing is downloaded here: TFDS
retries for minutes without a network, and download.py fetches the same data with checks.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def default_folder() -> Path:
    """Where TFDS keeps prepared data: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def find_prepared(name: str, tfds_dir: Path) -> Path | None:
    """Folder of the newest prepared version of data set `name`, None if there is none.

    tfds_dir: the folder that holds `name`, or `name` itself, or a version of it.
    """
    for root in (tfds_dir / name, tfds_dir):
        for pattern in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
            found = [
                path.parent
                for path in root.glob(pattern)
                if name in path.parts and not path.parent.name.startswith("incomplete.")
            ]
            if found:
                return max(found, key=lambda folder: _version(folder.name))
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def prepared(name: str, tfds_dir: Path) -> Path:
    """Like find_prepared, but raises ValueError if there is none."""
    folder = find_prepared(name, tfds_dir)
    if folder is None:
        raise ValueError(
            f"no prepared {name} in {tfds_dir}: expected {tfds_dir}/{name}/<version>/"
            "dataset_info.json (nothing is downloaded; --source reads other files)"
        )
    return folder


def read(
    folder: Path,
    split: str,
    keys: Sequence[str],
    *,
    labels: Mapping[str, Sequence[str]],
    encoded: Sequence[str] = (),
    batch: int = 256,
) -> Iterator[dict[str, Any]]:
    """Examples of a prepared folder, file after file, as dicts of `keys`: bytes and NumPy values.

    labels: feature -> the names that its numbers must stand for.
    encoded: picture features to give as the bytes of their files, not decoded.
    Raises: ValueError if tensorflow is not installed, the split is missing, the labels have
        another order or a file is damaged.
    """
    # none of its notes on the hardware; what goes wrong is raised
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"reading {folder} needs tensorflow and tensorflow-datasets ({error}): "
            "pip install -r requirements.txt, or use --source with the original files"
        ) from error
    # reading data must not take a GPU's memory from somebody's training
    tf.config.set_visible_devices([], "GPU")
    # tfds, tensorflow and protobuf raise exceptions of many kinds for one thing: a damaged folder
    try:
        builder = tfds.builder_from_directory(str(folder))
    except Exception as error:
        raise _damaged(folder, "its metadata", error) from error
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no split {split}, only {sorted(builder.info.splits)}")
    for key in keys:
        if key not in builder.info.features:
            raise ValueError(f"{folder} has no feature {key}")
    for key, names in labels.items():
        found = builder.info.features[key].names
        if list(found) != list(names):
            raise ValueError(
                f"{folder} numbers its {key} {', '.join(found)}; expected {', '.join(names)}"
            )
    info = builder.info.splits[split]
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise ValueError(f"{folder} is not in TFDS's tfrecord format; prepare it in that")
    # parsing whole batches takes a tenth of the time of `as_dataset`, which parses one by one
    wanted = {
        key: tf.io.FixedLenFeature([], tf.int64 if key in labels else tf.string) for key in keys
    }
    pictures = [
        key
        for key in keys
        if key not in encoded and isinstance(builder.info.features[key], tfds.features.Image)
    ]
    count = 0
    try:
        records = tf.data.TFRecordDataset([str(path) for path in info.filepaths])
        parsed = records.batch(batch).map(lambda rows: tf.io.parse_example(rows, wanted))
        for rows in parsed.prefetch(2).as_numpy_iterator():
            for values in zip(*(rows[key] for key in keys), strict=True):
                row = dict(zip(keys, values, strict=True))
                for key in pictures:
                    row[key] = tf.io.decode_image(row[key]).numpy()
                count += 1
                yield row
    except Exception as error:
        raise _damaged(folder, split, error) from error
    if count != info.num_examples:
        raise ValueError(f"{folder} {split} holds {count:,} of {info.num_examples:,} examples")


def _damaged(folder: Path, what: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{folder} is damaged or incomplete ({what}: {reason})")
