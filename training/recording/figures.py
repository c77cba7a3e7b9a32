"""Figures of a run: functions of the events in metrics.jsonl, each returns an SVG for its page.

Every list with an entry a layer is drawn, whatever its name: a criterion's values against its
thresholds, any other observation by itself.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np

Records = list[dict[str, Any]]

# legible on white and on a dark page
COLORS = ("#3c82d4", "#d9730d", "#2f9e62", "#a565d8", "#d9485f", "#8a8d2b")
WIDTH = 4.6  # inches; a phone shows it at its size
MASSES = {"kept_mass": ("kept", "-"), "best_mass": ("best", "--"), "chance_mass": ("chance", ":")}
MOST_POINTS = 400  # of a curve; more are drawn as mean, lowest and highest of equal stretches


def observations(records: Records) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What comes as a list with an entry a layer: by its name, steps [T] and values [T, L], NaN
    where undefined; only what is defined somewhere, in order of appearance."""
    found: dict[str, tuple[list, list]] = {}
    for record in records:
        if record["event"] in ("train", "probe"):
            for name, value in record.items():
                if isinstance(value, list) and any(entry is not None for entry in value):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    # None becomes NaN
    return {name: (np.array(s, float), np.array(v, float)) for name, (s, v) in found.items()}


def step_seconds(records: Records) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Steps, the seconds each took, and its phase. The first step of all counts from 0."""
    train = [record for record in records if record["event"] == "train"]
    seconds = np.array([record["seconds"] for record in train], float)
    took = np.diff(seconds, prepend=0.0)
    steps = np.array([record["step"] for record in train], float)
    # metrics may be thinned: what lies between two records is shared among their steps
    took /= np.maximum(np.diff(steps, prepend=0.0), 1)
    return steps, took, [record["phase"] for record in train]


def switches(records: Records) -> list[int]:
    """Steps after which blocks were chosen."""
    return [record["step"] for record in records if "active_blocks" in record]


# ---- figures -----------------------------------------------------------------------


def course(records: Records) -> str:
    """Loss and dev accuracy over the whole run."""
    train = [record for record in records if record["event"] == "train"]
    evals = [record for record in records if record["event"] == "eval"]
    figure, axes = _panels(2 if evals else 1, 1.9)
    _curve(axes[0], [r["step"] for r in train], [r["loss"] for r in train], COLORS[0], "train")
    _name(axes[0], "loss")
    if evals:
        steps = [r["step"] for r in evals]
        axes[0].plot(steps, [r["loss"] for r in evals], "o-", color=COLORS[1], ms=3, label="dev")
        axes[1].plot(steps, [r["accuracy"] for r in evals], "o-", color=COLORS[1], ms=3)
        _name(axes[1], "dev accuracy")
        _legend(axes[0])
    _mark(axes, records)
    return _svg(figure)


def criterion(records: Records, thresholds: dict[str, float]) -> str:
    """What the criterion looked at, against its thresholds, on one axis of steps."""
    found = observations(records)
    shown = {name: found[name] for name in thresholds if name in found}
    # not what came after its work was done
    last = max((steps[-1] for steps, _ in shown.values()), default=0)
    records = [record for record in records if record["step"] <= last]
    return _small_multiples(records, shown, thresholds, height=1.6)


def others(records: Records, thresholds: dict[str, float]) -> str:
    """Every observation that no other figure shows."""
    elsewhere = {*thresholds, *MASSES}
    found = observations(records).items()
    shown = {name: columns for name, columns in found if name not in elsewhere}
    return _small_multiples(records, shown, {}, height=1.3)


def kept(records: Records) -> str:
    """Share of the attention in the kept blocks, a panel a layer, against the best blocks and
    chance."""
    found = {name: columns for name, columns in observations(records).items() if name in MASSES}
    if not found:
        return ""
    num_layers = max(values.shape[1] for _, values in found.values())
    figure, axes = _panels(num_layers, 1.6, sharey=True)
    for layer, axis in enumerate(axes):
        for name, (steps, values) in found.items():
            label, style = MASSES[name]
            _curve(axis, steps, values[:, layer], COLORS[layer % len(COLORS)], label, style)
        _name(axis, f"layer {layer}")
        axis.set_ylim(bottom=0)
    _legend(axes[0])
    _mark(axes, records)
    return _svg(figure)


def pace(records: Records) -> str:
    """Milliseconds a step; what lies above 1.5 times the 98th percentile is cut off."""
    steps, took, phases = step_seconds(records)
    figure, axes = _panels(1, 1.9)
    for color, phase in zip(COLORS, dict.fromkeys(phases), strict=False):
        here = np.array([p == phase for p in phases])
        _curve(axes[0], steps[here], took[here] * 1e3, color, phase)
    axes[0].set_ylim(0, 1.5e3 * np.percentile(took, 98))
    _name(axes[0], "ms a step")
    _legend(axes[0])
    _mark(axes, records)
    return _svg(figure)


def blocks(event: dict[str, Any]) -> str:
    """`draw_blocks` of an event that pictures attention, or a choice of blocks, or both."""
    pooled, scores, kept = map(event.get, ("pooled", "pattern_scores", "kept_blocks"))
    return _svg(draw_blocks(event["num_blocks"], pooled, scores, kept))


def draw_blocks(num_blocks: int, attention, scores, kept_blocks, title: str = ""):
    """A row a layer: attention, pattern scores and kept blocks, each left out if it is None.

    Args:
        attention: [L, n, n] mean attention at any resolution.
        scores: [L, n, n] what the pattern chooses by.
        kept_blocks: of each layer, row * num_blocks + column of its kept blocks.

    Returns: a matplotlib figure.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    columns = {"attention, log10": attention, "pattern scores": scores, "kept": kept_blocks}
    columns = {name: layers for name, layers in columns.items() if layers is not None}
    num_layers = len(next(iter(columns.values())))
    figure = _figure(WIDTH, 2.0 * num_layers + 0.4)
    axes = figure.subplots(num_layers, 3, squeeze=False, sharex=True, sharey=True)
    look = {"extent": (0, num_blocks, num_blocks, 0), "interpolation": "none"}
    for layer, row in enumerate(axes):
        for axis in row[len(columns) :]:  # keeps its place: panels are of one size
            axis.set_axis_off()
        for axis, (name, layers) in zip(row, columns.items(), strict=False):
            if name == "kept":
                mask = np.zeros((num_blocks, num_blocks))
                mask.flat[layers[layer]] = 1
                colors = ListedColormap(["#00000000", COLORS[layer % len(COLORS)]])
                shown = axis.imshow(mask, cmap=colors, vmin=0, vmax=1, **look)
                name = f"{len(layers[layer])} of {num_blocks**2} kept"
            else:
                values, low = np.asarray(layers[layer], float), None
                if name.startswith("attention"):  # it spans orders of magnitude
                    values = np.log10(np.maximum(values, 1e-9))
                    low = max(float(values.min()), float(values.max()) - 4)
                shown = axis.imshow(values, cmap="viridis", vmin=low, **look)
            bar = figure.colorbar(shown, ax=axis, location="bottom", fraction=0.05, pad=0.02)
            if name.endswith("kept"):
                bar.set_ticks([0.25, 0.75], labels=["pruned", "kept"])
            else:
                bar.locator = MaxNLocator(3)
            bar.ax.tick_params(labelsize=7)
            axis.set_title(name, fontsize=9)
        row[0].set_ylabel(f"layer {layer}: query block")
        for axis in axes[-1, : len(columns)]:
            axis.set_xlabel("key block")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def intervals(labels: list[str], points: list[list[float]], intervals: list, name: str) -> str:
    """A row a setting: its runs as points, its mean and 95 % interval as a bar.

    Args:
        intervals: (mean, half width or None) of each setting, or None without results.
    """
    figure = _figure(WIDTH, 0.7 + 0.36 * len(labels))
    axis = figure.subplots()
    for row, (values, interval) in enumerate(zip(points, intervals, strict=True)):
        axis.plot(values, [row] * len(values), "o", color=COLORS[0], ms=4, alpha=0.5)
        if interval is not None:
            mean, half = interval
            axis.errorbar(mean, row, xerr=half, fmt="D", color=COLORS[1], ms=5, capsize=4)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(name)
    return _svg(figure)


