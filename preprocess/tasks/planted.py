"""planted: sequences whose label is to be read through 51 known pairs of blocks, to see whether a
rule finds the blocks that matter.

    python preprocess/create_planted.py

Beside the pickles: planted.blocks.npy, the planted pairs as a mask bool [32, 32] for
`--pattern given --masks`. Source: docs/data.md, "planted".
"""

from collections.abc import Iterator

import numpy as np

from preprocess import planted
from preprocess.driver import Task
from preprocess.sources import Example

COUNTS = {"train": 24_000, "dev": 1_000, "test": 2_000}
CHUNK = 1000


def generate(job) -> Iterator[Example]:
    options = job.options
    pairs = planted.planted_pairs(options.seed)
    job.extras["planted.blocks.npy"] = planted.planted_mask(pairs)
    for number, (split, count) in enumerate(COUNTS.items()):
        for begin in range(0, count, CHUNK):
            if job.full(split):
                break
            ids, labels = planted.draw_examples(
                pairs,
                min(CHUNK, count - begin),
                planted.Random(options.seed, 1 + number, begin),
                *((planted.EASY_SHARE, None) if split == "train" else (0.0, planted.MOST_MARKED)),
            )
            for row, label in zip(ids, labels.tolist(), strict=True):
                yield split, "", row, label


def same(ids: np.ndarray) -> np.ndarray:
    return ids


TASK = Task(
    name="planted",
    description=__doc__,
    classes=tuple("0123"),
    length=planted.LENGTH,
    counts=COUNTS,
    splits=tuple(COUNTS),
    encoder=lambda options: same,
    generate=generate,
)
