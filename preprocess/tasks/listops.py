"""lra-listops: nested expressions such as [MAX 2 [SM 4 7 ] ], whose value is the label.

    python preprocess/create_listops.py               # the LRA release in data/, else generated
    python preprocess/create_listops.py --generate

Generated with the distribution and the limits of the Long Range Arena's own generator, from a
seed. Source: docs/data.md, "lra-listops".

Trees are drawn level by level, thousands at once: a level is a few arrays with one entry a node,
the children of one operator stand together, in the order of the operators. Sizes and values go up
the levels, positions come down. Only raw 64-bit draws are used (NumPy keeps their sequence for
ever; that of its `integers` or `random` may change), so a seed means the same bytes on every
machine, with every NumPy, for any number of processes.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from preprocess import driver, sources, writer
from preprocess.driver import BalancedLimit, Task
from training.errors import UserError

OPERATORS = ("MIN", "MAX", "MED", "SM")
# Ids: digits 0..9 are 1..10, the operators 11..14, the closing bracket 15 (with --keep_brackets);
# 0 is padding.
DIGIT = 1
OPERATOR = 11
BRACKET = 15
IDS = {str(digit): DIGIT + digit for digit in range(10)}
IDS.update({name: OPERATOR + i for i, name in enumerate(OPERATORS)})

MAX_DEPTH = 10  # of the generator: a node at this depth is a digit
MAX_ARGS = 10
CUT = 2000  # tokens that the reference reads of a row
PADDED_LENGTH = 2048
COUNTS = {"train": 96_000, "dev": 2_000, "test": 2_000}
FOLDER = "listops-1000"  # of the release, and its files
FILES = {"train": "basic_train.tsv", "dev": "basic_val.tsv", "test": "basic_test.tsv"}
SIZES = (500, 2000)  # between which the size of an expression lies
ROOTS = 1024  # trees drawn at once: some 500,000 nodes


@dataclasses.dataclass(frozen=True)
class Form:
    """How an expression is written down."""

    keep_brackets: bool = False
    padded_length: int = PADDED_LENGTH

    @property
    def about(self) -> str:
        return "15 tokens" if self.keep_brackets else "14 tokens (no brackets)"


# ---- the generator ----------------------------------------------------------------------


@dataclasses.dataclass
class Level:
    """The nodes of one depth in all trees: tree int64 [nodes], is_operator bool, operator uint8
    0..3, num_args int64 2..10 (0 for digits), digit uint8."""

    tree: np.ndarray
    is_operator: np.ndarray
    operator: np.ndarray
    num_args: np.ndarray
    digit: np.ndarray

    @classmethod
    def draw(cls, random: np.random.PCG64, tree: np.ndarray, operators: bool | None) -> "Level":
        """One draw a node: the top two bits say operator (1 in 4), the next two which, the low
        half how many or which digit.

        operators: True or False makes all nodes operators or digits.
        """
        raw = random.random_raw(len(tree))
        low = raw & np.uint64(0xFFFFFFFF)
        if operators is None:
            is_operator = (raw >> np.uint64(62)) == 0
        else:
            is_operator = np.full(len(tree), operators)
        num_args = (2 + ((low * np.uint64(MAX_ARGS - 1)) >> np.uint64(32))).astype(np.int64)
        return cls(
            tree=tree,
            is_operator=is_operator,
            operator=((raw >> np.uint64(60)) & np.uint64(3)).astype(np.uint8),
            num_args=np.where(is_operator, num_args, 0),
            digit=((low * np.uint64(10)) >> np.uint64(32)).astype(np.uint8),
        )

    def select(self, keep: np.ndarray) -> "Level":
        return Level(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


def draw_trees(
    random, num_trees: int, min_length: int, max_length: int
) -> tuple[list[Level], int]:
    """Draws `num_trees` trees and keeps those with min_length < size < max_length, size = digits +
    2 per operator.

    Returns: the levels from the root down, with kept trees numbered from 0, and their number.
    """
    # The root of an expression that is kept is an operator: a lone digit has size 1.
    levels = [Level.draw(random, np.arange(num_trees), operators=True)]
    size = np.full(num_trees, 2)
    alive = np.ones(num_trees, dtype=bool)
    for depth in range(2, MAX_DEPTH + 1):
        parents = levels[-1]
        tree = np.repeat(parents.tree, np.where(alive[parents.tree], parents.num_args, 0))
        if len(tree) == 0:
            break
        level = Level.draw(random, tree, operators=None if depth < MAX_DEPTH else False)
        levels.append(level)
        size += np.bincount(tree, minlength=num_trees)
        num_operators = np.bincount(tree[level.is_operator], minlength=num_trees)
        size += num_operators
        alive &= size + 2 * num_operators < max_length  # an operator has two arguments or more
    kept = alive & (size > min_length)
    number = np.cumsum(kept) - 1
    levels = [level.select(kept[level.tree]) for level in levels]
    for level in levels:
        level.tree = number[level.tree]
    return [level for level in levels if len(level.tree)], int(kept.sum())


def tree_values(levels: list[Level]) -> np.ndarray:
    """The value of each tree, uint8: MED is the median cut towards zero, SM the sum modulo 10."""
    below = np.empty(0, dtype=np.uint8)
    for level in reversed(levels):
        value = level.digit.copy()
        if level.is_operator.any():
            num_args = level.num_args[level.is_operator]
            starts = np.cumsum(num_args) - num_args
            operator = level.operator[level.is_operator]
            # Arguments in the rows of a table, sorted, missing ones last.
            table = np.full((len(num_args), MAX_ARGS), 10, dtype=np.uint8)
            table[np.arange(MAX_ARGS) < num_args[:, None]] = below
            table.sort(axis=1)
            row = np.arange(len(num_args))
            median = (table[row, (num_args - 1) // 2] + table[row, num_args // 2]) // 2
            value[level.is_operator] = np.choose(
                operator,
                (
                    table[:, 0],
                    table[row, num_args - 1],
                    median,
                    np.add.reduceat(below, starts) % 10,  # at most 90: fits uint8
                ),
            )
        below = value
    return below


def write_trees(levels: list[Level], num_trees: int, form: Form) -> np.ndarray:
    """The trees as ids, int32 [num_trees, padded_length], zeros after the end."""
    own = 2 if form.keep_brackets else 1  # tokens of an operator without its arguments
    lengths: list[np.ndarray] = []
    for level in reversed(levels):
        length = np.ones(len(level.tree), dtype=np.int64)
        if level.is_operator.any():
            num_args = level.num_args[level.is_operator]
            length[level.is_operator] = own + np.add.reduceat(
                lengths[-1], np.cumsum(num_args) - num_args
            )
        lengths.append(length)
    lengths.reverse()

    ids = np.zeros((num_trees, form.padded_length), dtype=np.int32)
    flat = ids.reshape(-1)
    start = np.arange(num_trees) * form.padded_length
    for i, level in enumerate(levels):
        flat[start] = np.where(level.is_operator, OPERATOR + level.operator, DIGIT + level.digit)
        if not level.is_operator.any():
            break
        parents = start[level.is_operator]
        if form.keep_brackets:
            flat[parents + lengths[i][level.is_operator] - 1] = BRACKET
        num_args = level.num_args[level.is_operator]
        before = (
            np.cumsum(lengths[i + 1]) - lengths[i + 1]
        )  # tokens of earlier nodes on the level below
        first = np.cumsum(num_args) - num_args
        start = np.repeat(parents + 1 - before[first], num_args) + before
    return ids


def generate_chunk(
    index: int, *, seed: int, min_length: int, max_length: int, form: Form
) -> list[tuple[bytes, int, bytes]]:
    """The expressions of chunk `index`, a pure function of its arguments: (digest, value, encoded
    example) each."""
    random = np.random.PCG64(np.random.SeedSequence([seed, index]))
    levels, num_trees = draw_trees(random, ROOTS, min_length, max_length)
    if num_trees == 0:
        return []
    ids = write_trees(levels, num_trees, form)
    values = tree_values(levels).astype(np.int32)
    digests = (hashlib.blake2b(row, digest_size=16).digest() for row in ids.astype(np.uint8))
    return [
        (digest, int(value), writer.encode_example(row, value))
        for digest, value, row in zip(digests, values, ids, strict=True)
    ]


def generate(job) -> Iterator[sources.Example]:
    """Test and dev are filled first, so that they stay the same for any --num_train."""
    options = job.options
    form = Form(options.keep_brackets, options.padded_length)
    job.about.append(form.about)
    if not 1 <= options.min_length < options.max_length - 1:
        raise UserError(
            f"no size lies between --min_length {options.min_length} "
            f"and --max_length {options.max_length}"
        )
    if options.max_length - 1 > form.padded_length:
        raise UserError(
            f"expressions of up to {options.max_length - 1:,} tokens do not fit "
            f"--padded_length {form.padded_length}: lower --max_length {options.max_length}"
        )
    counts = {split: getattr(options, f"num_{split}") for split in COUNTS}
    job.counts = dict(counts)
    if (options.min_length, options.max_length) != SIZES:
        job.about.append(f"sizes between {options.min_length} and {options.max_length}")
    if options.limit is not None:
        counts = {split: min(count, options.limit) for split, count in counts.items()}
    writer.check_free_space(
        options.output_dir, sum(counts.values()) * (4 * form.padded_length + 100)
    )
    chunk = functools.partial(
        generate_chunk,
        seed=options.seed,
        min_length=options.min_length,
        max_length=options.max_length,
        form=form,
    )
    seen: set[bytes] = set()
    barren = 0
    waiting = [split for split in ("test", "dev", "train") if counts[split]]
    limits = {
        split: BalancedLimit(counts[split] if options.limit else None, 10) for split in waiting
    }
    filled = dict.fromkeys(waiting, 0)
    with job.map(chunk, itertools.count()) as results:
        for examples in results:
            before = len(seen)
            for digest, value, encoded in examples:
                split = waiting[0]
                if digest in seen or not limits[split].take(value):
                    continue
                seen.add(digest)
                yield split, "", encoded, value
                filled[split] += 1
                if filled[split] == counts[split]:
                    del waiting[0]
                    if not waiting:
                        return
            barren = barren + 1 if len(seen) == before else 0
            if barren == 100:
                raise UserError(
                    f"found {len(seen):,} different expressions and no other in "
                    f"{barren * ROOTS:,} attempts: sizes between {options.min_length:,} and "
                    f"{options.max_length:,} hold too few"
                )


# ---- the release --------------------------------------------------------------------------------


def evaluate(source: str) -> int:
    """The value of an expression of the release ("( ( ( [MAX 2 ) 6 ) ] )"; round brackets are not
    needed).

    Raises: UserError if it is none.
    """
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
            result = _apply(name, arguments)
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


def _apply(name: str, arguments: list[int]) -> int:
    if name == "MIN":
        return min(arguments)
    if name == "MAX":
        return max(arguments)
    if name == "SM":
        return sum(arguments) % 10
    ordered = sorted(arguments)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def tokenize(source: str, keep_brackets: bool) -> list[str]:
    """The reference's tokens: runs of letters, digits and underscores; all brackets vanish, or "]"
    becomes X."""
    return re.findall(r"\w+", source.replace("]", " X ") if keep_brackets else source)


def encode(payload: tuple[str, int] | bytes, form: Form):
    """Ids of (source, target) of a row; an example that `generate` made is encoded already."""
    if isinstance(payload, bytes):
        return payload
    source, label = payload
    value = _value_if_expression(source)
    if value is not None and value != label:
        raise sources.Fault("the target is not the value of the expression")
    ids_of = IDS | {"X": BRACKET} if form.keep_brackets else IDS
    unknown = BRACKET + form.keep_brackets
    tokens = tokenize(source, form.keep_brackets)
    if not tokens:
        raise sources.Fault("the expression is empty")
    row = np.zeros(form.padded_length, dtype=np.int32)
    numbers = [ids_of.get(token, unknown) for token in tokens[: min(CUT, form.padded_length)]]
    row[: len(numbers)] = numbers
    count = numbers.count(unknown)
    return (row, {f"tokens are not ListOps': id {unknown}": count}) if count else row


def _value_if_expression(source: str) -> int | None:
    try:
        return evaluate(source)
    except ValueError:
        return None  # other operators: tokens that we do not know, as the reference takes them


def read_rows(job, source: Path) -> Iterator[sources.Example]:
    """Rows of the release's files; a line is never longer than a megabyte."""
    job.about.append(Form(job.options.keep_brackets).about)
    for split, name, file in sources.named_files(source, FOLDER, FILES):
        header = file.readline(1 << 20)
        if header.rstrip(b"\r\n") != b"Source\tTarget":
            raise UserError(f"{name}: the first line is {header[:40]!r}, not Source<TAB>Target")
        for number in itertools.count(2):
            line = file.readline(1 << 20)
            if not line or job.full(split):
                break
            where = f"{name}, line {number}"
            try:
                expression, label = parse_row(line)
            except sources.Fault as fault:
                job.skips.skip(where, fault.reason)
            else:
                yield split, where, (expression, label), label


