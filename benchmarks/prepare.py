"""Examples per second of the create scripts against the reference's way, on the same files.

    python benchmarks/prepare.py text --source aclImdb.tar.gz   # --num reviews of each split
    python benchmarks/prepare.py news        # and yelp: synthetic texts of the published lengths
    python benchmarks/prepare.py retrieval   # synthetic pairs of long texts
    python benchmarks/prepare.py image       # synthetic 32x32 PNGs
    python benchmarks/prepare.py nature      # synthetic 800x600 JPEGs

The reference's way, said again here: every example goes alone through tf.py_function, a batch of
one and a list that is pickled at the end. Both write train, dev and test; imports are not timed;
the results are compared before the times are (all but nature: equal multisets). With --against
DIR, another checkout's create script stands in for the reference. Each way runs in its own
process, in turn, --rounds times; the table shows medians, CPU time per example (which other load
on the machine hardly changes) and the peak memory of the process.
"""

import argparse
import collections
import dataclasses
import io
import json
import os
import pickle
import re
import resource
import runpy
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CIFAR_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
SUPERCATEGORIES = [
    "Fungi",
    "Plantae",
    "Chromista",
    "Reptilia",
    "Aves",
    "Amphibia",
    "Actinopterygii",
    "Bacteria",
    "Animalia",
    "Protozoa",
    "Mammalia",
    "Insecta",
    "Arachnida",
    "Mollusca",
]
FILES = {
    s: f"new_aan_pairs.{n}.tsv"
    for s, n in zip(("train", "dev", "test"), ("train", "eval", "test"), strict=True)
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One task. data: its TFDS name; text, image: the feature that is read; test: its test split;
    cut, padding: ids kept and zeros behind them; num: examples a split by default."""

    stem: str
    script: str
    data: str
    feature: str
    label: str
    test: str
    classes: tuple[str, ...] = ()
    cut: int = 0
    padding: int = 0
    num: int = 2000


KINDS = {
    "text": Kind(
        *("lra-text", "create_text", "imdb_reviews", "text", "label", "test"),
        ("neg", "pos"),
        4000,
        96,
    ),
    "news": Kind(
        *("lra-news1", "create_agnews", "ag_news_subset", "description", "label", "test"),
        ("World", "Sports", "Business", "Sci/Tech"),
        1000,
        24,
        num=5000,
    ),
    "yelp": Kind(
        *("lra-yelp1", "create_yelp", "yelp_polarity_reviews", "text", "label", "test"),
        ("1", "2"),
        1000,
        24,
        num=5000,
    ),
    "retrieval": Kind(
        *("lra-retrieval", "create_retrieval", "tsv_data", "", "", ""), cut=4000, padding=96
    ),
    "image": Kind(
        *("lra-image", "create_cifar10", "cifar10", "image", "label", "test"),
        CIFAR_CLASSES,
        num=5000,
    ),
    "nature": Kind(
        *("lra-nature", "create_inaturalist", "i_naturalist2018"),
        *("image", "supercategory", "validation"),
        SUPERCATEGORIES,
        num=400,
    ),
}


# ---- the files ----------------------------------------------------------------------------------


def reviews(source: Path, split: str, num: int):
    """The first `num` rows of a split, half of each label."""
    counts: collections.Counter = collections.Counter()
    with tarfile.open(source) as archive:
        for member in archive:
            match = re.search(rf"/{split}/(neg|pos)/.*\.txt$", member.name)
            if match and counts[match[1]] < num // 2:
                counts[match[1]] += 1
                text = archive.extractfile(member).read().strip()
                yield member.name, {"text": text, "label": match[1]}


def texts(kind: str, split: str, num: int):
    """Synthetic texts with the mean length of the published ones."""
    random = np.random.default_rng(len(split))
    mean = {"news": 190, "yelp": 720}[kind]
    for i in range(num):
        length = min(5000, 20 + int(random.exponential(mean - 20)))
        text = random.integers(32, 127, length, dtype=np.uint8).tobytes()
        yield i, {KINDS[kind].feature: text, "label": i % len(KINDS[kind].classes)}


def photographs(split: str, num: int, width: int, height: int, form: str):
    """Synthetic pictures; 800x600 JPEGs have about as many bytes as a photograph."""
    from PIL import Image

    random = np.random.default_rng(len(split))
    for i in range(num):
        tiny = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(tiny.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(smooth + random.integers(-12, 13, (height, width, 3)), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, form, quality=90)
        buffer.seek(0)
        yield i, {"id": str(i), "image": buffer}


def rows(kind: str, split: str, source: Path | None, num: int):
    if kind == "text":
        return reviews(source, split, num)
    if kind in ("news", "yelp"):
        return texts(kind, split, num)
    size = (32, 32, "PNG") if kind == "image" else (800, 600, "JPEG")
    classes = len(KINDS[kind].classes)
    return (
        (i, row | {KINDS[kind].label: i % classes}) for i, row in photographs(split, num, *size)
    )


def pairs(folder: Path, num: int) -> None:
    """The three files of lra-retrieval with texts of 2,000 to 30,000 bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in FILES.values():
        with open(folder / name, "wb") as file:
            for i in range(num):
                texts = (
                    random.integers(32, 127, random.integers(2000, 30000), dtype=np.uint8)
                    for _ in range(2)
                )
                file.write(b"%d.0\tP1\tP2\t%b\t%b\n" % (i % 2, *(t.tobytes() for t in texts)))


def prepare(kind: str, folder: Path, source: Path | None, num: int) -> None:
    """A prepared TFDS folder with `num` training and `num` test examples; or three tsv files."""
    if kind == "retrieval":
        pairs(folder / "tsv_data", num)
        return
    import tensorflow_datasets as tfds

    task = KINDS[kind]
    features = {task.label: tfds.features.ClassLabel(names=list(task.classes))}
    if task.feature == "image":
        features |= {"id": tfds.features.Text(), "image": tfds.features.Image()}
    else:
        features[task.feature] = tfds.features.Text()

    class Prepared(tfds.core.GeneratorBasedBuilder):
        name = task.data
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: rows(kind, split, source, num) for split in ("train", task.test)}

        def _generate_examples(self):
            """Wanted by the base class, not used."""

    Prepared(data_dir=folder).download_and_prepare()


