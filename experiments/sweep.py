"""Trains a grid of runs one after the other and prints their results as a table.

python experiments/sweep.py --tasks lra-image lra-listops --seeds 0 1 2 --output_dir runs/sweep
python experiments/sweep.py --tasks lra-image --patterns learned random band \
    --densities 0.02 0.05 0.1 --output_dir runs/patterns -- --train_steps 5000

What stands after -- goes to every main_learnable_skewness.py as it is. The same command again
skips what is done, resumes what was interrupted and tries again what failed. Every run is a
process of its own; what this script knows of it is its exit code, its run.json and its
metrics.jsonl.

Exit codes: 0 all runs are done, 1 some failed, 2 wrong usage, 130 or 143 interrupted.
"""

import argparse
import itertools
import json
import shlex
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = Path(__file__).resolve().parents[1] / "main_learnable_skewness.py"
# its files carry the long name, so we use that from the start
ALIASES = {"lra-pathfinder": "lra-pathfinder32-curv_contour_length_14"}
OURS = ("--task", "--random", "--name", "--output_dir", "--mode", "--resume", "--stop_after")
OURS += ("--pattern",)


@dataclass(frozen=True)
class Trial:
    """One run of the grid."""

    task: str
    seed: int
    pattern: str
    density: float | None  # None: the task's own
    output_dir: Path
    stop_after: int | None
    more: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.pattern if self.density is None else f"{self.pattern}-density{self.density:g}"

    def arguments(self) -> list[str]:
        """Of main_learnable_skewness.py, without --resume."""
        words = ["--mode", "train", "--task", self.task, "--random", str(self.seed)]
        words += ["--name", self.name, "--pattern", self.pattern]
        if self.density is not None:
            words += ["--set", f"model.density={self.density:g}"]
        if self.stop_after is not None:
            words += ["--stop_after", str(self.stop_after)]
        return [*words, "--output_dir", str(self.output_dir), *self.more]

    def _log(self, kind: str) -> Path:
        return self.output_dir / "logs" / f"log-{self.seed}" / self.task / f"{self.name}.{kind}"

    def facts(self) -> dict | None:
        """run.json, None before the run has begun."""
        path = self._log("run.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def events(self) -> list[dict]:
        """Of metrics.jsonl; a half-written last line is left out."""
        path = self._log("metrics.jsonl")
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
        """Raises: ValueError if a run of this name was made with other options."""
        facts = self.facts()
        if facts is None:
            return
        # up to what only says how far to go now
        given, stored = (
            _without(words, ("--resume",), ("--stop_after",))
            for words in (self.arguments(), shlex.split(facts["command"])[2:])
        )
        if given != stored:
            raise ValueError(
                f"{self._log('run.json')} was made with other options: {shlex.join(stored)}; "
                f"this sweep would use: {shlex.join(given)}; choose another --output_dir"
            )


def _without(words: list[str], alone: tuple[str, ...], with_value: tuple[str, ...]) -> list[str]:
    kept, rest = [], iter(words)
    for word in rest:
        if word in with_value:
            next(rest, None)
        elif word not in alone:
            kept.append(word)
    return kept


class Interrupted(Exception):
    """SIGINT or SIGTERM came; the running process has been told and has ended."""


def run(command: list[str]) -> int:
    """Exit code of a process; passes SIGINT and SIGTERM on to it, waits for it to save and
    raises Interrupted."""
    received: list[int] = []
    process = None

    def pass_on(number, frame):
        received.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # in a session of its own: a Ctrl-C at the terminal reaches it once, through us
        process = subprocess.Popen(command, start_new_session=True)
        if received:
            process.send_signal(received[0])
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])
    return code


