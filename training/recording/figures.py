"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def draw_transition(
    path: Path, attention: np.ndarray | None, scores: np.ndarray, masks: np.ndarray, step: int
) -> np.ndarray:
    """Writes a PNG with a column a layer: mean attention, pattern scores, kept blocks.

    Args:
        attention: [L, N, N] or None; scores: [L, nb, nb]; masks: bool [L, nb, nb].

    Returns: the picture, uint8 [height, width, 3].
    """
    figure, canvas = _figure(3.2 * len(masks) + 0.6, 9.6 if attention is not None else 6.6)
    rows = 3 if attention is not None else 2
    axes = figure.subplots(rows, len(masks), squeeze=False)
    for layer in range(len(masks)):
        column = list(axes[:, layer])
        if attention is not None:
            axis = column.pop(0)
            # averaged down to what the picture can show; logarithmic, as attention spans orders of
            # magnitude
            size = attention.shape[-1]
            factor = max(1, size // 256)
            small = attention[layer].reshape(size // factor, factor, size // factor, factor)
            values = np.log10(np.maximum(small.mean(axis=(1, 3)), 1e-9))
            low = max(float(values.min()), float(values.max()) - 4)
            shown = axis.imshow(
                values,
                cmap="viridis",
                vmin=low,
                extent=(0, size, size, 0),
                interpolation="nearest",
            )
            axis.set_title(f"layer {layer}: mean attention", fontsize=9)
            axis.set_ylabel("query" if layer == 0 else "")
            figure.colorbar(shown, ax=axis, fraction=0.046, label="log10")
        shown = column[0].imshow(scores[layer], cmap="magma", interpolation="nearest")
        column[0].set_title("learned pattern scores", fontsize=9)
        figure.colorbar(shown, ax=column[0], fraction=0.046)
        column[1].imshow(masks[layer], cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        column[1].set_title(
            f"{int(masks[layer].sum())} of {masks[layer].size} blocks kept", fontsize=9
        )
        column[1].set_xlabel("key block")
        for axis in column:
            if layer == 0:
                axis.set_ylabel("query block")
    figure.suptitle(f"transition after step {step}", fontsize=11)
    return _save(figure, canvas, path)


def draw_run(path: Path, records: list[dict[str, Any]], skewness: float, distance: float) -> None:
    """Writes a PNG of a whole run from its metrics: loss, dev accuracy, skewness and change
    against their thresholds."""
    train = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    switch = [r["step"] for r in records if r["event"] == "transition"]
    dense = [r for r in train if r["phase"] == "dense"]
    figure, canvas = _figure(8.0, 7.6)
    top, middle, bottom = figure.subplots(3, 1)
    top.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.8, label="train loss")
    if evals:
        right = top.twinx()
        right.plot(
            [r["step"] for r in evals],
            [r["accuracy"] for r in evals],
            "o-",
            color="tab:orange",
            ms=4,
            label="dev accuracy",
        )
        right.set_ylabel("dev accuracy", color="tab:orange")
    top.set_ylabel("train loss", color="tab:blue")
    layers = range(len(train[0]["skewness"])) if train else range(0)
    for layer in layers:
        steps = [r["step"] for r in dense]
        middle.plot(
            steps, [_gap(r["skewness"][layer]) for r in dense], lw=1, label=f"layer {layer}"
        )
        bottom.plot(
            steps,
            [_gap(r["change_percent"][layer]) for r in dense],
            lw=0.8,
            label=f"layer {layer}",
        )
    middle.axhline(skewness, color="black", ls="--", lw=0.8, label="threshold")
    middle.set_ylabel("skewness")
    bottom.axhline(distance, color="black", ls="--", lw=0.8, label="threshold")
    bottom.set_yscale("log")
    bottom.set_ylabel("change of distance, %")
    bottom.set_xlabel("step")
    for axis in (top, middle, bottom):
        for step in switch:
            axis.axvline(step, color="tab:red", lw=1)
    for axis in (middle, bottom):
        if dense:
            axis.legend(fontsize=8, loc="best")
    top.set_title(
        "red line: transition to sparse attention" if switch else "no transition", fontsize=9
    )
    _save(figure, canvas, path)


def _gap(value: float | None) -> float:
    return float("nan") if value is None else value


def _figure(width: float, height: float):
    # the object interface with its own canvas: no global state, no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _save(figure, canvas, path: Path) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    Image.fromarray(pixels).save(path)
    return pixels
