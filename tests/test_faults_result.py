"""What is reported is what was tested, and what is saved can be loaded."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import models

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def result(folder, name="sat"):
    return json.loads((tiny.logs(folder) / f"{name}.run.json").read_text())["result"]


def records(folder, name="sat"):
    lines = (tiny.logs(folder) / f"{name}.metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---- the last step -----------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [["--max_dense_steps", "30"], ["--sk=-100", "--ds=1e9", "--train_steps=3"]]
)
def test_no_switch_at_the_last_step(fresh, capsys, given):
    """Nothing would be trained with the blocks, and the model tested is a dense one."""
    assert tiny.train(fresh, *given) == 0
    output = capsys.readouterr().out
    assert "attention: dense" in output and "transition to sparse" not in output
    assert "the run ended without a transition" in output
    tested = torch.load(tiny.checkpoints(fresh) / "sat.model")
    assert tested["phase"] == "dense"
    report = result(fresh)
    assert report["attention"] == "dense" and report["transition_step"] is None
    assert report["best_dev_accuracy"] == tested["best_accuracy"] is not None
    assert report["best_step"] == tested["step"]
    assert not (fresh / "out/pickle").exists()
    end = records(fresh)[-1]
    assert end["event"] == "end" and end["phase"] == "dense"


def test_a_switch_before_the_last_step_stays_one(fresh):
    assert tiny.train(fresh, "--max_dense_steps", "29") == 0
    report = result(fresh)
    assert report["attention"] == "sparse" and report["transition_step"] == 29
    assert report["best_step"] == 30 and report["best_dev_accuracy"] is not None


def test_the_report_is_that_of_the_checkpoint_tested(fresh, capsys):
    """A finished run whose best model is another one than its last state knows."""
    assert tiny.train(fresh, "--max_dense_steps", "5") == 0
    path = tiny.checkpoints(fresh) / "sat.model"
    content = torch.load(path)
    content |= {"phase": "dense", "block_masks": None, "step": 7, "best_accuracy": 0.125}
    torch.save(content, path)
    assert tiny.train(fresh, "--resume") == 0
    assert "attention: dense" in capsys.readouterr().out
    report = result(fresh)
    assert (report["attention"], report["best_step"]) == ("dense", 7)
    assert report["best_dev_accuracy"] == 0.125
    assert records(fresh)[-1]["phase"] == "dense"


# ---- a model that can be saved but not loaded --------------------------------------


def test_a_model_that_cannot_be_loaded_again_is_not_trained(fresh, capsys, monkeypatch):
    """A new model under names that the readers of checkpoints do not expect."""
    init = models.SequenceClassifier.__init__

    class Renamed(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.tokens, self.position_embeddings = old.word_embeddings, old.position_embeddings

        @property
        def word_table(self):
            return self.tokens.weight

        @property
        def position_table(self):
            return self.position_embeddings.weight

    def renamed(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.model.embeddings = Renamed(self.model.embeddings)

    monkeypatch.setattr(models.SequenceClassifier, "__init__", renamed)
    assert tiny.train(fresh) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "could not be loaded again" in captured.err
    assert "before the first step" in captured.err
    assert [r["event"] for r in records(fresh)] == ["start"]
    # nothing that looks like a run to go on with: repaired, the same command starts
    monkeypatch.setattr(models.SequenceClassifier, "__init__", init)
    assert tiny.train(fresh, "--resume") == 0
