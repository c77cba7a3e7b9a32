"""lra-nature: iNaturalist 2018 pictures as 32x32 gray values, 14 supercategories.

    python preprocess/create_inaturalist.py --source DIR
    python preprocess/create_inaturalist.py --tfds_dir DIR    # a prepared TFDS i_naturalist2018

DIR has the competition's files, not unpacked: train_val2018.tar.gz (or its folder), and
train2018.json and val2018.json (or their .tar.gz). Or it has train/ and val/ (or validation/,
test/), each <supercategory>/<species>/*.jpg; or one such tree alone, from which about 53 of every
1,000 pictures become the test set (seeded). Source: docs/data.md, "lra-nature".
"""

import json
import posixpath
import re
from collections.abc import Iterator
from operator import index  # TypeError for what is no integer
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from preprocess import encode, sources
from preprocess.driver import Skips, Task
from training.errors import UserError

SUPERCATEGORIES = (
    *("Fungi", "Plantae", "Chromista", "Reptilia", "Aves", "Amphibia", "Actinopterygii"),
    *("Bacteria", "Animalia", "Protozoa", "Mammalia", "Insecta", "Arachnida", "Mollusca"),
)
LABELS = {name: label for label, name in enumerate(SUPERCATEGORIES)}
SIDE = 32
PICTURE = re.compile(r"(?:^|/)[^/.][^/]*\.(?:jpe?g|png)$", re.IGNORECASE)
SPLITS = {"train": "train", "val": "test", "validation": "test", "test": "test"}
ARCHIVES = ("train_val2018.tar.gz", "train_val2018.tar")
ANNOTATIONS = {"train": "train2018.json", "test": "val2018.json"}


def encode_picture(payload: bytes | sources.Member) -> np.ndarray:
    """Gray values 0..255 of a picture file, row by row: int32 [1024]."""
    try:
        return encode.pixels(encode.picture(payload, _decode))
    except FileNotFoundError:
        raise sources.Fault("the picture is missing") from None
    except sources.Fault as fault:  # this data set is known to have some: never a reason to stop
        raise sources.Fault(fault.reason, always=True) from None


def _decode(image) -> np.ndarray:
    # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, not below four times the wanted one:
    # half the time of a whole decode; values move by less than 1 in the mean
    image.draft("RGB", (4 * SIDE, 4 * SIDE))
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return encode.gray(np.asarray(small))


def read_pictures(job, source: Path) -> Iterator[sources.Example]:
    """Pictures of a folder or archive in one of the layouts above."""
    folder = source if source.is_dir() else source.parent
    annotations = {
        split: path
        for split, name in ANNOTATIONS.items()
        for path in (folder / f"{name}.tar.gz", folder / name)
        if path.exists()
    }
    if len(annotations) == 1:
        absent = [name for split, name in ANNOTATIONS.items() if split not in annotations]
        raise UserError(f"{folder} has {min(annotations.values()).name} but no {absent[0]}")
    pictures = source
    if source.is_dir():
        inner = [source / name for name in ("train_val2018", *ARCHIVES)]
        pictures = next((path for path in inner if path.exists()), source)
    return _annotated(job, folder, pictures, annotations) if annotations else _tree(job, pictures)


def _tree(job, source: Path) -> Iterator[sources.Example]:
    tests = [source / name for name in SPLITS if name != "train" and (source / name).is_dir()]
    roots = [source / "train", *tests[:1]] if tests and (source / "train").is_dir() else [source]
    lone = False
    for root in roots:
        count = 0
        for member in sources.files(root, PICTURE.search):
            folders = PurePosixPath(root.name, member.name).parts[:-1]
            count += 1
            place = next((i for i, part in enumerate(folders) if part in LABELS), None)
            if place is None:
                known = ", ".join(SUPERCATEGORIES)
                raise UserError(f"{root}: {member.name} is in none of the folders {known}")
            split = SPLITS.get(folders[place - 1], "all") if place else "all"
            if split == "all" and not lone:
                lone = True
                drawn = "which pictures are the test set: about 53 of every 1,000 are drawn"
                print(f"{root} does not say {drawn}; train2018.json and val2018.json would")
            if not job.full(split):
                yield split, member.where, member.payload(), LABELS[folders[place]]
        if not count:
            raise UserError(f"{root} has no supercategory folders (Fungi, Plantae, ...)")


