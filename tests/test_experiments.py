"""Sweeps and recipes, with a stand-in for main_learnable_skewness.py that leaves the same files,
and once with the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import plot_trajectory  # noqa: E402
import sweep  # noqa: E402

# Trains 30 steps; a file "trouble" in the output folder says what goes wrong.
STAND_IN = """
import json, os, shlex, signal, sys, time
from pathlib import Path

argv = sys.argv[1:]
def value(name, default=None):
    return argv[argv.index(name) + 1] if name in argv else default
out, task = value("--output_dir"), value("--task")
seed, name = value("--random", "0"), value("--name", "sat")
trouble = Path(out) / "trouble"
trouble = trouble.read_text().split() if trouble.exists() else []
with open(Path(out) / "calls", "a") as calls:
    calls.write(shlex.join(argv) + "\\n")
if f"refuse-{seed}" in trouble:
    print("error: no such thing", file=sys.stderr)
    sys.exit(2)
folder = Path(out) / "logs" / f"log-{seed}" / task
folder.mkdir(parents=True, exist_ok=True)
facts, metrics = folder / f"{name}.run.json", folder / f"{name}.metrics.jsonl"
if facts.exists() and "--resume" not in argv:
    sys.exit(2)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(143))
signal.signal(signal.SIGINT, lambda *_: stop.append(130))
content = {"command": shlex.join(["python", "main_learnable_skewness.py", *argv])}
content |= {"config": {"model": {"density": 0.25}}, "result": None}
begun = 0
if facts.exists():
    content = json.loads(facts.read_text())
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    begun = max([e["step"] for e in events if e["event"] == "train"], default=0)
facts.write_text(json.dumps(content))
with open(metrics, "a") as file:
    def say(**event):
        file.write(json.dumps(event) + "\\n")
        file.flush()
    if not begun:
        say(event="start", step=0, task=task)
    for step in range(begun + 1, 31):
        say(event="train", step=step, seconds=step / 2, peak_memory_bytes=2**20 * step)
        if step % 10 == 0:
            say(event="eval", step=step, accuracy=step / 100)
        if step == 15:
            say(event="transition", step=step)
        if step == 12 and f"break-{seed}" in trouble:
            sys.exit(1)
        if step == 12 and f"wait-{seed}" in trouble:
            while not stop:
                time.sleep(0.01)
        if stop:
            sys.exit(stop[0])
        if str(step) == value("--stop_after"):
            sys.exit(0)
