"""Processes of one job that do not start from the same: refused by all, in the same sentence."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent


def two(arguments, script="main_learnable_skewness.py"):
    """Exit codes, stderr and seconds from the meeting on of two processes, each with its own
    arguments; not by torchrun, which would end the second when the first fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    jobs = [
        subprocess.Popen(
            [sys.executable, script, *given],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, given in enumerate(arguments)
    ]
    ends = []
    errors = []
    try:
        for job in jobs:
            errors.append(job.communicate(timeout=120)[1])
            ends.append(time.monotonic())
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], errors, abs(ends[1] - ends[0])


def refused_by_both(found, *words):
    codes, errors, apart = found
    assert codes == [2, 2], errors
    sentences = [
        [line for line in error.splitlines() if line.startswith("error: ")] for error in errors
    ]
    assert sentences[0] == sentences[1] and len(sentences[0]) == 1, errors
    assert apart < 10 and "Traceback" not in "".join(errors), errors
    for word in words:
        assert word in sentences[0][0], errors


@pytest.fixture
def places(tmp_path):
    """Two machines that do not share their files."""
    for name in "ab":
        tiny.write_data(tmp_path / name / "data")
    return tmp_path / "a", tmp_path / "b"


def given(folder, *more):
    return tiny.arguments(folder, "--train_steps", "8", "--batch_size", "8", *tiny.SETTINGS, *more)


def files(folder):
    out = folder / "out"
    return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_another_pickle(places):
    def changed(split, items):
        return [{**item, "label": np.int32((item["label"] + 1) % 10)} for item in items]

    tiny.write_data(places[1] / "data", change=changed)
    refused_by_both(two([given(p) for p in places]), f"{tiny.TASK}.train.pickle", "process 1")
    assert not (places[0] / "out").exists() and not (places[1] / "out").exists()


def test_a_missing_checkpoint(places):
    assert tiny.train(places[0], "--train_steps", "8", "--stop_after", "3") == 0
    before = files(places[0])
    refused_by_both(two([given(p, "--resume") for p in places]), "another step", "process 1")
    assert files(places[0]) == before and not (places[1] / "out").exists()


def test_other_weights(places):
    import torch

    assert tiny.train(places[0], "--train_steps", "8", "--stop_after", "3") == 0
    shutil.copytree(places[0] / "out", places[1] / "out")
    for path in tiny.checkpoints(places[1]).iterdir():
        content = torch.load(path)
        content["model_state_dict"]["seq_classifer.mlpblock.2.bias"] += 1e-3
        torch.save(content, path)
    refused_by_both(two([given(p, "--resume") for p in places]), "another set of weights")


def test_other_arguments(places):
    arguments = [given(places[0]), given(places[1], "--sk", "1.5")]
    refused_by_both(two(arguments), "another configuration")


def test_a_mistake_that_one_process_finds_is_that_of_all(places):
    shutil.rmtree(places[1] / "data")
    refused_by_both(two([given(p) for p in places]), f"{tiny.TASK}.train.pickle", "there is no")
    assert not (places[0] / "out").exists()


def test_a_batch_smaller_than_the_number_of_processes(places):
    more = ["--batch_size", "1", "--set", "training.statistics_groups=1"]
    refused_by_both(two([given(places[0], *more)] * 2), "batch_size 1", "2 processes")
    assert not (places[0] / "out").exists()


def test_evaluation_of_another_model(places):
    for seed, place in enumerate(places):
        assert tiny.train(place, "--train_steps", str(4 + seed)) == 0
    arguments = [tiny.arguments(place, mode="eval") for place in places]
    refused_by_both(two(arguments, "main_inference.py"), "another set of weights")