# ---- their parts -------------------------------------------------------------------


def _small_multiples(records: Records, shown: dict, thresholds: dict, height: float) -> str:
    if not shown:
        return ""
    figure, axes = _panels(len(shown), height)
    for axis, (name, (steps, values)) in zip(axes, shown.items(), strict=True):
        for layer in range(values.shape[1]):
            color = COLORS[layer % len(COLORS)]
            _curve(axis, steps, values[:, layer], color, f"layer {layer}")
        positive = values[values > 0]
        if name in thresholds:
            axis.axhline(thresholds[name], color="black", ls="--", lw=1, label="threshold")
        if (
            len(positive) == values.size - np.isnan(values).sum()
            and positive.max() > 50 * positive.min()
        ):
            axis.set_yscale("log")
        _name(axis, name.replace("_", " "))
    _legend(axes[0])
    _mark(axes, records)
    return _svg(figure)


def _panels(count: int, height: float, sharey: bool = False):
    """A figure of panels one above the other, with one axis of completed steps."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(WIDTH, height * count + 0.5)
    axes = figure.subplots(count, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0]
    axes[-1].set_xlabel("completed steps")
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return figure, list(axes)


def _curve(axis, steps, values, color: str, label: str, style: str = "-") -> None:
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if len(steps) > MOST_POINTS:
        parts = np.array_split(np.arange(len(steps)), MOST_POINTS // 2)
        parts = [part[np.isfinite(values[part])] for part in parts]
        parts = [part for part in parts if len(part)]
        low, high = ([f(values[part]) for part in parts] for f in (np.min, np.max))
        steps = np.array([steps[part].mean() for part in parts])
        values = np.array([values[part].mean() for part in parts])
        axis.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
    # one value alone would draw no line
    marker = "o" if len(steps) < 30 else None
    axis.plot(steps, values, color=color, lw=1.2, ls=style, label=label, marker=marker, ms=3)


def _mark(axes, records: Records) -> None:
    """A line at every choice of blocks, named once; at most 40, lest they cover all."""
    steps = switches(records)[:40]
    for axis in axes:
        for step in steps:
            axis.axvline(step, color=COLORS[4], lw=1, alpha=0.8)
    if steps:
        first = "first after" if len(steps) > 1 else "after"
        title = f"red: blocks chosen, {first} step {steps[0]}"
        axes[0].set_title(title, fontsize=8, loc="right", color=COLORS[4])


def _name(axis, text: str) -> None:
    axis.set_title(text, fontsize=9, loc="left")


def _legend(axis) -> None:
    axis.legend(fontsize=8, ncols=3, loc="best", frameon=False)


def _figure(width: float, height: float):
    # the object interface: no global state, no display
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure) -> str:
    """The figure as an element for a page: its text stays text, its ink the page's."""
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # the page decides how wide it is
    text = re.sub(r'(<svg )([^>]*?) ?width="[^"]*"', r"\1\2", file.getvalue(), count=1)
    text = re.sub(r'(<svg )([^>]*?) ?height="[^"]*"', r"\1\2", text, count=1)
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def save_png(figure, path: Path) -> np.ndarray:
    """Writes a PNG; returns it as uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(140)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels
