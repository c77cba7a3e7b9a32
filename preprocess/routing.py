"""Which pickle an example goes to, for tasks whose published data has no development set.

The reference uses the test examples for development too. We do the same unless --dev_from_train
takes an honest development set from the training examples.
"""

import argparse
import contextlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from preprocess import tfds_source, writer

# dev examples are drawn from consecutive runs of this many training examples: their number need
# not be known beforehand, and the fraction is exact whenever 1,000 divides it
DRAW = 1000


def add_source_options(parser: argparse.ArgumentParser, source_help: str, tfds_name: str) -> None:
    """--source and --tfds_dir, of which at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--source", type=Path, help=source_help)
    group.add_argument(
        "--tfds_dir",
        type=Path,
        help=f"folder with a prepared TFDS {tfds_name} (default: TFDS's own folder, "
        "if it is prepared there)",
    )


def choose_source(
    args: argparse.Namespace, task: str, tfds_name: str, download: Path | None
) -> tuple[str, Path]:
    """("tfds", prepared folder) or ("source", path): what the options name, else what is there.

    download: where download.py leaves the task's archive; None: it does not fetch this one.
    Raises: ValueError at once if there is nothing, saying how to get it.
    """
    if args.source is not None:
        return "source", args.source
    if args.tfds_dir is not None:
        return "tfds", tfds_source.prepared(tfds_name, args.tfds_dir)
    default = tfds_source.default_folder()
    folder = tfds_source.find_prepared(tfds_name, default)
    if folder is not None:
        print(f"reading {folder}")
        return "tfds", folder
    if download is not None and download.exists():
        print(f"reading {download}")
        return "source", download
    if download is None:
        absent, fetch = "", ""
    else:
        absent = f" and no {download}"
        fetch = f"python preprocess/download.py --task {task} fetches the latter; "
    raise ValueError(
        f"no prepared TFDS {tfds_name} in {default}{absent}: "
        f"{fetch}--source or --tfds_dir read what you have elsewhere"
    )


def add_dev_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dev_from_train",
        type=fraction,
        metavar="FRACTION",
        help="take this part of the training examples, seeded, as development set "
        "(default: development set = test set, as in the reference)",
    )


def fraction(text: str) -> float:
    """argparse type: a number that leaves at least one of 1,000 examples on each side."""
    value = float(text)
    if not 1 <= round(value * DRAW) < DRAW:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.001 and 0.999")
    return value


def drawn(index: int, part: float, seed: int) -> bool:
    """Whether example `index` is in a seeded sample of `part` of all; a pure function.

    Of every 1,000 consecutive indices exactly round(1000 * part) are.
    """
    return bool(_block(index // DRAW, part, seed)[index % DRAW])


_blocks: dict[tuple[int, float, int], np.ndarray] = {}


def _block(number: int, part: float, seed: int) -> np.ndarray:
    """bool [DRAW], the last one asked for is kept: indices come in order."""
    key = (number, part, seed)
    if key not in _blocks:
        # raw draws keep their sequence in every NumPy, those of its `permutation` may change
        raw = np.random.PCG64([seed, number]).random_raw(DRAW)
        chosen = np.argsort(raw, kind="stable")[: round(part * DRAW)]
        block = np.zeros(DRAW, dtype=bool)
        block[chosen] = True
        _blocks.clear()
        _blocks[key] = block
    return _blocks[key]


class Router:
    """Decides for each example in turn the splits that it is written to.

    Args:
        limit: examples per split, balanced over the labels; None: all.
        dev_from_train: part of train that becomes dev; None: dev will be test's file.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        limit: int | None = None,
        dev_from_train: float | None = None,
        seed: int = 0,
    ):
        self.splits = ("train", "test") if dev_from_train is None else ("train", "dev", "test")
        self._fraction = dev_from_train
        self._seed = seed
        self._seen = {"train": 0, "test": 0}
        self._limits = {split: writer.BalancedLimit(limit, num_classes) for split in self.splits}

    def full(self, split: str) -> bool:
        """Whether nothing of the source's `split` (train or test) is wanted any more."""
        if split == "train" and self._fraction is not None:
            return self._limits["train"].full and self._limits["dev"].full
        return self._limits[split].full

    def route(self, split: str, label: int) -> str | None:
        """The pickle for the next example of the source's `split`; None: not wanted."""
        index = self._seen[split]
        self._seen[split] += 1
        part = self._fraction
        if split == "train" and part is not None and drawn(index, part, self._seed):
            split = "dev"
        return split if self._limits[split].take(label) else None


def router_of(args: argparse.Namespace, num_classes: int) -> Router:
    """The Router that the options ask for; says once that dev is test if it is."""
    if args.dev_from_train is None:
        print(
            "dev and test will be the same examples, as in the reference: the best result on dev "
            "is the best on test (--dev_from_train 0.1 makes an honest development set)"
        )
    return Router(
        num_classes, limit=args.limit, dev_from_train=args.dev_from_train, seed=args.seed
    )


@contextlib.contextmanager
def open_splits(
    output_dir: Path, task: str, router: Router
) -> Iterator[dict[str, writer.SplitWriter]]:
    """The writers of the router's splits, measured; at the end dev becomes test's file if it has
    none of its own: a hard link, which costs neither time nor space, or a copy."""
    with writer.open_splits(output_dir, task, router.splits) as writers, measured(writers):
        yield writers
    if "dev" in router.splits:
        return
    test, dev = (output_dir / f"{task}.{split}.pickle" for split in ("test", "dev"))
    part = dev.with_name(dev.name + ".part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(test, part)
        except OSError:  # a file system without links
            shutil.copyfile(test, part)
        os.replace(part, dev)
    finally:
        part.unlink(missing_ok=True)
    print(f"{dev}: the same file as {test.name}")


@contextlib.contextmanager
def measured(splits: dict[str, writer.SplitWriter]) -> Iterator[None]:
    """Prints how fast the block wrote and the peak memory of the whole process."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    count = sum(split.count for split in splits.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(
        f"{count:,} examples in {seconds:.1f} s ({count / seconds:,.0f}/s), "
        f"peak memory {peak / 2**20:,.0f} MiB"
    )