content["result"] = {"test_accuracy": 0.5 + int(seed) / 100, "best_dev_accuracy": 0.3}
facts.write_text(json.dumps(content))
"""


@pytest.fixture
def entry(tmp_path):
    path = tmp_path / "entry.py"
    path.write_text(STAND_IN)
    (tmp_path / "out").mkdir()
    return path


def _sweep(entry, *options) -> int:
    given = ["--output_dir", str(entry.parent / "out"), *map(str, options)]
    return sweep.main(given, entry)


def _calls(entry) -> list[str]:
    path = entry.parent / "out" / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def _cells(text: str) -> list[list[str]]:
    """The rows of the printed table."""
    lines = text.splitlines()
    header = max(i for i, line in enumerate(lines) if line.split()[:2] == ["task", "pattern"])
    return [line.split() for line in lines[header + 1 :]]


GRID = ("--tasks", "lra-a", "lra-b", "--seeds", 0, 1, "--patterns", "learned", "band")


def test_a_grid_runs_each_setting_once_and_is_not_repeated(entry, capsys):
    out = entry.parent / "out"
    assert _sweep(entry, *GRID, "--densities", 0.1, "--", "--train_steps", "30") == 0
    calls = _calls(entry)
    assert len(calls) == len(set(calls)) == 8
    assert calls[0] == (
        "--mode train --task lra-a --random 0 --name learned-density0.1 --pattern learned "
        f"--set model.density=0.1 --output_dir {out} --train_steps 30"
    )
    rows = _cells(capsys.readouterr().out)
    expected = ["lra-a", "learned", "0.1", "1", "0.5100", "0.3000", "15", "30", "15", "30", "done"]
    assert rows[1] == expected
    assert rows[2] == ["lra-a", "learned", "0.1", "2", "seeds", "0.5050", "±0.0071", "mean"]
    assert len(rows) == 12
    saved = json.loads((out / "sweep.json").read_text())
    assert len(saved) == 8 and saved[0]["test accuracy"] == "0.5000"

    assert _sweep(entry, *GRID, "--densities", 0.1, "--", "--train_steps", "30") == 0
    assert _calls(entry) == []
    assert _cells(capsys.readouterr().out) == rows


def test_failures_do_not_stop_the_others_and_are_tried_again(entry, capsys):
    (entry.parent / "out" / "trouble").write_text("break-0 refuse-1")
    options = ("--tasks", "lra-a", "--seeds", 0, 1, 2)
    assert _sweep(entry, *options) == 1
    assert [cells[-1] for cells in _cells(capsys.readouterr().out)] == ["1)", "2)", "done"]
    assert len(_calls(entry)) == 3
    (entry.parent / "out" / "trouble").unlink()
    assert _sweep(entry, *options) == 0
    calls = _calls(entry)
    assert [call.endswith("--resume") for call in calls] == [True, False], calls
    rows = _cells(capsys.readouterr().out)
    assert [cells[-1] for cells in rows] == ["done", "done", "done", "mean"]
    assert rows[0][7] == "30", "steps are continued, not repeated"


def test_stop_after_is_done_until_more_is_asked_for(entry, capsys):
    assert _sweep(entry, "--tasks", "lra-a", "--stop_after", 12) == 0
    assert _sweep(entry, "--tasks", "lra-a", "--stop_after", 12) == 0
    assert len(_calls(entry)) == 1
    rows = _cells(capsys.readouterr().out)
    assert rows[-1][4:8] == ["-", "0.1000", "-", "12"] and rows[-1][-1] == "done"
    assert _sweep(entry, "--tasks", "lra-a", "--stop_after", 20) == 0
    assert _sweep(entry, "--tasks", "lra-a") == 0
    assert [call.split("--output_dir")[0].split()[-2:] for call in _calls(entry)] == [
        ["--stop_after", "20"],
        ["--pattern", "learned"],
    ]
    assert _cells(capsys.readouterr().out)[-1][4] == "0.5000"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_waits_for_its_run_and_goes_on(entry, capsys, number, code):
    out = entry.parent / "out"
    (out / "trouble").write_text("wait-1")
    given = ["--output_dir", str(out), "--tasks", "lra-a", "--seeds", "0", "1", "2"]
    program = "import sys; sys.path.insert(0, sys.argv[1]); import sweep, pathlib; "
    program += "sys.exit(sweep.main(sys.argv[3:], pathlib.Path(sys.argv[2])))"
    command = [sys.executable, "-c", program, str(EXPERIMENTS), str(entry), *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "logs" / "log-1" / "lra-a" / "learned.metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and '"step": 12' in metrics.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    text, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error == "interrupted: the same command goes on from here\n"
    states = [cells[-1] for cells in _cells(text)]
    assert states == ["done", "interrupted", "begun"]
    assert len(_calls(entry)) == 2
    (out / "trouble").unlink()
    assert sweep.main(given, entry) == 0
    assert [call.endswith("--resume") for call in _calls(entry)] == [True, False]
    assert [cells[-1] for cells in _cells(capsys.readouterr().out)] == ["done"] * 3 + ["mean"]


def test_results_of_other_options_are_not_taken_for_ours(entry, capsys):
    assert _sweep(entry, "--tasks", "lra-a", "--", "--train_steps", "30") == 0
    assert _sweep(entry, "--tasks", "lra-a", "--", "--train_steps", "60") == 2
    error = capsys.readouterr().err
    assert "was made with other options" in error and error.count("\n") == 1
    assert len(_calls(entry)) == 1


def test_dry_run_trains_nothing(entry, capsys):
    assert _sweep(entry, *GRID, "--dry_run") == 0
    assert _calls(entry) == [] and list((entry.parent / "out").iterdir()) == []
    assert capsys.readouterr().out.count("--mode train") == 8


def test_an_alias_is_spelled_out(entry, capsys):
    assert _sweep(entry, "--tasks", "lra-pathfinder", "--dry_run") == 0
    assert "--task lra-pathfinder32-curv_contour_length_14 " in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--resume", "--task=lra-x", "--name"])
def test_what_the_sweep_sets_cannot_be_given_again(entry, capsys, word):
    with pytest.raises(SystemExit) as stopped:
        _sweep(entry, "--tasks", "lra-a", "--", word)
    assert stopped.value.code == 2
    assert "is set by the sweep itself" in capsys.readouterr().err


# ---- trajectories -----------------------------------------------------------------------------


def _metrics(path: Path, evaluations: dict[int, float], task="lra-image") -> Path:
    events = [{"event": "start", "step": 0, "task": task}]
    events += [{"event": "eval", "step": s, "accuracy": a} for s, a in evaluations.items()]
    events.insert(2, {"event": "transition", "step": 180})
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def _published(path: Path) -> Path:
    lines = ["task,seed,run,step,dev_loss,dev_accuracy,seconds_on_4_gpus"]
    for seed in range(3):
        for step in (499, 999):
            lines.append(f"lra-image,{seed},learnable,{step},1.5,{0.3 + seed / 10 + step / 1e5},1")
    lines.append("lra-image,9,trsfmr,499,1.5,0.9,1")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_band_is_that_of_the_published_runs(tmp_path, capsys):
    metrics = _metrics(tmp_path / "m.jsonl", {500: 0.42, 700: 0.4, 1000: 0.1})
    figure = tmp_path / "f" / "trajectory.png"
    given = [metrics, "--published", _published(tmp_path / "p.csv"), "--output", figure]
    assert plot_trajectory.main([str(word) for word in given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("lra-image, transition at step 180")
    # the published step 499 is after 500 steps; the dense run is not in the band
    assert lines[2].split() == ["500", "0.4200", "within", "0.3050", "0.4050", "0.5050", "3"]
    assert lines[3].split()[:2] == ["700", "0.4000"] and "not evaluated" in lines[3]
    assert lines[4].split() == ["1000", "0.1000", "below", "0.3100", "0.4100", "0.5100", "3"]
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_the_real_published_file_is_read(shared_data):
    path = shared_data / "reference" / "dev_trajectories.csv"
    found = plot_trajectory.read_published(path, "lra-image", "learnable")
    assert len(found[500]) >= 10 and max(found) == 10_000
    assert min(found[500]) > 0.25 and max(found[10_000]) < 0.5


@pytest.mark.parametrize("case", ["absent", "torn", "no start", "none", "columns", "task", "two"])
def test_mistakes_are_one_sentence(tmp_path, capsys, case):
    metrics = _metrics(tmp_path / "m.jsonl", {} if case == "none" else {500: 0.4})
    published = _published(tmp_path / "p.csv")
    given = [metrics, "--published", published, "--output", tmp_path / "f.png"]
    if case == "absent":
        metrics.unlink()
        message = "m.jsonl"
    elif case == "torn":
        metrics.write_text(metrics.read_text()[:-5])
        message = "line 3: not an event of a run"
    elif case == "no start":
        metrics.write_text("")
        message = "has no start of a run"
    elif case == "none":
        message = "has no evaluation yet"
    elif case == "columns":
        published.write_text("step,accuracy\n1,2\n")
        message = "has no column task, seed, run, dev_accuracy"
    elif case == "task":
        published.write_text(published.read_text().replace("lra-image", "lra-text"))
        message = "has no runs 'learnable' of task lra-image"
    else:
        given.insert(1, _metrics(tmp_path / "n.jsonl", {500: 0.4}, "lra-text"))
        message = "runs of several tasks in one figure: lra-image, lra-text"
    assert plot_trajectory.main([str(word) for word in given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "f.png").exists()


def test_the_recipe_trains_goes_on_and_draws(entry, tmp_path):
    """experiments/lra_image.sh with the stand-in in the entry script's place."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/lra_image.sh").write_text((EXPERIMENTS / "lra_image.sh").read_text())
    # a figure takes seconds and is tested above: here only what is asked for
    (tmp_path / "experiments/plot_trajectory.py").write_text("import sys; print(sys.argv[1:])")
    entry.rename(tmp_path / "main_learnable_skewness.py")
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT_DIR": str(out)}
    command = ["sh", "experiments/lra_image.sh", str(_published(tmp_path / "p.csv"))]
    called = []
    for steps in ("10", "20", "20"):
        drawn = subprocess.run(
            [*command, "--batch_size", "8"],
            cwd=tmp_path,
            env={**environment, "STEPS": steps},
            check=True,
            capture_output=True,
            text=True,
        )
        called.append(_calls(entry))
        metrics = str(out / "logs/log-0/lra-image/sat.metrics.jsonl")
        asked = [metrics, "--published", command[2], "--output", str(out / "trajectory.png")]
        assert drawn.stdout.strip() == str(asked)
    begin = "--mode train --task lra-image --sk 1.7 --ds 1.3 --stop_after"
    assert called == [
        [f"{begin} 10 --output_dir {out} --batch_size 8"],
        [f"{begin} 20 --output_dir {out} --resume --batch_size 8"],
        [],
    ]


