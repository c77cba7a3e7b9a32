"""experiments/results.py: the tables of docs/results.md come from kept metrics, and the analyses
give known answers."""

import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import results

from preprocess.planted import MARKER, Random, draw_examples, planted_mask, planted_pairs


def keep(folder: Path, study: str, name: str, seed: int, events: list[dict]) -> None:
    path = folder / study / f"{name}.{seed}.metrics.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(e) + "\n" for e in events).encode()))


def test_the_page_says_what_was_measured():
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.filled(page, results.KEPT) == page
    assert set(results.MARKER.findall(page)) and page.count("<!-- table:") == len(results.TABLES)


def test_a_changed_number_would_be_noticed():
    page = results.PAGE.read_text(encoding="utf-8").replace(
        "<!-- end -->", "| 1 |\n<!-- end -->", 1
    )
    assert results.filled(page, results.KEPT) != page


def test_planned_comparisons_of_a_made_up_study(tmp_path):
    """Differences are 0.002 (equivalent), 0.0005 (not significant) and 0.05 (different); noise of
    seed and pattern alternates, so the residual is 0.001 by construction."""
    mean = {"learned": 0.302, "untrained": 0.300, "random": 0.28, "random_rows": 0.29}
    mean |= {"mass_rows": 0.2905, "band": 0.33}
    for place, (arm, value) in enumerate(mean.items()):
        for seed in range(12):
            noise = 0.001 if (seed + place) % 2 else -0.001
            accuracy = value + 0.01 * seed + noise
            events = [
                {"event": "eval", "step": step, "accuracy": accuracy} for step in results.ENDPOINT
            ]
            keep(tmp_path, "image", f"{arm}-200", seed, events)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in results.image_tests(tmp_path).splitlines()[2:]
    ]
    verdicts = {row[0]: row[4] for row in rows}
    assert verdicts == {
        "learned - untrained": "equivalent within 0.01",
        "mass_rows - random_rows": "not significant",
        "band - random": "different",
    }
    assert {row[0]: row[1] for row in rows}["band - random"] == "+0.0500"


def test_the_ceiling_of_a_choice_of_blocks():
    """Against a count over the examples themselves."""
    pairs = planted_pairs(3)
    masks = np.zeros((2, 32, 32), dtype=bool)
    assert results.ceiling(3, masks) == 0.25
    columns = list(dict.fromkeys(pairs[:, 1].tolist()))
    for layer, column in enumerate(columns[1:3]):  # one pair of each of two columns
        masks[layer][tuple(pairs[pairs[:, 1] == column][-1])] = True
    masks[0] |= ~planted_mask(pairs)  # blocks outside the planted set tell nothing
    # marked are 4 of the 6 rows of the one and 4 of the 5 of the other: seen with 2/3 and 4/5
    told = (1 / 28) * (1 - (1 / 3) * (1 / 5)) + (6 / 28) * (2 / 3) + (6 / 28) * (4 / 5)
    assert results.ceiling(3, masks) == pytest.approx(told + (1 - told) / 4)
    masks[1][tuple(pairs[:9].T)] = True  # nine rows of the hub
    ids, _ = draw_examples(pairs, 20000, Random(3, 9), most_marked=4)
    marked = (ids.reshape(-1, 32, 16)[..., None] == MARKER + np.arange(8)).any(2)
    found = (marked & masks.any(0)[:, columns]).any((1, 2)).mean()
    assert results.ceiling(3, masks) == pytest.approx(found + (1 - found) / 4, abs=0.01)
    masks[1] |= planted_mask(pairs)
    assert results.ceiling(3, masks) == 1


def test_the_kept_runs_calibrate_the_planted_task():
    """What the plan asks of the instrument, on every seed."""
    runs = results.load("planted", results.KEPT)

    def ends(name: str, step: int = 600) -> np.ndarray:
        found = results.endpoints(runs[name], (step,))
        assert sorted(found) == ([0, 1, 2] if name == "own-0" else [0, 1, 2, 3, 4])
        return np.array(list(found.values()))

    assert ends("dense", 400).min() >= 0.95
    found = [
        row["mass"][0] for rows in runs["recall"].values() for row in rows if row["step"] == 300
    ]
    assert len(found) == 5 and min(found) >= 0.85 and np.mean(found) >= 0.9
    assert ends("mass-200").min() > 0.95 and ends("planted-150").min() > 0.95
    for name in ("learned-150", "random-150", "learned-200", "random-200"):
        assert ends(name).max() < 0.4, name
    for name in ("outside-150", "diagonal-150", "own-0"):  # chance is 0.25
        assert ends(name).max() < 0.35, name


def test_pooled_residual_of_a_table_by_hand():
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 2.0, 1: 2.0, 2: 5.0}}
    # b - a is 1, 0, 2, its mean 1: residuals are half of 0, -1, 1 in both rows, squares sum to 1
    deviation, freedom = results.pooled_residual(values)
    assert freedom == 2 and deviation == pytest.approx(0.5**0.5)


def test_a_run_that_did_not_get_to_its_end_does_not_count(tmp_path):
    keep(tmp_path, "listops", "band-200", 0, [{"event": "eval", "step": 1300, "accuracy": 0.5}])
    assert results.listops(tmp_path) == "Not run yet.\n"


def test_rows_of_a_made_up_listops_study(tmp_path):
    for arm, accuracies, blocks in (
        ("band", (0.30, 0.34), [list(range(0, 1024, 32)), [0]]),  # the first layer has one a row
        ("learned", (0.20, 0.20), [list(range(31)), [0, 33]]),  # all in row 0; in rows 0 and 1
    ):
        for seed, accuracy in enumerate(accuracies):
            switch = {"event": "transition", "step": 200, "kept_blocks": blocks}
            switch |= {"kept_mass": [0.1, 0.5], "chance_mass": [0.2, 0.5]}
            evals = [
                {"event": "eval", "step": step, "accuracy": accuracy} for step in results.ENDPOINT
            ]
            keep(tmp_path, "listops", f"{arm}-200", seed, [switch, *evals])
    rows = results.listops(tmp_path).splitlines()[2:]
    assert rows[0].startswith("| band | 200 | 0.3200 | 0.0283 |")
    assert rows[0].endswith("| 0 to 31 |")
    assert rows[1].endswith("| 2 | 0.100 / 0.200 | 30 to 31 |")
    (difference,) = results.listops_differences(tmp_path).splitlines()[2:]
    # t of one degree of freedom at 97.5 % is 12.706; sd 0.04 / sqrt 2
    assert difference == "| band - learned | +0.120 | +0.028 | -0.134 to +0.374 | 2 |"


def test_the_published_numbers_are_those_of_the_published_runs(shared_data):
    with open(shared_data / "reference" / "dev_trajectories.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["run"] == "learnable"]
    real: dict[str, list[float]] = {}
    for row in rows:
        if row["task"] == "lra-image":  # its steps count from 0: 499 is after 500
            real.setdefault(str(int(row["step"]) + 1), []).append(float(row["dev_accuracy"]))
    assert results.given(results.KEPT)["lra_image_dev"] == real
    with open(shared_data / "reference" / "test_results.csv", newline="") as file:
        tests = {
            int(row["seed"]): float(row["test_accuracy"])
            for row in csv.DictReader(file)
            if (row["task"], row["run"]) == ("lra-image", "learnable")
        }
    for row in results.given(results.KEPT)["checkpoints"]:
        assert row["published"] == tests[row["seed"]]
