"""preprocess/create_listops.py against a plain recursive generator and evaluator."""

import collections
import pickle
import random
import re
import statistics
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import sources
from preprocess.tasks import listops as create_listops
from tests import preparing

TOKENS = ["<pad>", *map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]"]  # by id


def make(folder, *options) -> int:
    return preparing.run(create_listops.TASK, "--output_dir", folder, *options)


def items(folder, split: str) -> list[dict]:
    with open(folder / f"lra-listops.{split}.pickle", "rb") as file:
        return pickle.load(file)


# ---- the generator said again, slowly -----------------------------------------------------------


def plain_tree(depth: int, rng: random.Random):
    """The published generator: an operator in one of four nodes, digits only at depth 10."""
    if depth == 10 or rng.random() > 0.25:
        return rng.randrange(10)
    count = rng.randint(2, 10)
    return (
        rng.choice(["MIN", "MAX", "MED", "SM"]),
        [plain_tree(depth + 1, rng) for _ in range(count)],
    )


def size(tree) -> int:
    return 1 if isinstance(tree, int) else 2 + sum(map(size, tree[1]))


def value(tree) -> int:
    if isinstance(tree, int):
        return tree
    values = [value(t) for t in tree[1]]
    if tree[0] == "MED":
        return int(statistics.median(values))
    return {"MIN": min, "MAX": max, "SM": lambda v: sum(v) % 10}[tree[0]](values)


def text(tree, round_brackets: bool) -> str:
    """As the release writes it: ( ( ( [MAX 2 ) 6 ) ] )."""
    if isinstance(tree, int):
        return str(tree)
    parts = ["[" + tree[0], *(text(t, round_brackets) for t in tree[1]), "]"]
    if not round_brackets:
        return " ".join(parts)
    result = parts[0]
    for part in parts[1:]:
        result = f"( {result} {part} )"
    return result


def parse(ids) -> object:
    """The tree in a sequence with brackets."""

    def read(position: int):
        name = TOKENS[ids[position]]
        if not name.startswith("["):
            return int(name), position + 1
        arguments, position = [], position + 1
        while TOKENS[ids[position]] != "]":
            argument, position = read(position)
            arguments.append(argument)
        return (name[1:], arguments), position + 1

    ids = ids.tolist()
    tree, end = read(0)
    assert not any(ids[end:])
    return tree


trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.tuples(
        st.sampled_from(["MIN", "MAX", "MED", "SM"]), st.lists(inner, min_size=1, max_size=10)
    ),
    max_leaves=30,
)


@given(trees, st.booleans())
@settings(deadline=None)
def test_evaluator(tree, round_brackets):
    assert create_listops.evaluate(text(tree, round_brackets)) == value(tree)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("( ( ( [MAX 2 ) 6 ) ] )", 6),
        ("[MED 1 2 ]", 1),
        ("[MED 9 8 1 2 ]", 5),
        ("[MED 3 4 5 ]", 4),
        ("[SM 9 9 9 ]", 7),
        ("7", 7),
    ],
)
def test_evaluator_by_hand(source, expected):
    assert create_listops.evaluate(source) == expected


@pytest.mark.parametrize(
    "source", ["", "[MAX ]", "[MAX 2", "2 ]", "]", "[MAX 2 ] 3", "[MIX 2 ]", "12", "x"]
)
def test_evaluator_refuses(source):
    with pytest.raises(ValueError):
        create_listops.evaluate(source)


# ---- generated data -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listops")
    options = ("--num_train", 1000, "--num_dev", 200, "--num_test", 200, "--keep_brackets")
    assert make(folder, *options, "--workers", 2) == 0
    return folder


def test_expressions_and_values(made):
    for split, count in (("train", 1000), ("dev", 200), ("test", 200)):
        examples = items(made, split)
        assert len(examples) == count
        for example in examples:
            ids, label = example["input_ids_0"], example["label"]
            assert ids.dtype == np.int32 and ids.shape == (2048,) and type(label) is np.int32
            tree = parse(ids)
            assert value(tree) == label and 500 < size(tree) < 2000
            assert np.count_nonzero(ids) == size(tree)


def facts(tree, depth: int = 1) -> tuple[int, int, int]:
    """(digits, operators, depth)"""
    if isinstance(tree, int):
        return 1, 0, depth
    below = [facts(t, depth + 1) for t in tree[1]]
    digits, operators, depths = zip(*below, strict=True)
    return sum(digits), 1 + sum(operators), max(depths)


