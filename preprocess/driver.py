"""What every task's preparation does, given the task as a record, a Task: preprocess/tasks/ holds
ours, docs/data.md shows one of your own. Its sources yield (split, where, payload, label), its
encoder makes ids of a payload; the rest is here.
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
    """One task's facts."""

    name: str  # stem of its files
    description: str  # for --help
    classes: tuple[str, ...]  # names of the labels 0, 1, ...
    length: int  # ids of an example; with `any_length` --padded_length asks for others
    # (options) -> function, for any process, from payload to int32 ids [padded_length] (a list of
    # two for two sequences), or (ids, {remark: count}); it raises Fault for a broken example
    encoder: Callable[[argparse.Namespace], Callable[[Any], Any]]
    # split of the sources -> examples that it is known to have; {}: not known
    counts: Mapping[str, int] = field(default_factory=dict)
    # what the sources give; without dev it is test again, or drawn from train
    splits: tuple[str, ...] = ("train", "test")
    sources: tuple[Reader | Csv | Parquet, ...] = ()  # tried in this order on --source
    places: tuple[str, ...] = ()  # names in data/ of the default source, the best first
    whole: Callable[[Path], bool] = lambda path: True  # whether a place has all that is needed
    fetch: str | None = None  # name of the archive for download.fetch
    how_to_get: str = ""  # what to do if there is none
    generate: Callable[["Job"], Iterator[Example]] | None = None  # without a source
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None  # the task's own
    # (options) -> stems of the files, if one source makes several sets
    stems: Callable[[argparse.Namespace], tuple[str, ...]] | None = None
    any_length: bool = False
    num_inputs: int = 1
    label_type: Callable[[int], Any] = np.int64  # of the labels in the pickle
    test_part: float = 0.1  # part of split "all" to test on
    unneeded: frozenset[str] = frozenset()  # variables that the original reads and this does not
    # (where, payload) -> bytes that decide on which side of a draw an example is
    identity: Callable[[str, Any], bytes] = lambda where, payload: payload
    tfds: Tfds | None = None  # a prepared folder, for --tfds_dir

    @property
    def expected(self) -> str:
        return "; or ".join(source.expected for source in self.sources)


class Job:
    """One run: what sources and generators are given, and which pickle an example goes to. Draws
    depend on the seed and the example's content (or name) alone: the same from a folder, an
    archive and TFDS; doubles never part."""

    def __init__(self, task: Task, options: argparse.Namespace):
        self.task, self.options = task, options
        self.skips = Skips(options.on_error)
        self.counts = dict(task.counts)  # examples to expect
        self.closing = contextlib.ExitStack()  # for the end of the run
        self.extras: dict[str, np.ndarray] = {}  # file name -> array to save beside the pickles
        self.state: Any = None  # for the source's use
        self._dev_part = getattr(options, "dev_from_train", None)
        own_dev = "dev" in task.splits or self._dev_part is not None
        self.splits = ("train", "dev", "test") if own_dev else ("train", "test")
        # the source's splits whose examples are drawn
        self.drawing = {"all"} if self._dev_part is None else {"all", "train"}
        self.drew_test = False
        self.begin(task.name)

    def begin(self, stem: str) -> None:
        """The set being written, by the stem of its files."""
        self.stem = stem
        self.about: list[str] = []  # what the data is, for the manifest ("generated")
        self.remarks: collections.Counter[str] = collections.Counter()
        limit = self.options.limit, len(self.task.classes)
        self.limits = {split: BalancedLimit(*limit) for split in self.splits}

    def full(self, split: str) -> bool:
        """Whether nothing of the source's `split` is wanted any more."""
        if self.options.limit is None:
            return False
        of_train = ("train",) if self._dev_part is None else ("train", "dev")
        targets = {"all": self.splits, "train": of_train}.get(split, (split,))
        return all(self.limits[target].full for target in targets)

    def route(self, split: str, where: str, payload) -> str:
        """The pickle for an example of the source's `split`."""
        draws = []
        if split == "all":
            self.drew_test = True
            draws.append(("test", self.task.test_part))
        if split != "test" and self._dev_part is not None:
            draws.append(("dev", self._dev_part))
        for target, part in draws:
            key = f"{target} {self.options.seed}"
            if drawn(key, part, self.task.identity(where, payload)):
                return target
        return "train" if split == "all" else split

    def map(self, function: Callable, items: Iterable):
        """parallel.map_ordered over the processes of the run."""
        return parallel.map_ordered(function, items, self.options.workers)

    def progress(self, total: int | None, unit: str = "example"):
        """A bar on stderr; silent where stderr is no terminal."""
        return tqdm(None, self.stem, total, unit=unit, unit_scale=True, disable=None, leave=False)

    def trial(self) -> str:
        """Why this run makes a trial; empty if it makes the task's whole set."""
        if self.options.limit is not None:
            return f"--limit {self.options.limit}"
        if self.options.padded_length != self.task.length:
            return f"--padded_length {self.options.padded_length}, not {self.task.length}"
        return ""

    def check_replaceable(self, stem: str, trial: str) -> None:
        folder = self.options.output_dir
        if trial and not self.options.force and manifest.is_whole(folder, stem):
            what = f"{folder} holds the whole set of {stem}, this is a trial ({trial})"
            raise UserError(
                f"{what}: nothing is replaced; name another --output_dir, or say --force"
            )


