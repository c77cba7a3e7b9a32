"""The planted task: classification whose answer is to be read through known pairs of blocks.

A sequence has 32 blocks of 16 tokens. Eight blocks are *key columns*. An example asks two of them:
blocks (rows) that need an asked column carry that column's marker, both asked columns show the
label, and no other key column does. So a model must let the marked rows look at their key columns;
which (row, column) pairs that takes is the planted set, the same in all examples and exactly
floor(0.05 * 32^2) = 51 pairs. A pattern that keeps these blocks solves the task, one that keeps
none has hardly any way to the answer: what a rule that chooses blocks should find is known.

In training every row that needs an asked column is marked, so that all pairs are learned; in dev
and test four of them are, so that a pair or two kept by luck tell few answers. Four in ten
training examples are easy: other blocks show the label more often too.

Only raw 64-bit draws are used (NumPy keeps their sequence for ever), so a seed means the same
bytes everywhere.
"""

from __future__ import annotations

import numpy as np

NUM_BLOCKS = 32
BLOCK_SIZE = 16
LENGTH = NUM_BLOCKS * BLOCK_SIZE
NUM_CLASSES = 4  # label c is shown as value id c + 1
MARKER = 5  # 5..12: one id for each key column
FILLER = 13  # 13..20
NUM_COLUMNS = 8
VOCAB_SIZE = 21
COPIES = 6  # of a block's value; its other places hold markers or fillers
NUM_PAIRS = 51
# rows that need each column: one hub, seven others; their sum is NUM_PAIRS
ROWS_OF_COLUMN = (15, 6, 5, 5, 5, 5, 5, 5)
NUM_NEAR = 2  # columns 1 and 2 lie within NEAR blocks of their rows, the others at least FAR away
NEAR, FAR = 3, 8
MOST_MARKED = 4  # rows of an asked column in dev and test
EASY_SHARE = 0.4  # of the training examples: without them reading a value never starts
EASY_COLUMN, EASY_BLOCK = 0.4, 0.5  # chance to show the label for unasked columns, other blocks