def test_distribution_is_the_published_generators(made):
    """Sizes, shares of operators, depths, values: 1,000 of ours, 300 of the plain generator."""
    rng = random.Random(0)
    plain = []
    while len(plain) < 300:
        tree = plain_tree(1, rng)
        if 500 < size(tree) < 2000:
            plain.append(tree)
    ours = [parse(example["input_ids_0"]) for example in items(made, "train")[:1000]]
    measured = [
        [
            (digits + 2 * operators, operators / digits, depth, value(tree))
            for tree in trees
            for digits, operators, depth in [facts(tree)]
        ]
        for trees in (ours, plain)
    ]
    for a, b in zip(*(zip(*rows, strict=True) for rows in measured), strict=True):
        error = (np.var(a) / len(a) + np.var(b) / len(b)) ** 0.5
        assert abs(statistics.fmean(a) - statistics.fmean(b)) <= 4 * error
        assert abs(np.std(a) - np.std(b)) <= 0.2 * np.std(b)
    arguments = collections.Counter()
    names = collections.Counter()

    def count(tree):
        if not isinstance(tree, int):
            arguments[len(tree[1])] += 1
            names[tree[0]] += 1
            for inner in tree[1]:
                count(inner)

    for tree in ours[:300]:
        count(tree)
    assert set(arguments) == set(range(2, 11))
    total = sum(names.values())
    assert all(abs(n / total - 0.25) < 0.02 for n in names.values()), names


def test_no_expression_twice(made):
    seen = [ex["input_ids_0"].tobytes() for s in ("train", "dev", "test") for ex in items(made, s)]
    assert len(set(seen)) == len(seen) == 1400


@pytest.mark.parametrize("workers", [1, 3])
def test_a_seed_means_the_same_bytes(made, tmp_path, workers):
    """For any number of processes; dev and test also for another --num_train."""
    options = ("--num_train", 300, "--num_dev", 200, "--num_test", 200, "--keep_brackets")
    assert make(tmp_path, *options, "--workers", workers) == 0
    for split in ("dev", "test"):
        name = f"lra-listops.{split}.pickle"
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    first = [ex["input_ids_0"].tolist() for ex in items(made, "train")[:300]]
    assert [ex["input_ids_0"].tolist() for ex in items(tmp_path, "train")] == first


def test_another_seed_means_others(made, tmp_path):
    options = (
        "--num_train",
        20,
        "--num_dev",
        20,
        "--num_test",
        20,
        "--keep_brackets",
        "--workers",
        1,
    )
    assert make(tmp_path, *options, "--seed", 1) == 0
    ours = {ex["input_ids_0"].tobytes() for ex in items(tmp_path, "train")}
    assert not ours & {ex["input_ids_0"].tobytes() for ex in items(made, "train")}


def test_golden(tmp_path):
    """The first example of seed 0, for ever: models depend on the ids and on the order."""
    options = ("--num_train", 1, "--num_dev", 1, "--num_test", 1, "--workers", 1)
    assert (
        make(tmp_path, *options, "--min_length", 8, "--max_length", 24, "--padded_length", 32) == 0
    )
    (example,) = items(tmp_path, "test")
    assert (example["input_ids_0"].tolist(), int(example["label"])) == GOLDEN


GOLDEN = (
    [
        13,
        13,
        10,
        13,
        1,
        6,
        3,
        7,
        7,
        3,
        9,
        9,
        8,
        1,
        5,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ],
    6,
)


def test_fourteen_tokens_are_the_fifteen_without_brackets(made, tmp_path):
    options = ("--num_train", 20, "--num_dev", 200, "--num_test", 200, "--workers", 1)
    assert make(tmp_path, *options) == 0
    for ours, full in zip(items(tmp_path, "dev"), items(made, "dev"), strict=True):
        kept = full["input_ids_0"][full["input_ids_0"] != create_listops.BRACKET]
        assert np.array_equal(ours["input_ids_0"], np.pad(kept, (0, 2048 - len(kept))))
        assert ours["label"] == full["label"] and ours["input_ids_0"].max() == 14


def test_short_expressions_in_another_folder(tmp_path):
    """What the demo asks for."""
    options = ("--min_length", 10, "--max_length", 100, "--padded_length", 256, "--keep_brackets")
    counts = ("--num_train", 300, "--num_dev", 30, "--num_test", 30)
    assert make(tmp_path / "demo", *options, *counts, "--workers", 1) == 0
    for example in items(tmp_path / "demo", "train"):
        assert example["input_ids_0"].shape == (256,)
        assert 10 < size(parse(example["input_ids_0"])) < 100


