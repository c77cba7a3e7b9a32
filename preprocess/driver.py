"""What every task's preparation does, given the task as a record: options, source, routing,
limits, work for the processes, pickles, manifest and report.

    python -m preprocess lra-text --help

A task is a Task: preprocess/tasks/ holds ours, docs/data.md shows one of your own. Its sources
yield (split, where, payload, label), its encoder makes ids of a payload; the rest is here.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import os
import platform
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from preprocess import parallel, writer
from preprocess.sources import Csv, Example, Fault, Parquet, Reader, Tfds, files
from training.data import manifest
from training.errors import UserError

DATA = Path(__file__).resolve().parents[1] / "data"  # whatever the working directory is

MANY_SKIPPED = 0.01  # of all examples: not a few of them are broken but the source
MANY_DOUBLE = 0.05  # of dev or test, found in train too (IMDb: 0.5 %): the source holds itself


@dataclass(frozen=True)
class Task:
    """One task's facts.

    Attributes:
        name: stem of its files. description: for --help.
        classes: names of the labels 0, 1, ...
        length: ids of an example; with `any_length` --padded_length asks for others.
        encoder: (options) -> function from payload to int32 ids [padded_length] (a list of two
            for two sequences), or (ids, {remark: count}); it raises Fault for a broken example
            and can be sent to another process.
        counts: split of the sources -> examples that it is known to have; {}: not known.
        splits: what the sources give. Without dev it is test again, or drawn from train.
        sources: tried in this order on --source.
        places: names in data/ of the default source, the best first; whole: whether one there
            has all that the task needs.
        fetch: name of the archive for download.fetch; how_to_get: what to do if there is none.
        generate: (job) -> Examples made without a source.
        options: adds the task's own options to a parser; stems: (options) -> stems of the files
            if one source makes several sets.
        label_type: of the labels in the pickle. test_part: part of split "all" to test on.
        unneeded: variables of the environment that the original reads and this does not.
        identity: (where, payload) -> bytes that decide on which side of a draw an example is.
    """

    name: str
    description: str
    classes: tuple[str, ...]
    length: int
    encoder: Callable[[argparse.Namespace], Callable[[Any], Any]]
    counts: Mapping[str, int] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "test")
    sources: tuple[Reader | Csv | Parquet | Tfds, ...] = ()
    places: tuple[str, ...] = ()
    whole: Callable[[Path], bool] = lambda path: True
    fetch: str | None = None
    how_to_get: str = ""
    generate: Callable[["Job"], Iterator[Example]] | None = None
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    stems: Callable[[argparse.Namespace], tuple[str, ...]] | None = None
    any_length: bool = False
    num_inputs: int = 1
    label_type: Callable[[int], Any] = np.int64
    test_part: float = 0.1
    unneeded: frozenset[str] = frozenset()
    identity: Callable[[str, Any], bytes] = lambda where, payload: payload


class Job:
    """One run: what sources and generators are given.

    Attributes: task, options, skips; stem, the set being written; about, what the data is, for
    the manifest ("generated"); counts, examples to expect; closing, an ExitStack for the end of
    the run; extras, file name -> array to save beside the pickles; state, for the source's use.
    """

    def __init__(self, task: Task, options: argparse.Namespace):
        self.task, self.options = task, options
        self.skips = Skips(options.on_error)
        self.stem = task.name
        self.about: list[str] = []
        self.counts = dict(task.counts)
        self.closing = contextlib.ExitStack()
        self.extras: dict[str, np.ndarray] = {}
        self.state: Any = None
        self.router = Router(task, options)

    def full(self, split: str) -> bool:
        """Whether nothing of the source's `split` is wanted any more."""
        return self.router.full(split)

    def map(self, function: Callable, items: Iterable):
        """parallel.map_ordered over the processes of the run."""
        return parallel.map_ordered(function, items, self.options.workers)

    def progress(self, total: int | None, unit: str = "example"):
        """A bar on stderr; silent where stderr is no terminal."""
        return tqdm(
            total=total, desc=self.stem, unit=unit, unit_scale=True, disable=None, leave=False
        )


class Absent(UserError):
    """The source has nothing of one of several sets, and the options allow that."""


