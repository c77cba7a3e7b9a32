"""Sweeps and recipes, with a stand-in for main_learnable_skewness.py that leaves the same files,
and once with the real one."""

import json
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
config = {"model": {"density": 0.25}}
for word, setting in zip(argv, argv[1:]):
    if word == "--set":
        path, _, text = setting.partition("=")
        section, field = path.split(".")
        text = text if text[0].isalpha() else float(text)
        config.setdefault(section, {})[field] = text
content |= {"config": config, "result": None}
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
lucky = 0.1 * (config.get("sparsity", {}).get("pattern") == "band")
accuracy = 0.5 + int(seed) ** 2 / 100 + lucky
content["result"] = {"test_accuracy": accuracy, "best_dev_accuracy": 0.3}
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
    """The rows of the printed table of runs."""
    lines = text.splitlines()
    header = max(i for i, line in enumerate(lines) if line.startswith("task ") and "seed" in line)
    end = lines.index("", header) if "" in lines[header:] else len(lines)
    return [line.split() for line in lines[header + 1 : end]]


GRID = ("--tasks", "lra-text", "lra-nature", "--seeds", 0, 1, 2)
GRID += ("--grid", "pattern=learned,band", "--grid", "model.density=0.1")


def test_a_grid_runs_each_setting_once_and_is_not_repeated(entry, capsys):
    out = entry.parent / "out"
    assert _sweep(entry, *GRID, "--", "--train_steps", "30") == 0
    calls = _calls(entry)
    assert len(calls) == len(set(calls)) == 12
    assert calls[0] == (
        "--mode train --task lra-text --random 0 --name learned-density0.1 "
        "--set sparsity.pattern=learned --set model.density=0.1 "
        f"--output_dir {out} --train_steps 30"
    )
    rows = _cells(capsys.readouterr().out)
    assert len(rows) == 12
    expected = ["learned", "0.1", "1", "0.5100", "0.3000", "15", "30", "15", "30", "done"]
    assert rows[1] == ["lra-text", *expected]
    assert _sweep(entry, *GRID, "--", "--train_steps", "30") == 0
    assert _calls(entry) == []
    assert _cells(capsys.readouterr().out) == rows


def test_settings_are_compared_over_seeds(entry, capsys):
    """Accuracies 0.50, 0.51, 0.54 and 0.1 more: by hand, with t = 4.3027 for two degrees."""
    assert _sweep(entry, *GRID) == 0
    printed = capsys.readouterr().out
    mean, deviation = 1.55 / 3, 0.0208167
    half = 4.30265 * deviation / 3**0.5
    found = json.loads((entry.parent / "out" / "sweep.json").read_text())
    assert [run["test_accuracy"] for run in found["runs"][:3]] == [0.5, 0.51, 0.54]
    assert found["runs"][0]["settings"] == {"sparsity.pattern": "learned", "model.density": 0.1}
    first, second, third, _ = found["settings"]
    assert first["minus_first"] is third["minus_first"] is None and third["task"] == "lra-nature"
    own = first["test_accuracy"]
    assert own["count"] == 3 and own["mean"] == pytest.approx(mean)
    assert own["deviation"] == pytest.approx(deviation, rel=1e-4)
    assert own["half_width"] == pytest.approx(half, rel=1e-4)
    # the same seeds on both sides: the difference does not vary
    difference = second["minus_first"]
    assert difference["count"] == 3 and difference["mean"] == pytest.approx(0.1)
    assert difference["half_width"] == pytest.approx(0, abs=1e-9)
    numbers = f"3 {mean + 0.1:.4f} 0.0208 {mean + 0.1 - half:.4f} to {mean + 0.1 + half:.4f}"
    wanted = f"lra-text band 0.1 {numbers} +0.1000 +0.1000 to +0.1000 3"
    assert wanted.split() in [line.split() for line in printed.splitlines()]


def test_a_sweep_leaves_a_page(entry):
    out = entry.parent / "out"
    report = out / "logs/log-1/lra-text/train.band-density0.1.html"
    report.parent.mkdir(parents=True)
    report.write_text("report")
    assert _sweep(entry, *GRID) == 0
    page = (out / "sweep.html").read_text()
    assert "not drawn" not in page and page.count("<svg") == 2  # a figure a task
    assert 'href="logs/log-1/lra-text/train.band-density0.1.html"' in page
    assert page.count('href="logs') == 1, "no link to what is not there"
    assert "0.5167" in page and "+0.1000" in page and "experiments/sweep.py --output_dir" in page