class Absent(UserError):
    """The source has nothing of one of several sets, and the options allow that."""


class Skips:
    """Counts the examples left out, by reason, and names the first few of each reason; with
    on_error "stop" raises UserError at the first one."""

    def __init__(self, on_error: str = "stop"):
        self.on_error = on_error
        self.counts: collections.Counter[str] = collections.Counter()
        self._names: collections.defaultdict[str, list[str]] = collections.defaultdict(list)

    def skip(self, where: str, reason: str, *, always: bool = False) -> None:
        """Leaves out the example at `where` ("file.tsv, row 17") for a reason that can be counted;
        always: also under "stop" (for faults that the published sources are known to have)."""
        if self.on_error == "stop" and not always:
            raise UserError(f"{where}: {reason} (--on_error skip leaves out and counts such)")
        self.counts[reason] += 1
        if self.counts[reason] <= 3:
            self._names[reason].append(where)

    def report(self, notify: Callable[[str], None] = print) -> None:
        """One line a reason; nothing if nothing was skipped."""
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self._names[reason]) + (" ..." if count > 3 else "")
            notify(f"skipped {count:,}: {reason} ({names})")


class BalancedLimit:
    """Which examples `--limit` keeps: the first of each label 0..num_classes-1, `limit` in all
    (None: all). `full` once every label has its share, so that reading can stop."""

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
        wanted = self.wants(label)
        if wanted and self._left is not None:
            self._left[int(label)] -= 1
        return wanted


def drawn(key: str, part: float, identity: bytes) -> bool:
    """Whether the example `identity` is in a sample of about `part` of all."""
    digest = hashlib.blake2b(identity, digest_size=8, key=key.encode()).digest()
    return int.from_bytes(digest, "little") < part * 2**64


def number(kind: type, low, high=None) -> Callable[[str], Any]:
    """argparse type: an int or a float between two bounds."""

    def parse(text: str):
        value = kind(text)
        if not (value >= low and (high is None or value <= high)):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


positive = number(int, 1)
fraction = number(float, 0.001, 0.999)