class Skips:
    """Counts the examples left out, by reason, and names the first few of each reason.

    on_error: "stop" raises UserError at the first one, "skip" goes on.
    """

    NAMED = 3

    def __init__(self, on_error: str = "stop"):
        self.on_error = on_error
        self.counts: collections.Counter[str] = collections.Counter()
        self._names: dict[str, list[str]] = {}

    def skip(self, where: str, reason: str, *, always: bool = False) -> None:
        """Leaves out the example at `where` ("file.tsv, row 17") for a reason that can be counted.

        always: also under "stop" (for faults that the published sources are known to have).
        """
        if self.on_error == "stop" and not always:
            raise UserError(
                f"{where}: {reason} (--on_error skip leaves such examples out and counts them)"
            )
        self.counts[reason] += 1
        names = self._names.setdefault(reason, [])
        if len(names) < self.NAMED:
            names.append(where)

    def report(self, notify: Callable[[str], None] = print) -> None:
        """One line a reason; nothing if nothing was skipped."""
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self._names[reason]) + (" ..." if count > self.NAMED else "")
            notify(f"skipped {count:,}: {reason} ({names})")


class BalancedLimit:
    """Which examples `--limit` keeps: the first of each label 0..num_classes-1, `limit` in all.

    limit None keeps all. `full` is True once every label has its share, so that reading can stop.
    """

    def __init__(self, limit: int | None, num_classes: int):
        self._left: dict[int, int] | None = None
        if limit is not None:
            share, rest = divmod(limit, num_classes)
            self._left = {label: share + (label < rest) for label in range(num_classes)}

    @property
    def full(self) -> bool:
        return self._left is not None and not any(self._left.values())

    def wants(self, label) -> bool:
        """Whether an example of this label would be kept."""
        return self._left is None or self._left.get(int(label), 0) > 0

    def take(self, label) -> bool:
        """The same; counts it if so."""
        if self._left is None:
            return True
        if not self.wants(label):
            return False
        self._left[int(label)] -= 1
        return True


class Router:
    """Which pickle an example goes to.

    Draws depend on the seed and the example's content (or name) alone: from a folder, an archive
    and TFDS the same examples become the development set, and doubles never part.
    """

    def __init__(self, task: Task, options: argparse.Namespace):
        self._task, self._seed = task, options.seed
        self._dev_part = getattr(options, "dev_from_train", None)
        own_dev = "dev" in task.splits or self._dev_part is not None
        self.splits = ("train", "dev", "test") if own_dev else ("train", "test")
        self.limited = options.limit is not None
        limit = (options.limit, len(task.classes))
        self.limits = {split: BalancedLimit(*limit) for split in self.splits}
        # the source's splits whose examples are drawn
        self.drew_test = False
        self.drawing = {"all"} if self._dev_part is None else {"all", "train"}

    def full(self, split: str) -> bool:
        if not self.limited:
            return False
        of_train = ("train",) if self._dev_part is None else ("train", "dev")
        targets = {"all": self.splits, "train": of_train}.get(split, (split,))
        return all(self.limits[target].full for target in targets)

    def route(self, split: str, where: str, payload) -> str:
        """The pickle for an example of the source's `split`."""
        if split == "all":
            self.drew_test = True
            split = (
                "test" if self._drawn("test", self._task.test_part, where, payload) else "train"
            )
        if split == "train" and self._dev_part is not None:
            return "dev" if self._drawn("dev", self._dev_part, where, payload) else "train"
        return split

    def _drawn(self, what: str, part: float, where: str, payload) -> bool:
        return drawn(f"{what} {self._seed}", part, self._task.identity(where, payload))


def drawn(key: str, part: float, identity: bytes) -> bool:
    """Whether the example `identity` is in a sample of about `part` of all; a pure function."""
    digest = hashlib.blake2b(identity, digest_size=8, key=key.encode()).digest()
    return int.from_bytes(digest, "little") < part * 2**64