# ---- the real thing ---------------------------------------------------------------------------


def test_a_sweep_of_real_runs(tmp_path, capfd):
    """A tiny ListOps: cut, continued, its row in the table and its trajectory."""
    tiny.write_data(tmp_path / "data")
    out = tmp_path / "out"
    given = ["--tasks", tiny.TASK, "--patterns", "band", "--output_dir", str(out)]
    more = ["--", "--data_dir", str(tmp_path / "data"), "--train_steps", "30"]
    more += ["--batch_size", "8", "--max_dense_steps", "12", *tiny.SETTINGS]
    assert sweep.main([*given, "--stop_after", "15", *more]) == 0
    (row,) = _cells(capfd.readouterr().out)
    assert row[:5] == [tiny.TASK, "band", "0.3", "0", "-"]
    assert row[6:8] == ["12", "15"] and row[-1] == "done"
    assert sweep.main([*given, *more]) == 0
    text = capfd.readouterr().out
    assert "resumed at step 15, sparse phase" in text
    (row,) = _cells(text)
    log = out / "logs" / "log-0" / tiny.TASK
    result = json.loads((log / "band.run.json").read_text())["result"]
    assert row[4] == f"{result['test_accuracy']:.4f}"
    assert row[6:8] == ["12", "30"] and row[-1] == "done"
    given = [str(log / "band.metrics.jsonl"), "--output", str(tmp_path / "t.png")]
    assert plot_trajectory.main(given) == 0
    assert "transition at step 12" in capfd.readouterr().out
