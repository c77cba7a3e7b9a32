"""Writes tables and figures of docs/results.md from the metrics that experiments/evidence.py kept.

python experiments/results.py            # rewrites what stands between the markers, and figures
python experiments/results.py --check    # exit code 1 if the page says anything else

A study that has not been run yields a table that says so. docs/results/given.json holds what is no
metric of a run: the published results, and the time of a step on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import intervals
import numpy as np

from preprocess.planted import MOST_MARKED, NUM_BLOCKS, NUM_CLASSES, planted_pairs

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
                str(len(at)),
            ]
        )
    header = ["dense steps", "dev accuracy", "found by mass", "by learned"]
    return table([*header, "by mass, worst seed", "seeds"], rows)


def concentration(kept: Path) -> str:
    """When the dense prefix reaches a concentration, of the steps that are kept: every tenth."""
    runs = load("planted", kept).get("dense", {})
    reached = {
        seed: [(e["step"], e["concentration"][0]) for e in events if e.get("concentration")]
        for seed, events in runs.items()
    }
    rows = []
    for threshold in (2, 3, 4):
        found = [
            [step for step, value in points if value is not None and value >= threshold]
            for points in reached.values()
        ]
        rows.append([str(threshold), *(str(min(steps)) if steps else "never" for steps in found)])
    return table(["concentration reaches", *(f"seed {seed}" for seed in runs)], rows)


def ceiling(seed: int, masks: np.ndarray) -> float:
    """The accuracy that a choice of blocks allows: an example is told if in some layer one of the
    rows marked for an asked column keeps its block of that column, else guessed.

    masks: bool [L, 32, 32]. Every two of the eight columns are asked equally often, and of the
    rows that need a column every MOST_MARKED are marked equally often.
    """
    pairs = planted_pairs(seed)
    kept = masks.any(0)[tuple(pairs.T)]
    missed = []  # by column: how often all its marked rows lack their block
    for column in dict.fromkeys(pairs[:, 1].tolist()):
        has = kept[pairs[:, 1] == column]
        blind, rows = int((~has).sum()), len(has)
        missed.append(math.comb(blind, MOST_MARKED) / math.comb(rows, MOST_MARKED))
    told = 1 - float(np.mean([a * b for a, b in itertools.combinations(missed, 2)]))
    return told + (1 - told) / NUM_CLASSES


def kept_blocks(events: Events) -> np.ndarray:
    """bool [L, 32, 32] of the first transition."""
    lists = (transition(events) or {})["kept_blocks"]
    masks = np.zeros((len(lists), NUM_BLOCKS * NUM_BLOCKS), dtype=bool)
    for mask, kept in zip(masks, lists, strict=True):
        mask[kept] = True
    return masks.reshape(-1, NUM_BLOCKS, NUM_BLOCKS)


def mean_ceiling(runs: dict[int, Events], seeds: dict[int, float]) -> str:
    known = [e for s, e in runs.items() if s in seeds and "kept_blocks" in (transition(e) or {})]
    if len(known) < len(seeds):
        return "-"
    values = [ceiling(seed, kept_blocks(runs[seed])) for seed in seeds]
    return f"{np.mean(values):.3f}"


def mean_mass(runs: dict[int, Events], key: str = "kept_mass") -> str:
    """At the switch, layer 0, mean over seeds."""
    switches = [transition(events) or {} for events in runs.values()]
    found = [switch[key][0] for switch in switches if key in switch]  # none without a dense phase
    return f"{np.mean(found):.3f}" if found else "-"


def planted_arms(kept: Path) -> str:
    """Accuracy after 600 steps, the order that of the accuracy."""
    rows = []
    for name, runs in load("planted", kept).items():
        final = endpoints(runs, (600,))
        if name in ("dense", "recall") or not final:
            continue
        pattern, _, at = name.rpartition("-")
        cells = [*spread(list(final.values())), mean_ceiling(runs, final), mean_mass(runs)]
        rows.append([at, pattern, *cells])
    rows.sort(key=lambda row: (int(row[0]), -float(row[2])))
    header = ["switch after", "blocks", *SPREAD, "ceiling", "attention kept"]
    return table(header, rows)


PAIRS = [
    *(("learned", "mass"), ("random", "mass"), ("mass", "mass_rows"), ("random", "random_rows")),
    *(("learned", "untrained"), ("learned", "random"), ("outside", "random")),
]


def planted_differences(kept: Path) -> str:
    """Paired by seed: the same prefix, other blocks."""
    rows = []
    for at in ("150", "200"):
        rows += [[at, *row] for row in differences("planted", kept, PAIRS, f"-{at}", (600,))]
    return table(["switch after", "difference", *SPREAD], rows)


def differences(
    study: str, kept: Path, pairs: list[tuple[str, str]], suffix: str, steps: tuple[int, ...]
) -> list[list[str]]:
    """Rows of second - first, paired by seed, of pairs that have runs; arms end in `suffix`."""
    runs = load(study, kept)
    rows = []
    for first, second in pairs:
        a, b = (endpoints(runs.get(name + suffix, {}), steps) for name in (first, second))
        if common := sorted(set(a) & set(b)):
            values = [b[seed] - a[seed] for seed in common]
            rows.append([f"{second} - {first}", *spread(values, "+.3f")])
    return rows


def dense_steps(events: Events) -> int:
    """Dense steps of a run of 600, those at a reselection among them."""
    switched = transition(events)
    again = sum(e["event"] == "reselection" for e in events)
    return switched["step"] + again if switched else 600


def when(kept: Path) -> str:
    milliseconds = given(kept)["planted_step_ms"]
    rows = []
    for name, runs in load("when", kept).items():
        final = endpoints(runs, (600,))
        if not final:
            continue
        switches = [transition(events) for events in runs.values()]
        steps = ", ".join(str(e["step"]) if e else "-" for e in switches)
        dense = float(np.mean([dense_steps(events) for events in runs.values()]))
        cost = dense * milliseconds["dense"] + (600 - dense) * milliseconds["sparse"]
        share = cost / (600 * milliseconds["dense"])
        cells = [*spread(list(final.values())), mean_ceiling(runs, final), f"{share:.2f}"]
        rows.append([name, steps, *cells])
    rows.sort(key=lambda row: -float(row[2]))
    header = ["criterion", "switched after", *SPREAD, "ceiling", "time / dense"]
    return table(header, rows)


def when_differences(kept: Path) -> str:
    pairs = [("after-150", "concentrated"), ("settled", "concentrated")]
    pairs += [("concentrated", "after-400"), ("after-150", "reselect")]
    return table(["difference", *SPREAD], differences("when", kept, pairs, "", (600,)))


def churn(kept: Path) -> str:
    """What each reselection exchanges: new blocks of 51 and the attention before and after."""
    rows = []
    for seed, events in load("when", kept).get("reselect", {}).items():
        for e in events:
            if e["event"] == "reselection":
                cells = [" / ".join(format(v, form) for v in e[key]) for key, form in CHURN]
                rows.append([str(seed), str(e["step"]), *cells])
    header = ["seed", "step", "new blocks of 51", "attention kept before", "after"]
    return table(header, rows)


CHURN = [("exchanged", "d"), ("kept_mass_before", ".3f"), ("kept_mass", ".3f")]


# ---- lra-image, lra-listops --------------------------------------------------------

ENDPOINT = (1300, 1400, 1500)


def image(kept: Path) -> str:
    return _descriptive("image", kept, "-200")


def image_waited(kept: Path) -> str:
    """Arms that switched when attention had concentrated."""
    return _descriptive("image", kept, "-waited")


def image_waited_differences(kept: Path) -> str:
    pairs = [("random_rows", "mass_rows"), ("band", "mass_rows"), ("random_rows", "band")]
    return table(["difference", *SPREAD], differences("image", kept, pairs, "-waited", ENDPOINT))


def listops(kept: Path) -> str:
    return _descriptive("listops", kept, "-200")


def listops_differences(kept: Path) -> str:
    pairs = [("learned", "mass_rows"), ("learned", "band"), ("random", "learned")]
    pairs += [("band", "mass_rows"), ("random_rows", "mass_rows")]
    return table(["difference", *SPREAD], differences("listops", kept, pairs, "-200", ENDPOINT))


def empty_rows(runs: dict[int, Events]) -> str:
    """Fewest and most rows of blocks, in a layer of a run, that keep no block."""
    counts = [n for e in runs.values() for n in (~kept_blocks(e).any(2)).sum(1)]
    return f"{min(counts)} to {max(counts)}" if max(counts) else "0"


def _descriptive(study: str, kept: Path, suffix: str) -> str:
    """The arms whose name has this suffix, the best first."""
    rows = []
    for name, runs in load(study, kept).items():
        final = endpoints(runs, ENDPOINT)
        if name.endswith(suffix) and final:
            mass = f"{mean_mass(runs)} / {mean_mass(runs, 'chance_mass')}"
            steps = sorted({(transition(events) or {})["step"] for events in runs.values()})
            cells = [", ".join(map(str, steps)), *spread(list(final.values()), ".4f")]
            rows.append([name.removesuffix(suffix), *cells, mass, empty_rows(runs)])
    rows.sort(key=lambda row: -float(row[2]))
    more = ["attention kept / if it were uniform, layer 0", "rows of blocks without one"]
    return table(["blocks", "switched after", *SPREAD, *more], rows)


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


def our_paper_runs(kept: Path) -> dict[str, Events]:
    """Runs of the paper's configuration: name -> events."""
    found = {f"seed {seed}": e for seed, e in load("paper", kept).get("sat", {}).items()}
    for path in sorted(kept.glob("lra-image-seed-*.metrics.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        seed = path.name.split(".")[0].rpartition("-")[2]
        found[f"seed {seed}, earlier commit"] = [json.loads(line) for line in lines]
    return found


def paper_band(kept: Path) -> str:
    """Dev accuracy against that of the published runs."""
    published = given(kept)["lra_image_dev"]
    runs = our_paper_runs(kept)
    rows = []
    for step in ("500", "1000", "2000"):
        values = published[step]
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        cells = [f"{mean:.4f} ± {deviation:.4f} ({len(values)} seeds)"]
        for events in runs.values():
            found = accuracy_at(events, (int(step),))
            away = "" if found is None else f" ({(found - mean) / deviation:+.1f} sd)"
            cells.append("-" if found is None else f"{found:.4f}{away}")
        rows.append([f"dev accuracy after {int(step):,} steps", *cells])
    switched = [transition(events) for events in runs.values()]
    steps = given(kept)["lra_image_switch"]
    rows.append(
        [
            "switched after step",
            f"{min(steps)} to {max(steps)}",
            *(str(e["step"]) if e else "-" for e in switched),
        ]
    )
    return table(["", "published", *runs], rows)


def checkpoints(kept: Path) -> str:
    """Published checkpoints, evaluated here."""
    rows = [
        [f"{r['task']}, seed {r['seed']}", *(f"{r[k]:.4f}" for k in ("published", "fp32", "bf16"))]
        for r in given(kept)["checkpoints"]
    ]
    return table(["checkpoint", "published", "here, fp32", "here, bf16"], rows)


def given(kept: Path) -> dict:
    return json.loads((kept / "given.json").read_text(encoding="utf-8"))


# ---- figures -----------------------------------------------------------------------


def figures(folder: Path) -> None:
    """One PNG a question, of what has been run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(name: str, figure) -> None:
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)

    def dots(axis, values: dict[str, dict[int, float]], label: str) -> None:
        """One row a name, one dot a seed, a bar at the mean; the best on top."""
        order = sorted(values, key=lambda name: float(np.mean(list(values[name].values()))))
        for y, name in enumerate(order):
            found = list(values[name].values())
            axis.plot(found, [y] * len(found), "o", color="#1f77b4", alpha=0.6, markersize=5)
            axis.plot([np.mean(found)] * 2, [y - 0.3, y + 0.3], color="black")
        axis.set_yticks(range(len(order)), order)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)

    def ends(study: str, steps: tuple[int, ...]) -> dict[str, dict[int, float]]:
        runs = {name: endpoints(found, steps) for name, found in load(study, folder).items()}
        return {name: found for name, found in runs.items() if found and name != "dense"}

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for seed, rows in load("planted", folder).get("recall", {}).items():
        for name, color in (("mass", "#1f77b4"), ("learned", "#d62728")):
            label = name if seed == 0 else None
            y = [row[name][0] for row in rows]
            left.plot([row["step"] for row in rows], y, color=color, alpha=0.7, label=label)
    left.set(xlabel="dense steps", ylabel="planted pairs among the chosen blocks", ylim=(0, 1))
    left.legend()
    arms = {f"{n.rpartition('-')[0]}, {n.rpartition('-')[2]}": v
            for n, v in ends("planted", (600,)).items() if n != "recall"}  # fmt: skip
    dots(right, arms, "accuracy at step 600 (blocks, switch after)")
    right.axvline(0.25, color="gray", linestyle="--")
    save("planted", figure)

    for study, steps in (("when", (600,)), ("image", ENDPOINT), ("listops", ENDPOINT)):
        if found := ends(study, steps):
            figure, axis = pyplot.subplots(
                figsize=(7, 0.6 + 0.4 * len(found)), layout="constrained"
            )
            dots(axis, {name.removesuffix("-200"): v for name, v in found.items()}, "dev accuracy")
            save(study, figure)

    published = {int(step): v for step, v in given(folder)["lra_image_dev"].items()}
    runs = our_paper_runs(folder)
    last = max(e["step"] for events in runs.values() for e in events)
    steps = [step for step in published if step <= last]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    band = [[f(published[step]) for step in steps] for f in (min, max, np.median)]
    axis.fill_between(steps, *band[:2], color="0.85", label="published: lowest to highest")
    axis.plot(steps, band[2], color="0.5", label="published: median")
    for name, events in runs.items():
        points = [(e["step"], e["accuracy"]) for e in events if e["event"] == "eval"]
        axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    axis.set(xlabel="completed steps", ylabel="dev accuracy")
    axis.legend()
    save("lra-image", figure)

    for events in load("paper", folder).get("sat", {}).values():
        probes = [e for e in events if e["event"] == "probe"]
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
        for layer, axis in enumerate(axes):
            for key in ("kept_mass", "best_mass", "used_mass", "output_error"):
                y = [e[key][layer] for e in probes]
                axis.plot([e["step"] for e in probes], y, label=key.replace("_", " "))
            axis.set(xlabel="step", title=f"layer {layer}")
        axes[0].legend()
        save("paper", figure)


TABLES: dict[str, Callable[[Path], str]] = {
    "planted-dense": planted_dense,
    "planted-concentration": concentration,
    "planted-arms": planted_arms,
    "planted-differences": planted_differences,
    "when": when,
    "when-differences": when_differences,
    "churn": churn,
    "image": image,
    "image-tests": image_tests,
    "image-waited": image_waited,
    "image-waited-differences": image_waited_differences,
    "listops": listops,
    "listops-differences": listops_differences,
    "paper-band": paper_band,
    "paper": paper,
    "checkpoints": checkpoints,
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
    figures(KEPT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