# ---- the two ways, each in a process of its own -------------------------------------------------


def reference(kind: str, folder: Path, out: Path) -> float:
    """Seconds of the reference's way."""
    if kind == "retrieval":
        return reference_retrieval(folder / "tsv_data", out)
    import tensorflow as tf
    import tensorflow_datasets as tfds

    task = KINDS[kind]

    def tokens(text):
        return tf.constant([byte + 1 for byte in text.numpy()][: task.cut], tf.int32)

    def gray(image):
        if kind == "nature":
            image = tf.image.resize(tf.cast(image, tf.float32), (32, 32))
            image = tf.cast(image, tf.uint8)
        return tf.reshape(tf.cast(tf.image.rgb_to_grayscale(image), tf.int32), [1024])

    function = gray if task.feature == "image" else tokens
    length = task.cut or 1024

    def encode(row):
        ids = tf.py_function(function, [row[task.feature]], tf.int32)
        ids.set_shape([None])
        return {"inputs": ids, "targets": row[task.label]}

    builder = tfds.builder_from_directory(str(folder / task.data / "1.0.0"))
    splits = {"train": "train", "dev": task.test, "test": task.test}
    if kind == "image":
        splits |= {"train": "train[:90%]", "dev": "train[90%:]"}
    start = time.perf_counter()
    for split, origin in splits.items():
        data = builder.as_dataset(split=origin)
        data = data.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        data = data.padded_batch(1, padded_shapes={"inputs": [length], "targets": []})
        examples = []
        for instance in iter(data):
            ids = instance["inputs"].numpy()[0]
            ids = np.concatenate([ids, np.zeros(task.padding, np.int32)])
            examples.append({"input_ids_0": ids, "label": instance["targets"].numpy()[0]})
        with open(out / f"{task.stem}.{split}.pickle", "wb") as file:
            pickle.dump(examples, file)
    return time.perf_counter() - start


def reference_retrieval(folder: Path, out: Path) -> float:
    import tensorflow as tf

    def tokens(text):
        return tf.constant([byte + 1 for byte in text.numpy()[:10_000]][:4000], tf.int32)

    def encode(row):
        ids = [tf.py_function(tokens, [row[key]], tf.int32) for key in ("text1", "text2")]
        for each in ids:
            each.set_shape([None])
        return {"1": ids[0], "2": ids[1], "label": tf.cast(row["label"], tf.int32)}

    start = time.perf_counter()
    for split, name in FILES.items():
        data = tf.data.experimental.make_csv_dataset(
            str(folder / name),
            1,
            column_names=["label", "id1", "id2", "text1", "text2"],
            column_defaults=[tf.float32, *[tf.string] * 4],
            field_delim="\t",
            use_quote_delim=False,
            header=False,
            shuffle=False,
            num_epochs=1,
        ).unbatch()
        data = data.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        data = data.padded_batch(1, padded_shapes={"1": [4000], "2": [4000], "label": []})
        rows = []
        for instance in iter(data):
            ids = [
                np.concatenate([instance[key].numpy()[0], np.zeros(96, np.int32)])
                for key in ("1", "2")
            ]
            label = instance["label"].numpy()[0]
            rows.append({"input_ids_0": ids[0], "input_ids_1": ids[1], "label": label})
        with open(out / f"lra-retrieval.{split}.pickle", "wb") as file:
            pickle.dump(rows, file)
    return time.perf_counter() - start