def parser_of(task: Task) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=task.description, formatter_class=raw)
    tfds = task.tfds
    if task.sources or tfds:
        group = parser.add_argument_group("where the data comes from")
        which = group.add_mutually_exclusive_group()
        which.add_argument("--source", type=Path, help=task.expected.replace("%", "%%"))
    if tfds:
        text = f"folder with a prepared TFDS {tfds.name} (default: TFDS's own, if it is there)"
        which.add_argument("--tfds_dir", type=Path, help=text)
    if task.generate and task.sources:
        which.add_argument("--generate", action="store_true", help="made here; needs no source")
    if task.fetch:
        group.add_argument("--no_download", action="store_true", help="fetch nothing")
        group.add_argument("--mirror", metavar="URL", help="fetch URL/<official name> instead")
        group.add_argument("--sha256", help="digest in hex that the fetched file must have")
    task.options(parser)
    group = parser.add_argument_group("what is written")
    folder, text = DATA / "lra_processed", "folder of the pickles (default: %(default)s)"
    group.add_argument("--output_dir", type=Path, default=folder, help=text)
    text = "a trial: at most N examples a split, evenly over the classes (default: all)"
    group.add_argument("--limit", type=positive, metavar="N", help=text)
    if "dev" not in task.splits:
        text = "draw about this part of train as dev (default: dev = test, as in the reference)"
        group.add_argument("--dev_from_train", type=fraction, metavar="FRACTION", help=text)
    if task.any_length:
        text = "ids an example, zeros at the end (default: %(default)s)"
        own = {"default": task.length, "help": text}
        group.add_argument("--padded_length", type=positive, metavar="N", **own)
    seed, text = number(int, 0, 2**64 - 1), "of all draws (default: %(default)s)"
    group.add_argument("--seed", type=seed, default=0, help=text)
    text = "stop at a broken example, or skip, count and report it (default: %(default)s)"
    group.add_argument("--on_error", choices=("stop", "skip"), default="stop", help=text)
    text = "accept a source that is not the whole data set as it is known"
    group.add_argument("--allow_partial", action="store_true", help=text)
    group.add_argument("--force", action="store_true", help="let a trial replace a whole set")
    cores, text = parallel.num_cores(), "processes; the result is the same (default: all cores)"
    group.add_argument("--workers", type=positive, default=cores, metavar="N", help=text)
    parser.set_defaults(source=None, tfds_dir=None, generate=False, padded_length=task.length)
    return parser


def choose_source(task: Task, options: argparse.Namespace, needed: int = 0):
    """(source, path): what the options name, else what is there, else what is fetched; None if
    the task generates its examples. needed: bytes of the pickles, to be free beside a download.
    Raises: UserError saying what was expected or how to get it."""
    tfds = task.tfds
    for name in sorted(task.unneeded & os.environ.keys()):
        print(f"{name} ({os.environ[name]}) is not needed: not read")
    if options.generate or not (task.sources or tfds):
        return None
    if options.source is not None:
        return _accepting(task, options.source)
    if options.tfds_dir is not None:
        if folder := tfds.find(options.tfds_dir):
            return tfds, folder
        expected = f"{tfds.name}/<version>/dataset_info.json (--source reads other files)"
        raise UserError(f"no prepared {tfds.name} in {options.tfds_dir}: expected {expected}")
    home = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    if tfds and (folder := tfds.find(Path(home))):
        print(f"reading {folder}")
        return tfds, folder
    for place in (DATA / name for name in task.places):
        if place.exists() and task.whole(place):
            print(f"reading {place}")
            return _accepting(task, place)
        if place.exists():
            print(f"{place} has not all of {task.name}: not read")
    if task.generate and not task.fetch:
        print(f"no {' or '.join(task.places)} in {DATA}: the examples are generated")
        return None
    if task.fetch is None or options.no_download:
        absent = f"no {', no '.join(task.places)} in {DATA}"
        absent += f", no prepared TFDS {tfds.name} in {home}" if tfds else ""
        todo = task.how_to_get or "without --no_download the data is fetched"
        other = "--source names what you have elsewhere"
        raise UserError(f"there is nothing to read: {absent}; {todo}; {other}")
    from preprocess import download  # its libraries take a while to import

    if options.mirror is None:
        needed += download.ARCHIVES[task.fetch].size
    writer.check_free_space(options.output_dir, needed)
    path = download.fetch(task.fetch, DATA, mirror=options.mirror, sha256=options.sha256)
    return _accepting(task, path)


def _accepting(task: Task, path: Path):
    for source in task.sources if path.exists() else ():
        if source.accepts(path):
            return source, path
    state = "is neither a folder nor an archive" if path.exists() else "does not exist"
    raise UserError(f"{path} {state}; expected {task.expected}")


def _digest(path: Path, result: dict[str, str]) -> None:
    """SHA-256 of a file; of a folder: of the names and sizes in it."""
    try:
        if path.is_dir():
            digest = hashlib.sha256()
            for member in files(path):
                digest.update(f"{member.name}\0{os.stat(member.where).st_size}\n".encode())
            result["sha256_of_names_and_sizes"] = digest.hexdigest()
        else:
            result["sha256"] = writer.sha256(path)
    except (OSError, UserError) as error:  # the reader meets it too, or does not need that file
        result["sha256"] = f"unreadable: {getattr(error, 'strerror', error)}"