# ---- options ----------------------------------------------------------------------------------


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def seed(text: str) -> int:
    """argparse type: what NumPy's generators take."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64 - 1")
    return value


def fraction(text: str) -> float:
    """argparse type: a part of the examples."""
    value = float(text)
    if not 0.001 <= value <= 0.999:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.001 and 0.999")
    return value


def parser_of(task: Task) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=task.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tfds = next((source for source in task.sources if isinstance(source, Tfds)), None)
    if task.sources:
        group = parser.add_argument_group("where the data comes from")
        which = group.add_mutually_exclusive_group()
        expected = "; or ".join(s.expected for s in task.sources if not isinstance(s, Tfds))
        which.add_argument("--source", type=Path, help=expected.replace("%", "%%"))
    if tfds:
        which.add_argument(
            "--tfds_dir",
            type=Path,
            help=f"folder with a prepared TFDS {tfds.name} (default: TFDS's own folder, "
            "if it is prepared there)",
        )
    if task.generate and task.sources:
        which.add_argument("--generate", action="store_true", help="made here; needs no source")
    if task.fetch:
        group.add_argument(
            "--no_download", action="store_true", help="fetch nothing (default: what is missing)"
        )
        group.add_argument(
            "--mirror", metavar="URL", help="fetch URL/<official file name> instead"
        )
        group.add_argument("--sha256", help="digest in hex that the fetched file must have")
    task.options(parser)
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=DATA / "lra_processed",
        help="folder of the pickles (default: %(default)s)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="a trial: at most N examples a split, evenly over the classes (default: all)",
    )
    if "dev" not in task.splits:
        group.add_argument(
            "--dev_from_train",
            type=fraction,
            metavar="FRACTION",
            help="draw about this part of the training examples, seeded, as development set "
            "(default: development set = test set, as in the reference)",
        )
    if task.any_length:
        group.add_argument(
            "--padded_length",
            type=positive,
            metavar="N",
            default=task.length,
            help="ids an example, zeros at the end (default: %(default)s)",
        )
    group.add_argument("--seed", type=seed, default=0, help="of all draws (default: %(default)s)")
    group.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="stop at a broken example, or skip, count and report it (default: %(default)s)",
    )
    group.add_argument(
        "--allow_partial",
        action="store_true",
        help="accept a source with other examples than the data set is known to have",
    )
    group.add_argument(
        "--force", action="store_true", help="let a trial or a partial set replace a whole one"
    )
    group.add_argument(
        "--workers",
        type=positive,
        default=parallel.num_cores(),
        metavar="N",
        help="processes; the result does not depend on it (default: all %(default)s cores)",
    )
    parser.set_defaults(source=None, tfds_dir=None, generate=False, padded_length=task.length)
    return parser


# ---- the source -------------------------------------------------------------------------------


def choose_source(task: Task, options: argparse.Namespace, needed: int = 0):
    """(source, path): what the options name, else what is there, else what is fetched; None if
    the task generates its examples. needed: bytes of the pickles, to be free beside a download.

    Raises: UserError saying what was expected or how to get it.
    """
    tfds = next((source for source in task.sources if isinstance(source, Tfds)), None)
    for name in sorted(task.unneeded & os.environ.keys()):
        print(f"{name} ({os.environ[name]}) is not needed: not read")
    if options.generate or not task.sources:
        return None
    if options.source is not None:
        return _accepting(task, options.source), options.source
    if options.tfds_dir is not None:
        folder = tfds.find(options.tfds_dir)
        if folder is None:
            raise UserError(
                f"no prepared {tfds.name} in {options.tfds_dir}: expected {options.tfds_dir}/"
                f"{tfds.name}/<version>/dataset_info.json (--source reads other files)"
            )
        return tfds, folder
    if tfds:
        home = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
        if folder := tfds.find(Path(home)):
            print(f"reading {folder}")
            return tfds, folder
    for place in (DATA / name for name in task.places):
        if not place.exists():
            continue
        if task.whole(place):
            print(f"reading {place}")
            return _accepting(task, place), place
        print(f"{place} has not all of {task.name}: not read")
    if task.generate and not task.fetch:
        print(f"no {' or '.join(task.places)} in {DATA}: the examples are generated")
        return None
    if task.fetch is None or options.no_download:
        raise UserError(
            f"there is nothing to read: no {', no '.join(task.places)} in {DATA}"
            + (f", no prepared TFDS {tfds.name} in {home}" if tfds else "")
            + "; "
            + (task.how_to_get or "without --no_download the data is fetched")
            + "; --source names what you have elsewhere"
        )
    from preprocess import download  # its libraries take a while to import

    if options.mirror is None:
        needed += download.ARCHIVES[task.fetch].size
    writer.check_free_space(options.output_dir, needed)
    try:
        path = download.fetch(task.fetch, DATA, mirror=options.mirror, sha256=options.sha256)
    except ValueError as error:
        raise UserError(str(error)) from error
    return _accepting(task, path), path


def _accepting(task: Task, path: Path):
    if path.exists():
        for source in task.sources:
            if not isinstance(source, Tfds) and source.accepts(path):
                return source
    expected = "; or ".join(s.expected for s in task.sources if not isinstance(s, Tfds))
    state = "is neither a folder nor an archive" if path.exists() else "does not exist"
    raise UserError(f"{path} {state}; expected {expected}")


class _Digest(threading.Thread):
    """SHA-256 of a file, while it is read; of a folder: of the names and sizes in it."""

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self.path, self.error = path, None
        self.result: dict[str, str] = {}

    def run(self) -> None:
        digest = hashlib.sha256()
        try:
            if self.path.is_dir():
                for member in files(self.path):
                    digest.update(f"{member.name}\0{os.stat(member.where).st_size}\n".encode())
                self.result["sha256_of_names_and_sizes"] = digest.hexdigest()
                return
            with open(self.path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            self.result["sha256"] = digest.hexdigest()
        except OSError as error:  # the reader meets it too, or does not need that file
            self.result["sha256"] = f"unreadable: {error.strerror}"


# ---- writing ----------------------------------------------------------------------------------


def run(task: Task, options: argparse.Namespace) -> None:
    """Makes the task's sets as the options ask."""
    job = Job(task, options)
    stems = task.stems(options) if task.stems else (task.name,)
    trial = _trial(job)
    for stem in stems:
        _check_replaceable(options, stem, trial)
    example = 4 * options.padded_length * task.num_inputs + 150
    count = sum(task.counts.values()) if options.limit is None else 3 * options.limit
    needed = len(stems) * count * example  # bytes
    if "dev" not in job.router.splits:
        print(
            "dev and test will be the same examples, as in the reference: the best result on dev "
            "is the best on test (--dev_from_train 0.1 makes an honest development set)"
        )
    found = choose_source(task, options, needed)
    writer.check_free_space(options.output_dir, needed)
    digest = _Digest(found[1]) if found and options.limit is None else None
    if digest:
        digest.start()
    with job.closing:
        for job.stem in stems:
            job.router = Router(task, options)
            if found is None:
                job.about = ["generated"]
                _write_set(job, task.generate(job), 0, {}, None)
                continue
            reader, path = found
            job.about = [reader.about] if reader.about else []
            source = {"kind": type(reader).__name__.lower(), "path": str(path.resolve())}
            try:
                _write_set(job, reader.read(job, path), reader.chunk, source, digest)
            except Absent as absent:
                print(f"warning: {absent}: left out")
    job.skips.report()


