"""Makes the runs of docs/results/plan.md and keeps what their tables need.

python experiments/evidence.py planted image listops when paper --output_dir runs/evidence

Each study trains one dense prefix a seed, keeps its checkpoint at the steps where arms begin, and
forks every arm from there. The same command again continues where it stopped. What is kept of a
run goes to --keep (docs/results): its metrics, training steps thinned to every tenth, compressed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sparsity.observe import best_mass, kept_mass
from sparsity.patterns import largest

ROOT = Path(__file__).resolve().parents[1]
AFTER = ("--transition_when", "after", "--max_dense_steps")
MASS = ("--pattern", "mass")
ROWS = ("--pattern", "mass_rows")


@dataclass(frozen=True)
class Arm:
    """A run forked from the dense prefix after `at` steps, or after as many as the arm `when`
    took to switch; at 0 it starts by itself."""

    name: str
    options: tuple[str, ...]
    at: int = 0
    seeds: tuple[int, ...] | None = None  # None: all of the study
    when: str | None = None


@dataclass(frozen=True)
class Study:
    """One question of the plan."""

    task: str
    seeds: tuple[int, ...]
    steps: int
    arms: tuple[Arm, ...]
    options: tuple[str, ...] = ()
    prefix: tuple[int, ...] = ()  # steps at which the dense prefix is kept
    data: tuple[str, ...] = ()  # create command of its own data, one set a seed
    blocks: int = 32


def _arms(patterns: str, at: int, seeds: tuple[int, ...] | None = None) -> tuple[Arm, ...]:
    return tuple(
        Arm(f"{name}-{at}" if at else name, ("--pattern", name), at, seeds)
        for name in patterns.split()
    )


def _given(mask: str) -> tuple[str, ...]:
    return ("--pattern", "given", "--masks", mask)


PLANTED = ("preprocess/create_planted.py",)
SIX = (0, 1, 2, 3, 4, 5)
STUDIES = {
    "planted": Study(
        task="planted",
        seeds=(0, 1, 2, 3, 4),
        steps=600,
        prefix=(50, 100, 150, 200, 250, 300, 400),
        arms=(
            *_arms("mass mass_rows learned untrained random random_rows band", 150),
            Arm("planted-150", _given("{data}/planted.blocks.npy"), 150),
            *_arms("mass mass_rows learned random all", 200),
            Arm("outside-150", _given("{out}/outside-{seed}.npy"), 150),
            Arm("diagonal-150", _given("{out}/diagonal.npy"), 150),
            Arm("own-0", (*_given("{out}/diagonal.npy"), *AFTER, "0"), seeds=(0, 1, 2)),
        ),
        data=PLANTED,
    ),
    "image": Study(
        task="lra-image",
        seeds=tuple(range(12)),
        steps=1500,
        prefix=(200,),
        arms=(
            *_arms("learned untrained random random_rows mass_rows band", 200),
            *_arms("all", 200, SIX),
            Arm("one-200", _given("{out}/one.npy"), 200, SIX),
            # not of the plan: is it only that 200 steps are too few?
            Arm("mass_rows-waited", (*ROWS, "--transition_when", "concentrated"), 200, SIX[:3]),
            *(
                Arm(f"{name}-waited", ("--pattern", name), 0, SIX[:3], "mass_rows-waited")
                for name in ("random_rows", "band")
            ),
        ),
        options=(
            *("--batch_size", "64", "--set", "training.eval_frequency=100"),
            *("--set", "training.num_eval_steps=100"),  # all development pictures
        ),
    ),
    "listops": Study(
        task="lra-listops",
        seeds=(0, 1, 2),
        steps=1500,
        prefix=(200,),
        arms=_arms("learned random band mass_rows random_rows", 200),
        options=(
            *("--batch_size", "32", "--set", "model.max_seq_len=512"),
            *("--set", "model.block_size=16", "--set", "training.eval_frequency=100"),
        ),
        data=(
            *("preprocess/create_listops.py", "--min_length", "100", "--max_length", "450"),
            *("--padded_length", "512"),
        ),
    ),
    "when": Study(
        task="planted",
        seeds=(0, 1, 2),
        steps=600,
        arms=(
            Arm("settled", MASS),
            Arm("concentrated", (*MASS, "--transition_when", "concentrated")),
            *(Arm(f"after-{n}", (*MASS, *AFTER, str(n))) for n in (50, 150, 400)),
            Arm("reselect", (*MASS, *AFTER, "150", "--reselect_every", "100")),
        ),
        data=PLANTED,
    ),
    "paper": Study(
        task="lra-image",
        seeds=(0,),
        steps=2000,
        arms=(Arm("sat", ("--probe_every", "100")),),
    ),
}


class Runs:
    """The files of one study's runs below one folder."""

    def __init__(
        self, name: str, folder: Path, data_dir: Path, keep: Path, only: argparse.Namespace
    ) -> None:
        self.name, self.study = name, STUDIES[name]
        self.folder = folder / name
        self.data_dir = data_dir
        self.keep = keep / name
        self.seeds = [s for s in self.study.seeds if only.seeds is None or s in only.seeds]
        self.arms = [a for a in self.study.arms if only.arms is None or a.name in only.arms]

    def data(self, seed: int) -> Path:
        """The folder with the pickles of a seed, made if the study has its own."""
        if not self.study.data:
            return self.data_dir
        # one set a seed serves all studies of the same task
        folder = self.folder.parent / f"data-{self.study.task}-{seed}"
        if not (folder / f"{self.study.task}.test.pickle").exists():
            command = [sys.executable, *self.study.data, "--seed", str(seed)]
            call([*command, "--output_dir", str(folder)])
        return folder

    def metrics(self, seed: int, name: str) -> Path:
        logs = self.folder / "logs" / f"log-{seed}" / self.study.task
        return logs / f"{name}.metrics.jsonl"

    def last(self, seed: int, name: str) -> Path:
        folder = self.folder / "checkpoints" / f"checkpoints-{seed}" / self.study.task
        return folder / f"{name}.last.model"

    def prefix(self, seed: int, at: int) -> Path:
        return self.folder / f"prefix-{seed}-{at}.model"

    def events(self, seed: int, name: str) -> list[dict]:
        path = self.metrics(seed, name)
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def steps(self, seed: int, name: str) -> int:
        return max(
            (e["step"] for e in self.events(seed, name) if e["event"] == "train"), default=0
        )

    def switch(self, seed: int, name: str) -> int:
        """Dense steps of a run."""
        return next(e["step"] for e in self.events(seed, name) if e["event"] == "transition")

    def keep_prefix(self, seed: int, at: int) -> None:
        """Keeps the dense run's checkpoint after `at` steps, later ones after earlier ones."""
        if not self.prefix(seed, at).exists():
            self.train(seed, "dense", at, [*AFTER, "1000000"])
            shutil.copyfile(self.last(seed, "dense"), self.prefix(seed, at))

    def train(self, seed: int, name: str, until: int, options: list[str]) -> None:
        """Trains a run up to `until` steps, from where it is."""
        if self.steps(seed, name) >= until:
            return
        words = ["main_learnable_skewness.py", "--mode", "train", "--task", self.study.task]
        words += ["--random", str(seed), "--name", name, "--data_dir", str(self.data(seed))]
        words += ["--output_dir", str(self.folder), "--stop_after", str(until)]
        words += [*self.study.options, *options]
        if self.last(seed, name).exists():
            words += ["--resume"]
        call([sys.executable, *words])

    def run(self) -> None:
        study = self.study
        self.folder.mkdir(parents=True, exist_ok=True)
        masks = {"diagonal": np.eye(study.blocks, dtype=bool)}
        masks["one"] = np.zeros_like(masks["diagonal"])
        masks["one"][0, 0] = True
        for name, mask in masks.items():
            np.save(self.folder / f"{name}.npy", mask)
        for seed in self.seeds:
            for at in study.prefix:
                self.keep_prefix(seed, at)
            if study.prefix:
                self.keep_metrics(seed, "dense")
            if study.task == "planted" and study.prefix:
                self.keep_recall(seed)
                planted = np.load(self.data(seed) / "planted.blocks.npy")
                others = np.random.default_rng(seed).permutation(np.flatnonzero(~planted))
                outside = np.zeros_like(planted)
                outside.flat[others[: planted.sum()]] = True
                np.save(self.folder / f"outside-{seed}.npy", outside)
            for arm in self.arms:
                if arm.seeds is not None and seed not in arm.seeds:
                    continue
                fields = {"data": self.data(seed), "out": self.folder, "seed": seed}
                options = [o.format(**fields) for o in arm.options]
                if at := self.switch(seed, arm.when) if arm.when else arm.at:
                    if "--transition_when" not in options:
                        options += [*AFTER, str(at)]
                    if not self.last(seed, arm.name).exists():
                        self.keep_prefix(seed, at)
                        options += ["--fork", str(self.prefix(seed, at))]
                self.train(seed, arm.name, study.steps, options)
                self.keep_metrics(seed, arm.name)

    def keep_metrics(self, seed: int, name: str) -> None:
        """Everything but nine of ten training steps, in one compressed file."""
        kept = [
            event
            for event in self.events(seed, name)
            if event["event"] != "train" or event["step"] % 10 == 0
        ]
        text = "".join(json.dumps(event) + "\n" for event in kept)
        self.keep.mkdir(parents=True, exist_ok=True)
        path = self.keep / f"{name}.{seed}.metrics.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

    def keep_recall(self, seed: int) -> None:
        """Of the planted pairs: how many `mass` and `learned` would choose along the prefix."""
        planted = torch.from_numpy(np.load(self.data(seed) / "planted.blocks.npy"))
        count = int(planted.sum())
        rows = []
        for at in self.study.prefix:
            state = torch.load(self.prefix(seed, at), weights_only=True)
            pooled = torch.stack(list(state["training"]["observer"]["pooled"])).double().mean(0)
            weights = state["model_state_dict"]
            patterns = [v.double() for k, v in weights.items() if k.endswith("mha.pattern")]
            scores = torch.stack([p @ p.T for p in patterns])
            row = {"event": "recall", "step": at, "best_mass": best_mass(pooled, count).tolist()}
            row["planted_mass"] = kept_mass(pooled, planted.expand(pooled.shape)).tolist()
            for name, values in (("mass", pooled), ("learned", scores)):
                found = (largest(values, count) & planted).sum((1, 2)) / count
                row[name] = found.tolist()
            rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = self.keep / f"recall.{seed}.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))


def call(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--keep", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data" / "lra_processed")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these (default: the plan's)")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these (default: all)")
    args = parser.parse_args(argv)
    try:
        for name in args.studies:
            folder, data, keep = (
                path.resolve() for path in (args.output_dir, args.data_dir, args.keep)
            )
            Runs(name, folder, data, keep, args).run()
    except subprocess.CalledProcessError as error:
        print(f"error: exit code {error.returncode}; the same command goes on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
