"""Evaluations of models whose files do not say what they are, are broken, or out of reach."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import models

ROOT = Path(__file__).resolve().parent.parent
SLIP = f"mat_lst_{tiny.TASK}_module.seq_classifer.mlpblock.2.bias.pickle"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A sparse and a dense run of ours."""
    folders = {}
    for phase, given in (("sparse", ["--max_dense_steps", "5"]), ("dense", ["--sk", "1e6"])):
        folders[phase] = tmp_path_factory.mktemp(phase)
        tiny.write_data(folders[phase] / "data")
        assert tiny.train(folders[phase], *given) == 0
    return folders


def as_published(state_file, target):
    """A checkpoint of ours as the reference writes it: weights alone, no word on its phase."""
    weights = torch.load(state_file)["model_state_dict"]
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in weights.items()}}, target)


@pytest.fixture
def clone(sources, tmp_path):
    """A clone of the original: dense and sparse models of one seed, masks of the run that wrote
    them last, under the published name."""
    tiny.write_data(tmp_path / "data")
    for phase, name in (("dense", "trsfmr"), ("sparse", "learnable"), ("sparse", "mine")):
        source = tiny.checkpoints(sources[phase]) / "sat.model"
        as_published(source, tiny.checkpoints(tmp_path) / f"{name}.model")
    masks = tmp_path / "out/pickle/layer_attn-0"
    masks.mkdir(parents=True)
    own = sources["sparse"] / "out/pickle/layer_attn-0" / f"mat_lst_{tiny.TASK}_sat.pickle"
    shutil.copy(own, masks / SLIP)
    return tmp_path


SHAPE = [x for x in tiny.SETTINGS if "model." in x]


def attention(output):
    return re.search(r"examples: 21, attention: (\w+)", output).group(1)


def test_masks_of_no_name_are_not_taken_for_any_model(clone, capsys):
    assert tiny.infer(clone, "--name", "trsfmr", *SHAPE) == 0
    output = capsys.readouterr().out
    assert attention(output) == "dense"
    # both are possible: the file, and the flag that gives the other result
    path = clone / "out/pickle/layer_attn-0" / SLIP
    assert str(path) in output and "--attention sparse" in output
    assert tiny.infer(clone, "--name", "trsfmr", "--attention", "sparse", *SHAPE) == 0
    output = capsys.readouterr().out
    assert attention(output) == "sparse" and str(path) in output
    assert tiny.infer(clone, "--name", "trsfmr", "--masks", str(path), *SHAPE) == 0
    assert attention(capsys.readouterr().out) == "sparse"


def test_a_learnable_name_speaks_for_the_masks(clone, capsys):
    assert tiny.infer(clone, "--name", "learnable", *SHAPE) == 0
    output = capsys.readouterr().out
    assert attention(output) == "sparse"
    assert SLIP in output and "--attention dense" in output


def test_masks_of_the_very_name_win(clone, capsys):
    masks = clone / "out/pickle/layer_attn-0"
    own = masks / f"mat_lst_{tiny.TASK}_mine.pickle"
    shutil.copy(masks / SLIP, own)
    assert tiny.infer(clone, "--name", "mine", *SHAPE) == 0
    output = capsys.readouterr().out
    assert attention(output) == "sparse"
    assert str(own) in output and "--attention dense" in output


def test_without_any_masks_the_other_possibility_is_said(clone, capsys):
    shutil.rmtree(clone / "out/pickle")
    assert tiny.infer(clone, "--name", "learnable", *SHAPE) == 0
    output = capsys.readouterr().out
    assert attention(output) == "dense" and "--masks" in output


# ---- numbers that broke ------------------------------------------------------------


def test_a_broken_evaluation_is_no_success(tmp_path, capsys):
    """The only step is one too far: its loss is finite, that of the weights after it is not."""
    tiny.write_data(tmp_path / "data")
    given = ["--train_steps", "1", "--set", "training.learning_rate=1e30"]
    assert tiny.train(tmp_path, *given) == 1
    captured = capsys.readouterr()
    assert "is not finite" in captured.err and captured.err.count("\n") == 1, captured.err
    assert "evaluation" in captured.err and "step 1" in captured.err
    assert "best model saved" not in captured.out
    assert not (tiny.checkpoints(tmp_path) / "sat.model").exists()
    logs = tiny.logs(tmp_path)
    texts = [(logs / "sat.run.json").read_text()]
    texts += (logs / "sat.metrics.jsonl").read_text().splitlines()
    for text in texts:
        json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_a_broken_test_is_no_success(sources, tmp_path, capsys):
    shutil.copytree(sources["dense"], tmp_path, dirs_exist_ok=True)
    path = tiny.checkpoints(tmp_path) / "sat.model"
    content = torch.load(path)
    content["model_state_dict"]["seq_classifer.mlpblock.2.bias"].fill_(torch.nan)
    torch.save(content, path)
    assert tiny.infer(tmp_path) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error and error.count("\n") == 1


