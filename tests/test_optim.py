"""The learning-rate schedule and the sparse phase's optimizer, against the formulas."""

import pytest
import torch

from config import Config
from training.optim import PhaseOptimizer
from training.settings import TrainingConfig, build_config


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


def test_an_update_is_adamws_with_eps_beta2_and_weight_decay():
    """Against the formula in float64, with numbers that let each of them matter."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    config = TrainingConfig(
        batch_size=8,
        learning_rate=0.1,
        warmup=0,
        eval_frequency=1,
        num_train_steps=10,
        num_eval_steps=1,
        weight_decay=0.3,
    )
    ours = PhaseOptimizer([weight], config, "sparse")  # constant: half the rate, beta1 0.9
    value = weight.detach().double().clone()
    first, second = torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(1, 6):
        gradient = torch.randn(5) * 10.0 ** torch.arange(-8, 2, 2)  # around eps, and far above
        weight.grad = gradient.clone()
        ours.clip()
        ours.optimizer.step()
        clipped = gradient.double().clamp(-1, 1)
        value *= 1 - 0.05 * 0.3
        first = 0.9 * first + 0.1 * clipped
        second = 0.999 * second + 0.001 * clipped**2
        deviation = (second / (1 - 0.999**step)).sqrt() + 1e-6
        value -= 0.05 * first / (1 - 0.9**step) / deviation
    assert torch.allclose(weight.detach().double(), value, rtol=1e-5, atol=1e-7)