def parse_row(line: bytes) -> tuple[str, int]:
    """(expression, label) of a row. Raises Fault."""
    try:
        text = line.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise sources.Fault("not UTF-8") from None
    if not text.strip():
        raise sources.Fault("a blank line")
    if "\r" in text:
        raise sources.Fault("a stray carriage return")
    source, tab, target = text.partition("\t")
    if not tab or "\t" in target:
        raise sources.Fault("not two columns separated by a tab")
    if not re.fullmatch(r"\s*[0-9]\s*", target, re.ASCII):
        raise sources.Fault("the target is not a digit 0..9")
    return source, int(target)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generated expressions")
    for split, count in COUNTS.items():
        group.add_argument(
            f"--num_{split}", type=driver.positive, default=count, help="(default: %(default)s)"
        )
    group.add_argument(
        "--min_length",
        type=int,
        default=SIZES[0],
        help="expressions are larger than this: digits + 2 per operator (default: %(default)s)",
    )
    group.add_argument(
        "--max_length",
        type=int,
        default=SIZES[1],
        help="and smaller than this (default: %(default)s)",
    )
    group = parser.add_argument_group("how they are written")
    group.add_argument(
        "--keep_brackets",
        action="store_true",
        help="the LRA's 15 tokens, with the closing bracket (default: the 14 of SAT)",
    )


TASK = Task(
    name="lra-listops",
    description=__doc__.split("\n\nTrees")[0],
    classes=tuple("0123456789"),
    length=PADDED_LENGTH,
    any_length=True,
    counts=COUNTS,
    splits=tuple(COUNTS),
    encoder=lambda options: functools.partial(
        encode, form=Form(options.keep_brackets, options.padded_length)
    ),
    label_type=np.int32,
    sources=(
        sources.Reader(
            "the LRA release: its root, its listops-1000 folder or its archive",
            read_rows,
            chunk=200,
        ),
    ),
    places=("lra_release", "lra_release.gz"),
    whole=functools.partial(sources.has_files, FOLDER, tuple(FILES.values())),
    generate=generate,
    options=add_options,
)