def _trial(job: Job) -> str:
    """Why this run makes a trial; empty if it makes the task's whole set."""
    if job.options.limit is not None:
        return f"--limit {job.options.limit}"
    if job.options.padded_length != job.task.length:
        return f"--padded_length {job.options.padded_length}, not {job.task.length}"
    return ""


def _check_replaceable(options: argparse.Namespace, stem: str, trial: str) -> None:
    if trial and not options.force and manifest.is_whole(options.output_dir, stem):
        raise UserError(
            f"{options.output_dir} holds the whole set of {stem}, this is a trial ({trial}): "
            "nothing is replaced; name another --output_dir, or say --force"
        )


class _Tally:
    """What was written: labels by pickle, remarks, and a fingerprint of each example."""

    def __init__(self, splits: Iterable[str]):
        self.labels = {split: array("i") for split in splits}
        self.prints = {split: array("q") for split in splits}
        self.remarks: collections.Counter[str] = collections.Counter()

    def doubles(self) -> Iterator[tuple[str, str, int, int]]:
        """(split, other, how many of its examples are in `other` too, examples in `split`)."""
        train = np.frombuffer(self.prints["train"], np.int64)
        for split in ("dev", "test"):
            own = np.frombuffer(self.prints.get(split, array("q")), np.int64)
            yield split, "train", int(np.isin(own, train).sum()), len(own)


