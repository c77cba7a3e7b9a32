"""run.json tells what ran on what; gradients, the loss scale and skipped steps are logged."""

import hashlib
import json
import shutil
import subprocess

import pytest
import tiny
import torch

from models import SequenceClassifier
from training import loop
from training.optim import PhaseOptimizer
from training.recording import provenance
from training.run import Run


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def facts(folder):
    return json.loads((tiny.logs(folder) / "sat.run.json").read_text())


def train_records(folder):
    lines = (tiny.logs(folder) / "sat.metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "train"]


# ---- where it ran ------------------------------------------------------------------


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", *who, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_and_whether_files_changed(tmp_path):
    clone = tmp_path / "clone"
    (clone / "inner").mkdir(parents=True)
    assert provenance.commit(clone) == {"commit": None, "clean": None}
    git(clone, "init", "-q")
    assert provenance.commit(clone) == {"commit": None, "clean": None}, "nothing committed yet"
    (clone / "a.py").write_text("a = 1\n")
    git(clone, "add", "a.py")
    git(clone, "commit", "-q", "-m", "Begin")
    head = git(clone, "rev-parse", "HEAD")
    assert provenance.commit(clone) == {"commit": head, "clean": True}
    (clone / "results.txt").write_text("of a run\n")
    assert provenance.commit(clone)["clean"], "what git does not know is no change of the code"
    (clone / "a.py").write_text("a = 2\n")
    assert provenance.commit(clone) == {"commit": head, "clean": False}
    # unpacked inside somebody else's clone
    assert provenance.commit(clone / "inner") == {"commit": None, "clean": None}


def test_no_git_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == {"commit": None, "clean": None}


def test_every_start_and_resume_is_recorded(fresh):
    assert tiny.train(fresh, "--stop_after", "12") == 0
    first = facts(fresh)
    assert first["result"] is None and len(first["sessions"]) == 1
    assert first["sessions"][0]["wall_seconds"] > 0
    assert tiny.train(fresh, "--resume") == 0
    found = facts(fresh)
    assert [session["step"] for session in found["sessions"]] == [0, 12]
    assert found["sessions"][0] == first["sessions"][0]
    one, two = (session["command"] for session in found["sessions"])
    assert "--resume" not in one and "--stop_after 12" in one and two.endswith("--resume")
    assert found["command"] == one and found["result"]["steps"] == 30
    assert found["sessions"][1]["wall_seconds"] > found["result"]["seconds"] / 10
    for split, digest in found["resolved"]["data_sha256"].items():
        content = (fresh / "data" / f"{tiny.TASK}.{split}.pickle").read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()
    assert set(found["resolved"]["data_sha256"]) == {"train", "dev", "test"}
    session = found["sessions"][1]
    assert session["processor"] and session["threads"] == torch.get_num_threads()
    assert session["versions"]["cuda"] == torch.version.cuda
    assert {name: session[name] for name in ("commit", "clean")} == provenance.commit()


def test_a_run_killed_before_its_first_checkpoint_was_still_there(fresh):
    assert tiny.train(fresh, "--stop_after", "3") == 0
    for path in tiny.checkpoints(fresh).iterdir():
        path.unlink()
    metrics = tiny.logs(fresh) / "sat.metrics.jsonl"  # it had not taken a step then
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    assert tiny.train(fresh, "--resume", "--set", "training.learning_rate=0.02") == 0
    found = facts(fresh)
    assert [session["step"] for session in found["sessions"]] == [0, 0]
    assert found["config"]["training"]["learning_rate"] == 0.02


def test_every_halved_micro_batch_is_recorded(fresh, monkeypatch):
    forward = SequenceClassifier.forward

    def limited(self, ids, *arguments, **keywords):
        if self.training and keywords.get("dropout_key") and len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(self, ids, *arguments, **keywords)

    monkeypatch.setattr(SequenceClassifier, "forward", limited)
    assert tiny.train(fresh, "--train_steps", "3") == 0
    assert facts(fresh)["halved_micro_batches"] == [
        {"step": 1, "micro_batch_size": 4},
        {"step": 1, "micro_batch_size": 2},
    ]


# ---- gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("micro", [3, 8])
def test_the_norm_of_the_gradient_before_it_is_clipped(fresh, monkeypatch, micro):
    expected = []
    clip = PhaseOptimizer.clip

    def seen(self):
        squares = [(p.grad.double() ** 2).sum() for p in self.parameters if p.grad is not None]
        expected.append(float(torch.stack(squares).sum().sqrt()))
        clip(self)

    monkeypatch.setattr(PhaseOptimizer, "clip", seen)
    given = ["--sk", "-100", "--ds", "1e9", "--train_steps", "6"]
    assert tiny.train(fresh, *given, "--micro_batch_size", str(micro)) == 0
    records = train_records(fresh)
    assert {record["phase"] for record in records} == {"dense", "sparse"}
    norms = [record["gradient_norm"] for record in records]
    assert norms == pytest.approx(expected, rel=1e-5) and min(norms) > 0.01
    assert {(record["loss_scale"], record["skipped"]) for record in records} == {(None, False)}


def test_the_loss_scale_and_a_skipped_step(fresh, monkeypatch):
    """fp16's scaler, which also works on a CPU; one gradient overflows."""
    prepare, train_one = Run.__post_init__, loop.train_step

    def with_scaler(run):
        prepare(run)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflowing(run):
        weight = run.model.seq_classifer.mlpblock[2].weight
        hook = weight.register_hook(lambda g: g * torch.inf) if run.step == 2 else None
        before = weight.detach().clone()
        result = train_one(run)
        assert torch.equal(before, weight) == (run.step == 2)
        if hook is not None:
            hook.remove()
        return result

    monkeypatch.setattr(Run, "__post_init__", with_scaler)
    monkeypatch.setattr(loop, "train_step", overflowing)
    assert tiny.train(fresh, "--train_steps", "5") == 0
    records = train_records(fresh)
    assert [record["skipped"] for record in records] == [False, False, True, False, False]
    assert [record["loss_scale"] for record in records] == [1024, 1024, 1024, 512, 512]
    norms = [record["gradient_norm"] for record in records]
    assert norms[2] is None and None not in norms[:2] + norms[3:]


# ---- TensorBoard -------------------------------------------------------------------


def test_tensorboard_compares_runs_by_their_hyperparameters(fresh):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    def read():
        events = EventAccumulator(str(tiny.logs(fresh) / "sat.tensorboard")).Reload()
        content = events.PluginTagToContent("hparams")
        return events, {tag: HParamsPluginData.FromString(v) for tag, v in content.items()}

    assert tiny.train(fresh, "--stop_after", "12") == 0
    _, found = read()
    assert set(found) == {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert tiny.train(fresh, "--resume") == 0
    events, found = read()
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    assert values["model.density"].number_value == 0.3
    assert values["pattern"].string_value == "learned" and values["seed"].number_value == 0
    assert found["_hparams_/session_end_info"].session_end_info.status == 1  # success
    compared = [m.name.tag for m in found["_hparams_/experiment"].experiment.metric_infos]
    assert set(compared) <= set(events.Tags()["scalars"])
    (accuracy,) = events.Scalars("test/accuracy")
    assert accuracy.value == pytest.approx(facts(fresh)["result"]["test_accuracy"])
