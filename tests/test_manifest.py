"""The manifest beside the pickles: one consistent set or a refusal, whatever happens."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from preparing import error_of, run
from tqdm import tqdm

from preprocess.tasks import planted
from training.data import manifest
from training.data.dataset import open_dataset
from training.errors import UserError
from training.recording import files

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "dev", "test")


COUNTS = {"train": 40, "dev": 20, "test": 20}


def generate(job):
    """Examples whose first id is the seed."""
    for split in job.splits:
        for i in range(COUNTS[split]):
            ids = np.full(16, i, np.int32)
            ids[:2] = job.options.seed, SPLITS.index(split)
            yield split, "", ids, i % 4


TASK = dataclasses.replace(
    planted.TASK,
    name="toy",
    length=16,
    counts=COUNTS,
    generate=generate,
)
WITHOUT_DEV = dataclasses.replace(  # dev is test's file
    TASK, splits=("train", "test"), counts={"train": 40, "test": 20}
)


def make(folder, seed: int, *options, task=TASK) -> int:
    return run(task, "--output_dir", folder, "--seed", seed, *options, whole=True)


def seeds_of(folder, cache_dir) -> list[int]:
    """The seed that each pickle was made with, as training opens them."""
    seeds = []
    for split in SPLITS:
        data = open_dataset(
            Path(folder) / f"toy.{split}.pickle",
            vocab_size=100,
            length=16,
            num_classes=4,
            num_inputs=1,
            cache_dir=cache_dir,
            notify=lambda text: None,
        )
        seeds += set(data.batch(np.arange(data.size))[0][:, 0].tolist())
    return seeds


@pytest.fixture
def folder(tmp_path, capsys):
    assert make(tmp_path / "data", 1) == 0
    capsys.readouterr()
    return tmp_path / "data"


def test_what_it_says(folder):
    facts = json.loads((folder / "toy.json").read_text())
    assert facts["seed"] == 1 and facts["about"] == ["generated"] and facts["trial"] == ""
    assert facts["labels"]["train"] == dict.fromkeys("0123", 10)
    assert facts["versions"]["numpy"] == np.__version__
    assert manifest.describe(folder, "toy") == ["data of toy: 40 / 20 / 20 examples, generated"]


def run_in_child(folder, seed: int, task) -> tuple[int, int]:
    """Number of a process that makes a set, and a pipe that gets a byte at each rename in it."""
    reading, writing = os.pipe()
    child, real = os.fork(), os.replace

    def told(old, new):
        real(old, new)
        os.write(writing, b".")
        time.sleep(0.003)

    if child == 0:
        tqdm.set_lock(threading.RLock())  # its own is shared: a killed child would keep it
        os.replace = told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(make(folder, seed, task=task))
    os.close(writing)
    return child, reading


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("rounds", [24, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", [TASK, WITHOUT_DEV], ids=["own dev", "dev is test"])
def test_a_run_killed_at_any_moment_leaves_one_set_or_a_refusal(folder, tmp_path, task, rounds):
    """kill -9 of a run that replaces an older set, files of the same sizes: at random times of
    its life, and as often a random time after one of its renames."""
    rng, outcomes = random.Random(0), {"old": 0, "new": 0, "refused": 0}
    child, reading = run_in_child(folder, 2, task)
    began = time.monotonic()
    renames = 0
    while os.read(reading, 1):
        renames += 1
    os.close(reading)
    os.waitpid(child, 0)
    life = time.monotonic() - began
    assert renames == 5  # the marker, three pickles, the manifest
    for number in range(rounds):
        seed = 3 + number % 90
        child, reading = run_in_child(folder, seed, task)
        if number % 2:
            os.read(reading, 1)
            for _ in range(rng.randrange(renames)):
                os.read(reading, 1)
            time.sleep(rng.random() * 0.003)
        else:
            time.sleep(rng.random() * life)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        try:
            seeds = seeds_of(folder, tmp_path / "cache")
            outcomes["new" if seeds[0] == seed else "old"] += 1
            assert len(set(seeds)) == 1, seeds
        except UserError as refusal:
            outcomes["refused"] += 1
            assert "belong together" in str(refusal)
    print(outcomes)  # of 200 some 10, 50 and 140
    assert min(outcomes["old"] + outcomes["new"], outcomes["refused"]) >= rounds // 12, outcomes
    assert make(folder, 99, task=task) == 0 and seeds_of(folder, tmp_path / "cache") == [99] * 3


def other_set(folder, tmp_path) -> Path:
    """A set of the same sizes."""
    assert make(tmp_path / "other", 2) == 0
    return tmp_path / "other"


@pytest.mark.parametrize("cached", [True, False, "nowhere"])
def test_a_pickle_of_another_set_with_the_same_size(folder, tmp_path, cached):
    """Also where the cache of the other pickle is there already, or none can be written."""
    other, cache = other_set(folder, tmp_path), tmp_path / "cache"
    if cached == "nowhere":
        cache.write_text("a file")
    else:
        assert seeds_of(folder, cache) == [1, 1, 1]
    shutil.copy(other / "toy.dev.pickle", folder / "toy.dev.pickle")
    for _ in range(2):
        with pytest.raises(UserError, match=r"toy.dev.pickle is not of the set that toy.json"):
            seeds_of(folder, cache)
    (folder / "toy.json").unlink()  # as the sentence says
    assert seeds_of(folder, cache) == [1, 2, 1]


def test_a_pickle_of_another_size(folder, tmp_path):
    shutil.copy(folder / "toy.train.pickle", folder / "toy.dev.pickle")
    with pytest.raises(UserError, match=r"toy.dev.pickle is not of the set that toy.json"):
        seeds_of(folder, tmp_path / "cache")


def test_training_tells_its_data_and_refuses_a_mixture(tmp_path):
    """Through the command: a trial is named; the training examples as dev are refused."""
    data = tmp_path / "lra"
    assert run(planted.TASK, "--limit", 40, "--output_dir", data, whole=True) == 0
    command = [sys.executable, ROOT / "main_learnable_skewness.py", "--mode", "train"]
    command += ["--task", "planted", "--data_dir", data, "--output_dir", tmp_path / "out"]
    command = [*map(str, command), "--device", "cpu", "--train_steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "data of planted: 40 / 40 / 40 examples, generated" in done.stdout
    assert "this is a trial set, not the whole data of planted: --limit 40" in done.stdout
    shutil.copy(data / "planted.train.pickle", data / "planted.dev.pickle")
    command += ["--name", "second"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "planted.dev.pickle is not of the set that planted.json describes" in done.stderr


def test_a_manifest_of_other_files_is_stale_and_ignored(folder, tmp_path):
    """The original's pickles copied over ours."""
    for split in SPLITS:
        path = folder / f"toy.{split}.pickle"
        path.write_bytes(path.read_bytes()[:-1] + b"N0.")  # None, POP, STOP: two bytes longer
    assert seeds_of(folder, tmp_path / "cache") == [1, 1, 1]
    assert "is stale, it describes other pickles: ignored" in manifest.describe(folder, "toy")[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "[" * 100_000])