def _write_set(job: Job, examples: Iterator[Example], chunk: int, source, digest) -> None:
    task, options, start = job.task, job.options, time.perf_counter()
    encode = task.encoder(options)
    tally = _Tally(job.router.splits)
    with (
        writer.open_set(options.output_dir, job.stem, job.router.splits) as written,
        job.progress(None) as bar,
    ):
        if chunk:
            _encode_in_processes(job, examples, encode, chunk, written, tally, bar)
        else:
            _encode_here(job, examples, encode, written, tally, bar)

        def check() -> None:
            partial, warnings = _problems(job, written, tally)
            trial = _trial(job) or partial
            for warning in warnings:
                print(f"warning: {warning}")
            _check_replaceable(options, job.stem, trial)
            if digest:
                digest.join()
                source.update(digest.result)
            written.facts = _facts(job, tally, source, trial, warnings)
            for name, array_ in job.extras.items():
                np.save(options.output_dir / name, array_)

        written.before_publishing = check
    for remark, count in tally.remarks.items():
        print(f"{count:,} {remark}")
    seconds = time.perf_counter() - start
    count = sum(file.count for file in written.values())
    print(
        f"{count:,} examples in {seconds:.1f} s ({count / seconds:,.0f}/s), "
        f"peak memory {parallel.peak_memory() / 2**20:,.0f} MiB"
    )


def _encode_here(job: Job, examples, encode, written, tally: _Tally, bar) -> None:
    # a microsecond an example is a tenth of the time of lra-news1: nothing is looked up twice
    router, label_type = job.router, job.task.label_type
    route, limits, limited, drawing = router.route, router.limits, router.limited, router.drawing
    outputs = {
        split: (file, tally.labels[split].append, tally.prints[split].append)
        for split, file in written.items()
    }
    for split, where, payload, label in examples:
        target = route(split, where, payload) if split in drawing else split
        if limited and not limits[target].wants(label):
            continue
        try:
            ids = encode(payload)
        except Fault as fault:
            job.skips.skip(where, fault.reason, always=fault.always)
            continue
        if type(ids) is tuple:
            ids, remarks = ids
            tally.remarks.update(remarks)
        if limited:
            limits[target].take(label)
        file, add_label, add_print = outputs[target]
        if isinstance(ids, np.ndarray):
            file.add(ids, label_type(label))
            add_print(hash(payload if type(payload) is bytes else payload.tobytes()))
        elif type(ids) is list:
            file.add(ids[0], label_type(label), ids[1])
            add_print(hash((payload[0][:500], payload[1][:500])))  # of long texts enough
        else:
            file.add_encoded(ids)  # generated: without doubles
        add_label(label)
        bar.update()


def _encode_in_processes(job: Job, examples, encode, chunk, written, tally: _Tally, bar) -> None:
    waiting: collections.deque[tuple[str, str, int]] = collections.deque()

    def wanted():
        for split, where, payload, label in examples:
            target = job.router.route(split, where, payload)
            if job.router.limits[target].wants(label):
                waiting.append((where, target, label))
                yield payload, label

    function = functools.partial(_encode_chunk, encode, job.task.label_type)
    with job.map(function, parallel.chunks(wanted(), chunk)) as chunks:
        for results, remarks in chunks:
            tally.remarks.update(remarks)
            for result in results:
                where, target, label = waiting.popleft()
                if isinstance(result, Fault):
                    job.skips.skip(where, result.reason, always=result.always)
                elif job.router.limits[target].take(label):
                    written[target].add_encoded(result)
                    tally.labels[target].append(label)
                    tally.prints[target].append(hash(result))
            bar.update(len(results))


def _encode_chunk(encode, label_type, chunk) -> tuple[list[bytes | Fault], Mapping[str, int]]:
    """Pickle opcodes of each (payload, label), or why there are none; remarks."""
    results: list[bytes | Fault] = []
    remarks: collections.Counter[str] = collections.Counter()
    for payload, label in chunk:
        try:
            ids = encode(payload)
        except Fault as fault:
            results.append(fault)
            continue
        if type(ids) is tuple:
            ids, more = ids
            remarks.update(more)
        results.append(writer.encode_example(ids, label_type(label)))
    return results, remarks