def run(task: Task, options: argparse.Namespace) -> None:
    """Makes the task's sets as the options ask."""
    job = Job(task, options)
    stems = task.stems(options) if task.stems else (task.name,)
    for stem in stems:
        job.check_replaceable(stem, job.trial())
    count = sum(task.counts.values()) if options.limit is None else 3 * options.limit
    needed = len(stems) * count * (4 * options.padded_length * task.num_inputs + 150)  # bytes
    if "dev" not in job.splits:
        honest = "--dev_from_train 0.1 draws an honest development set"
        print(f"dev and test will be the same examples, as in the reference ({honest})")
    found = choose_source(task, options, needed)
    writer.check_free_space(options.output_dir, needed)
    source: dict[str, str] = {}
    hashing = None
    if found is not None:
        reader, path = found
        source = {"kind": type(reader).__name__.lower(), "path": str(path.resolve())}
        if options.limit is None:  # while it is read
            hashing = threading.Thread(target=_digest, args=(path, source), daemon=True)
            hashing.start()
    with job.closing:
        for stem in stems:
            job.begin(stem)
            if found is None:
                job.about = ["generated"]
                _write_set(job, task.generate(job), 0, source, None)
                continue
            job.about = [reader.about] if reader.about else []
            try:
                _write_set(job, reader.read(job, path), reader.chunk, source, hashing)
            except Absent as absent:
                print(f"warning: {absent}: left out")
    job.skips.report()


def _write_set(job: Job, examples: Iterator[Example], chunk: int, source, hashing) -> None:
    task, options, start = job.task, job.options, time.perf_counter()
    encode = task.encoder(options)

    def facts() -> dict:
        """What the manifest says besides the files."""
        partial, warnings = _problems(job, written)
        trial = job.trial() or partial
        for warning in warnings:
            print(f"warning: {warning}")
        job.check_replaceable(job.stem, trial)
        if hashing:
            hashing.join()
        for name, extra in job.extras.items():
            np.save(options.output_dir / name, extra)
        modules = {"pillow": "PIL", **{m: m for m in ("numpy", "pyarrow", "tensorflow_datasets")}}
        versions = {n: sys.modules[m].__version__ for n, m in modules.items() if m in sys.modules}
        return {
            "task": job.stem,
            "about": job.about,
            "trial": trial,
            "warnings": warnings,
            "source": source,
            "options": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in sorted(vars(options).items())
            },
            "seed": options.seed,
            "versions": {"python": platform.python_version(), **versions},
            "labels": {
                split: {name: file.labels.count(i) for i, name in enumerate(task.classes)}
                for split, file in written.items()
            },
            "skipped": dict(job.skips.counts),
        }

    files = writer.open_set(options.output_dir, job.stem, job.splits, facts)
    with files as written, job.progress(None) as bar:
        if chunk:
            _encode_in_processes(job, examples, encode, chunk, written, bar)
        else:
            _encode_here(job, examples, encode, written, bar)
    for remark, count in job.remarks.items():
        print(f"{count:,} {remark}")
    seconds = time.perf_counter() - start
    count = sum(file.count for file in written.values())
    memory = f"peak memory {parallel.peak_memory() / 2**20:,.0f} MiB"
    print(f"{count:,} examples in {seconds:.1f} s ({count / seconds:,.0f}/s), {memory}")