def _annotated(job, folder: Path, pictures: Path, annotations) -> Iterator[sources.Example]:
    tables = {split: read_annotations(path, job.skips) for split, path in annotations.items()}
    train, test = tables["train"], tables["test"]
    if len(train) < len(test):
        numbers = f"{len(train):,} pictures and {annotations['test']} {len(test):,}"
        raise UserError(f"{annotations['train']} lists {numbers}: are the two exchanged?")
    if both := {name for name, _ in train} & {name for name, _ in test}:
        raise UserError(f"train2018.json and val2018.json both list {min(both)}")
    wanted = {}
    for split, table in tables.items():
        for name, label in table:
            told = next((part for part in Path(name).parts[:-1] if part in LABELS), None)
            if told and LABELS[told] != label:
                reason = f"the folder says {told}, the annotations say {SUPERCATEGORIES[label]}"
                job.skips.skip(str(folder / name), reason)
            else:
                wanted[name] = split, label
    if pictures.is_dir():
        for name, (split, label) in wanted.items():
            path = str(folder / name)
            yield split, path, sources.Member(name, path), label
        return
    for member in sources.files(pictures, lambda name: posixpath.normpath(name) in wanted):
        split, label = wanted.pop(posixpath.normpath(member.name))
        if not job.full(split):
            yield split, member.where, member.payload(), label
    for name in wanted:
        job.skips.skip(f"{pictures}:{name}", "the picture is missing")


def read_annotations(path: Path, skips: Skips) -> list[tuple[str, int]]:
    """(file name, label) of each picture that a competition json lists, in its order."""
    try:
        members = iter([sources.Member(path.name, str(path))])
        if path.suffix == ".gz":
            members = sources.files(path, lambda name: name.endswith(".json"))
        data = json.loads(next(members).read(), object_hook=_shrink)
        categories, labels = dict(data["categories"]), dict(data["annotations"])
        images = [(identity, name) for identity, name in data["images"]]
    except (ValueError, KeyError, TypeError, RecursionError, StopIteration) as error:
        expected = "an annotations file with images, annotations and categories"
        raise UserError(f"{path} is not {expected} ({error})") from None
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
        raise UserError(f"{path} lists no pictures")
    return table


def _shrink(entry: dict):
    """Keeps two fields of the 437,513 entries: the whole tree of dicts would need a gigabyte."""
    if "file_name" in entry:
        return index(entry["id"]), str(entry["file_name"])
    if "image_id" in entry:
        return index(entry["image_id"]), index(entry["category_id"])
    if "supercategory" in entry:
        return index(entry["id"]), str(entry["supercategory"])
    return entry


def identity(where: str, payload) -> bytes:
    """A picture's own name, the same in folder, archive and TFDS."""
    return where.rpartition("/")[2].partition(".")[0].encode()


TASK = Task(
    name="lra-nature",
    description=__doc__,
    classes=SUPERCATEGORIES,
    length=SIDE * SIDE,
    counts={"train": 437_513, "test": 24_426},
    encoder=lambda options: encode_picture,
    # a chunk of pictures takes some 100 ms
    sources=(
        sources.Reader("folder or archive with the pictures, as above", read_pictures, chunk=64),
    ),
    tfds=sources.Tfds(
        *("i_naturalist2018", "image", SUPERCATEGORIES, "supercategory", "validation"),
        encoded=True,
        identity="id",
        batch=16,
        chunk=64,
    ),
    places=("inaturalist2018",),
    how_to_get=(
        "fetch train_val2018.tar.gz (120 GB), train2018.json.tar.gz and val2018.json.tar.gz of "
        "the iNaturalist 2018 competition (github.com/visipedia/inat_comp, folder 2018) and put "
        "them, not unpacked, into data/inaturalist2018"
    ),
    test_part=0.053,  # 24,426 of the published 461,939 pictures
    identity=identity,
)
