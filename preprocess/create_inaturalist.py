"""lra-nature: iNaturalist 2018 pictures as 32x32 gray values, 14 supercategories.

    python preprocess/create_inaturalist.py --tfds_dir DIR    # a prepared TFDS i_naturalist2018
    python preprocess/create_inaturalist.py --source DIR      # the pictures as published

--source takes a folder with train_val2018/, train2018.json and val2018.json of the competition; or
one with train/ and val/ (or validation/, test/), each <supercategory>/<species>/*.jpg; or one such
tree alone, from which 53 of every 1,000 pictures become the test set (seeded).

How SAT made its 32x32 pictures is not known. Ours: the whole picture, decoded at a reduced size
(JPEG), antialiased bilinear to 32x32, gray as in lra-image. Source: docs/data.md, "lra-nature".
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import routing, tfds_source, writer
from preprocess.create_cifar10 import gray

TASK = "lra-nature"
TFDS_NAME = "i_naturalist2018"
SUPERCATEGORIES = (
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
)
LABELS = {name: label for label, name in enumerate(SUPERCATEGORIES)}
SIDE = 32
PICTURES = (".jpg", ".jpeg", ".png")
# part of a lone tree that becomes the test set: 24,426 of the published 461,939 pictures
TEST_PART = 0.053
CHUNK = 64  # pictures per piece of work: some 100 ms

# (split, where it stands for messages, bytes or path of the picture, label)
Picture = tuple[str, str, bytes | str, int]


# ---- one picture --------------------------------------------------------------------------------


def gray_ids(picture: bytes | str) -> np.ndarray:
    """Gray values 0..255 of a picture file (its bytes or path), row by row: int32 [1024].

    Raises: OSError and others of Pillow's if it cannot be decoded to its end.
    """
    source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    with Image.open(source) as image:
        # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, not below four times the wanted one:
        # half the time of a whole decode; values move by less than 1 in the mean
        image.draft("RGB", (4 * SIDE, 4 * SIDE))
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return gray(np.asarray(small)).reshape(-1).astype(np.int32)


def encode_chunk(chunk: list[tuple[bytes | str, int]]) -> list[bytes | str]:
    """Pickle opcodes of each (picture, label), or the reason why the picture is left out."""
    return [_encode(picture, label) for picture, label in chunk]


def _encode(picture: bytes | str, label: int) -> bytes | str:
    try:
        size = len(picture) if isinstance(picture, bytes) else os.path.getsize(picture)
        if size == 0:
            return "the picture file is empty"
        return writer.encode_example(gray_ids(picture), np.int64(label))
    except FileNotFoundError:
        return "the picture is missing"
    except Exception:  # whatever a decoder does with a broken file, it is one broken file
        return "the picture is cut off or cannot be decoded"


# ---- sources ------------------------------------------------------------------------------------


def read_tfds(folder: Path, router: routing.Router) -> Iterator[Picture]:
    for split, name in (("train", "train"), ("test", "validation")):
        rows = tfds_source.read(
            folder,
            name,
            ("id", "image", "supercategory"),
            labels={"supercategory": SUPERCATEGORIES},
            encoded=("image",),
            batch=16,
        )
        for row in rows:
            if router.full(split):
                break
            where = f"{folder} {name} {row['id'].decode(errors='replace')}"
            yield split, where, row["image"], int(row["supercategory"])


def read_source(source: Path, seed: int, skips: writer.Skips) -> Iterator[Picture]:
    """Pictures of a folder in one of the three layouts above; raises ValueError for any other."""
    if not source.exists():
        raise ValueError(f"{source} does not exist; expected a folder with the pictures")
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; unpack train_val2018.tar.gz first")
    annotations = {"train": source / "train2018.json", "test": source / "val2018.json"}
    present = [path for path in annotations.values() if path.exists()]
    if len(present) == 1:
        absent = [path.name for path in annotations.values() if path not in present]
        raise ValueError(f"{source} has {present[0].name} but no {absent[0]}")
    test = next((source / n for n in ("val", "validation", "test") if (source / n).is_dir()), None)
    if present:
        yield from _annotated(source, annotations, skips)
    elif test is not None and (source / "train").is_dir():
        for split, folder in (("train", source / "train"), ("test", test)):
            for path, label in _tree(folder):
                yield split, path, path, label
    else:
        tree = source / "train_val2018"
        tree = tree if tree.is_dir() else source
        print(
            f"{tree} does not say which pictures are the test set: {round(TEST_PART * 1000)} of "
            f"every 1,000 are taken (seed {seed}); train2018.json and val2018.json beside it "
            "give the published split"
        )
        for index, (path, label) in enumerate(_tree(tree)):
            # a seed of its own: the draw of --dev_from_train must not follow this one
            test_set = routing.drawn(index, TEST_PART, seed + 1)
            yield "test" if test_set else "train", path, path, label


def _tree(folder: Path) -> Iterator[tuple[str, int]]:
    """(path, label) of the pictures below <supercategory>/, sorted."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise ValueError(f"{folder} has no supercategory folders (Fungi, Plantae, ...)")
    unknown = [name for name in names if name not in LABELS]
    if unknown:
        raise ValueError(
            f"{folder} has the folder {unknown[0]}, which is none of {', '.join(SUPERCATEGORIES)}"
        )
    for name in names:
        for parent, folders, files in os.walk(folder / name):
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(PICTURES) and not file.startswith("."):
                    yield os.path.join(parent, file), LABELS[name]


