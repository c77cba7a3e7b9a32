"""How much of a learned pattern needs no attention at all?

Rebuilds a run's initial pattern from its seed, trains it on the pattern loss with every target set
to 1 / N (no data, no attention) for as many steps as the run's dense phase had, and compares the
blocks it keeps with those of the checkpoint's own pattern.

python experiments/attention_free.py checkpoints/checkpoints-1/lra-image/learnable.model \
    --task lra-image --random 1 --steps 158

Works on published checkpoints and on ours; --steps is the number of dense steps (published logs
count from 0: their last dense step 157 is the 158th).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import Aliases, Config
from kernels import AttentionStatistics
from models import ModelConfig, build_model
from sparsity.observe import Observation
from sparsity.pattern_loss import pattern_loss
from sparsity.patterns import select_blocks
from training.optim import PhaseOptimizer
from training.recording.checkpoint import load_checkpoint
from training.settings import TaskConfig, build_config, resolve_task


def reference_patterns(config: ModelConfig, seed: int) -> list[nn.Parameter]:
    """The initial patterns of the original: its modules, made in its order.

    Both embeddings draw twice (their own start, then normal(0, 0.02)); a layer makes query, key
    and value, then the pattern, then the output map and the feed-forward block.
    """
    torch.manual_seed(seed)
    dim, inner = config.transformer_dim, config.num_head * config.head_dim
    tables = [nn.Embedding(config.vocab_size, dim), nn.Embedding(config.padded_length, dim)]
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)
    patterns = []
    for _ in range(1 if config.tied_weights else config.num_layers):
        for _ in "qkv":
            nn.Linear(dim, inner)
        patterns.append(nn.Parameter(torch.rand(config.num_blocks, config.head_dim)))
        nn.Linear(inner, dim)
        nn.Linear(dim, config.transformer_hidden_dim)
        nn.Linear(config.transformer_hidden_dim, dim)
    return patterns


def own_patterns(config: ModelConfig, seed: int) -> list[nn.Parameter]:
    """The initial patterns of a run of this project."""
    torch.manual_seed(seed)
    model = build_model(config, "reference")
    return [value for name, value in model.named_parameters() if name.endswith("mha.pattern")]


def drift(patterns: list[nn.Parameter], config: TaskConfig, steps: int) -> None:
    """`steps` optimizer steps of the dense phase on the pattern loss alone, as if attention were
    uniform."""
    size = config.model.num_blocks
    uniform = torch.full((size, size), 1 / config.model.padded_length)
    statistics = AttentionStatistics(None, uniform, uniform.double().square().mean(), uniform)
    optimizer = PhaseOptimizer(patterns, config.training, "dense")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = pattern_loss(
            [statistics] * len(patterns), patterns, config.training.attn_loss_scale
        )
        loss.backward()
        optimizer.clip()
        optimizer.optimizer.step()
        optimizer.advance()


def kept_blocks(patterns: list[Tensor], density: float) -> Tensor:
    """bool [L, nb, nb], the reference's choice."""
    scores = torch.stack([p.detach().double() @ p.detach().double().T for p in patterns])
    return select_blocks("learned", Observation(scores), density)


def compare(checkpoint: Path, task: str, seed: int, steps: int) -> list[dict[str, float]]:
    """One dict a layer: the shares of the checkpoint's blocks that the untrained and the
    attention-free pattern keep too, and the mean shift of the entries, found and rebuilt."""
    state = load_checkpoint(checkpoint)
    if state.config is None:
        config, _ = build_config(task, Config[task])
        patterns = reference_patterns(config.model, seed)
    else:
        config = TaskConfig.from_dict(state.config)
        patterns = own_patterns(config.model, seed)
    found = [v for name, v in state.model_state_dict.items() if name.endswith("mha.pattern")]
    if [tuple(p.shape) for p in found] != [tuple(p.shape) for p in patterns]:
        raise ValueError(f"{checkpoint} has no patterns of the shape that {task} makes")
    initial = [p.detach().clone() for p in patterns]
    drift(patterns, config, steps)
    density = config.model.density
    wanted = kept_blocks(found, density)
    rows = []
    for layer, (untrained, rebuilt) in enumerate(
        zip(kept_blocks(initial, density), kept_blocks(list(patterns), density), strict=True)
    ):
        total = wanted[layer].sum()
        rows.append(
            {
                "untrained": float((untrained & wanted[layer]).sum() / total),
                "attention_free": float((rebuilt & wanted[layer]).sum() / total),
                "shift_found": float((initial[layer] - found[layer]).mean()),
                "shift_rebuilt": float((initial[layer] - patterns[layer].detach()).mean()),
            }
        )
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a .model file, ours or a published one")
    parser.add_argument("--task", required=True)
    parser.add_argument("--random", type=int, required=True, help="the run's seed")
    parser.add_argument("--steps", type=int, required=True, help="dense steps of the run")
    args = parser.parse_args(argv)
    try:
        task = resolve_task(args.task, Config, Aliases)
        rows = compare(args.checkpoint, task, args.random, args.steps)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("of the blocks that the checkpoint's pattern keeps")
    for layer, row in enumerate(rows):
        print(
            f"layer {layer}: {row['untrained']:.1%} are kept by the untrained pattern too, "
            f"{row['attention_free']:.1%} by the pattern trained without attention; mean shift of "
            f"its entries {row['shift_found']:.4f}, rebuilt {row['shift_rebuilt']:.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
