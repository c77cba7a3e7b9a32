"""The learning-rate schedule and the sparse phase's optimizer, against the formulas."""

import pytest
import torch

from config import Config
from training.optim import PhaseOptimizer
from training.settings import build_config


def schedule(config, phase="dense", steps=None):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = PhaseOptimizer([parameter], config, phase)
    rates, betas = [], []
    for _ in range(steps or config.num_train_steps):
        rates.append(optimizer.learning_rate)
        betas.append(optimizer.optimizer.param_groups[0]["betas"][0])
        parameter.grad = torch.ones(2)
        optimizer.optimizer.step()
        optimizer.advance()
    return rates, betas


def test_one_cycle_from_a_25th_up_and_down_to_a_250000th():
    config = build_config(
        "lra-image", Config["lra-image"], flags={"training.num_train_steps": 1000}
    )[0].training
    rates, betas = schedule(config)
    peak = config.learning_rate
    assert rates[0] == pytest.approx(peak / 25)
    assert max(rates) == pytest.approx(peak) and rates.index(max(rates)) == config.warmup - 1
    assert rates[-1] == pytest.approx(peak / 250_000)
    rising = peak / 25 + (peak - peak / 25) * 100 / (config.warmup - 1)
    assert rates[100] == pytest.approx(rising)
    assert betas[0] == pytest.approx(0.95) and min(betas) == pytest.approx(0.85)
    assert betas[-1] == pytest.approx(0.95)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 15])
def test_very_short_schedules(steps):
    config = build_config(
        "lra-image", Config["lra-image"], flags={"training.num_train_steps": steps}
    )[0].training
    rates, _ = schedule(config, steps=steps + 2)  # beyond its end it stays
    assert all(0 < rate <= config.learning_rate * 1.0001 for rate in rates)


def test_the_sparse_phase_is_constant_at_half_the_rate():
    config = build_config(
        "lra-image", Config["lra-image"], flags={"training.num_train_steps": 50}
    )[0].training
    rates, betas = schedule(config, "sparse")
    assert set(rates) == {0.001} and set(betas) == {0.9}


def test_gradients_are_clipped_by_value_and_frozen_parameters_left_out():
    config = build_config("lra-image", Config["lra-image"])[0].training
    free, frozen = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    frozen.requires_grad_(False)
    optimizer = PhaseOptimizer([free, frozen], config, "sparse")
    free.grad = torch.tensor([-7.0, 0.5, 3.0])
    optimizer.clip()
    assert free.grad.tolist() == [-1.0, 0.5, 1.0]
    assert len(optimizer.optimizer.param_groups[0]["params"]) == 1
