"""What people type, what they get, and what they are told when they mistype."""

import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main_learnable_skewness
from training import loop
from training.commands import dry_run
from training.commands import evaluate as evaluate_command
from training.commands import launch as launch_command
from training.commands import train as train_command
from training.recording import figures, words
from training.recording.checkpoint import load_checkpoint, save_checkpoint
from training.recording.reference_files import load_masks

ROOT = Path(__file__).resolve().parent.parent
FAST_TRANSITION = ["--sk", "-100", "--ds", "1e9"]  # fires on the third step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.write_data(folder / "data")
    assert tiny.train(folder, *FAST_TRANSITION) == 0
    return folder


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def files(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(code, capsys, *words):
    """Exit code 2, one sentence on stderr with all the words, no traceback."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error, error


# ---- a run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (5400, "90 min"), (45000, "12.5 h")],
)
def test_durations_for_people(seconds, said):
    assert words.duration(seconds) == said


@pytest.mark.parametrize("script", ["main_learnable_skewness.py", "main_inference.py"])
def test_ctrl_c_while_libraries_load_is_a_sentence(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # found before the real one
    ended = subprocess.run(
        [sys.executable, ROOT / script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 130
    assert ended.stderr == "interrupted before anything was written\n"


def test_help_answers_without_torch():
    for script in ("main_learnable_skewness.py", "main_inference.py"):
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-X", "importtime", script, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0 and "which run:" in result.stdout
        assert not re.search(r"\|\s+(torch|numpy|tensorflow)$", result.stderr, re.MULTILINE)
        # generous: the machine may be busy; alone it takes a tenth of it
        assert time.perf_counter() - started < 10


def test_a_run_leaves_the_promised_files(finished):
    logs, checkpoints = tiny.logs(finished), tiny.checkpoints(finished)
    names = {p.name for p in logs.iterdir()}
    assert names == {
        "train.sat.log",
        "train.sat.html",
        "train.sat.transition.png",
        "sat.tensorboard",
        "sat.metrics.jsonl",
        "sat.run.json",
    }
    kept = {p.name for p in checkpoints.iterdir()}
    assert {"sat.model", "sat.last.model"} <= kept
    best = torch.load(checkpoints / "sat.model", weights_only=True)
    assert set(best) == {
        "model_state_dict",
        "phase",
        "block_masks",
        "config",
        "step",
        "best_accuracy",
    }
    assert best["phase"] == "sparse" and best["step"] in (10, 20, 30)
    masks = finished / "out/pickle/layer_attn-0" / f"mat_lst_{tiny.TASK}_sat.pickle"
    with open(masks, "rb") as file:
        plain = pickle.load(file)  # as the reference reads it
    assert plain.shape == (1, 2, 4, 4) and plain.dtype == torch.float32
    assert torch.equal(plain[0] == 1, best["block_masks"])
    assert plain[0].sum(dim=(1, 2)).tolist() == [4, 4]  # floor(.3 * 16)


def test_metrics_tell_every_step(finished):
    lines = (tiny.logs(finished) / "sat.metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    train = [r for r in records if r["event"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 31))
    assert [r["phase"] for r in train] == ["dense"] * 3 + ["sparse"] * 27
    assert [r["event"] for r in records if r["event"] != "train"] == [
        "start",
        "transition",
        "probe",
        *(["eval", "probe"] * 3),
        "end",
    ]
    first, third, last = train[0], train[2], train[-1]
    assert first["distance"] == [0.0, 0.0] and first["change_percent"] == [None, None]
    assert all(value is not None for value in third["skewness"] + third["change_percent"])
    assert last["skewness"] == [None, None] and last["attention_loss"] is None
    assert first["attention_loss"] > 0
    # one cycle: a 25th of .01 at first; then constant half of it
    assert first["learning_rate"] == pytest.approx(0.01 / 25)
    assert {r["learning_rate"] for r in train[3:]} == {0.005}
    evals = [r for r in records if r["event"] == "eval"]
    assert [r["step"] for r in evals] == [10, 20, 30]
    assert all(r["num_examples"] == 30 for r in evals)
    assert [r["saved"] for r in evals] == [False, False, True]  # from step 100 on, and at the last


def test_the_log_keeps_the_lines_people_grep(finished):
    log = (tiny.logs(finished) / "train.sat.log").read_text()
    assert "\nValidation Results\nGlobal Steps: 9\nValid Loss: " in log
    assert re.search(r"^Valid Accuracy: 0\.\d{5}$", log, re.MULTILINE)
    assert re.search(
        r"^Evaluation Results\nLoss: \d\.\d{5}\nAccuracy: \d\.\d{5}$", log, re.MULTILINE
    )
    assert re.search(r"^best model saved: step =  29 ", log, re.MULTILINE)
    assert "total training time (s): " in log
    assert "examples: 21, attention: sparse" in log
    assert "kept for compatibility, not used: " in log and "training.patience" in log
    assert "skewness >= -100" in log and "percent" in log
    assert "transition to sparse attention after step 3" in log


def test_run_json_holds_facts_and_result(finished):
    facts = json.loads((tiny.logs(finished) / "sat.run.json").read_text())
    assert facts["config"]["model"]["num_layers"] == 2
    assert facts["result"]["transition_step"] == 3 and facts["result"]["steps"] == 30
    assert facts["result"]["num_test_examples"] == 21
    assert "main_learnable_skewness.py --mode train" in facts["command"]
    # by hand: B 8, H 2, d 8, L 2; forward and backward are 3 * 4 operations a pair and channel
    pairs = 64 * 64
    assert facts["flops_per_step"]["dense"]["attention"] == 12 * 8 * 2 * 8 * 2 * pairs
    assert facts["flops_per_step"]["sparse"]["attention"] == 12 * 8 * 2 * 8 * 2 * 4 * 256
    linear = 6 * 8 * 64 * 2 * (4 * 16 * 16 + 2 * 16 * 16)
    dense, sparse = (facts["flops_per_step"][phase] for phase in ("dense", "sparse"))
    assert sparse["step"] - sparse["attention"] == linear
    # the scores once more: one of the six products
    assert dense["statistics"] == dense["attention"] / 6 and sparse["statistics"] == 0
    assert dense["step"] == dense["attention"] + dense["statistics"] + linear


def test_the_picture_shows_attention_scores_and_kept_blocks(fresh, monkeypatch):
    drawn = []

    def kept(figure, path):
        drawn.append(figure)
        return figures.save_png(figure, path)

    monkeypatch.setattr(words, "save_png", kept)
    assert tiny.train(fresh, "--max_dense_steps", "3") == 0
    lines = (tiny.logs(fresh) / "sat.metrics.jsonl").read_text().splitlines()
    (event,) = (r for r in map(json.loads, lines) if r["event"] == "transition")
    masks = load_masks(fresh / "out/pickle/layer_attn-0" / f"mat_lst_{tiny.TASK}_sat.pickle")
    pixels = np.asarray(Image.open(tiny.logs(fresh) / "train.sat.transition.png").convert("RGB"))
    panels = [axis for axis in drawn[0].axes if axis.images]
    assert len(panels) == 6  # of each of two layers: attention, scores, kept

    def seen(axis, row, column):
        x, y = axis.transData.transform((column, row))
        return pixels[len(pixels) - 1 - int(y), int(x)].tolist()

    for layer, (attention, scores, mask) in enumerate(zip(*[iter(panels)] * 3, strict=True)):
        color = [int(figures.COLORS[layer][i : i + 2], 16) for i in (1, 3, 5)]
        for row, column in np.ndindex(4, 4):
            here = color if masks[layer, row, column] else [255, 255, 255]
            assert seen(mask, row + 0.5, column + 0.5) == pytest.approx(here, abs=2)
        chosen_by = np.array(event["pattern_scores"][layer])
        assert np.allclose(scores.images[0].get_array(), chosen_by, rtol=0.01)
        # rows of probabilities over 64 keys
        rows = (10 ** attention.images[0].get_array()).sum(1)
        assert np.allclose(rows, 1, atol=1e-3)
        for panel in (attention, scores):
            image = panel.images[0]
            cells = image.get_array().shape[0] // 4  # along a block
            for row, column in np.ndindex(4, 4):
                y, x = row * cells + cells // 2, column * cells + cells // 2
                here = [255 * part for part in image.cmap(image.norm(image.get_array()[y, x]))]
                assert seen(panel, (y + 0.5) / cells, (x + 0.5) / cells) == pytest.approx(
                    here[:3], abs=2
                )


def test_tensorboard_has_the_published_scalars(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tiny.logs(finished) / "sat.tensorboard")).Reload()
    assert [e.step for e in events.Scalars("val/accu")] == [9, 19, 29]
    assert len(events.Scalars("train/loss")) == 30
    assert [e.step for e in events.Scalars("criterion/layer1/skewness")] == [1, 2, 3]
    assert "val/loss" in events.Tags()["scalars"] and "val/attn_loss" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["transition"]


def test_both_evaluations_repeat_the_result_and_touch_nothing(finished, capsys):
    before = files(finished)
    log = (tiny.logs(finished) / "train.sat.log").read_text()
    result = re.search(r"Evaluation Results\nLoss: .*\nAccuracy: .*\n", log).group()
    assert tiny.evaluate(finished) == 0
    assert result in capsys.readouterr().out
    assert tiny.infer(finished, "--batch_size", "5") == 0
    assert result in capsys.readouterr().out
    eval_log = tiny.logs(finished) / "eval.sat.log"
    assert eval_log.read_text().count(result) == 2
    after = files(finished)
    assert set(after) - set(before) == {eval_log}
    assert all(after[path] == time for path, time in before.items())
    eval_log.unlink()


def test_other_attention_than_trained_is_said(finished, capsys):
    assert tiny.infer(finished, "--attention", "dense") == 0
    output = capsys.readouterr().out
    assert "trained with sparse attention and is evaluated with dense" in output
    assert "attention: dense" in output
    (tiny.logs(finished) / "eval.sat.log").unlink()


def test_badly_fitting_masks_are_warned_about(finished, tmp_path, capsys):
    weights = load_checkpoint(tiny.checkpoints(finished) / "sat.model").model_state_dict
    foreign = torch.zeros(2, 16, dtype=torch.bool)
    for layer in range(2):  # the four blocks that the pattern likes least
        pattern = weights[f"model.transformer_{layer}.mha.pattern"]
        foreign[layer, (pattern @ pattern.T).flatten().argsort()[:4]] = True
    foreign = foreign.view(2, 4, 4)
    path = tmp_path / "foreign.pickle"
    with open(path, "wb") as file:
        pickle.dump(foreign.float()[None], file)
    assert tiny.infer(finished, "--masks", str(path)) == 0
    assert "fit the checkpoint badly" in capsys.readouterr().out
    (tiny.logs(finished) / "eval.sat.log").unlink()


def test_a_run_without_transition_says_what_held_it_back(fresh, capsys):
    assert tiny.train(fresh, "--sk", "1e6", "--train_steps", "5") == 0
    output = capsys.readouterr().out
    assert "the run ended without a transition" in output
    assert "layer 0: skewness" in output and "try a lower --sk" in output
    assert "attention: dense" in output
    assert load_checkpoint(tiny.checkpoints(fresh) / "sat.model").phase == "dense"


def test_sparse_from_the_start(fresh, capsys):
    assert tiny.train(fresh, "--max_dense_steps", "0", "--pattern", "band") == 0
    assert "after step 0 (--max_dense_steps 0)" in capsys.readouterr().out
    lines = (tiny.logs(fresh) / "sat.metrics.jsonl").read_text().splitlines()
    assert {json.loads(x)["phase"] for x in lines if '"train"' in x} == {"sparse"}


def test_the_dense_phase_is_bounded(fresh, capsys):
    assert tiny.train(fresh, "--sk", "1e6", "--max_dense_steps", "7") == 0
    assert (
        "transition to sparse attention after step 7 (--max_dense_steps)"
        in capsys.readouterr().out
    )


def test_patience_ends_training(fresh, capsys):
    # a learning rate of nothing: no evaluation is better than the first one
    code = tiny.train(
        fresh,
        "--patience=2",
        "--train_steps=300",
        "--set=training.learning_rate=1e-30",
        "--set=training.warmup=0",
        "--sk=1e6",
    )
    assert code == 0
    output = capsys.readouterr().out
    # the first evaluation that may be the best is that of step 100
    assert "training ended after step 120: 2 evaluations without a better one" in output
    assert "Evaluation Results" in output


def test_stop_after_is_a_prefix(fresh, capsys):
    assert tiny.train(fresh, *FAST_TRANSITION, "--stop_after", "12") == 0
    output = capsys.readouterr().out
    assert "Evaluation Results" not in output
    command = re.search(r"go on with: .*main_learnable_skewness.py (.*)", output).group(1)
    assert command.endswith("--resume")
    assert "--stop_after" not in command  # the printed command goes on to the end
    assert main_learnable_skewness.main(command.split()) == 0
    assert "resumed at step 12" in capsys.readouterr().out
    whole = fresh.parent / "whole"
    tiny.write_data(whole / "data")
    assert tiny.train(whole, *FAST_TRANSITION) == 0
    for name in ("sat.model", "sat.last.model"):
        one, other = (load_checkpoint(tiny.checkpoints(f) / name) for f in (fresh, whole))
        assert one.step == other.step
        for key, value in one.model_state_dict.items():
            assert torch.equal(value, other.model_state_dict[key])


def test_resume_without_a_checkpoint_starts_and_says_so(fresh, capsys):
    assert tiny.train(fresh, "--resume") == 0
    assert "--resume starts at step 0" in capsys.readouterr().out


def test_resuming_a_finished_run_tests_it_again(fresh, capsys):
    assert tiny.train(fresh) == 0
    first = capsys.readouterr().out
    assert tiny.train(fresh, "--resume") == 0
    second = capsys.readouterr().out
    accuracy = re.compile(r"Evaluation Results\nLoss: .*\nAccuracy: .*\n")
    assert accuracy.search(first).group() == accuracy.search(second).group()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    code = tiny.train(tmp_path, "--dry_run")
    output = capsys.readouterr().out
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "dense step: " in output and "sparse step: " in output and "peak memory: " in output


def test_the_numbers_of_a_dry_run(tmp_path, capsys, monkeypatch):
    """A dense step of 2 s and a sparse one of half a second, each the second of its phase."""
    clock, phases = itertools.accumulate((5.0, 2.0, 7.0, 0.5)), []
    peaks = iter((3.0e8, 7.5e8, 8.0e8))
    train_step = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda run: phases.append(run.phase) or train_step(run)
    )
    timed = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(dry_run, "time", timed)
    monkeypatch.setattr(dry_run.memory, "peak_bytes", lambda device: next(peaks))
    work = {"dense": {"step": 6e12}, "sparse": {"step": 1.2345e12}}
    monkeypatch.setattr(dry_run.provenance, "flops", lambda model, batch, phase: work[phase])
    assert tiny.train(tmp_path, "--dry_run", "--train_steps", "7200") == 0
    assert phases == ["dense", "dense", "sparse", "sparse"]
    output = capsys.readouterr().out
    assert "dense step: 2,000 ms, 6,000.0 GFLOP, 3,000.0 GFLOP/s\n" in output
    assert "sparse step: 500 ms, 1,234.5 GFLOP, 2,469.0 GFLOP/s\n" in output
    assert "all 7,200 steps: 60 min sparse, 4.0 h dense; " in output
    assert "peak memory: 750 MB (300 MB before the first step)" in output


def test_both_documents_of_a_pair_train(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        items = [
            {
                "input_ids_0": random.integers(1, 200, 64).astype(np.int32),
                "input_ids_1": random.integers(1, 200, 64).astype(np.int32),
                "label": np.int32(i % 2),
            }
            for i in range(12)
        ]
        with open(folder / f"lra-retrieval.{split}.pickle", "wb") as file:
            pickle.dump(items, file)
    given = [
        *("--mode", "train", "--task", "lra-retrieval", "--train_steps", "8"),
        *("--data_dir", str(folder), "--output_dir", str(tmp_path / "out")),
        *("--batch_size", "4", *FAST_TRANSITION, *tiny.SETTINGS),
    ]
    assert main_learnable_skewness.main(given) == 0
    assert "examples: 12, attention: sparse" in capsys.readouterr().out


# ---- the reference's files ---------------------------------------------------------


def test_published_files_are_evaluated_in_their_places(shared_data, tmp_path, capsys):
    """40 pictures through the whole command, under the published (slipped) mask name."""
    source = shared_data / "reference/seed-1001/lra-image"
    model = tmp_path / "out/checkpoints/checkpoints-1001/lra-image/learnable.model"
    masks = tmp_path / "out/pickle/layer_attn-1001"
    model.parent.mkdir(parents=True)
    masks.mkdir(parents=True)
    shutil.copy(source / "learnable.model", model)
    for path in source.glob("mat_lst_*"):
        shutil.copy(path, masks)
    data = tmp_path / "data"
    data.mkdir()
    random = np.random.default_rng(0)
    items = [
        {"input_ids_0": random.integers(0, 256, 1024).astype(np.int32), "label": np.int64(i % 10)}
        for i in range(40)
    ]
    with open(data / "lra-image.test.pickle", "wb") as file:
        pickle.dump(items, file)
    import main_inference

    given = ["--mode", "eval", "--task", "lra-image", "--random", "1001", "--name", "learnable"]
    places = ["--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
    assert main_inference.main(given + places) == 0
    output = capsys.readouterr().out
    assert "(the published name" in output and "examples: 40, attention: sparse" in output
    assert "fit the checkpoint badly" not in output
    # without masks there is dense attention only, and it is said
    for path in masks.iterdir():
        path.unlink()
    assert main_inference.main(given + places) == 0
    assert "evaluated with dense attention" in capsys.readouterr().out
    code = main_inference.main([*given, *places, "--attention", "sparse"])
    refused(code, capsys, "there are no block masks")


# ---- mistakes ----------------------------------------------------------------------


def test_mistakes_on_the_command_line(fresh, capsys):
    def attempt(*words, more=()):
        refused(tiny.train(fresh, *more), capsys, *words)
        assert not (fresh / "out").exists()

    attempt("unknown task 'lra-imgae'", "did you mean lra-image", more=["--task", "lra-imgae"])
    attempt("did you mean model.num_layers", more=["--set", "model.num_layer=4"])
    attempt("must be of type int", more=["--set", "model.num_layers=x"])
    attempt("use --patience", more=["--set", "training.patience=4"])
    attempt("does not divide", more=["--set", "model.block_size=48"])
    attempt("keeps no block", more=["--set", "model.density=0.01"])
    attempt("statistics_groups must lie between", "batch_size (2)", more=["--batch_size", "2"])
    attempt("--max_dense_steps 0", "these need none: random", more=["--max_dense_steps", "0"])
    attempt("--device tpu", more=["--device", "tpu"])
    attempt(
        "--precision fp16 needs a CUDA device", more=["--device", "cpu", "--precision", "fp16"]
    )
    if not torch.cuda.is_available():
        attempt("no CUDA device", more=["--device", "cuda"])
        attempt("--backend cuda cannot be used", more=["--backend", "cuda"])
    attempt("there is no", "create_listops.py", more=["--data_dir", str(fresh / "nowhere")])
    attempt("part of file names", more=["--name", "a/b"])


@pytest.mark.parametrize(
    "given", [["--sk", "high"], ["--train_steps", "0"], ["--mode", "test"], ["--nmae", "x"]]
)
def test_argparse_mistakes_exit_with_2(given):
    with pytest.raises(SystemExit) as error:
        main_learnable_skewness.main(given)
    assert error.value.code == 2


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda split, items: Executes(), ["posix.system"]),
        (
            lambda split, items: [*items[:5], {**items[5], "label": np.int32(10)}, *items[6:]],
            ["item 5", "label 10", "0 to 9"],
        ),
        (
            lambda split, items: [
                *items[:4],
                {**items[4], "input_ids_0": items[4]["input_ids_0"] + np.int32(32)},
            ],
            ["item 4", "vocab_size 32"],
        ),
        (
            lambda split, items: [{**i, "input_ids_0": i["input_ids_0"][:60]} for i in items],
            ["item 0", "60", "64"],
        ),
        (lambda split, items: {"not": "a list"}, ["lra-listops.train.pickle"]),
        (lambda split, items: [], ["lra-listops.train.pickle"]),
    ],
    ids=["executes", "label", "id", "length", "dict", "empty"],
)
def test_bad_pickles_are_named(tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "data", change=change)
    refused(tiny.train(tmp_path), capsys, *words)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_a_truncated_pickle_is_named(fresh, capsys):
    path = fresh / "data" / f"{tiny.TASK}.dev.pickle"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny.train(fresh), capsys, path.name)
    assert not (fresh / "out").exists()


def test_a_used_name_is_refused_and_left_alone(finished, capsys):
    before = files(finished)
    refused(tiny.train(finished), capsys, "--resume", "another --name")
    assert files(finished) == before


def test_what_a_resume_cannot_change(finished, capsys):
    before = files(finished)
    for given, word in (
        (["--batch_size", "16"], "training.batch_size=16"),
        (["--set", "model.dropout_prob=0.3"], "model.dropout_prob=0.3"),
        (["--train_steps", "40"], "training.num_train_steps=40"),
        (["--precision", "bf16"], "run.precision=bf16"),
        (["--pattern", "band"], "sparsity.pattern=band"),
        (["--transition_when", "shifting"], "sparsity.transition_when=shifting"),
        (["--max_dense_steps", "9"], "sparsity.max_dense_steps=9"),
    ):
        common = tiny.arguments(finished, "--resume", *given)
        refused(main_learnable_skewness.main(common), capsys, "cannot resume", word)
    assert files(finished) == before


def test_evaluation_without_a_checkpoint_lists_those_there_are(finished, capsys):
    refused(tiny.infer(finished, "--name", "typo"), capsys, "typo.model", "sat")
    refused(tiny.evaluate(finished, "--random", "5"), capsys, "checkpoints-5")


def test_foreign_checkpoints_are_refused(finished, tmp_path, capsys):
    path = tiny.checkpoints(finished) / "sat.model"
    state = load_checkpoint(path)
    shutil.copytree(finished / "data", tmp_path / "data")
    copy = tiny.checkpoints(tmp_path) / "sat.model"
    copy.parent.mkdir(parents=True)

    other = load_checkpoint(path)
    other.config["task"] = "lra-image"
    save_checkpoint(copy, other)
    refused(tiny.infer(tmp_path), capsys, "belongs to task lra-image")

    # weights of another shape than the configuration says
    state.config["model"]["transformer_hidden_dim"] = 32
    save_checkpoint(copy, state)
    refused(tiny.infer(tmp_path), capsys, "mlpblock")

    copy.write_bytes(path.read_bytes()[:-1000])
    refused(tiny.infer(tmp_path), capsys, "sat.model")
    copy.write_bytes(b"no checkpoint at all")
    refused(tiny.infer(tmp_path), capsys, "sat.model")
    assert not (tmp_path / "out/logs").exists()


def test_unwritable_output_is_refused(fresh, capsys, monkeypatch):
    blocked = fresh / "file"
    blocked.write_text("in the way")
    given = ["--output_dir", str(blocked / "out")]
    refused(tiny.train(fresh, *given), capsys, "cannot write there")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(tiny.train(fresh), capsys, "cannot write there")


def test_masks_of_another_shape_are_refused(finished, tmp_path, capsys):
    path = tmp_path / "masks.pickle"
    with open(path, "wb") as file:
        pickle.dump(torch.ones(1, 2, 8, 8), file)
    refused(tiny.infer(finished, "--masks", str(path)), capsys, "masks.pickle")
    with pytest.raises(ValueError, match="no file of block masks"):
        load_masks(tmp_path / "absent.pickle")


@pytest.mark.parametrize("where", ["set-up", "training", "test", "evaluation"])
def test_mistakes_of_ours_show_their_traceback(finished, fresh, monkeypatch, where):
    """A ValueError of NumPy or of a bug is no mistake of the user."""

    def broken(*arguments, **keywords):
        raise ValueError("operands could not be broadcast")

    module, name = {
        "set-up": (launch_command, "build_model"),
        "training": (loop, "train_step"),
        "test": (train_command, "timed_test"),
        "evaluation": (evaluate_command, "timed_test"),
    }[where]
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ValueError, match="broadcast"):
        tiny.infer(finished) if where == "evaluation" else tiny.train(fresh)


def test_tied_layers_take_one_mask(fresh, capsys):
    """Masks that differ between layers do not go with a model whose layers are one."""
    assert tiny.train(fresh, "--set=model.tied_weights=True") == 0
    path = fresh / "masks.pickle"
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 0, 0, 0] = masks[0, 1, 1, 1] = 1
    with open(path, "wb") as file:
        pickle.dump(masks, file)
    refused(tiny.infer(fresh, "--masks", str(path)), capsys, "tied weights")