def test_limit_is_balanced(tmp_path):
    assert make(tmp_path, "--limit", 30, "--workers", 1) == 0
    for split in ("train", "dev", "test"):
        counts = collections.Counter(int(ex["label"]) for ex in items(tmp_path, split))
        assert counts == dict.fromkeys(range(10), 3)


@pytest.mark.parametrize(
    "options, what",
    [
        (("--max_length", 100), "no size lies between --min_length 500 and --max_length 100"),
        (("--padded_length", 1024), "1,999 tokens do not fit --padded_length 1024"),
        (("--seed", -1), "argument --seed: -1 is not between 0 and 18446744073709551615"),
        (("--min_length", 3, "--max_length", 6, "--workers", 1), "hold too few"),
        (("--source", "/nope"), "/nope"),
    ],
)
def test_mistakes(tmp_path, capsys, options, what):
    assert make(tmp_path / "out", *options) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---- the release's files ------------------------------------------------------------------------


def line(tree) -> str:
    return f"{text(tree, True)}\t{value(tree)}\r\n"


def release(count: int = 25) -> tuple[dict[str, bytes], dict[str, list]]:
    rng = random.Random(1)
    wanted: dict[str, list] = {}
    for split in ("train", "val", "test"):
        wanted[split] = []
        while len(wanted[split]) < count:
            tree = plain_tree(5, rng)
            if size(tree) > 3:
                wanted[split].append(tree)
    files = {
        f"basic_{split}.tsv": ("Source\tTarget\r\n" + "".join(map(line, trees))).encode()
        for split, trees in wanted.items()
    }
    return files, wanted


ORDER = [*"0123456789", "MIN", "MAX", "MED", "SM", "X"]  # of the ids, from 1


def expected(trees, keep_brackets: bool) -> collections.Counter:
    result: collections.Counter = collections.Counter()
    for tree in trees:
        source = text(tree, True).replace("]", " X ") if keep_brackets else text(tree, True)
        tokens = [t for t in re.split(r"[^A-Za-z0-9_]+", source) if t]
        ids = [1 + ORDER.index(t) for t in tokens[:2000]]
        result[(*ids, *[0] * (2048 - len(ids))), value(tree)] += 1
    return result


@pytest.mark.parametrize("layout", ["folder", "root", "deep", "archive"])
@pytest.mark.parametrize("keep_brackets", [False, True])
def test_release(tmp_path, layout, keep_brackets):
    files, wanted = release()
    below = {
        "folder": "",
        "root": "listops-1000/",
        "deep": "lra_release/lra_release/listops-1000/",
    }
    source = tmp_path / "release"
    if layout == "archive":
        source = tmp_path / "lra_release.gz"
        members = {f"lra_release/listops-1000/{name}": data for name, data in files.items()}
        source.write_bytes(preparing.tar({"lra_release/other/basic_train.tsv": b"x", **members}))
    else:
        preparing.lay_out(source, {below[layout] + name: data for name, data in files.items()})
    more = ["--keep_brackets"] if keep_brackets else []
    assert make(tmp_path / "out", "--source", source, "--workers", 1, *more) == 0
    for split, theirs in (("train", "train"), ("dev", "val"), ("test", "test")):
        assert preparing.examples(tmp_path / "out", "lra-listops", split) == expected(
            wanted[theirs], keep_brackets
        )


