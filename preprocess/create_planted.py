"""Makes the planted task (docs/data.md, "planted"): sequences whose label can be read through 51
known pairs of blocks only, to see whether a rule finds the blocks that matter.

Beside the pickles it writes planted.blocks.npy, the planted pairs as a mask bool [32, 32] for
`--pattern given --masks`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import planted, writer

TASK = "planted"
COUNTS = {"train": 24_000, "dev": 1_000, "test": 2_000}
CHUNK = 1000


def run(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    writer.add_common_options(parser, errors=False, seed="pairs and examples", workers=False)
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative")
    pairs = planted.planted_pairs(args.seed)
    with writer.open_splits(args.output_dir, TASK, tuple(COUNTS)) as splits:
        for number, (split, count) in enumerate(COUNTS.items()):
            count = min(count, args.limit or count)
            for begin in range(0, count, CHUNK):
                ids, labels = planted.draw_examples(
                    pairs,
                    min(CHUNK, count - begin),
                    planted.Random(args.seed, 1 + number, begin),
                    planted.EASY_SHARE if split == "train" else 0.0,
                )
                for row, label in zip(ids, labels, strict=True):
                    splits[split].add(input_ids_0=row, label=label)
        np.save(args.output_dir / "planted.blocks.npy", planted.planted_mask(pairs))


if __name__ == "__main__":
    sys.exit(writer.main(run))
