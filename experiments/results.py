"""Writes the tables of docs/results.md from the kept metrics of experiments/evidence.py.

python experiments/results.py            # rewrites what stands between the markers of each table
python experiments/results.py --check    # exit code 1 if the page says anything else

A study that has not been run yields a table that says so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import intervals
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
MARKER = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)

Events = list[dict]


def load(study: str, kept: Path) -> dict[str, dict[int, Events]]:
    """Runs of a study: name -> seed -> events."""
    runs: dict[str, dict[int, Events]] = {}
    for path in sorted((kept / study).glob("*.jsonl.gz")):
        name, seed = path.name.split(".")[:2]
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        runs.setdefault(name, {})[int(seed)] = [json.loads(line) for line in lines]
    return runs


def accuracy_at(events: Events, steps: tuple[int, ...]) -> float | None:
    """Mean dev accuracy of the evaluations after these steps; None if one is missing."""
    found = {e["step"]: e["accuracy"] for e in events if e["event"] == "eval"}
    return float(np.mean([found[s] for s in steps])) if all(s in found for s in steps) else None


def endpoints(runs: dict[int, Events], steps: tuple[int, ...]) -> dict[int, float]:
    """By seed, of the runs that got that far."""
    found = {seed: accuracy_at(events, steps) for seed, events in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def transition(events: Events) -> dict | None:
    return next((e for e in events if e["event"] == "transition"), None)


def table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not run yet.\n"
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(values: list[float], form: str = ".3f") -> list[str]:
    """Mean, standard deviation, 95 % interval, count: four cells."""
    found = intervals.mean_of(values)
    if found.half_width is None:
        return [format(found.mean, form), "-", "-", "1"]
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return [
        format(found.mean, form),
        format(found.deviation, form),
        f"{low:{form}} to {high:{form}}",
        str(found.count),
    ]


SPREAD = ["mean", "sd", "95 % interval", "seeds"]


# ---- the planted task --------------------------------------------------------------


def planted_dense(kept: Path) -> str:
    """Along the dense prefix: accuracy, and how many planted pairs each rule would find."""
    runs = load("planted", kept)
    recall = runs.get("recall", {})
    rows = []
    for step in sorted({row["step"] for events in recall.values() for row in events}):
        at = [row for events in recall.values() for row in events if row["step"] == step]
        accuracy = endpoints(runs["dense"], (step,))
        rows.append(
            [
                str(step),
                f"{np.mean(list(accuracy.values())):.3f}" if accuracy else "-",
                *(f"{np.mean([row[name][0] for row in at]):.2f}" for name in ("mass", "learned")),
                f"{min(row['mass'][0] for row in at):.2f}",
                f"{np.mean([row['mass'][1] for row in at]):.2f}",
                str(len(at)),
            ]
        )
    header = ["dense steps", "dev accuracy", "found by mass, layer 0", "by learned"]
    return table([*header, "by mass, worst seed", "by mass, layer 1", "seeds"], rows)


def planted_arms(kept: Path) -> str:
    """Accuracy after 600 steps, the order that of the accuracy."""
    rows = []
    for name, runs in load("planted", kept).items():
        final = endpoints(runs, (600,))
        if name in ("dense", "recall") or not final:
            continue
        pattern, _, at = name.rpartition("-")
        mass = [
            transition(events)["kept_mass"][0] for events in runs.values() if transition(events)
        ]
        mean = f"{np.mean(mass):.3f}" if mass else "-"
        rows.append([at, pattern, *spread(list(final.values())), mean])
    rows.sort(key=lambda row: (int(row[0]), -float(row[2])))
    return table(["switch after", "blocks", *SPREAD, "attention kept, layer 0"], rows)


def when(kept: Path) -> str:
    rows = []
    for name, runs in load("when", kept).items():
        final = endpoints(runs, (600,))
        if not final:
            continue
        switches = [transition(events) for events in runs.values()]
        steps = ", ".join(str(e["step"]) if e else "-" for e in switches)
        seconds = [max(e["seconds"] for e in ev if "seconds" in e) for ev in runs.values()]
        rows.append([name, steps, *spread(list(final.values())), f"{np.mean(seconds):.0f}"])
    rows.sort(key=lambda row: -float(row[2]))
    return table(["criterion", "switched after", *SPREAD, "seconds"], rows)


# ---- lra-image, lra-listops --------------------------------------------------------

ENDPOINT = (1300, 1400, 1500)


def image(kept: Path) -> str:
    return _descriptive(load("image", kept))


def listops(kept: Path) -> str:
    return _descriptive(load("listops", kept))


def _descriptive(studies: dict[str, dict[int, Events]]) -> str:
    rows = []
    for name, runs in studies.items():
        final = endpoints(runs, ENDPOINT)
        if name != "dense" and final:
            rows.append([name.rpartition("-")[0], *spread(list(final.values()), ".4f")])
    rows.sort(key=lambda row: -float(row[1]))
    return table(["blocks", *SPREAD], rows)


ARMS = ["learned", "untrained", "random", "random_rows", "mass_rows", "band"]
COMPARISONS = [("untrained", "learned"), ("random_rows", "mass_rows"), ("random", "band")]
MARGIN = 0.01  # of the equivalence test


def pooled_residual(values: dict[str, dict[int, float]]) -> tuple[float, int]:
    """Residual standard deviation and degrees of freedom of accuracy ~ seed + pattern.

    values: pattern -> seed -> accuracy; only seeds that every pattern has are taken.
    """
    seeds = sorted(set.intersection(*(set(v) for v in values.values())))
    matrix = np.array([[v[s] for s in seeds] for v in values.values()])
    residual = matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()
    freedom = (matrix.shape[0] - 1) * (matrix.shape[1] - 1)
    return math.sqrt(float((residual**2).sum()) / freedom), freedom


def image_tests(kept: Path) -> str:
    """The three planned comparisons."""
    runs = load("image", kept)
    values = {arm: endpoints(runs.get(f"{arm}-200", {}), ENDPOINT) for arm in ARMS}
    common = set.intersection(*(set(v) for v in values.values()))
    if len(common) < 2:
        return table([], [])
    deviation, freedom = pooled_residual(values)
    error = deviation * math.sqrt(2 / len(common))
    half = intervals.t_quantile(0.95, freedom) * error
    found = []
    for first, second in COMPARISONS:
        difference = float(np.mean([values[second][s] - values[first][s] for s in common]))
        if (first, second) == COMPARISONS[0]:  # two one-sided tests: the larger p counts
            nearer = MARGIN - abs(difference)
            tail = intervals.t_tail(abs(nearer) / error, freedom)
            p, what = (tail if nearer > 0 else 1 - tail), "equivalent within 0.01"
        else:
            p, what = 2 * intervals.t_tail(abs(difference) / error, freedom), "different"
        found.append((p, what, second, first, difference))
    rows = []
    running = 0.0
    for place, (p, what, second, first, difference) in enumerate(sorted(found)):  # Holm
        running = max(running, min(1.0, p * (len(found) - place)))
        verdict = what if running < 0.05 else "not significant"
        bounds = f"{difference - half:+.4f} to {difference + half:+.4f}"
        rows.append(
            [f"{second} - {first}", f"{difference:+.4f}", bounds, f"{running:.3f}", verdict]
        )
    return table(["comparison", "difference", "95 % interval", "p (Holm)", "verdict"], rows)


def paper(kept: Path) -> str:
    """Probes of the paper's run."""
    rows = []
    for events in load("paper", kept).get("sat", {}).values():
        accuracy = {e["step"]: e["accuracy"] for e in events if e["event"] == "eval"}
        for e in events:
            if e["event"] == "probe":
                cells = [
                    " / ".join("-" if v is None else f"{v:.3f}" for v in e[key])
                    for key in ("kept_mass", "best_mass", "used_mass", "output_error")
                ]
                known = accuracy.get(e["step"])
                rows.append([str(e["step"]), *cells, "-" if known is None else f"{known:.4f}"])
    header = ["step", "kept mass", "best mass", "used mass", "output error", "dev accuracy"]
    return table(header, rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "planted-dense": planted_dense,
    "planted-arms": planted_arms,
    "when": when,
    "image": image,
    "image-tests": image_tests,
    "listops": listops,
    "paper": paper,
}


def filled(page: str, kept: Path) -> str:
    """The page with every table written anew.

    Raises: KeyError for a marker of an unknown table.
    """
    return MARKER.sub(lambda m: m[1] + TABLES[m[2]](kept) + m[3], page)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    args = parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page, KEPT)
    if args.check:
        if new != page:
            print("error: docs/results.md differs from the kept metrics", file=sys.stderr)
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
