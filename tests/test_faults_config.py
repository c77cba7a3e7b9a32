"""Configurations of the original as they are, and values that some part of the way cannot take."""

import copy
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny

import config
import main_inference
import main_learnable_skewness

ROOT = Path(__file__).resolve().parent.parent
# the original decides these by the task's name
PADDED = ("lra-listops", "lra-text", "lra-retrieval", "lra-news1", "lra-yelp1")
PLAIN = ("lra-image", "lra-nature", "lra-pathfinder32-curv_contour_length_14")


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def refused(code, capsys, *words):
    """Exit code 2, one sentence on stderr with all the words."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


# ---- the original's dicts ----------------------------------------------------------


def verbatim(task):
    """A task's dict with the original's fields only."""
    dictionary = copy.deepcopy(config.Config[task])
    del dictionary["model"]["key_padding"], dictionary["model"]["num_inputs"]
    del dictionary["dataset"]["create"]
    return dictionary


def original_config(monkeypatch, more=None):
    """The whole file of the original in the place of ours: it exports `Config` and no more."""
    module = types.ModuleType("config")
    module.Config = {task: verbatim(task) for task in config.Config} | (more or {})
    monkeypatch.setitem(sys.modules, "config", module)
    return module


SMALL = [
    *("--train_steps", "1", "--batch_size", "4", "--set=model.max_seq_len=64"),
    *("--set=model.block_size=16", "--set=model.density=0.3", "--set=model.num_layers=1"),
]


@pytest.mark.parametrize("task", PADDED + PLAIN)
def test_the_originals_dict_means_what_it_meant_there(tmp_path, capsys, monkeypatch, task):
    original_config(monkeypatch)
    monkeypatch.setattr("training.optim.PhaseOptimizer.advance", lambda self: None)
    arguments = ["--task", task, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    models = []
    import models as package

    init = package.SequenceClassifier.__init__

    def noted(self, model_config, *rest, **keywords):
        models.append(model_config)
        init(self, model_config, *rest, **keywords)

    monkeypatch.setattr(package.SequenceClassifier, "__init__", noted)
    assert main_learnable_skewness.main([*arguments, *SMALL, "--dry_run"]) == 0
    (model,) = models
    assert model.key_padding == (task in PADDED)
    assert model.num_inputs == (2 if task == "lra-retrieval" else 1)
    assert "key_padding" in capsys.readouterr().out  # said


def test_it_is_said_once_in_the_log_of_a_run(fresh, capsys, monkeypatch):
    original_config(monkeypatch)
    assert tiny.train(fresh, "--train_steps", "2") == 0
    assert capsys.readouterr().out.count("key_padding") == 1
    facts = json.loads((tiny.logs(fresh) / "sat.run.json").read_text())
    assert facts["config"]["model"]["key_padding"] is True


def test_a_dict_of_a_new_name_has_to_say_it(tmp_path, capsys, monkeypatch):
    original_config(monkeypatch, {"my-task": verbatim("lra-listops")})
    given = ["--task", "my-task", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    refused(main_learnable_skewness.main(given), capsys, "model.key_padding", "my-task")
    more = ["--set", "model.key_padding=true"]
    refused(main_learnable_skewness.main(given + more), capsys, "model.num_inputs")


def test_the_originals_slip_is_read_as_meant(tmp_path, capsys, monkeypatch):
    dictionary = verbatim("lra-nature")
    dictionary["training"]["distnace"] = dictionary["training"].pop("distance")
    original_config(monkeypatch, {"lra-nature": dictionary})
    given = ["--task", "lra-nature", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    assert main_learnable_skewness.main([*given, *SMALL, "--dry_run"]) == 0
    assert "distnace" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", [{"train": 9, "dev": 9, "test": 9}, {}, None])
def test_a_missing_pickle_is_a_sentence_with_the_originals_dict(
    tmp_path, capsys, monkeypatch, dataset
):
    dictionary = verbatim("lra-listops")
    dictionary["dataset"] = dataset
    if dataset is None:
        del dictionary["dataset"]
    original_config(monkeypatch, {"lra-listops": dictionary})
    given = ["--task", "lra-listops", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    refused(
        main_learnable_skewness.main(given),
        capsys,
        f"{tmp_path}/lra-listops.train.pickle",
        "create_listops.py",
    )


@pytest.mark.parametrize("section", ["model", "training"])
def test_a_dict_without_a_section_is_a_sentence(tmp_path, capsys, monkeypatch, section):
    dictionary = verbatim("lra-listops")
    del dictionary[section]
    original_config(monkeypatch, {"lra-listops": dictionary})
    given = ["--task", "lra-listops", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    refused(main_learnable_skewness.main(given), capsys, section, "lra-listops")


def test_evaluation_takes_the_originals_dict_too(fresh, capsys, monkeypatch):
    """Of a model of the original, which has no configuration of its own."""
    import torch

    assert tiny.train(fresh, "--train_steps", "2") == 0
    path = tiny.checkpoints(fresh) / "sat.model"
    weights = torch.load(path)["model_state_dict"]
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    capsys.readouterr()
    shape = [x for x in tiny.SETTINGS if "model." in x]
    results = []
    for _ in range(2):
        assert tiny.infer(fresh, *shape) == 0
        results.append(capsys.readouterr().out.split("Evaluation Results")[1])
        original_config(monkeypatch)
    assert results[0] == results[1]


# ---- values beyond a limit ---------------------------------------------------------


def has_cpu_kernels():
    import kernels

    return kernels.available_backends()["cpu"] is True


BEYOND = {
    "block size": (["--backend", "cpu", "--set", "model.block_size=8"], ["block_size 8", "16"]),
    "head_dim": (["--backend", "cpu", "--set", "model.head_dim=256"], ["head_dim 256", "128"]),
    "dropout": (["--set", "model.dropout_prob=0.99999999"], ["model.dropout_prob"]),
    "seed": (["--random", str(2**63)], ["--random"]),
    "large seed": (["--random", str(2**64)], ["--random"]),
    "name": (["--name", "n" * 300], ["--name"]),
    "output": (["--output_dir", os.fsdecode(b"\xff\xfe")], ["--output_dir", "UTF-8"]),
    "long output": (["--output_dir", "n" * 300], ["--output_dir"]),
    "model": (["--set", "model.vocab_size=1000000000000"], ["memory"]),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_value_beyond_a_limit_is_refused_early(fresh, capsys, monkeypatch, case):
    given, words = BEYOND[case]
    if "cpu" in given and not has_cpu_kernels():
        pytest.skip("the backend cpu is not built")
    monkeypatch.chdir(fresh)
    before = sorted(fresh.rglob("*"))
    try:
        code = tiny.train(fresh, *given)
    except SystemExit as error:  # argparse
        error_text = capsys.readouterr().err
        assert error.code == 2 and all(word in error_text for word in words), error_text
    else:
        refused(code, capsys, *words)
    left = [p for p in sorted(fresh.rglob("*")) if p not in before]
    assert [p for p in left if "data" not in p.parts] == []


@pytest.mark.parametrize("case", ["block size", "head_dim"])
def test_a_backend_that_cannot_is_refused_for_evaluation_too(fresh, capsys, case):
    given, words = BEYOND[case]
    if not has_cpu_kernels():
        pytest.skip("the backend cpu is not built")
    assert tiny.train(fresh, *given[2:], "--train_steps", "2") == 0
    capsys.readouterr()
    before = sorted(fresh.rglob("*"))
    refused(tiny.infer(fresh, "--backend", "cpu"), capsys, *words)
    assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize("setting", ["model.block_size=8", "model.head_dim=256"])
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_slow_fallback_is_said_at_the_start(fresh, capsys, setting, more):
    if not has_cpu_kernels():
        pytest.skip("the backend cpu is not built")
    assert tiny.train(fresh, "--device=cpu", "--train_steps=2", f"--set={setting}", *more) == 0
    output = capsys.readouterr().out
    (line,) = [x for x in output.splitlines() if "slower" in x]
    assert setting.split(".")[1].split("=")[0] in line and "reference" in line
    assert output.index(line) < output.index("dense step" if more else "Validation Results")
    # and is not said where it is not so
    assert tiny.train(fresh, "--device=cpu", "--train_steps=2", "--name=b", *more) == 0
    assert "slower" not in capsys.readouterr().out


# ---- what surrounds the program ----------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": ""},
        {"RANK": "1"},
        {"WORLD_SIZE": "two", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},  # and nothing on where to meet
    ],
    ids=str,
)
@pytest.mark.parametrize("script", [main_learnable_skewness, main_inference])
def test_half_set_launcher_variables_are_named(fresh, capsys, monkeypatch, variables, script):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    mode = "train" if script is main_learnable_skewness else "eval"
    given = tiny.arguments(fresh, *tiny.SETTINGS if mode == "train" else (), mode=mode)
    refused(script.main(given), capsys, next(iter(variables)), "torchrun", "unset")
    assert not (fresh / "out").exists()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_empty_launcher_variables_mean_one_process(fresh, monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert tiny.train(fresh, "--train_steps", "1") == 0


def test_a_checkout_with_windows_settings_compiles(tmp_path):
    """git there turns line ends into CRLF, which no shell takes, unless a file says otherwise."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    command = [git, "-c", "core.autocrlf=true", "clone", "-q", "--depth=1"]
    subprocess.run([*command, f"file://{ROOT}", str(clone)], check=True, capture_output=True)
    for name in ("compile.sh", "kernels/native.py", "Makefile", "experiments/demo.sh"):
        assert b"\r" not in (clone / name).read_bytes(), name
