"""The same source, options and seed give the same bytes for ever: SHA-256 of pickles as version
1.0 (commit 2ca8516) wrote them, through the commands."""

import hashlib

import pytest
import test_create_agnews as agnews
import test_create_cifar10 as cifar
import test_create_inaturalist as inaturalist
import test_create_pathfinder as pathfinder
import test_create_retrieval as retrieval
import test_create_text as text
import test_create_yelp as yelp
from preparing import lay_out, run

from preprocess import tasks

PICTURES = {  # of one colour each: no decoder and no resize can differ
    f"{split}/{name}/1/{i}.png": inaturalist.picture((9 * i, 5 * i, 240 - 3 * i), (40, 30))
    for split in ("train", "val")
    for i, name in enumerate(inaturalist.nature.SUPERCATEGORIES)
}
ROWS = b"Source\tTarget\r\n( ( ( [MAX 2 ) 6 ) ] )\t6\r\n[SM 9 [MED 1 4 ] ]\t1\r\n"
LISTOPS = {f"basic_{split}.tsv": ROWS for split in ("train", "val", "test")}
LEVEL = "curv_contour_length_9"
# name -> (task, files of the source or None, more options)
CASES = {
    "image pictures": ("lra-image", cifar.FILES, ()),
    "image, another seed": ("lra-image", cifar.FILES, ("--seed", 3)),
    "image binary": ("lra-image", cifar.batches("binary"), ()),
    "image python": ("lra-image", cifar.batches("python"), ()),
    "text": ("lra-text", text.REVIEWS, ()),
    "news": ("lra-news1", agnews.FILES, ()),
    "yelp": ("lra-yelp1", yelp.FILES, ()),
    "retrieval": ("lra-retrieval", retrieval.ROWS, ()),
    "nature": ("lra-nature", PICTURES, ()),
    "listops": ("lra-listops", LISTOPS, ()),
    "listops with brackets": ("lra-listops", LISTOPS, ("--keep_brackets",)),
    "listops generated": (
        "lra-listops",
        None,
        ("--num_train", 30, "--num_dev", 10, "--num_test", 10, "--seed", 5),
    ),
    "pathfinder": ("lra-pathfinder", pathfinder._release(LEVEL), ()),
    "pathfinder generated": (
        "lra-pathfinder",
        None,
        ("--generate", "--count", 40, "--level", LEVEL, "--seed", 2),
    ),
}
# of dev, test and train
DIGESTS = {
    "image pictures": "8fcf7dd90a44f707 e35147a11c01ec61 5eae139259868c8a",
    "image, another seed": "0fe2a7aa4f538905 f4609f6e2e1fc234 80ce1bcc5c75a14d",
    "image binary": "32b42fb7aad75262 766b8b1a3232227d 1bb8e5d7ddd07750",
    "image python": "32b42fb7aad75262 766b8b1a3232227d 1bb8e5d7ddd07750",
    "text": "b35fae6216aa8599 b35fae6216aa8599 6e775cfd4254b343",
    "news": "e908eee4469a96c6 e908eee4469a96c6 8af95bdc49df2bab",
    "yelp": "f37360d3d4295cde f37360d3d4295cde cd96814c559f8383",
    "retrieval": "a7033c482a2bc267 df596059fc090c4f 6adfb472559a9558",
    "nature": "6d3fab309b1b1ee7 6d3fab309b1b1ee7 6d3fab309b1b1ee7",
    "listops": "ac49556bce25d35b ac49556bce25d35b ac49556bce25d35b",
    "listops with brackets": "244f3809301597ae 244f3809301597ae 244f3809301597ae",
    "listops generated": "a79f7d37d5dc0075 40bcdf470910421b aa6ba2cb7cac5bd9",
    "pathfinder": "3a6188a2675d908d 455e914fd096ffd9 ffed9f77db34bded",
    "pathfinder generated": "c1a0507429709951 b91bcbffd4e9641f 93f24f875ca324dc",
}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_version_1(tmp_path, case):
    task, files, options = CASES[case]
    if files is not None:
        lay_out(tmp_path / "in", files)
        options = (*options, "--source", tmp_path / "in")
    assert run(tasks.load(task), "--output_dir", tmp_path / "out", "--workers", 1, *options) == 0
    found = sorted((tmp_path / "out").glob("*.pickle"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found]
    assert " ".join(digests) == DIGESTS[case]


@pytest.mark.slow
def test_the_bytes_of_the_real_pictures(tmp_path, shared_data):
    source = shared_data / "data/cifar10_images.zip"
    options = ("--source", source, "--output_dir", tmp_path)
    assert run(tasks.load("lra-image"), *options, whole=True) == 0
    digests = {"train": "1ed8b046", "dev": "2eb81cec", "test": "c6b6f912"}
    for split, digest in digests.items():
        data = (tmp_path / f"lra-image.{split}.pickle").read_bytes()
        assert hashlib.sha256(data).hexdigest().startswith(digest), split