BROKEN = {
    "blank": ("\r\n", "blank line"),
    "one column": ("[MAX 2 3 ]\r\n", "1 columns, expected 2"),
    "three columns": ("[MAX 2 3 ]\t3\t4\r\n", "3 columns, expected 2"),
    "no source": ("\t3\r\n", "the expression is empty"),
    "no target": ("[MAX 2 3 ]\t\r\n", "the target is not a digit"),
    "large target": ("[MAX 2 3 ]\t10\r\n", "the target is not a digit"),
    "float target": ("[MAX 2 3 ]\t3.0\r\n", "the target is not a digit"),
    "wrong value": ("[MAX 2 3 ]\t2\r\n", "the target is not the value of the expression"),
    "stray CR": ("[MAX 2\r 3 ]\t3\r\n", "a carriage return inside"),
    "no text": ("[MAX 2 3 \udcff]\t3\r\n", "not UTF-8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_rows(tmp_path, capsys, kind):
    bad, what = BROKEN[kind]
    files, wanted = release(5)
    rows = files["basic_val.tsv"].splitlines(keepends=True)
    rows.insert(3, bad.encode("utf-8", "surrogateescape"))
    files["basic_val.tsv"] = b"".join(rows)
    preparing.lay_out(tmp_path / "in", files)
    options = ("--source", tmp_path / "in", "--workers", 1)
    assert make(tmp_path / "out", *options) == 2
    error = preparing.error_of(capsys)
    assert what in error and "basic_val.tsv, line 4" in error
    assert list((tmp_path / "out").iterdir()) == []
    assert make(tmp_path / "out", *options, "--on_error", "skip") == 0
    assert f"skipped 1: {what}" in capsys.readouterr().out
    assert preparing.examples(tmp_path / "out", "lra-listops", "dev") == expected(
        wanted["val"], False
    )


def test_unknown_tokens_are_kept_and_counted(tmp_path, capsys):
    files, _ = release(2)
    files["basic_val.tsv"] = b"Source\tTarget\n[FIRST 2 3 ]\t2\n"
    preparing.lay_out(tmp_path / "in", files)
    assert make(tmp_path / "out", "--source", tmp_path / "in", "--workers", 1) == 0
    assert "1 tokens are not ListOps': id 15" in capsys.readouterr().out
    (example,) = items(tmp_path / "out", "dev")
    assert example["input_ids_0"][:4].tolist() == [15, 3, 4, 0]


def test_long_rows_are_cut_at_2000(tmp_path):
    files, _ = release(2)
    digits = " ".join(["[MAX", *["3"] * 2100, "]"])
    files["basic_test.tsv"] = f"Source\tTarget\r\n{digits}\t3\r\n".encode()
    preparing.lay_out(tmp_path / "in", files)
    assert make(tmp_path / "out", "--source", tmp_path / "in", "--workers", 1) == 0
    (example,) = items(tmp_path / "out", "test")
    assert example["input_ids_0"].tolist() == [12, *[4] * 1999, *[0] * 48]


@pytest.mark.parametrize("kind", ["empty", "no val", "header", "cut", "no archive"])
def test_broken_sources(tmp_path, capsys, kind):
    files, _ = release(5)
    source = tmp_path / "in"
    what = {
        "empty": "basic_train.tsv",
        "no val": "basic_val.tsv",
        "header": "the first line is",
    }.get(kind, "lra_release.gz")
    if kind == "no val":
        del files["basic_val.tsv"]
    elif kind == "header":
        files["basic_test.tsv"] = b"label\ttext\r\n"
    elif kind == "empty":
        files = {"readme.txt": b""}
    if kind in ("cut", "no archive"):
        source = tmp_path / "lra_release.gz"
        members = {f"listops-1000/{name}": data for name, data in files.items()}
        data = preparing.tar(members)
        source.write_bytes(data[: len(data) // 2] if kind == "cut" else b"hello")
    else:
        preparing.lay_out(source, files)
    assert make(tmp_path / "out", "--source", source, "--workers", 1) == 2
    assert what in preparing.error_of(capsys)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_rows_never_do_worse_than_a_sentence(tmp_path, count):
    rng = random.Random(2)
    rows = b"Source\tTarget\n"
    good = (line(("MAX", [1, ("SM", [2, 3]), 4])) + line(7)).encode()
    for _ in range(count):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data))
            action = rng.randrange(3)
            if action == 0:
                data[place] = rng.choice(b"\t\r\n\0[]() 9\xff\xc3M" + bytes([rng.randrange(256)]))
            elif action == 1:
                del data[place]
            else:
                data.insert(place, rng.randrange(256))
        rows += bytes(data) + b"\n"
    preparing.lay_out(tmp_path, dict.fromkeys(create_listops.FILES.values(), rows))
    job = preparing.job("skip")
    job.about, job.options = [], types.SimpleNamespace(keep_brackets=False)
    read = refused = 0
    for _, _, payload, label in create_listops.read_rows(job, tmp_path):
        try:
            ids = create_listops.encode(False, 2048, payload)
        except sources.Fault:
            refused += 1
            continue
        ids = ids[0] if isinstance(ids, tuple) else ids
        assert 0 <= label <= 9 and ids.max() > 0 and ids.shape == (2048,)
        read += 1
    assert read > count and refused > count // 10 and job.skips.counts.total() > count // 10