def script(kind: str, folder: Path, out: Path, tree: Path) -> float:
    """Seconds of the create script of a checkout."""
    option = "--source" if kind == "retrieval" else "--tfds_dir"
    sys.argv = ["create", option, str(folder), "--output_dir", str(out)]
    if (tree / "preprocess" / "driver.py").exists():
        sys.argv.append("--allow_partial")
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    sys.path.insert(0, str(tree / "preprocess"))
    start = time.perf_counter()
    try:
        runpy.run_path(str(tree / "preprocess" / f"{KINDS[kind].script}.py"), run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def child(way: str, kind: str, folder: Path, out: Path) -> None:
    import tensorflow  # noqa: F401  not timed
    import tensorflow_datasets  # noqa: F401

    cpu = cpu_seconds()
    if way == "reference":
        seconds = reference(kind, folder, out)
    else:
        seconds = script(kind, folder, out, ROOT if way == "ours" else Path(way))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT", json.dumps({"seconds": seconds, "cpu": cpu_seconds() - cpu, "peak_mib": peak}))


# ---- the comparison -----------------------------------------------------------------------------


def multiset(path: Path) -> collections.Counter:
    with open(path, "rb") as file:
        examples = pickle.load(file)
    return collections.Counter(
        (*(np.asarray(row[key]).tobytes() for key in sorted(row) if key != "label"), row["label"])
        for row in examples
    )


def compare(kind: str, scratch: Path, exact: bool) -> int:
    """How many examples all three splits hold, after checking that both ways wrote the same ones.

    nature's pictures are made small in different ways: their number alone is compared.
    """
    count = 0
    for split in ("train", "dev", "test"):
        name = f"{KINDS[kind].stem}.{split}.pickle"
        theirs, mine = (multiset(scratch / way / name) for way in ("reference", "ours"))
        assert theirs.total() == mine.total(), f"{split}: {theirs.total()}, {mine.total()}"
        different = (theirs - mine).total()
        # the rounding of TensorFlow's matrix product depends on the machine
        allowed = {"nature": theirs.total(), "image": theirs.total() // 100}.get(kind, 0)
        allowed = 0 if exact else allowed
        assert different <= allowed, f"{split}: {different} examples differ"
        count += theirs.total()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--source", type=Path, help="aclImdb archive, for text")
    parser.add_argument("--num", type=int, help="examples a split")
    parser.add_argument("--tfds", type=Path, help="prepare the files here, or use what is here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--against",
        type=Path,
        help="a checkout whose script is run instead of the reference's way",
    )
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, folder, out = args.child
        child(way, args.kind, Path(folder), Path(out))
        return
    if args.kind == "text" and args.source is None and args.tfds is None:
        parser.error("text needs --source or --tfds")
    task = KINDS[args.kind]
    num = args.num or task.num
    other = str(args.against.resolve()) if args.against else "reference"
    found: dict[str, list[dict]] = {other: [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.tfds or Path(scratch) / "tfds"
        if not (folder / task.data).exists():
            prepare(args.kind, folder, args.source, num)
        for _ in range(args.rounds):
            for way, runs in found.items():
                out = Path(scratch) / ("ours" if way == "ours" else "reference")
                out.mkdir(exist_ok=True)
                command = [sys.executable, __file__, args.kind, "--child", way, folder, out]
                os.sync()  # what the way before left to be written is not this one's burden
                done = subprocess.run(command, capture_output=True, text=True)
                lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
                if not lines:
                    raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
                runs.append(json.loads(lines[0].removeprefix("RESULT ")))
        count = compare(args.kind, Path(scratch), args.against is not None)
    table = {}
    for way, runs in found.items():
        rates = sorted(count / run["seconds"] for run in runs)
        table[way] = {
            "examples_per_second": statistics.median(rates),
            "spread": [rates[0], rates[-1]],
            "cpu_ms": statistics.median(1e3 * run["cpu"] / count for run in runs),
            "peak_mib": max(run["peak_mib"] for run in runs),
        }
    base = table[other]["examples_per_second"]
    print(f"{args.kind}: {count:,} examples, {args.rounds} rounds")
    print("way          examples/s           min..max  CPU ms  peak MiB   ratio")
    for way, row in table.items():
        spread = f"{row['spread'][0]:,.0f}..{row['spread'][1]:,.0f}"
        rate = row["examples_per_second"]
        print(
            f"{way:10} {rate:12,.0f} {spread:>18} {row['cpu_ms']:7.3f} {row['peak_mib']:9,.0f} "
            f"{rate / base:7.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"kind": args.kind, "examples": count, **table}, indent=1))


if __name__ == "__main__":
    main()
