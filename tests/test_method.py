"""Patterns, criteria, forks and what a run tells of them, through the commands."""

import json
import pickle

import numpy as np
import pytest
import tiny
import torch

import main_learnable_skewness
from sparsity import CRITERIA, PATTERNS, Criterion, Pattern, Verdict
from training.recording.checkpoint import load_checkpoint

LAYERS = 2


@pytest.fixture
def fresh(tmp_path):
    tiny.write_data(tmp_path / "data")
    return tmp_path


def events(folder, kind, name="sat"):
    lines = (tiny.logs(folder) / f"{name}.metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def assert_same_end(folder, *names):
    """Two runs end with the same bits."""
    one, other = (load_checkpoint(tiny.checkpoints(folder) / f"{n}.last.model") for n in names)
    weights = other.model_state_dict
    assert all(torch.equal(value, weights[name]) for name, value in one.model_state_dict.items())
    assert torch.equal(one.block_masks, other.block_masks)


def refused(code, capsys, *words):
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


def test_every_dense_step_says_what_the_choice_would_keep(fresh, capsys):
    assert tiny.train(fresh, "--max_dense_steps", "25", "--pattern", "mass") == 0
    steps = events(fresh, "train")
    for event in steps[:25]:
        for kept, best, chance, lift in zip(
            *(event[n] for n in ("kept_mass", "best_mass", "chance_mass", "lift")), strict=True
        ):
            assert 0 < chance < 1 and 0 < kept <= 1 and kept == pytest.approx(best)
            assert lift == pytest.approx(kept / chance)
        assert len(event["kept_mass_row_min"]) == LAYERS
    assert steps[0]["agreement_1"] == [None] * LAYERS
    assert steps[19]["capture"] == [None] * LAYERS and None not in steps[20]["capture"]
    assert steps[25]["kept_mass"] == steps[25]["capture"] == [None] * LAYERS
    transition = events(fresh, "transition")[0]
    assert transition["kept_mass"] == steps[24]["kept_mass"]
    output = capsys.readouterr().out
    kept, best = transition["kept_mass"][1], transition["best_mass"][1]
    assert (
        f"layer 1 keeps {kept:.1%} of the attention in 25.0% of the blocks; the best blocks hold "
        f"{best:.1%}" in output
    )


@pytest.mark.parametrize("more", [(), ("--set=model.tied_weights=True",)])
def test_micro_batches_give_the_same_observations(fresh, more):
    for name, micro in (("one", "8"), ("four", "2"), ("odd", "3")):
        given = ["--name", name, "--micro_batch_size", micro, "--max_dense_steps", "3"]
        assert tiny.train(fresh, *given, "--stop_after", "2", *more) == 0
    one = events(fresh, "train", "one")
    for name in ("four", "odd"):
        for ours, whole in zip(events(fresh, "train", name), one, strict=True):
            for value in ("kept_mass", "best_mass", "chance_mass"):
                assert ours[value] == pytest.approx(whole[value], rel=1e-5)
    if more:  # layers that are one have one mask, so one observation
        assert all(event["best_mass"][0] == event["best_mass"][1] for event in one)


@pytest.mark.parametrize("name", [n for n in PATTERNS if n != "given"])
def test_every_pattern_trains(fresh, name):
    given = ["--pattern", name, "--max_dense_steps", "3", "--stop_after", "5"]
    given += ["--set", "model.density=0.65"]  # 10 of 16 blocks, what band_global needs
    assert tiny.train(fresh, *given) == 0
    masks = load_checkpoint(tiny.checkpoints(fresh) / "sat.last.model").block_masks
    assert masks.sum(dim=(1, 2)).tolist() == [16 if name == "all" else 10] * LAYERS


def test_given_blocks_are_kept(fresh, capsys):
    path = fresh / "masks.pickle"
    masks = torch.zeros(1, LAYERS, 4, 4)
    masks[0, 0, 1, 2] = masks[0, 1, 3] = 1
    path.write_bytes(pickle.dumps(masks))
    given = ["--pattern", "given", "--max_dense_steps", "0", "--stop_after", "2"]
    assert tiny.train(fresh, *given, "--masks", str(path)) == 0
    kept = load_checkpoint(tiny.checkpoints(fresh) / "sat.last.model").block_masks
    assert torch.equal(kept, masks[0].bool())
    # one's own masks, one for all layers
    np.save(fresh / "own.npy", masks[0, 1].bool().numpy())
    own = ["--masks", str(fresh / "own.npy"), "--name", "own"]
    assert tiny.train(fresh, *given, *own) == 0
    kept = load_checkpoint(tiny.checkpoints(fresh) / "own.last.model").block_masks
    assert torch.equal(kept, masks[0, 1].bool().expand(LAYERS, 4, 4))
    path.write_bytes(pickle.dumps(torch.ones(1, LAYERS, 8, 8)))
    code = tiny.train(fresh, *given, "--masks", str(path), "--name", "other")
    refused(code, capsys, "[2, 8, 8]", "[2, 4, 4]")
    code = tiny.train(fresh, *given, "--masks", str(fresh / "absent"), "--name", "other")
    refused(code, capsys, "no file of block masks")


def test_criteria_of_pooled_attention_keep_no_whole_matrix(fresh, capsys):
    given = ["--transition_when", "concentrated", "--pattern", "mass", "--stop_after", "22"]
    assert tiny.train(fresh, *given) == 0
    steps = events(fresh, "train")
    assert steps[21]["skewness"] == [None] * LAYERS and None not in steps[21]["concentration"]
    state = load_checkpoint(tiny.checkpoints(fresh) / "sat.last.model").training
    sizes = [value.numel() for value in state["criterion"].values() if torch.is_tensor(value)]
    assert not sizes and "sparse once, in some layer" in capsys.readouterr().out


def test_after_is_a_budget(fresh):
    assert tiny.train(fresh, "--transition_when", "after", "--max_dense_steps", "7") == 0
    transition = events(fresh, "transition")[0]
    assert transition["step"] == 7 and transition["reason"] == "after 7 dense steps"


def test_every_setting_can_be_given_with_set(fresh):
    given = ["--set=sparsity.pattern=mass", "--set=sparsity.max_dense_steps=3", "--set=run.seed=4"]
    assert tiny.train(fresh, *given, "--set=run.patience=9", "--stop_after", "5") == 0
    flags = ["--pattern", "mass", "--max_dense_steps", "3", "--random", "4", "--patience", "9"]
    assert tiny.train(fresh, *flags, "--stop_after", "5", "--name", "flags") == 0
    folder = tiny.checkpoints(fresh).parent.parent / "checkpoints-4" / tiny.TASK
    one, other = (load_checkpoint(folder / f"{name}.last.model") for name in ("sat", "flags"))
    assert one.config == other.config and one.config["run"]["precision"] == "fp32"
    assert all(torch.equal(v, other.model_state_dict[k]) for k, v in one.model_state_dict.items())


# ---- forks -------------------------------------------------------------------------

END = ["--max_dense_steps", "20"]


def test_a_fork_goes_on_bit_for_bit(fresh):
    assert tiny.train(fresh, "--name", "whole", *END) == 0
    assert tiny.train(fresh, "--name", "prefix", *END, "--stop_after", "12") == 0
    origin = tiny.checkpoints(fresh) / "prefix.last.model"
    assert tiny.train(fresh, "--name", "forked", *END, "--fork", str(origin)) == 0
    for kind in ("train", "transition"):
        whole = [e for e in events(fresh, kind, "whole") if e["step"] > 12]
        forked = events(fresh, kind, "forked")
        for one, other in zip(whole, forked, strict=True):
            for volatile in ("seconds", "peak_memory_bytes"):
                one.pop(volatile, None), other.pop(volatile, None)
            assert one == other
    assert_same_end(fresh, "whole", "forked")
    start = events(fresh, "start", "forked")[0]
    assert start["forked_from"] == str(origin) and start["forked_at"] == 12


def test_forks_compare_patterns_from_the_same_moment(fresh, capsys):
    given = ["--transition_when", "after", "--max_dense_steps", "25", "--stop_after", "22"]
    assert tiny.train(fresh, "--name", "prefix", *given) == 0
    seen = events(fresh, "train", "prefix")[-1]
    origin = str(tiny.checkpoints(fresh) / "prefix.last.model")
    for pattern in ("mass", "learned", "untrained", "random_rows"):
        more = ["--fork", origin, "--name", pattern, "--pattern", pattern]
        assert tiny.train(fresh, *more, "--max_dense_steps", "22", "--stop_after", "24") == 0
        (transition,) = events(fresh, "transition", pattern)
        assert transition["step"] == 22
        assert transition["best_mass"] == pytest.approx(seen["best_mass"])
        assert [e["step"] for e in events(fresh, "train", pattern)] == [23, 24]
        # and it goes on as any run does
        assert tiny.train(fresh, *more, "--max_dense_steps", "22", "--resume") == 0
    kept = {n: events(fresh, "transition", n)[0]["kept_mass"] for n in ("mass", "learned")}
    assert all(m > x for m, x in zip(kept["mass"], kept["learned"], strict=True))
    capsys.readouterr()
    origin = str(tiny.checkpoints(fresh) / "mass.last.model")
    refused(tiny.train(fresh, "--fork", origin, "--name", "x"), capsys, "after its transition")


def test_what_a_fork_cannot_change(fresh, capsys):
    assert tiny.train(fresh, "--name", "prefix", "--stop_after", "3") == 0
    origin = str(tiny.checkpoints(fresh) / "prefix.last.model")
    before = sorted(fresh.rglob("*"))
    capsys.readouterr()
    for given, words in (
        (["--set", "model.dropout_prob=0.3"], "cannot fork with model.dropout_prob=0.3"),
        (["--batch_size", "16"], "cannot fork with training.batch_size=16"),
        (["--random", "1"], "belongs to --random 0"),
        (["--stop_after", "3"], "3 completed steps already"),
        (["--pattern", "mass", "--max_dense_steps", "0"], "needs a dense phase"),
    ):
        common = tiny.arguments(fresh, "--fork", origin, "--name", "new", *given)
        refused(main_learnable_skewness.main(common), capsys, words)
    absent = tiny.arguments(fresh, "--fork", str(fresh / "absent.model"), "--name", "new")
    refused(main_learnable_skewness.main(absent), capsys, "there is no checkpoint")
    assert sorted(fresh.rglob("*")) == before


# ---- while sparse ------------------------------------------------------------------


def test_probes_change_no_bit(fresh):
    """At the switch, at evaluations and every N steps; the run stays what it is without them."""
    given = ["--max_dense_steps", "5", "--pattern", "mass"]
    assert tiny.train(fresh, "--name", "without", *given) == 0
    assert tiny.train(fresh, "--name", "with", *given, "--probe_every", "7") == 0
    assert [e["step"] for e in events(fresh, "probe", "without")] == [5, 10, 20, 30]
    probes = events(fresh, "probe", "with")
    assert [e["step"] for e in probes] == [5, 10, 12, 19, 20, 26, 30]
    for one, other in zip(*(events(fresh, "train", n) for n in ("without", "with")), strict=True):
        assert one["loss"] == other["loss"]
    for event in probes:
        for layer in range(LAYERS):
            assert 0 < event["used_mass"][layer] < 1 and event["output_error"][layer] > 0
            assert event["kept_mass"][layer] <= event["best_mass"][layer] + 1e-9
    # a run may be resumed with other probes
    assert tiny.train(fresh, "--name", "with", *given, "--probe_every", "3", "--resume") == 0


def test_blocks_are_chosen_anew(fresh, capsys):
    given = ["--max_dense_steps", "6", "--pattern", "mass", "--reselect_every", "5"]
    given += ["--set=training.learning_rate=0.05"]
    assert tiny.train(fresh, "--name", "whole", *given) == 0
    output = capsys.readouterr().out
    assert (
        "phases: dense until settled, at most 6 steps; then sparse (mass, density 0.3, chosen"
        in output
    )
    assert "blocks chosen anew after step 11: layer 0 exchanges" in output
    chosen = events(fresh, "reselection", "whole")
    assert [event["step"] for event in chosen] == [11, 16, 21, 26]
    for event in chosen:
        for layer in range(LAYERS):
            assert event["kept_mass"][layer] == pytest.approx(event["best_mass"][layer])
            assert event["kept_mass"][layer] >= event["kept_mass_before"][layer]
            assert (event["exchanged"][layer] > 0) == (
                event["kept_mass"][layer] > event["kept_mass_before"][layer]
            )
    assert sum(sum(event["exchanged"]) for event in chosen) > 0
    # in micro-batches, and cut between two choices and at one, it is the same run
    for stop in ("13", "16"):
        assert tiny.train(fresh, "--name", stop, *given, "--stop_after", stop) == 0
        assert tiny.train(fresh, "--name", stop, *given, "--resume") == 0
        states = [
            load_checkpoint(tiny.checkpoints(fresh) / f"{n}.last.model") for n in ("whole", stop)
        ]
        one, other = (state.model_state_dict for state in states)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(states[0].block_masks, states[1].block_masks)
    assert tiny.train(fresh, "--name", "micro", *given, "--micro_batch_size", "2") == 0
    for one, other in zip(chosen, events(fresh, "reselection", "micro"), strict=True):
        assert one["kept_mass"] == pytest.approx(other["kept_mass"], rel=1e-2)


def test_densities_fall_by_phases(fresh, capsys):
    given = ["--max_dense_steps", "4", "--pattern", "mass", "--phase_steps", "6"]
    given += ["--densities", "0.9,0.6,0.3"]
    assert tiny.train(fresh, "--name", "whole", *given) == 0
    output = capsys.readouterr().out
    assert "transition to density 0.6 after step 10 (--phase_steps)" in output
    transitions = events(fresh, "transition", "whole")
    assert [(e["step"], e["active_blocks"][0]) for e in transitions] == [(4, 14), (10, 9), (16, 4)]
    assert [e["kept_mass"] for e in transitions[1:]] == [
        pytest.approx(e["best_mass"]) for e in transitions[1:]
    ]
    for stop in ("7", "10", "20"):
        assert tiny.train(fresh, "--name", stop, *given, "--stop_after", stop) == 0
        assert tiny.train(fresh, "--name", stop, *given, "--resume") == 0
        states = [
            load_checkpoint(tiny.checkpoints(fresh) / f"{n}.last.model") for n in ("whole", stop)
        ]
        one, other = (state.model_state_dict for state in states)
        assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    for more, words in (
        (["--reselect_every", "9"], "sparsity.reselect_every=9"),
        (["--phase_steps", "7"], "sparsity.phase_steps=7"),
        (["--densities", "0.5,0.4,0.3"], "sparsity.densities"),
    ):
        refused(tiny.train(fresh, "--name", "whole", *given, "--resume", *more), capsys, words)


# ---- registries --------------------------------------------------------------------


def _corner(observation, count, seed):
    index = torch.arange(observation.pattern_scores.shape[1])
    distance = (index[:, None] + index[None, :]).repeat(len(observation.pattern_scores), 1, 1)
    from sparsity.patterns import largest

    return largest(-distance, count)


class Tenth(Criterion):
    description = "at the tenth step"

    def update(self, observation):
        progress = observation.step / 10
        values = {"progress": [progress] * len(observation.pattern_scores)}
        return Verdict(progress >= 1, values, {"progress": 1.0}, f"progress {progress:g}")


def test_a_new_pattern_and_criterion_need_no_other_change(fresh, capsys, monkeypatch):
    monkeypatch.setitem(PATTERNS, "corner", Pattern(_corner, "nearest to the first block"))
    monkeypatch.setitem(CRITERIA, "tenth", Tenth)
    with pytest.raises(SystemExit):
        main_learnable_skewness.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "corner: nearest to the first block" in text and "tenth: at the tenth step" in text
    assert tiny.train(fresh, "--pattern", "corner", "--transition_when", "tenth") == 0
    output = capsys.readouterr().out
    assert "rule: at the tenth step" in output
    assert "blocks: corner (nearest to the first block), 4 of 16" in output
    steps, transition = events(fresh, "train"), events(fresh, "transition")[0]
    assert steps[4]["progress"] == [0.5, 0.5] and transition["step"] == 10
    masks = load_checkpoint(tiny.checkpoints(fresh) / "sat.model").block_masks
    assert masks[0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
