"""A data pickle as batches of tensors.

The first time a pickle is opened its arrays are written once, as memory-mapped .npy files of the
smallest unsigned type that holds the ids (training/data/cache.py); later starts map them, in
milliseconds, and processes share their pages. If no cache can be written, the arrays stay in
memory.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training import shell
from training.data import manifest
from training.data.cache import (
    NPY_HEADER,
    Column,
    Wanted,
    cache_folders,
    convert,
    file_state,
    open_cache,
    write_cache,
    writing,
)
from training.data.examples import Dataset
from training.errors import UserError

TOO_LARGE = 8  # times the task's size: no longer a variant of it


_SCRIPTS = {
    "lra-image": "create_cifar10.py",
    "lra-listops": "create_listops.py",
    "lra-text": "create_text.py",
    "lra-retrieval": "create_retrieval.py",
    "lra-pathfinder32": "create_pathfinder.py",
    "lra-news1": "create_agnews.py",
    "lra-yelp1": "create_yelp.py",
    "lra-nature": "create_inaturalist.py",
}


def open_dataset(
    path,
    *,
    vocab_size: int,
    length: int,
    num_classes: int,
    num_inputs: int,
    expected_size: int | None = None,
    cache_dir=None,
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Opens a data pickle (docs/data.md), by its cache if there is a valid one.

    Args:
        vocab_size, length, num_classes: what the ids (0..vocab_size-1), their number in every
        example, and the labels
            (0..num_classes-1) are checked against.
        num_inputs: 2 if the examples have input_ids_1 as well, else 1.
        expected_size: examples that the task has; a pickle TOO_LARGE times as large is refused
        before it is read.
        cache_dir: folder of the cache instead of the pickle's own folder and the user's cache
        folder.
        notify: gets one line about anything that takes time or differs from the usual.
    Raises: UserError, one sentence naming file, item and value; OSError if the pickle cannot be
    read.
    """
    wanted = Wanted(Path(path), vocab_size, length, num_classes, num_inputs)
    wanted.sha256 = manifest.expected_sha256(wanted.path)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise UserError(_missing(Path(path))) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a data pickle") from None
    with file:
        _check_size(file, wanted, expected_size)
        for folder in cache_folders(Path(path), cache_dir):
            dataset = open_cache(folder, file, wanted)
            if dataset is not None:
                return dataset
        reasons = []
        for folder in cache_folders(Path(path), cache_dir):
            try:
                with writing(folder, notify):
                    dataset = open_cache(
                        folder, file, wanted
                    )  # another process may have written it
                    if dataset is not None:
                        return dataset
                    notify(f"{path}: converting once to memory-mapped arrays in {folder}")
                    write_cache(folder, file, wanted)
                dataset = open_cache(folder, file, wanted)
                if dataset is not None:
                    return dataset
                reasons.append(f"{folder}: removed while it was written")
            except OSError as error:
                dataset = open_cache(folder, file, wanted)  # while we hung, another wrote it
                if dataset is not None:
                    return dataset
                reasons.append(f"{folder}: {error.strerror or error}")
        notify(f"{path}: kept in memory, no cache could be written ({'; '.join(reasons)})")
        return _read_into_memory(file, wanted)


def script_of(task: str) -> str | None:
    """The script that makes a task's pickles; a file's name does for the task's."""
    found = (script for name, script in _SCRIPTS.items() if task.startswith(name))
    return next((f"preprocess/{script}" for script in found), None)


def _missing(path: Path) -> str:
    script = script_of(path.name)
    if script is None:
        return f"{path} does not exist"
    return f"{path} does not exist: make it with {shell.command(shell.ROOT / script, [])}"


def _check_size(file: BinaryIO, wanted: Wanted, expected_size: int | None) -> None:
    if expected_size is None:
        return
    size = os.fstat(file.fileno()).st_size
    task = (
        expected_size * wanted.num_inputs * (4 * wanted.length + 150)
    )  # 4 bytes an id and what surrounds them
    if size > TOO_LARGE * task:
        raise UserError(
            f"{wanted.path} has {size / 1e9:,.1f} GB, {size / task:,.0f} times what the task's "
            f"{expected_size:,} examples need (the original create_cifar10.py repeats its train "
            "split without end): make it again, or set the task's dataset size if it is meant"
        )


def _read_into_memory(file: BinaryIO, wanted: Wanted) -> Dataset:
    needed, available = file_state(file)["size"] // 4, _available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"{wanted.path} needs {needed / 1e9:,.1f} GB of memory, {available / 1e9:,.1f} GB are "
            "available: free some disk space for its cache instead"
        )
    files = [io.BytesIO() for _ in (*wanted.keys, "label")]
    columns = [Column(f) for f in files]
    digest = hashlib.sha256()
    convert(file, wanted, columns, on_read=digest.update)
    wanted.check_sha256(digest.hexdigest())
    arrays = []
    for column, f in zip(columns, files, strict=True):
        column.finish()
        flat = np.frombuffer(f.getbuffer(), column.dtype, offset=NPY_HEADER)
        arrays.append(flat.reshape(column.shape))
    labels = arrays.pop()
    return Dataset(arrays, labels, digest.hexdigest())


def _available_memory() -> int | None:
    """Bytes, where the system says so."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