def test_the_table_is_what_ran(entry, capsys):
    """Not what this script believes to have asked for."""
    assert _sweep(entry, "--tasks", "lra-text", "--grid", "pattern=learned,band") == 0
    facts = entry.parent / "out/logs/log-0/lra-text/band.run.json"
    content = json.loads(facts.read_text())
    content["config"]["sparsity"]["pattern"] = "mass"
    facts.write_text(json.dumps(content))
    capsys.readouterr()
    assert _sweep(entry, "--tasks", "lra-text", "--grid", "pattern=learned,band") == 0
    assert [row[1] for row in _cells(capsys.readouterr().out)] == ["learned", "mass"]


def test_runs_beside_each_other(entry, capsys):
    """Two that wait for each other: one after the other they would never end."""
    program = entry.read_text().replace(
        "stop = []",
        """
(folder / f"{name}.here").touch()
deadline = time.monotonic() + 60
while len(list(folder.parents[1].glob("*/*/*.here"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
assert time.monotonic() < deadline
threads = os.environ["OMP_NUM_THREADS"]
stop = []""",
    )
    entry.write_text(program)
    assert _sweep(entry, "--tasks", "lra-text", "--seeds", 0, 1, 2, "--jobs", 2) == 0
    assert [row[-1] for row in _cells(capsys.readouterr().out)] == ["done"] * 3


def test_failures_do_not_stop_the_others_and_are_tried_again(entry, capsys):
    (entry.parent / "out" / "trouble").write_text("break-0 refuse-1")
    options = ("--tasks", "lra-text", "--seeds", 0, 1, 2)
    assert _sweep(entry, *options) == 1
    assert [cells[-1] for cells in _cells(capsys.readouterr().out)] == ["1)", "2)", "done"]
    assert len(_calls(entry)) == 3
    (entry.parent / "out" / "trouble").unlink()
    assert _sweep(entry, *options) == 0
    calls = _calls(entry)
    assert [call.endswith("--resume") for call in calls] == [True, False], calls
    rows = _cells(capsys.readouterr().out)
    assert [cells[-1] for cells in rows] == ["done", "done", "done"]
    assert rows[0][5] == "30", "steps are continued, not repeated"


