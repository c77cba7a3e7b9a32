"""Trains a grid of runs and compares their settings: table, sweep.json and sweep.html.

python experiments/sweep.py --tasks lra-image --seeds 0 1 2 --output_dir runs/patterns \
    --grid pattern=learned,mass,random --grid model.density=0.05,0.1 -- --train_steps 5000

A name of --grid is a flag of main_learnable_skewness.py that stands for a setting (pattern,
transition_when, sk, ds, lift, ...) or section.field as for its --set. What stands after -- goes to
every run as it is. The same command again skips what is done, resumes what was interrupted and
retries what failed. Every run is a separate process, known here by its exit code, its run.json
and its metrics.jsonl.

Settings are compared by test accuracy, or by the best on dev if no run has been tested: mean,
standard deviation and 95 % interval (Student's t), and the difference from the first setting,
paired by seed.

Exit codes: 0 all runs are done, 1 some failed, 2 wrong usage, 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import intervals  # noqa: E402

ENTRY = ROOT / "main_learnable_skewness.py"
OURS = {"--task", "--random", "--name", "--output_dir", "--mode", "--resume", "--stop_after"}


@dataclass(frozen=True)
class Trial:
    """One run of the grid."""

    task: str
    seed: int
    settings: tuple[tuple[str, str], ...]  # section.field and value, as typed
    output_dir: Path
    stop_after: int | None
    more: tuple[str, ...]

    @property
    def name(self) -> str:
        """In file names: values, and the field where the value alone says too little."""
        parts = [
            ("" if value[:1].isalpha() else path.partition(".")[2]) + value.replace("/", "_")
            for path, value in self.settings
        ]
        return "-".join(parts) or "sat"

    def arguments(self) -> list[str]:
        """Of main_learnable_skewness.py, without --resume."""
        words = ["--mode", "train", "--task", self.task, "--random", str(self.seed)]
        words += ["--name", self.name]
        for path, value in self.settings:
            words += ["--set", f"{path}={value}"]
        if self.stop_after is not None:
            words += ["--stop_after", str(self.stop_after)]
        return [*words, "--output_dir", str(self.output_dir), *self.more]

    def log(self, kind: str) -> Path:
        return self.output_dir / "logs" / f"log-{self.seed}" / self.task / kind

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the run will be made of.

        Raises: UserError if it would be refused; SystemExit for unknown options.
        """
        from config import Config
        from training.commands.train import FLAGS
        from training.options import add_training_arguments, build_parser
        from training.settings import build_config

        parser = build_parser("sweep.py ... --", "", modes=["train"], default_mode="train")
        add_training_arguments(parser)
        args = parser.parse_args(self.arguments())
        flags = {path: getattr(args, flag) for flag, path in FLAGS.items()}
        return build_config(self.task, Config[self.task], settings=args.set, flags=flags)[
            0
        ].as_dict()

    def facts(self) -> dict | None:
        """run.json, None before the run has begun."""
        path = self.log(f"{self.name}.run.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def events(self) -> list[dict]:
        """Of metrics.jsonl; a half-written last line is left out."""
        path = self.log(f"{self.name}.metrics.jsonl")
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def steps(self) -> int:
        """Completed steps."""
        return max((e["step"] for e in self.events() if e["event"] == "train"), default=0)

    def done(self) -> bool:
        facts = self.facts()
        if facts is None:
            return False
        cut = self.stop_after is not None and self.steps() >= self.stop_after
        return facts["result"] is not None or cut

    def check_same(self) -> None:
        """Raises: UserError if a run of this name was made with other options."""
        from training.errors import UserError

        facts = self.facts()
        if facts is None:
            return
        # up to what only says how far to go now
        given, stored = (
            _without(words, ("--resume",), ("--stop_after",))
            for words in (self.arguments(), shlex.split(facts["command"])[2:])
        )
        if given != stored:
            raise UserError(
                f"{self.log(self.name)}.run.json was made with other options: "
                f"{shlex.join(stored)}; this sweep would use: {shlex.join(given)}; choose another "
                f"--output_dir"
            )

    def row(self, state: str) -> dict[str, Any]:
        """What its files tell: what it was made of comes from run.json, not from our arguments."""
        facts, events = self.facts() or {}, self.events()
        result = facts.get("result") or {}
        config = facts.get("config", self.config)
        train = [e for e in events if e["event"] == "train"]
        best = result.get("best_dev_accuracy")
        if best is None:
            best = max((e["accuracy"] for e in events if e["event"] == "eval"), default=None)
        settings = {}
        for path, _ in self.settings:
            section, field = path.split(".")
            settings[path] = config[section][field]
        return {
            "task": self.task,
            "settings": settings,
            "seed": self.seed,
            "test_accuracy": result.get("test_accuracy"),
            "best_dev_accuracy": best,
            "transition_step": next(
                (e["step"] for e in events if e["event"] == "transition"), None
            ),
            "steps": self.steps(),
            "seconds": max((e["seconds"] for e in train), default=None),
            "peak_memory_bytes": max((e["peak_memory_bytes"] for e in train), default=None),
            "state": state,
        }


def _without(words: list[str], alone: tuple[str, ...], with_value: tuple[str, ...]) -> list[str]:
    kept, rest = [], iter(words)
    for word in rest:
        if word in with_value:
            next(rest, None)
        elif word not in alone:
            kept.append(word)
    return kept


# ---- running -----------------------------------------------------------------------


def run_all(
    trials: list[Trial], states: dict[Trial, str], jobs: int, entry: Path, dry_run: bool
) -> int:
    """Trains what is not done, `jobs` at a time; keeps `states`. SIGINT and SIGTERM are passed on
    to the runs, which save; then nothing new begins.

    Returns: the exit code.
    """
    received: list[int] = []
    running: dict[subprocess.Popen, Trial] = {}

    def pass_on(number, frame):
        received.append(number)
        for process in list(running):
            process.send_signal(number)

    environment = dict(os.environ)
    if jobs > 1:  # runs at the same time share the processors
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    code, waiting = 0, list(enumerate(trials, 1))
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not received):
            while waiting and len(running) < jobs and not received:
                number, trial = waiting.pop(0)
                if states[trial] == "done":
                    continue
                resume = ["--resume"] if states[trial] == "interrupted" else []
                command = [sys.executable, str(entry), *trial.arguments(), *resume]
                print(f"[{number}/{len(trials)}] {shlex.join(command)}", flush=True)
                if dry_run:
                    continue
                states[trial] = "interrupted"
                process = subprocess.Popen(
                    command,
                    env=environment,
                    # each has a log of its own
                    stdout=subprocess.DEVNULL if jobs > 1 else None,
                    # in its own session: a Ctrl-C at the terminal reaches it once, through us
                    start_new_session=True,
                )
                running[process] = trial
                if received:
                    process.send_signal(received[0])
            for process in [p for p in running if p.poll() is not None]:
                trial, status = running.pop(process), process.returncode
                if status in (130, 143):
                    received.append(status - 128)
                elif status == 0 and trial.done():
                    states[trial] = "done"
                else:
                    states[trial] = f"failed (exit code {status})"
                    code = 1
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 128 + received[0]
    return code


