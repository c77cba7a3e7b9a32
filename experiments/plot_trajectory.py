"""Draws the development accuracy of runs over the band of the published runs, and says where they
lie.

python experiments/plot_trajectory.py logs/log-0/lra-image/sat.metrics.jsonl \
    --published dev_trajectories.csv --output trajectory.png

The published file has columns task, seed, run, step, dev_loss, dev_accuracy, ...; its steps count
from 0 (499 is after 500 steps), ours from 1: everything here is in completed steps.
"""

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

COLUMNS = ("task", "seed", "run", "step", "dev_accuracy")


def read_published(path: Path, task: str, kind: str) -> dict[int, list[float]]:
    """Development accuracies 0..1 of all published runs of a task, by completed steps.

    kind: the column `run`, "learnable" for block-sparse, "trsfmr" for dense runs.
    Raises: ValueError if the file is no such table or has no such runs.
    """
    accuracies = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        for number, row in enumerate(rows, 2):
            try:
                step, accuracy = int(row["step"]), float(row["dev_accuracy"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"{path}, line {number}: step or dev_accuracy is no number"
                ) from None
            if row["task"] == task and row["run"] == kind:
                accuracies[step + 1].append(accuracy)
    if not accuracies:
        raise ValueError(f"{path} has no runs {kind!r} of task {task}")
    return dict(sorted(accuracies.items()))


def read_run(path: Path) -> tuple[str, dict[int, float], int | None]:
    """Task, development accuracy by completed steps and the step of the transition (None: none).

    Raises: ValueError if the file is no metrics.jsonl.
    """
    task, accuracies, transition = None, {}, None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            event = record["event"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not an event of a run") from None
        if event == "start":
            task = record["task"]
        elif event == "eval":
            accuracies[record["step"]] = record["accuracy"]
        elif event == "transition":
            transition = record["step"]
    if task is None:
        raise ValueError(f"{path} has no start of a run")
    return task, accuracies, transition


def compare(accuracies: dict[int, float], published: dict[int, list[float]]) -> list[str]:
    """A line for each evaluation of a run: its accuracy, and the band of the published runs."""
    lines = [
        f"{'step':>7} {'ours':>8}   published: {'lowest':>8} {'median':>8} {'highest':>8}  runs"
    ]
    for step, accuracy in sorted(accuracies.items()):
        values = published.get(step)
        if values is None:
            lines.append(f"{step:>7} {accuracy:>8.4f}   (not evaluated there)")
            continue
        low, high = min(values), max(values)
        place = "within" if low <= accuracy <= high else "below" if accuracy < low else "above"
        middle = statistics.median(values)
        lines.append(
            f"{step:>7} {accuracy:>8.4f}   {place:<9}  {low:>8.4f} {middle:>8.4f} {high:>8.4f}"
            f"  {len(values)}"
        )
    return lines


def draw(path: Path, task: str, runs: dict[str, tuple], published: dict[int, list[float]]) -> None:
    """Writes a PNG (or what the name ends in): band and median of the published runs, our runs."""
    # here, so that --help and mistakes answer at once
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    if published:
        steps = list(published)
        num_runs = max(len(values) for values in published.values())
        axis.fill_between(
            steps,
            [min(v) for v in published.values()],
            [max(v) for v in published.values()],
            color="0.85",
            label=f"published: lowest to highest of {num_runs} runs",
        )
        medians = [statistics.median(v) for v in published.values()]
        axis.plot(steps, medians, color="0.5", lw=1, label="published: median")
    for i, (name, (_, accuracies, transition)) in enumerate(runs.items()):
        points = sorted(accuracies.items())
        color = f"C{i}"
        short = "/".join(Path(name).parts[-3:])
        axis.plot(*zip(*points, strict=True), "o-", color=color, ms=4, label=short)
        if transition is not None:
            label = f"transition to sparse attention, step {transition}"
            axis.axvline(transition, color=color, ls=":", lw=1, label=label)
    last = max(step for _, accuracies, _ in runs.values() for step in accuracies)
    axis.set_xlim(0, last * 1.05)
    shown = [a for _, accuracies, _ in runs.values() for a in accuracies.values()]
    shown += [a for step, values in published.items() if step <= last for a in values]
    margin = 0.05 * (max(shown) - min(shown)) + 0.005
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set_xlabel("completed steps")
    axis.set_ylabel("accuracy on dev")
    axis.set_title(task, fontsize=10)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl of one or more runs")
    parser.add_argument(
        "--published", type=Path, metavar="CSV", help="the published runs (default: none drawn)"
    )
    parser.add_argument(
        "--published_run",
        default="learnable",
        metavar="KIND",
        help="which published runs, by their column `run` (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("trajectory.png"), help="(default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        runs = {str(path): read_run(path) for path in args.metrics}
        tasks = {task for task, _, _ in runs.values()}
        if len(tasks) > 1:
            raise ValueError(f"runs of several tasks in one figure: {', '.join(sorted(tasks))}")
        task = tasks.pop()
        for name, (_, accuracies, _) in runs.items():
            if not accuracies:
                raise ValueError(f"{name} has no evaluation yet")
        published = {}
        if args.published is not None:
            published = read_published(args.published, task, args.published_run)
        draw(args.output, task, runs, published)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, (_, accuracies, transition) in runs.items():
        switch = "no transition" if transition is None else f"transition at step {transition}"
        print(f"{name}: {task}, {switch}")
        print("\n".join(compare(accuracies, published)))
    print(f"figure: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
