"""Examples per second of the create scripts against the reference's way, on the same files.

    python benchmarks/prepare.py text --source aclImdb.tar.gz   # --num reviews of each split
    python benchmarks/prepare.py pictures                       # synthetic 800x600 JPEGs
    python benchmarks/prepare.py retrieval                      # synthetic pairs of long texts

The reference's way, said again here: every example goes alone through tf.py_function, a batch of
one and a list that is pickled at the end. Both write train, dev and test; imports are not timed;
the results are compared before the times are (texts: equal multisets). Each way runs in its own
process, in turn, --rounds times; the table shows medians, CPU time per example (which other load
on the machine hardly changes) and the peak memory of the process.
"""

import argparse
import collections
import importlib
import io
import json
import pickle
import re
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# kind -> file stem, script, TFDS name, its label, its test split
TASKS = {
    "text": ("lra-text", "create_text", "imdb_reviews", "label", "test"),
    "pictures": (
        "lra-nature",
        "create_inaturalist",
        "i_naturalist2018",
        "supercategory",
        "validation",
    ),
    "retrieval": ("lra-retrieval", "create_retrieval", "tsv_data", "label", "test"),
}
DEFAULT_NUM = {"text": 2000, "pictures": 400, "retrieval": 1000}


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


def photographs(split: str, num: int):
    """Synthetic pictures of the published size, about as many bytes as a photograph."""
    from PIL import Image

    random = np.random.default_rng(len(split))
    for i in range(num):
        tiny = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(tiny.resize((800, 600), Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(smooth + random.integers(-12, 13, (600, 800, 3)), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        buffer.seek(0)
        yield i, {"id": str(i), "image": buffer, "supercategory": i % 14}


def pairs(folder: Path, num: int) -> None:
    """The three files of lra-retrieval with texts of 2,000 to 30,000 bytes."""
    from preprocess.create_retrieval import FILES

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

    from preprocess.create_inaturalist import SUPERCATEGORIES

    test = TASKS[kind][4]
    if kind == "text":
        label = tfds.features.ClassLabel(names=["neg", "pos"])
        features = {"text": tfds.features.Text(), "label": label}
    else:
        label = tfds.features.ClassLabel(names=list(SUPERCATEGORIES))
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(),
            "supercategory": label,
        }

    class Prepared(tfds.core.GeneratorBasedBuilder):
        name = TASKS[kind][2]
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            if kind == "text":
                return {split: reviews(source, split, num) for split in ("train", test)}
            return {split: photographs(split, num) for split in ("train", test)}

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

    stem, _, name, label, test = TASKS[kind]

    def tokens(text):
        return tf.constant([byte + 1 for byte in text.numpy()][:4000], tf.int32)

    def gray(image):
        small = tf.image.resize(tf.cast(image, tf.float32), (32, 32))
        values = tf.image.rgb_to_grayscale(small / 255.0) * 255.5
        return tf.reshape(tf.cast(values, tf.int32), [1024])

    function, key = (tokens, "text") if kind == "text" else (gray, "image")
    length, extra = (4000, 96) if kind == "text" else (1024, 0)

    def encode(row):
        ids = tf.py_function(function, [row[key]], tf.int32)
        ids.set_shape([None])
        return {"inputs": ids, "targets": row[label]}

    builder = tfds.builder_from_directory(str(folder / name / "1.0.0"))
    start = time.perf_counter()
    for split, origin in (("train", "train"), ("dev", test), ("test", test)):
        data = builder.as_dataset(split=origin)
        data = data.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
        data = data.padded_batch(1, padded_shapes={"inputs": [length], "targets": []})
        rows = []
        for instance in iter(data):
            ids = np.concatenate([instance["inputs"].numpy()[0], np.zeros(extra, np.int32)])
            rows.append({"input_ids_0": ids, "label": instance["targets"].numpy()[0]})
        with open(out / f"{stem}.{split}.pickle", "wb") as file:
            pickle.dump(rows, file)
    return time.perf_counter() - start


def reference_retrieval(folder: Path, out: Path) -> float:
    import tensorflow as tf

    from preprocess.create_retrieval import FILES

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


def ours(kind: str, folder: Path, out: Path) -> float:
    """Seconds of the create script."""
    from preprocess import byte_task, writer

    module = importlib.import_module(f"preprocess.{TASKS[kind][1]}")
    option = "--source" if kind == "retrieval" else "--tfds_dir"
    sys.argv = ["create", option, str(folder), "--output_dir", str(out)]
    start = time.perf_counter()
    if kind == "text":
        status = writer.main(lambda: byte_task.run(module.TASK))
    else:
        status = writer.main(module.main)
    assert status == 0
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def child(way: str, kind: str, folder: Path, out: Path) -> None:
    import tensorflow  # noqa: F401  not timed
    import tensorflow_datasets  # noqa: F401

    cpu = cpu_seconds()
    seconds = {"reference": reference, "ours": ours}[way](kind, folder, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT", json.dumps({"seconds": seconds, "cpu": cpu_seconds() - cpu, "peak_mib": peak}))


# ---- the comparison -----------------------------------------------------------------------------


def multiset(path: Path) -> collections.Counter:
    with open(path, "rb") as file:
        rows = pickle.load(file)
    return collections.Counter(
        (*(np.asarray(row[key]).tobytes() for key in sorted(row) if key != "label"), row["label"])
        for row in rows
    )


def compare(kind: str, scratch: Path, num: int) -> None:
    for split in ("train", "dev", "test"):
        name = f"{TASKS[kind][0]}.{split}.pickle"
        theirs, mine = (multiset(scratch / way / name) for way in ("reference", "ours"))
        assert theirs.total() == mine.total() == num, f"{split}: {theirs.total()}, {mine.total()}"
        assert kind == "pictures" or theirs == mine, f"{split}: the examples differ"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=TASKS)
    parser.add_argument("--source", type=Path, help="aclImdb archive, for text")
    parser.add_argument("--num", type=int, help=f"examples a split (default: {DEFAULT_NUM})")
    parser.add_argument("--tfds", type=Path, help="prepare the files here, or use what is here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, folder, out = args.child
        child(way, args.kind, Path(folder), Path(out))
        return
    if args.kind == "text" and args.source is None and args.tfds is None:
        parser.error("text needs --source or --tfds")
    num = args.num or DEFAULT_NUM[args.kind]
    found: dict[str, list[dict]] = {"reference": [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.tfds or Path(scratch) / "tfds"
        if not (folder / TASKS[args.kind][2]).exists():
            prepare(args.kind, folder, args.source, num)
        for _ in range(args.rounds):
            for way, runs in found.items():
                out = Path(scratch) / way
                out.mkdir(exist_ok=True)
                command = [sys.executable, __file__, args.kind, "--child", way, folder, out]
                done = subprocess.run(command, capture_output=True, text=True)
                lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
                if not lines:
                    raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
                runs.append(json.loads(lines[0].removeprefix("RESULT ")))
        compare(args.kind, Path(scratch), num)  # also holds --num to what is in --tfds
    table = {}
    for way, runs in found.items():
        rates = sorted(3 * num / run["seconds"] for run in runs)
        table[way] = {
            "examples_per_second": statistics.median(rates),
            "spread": [rates[0], rates[-1]],
            "cpu_ms": statistics.median(1e3 * run["cpu"] / (3 * num) for run in runs),
            "peak_mib": max(run["peak_mib"] for run in runs),
        }
    base = table["reference"]["examples_per_second"]
    print(f"{args.kind}: {num:,} examples a split, {args.rounds} rounds")
    print("way          examples/s           min..max  CPU ms  peak MiB   ratio")
    for way, row in table.items():
        spread = f"{row['spread'][0]:,.0f}..{row['spread'][1]:,.0f}"
        rate = row["examples_per_second"]
        print(
            f"{way:10} {rate:12,.0f} {spread:>18} {row['cpu_ms']:7.3f} {row['peak_mib']:9,.0f} "
            f"{rate / base:7.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"kind": args.kind, "num": num, **table}, indent=1))


if __name__ == "__main__":
    main()
