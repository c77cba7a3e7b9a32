"""Two runs that differ in the blocks they keep: one line each, and a picture.

python experiments/compare.py MASS.metrics.jsonl LEARNED.metrics.jsonl --picture compare.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path: Path) -> dict:
    """Name, events by kind, and the transition of a run's metrics.jsonl.

    Raises: ValueError if the run has no transition with its blocks.
    """
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    switch = next((e for e in events if e["event"] == "transition"), None)
    if switch is None or not switch.get("kept_blocks"):
        raise ValueError(f"{path} has no transition to sparse attention")
    end = next((e for e in events if e["event"] == "end"), {})
    evals = [(e["step"], e["accuracy"]) for e in events if e["event"] == "eval"]
    name = path.name.removesuffix(".metrics.jsonl")
    return {"name": name, "switch": switch, "evals": evals, "test": end.get("accuracy")}


def mask_of(switch: dict, layer: int) -> np.ndarray:
    """bool [nb, nb] of the blocks that a layer keeps."""
    count = switch["num_blocks"]
    mask = np.zeros(count * count, dtype=bool)
    mask[switch["kept_blocks"][layer]] = True
    return mask.reshape(count, count)


def sentence(run: dict) -> str:
    switch = run["switch"]
    layer = int(np.nanargmax(np.array(switch["best_mass"], dtype=float)))
    kept, best = switch["kept_mass"][layer], switch["best_mass"][layer]
    result = f"test accuracy {run['test']:.3f}" if run["test"] is not None else "no test yet"
    return (
        f"{run['name']}: switched after {switch['step']} steps, keeps {kept:.1%} of layer "
        f"{layer}'s attention (the best blocks hold {best:.1%}); {result}"
    )


def draw(runs: list[dict], path: Path) -> None:
    """Attention of the layer that has concentrated most, the blocks of each run, accuracy."""
    switch = runs[0]["switch"]
    layer = int(np.nanargmax(np.array(switch["best_mass"], dtype=float)))
    count = switch["num_blocks"]
    squares = [f"square {i}" for i in range(1 + len(runs))]
    figure, axes = plt.subplot_mosaic(
        [squares, ["accuracy"] * len(squares)],
        figsize=(7, 2.0 + 7 / len(squares)),
        height_ratios=[7 / len(squares), 1.7],
        layout="constrained",
    )
    attention = np.array(switch["pooled"][layer]).reshape(count, count)
    first = axes["square 0"]
    first.imshow(attention, cmap="viridis")
    first.set_title("attention at the switch", fontsize=10)
    first.set_ylabel("query block")
    for run, square in zip(runs, squares[1:], strict=True):
        axes[square].imshow(mask_of(run["switch"], layer), cmap="gray_r")
        kept = run["switch"]["kept_mass"][layer]
        axes[square].set_title(f"{run['name']} keeps {kept:.0%} of it", fontsize=10)
    for square in squares:
        axes[square].set_xlabel("key block")
        axes[square].set_xticks([0, count - 1])
        axes[square].set_yticks([0, count - 1])
    curves = axes["accuracy"]
    for run in runs:
        steps, accuracy = zip(*run["evals"], strict=True)
        curves.plot(steps, accuracy, marker=".", label=run["name"])
    curves.axvline(switch["step"], color="gray", linestyle=":")
    middle = curves.get_xaxis_transform()
    curves.text(switch["step"], 0.06, "dense ", color="gray", ha="right", transform=middle)
    curves.text(switch["step"], 0.06, " sparse", color="gray", transform=middle)
    curves.set_xlabel("step")
    curves.set_ylabel("accuracy")
    curves.set_ylim(0, 1.03)
    # above the curves, which may be anywhere below
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    curves.legend(**place, ncols=len(runs), frameon=False)
    figure.savefig(path, dpi=200)  # text is legible at half of this size, 700 pixels
    plt.close(figure)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of the runs")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    try:
        runs = [read(path) for path in args.metrics]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        print(sentence(run))
    if args.picture:
        draw(runs, args.picture)
        print(f"picture: {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
