"""lra-listops: nested expressions such as [MAX 2 [SM 4 7 ] ], whose value is the label.

    python preprocess/create_listops.py               # the LRA release in data/, else generated
    python preprocess/create_listops.py --generate

Generated with the distribution and the limits of the Long Range Arena's own generator, from a
seed. Source: docs/data.md, "lra-listops".

Trees are drawn level by level, thousands at once: a level is a few arrays with one entry a node,
the children of one operator stand together, in the order of the operators. Sizes and values go up
the levels, positions come down. Only raw 64-bit draws are used (NumPy keeps their sequence for
ever), so a seed means the same bytes on every machine and for any number of processes.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from preprocess import driver, sources, writer
from preprocess.driver import Task
from training.errors import UserError


def _median(values: list[int]) -> int:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


OPERATORS = {"MIN": min, "MAX": max, "MED": _median, "SM": lambda values: sum(values) % 10}
# Ids: digits 0..9 are 1..10, the operators 11..14, the closing bracket 15 (with --keep_brackets);
# 0 is padding.
DIGIT, OPERATOR, BRACKET = 1, 11, 15
IDS = {name: DIGIT + i for i, name in enumerate([*"0123456789", *OPERATORS])}

MAX_DEPTH = 10  # of the generator: a node at this depth is a digit
MAX_ARGS = 10
CUT = 2000  # tokens that the reference reads of a row
PADDED_LENGTH = 2048
COUNTS = {"train": 96_000, "dev": 2_000, "test": 2_000}
EXPECTED = "the LRA release: its root, its listops-1000 folder or its archive"
FOLDER = "listops-1000"  # of the release, and its files
FILES = {"train": "basic_train.tsv", "dev": "basic_val.tsv", "test": "basic_test.tsv"}
SIZES = (500, 2000)  # between which the size of an expression lies
ROOTS = 1024  # trees drawn at once: some 500,000 nodes
ABOUT = ("14 tokens (no brackets)", "15 tokens")  # without and with --keep_brackets


# the nodes of one depth in all trees; num_args: 2..10, 0 for digits
LEVEL = np.dtype(
    [("tree", "i8"), ("is_operator", "?"), ("operator", "u1"), ("num_args", "i8"), ("digit", "u1")]
)


def draw_level(random: np.random.PCG64, tree: np.ndarray, operators: bool | None) -> np.ndarray:
    """One draw a node: the top two bits say operator (1 in 4), the next two which, the low half
    how many or which digit. operators: True or False makes all nodes operators or digits."""
    raw = random.random_raw(len(tree))
    low = raw & np.uint64(0xFFFFFFFF)
    level = np.empty(len(tree), LEVEL)
    level["tree"] = tree
    level["is_operator"] = (raw >> np.uint64(62)) == 0 if operators is None else operators
    level["operator"] = (raw >> np.uint64(60)) & np.uint64(3)
    level["num_args"] = 2 + ((low * np.uint64(MAX_ARGS - 1)) >> np.uint64(32))
    level["num_args"] *= level["is_operator"]
    level["digit"] = (low * np.uint64(10)) >> np.uint64(32)
    return level


def draw_trees(random, num_trees: int, min_length: int, max_length: int):
    """Draws `num_trees` trees and keeps those with min_length < size < max_length, size = digits +
    2 per operator: the levels from the root down, with kept trees numbered from 0, and their
    number."""
    # The root of an expression that is kept is an operator: a lone digit has size 1.
    levels = [draw_level(random, np.arange(num_trees), operators=True)]
    size = np.full(num_trees, 2)
    alive = np.ones(num_trees, dtype=bool)
    for depth in range(2, MAX_DEPTH + 1):
        above = levels[-1]["tree"]
        tree = np.repeat(above, np.where(alive[above], levels[-1]["num_args"], 0))
        if len(tree) == 0:
            break
        levels.append(draw_level(random, tree, None if depth < MAX_DEPTH else False))
        size += np.bincount(tree, minlength=num_trees)
        num_operators = np.bincount(tree[levels[-1]["is_operator"]], minlength=num_trees)
        size += num_operators
        alive &= size + 2 * num_operators < max_length  # an operator has two arguments or more
    kept = alive & (size > min_length)
    levels = [level[kept[level["tree"]]] for level in levels]
    for level in levels:
        level["tree"] = (np.cumsum(kept) - 1)[level["tree"]]
    return [level for level in levels if len(level)], int(kept.sum())


def tree_values(levels: list[np.ndarray]) -> np.ndarray:
    """The value of each tree, uint8: MED is the median cut towards zero, SM the sum modulo 10."""
    below = np.empty(0, dtype=np.uint8)
    for level in reversed(levels):
        value = level["digit"].copy()
        operators = level[level["is_operator"]]
        if len(operators):
            num_args = operators["num_args"]
            # Arguments in the rows of a table, sorted, missing ones last.
            table = np.full((len(num_args), MAX_ARGS), 10, dtype=np.uint8)
            table[np.arange(MAX_ARGS) < num_args[:, None]] = below
            table.sort(axis=1)
            row = np.arange(len(num_args))
            median = (table[row, (num_args - 1) // 2] + table[row, num_args // 2]) // 2
            extremes = table[:, 0], table[row, num_args - 1]
            total = np.add.reduceat(below, np.cumsum(num_args) - num_args)  # at most 90
            choices = (*extremes, median, total % 10)
            value[level["is_operator"]] = np.choose(operators["operator"], choices)
        below = value
    return below


def write_trees(levels: list[np.ndarray], num_trees: int, keep_brackets: bool, padded: int):
    """The trees as ids, int32 [num_trees, padded], zeros after the end."""
    own = 2 if keep_brackets else 1  # tokens of an operator without its arguments
    lengths: list[np.ndarray] = []
    for level in reversed(levels):
        length = np.ones(len(level), dtype=np.int64)
        num_args = level["num_args"][level["is_operator"]]
        if len(num_args):
            starts = np.cumsum(num_args) - num_args
            length[level["is_operator"]] = own + np.add.reduceat(lengths[0], starts)
        lengths.insert(0, length)
    ids = np.zeros((num_trees, padded), dtype=np.int32)
    flat = ids.reshape(-1)
    start = np.arange(num_trees) * padded
    for i, level in enumerate(levels):
        tokens = OPERATOR + level["operator"], DIGIT + level["digit"]
        is_operator, num_args = level["is_operator"], level["num_args"][level["is_operator"]]
        flat[start] = np.where(is_operator, *tokens)
        if not len(num_args):
            break
        parents = start[is_operator]
        if keep_brackets:
            flat[parents + lengths[i][is_operator] - 1] = BRACKET
        # tokens of earlier nodes on the level below
        before = np.cumsum(lengths[i + 1]) - lengths[i + 1]
        first = np.cumsum(num_args) - num_args
        start = np.repeat(parents + 1 - before[first], num_args) + before
    return ids


def generate_chunk(
    seed: int, sizes: tuple[int, int], keep_brackets: bool, padded: int, index: int
):
    """The expressions of chunk `index`, a pure function of its arguments: (digest, value, encoded
    example) each."""
    random = np.random.PCG64(np.random.SeedSequence([seed, index]))
    levels, num_trees = draw_trees(random, ROOTS, *sizes)
    if num_trees == 0:
        return []
    rows = write_trees(levels, num_trees, keep_brackets, padded)
    values = tree_values(levels).astype(np.int32)
    digests = (hashlib.blake2b(row.astype(np.uint8), digest_size=16).digest() for row in rows)
    encoded = map(writer.encode_example, rows, values)
    return list(zip(digests, values.tolist(), encoded, strict=True))


def generate(job) -> Iterator[sources.Example]:
    """Test and dev are filled first, so that they stay the same for any --num_train."""
    options = job.options
    sizes = (options.min_length, options.max_length)
    job.about.append(ABOUT[options.keep_brackets])
    if not 1 <= sizes[0] < sizes[1] - 1:
        lengths = f"--min_length {sizes[0]} and --max_length {sizes[1]}"
        raise UserError(f"no size lies between {lengths}")
    if sizes[1] - 1 > options.padded_length:
        fit = f"{sizes[1] - 1:,} tokens do not fit --padded_length {options.padded_length}"
        raise UserError(f"expressions of up to {fit}: lower --max_length {sizes[1]}")
    if sizes != SIZES:
        job.about.append(f"sizes between {sizes[0]} and {sizes[1]}")
    counts = {split: getattr(options, f"num_{split}") for split in COUNTS}
    job.counts = dict(counts)
    if options.limit is not None:
        counts = {split: min(count, options.limit) for split, count in counts.items()}
    num_bytes = sum(counts.values()) * (4 * options.padded_length + 100)
    writer.check_free_space(options.output_dir, num_bytes)
    missing = ["test"] * counts["test"] + ["dev"] * counts["dev"] + ["train"] * counts["train"]
    form = (options.keep_brackets, options.padded_length)
    chunk = functools.partial(generate_chunk, options.seed, sizes, *form)
    seen: set[bytes] = set()
    barren = 0
    with job.map(chunk, itertools.count()) as results:
        for examples in results:
            before = len(seen)
            for digest, value, encoded in examples:
                if len(seen) == len(missing):
                    return
                split = missing[len(seen)]
                if digest not in seen and job.limits[split].wants(value):
                    seen.add(digest)
                    yield split, "", encoded, value
            barren = barren + 1 if len(seen) == before else 0
            if barren == 100:
                found = f"{len(seen):,} different expressions in {barren * ROOTS:,} attempts"
                raise UserError(f"{found}: sizes between {sizes[0]} and {sizes[1]} hold too few")


def evaluate(source: str) -> int:
    """The value of an expression of the release, "( ( ( [MAX 2 ) 6 ) ] )"; round brackets are not
    needed. Raises: UserError if it is none."""
    outer: list[list] = []  # open operators: [name, arguments...]
    value = None
    for token in source.replace("(", " ").replace(")", " ").split():
        if value is not None:
            raise UserError(f"{token!r} after the end of the expression")
        if token[0] == "[" and token[1:] in OPERATORS:
            outer.append([token[1:]])
            continue
        if token == "]" and outer and len(outer[-1]) > 1:
            name, *arguments = outer.pop()
            result = OPERATORS[name](arguments)
        elif len(token) == 1 and token in IDS:
            result = int(token)
        else:
            raise UserError(f"{token!r} is out of place")
        if outer:
            outer[-1].append(result)
        else:
            value = result
    if value is None:
        raise UserError("the expression has no end")
    return value


def encode(keep_brackets: bool, length: int, payload: tuple[bytes, int] | bytes):
    """Ids of (source, target) of a row; an example that `generate` made is encoded already.

    The reference's tokens are runs of letters, digits and underscores: all brackets vanish, or "]"
    becomes X."""
    if isinstance(payload, bytes):
        return payload
    try:
        source, label = payload[0].decode(), payload[1]
    except UnicodeDecodeError:
        raise sources.Fault("not UTF-8") from None
    # ValueError: with other operators, which the reference takes as tokens that it does not know
    value = label
    with contextlib.suppress(ValueError):
        value = evaluate(source)
    if value != label:
        raise sources.Fault("the target is not the value of the expression")
    tokens = re.findall(r"\w+", source.replace("]", " X ") if keep_brackets else source)
    if not tokens:
        raise sources.Fault("the expression is empty")
    ids_of = IDS | {"X": BRACKET} if keep_brackets else IDS
    unknown = BRACKET + keep_brackets
    row = np.zeros(length, dtype=np.int32)
    numbers = [ids_of.get(token, unknown) for token in tokens[: min(CUT, length)]]
    row[: len(numbers)] = numbers
    count = numbers.count(unknown)
    return (row, {f"tokens are not ListOps': id {unknown}": count}) if count else row


def read_rows(job, source: Path) -> Iterator[sources.Example]:
    """Rows of the release's files."""
    job.about.append(ABOUT[job.options.keep_brackets])
    for split, name, file in sources.named_files(source, FOLDER, FILES):
        header = file.readline(1 << 20)
        if header.rstrip(b"\r\n") != b"Source\tTarget":
            raise UserError(f"{name}: the first line is {header[:40]!r}, not Source<TAB>Target")
        for where, (expression, target), _ in sources.tsv_rows(file, name, job.skips, 2, 2):
            if job.full(split):
                break
            if not re.fullmatch(rb"\s*[0-9]\s*", target):
                job.skips.skip(where, "the target is not a digit 0..9")
            else:
                yield split, where, (expression, int(target)), int(target)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generated expressions")
    default = "(default: %(default)s)"
    for split, count in COUNTS.items():
        group.add_argument(f"--num_{split}", type=driver.positive, default=count, help=default)
    text = f"expressions are larger than this: digits + 2 per operator {default}"
    group.add_argument("--min_length", type=int, default=SIZES[0], help=text)
    text = f"and smaller than this {default}"
    group.add_argument("--max_length", type=int, default=SIZES[1], help=text)
    group = parser.add_argument_group("how they are written")
    text = "the LRA's 15 tokens, with the closing bracket (default: the 14 of SAT)"
    group.add_argument("--keep_brackets", action="store_true", help=text)


TASK = Task(
    name="lra-listops",
    description=__doc__.split("\n\nTrees")[0],
    classes=tuple("0123456789"),
    length=PADDED_LENGTH,
    any_length=True,
    counts=COUNTS,
    splits=tuple(COUNTS),
    encoder=lambda opts: functools.partial(encode, opts.keep_brackets, opts.padded_length),
    label_type=np.int32,
    sources=(sources.Reader(EXPECTED, read_rows, chunk=200),),
    places=("lra_release", "lra_release.gz"),
    whole=functools.partial(sources.has_files, FOLDER, tuple(FILES.values())),
    generate=generate,
    options=add_options,
)