def _encode_here(job: Job, examples, encode, written, bar) -> None:
    # a microsecond an example is a tenth of the time of lra-news1: nothing is looked up twice
    route, limits, drawing, label_type = job.route, job.limits, job.drawing, job.task.label_type
    limited = job.options.limit is not None
    outputs = {
        split: (file, file.labels.append, file.prints.append) for split, file in written.items()
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
            job.remarks.update(remarks)
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


def _encode_in_processes(job: Job, examples, encode, chunk, written, bar) -> None:
    waiting: collections.deque[tuple[str, str, int]] = collections.deque()

    def wanted():
        for split, where, payload, label in examples:
            target = job.route(split, where, payload)
            if job.limits[target].wants(label):
                waiting.append((where, target, label))
                yield payload, label

    function = functools.partial(_encode_chunk, encode, job.task.label_type)
    with job.map(function, parallel.chunks(wanted(), chunk)) as chunks:
        for results, remarks in chunks:
            job.remarks.update(remarks)
            for result in results:
                where, target, label = waiting.popleft()
                if isinstance(result, Fault):
                    job.skips.skip(where, result.reason, always=result.always)
                elif job.limits[target].take(label):
                    written[target].add_encoded(result)
                    written[target].labels.append(label)
                    written[target].prints.append(hash(result))
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


def _problems(job: Job, written) -> tuple[str, list[str]]:
    """(why the set is not whole or "", everything worth a warning). Raises: UserError unless the
    options allow for it."""
    task, options, skipped = job.task, job.options, job.skips.counts.total()
    got = {split: file.count for split, file in written.items()}
    total = sum(got.values())
    partial, found = "", []
    if options.limit is None and job.counts:
        known = dict(job.counts)
        if "dev" not in known and "dev" in got:
            got["train"] += got.pop("dev")
        if job.drew_test or "all" in known:
            known, got = {"all": sum(known.values())}, {"all": total}
        if any(not 0 <= known[split] - got.get(split, 0) <= skipped for split in known):
            numbers = (" / ".join(f"{n:,}" for n in counts.values()) for counts in (got, known))
            partial = "{} examples, known are {}".format(*numbers)
            reason = "the source is cut off, holds something twice or is another one"
            found.append(f"{job.stem} has {partial} ({', '.join(got)}): {reason}")
    if skipped > MANY_SKIPPED * (total + skipped):
        found.append(f"{skipped:,} of {total + skipped:,} examples had to be skipped")
    for split, file in written.items():
        seen = set(file.labels)
        absent = [name for label, name in enumerate(task.classes) if label not in seen]
        if absent and (options.limit or len(task.classes)) >= len(task.classes):
            found.append(f"{split} has no example of {', '.join(absent)}")
    prints = {split: np.frombuffer(file.prints, np.int64) for split, file in written.items()}
    for split, own in prints.items():
        double = np.isin(own, prints["train"]).sum() if split != "train" else 0
        if double > MANY_DOUBLE * len(own):
            found.append(f"{double:,} of {len(own):,} examples of {split} are in train too")
    allowed = options.allow_partial or options.limit is not None or job.counts != task.counts
    if found and not allowed:
        raise UserError(f"{found[0]}; nothing is written (--allow_partial takes it as it is)")
    if job.counts != task.counts and not partial:
        partial = " / ".join(f"{n:,}" for n in job.counts.values()) + " examples"
    return partial, found


def main(task: Task, argv: list[str] | None = None) -> int:
    """A task's command; its exit code: 0; 2 or, if memory or a worker died, 1 (one sentence on
    stderr); 130 or 143 (a signal)."""
    options = parser_of(task).parse_args(argv)
    return guarded(lambda: run(task, options))


def guarded(function: Callable[[], None]) -> int:
    """Runs a command's body; its exit code, as `main` says."""

    def terminate(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    sys.setswitchinterval(1e-4)  # seconds: threads that write or wait for workers get their turn
    left = "nothing half-written is left"
    try:
        function()
        return 0
    except KeyboardInterrupt as stop:
        code, word = (143, "terminated") if stop.args else (130, "interrupted")
        text = f"{word}: {left}, run it again"
    except parallel.WorkerDied as error:
        died = f"exit code {error}; -9: most often because the memory is full"
        code, text = 1, f"error: a worker process was killed ({died}), {left}; try --workers 1"
    except MemoryError:
        code, text = 1, f"error: the memory is full, {left}; try --workers 1"
    except (UserError, OSError) as error:
        reason = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk is full; {left} (--output_dir names another place)"
        elif getattr(error, "strerror", None):
            reason = f"{error.filename or 'reading or writing'}: {error.strerror}"
        code, text = 2, f"error: {reason}"
    print(text, file=sys.stderr)
    return code