def test_stop_after_is_done_until_more_is_asked_for(entry, capsys):
    assert _sweep(entry, "--tasks", "lra-text", "--stop_after", 12) == 0
    assert _sweep(entry, "--tasks", "lra-text", "--stop_after", 12) == 0
    assert len(_calls(entry)) == 1
    rows = _cells(capsys.readouterr().out)
    assert rows[-1][2:6] == ["-", "0.1000", "-", "12"] and rows[-1][-1] == "done"
    assert _sweep(entry, "--tasks", "lra-text", "--stop_after", 20) == 0
    assert _sweep(entry, "--tasks", "lra-text") == 0
    assert [call.split("--output_dir")[0].split()[-2:] for call in _calls(entry)] == [
        ["--stop_after", "20"],
        ["--name", "sat"],
    ]
    assert _cells(capsys.readouterr().out)[-1][2] == "0.5000"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_waits_for_its_run_and_goes_on(entry, capsys, number, code):
    out = entry.parent / "out"
    (out / "trouble").write_text("wait-1")
    given = ["--output_dir", str(out), "--tasks", "lra-text", "--seeds", "0", "1", "2"]
    program = "import sys; sys.path.insert(0, sys.argv[1]); import sweep, pathlib; "
    program += "sys.exit(sweep.main(sys.argv[3:], pathlib.Path(sys.argv[2])))"
    command = [sys.executable, "-c", program, str(EXPERIMENTS), str(entry), *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "logs" / "log-1" / "lra-text" / "sat.metrics.jsonl"
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
    assert [cells[-1] for cells in _cells(capsys.readouterr().out)] == ["done"] * 3


def test_results_of_other_options_are_not_taken_for_ours(entry, capsys):
    assert _sweep(entry, "--tasks", "lra-text", "--", "--train_steps", "30") == 0
    assert _sweep(entry, "--tasks", "lra-text", "--", "--train_steps", "60") == 2
    error = capsys.readouterr().err
    assert "was made with other options" in error and error.count("\n") == 1
    assert len(_calls(entry)) == 1


def test_dry_run_trains_nothing(entry, capsys):
    assert _sweep(entry, *GRID, "--dry_run") == 0
    assert _calls(entry) == [] and list((entry.parent / "out").iterdir()) == []
    assert capsys.readouterr().out.count("--mode train") == 12


def test_an_alias_is_spelled_out(entry, capsys):
    assert _sweep(entry, "--tasks", "lra-pathfinder", "--dry_run") == 0
    assert "--task lra-pathfinder32-curv_contour_length_14 " in capsys.readouterr().out


def test_every_pattern_and_criterion_can_be_swept(entry, capsys):
    from sparsity import CRITERIA, PATTERNS

    patterns = [name for name, pattern in PATTERNS.items() if pattern.needs == "attention"]
    grid = [f"pattern={','.join(patterns)}", f"transition_when={','.join(CRITERIA)}"]
    options = ("--grid", grid[0], "--grid", grid[1], "--grid", "sk=1.5,1.7", "--grid", "ds=1,2")
    more = ("--", "--max_dense_steps", 10)
    assert _sweep(entry, "--tasks", "lra-text", *options, "--dry_run", *more) == 0
    count = len(patterns) * len(CRITERIA) * 4
    printed = capsys.readouterr().out
    assert printed.count("--mode train") == count == len(_cells(printed))
    assert "--set training.skewness=1.5 --set training.distance=2" in printed


REFUSED = {
    "pattern=learned,lerned": "--pattern must be one of learned",
    "model.densty=0.1": "densty",
    "nothing=1": "section.field",
    "model.density=0.1,2": "density",
    "training.patience=1": "changes nothing",
}


@pytest.mark.parametrize("grid", REFUSED)
def test_what_a_run_would_refuse_is_refused_before_any_has_begun(entry, capsys, grid):
    assert _sweep(entry, "--tasks", "lra-text", "--grid", grid) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and REFUSED[grid] in error
    assert _calls(entry) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "pattern"], "is not NAME=value"),
        (["--grid", "sk=1,,2"], "is not NAME=value"),
        (["--grid", "sk=1", "--grid", "training.skewness=2"], "training.skewness: twice"),
        (["--grid", "random=1,2"], "use --seeds"),
        (["--jobs", "0"], "at least 1"),
        (["--", "--resume"], "--resume is set by the sweep itself"),
        (["--", "--task=lra-x"], "--task is set by the sweep itself"),
        (["--", "--set", "run.seed=3"], "--set run.seed is set by the sweep itself"),
        (["--grid", "pattern=band", "--", "--pattern", "mass"], "--pattern is set by the sweep"),
        (["--grid", "sk=1,2", "--", "--set=training.skewness=3"], "is set by the sweep itself"),
        (["--grid", "model.density=0.1", "--", "--set", " model.density = 1"], "is set by the"),
        (["--", "--nothing", "1"], "unrecognized arguments: --nothing 1"),
    ],
    ids=str,
)
def test_wrong_usage(entry, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        _sweep(entry, "--tasks", "lra-text", *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err and _calls(entry) == []


def test_what_the_grid_does_not_set_may_stand_behind(entry):
    options = ("--grid", "sk=1,2", "--", "--pattern", "band", "--set", "model.density=0.5")
    assert _sweep(entry, "--tasks", "lra-text", *options) == 0
    assert all(call.endswith("--pattern band --set model.density=0.5") for call in _calls(entry))


# ---- the real thing ---------------------------------------------------------------------------


def test_a_sweep_of_real_runs(tmp_path, capfd):
    """A tiny ListOps: cut, continued, its row in the table."""
    tiny.write_data(tmp_path / "data")
    out = tmp_path / "out"
    grid = ["--grid", "pattern=band", "--grid", "model.density=0.3"]
    given = ["--tasks", tiny.TASK, *grid, "--output_dir", str(out)]
    more = ["--", "--data_dir", str(tmp_path / "data"), "--train_steps", "30"]
    settings = [word for word in tiny.SETTINGS if "density" not in word]
    more += ["--batch_size", "8", "--max_dense_steps", "12", *settings]
    assert sweep.main([*given, "--stop_after", "15", *more]) == 0
    (row,) = _cells(capfd.readouterr().out)
    assert row[:5] == [tiny.TASK, "band", "0.3", "0", "-"]
    assert row[6:8] == ["12", "15"] and row[-1] == "done"
    assert sweep.main([*given, *more]) == 0
    text = capfd.readouterr().out
    assert "resumed at step 15, sparse phase" in text
    (row,) = _cells(text)
    log = out / "logs" / "log-0" / tiny.TASK
    result = json.loads((log / "band-density0.3.run.json").read_text())["result"]
    assert row[4] == f"{result['test_accuracy']:.4f}"
    assert row[6:8] == ["12", "30"] and row[-1] == "done"
    link = f"logs/log-0/{tiny.TASK}/train.band-density0.3.html"
    assert link in (out / "sweep.html").read_text() and (out / link).exists()