def _annotated(
    source: Path, annotations: dict[str, Path], skips: writer.Skips
) -> Iterator[Picture]:
    tables = {split: read_annotations(path, skips) for split, path in annotations.items()}
    train, test = tables["train"], tables["test"]
    if len(train) < len(test):
        raise ValueError(
            f"{annotations['train']} lists {len(train):,} pictures and {annotations['test']} "
            f"{len(test):,}: are the two exchanged?"
        )
    both = {name for name, _ in train} & {name for name, _ in test}
    if both:
        raise ValueError(f"train2018.json and val2018.json both list {min(both)}")
    for split, table in tables.items():
        for name, label in table:
            path = str(source / name)
            named = [part for part in Path(name).parts[:-1] if part in LABELS]
            if named and LABELS[named[0]] != label:
                told = SUPERCATEGORIES[label]
                skips.skip(path, f"the folder says {named[0]}, the annotations say {told}")
                continue
            yield split, path, path, label


def read_annotations(path: Path, skips: writer.Skips) -> list[tuple[str, int]]:
    """(file name, label) of each picture that a competition json lists, in its order."""
    try:
        with open(path, "rb") as file:
            data = json.load(file, object_hook=_shrink)
        categories, labels = dict(data["categories"]), dict(data["annotations"])
        images = [(identity, name) for identity, name in data["images"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not an annotations file with images, annotations and categories ({error})"
        ) from None
    table = []
    for identity, name in images:
        supercategory = categories.get(labels.get(identity))
        if Path(name).is_absolute() or ".." in Path(name).parts:
            skips.skip(f"{path}, {name}", "the file name leaves the folder")
        elif identity not in labels:
            skips.skip(f"{path}, {name}", "no annotation for the picture")
        elif supercategory not in LABELS:
            skips.skip(f"{path}, {name}", "the category has no known supercategory")
        else:
            table.append((name, LABELS[supercategory]))
    if not table:
        raise ValueError(f"{path} lists no pictures")
    return table


def _shrink(entry: dict):
    """Keeps two fields of the 437,513 entries: the whole tree of dicts would need a gigabyte."""
    if "file_name" in entry:
        return _number(entry["id"]), str(entry["file_name"])
    if "image_id" in entry:
        return _number(entry["image_id"]), _number(entry["category_id"])
    if "supercategory" in entry:
        return _number(entry["id"]), str(entry["supercategory"])
    return entry


def _number(value) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a number")
    return value


# ---- the script ---------------------------------------------------------------------------------


def write(
    pictures: Iterator[Picture],
    router: routing.Router,
    skips: writer.Skips,
    output_dir: Path,
    workers: int,
) -> None:
    """Decode over the processes, write in order; broken pictures are left out and counted."""

    def work():
        """Chunks of pictures that are wanted; what belongs to them waits in `waiting`."""
        wanted = []
        for split, where, picture, label in pictures:
            target = router.route(split, label)
            if target is not None:
                wanted.append((picture, label))
                waiting.append((where, target))
            if len(wanted) == CHUNK:
                yield wanted
                wanted = []
        if wanted:
            yield wanted

    waiting: list[tuple[str, str]] = []
    with (
        routing.open_splits(output_dir, TASK, router) as writers,
        writer.map_ordered(encode_chunk, work(), workers) as chunks,
        writer.progress(None, TASK, unit="picture") as bar,
    ):
        for results in chunks:
            for result, (where, target) in zip(results, waiting, strict=False):
                if isinstance(result, str):
                    # these data sets are known to have some: never a reason to stop
                    skips.skip(where, result, always=result != "the picture is missing")
                else:
                    writers[target].add_encoded(result)
            del waiting[: len(results)]
            bar.update(len(results))
    skips.report()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    routing.add_source_options(parser, "folder with the pictures", TFDS_NAME)
    routing.add_dev_option(parser)
    writer.add_common_options(parser, seed="--dev_from_train and the split of a lone tree")
    args = parser.parse_args()
    kind, place = routing.choose_source(args, TASK, TFDS_NAME, None)
    router = routing.router_of(args, len(LABELS))
    skips = writer.Skips(args.on_error)
    if kind == "tfds":
        pictures = read_tfds(place, router)
    else:
        pictures = read_source(place, args.seed, skips)
    write(pictures, router, skips, args.output_dir, args.workers)


if __name__ == "__main__":
    sys.exit(writer.main(main))