def _problems(job: Job, written, tally: _Tally) -> tuple[str, list[str]]:
    """(why the set is not whole or "", everything worth a warning).

    Raises: UserError unless the options allow for it.
    """
    task, options, skipped = job.task, job.options, job.skips.counts.total()
    got = {split: file.count for split, file in written.items()}
    total = sum(got.values())
    partial, found = "", []
    if options.limit is None and job.counts:
        known = dict(job.counts)
        if "dev" not in known and "dev" in got:
            got["train"] += got.pop("dev")
        if job.router.drew_test or "all" in known:
            known, got = {"all": sum(known.values())}, {"all": total}
        lacking = [known[split] - got.get(split, 0) for split in known]
        if any(not 0 <= count <= skipped for count in lacking):
            numbers = (" / ".join(f"{n:,}" for n in counts.values()) for counts in (got, known))
            partial = "{} examples, known are {}".format(*numbers)
            found.append(
                f"{job.stem} has {partial} ({', '.join(got)}): the source is cut off, holds "
                "something twice or is another one"
            )
    if skipped > MANY_SKIPPED * (total + skipped):
        found.append(f"{skipped:,} of {total + skipped:,} examples had to be skipped")
    for split, labels in tally.labels.items():
        seen = set(labels)
        absent = [name for label, name in enumerate(task.classes) if label not in seen]
        if absent and (options.limit or len(task.classes)) >= len(task.classes):
            found.append(f"{split} has no example of {', '.join(absent)}")
    for split, other, double, count in tally.doubles():
        if double > MANY_DOUBLE * count:
            found.append(f"{double:,} of {count:,} examples of {split} are in {other} too")
    allowed = options.allow_partial or options.limit is not None or job.counts != task.counts
    if found and not allowed:
        raise UserError(f"{found[0]}; nothing is written (--allow_partial takes it as it is)")
    if job.counts != task.counts and not partial:
        partial = " / ".join(f"{n:,}" for n in job.counts.values()) + " examples"
    return partial, found


def _facts(job: Job, tally: _Tally, source, trial: str, warnings: list[str]) -> dict:
    """What the manifest says besides the files."""
    modules = {"pillow": "PIL", **{m: m for m in ("numpy", "pyarrow", "tensorflow_datasets")}}
    return {
        "task": job.stem,
        "about": job.about,
        "trial": trial,
        "warnings": warnings,
        "source": source,
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in sorted(vars(job.options).items())
        },
        "seed": job.options.seed,
        "versions": {
            "python": platform.python_version(),
            **{n: sys.modules[m].__version__ for n, m in modules.items() if m in sys.modules},
        },
        "labels": {
            split: {name: labels.count(label) for label, name in enumerate(job.task.classes)}
            for split, labels in tally.labels.items()
        },
        "skipped": dict(job.skips.counts),
    }


# ---- the frame --------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM, as an exception: the same way out as SIGINT."""


def _raise_terminated(number, frame):
    raise _Terminated


def main(task: Task, argv: list[str] | None = None) -> int:
    """A task's command; its exit code: 0; 2 or, if memory or a worker died, 1 (one sentence on
    stderr); 130 or 143 (a signal)."""
    options = parser_of(task).parse_args(argv)
    return guarded(lambda: run(task, options))


def guarded(function: Callable[[], None]) -> int:
    """Runs a command's body; its exit code, as `main` says."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    sys.setswitchinterval(1e-4)  # seconds: threads that write or wait for workers get their turn
    left = "nothing half-written is left"
    try:
        function()
        return 0
    except KeyboardInterrupt:
        code, text = 130, f"interrupted: {left}, run it again to start anew"
    except _Terminated:
        code, text = 143, f"terminated: {left}, run it again to start anew"
    except parallel.WorkerDied as error:
        code = 1
        text = (
            f"error: a worker process was killed (exit code {error}; -9: most often because the "
            f"memory is full), {left}; try --workers 1"
        )
    except MemoryError:
        code, text = 1, f"error: the memory is full, {left}; try --workers 1"
    except (UserError, OSError) as error:
        code, text = 2, f"error: {_sentence(error)}"
    print(text, file=sys.stderr)
    return code


def _sentence(error: UserError | OSError) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; nothing half-written is left (--output_dir names another place)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'reading or writing'}: {error.strerror}"
    return str(error)
