"""Attention of two checkouts in turns: which is faster, and by how much.

    git worktree add ../before COMMIT && (cd ../before && sh compile.sh)
    python benchmarks/compare.py ../before

Each checkout runs the contenders of its own benchmarks/attention.py in a process of its own. They
take turns, so that a machine that slows down slows both. With one thread the CPU time of that
thread counts, else wall time. Printed: lower quartiles in ms, before and now, and the ratio of the
quartiles (in brackets of the medians).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = "sparse,sparse-bf16,dense,dense-bf16,statistics,statistics-bf16"

# Reads a shape, a contender and a number of calls a line; writes seconds [forward, backward] each.
WORKER = """
import json, sys, time
root, threads = sys.argv[1], int(sys.argv[2])
sys.path[:0] = [root, root + "/benchmarks"]
import torch, attention
torch.set_num_threads(threads)
now = time.thread_time if threads == 1 else time.perf_counter
prepared = {}
print("ready", flush=True)
for line in sys.stdin:
    shape, name, calls = json.loads(line)
    if (shape, name) not in prepared:
        problem = attention.Problem(attention.SHAPES[shape], "cpu")
        function, dtype, differentiable, _ = attention.contender(name, problem)
        prepared[shape, name] = function, *problem.inputs(dtype), differentiable
    function, inputs, dout, differentiable = prepared[shape, name]
    seconds = []
    for _ in range(calls):
        begin = now()
        out = function(*inputs)
        middle = now()
        if differentiable:
            torch.autograd.grad(out, inputs, dout)
        seconds.append((middle - begin, now() - middle))
    print(json.dumps(seconds), flush=True)
"""


class Checkout:
    """A process that runs the calls of one checkout."""

    def __init__(self, folder: Path, threads: int) -> None:
        # freed memory stays with the process: fresh pages would cost more than some calls
        tuned = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | tuned,
        )
        self._answer()

    def seconds(self, shape: str, name: str, calls: int) -> list[list[float]]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([shape, name, calls]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("error: a checkout's process ended, see above")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout, compiled")
    parser.add_argument("--shapes", default="image,listops,retrieval")
    parser.add_argument("--names", default=NAMES, help=f"contenders (default {NAMES})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8, help="of each row")
    args = parser.parse_args()
    checkouts = [Checkout(folder.resolve(), args.threads) for folder in (args.before, ROOT)]
    for shape in args.shapes.split(","):
        for name in args.names.split(","):
            found: tuple[list, list] = [], []
            for checkout in checkouts:
                checkout.seconds(shape, name, 1)
            end, turn = time.monotonic() + args.seconds, 0
            while time.monotonic() < end or turn < 6:
                for which in (0, 1) if turn % 2 else (1, 0):
                    found[which].extend(checkouts[which].seconds(shape, name, 5))
                turn += 1
            print(f"{shape:10}{name:17}", *compared(*found), flush=True)


def compared(before: list[list[float]], now: list[list[float]]) -> Iterator[str]:
    """Text for each part of the calls. Arguments: seconds of the calls, [forward, backward]."""
    for part, of in (("forward", lambda x: x[0]), ("backward", lambda x: x[1]), ("both", sum)):
        times = [[1e3 * of(call) for call in calls] for calls in (before, now)]
        old, new = (statistics.quantiles(x, n=4)[0] for x in times)
        if new < 0.01:  # there is no such pass
            continue
        medians = statistics.median(times[0]) / statistics.median(times[1])
        yield f"{part} {old:7.2f}{new:8.2f} {old / new:5.2f}x ({medians:.2f})  "


if __name__ == "__main__":
    main()