# ---- comparing ---------------------------------------------------------------------


def compare(rows: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The measure that settings are compared by, and a row for each: what its runs have in common,
    and how they differ from the first setting of their task."""
    tested = any(row["test_accuracy"] is not None for row in rows)
    measure = "test_accuracy" if tested else "best_dev_accuracy"
    groups: dict[str, dict[str, dict[int, float]]] = {}
    found = []
    for row in rows:
        settings = groups.setdefault(row["task"], {})
        key = json.dumps(row["settings"])
        if key not in settings:
            settings[key] = {}
            found.append((row["task"], row["settings"], settings[key]))
        if row[measure] is not None:
            settings[key][row["seed"]] = row[measure]
    compared = []
    for task, settings, values in found:
        first = next(iter(groups[task].values()))
        difference = None if values is first else intervals.paired(first, values)
        mean = intervals.mean_of(list(values.values())) if values else None
        compared.append(
            {
                "task": task,
                "settings": settings,
                measure: mean and dataclasses.asdict(mean),
                "minus_first": difference and dataclasses.asdict(difference),
            }
        )
    return measure, compared


RUN = ["seed", "test_accuracy", "best_dev_accuracy", "transition_step", "steps", "seconds"]


def run_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """With a header."""
    paths = list(rows[0]["settings"])
    header = ["task", *(path.partition(".")[2] for path in paths), *RUN, "MiB", "state"]
    lines = [[word.replace("_", " ") for word in header]]
    for row in rows:
        cells = [row["task"], *(_text(row["settings"][path]) for path in paths)]
        cells += [_text(row["seed"]), _text(row[RUN[1]], ".4f"), _text(row[RUN[2]], ".4f")]
        cells += [_text(row["transition_step"]), _text(row["steps"]), _text(row["seconds"], ".0f")]
        peak = row["peak_memory_bytes"]
        lines.append([*cells, _text(peak and peak / 2**20, ".0f"), row["state"]])
    return lines


def setting_cells(measure: str, compared: list[dict[str, Any]]) -> list[list[str]]:
    """With a header. Intervals as lowest and highest value."""
    paths = list(compared[0]["settings"])
    names = [path.partition(".")[2].replace("_", " ") for path in paths]
    header = ["task", *names, "runs", measure.replace("_", " "), "sd", "95 % interval"]
    lines = [[*header, "minus first", "95 % interval", "pairs"]]
    for row in compared:
        own, other = row[measure] or {}, row["minus_first"] or {}
        cells = [row["task"], *(_text(row["settings"][path]) for path in paths)]
        cells += [str(own.get("count", 0)), _text(own.get("mean"), ".4f")]
        cells += [_text(own.get("deviation"), ".4f"), _interval(own, ".4f")]
        cells += [_text(other.get("mean"), "+.4f"), _interval(other, "+.4f")]
        lines.append([*cells, _text(other.get("count"))])
    return lines


def _text(value: Any, form: str = "") -> str:
    return "-" if value is None else format(value, form if isinstance(value, int | float) else "")


def _interval(row: dict[str, Any], form: str) -> str:
    half = row.get("half_width")
    return "-" if half is None else " to ".join(
        format(row["mean"] + sign * half, form) for sign in (-1, 1)
    )  # fmt: skip


def aligned(lines: list[list[str]]) -> str:
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in lines
    )


def page(trials: list[Trial], rows, measure: str, compared, command: str) -> str:
    """sweep.html, with links to the reports of the runs."""
    from training.recording import figures
    from training.recording.page import document, paragraph, picture, table

    body = [f"<p><code>{escape(command)}</code></p>", "<h2>Settings</h2>"]
    lines = setting_cells(measure, compared)
    body.append(table(lines[1:], lines[0]))
    body.append(
        paragraph(
            "Mean and standard deviation over seeds; intervals by Student's t; differences from "
            "the first setting of the task, paired by seed. An interval that holds 0 shows "
            "no difference.",
            "soft",
        )
    )
    for task in dict.fromkeys(row["task"] for row in compared):
        ours = [row for row in compared if row["task"] == task]
        labels = [", ".join(_text(v) for v in row["settings"].values()) or "all" for row in ours]
        points = [
            [r[measure] for r in rows if r[measure] is not None and r["task"] == task
             and r["settings"] == row["settings"]]
            for row in ours
        ]  # fmt: skip
        means = [
            row[measure] and (row[measure]["mean"], row[measure]["half_width"]) for row in ours
        ]
        caption = f"{task}: runs, and the mean of each setting with its 95 % interval."
        name = measure.replace("_", " ")
        body.append(picture(caption, figures.intervals, labels, points, means, name))
    lines = run_cells(rows)
    body += ["<h2>Runs</h2>", table(lines[1:], lines[0])]
    links = []
    for trial in trials:
        report = trial.log(f"train.{trial.name}.html")
        if report.exists():
            address = escape(report.relative_to(trial.output_dir).as_posix())
            label = escape(f"{trial.task} {trial.name} {trial.seed}")
            links.append(f'<a href="{address}">{label}</a>')
    body.append(f"<p>Reports: {', '.join(links)}</p>" if links else "")
    return document(f"Sweep of {len(rows)} runs", body)


# ---- the command -------------------------------------------------------------------


def grid_of(text: str) -> tuple[str, list[str]]:
    """NAME=a,b,c"""
    name, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",")]
    if not name.strip() or not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=value,value,...")
    return name.strip(), found


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what stands after --."""
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, more = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="T", help="keys of config.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument(
        "--grid",
        action="append",
        type=grid_of,
        default=[],
        metavar="NAME=a,b,c",
        help="values of a setting, each with each of other settings'; repeatable; differences are "
        "from the first",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)"
    )
    parser.add_argument(
        "--stop_after", type=int, metavar="N", help="cut every run after N steps, to be continued"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="of all runs, sweep.json and sweep.html"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands and the table, train nothing"
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    from training.commands.train import FLAGS

    args.grid = [(FLAGS.get(name, name), values) for name, values in args.grid]
    paths = [path for path, _ in args.grid]
    for path in paths:
        if paths.count(path) > 1 or path == "run.seed":
            parser.error(f"--grid {path}: " + ("use --seeds" if path == "run.seed" else "twice"))
    for position, word in enumerate(more):
        flag, _, value = word.partition("=")
        setting = FLAGS.get(flag.removeprefix("--"), "") if flag.startswith("--") else ""
        if flag == "--set":
            text = value or (more[position + 1] if position + 1 < len(more) else "")
            setting = text.partition("=")[0].strip()
        if flag in OURS or setting in [*paths, "run.seed"]:
            what = f"--set {setting}" if flag == "--set" else flag
            parser.error(f"{what} is set by the sweep itself and cannot stand after --")
    return args, more


def main(argv: list[str], entry: Path = ENTRY) -> int:
    args, more = parse_arguments(argv)
    from config import Aliases, Config
    from training import shell
    from training.errors import UserError
    from training.recording.log import write_json, write_text
    from training.settings import resolve_task

    shell.prepare_streams()
    try:
        trials = [
            Trial(
                resolve_task(task, Config, Aliases),
                seed,
                tuple(zip((path for path, _ in args.grid), values, strict=True)),
                args.output_dir,
                args.stop_after,
                tuple(more),
            )
            for task in args.tasks
            for values in itertools.product(*(values for _, values in args.grid))
            for seed in args.seeds
        ]
        trials = list(dict.fromkeys(trials))
        states = dict.fromkeys(trials, "not begun")
        for trial in trials:
            trial.config  # noqa: B018 (refuses what the run would refuse, before any has begun)
            trial.check_same()
            if trial.done():
                states[trial] = "done"
            elif trial.facts() is not None:
                states[trial] = "interrupted"
        code = run_all(trials, states, args.jobs, entry, args.dry_run)
        rows = [trial.row(states[trial]) for trial in trials]
        measure, compared = compare(rows)
        print(aligned(run_cells(rows)))
        if len(compared) > 1 or len(rows) > 1:
            print()
            print(aligned(setting_cells(measure, compared)))
        if not args.dry_run:
            command = shlex.join(["python", "experiments/sweep.py", *argv])
            write_json(args.output_dir / "sweep.json", {"runs": rows, "settings": compared})
            write_text(
                args.output_dir / "sweep.html", page(trials, rows, measure, compared, command)
            )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
