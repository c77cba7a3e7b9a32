"""What a probe of sparse attention costs, in dense forwards of the same examples.

    python benchmarks/probe.py [--task lra-image] [--examples 32] [--precision fp32] [--rounds 9]

Both are forwards without gradient of one micro-batch: the dense model with its statistics, pooled
only and whole, and the sparse one with a probe of each layer, which computes dense attention, its
pooled statistics and the sparse attention. They take turns; medians, and the ratio of each round.
With OMP_NUM_THREADS=1 it is the thread's CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from models import ModelConfig, StatisticsRequest, build_model
from sparsity import select_blocks
from sparsity.observe import Observation
from training import memory
from training.forward import autocast
from training.settings import build_config

POOLED, WHOLE, PROBE = "dense, pooled statistics", "dense, whole statistics", "sparse, probed"


def forwards(model: ModelConfig, examples: int, precision: str):
    """What is timed, by name."""
    torch.manual_seed(0)
    dense = build_model(model)
    sparse = copy.deepcopy(dense)
    blocks = select_blocks("random", Observation(dense.pattern_scores()), model.density, 0)
    sparse.enter_sparse_phase(blocks)
    ids = [
        torch.randint(1, model.vocab_size, (examples, model.padded_length))
        for _ in range(model.num_inputs)
    ]
    requests = {
        POOLED: (dense, StatisticsRequest(full=False)),
        WHOLE: (dense, StatisticsRequest()),
        PROBE: (sparse, StatisticsRequest(probe=True)),
    }

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    @torch.no_grad()
    def forward(name: str) -> float:
        module, request = requests[name]
        started = clock()
        with autocast(torch.device("cpu"), precision):
            module(*ids, statistics=request)
        return clock() - started

    return list(requests), forward


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="lra-image", choices=[*Config])
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    memory.keep_freed_memory()
    model = build_config(args.task, Config[args.task])[0].model
    names, forward = forwards(model, args.examples, args.precision)
    for name in names:
        forward(name)
    rounds = [{name: forward(name) for name in names} for _ in range(args.rounds)]
    print(
        f"{args.task}, {args.examples} examples, {args.precision}, {torch.get_num_threads()} "
        f"threads, median of {args.rounds}"
    )
    for name in names:
        milliseconds = statistics.median(row[name] for row in rounds) * 1e3
        ratios = sorted(row[PROBE] / row[name] for row in rounds)
        print(
            f"{name:26} {milliseconds:8.1f} ms   a probe takes {statistics.median(ratios):.2f} "
            f"of it ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