def row(trial: Trial, state: str) -> list[str]:
    """The table's cells for one run, from its files."""
    facts, events = trial.facts(), trial.events()
    result = (facts or {}).get("result") or {}
    best = result.get("best_dev_accuracy")
    if best is None:
        best = max((e["accuracy"] for e in events if e["event"] == "eval"), default=None)
    switch = [e["step"] for e in events if e["event"] == "transition"]
    seconds = max((e["seconds"] for e in events if e["event"] == "train"), default=None)
    peak = max((e["peak_memory_bytes"] for e in events if e["event"] == "train"), default=None)
    density = trial.density
    if density is None and facts is not None:
        density = facts["config"]["model"]["density"]
    return [
        trial.task,
        trial.pattern,
        "" if density is None else f"{density:g}",
        str(trial.seed),
        _number(result.get("test_accuracy"), ".4f"),
        _number(best, ".4f"),
        str(switch[0]) if switch else "-",
        str(trial.steps()),
        _number(seconds, ".0f"),
        _number(None if peak is None else peak / 2**20, ".0f"),
        state,
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


HEADER = ["task", "pattern", "density", "seed", "test accuracy", "best on dev", "transition"]
HEADER += ["steps", "seconds", "MiB", "state"]


def table(rows: list[list[str]]) -> str:
    """Aligned, with a line of mean and standard deviation over seeds after each setting that has
    several results."""
    lines = []
    for _, group in itertools.groupby(rows, key=lambda cells: cells[:3]):
        members = list(group)
        lines += members
        accuracies = [float(cells[4]) for cells in members if cells[4] != "-"]
        if len(accuracies) > 1:
            spread = f"{statistics.mean(accuracies):.4f} ±{statistics.stdev(accuracies):.4f}"
            empty = [""] * (len(HEADER) - 6)
            lines.append([*members[0][:3], f"{len(accuracies)} seeds", spread, *empty, "mean"])
    widths = [max(len(cells[i]) for cells in [HEADER, *lines]) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in [HEADER, *lines]
    )


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what stands after --."""
    if "--" in argv:
        cut = argv.index("--")
        argv, more = argv[:cut], argv[cut + 1 :]
    else:
        more = []
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="T", help="keys of config.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument(
        "--patterns", nargs="+", default=["learned"], choices=["learned", "random", "band"]
    )
    parser.add_argument(
        "--densities",
        nargs="+",
        type=float,
        metavar="D",
        help="kept blocks / all blocks (default: the task's own)",
    )
    parser.add_argument(
        "--stop_after", type=int, metavar="N", help="cut every run after N steps, to be continued"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="of all runs and of sweep.json"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the commands and the table, train nothing"
    )
    args = parser.parse_args(argv)
    ours = [word for word in more if word.split("=")[0] in OURS]
    if args.densities is not None:
        fields = [word.removeprefix("--set=").partition("=")[0].strip() for word in more]
        ours += ["--set model.density"] * ("model.density" in fields)
    if ours:
        parser.error(f"{ours[0]} is set by the sweep itself and cannot stand after --")
    return args, more


def main(argv: list[str], entry: Path = ENTRY) -> int:
    args, more = parse_arguments(argv)
    trials = [
        Trial(
            ALIASES.get(task, task),
            seed,
            pattern,
            density,
            args.output_dir,
            args.stop_after,
            tuple(more),
        )
        for task in args.tasks
        for pattern in args.patterns
        for density in args.densities or [None]
        for seed in args.seeds
    ]
    trials = list(dict.fromkeys(trials))
    states = dict.fromkeys(trials, "not begun")
    code = 0
    try:
        for trial in trials:
            trial.check_same()
            if trial.done():
                states[trial] = "done"
            elif trial.facts() is not None:
                states[trial] = "interrupted"
        for number, trial in enumerate(trials, 1):
            if states[trial] == "done":
                continue
            resume = ["--resume"] if states[trial] == "interrupted" else []
            command = [sys.executable, str(entry), *trial.arguments(), *resume]
            print(f"[{number}/{len(trials)}] {shlex.join(command)}", flush=True)
            if args.dry_run:
                continue
            states[trial] = "interrupted"
            status = run(command)
            if status in (130, 143):
                raise Interrupted(status - 128)
            if status == 0 and trial.done():
                states[trial] = "done"
            else:
                states[trial] = f"failed (exit code {status})"
                code = 1
    except Interrupted as stop:
        code = 128 + stop.args[0]
        print("interrupted: the same command goes on from here", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row(trial, states[trial]) for trial in trials]
    print(table(rows))
    if not args.dry_run:
        path = args.output_dir / "sweep.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        results = [dict(zip(HEADER, cells, strict=True)) for cells in rows]
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
