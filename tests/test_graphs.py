"""Sparse steps as graphs, recorded and repeated on the CPU (emulated_graphs): the same numbers as
operator by operator, new masks at every replay."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import emulated_graphs
import interpreted_triton
import tiny

from config import Config
from kernels import DropoutKey
from kernels.dropout import keep_mask
from kernels.layer import embedding_dropout_layer_norm
from models import build_model
from training import graphs
from training.commands.dry_run import made_up_data
from training.distributed import World
from training.interrupt import StopSignal
from training.recording.log import NullLog
from training.run import Run, RunOptions
from training.settings import build_config
from training.step import train_step

if reason := interpreted_triton.reason_unavailable():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(graphs, "WARM_UP", 1)  # an interpreted step takes a second
    with interpreted_triton.active():
        yield


class Log(NullLog):
    def __init__(self):
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)


MODEL = tiny.MODEL | {"max_seq_len": 32, "num_layers": 1}


def make_run(micro_batch_size, **model):
    settings = [f"model.{name}={value}" for name, value in (MODEL | model).items()]
    flags = {"training.batch_size": 2, "training.statistics_groups": 2, "run.precision": "fp32"}
    config, _ = build_config(tiny.TASK, Config[tiny.TASK], settings=settings, flags=flags)
    torch.manual_seed(0)
    run = Run(
        config=config,
        options=RunOptions(micro_batch_size=micro_batch_size),
        paths=None,
        device=torch.device("cpu"),
        world=World(),
        log=Log(),
        model=build_model(config.model, "triton"),
        train_data=made_up_data(config),
        dev_data=made_up_data(config),
        stop=StopSignal(),
    )
    run.model.enter_sparse_phase(torch.eye(2).bool()[None])
    run.phase_index = 1
    run.optimizer = run.new_optimizer()
    return run


def steps(run, count):
    results = []
    for _ in range(count):
        results.append(train_step(run))
        run.step += 1
    return [(r.loss, r.accuracy, r.gradient_norm) for r in results], run.model.state_dict()


@pytest.mark.parametrize("micro_batch_size", [2, 1])
def test_captured_steps_are_the_same_steps(micro_batch_size):
    want, weights = steps(make_run(micro_batch_size), 3)
    run = make_run(micro_batch_size)
    with emulated_graphs.active(run.model) as captures:
        got, captured_weights = steps(run, 3)
    assert captures and run.graphs.captured
    assert got == want
    assert all(torch.equal(a, captured_weights[name]) for name, a in weights.items())


@pytest.mark.slow
def test_new_blocks_are_captured_anew():
    run = make_run(2)
    with emulated_graphs.active(run.model) as captures:
        steps(run, 3)
        masks = torch.ones(1, 2, 2, dtype=torch.bool)
        run.model.enter_sparse_phase(masks)
        got, _ = steps(run, 3)
    assert len(captures) == 2
    other = make_run(2)
    steps(other, 3)
    other.model.enter_sparse_phase(masks)
    assert got == steps(other, 3)[0]


def test_replays_draw_the_cpu_s_masks():
    ids, table = torch.zeros(3, 64, dtype=torch.int64), torch.ones(1, 32)
    rest = torch.zeros(64, 32), torch.ones(32), torch.zeros(32)

    def masks(ids, key):
        return embedding_dropout_layer_norm(
            ids, table, *rest, p=0.3, key=key, site=7, backend="triton"
        )[0]

    with emulated_graphs.active(None):
        graph = graphs._Graph(masks, [ids], DropoutKey(5, 1, 0))
        for key in (DropoutKey(5, 2, 0), DropoutKey(5, 1 << 40, 512), DropoutKey(-6, 2, 0)):
            got = graph([ids], key)
            assert torch.equal(got != 0, keep_mask(key, 7, got.shape, 0.3, "cpu"))


def test_masks_of_plain_torch_are_not_captured():
    """A width that the kernels do not take: a graph would repeat its masks."""
    want, _ = steps(make_run(2, transformer_dim=24, embedding_dim=24), 3)
    run = make_run(2, transformer_dim=24, embedding_dim=24)
    with emulated_graphs.active(run.model) as captures:
        got, _ = steps(run, 3)
    assert got == want and not captures
    (line,) = run.log.lines
    assert line.endswith("as CUDA graphs: a dropout in plain PyTorch would repeat its mask")


def test_the_emulation_would_notice_a_frozen_step(monkeypatch):
    """The key's numbers as arguments, as the CPU's kernels take them."""
    frozen = torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr("kernels.triton.key_words", lambda key, device: frozen.clone() + key.step)
    test = test_replays_draw_the_cpu_s_masks
    with pytest.raises(AssertionError):
        test()
