"""What a restart meets: files of others, another pickle, a command typed somewhere else."""

import copy
import hashlib
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_a_checkpoint_of_an_older_version_is_refused(fresh, capsys):
    """It lacks something that a resume reads, whatever it is."""
    assert tiny.train(fresh, "--stop_after", "5") == 0
    path = tiny.checkpoints(fresh) / "sat.last.model"
    whole = torch.load(path)
    parts = [(key,) for key in whole["training"]]
    parts += [("observer", key) for key in whole["training"]["observer"]]
    for part in parts:
        content = copy.deepcopy(whole)
        inner = content["training"]
        for key in part[:-1]:
            inner = inner[key]
        del inner[part[-1]]
        torch.save(content, path)
        before = contents(fresh / "out")
        capsys.readouterr()
        if part[-1] == "examples_seen":  # for people
            continue
        for more in (["--resume"], ["--fork", str(path), "--name", "fork"]):
            refused(tiny.train(fresh, *more), capsys, "older version", "sat.last.model")
        assert contents(fresh / "out") == before
    torch.save(whole, path)
    assert tiny.train(fresh, "--resume", "--stop_after", "6") == 0


# ---- another pickle ----------------------------------------------------------------


def other_labels(split, items):
    return [{**item, "label": np.int32((item["label"] + 1) % 10)} for item in items]


def test_another_pickle_is_refused_on_resume(fresh, capsys):
    assert tiny.train(fresh, "--stop_after", "5") == 0
    before = contents(fresh / "out")
    kept = fresh / "kept"
    shutil.move(fresh / "data", kept)
    tiny.write_data(fresh / "data", change=other_labels)  # as many examples of the same shape
    capsys.readouterr()
    refused(tiny.train(fresh, "--resume"), capsys, f"{tiny.TASK}.train.pickle", "--other_data")
    assert contents(fresh / "out") == before
    # a test set alone is noticed too
    shutil.rmtree(fresh / "data")
    shutil.copytree(kept, fresh / "data")
    shutil.rmtree(fresh / "data" / f"{tiny.TASK}.test.pickle.cache", ignore_errors=True)
    path = fresh / "data" / f"{tiny.TASK}.test.pickle"
    path.write_bytes(pickle.dumps(other_labels("test", pickle.loads(path.read_bytes()))))
    refused(tiny.train(fresh, "--resume"), capsys, f"{tiny.TASK}.test.pickle")
    assert tiny.train(fresh, "--resume", "--other_data") == 0
    assert f"{tiny.TASK}.test.pickle" in capsys.readouterr().out
    # accepted once, it is the run's data
    assert tiny.train(fresh, "--resume") == 0


def test_the_same_data_written_again_is_accepted(fresh, capsys):
    assert tiny.train(fresh, "--stop_after", "5") == 0
    shutil.rmtree(fresh / "data")
    tiny.write_data(fresh / "data")
    assert tiny.train(fresh, "--resume") == 0
    assert "other_data" not in capsys.readouterr().out


# ---- printed commands --------------------------------------------------------------


def printed(output):
    return re.search(r"go on with: (.*)", output).group(1)


def shell(command, cwd, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, **more
    )


def test_the_printed_command_runs_as_printed(tmp_path):
    """From another folder, with a quote and a space in the paths."""
    home = tmp_path / "o'clock and more"
    tiny.write_data(home / "data")
    given = ["--train_steps", "8", "--batch_size", "8", *tiny.SETTINGS, "--stop_after", "4"]
    words = tiny.arguments(Path("."), *given)
    entry = os.path.relpath(ROOT / "main_learnable_skewness.py", home)
    first = shell(shlex.join([sys.executable, entry, *words]), home)
    assert first.returncode == 0, first.stderr
    again = shell(printed(first.stdout), home)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 4" in again.stdout and "Evaluation Results" in again.stdout
    # the other commands that it prints: whatever they do, the shell splits them as meant
    curves = re.search(r"curves: (.*)", again.stdout).group(1)
    folder = Path(shlex.split(curves)[-1])
    assert (home / folder).is_dir() and list((home / folder).glob("events.*"))


def test_the_printed_command_runs_as_printed_under_torchrun(tmp_path):
    tiny.write_data(tmp_path / "data")
    given = ["--train_steps", "8", "--batch_size", "8", *tiny.SETTINGS, "--stop_after", "4"]
    launcher = [sys.executable, *("-m", "torch.distributed.run", "--standalone")]
    words = [*launcher, "--nproc_per_node=2", str(ROOT / "main_learnable_skewness.py")]
    first = shell(shlex.join([*words, *tiny.arguments(tmp_path, *given)]), tmp_path)
    assert first.returncode == 0, first.stderr
    again = shell(printed(first.stdout), tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 4" in again.stdout and "processes was 2" not in again.stdout


def test_the_command_that_makes_the_data_runs_from_anywhere(tmp_path):
    entry = ROOT / "main_learnable_skewness.py"
    out = tmp_path / "in a folder"
    out.mkdir()
    given = [sys.executable, str(entry), "--task", "lra-listops", "--data_dir", "my data"]
    missing = subprocess.run(given, cwd=out, capture_output=True, text=True)
    assert missing.returncode == 2
    command = missing.stderr.split("make it with: ")[1].strip()
    script = next(word for word in shlex.split(command) if word.endswith(".py"))
    assert (out / script).is_file()
    made = shell(f"{command} --limit 20", out)
    assert made.returncode == 0, made.stderr
    # where the training looks for it
    assert (out / "my data/lra-listops.train.pickle").is_file()


def test_weights_are_whole_after_all_of_it(fresh):
    """The guard of this file's helpers: a published model is one that can be evaluated."""
    out = published(fresh)
    state = torch.load(out / "checkpoints/checkpoints-0" / tiny.TASK / "sat.model")
    assert state["phase"] == "sparse"
