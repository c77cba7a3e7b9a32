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
    """Pooled attention of the layer that has concentrated most, each run's blocks, accuracy."""
    switch = runs[0]["switch"]
    layer = int(np.nanargmax(np.array(switch["best_mass"], dtype=float)))
    count = switch["num_blocks"]
    figure, axes = plt.subplots(
        1, 2 + len(runs), figsize=(3.1 * (2 + len(runs)), 3.5), layout="constrained"
    )
    attention = np.array(switch["pooled"][layer]).reshape(count, count)
    axes[0].imshow(attention, cmap="viridis")
    axes[0].set_title(f"attention at the switch\n(layer {layer})", fontsize=11)
    axes[0].set_ylabel("query block")
    for axis, run in zip(axes[1:], runs, strict=False):
        axis.imshow(mask_of(run["switch"], layer), cmap="gray_r")
        kept = run["switch"]["kept_mass"][layer]
        axis.set_title(f"{run['name']} keeps {kept:.0%}\nof it", fontsize=11)
    for axis in axes[:-1]:
        axis.set_xlabel("key block")
        axis.set_xticks([0, count - 1])
        axis.set_yticks([0, count - 1])
    for run in runs:
        steps, accuracy = zip(*run["evals"], strict=True)
        axes[-1].plot(steps, accuracy, marker=".", label=run["name"])
    axes[-1].axvline(switch["step"], color="gray", linestyle=":")
    axes[-1].text(
        switch["step"], 0.02, " sparse", color="gray", transform=axes[-1].get_xaxis_transform()
    )
    axes[-1].set_title("accuracy", fontsize=11)
    axes[-1].set_xlabel("step")
    axes[-1].set_ylim(0, 1.03)
    axes[-1].legend(loc="center right", frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
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