class Random:
    """Uniform numbers from the raw draws of PCG64."""

    def __init__(self, *seed: int) -> None:
        self._source = np.random.PCG64(np.random.SeedSequence(list(seed)))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1)."""
        raw = self._source.random_raw(int(np.prod(shape)))
        return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def below(self, limit: int, *shape: int) -> np.ndarray:
        """int64 in 0 .. limit - 1."""
        return (self.uniform(*shape) * limit).astype(np.int64)

    def order(self, count: int, *shape: int) -> np.ndarray:
        """A permutation of 0 .. count - 1 along the last axis of [*shape, count]."""
        return np.argsort(self.uniform(*shape, count), axis=-1, kind="stable")


def planted_pairs(seed: int) -> np.ndarray:
    """Which row needs which key column.

    No pair lies on the diagonal, no pair has its mirror image in the set, every row needs one or
    two columns.

    Returns: int64 [51, 2] of (row, column of blocks), the columns in the order of
        ROWS_OF_COLUMN: the hub's rows first.
    """
    random = Random(seed, 0)
    while True:
        columns = random.order(NUM_BLOCKS)[:NUM_COLUMNS]
        pairs = _draw_pairs(columns, random)
        if pairs is not None:
            return pairs


def _draw_pairs(columns: np.ndarray, random: Random) -> np.ndarray | None:
    """Rows for these columns, the scarcest choice first; None if the conditions cannot be met."""
    needs = np.zeros((NUM_BLOCKS, NUM_BLOCKS), dtype=bool)
    distance = np.abs(np.arange(NUM_BLOCKS)[:, None] - columns)
    near = (np.arange(NUM_COLUMNS) >= 1) & (np.arange(NUM_COLUMNS) <= NUM_NEAR)
    possible = np.where(near, (distance <= NEAR) & (distance > 0), distance >= FAR)
    for place in [1, 2, 0, *range(1 + NUM_NEAR, NUM_COLUMNS)]:
        column = columns[place]
        needed = needs.sum(axis=1)
        free = possible[:, place] & (needed < 2) & ~needs[column]
        # rows that need no column yet come first, so that none is left without
        rank = random.uniform(NUM_BLOCKS) + needed + np.where(free, 0, 100)
        rows = np.argsort(rank, kind="stable")[: ROWS_OF_COLUMN[place]]
        if not free[rows].all():
            return None
        needs[rows, column] = True
    if not needs.any(axis=1).all():
        return None
    return np.concatenate(
        [
            np.stack([np.flatnonzero(needs[:, c]), np.full(needs[:, c].sum(), c)], 1)
            for c in columns
        ]
    )


def planted_mask(pairs: np.ndarray) -> np.ndarray:
    """bool [32, 32], True at the planted pairs."""
    mask = np.zeros((NUM_BLOCKS, NUM_BLOCKS), dtype=bool)
    mask[tuple(pairs.T)] = True
    return mask


def draw_examples(
    pairs: np.ndarray,
    count: int,
    random: Random,
    easy_share: float = 0.0,
    most_marked: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples, of which about `easy_share` are easy.

    most_marked: at most this many of the rows that need an asked column are marked, drawn anew
        for each example; None: all.

    Returns: ids int32 [count, 512], labels int64 [count].
    """
    columns = list(dict.fromkeys(pairs[:, 1].tolist()))
    labels = random.below(NUM_CLASSES, count)
    asked = random.order(NUM_COLUMNS, count)[:, :2]
    easy = random.uniform(count) < easy_share

    # the value that each block shows, 0..3
    value = random.below(NUM_CLASSES, count, NUM_BLOCKS)
    other = (labels[:, None] + 1 + random.below(NUM_CLASSES - 1, count, NUM_BLOCKS)) % NUM_CLASSES
    chance = np.full(NUM_BLOCKS, EASY_BLOCK)
    chance[columns] = EASY_COLUMN
    shows_label = random.uniform(count, NUM_BLOCKS) < chance
    value = np.where(easy[:, None], np.where(shows_label, labels[:, None], other), value)
    value[:, columns] = np.where(
        easy[:, None], value[:, columns], other[:, columns]
    )  # a key column shows the label when it is asked, and by itself in easy examples only
    is_asked = np.zeros((count, NUM_COLUMNS), dtype=bool)
    np.put_along_axis(is_asked, asked, True, axis=1)
    value[:, columns] = np.where(is_asked, labels[:, None], value[:, columns])

    # what stands beside the copies: the markers of the asked columns that the block needs, in turn
    rest = BLOCK_SIZE - COPIES
    filler = FILLER + random.below(VOCAB_SIZE - FILLER, count, NUM_BLOCKS, rest)
    needs = planted_mask(pairs)[:, columns]  # [32, 8]
    wanted = is_asked[:, None, :] & needs  # [count, 32, 8]
    if most_marked is not None:
        order = np.argsort(np.where(wanted, random.uniform(*wanted.shape), 1.0), axis=1)
        wanted &= np.argsort(order, axis=1) < most_marked
    first = wanted.argmax(axis=2)
    last = NUM_COLUMNS - 1 - wanted[:, :, ::-1].argmax(axis=2)
    marker = MARKER + np.stack([first, last], axis=2)[:, :, np.arange(rest) % 2]
    beside = np.where(wanted.any(axis=2)[:, :, None], marker, filler)

    blocks = np.concatenate([np.repeat(value[:, :, None] + 1, COPIES, axis=2), beside], axis=2)
    places = random.order(BLOCK_SIZE, count, NUM_BLOCKS)
    ids = np.take_along_axis(blocks, places, axis=2).astype(np.int32)
    return ids.reshape(count, LENGTH), labels