# ---- evaluation mode ---------------------------------------------------------------


class Noisy(nn.Module):
    """A head with dropout of its own, as people add it."""

    def __init__(self, head):
        super().__init__()
        self.mlpblock = head.mlpblock
        self.drop = nn.Dropout(0.5)

    def forward(self, pooled, pooled_1=None):
        return self.mlpblock(self.drop(pooled))


def test_an_added_dropout_rests_in_evaluation(sources, tmp_path, capsys, monkeypatch):
    shutil.copytree(sources["dense"], tmp_path, dirs_exist_ok=True)
    init = models.SequenceClassifier.__init__

    def noisy(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.seq_classifer = Noisy(self.seq_classifer)

    monkeypatch.setattr(models.SequenceClassifier, "__init__", noisy)
    losses = []
    for _ in range(2):
        assert tiny.infer(tmp_path) == 0
        losses.append(re.search(r"\nLoss: (.*)", capsys.readouterr().out).group(1))
    assert losses[0] == losses[1]


def test_an_added_dropout_works_in_training(tmp_path, monkeypatch):
    """Evaluations give the mode back."""
    tiny.write_data(tmp_path / "data")
    init = models.SequenceClassifier.__init__
    modes = []

    class Spy(Noisy):
        def forward(self, pooled, pooled_1=None):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(pooled, pooled_1)

    def noisy(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.seq_classifer = Spy(self.seq_classifer)

    monkeypatch.setattr(models.SequenceClassifier, "__init__", noisy)
    assert tiny.train(tmp_path, "--train_steps", "12") == 0
    assert set(modes) == {(True, True), (False, False)}


# ---- files out of reach ------------------------------------------------------------


def test_a_legacy_torch_file_is_called_what_it_is(sources, tmp_path, capsys):
    tiny.write_data(tmp_path / "data")
    target = tiny.checkpoints(tmp_path) / "sat.model"
    target.parent.mkdir(parents=True)
    content = torch.load(tiny.checkpoints(sources["dense"]) / "sat.model")
    torch.save(content, target, _use_new_zipfile_serialization=False)
    assert tiny.infer(tmp_path) == 2
    error = capsys.readouterr().err
    assert "not a torch file" not in error and "old format" in error and "torch 1.6" in error


def test_a_model_on_a_read_only_mount_is_evaluated(sources, tmp_path):
    """In a mount namespace of its own, as root is not stopped by permissions."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow mount namespaces")
    shutil.copytree(sources["dense"], tmp_path / "published")
    given = tiny.arguments(tmp_path / "published", mode="eval")
    command = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    entry = [sys.executable, str(ROOT / "main_inference.py"), *given]
    ended = subprocess.run(
        [unshare, "-rm", "sh", "-c", command, "sh", str(tmp_path / "published"), *entry],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Evaluation Results" in ended.stdout
    assert "Read-only" in ended.stdout + ended.stderr  # why there is no log


def test_the_precision_of_the_run_is_that_of_its_evaluation(sources, capsys):
    """Where the default of the machine would be another one, the run's counts and is said."""
    folder = sources["dense"]  # trained with --precision fp32
    common = ["--mode", "eval", "--task", tiny.TASK, "--data_dir", str(folder / "data")]
    import main_inference

    assert main_inference.main([*common, "--output_dir", str(folder / "out")]) == 0
    assert "precision fp32" in capsys.readouterr().out
    given = [*common, "--output_dir", str(folder / "out"), "--precision", "bf16"]
    assert main_inference.main(given) == 0
    output = capsys.readouterr().out
    assert "precision bf16" in output and "fp32" in output
    (tiny.logs(folder) / "eval.sat.log").unlink()