def test_a_damaged_manifest_is_one_sentence(folder, tmp_path, text):
    (folder / "toy.json").write_text(text)
    with pytest.raises(UserError, match="is no manifest of a data set"):
        seeds_of(folder, tmp_path / "cache")


def test_pickles_without_a_manifest_load(folder, tmp_path):
    (folder / "toy.json").unlink()
    assert seeds_of(folder, tmp_path / "cache") == [1, 1, 1]
    assert manifest.describe(folder, "toy") == []


def test_a_folder_that_cannot_be_synced_gets_a_notice(tmp_path, monkeypatch, capsys):
    def fsync(number, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "_said", set())
    assert make(tmp_path / "data", 3) == 0
    assert "cannot flush: a power cut may lose" in capsys.readouterr().err
    assert seeds_of(tmp_path / "data", tmp_path / "cache") == [3, 3, 3]


# ---- trials -------------------------------------------------------------------------------------


def test_a_trial_says_so_and_never_replaces_a_whole_set_unasked(folder, tmp_path, capsys):
    trial = ("--limit", 8)
    assert make(folder, 2, *trial) == 2
    assert "holds the whole set of toy, this is a trial (--limit 8)" in error_of(capsys)
    assert seeds_of(folder, tmp_path / "cache") == [1, 1, 1]
    assert make(tmp_path / "trial", 2, *trial) == 0
    assert make(tmp_path / "trial", 3, *trial) == 0, "a trial may replace a trial"
    assert "this is a trial set" in manifest.describe(tmp_path / "trial", "toy")[1]
    assert make(folder, 4, *trial, "--force") == 0 and make(folder, 5) == 0
    (folder / "toy.json").unlink()  # the original's, perhaps
    assert make(folder, 2, *trial) == 2
