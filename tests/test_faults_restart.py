"""What a restart meets: files of others, another pickle, a command typed somewhere else."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def contents(folder):
    """Every file below `folder` with its bytes' hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(code, capsys, *words):
    """Exit code 2, one sentence on stderr with all the words."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error
    return error


# ---- what an earlier run left ------------------------------------------------------


def published(folder, masks=True):
    """What a clone of the original holds: a model, its masks, its curves, no checkpoint to
    resume."""
    other = folder / "elsewhere"
    tiny.write_data(other / "data")
    assert tiny.train(other, "--max_dense_steps", "3", "--train_steps", "4") == 0
    tiny.checkpoints(folder).mkdir(parents=True)
    shutil.copy(tiny.checkpoints(other) / "sat.model", tiny.checkpoints(folder))
    curves = tiny.logs(folder) / "sat.tensorboard"
    curves.mkdir(parents=True)
    for number in range(3):
        (curves / f"events.out.tfevents.{number}.host").write_bytes(b"curves of another run")
    if masks:
        source = other / "out/pickle/layer_attn-0" / f"mat_lst_{tiny.TASK}_sat.pickle"
        target = folder / "out/pickle/layer_attn-0"
        target.mkdir(parents=True)
        shutil.copy(source, target)
    shutil.rmtree(other)
    return folder / "out"


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["new", "resume"])
def test_a_model_without_a_checkpoint_is_left_alone(fresh, capsys, more):
    out = published(fresh)
    before = contents(out)
    capsys.readouterr()
    error = refused(tiny.train(fresh, *more), capsys, "sat.model", "another --name")
    # no advice that does not work
    assert "adding --resume" not in error
    assert contents(out) == before


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["new", "resume"])
@pytest.mark.parametrize("left", ["masks", "curves", "metrics"])
def test_other_things_of_an_earlier_run_are_left_alone(fresh, capsys, left, more):
    if left == "metrics":  # of a finished run whose checkpoints were deleted to save space
        assert tiny.train(fresh, "--max_dense_steps", "3") == 0
        shutil.rmtree(fresh / "out/checkpoints")
        shutil.rmtree(fresh / "out/pickle")
        out = fresh / "out"
    else:
        out = published(fresh)
        shutil.rmtree(out / "checkpoints")
        shutil.rmtree(out / ("logs" if left == "masks" else "pickle"))
    before = contents(out)
    capsys.readouterr()
    refused(tiny.train(fresh, *more), capsys, "another --name")
    assert contents(out) == before


def test_a_run_killed_at_its_start_can_be_resumed(fresh, capsys):
    """Its first checkpoint is there before its first step, so the advice works."""
    given = ["--train_steps", "30", "--batch_size", "8", *tiny.SETTINGS]
    code = (
        "import os, sys\n"
        "import main_learnable_skewness as entry\n"
        "from models import SequenceClassifier\n"
        "SequenceClassifier.forward = lambda *_, **__: os._exit(9)\n"
        "entry.main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, *tiny.arguments(fresh, *given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == 9, killed.stderr
    error = refused(tiny.train(fresh), capsys, "--resume")
    assert "sat.last.model" in error
    assert tiny.train(fresh, "--resume") == 0
    assert "resumed at step 0" in capsys.readouterr().out


def test_weights_are_whole_after_all_of_it(fresh):
    """The guard of this file's helpers: a published model is one that can be evaluated."""
    out = published(fresh)
    state = torch.load(out / "checkpoints/checkpoints-0" / tiny.TASK / "sat.model")
    assert state["phase"] == "sparse"
