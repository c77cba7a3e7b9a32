"""Block-sparse attention on a GPU against what else there is; its limits, computed, without one.

    python benchmarks/attention_cuda.py [--dtype bf16] [--shapes image,retrieval] [--json FILE]
    python benchmarks/attention_cuda.py --limits            (no GPU needed)

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size.

Contenders: `cuda` and `triton`, our two backends; `sdpa`, torch's dense
scaled_dot_product_attention, and `cudnn`, the same made to take cuDNN's kernel; `flex`, compiled
FlexAttention on the same blocks (in tiles of 128: finer blocks by its mask function, an ordinary
softmax); `reference`, gathered blocks in plain torch; `csr`, the original's way in fp32: cuSPARSE
products on an element CSR that keeps every probability. Each that computes our softmax is compared
with `reference` before it is timed. They take turns; milliseconds are medians over rounds,
measured with CUDA events; spread is (90 % - 10 % quantile) / median. `graph ms` is the replay of a
CUDA graph, the kernels alone; `ms` is the call from Python.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # B, H, N, d, bs, density
    "image": (16, 2, 1024, 32, 32, 0.05),
    "listops": (8, 2, 2048, 32, 64, 0.04),
    "retrieval": (4, 2, 4096, 32, 64, 0.021),
    "image-256": (256, 2, 1024, 32, 32, 0.05),
}
GRAPHED = {"sdpa", "cudnn", "cuda", "triton"}  # contenders that are timed as CUDA graphs too
# An H100 SXM by its data sheet; exponentials: 16 a clock on 132 multiprocessors at 1.755 GHz.
PEAK = {"bf16": 989e12, "fp16": 989e12, "fp32": 495e12 / 3}  # fp32: three tf32 products each
BYTES_A_SECOND = 3.35e12
EXPONENTIALS_A_SECOND = 16 * 132 * 1.755e9


def kept_blocks(length: int, block_size: int, density: float) -> int:
    return int(density * (length // block_size) ** 2)


def limits(shape: tuple, dtype: str, backward: bool) -> dict[str, float]:
    """Least microseconds that an H100 needs for arithmetic, memory and exponentials."""
    B, H, N, d, bs, density = shape
    scores = B * H * kept_blocks(N, bs, density) * bs * bs
    element = 4 if dtype == "fp32" else 2
    tensor = B * H * N * d * element
    # Forward 2 products; by rows 3 and by columns 4, as scores and probabilities are recomputed.
    flops = (2 + 7 * backward) * 2 * scores * d
    # q k v out; then q k v out dout, dq and, again, q k v dout, dk dv.
    memory = (4 + 12 * backward) * tensor
    return {
        "arithmetic": 1e6 * flops / PEAK[dtype],
        "memory": 1e6 * memory / BYTES_A_SECOND,
        "exponentials": 1e6 * scores * (1 + 2 * backward) / EXPONENTIALS_A_SECOND,
    }


def statistics_limits(shape: tuple, dtype: str) -> dict[str, float]:
    """The same for attention_statistics: two passes over all scores, one mean [N, N] written."""
    B, H, N, d, *_ = shape
    scores = B * H * N * N
    element = 4 if dtype == "fp32" else 2
    return {
        "arithmetic": 1e6 * 2 * 2 * scores * d / PEAK[dtype],
        "memory": 1e6 * (2 * 2 * B * H * N * d * element + 4 * N * N) / BYTES_A_SECOND,
        "exponentials": 1e6 * 2 * scores / EXPONENTIALS_A_SECOND,
    }


def print_limits() -> None:
    print("H100 SXM, data-sheet peaks; microseconds; the largest of the three bounds a pass below")
    print(
        f"{'shape':20}{'dtype':6}{'pass':18}{'arithmetic':>12}{'memory':>10}{'exponentials':>14}"
    )
    for name, shape in SHAPES.items():
        for dtype in ("bf16", "fp32"):
            rows = {
                "forward": limits(shape, dtype, False),
                "forward+backward": limits(shape, dtype, True),
                "statistics": statistics_limits(shape, dtype),
            }
            for what, row in rows.items():
                numbers = f"{row['arithmetic']:12.2f}{row['memory']:10.2f}"
                print(f"{name:20}{dtype:6}{what:18}{numbers}{row['exponentials']:14.2f}")

    print(
        "\nlra-image's columns on 924 blocks at a time, when they end over even work (simulated)"
    )
    print(f"{'kept blocks':20}{'heads':>6}{'in their order':>16}{'longest first':>16}")
    generator = random.Random(0)
    places = generator.choices(range(32), k=51)
    counts = [places.count(column) for column in range(32)]
    for name, tiles in (("random", counts), ("a full column", [1] * 20 + [32] + [0] * 11)):
        for heads in (1024, 256, 128):
            ends = f"{schedule(tiles, heads, False):16.2f}{schedule(tiles, heads, True):16.2f}"
            print(f"{name:20}{heads:6}{ends}")


def schedule(tiles: list[int], heads: int, longest_first: bool) -> float:
    """When the last thread block ends, over the time that even work would take.

    tiles: of each column; a block's set-up counts as 1.6 more. 7 blocks on each of 132
    multiprocessors at a time; 190 heads are what half of an H100's L2 cache holds.
    """
    free_at, total, end = [0.0] * (7 * 132), 0.0, 0.0
    together = -(-heads // -(-heads // 190)) if longest_first else 1
    for first in range(0, heads, together):
        for count in sorted(tiles, reverse=True) if longest_first else tiles:
            for _ in range(min(together, heads - first)):
                begin = heapq.heappop(free_at)
                heapq.heappush(free_at, begin + 1.6 + count)
                end, total = max(end, begin + 1.6 + count), total + 1.6 + count
    return end / (total / len(free_at))


# ---- contenders ------------------------------------------------------------------------


class Csr:
    """The original's way: element CSR, cuSPARSE products, probabilities kept; fp32."""

    def __init__(self, layout):
        import torch

        kept = layout.block_mask.repeat_interleave(layout.block_size, 0)
        kept = kept.repeat_interleave(layout.block_size, 1)
        self.pattern = kept.float().to_sparse_csr()
        self.rows = kept.nonzero()[:, 0]
        self.pruned = (layout.length - kept.sum(1)).float()
        self.length, self.torch = layout.length, torch

    def _csr(self, values):
        pattern = self.pattern
        return self.torch.sparse_csr_tensor(
            pattern.crow_indices(), pattern.col_indices(), values, pattern.shape
        )

    def _products(self, a, b):
        """a b^T at the kept elements."""
        zero = self._csr(self.torch.zeros_like(self.pattern.values()))
        return self.torch.sparse.sampled_addmm(zero, a, b.t()).values()

    def _row_sums(self, values):
        return values.new_zeros(self.length).index_add_(0, self.rows, values)

    def step(self, query, key, value, dout=None):
        """out, or dq, dk, dv: one (batch, head) after the other, as its loop does."""
        torch, scale = self.torch, query.shape[-1] ** -0.5
        results = []
        heads = [x.float().flatten(0, 1) for x in (query, key, value)]
        douts = [None] * len(heads[0]) if dout is None else dout.float().flatten(0, 1)
        for q, k, v, do in zip(*heads, douts, strict=True):
            exps = (self._products(q, k) * scale).exp()
            probs = exps / (self._row_sums(exps) + self.pruned)[self.rows]
            if do is None:
                results.append((self._csr(probs) @ v,))
                continue
            dprobs = self._products(do, v)
            dscores = probs * (dprobs - self._row_sums(probs * dprobs)[self.rows]) * scale
            transposed = [self._csr(x).to_sparse_coo().t().coalesce() for x in (probs, dscores)]
            results.append((self._csr(dscores) @ k, transposed[1] @ q, transposed[0] @ do))
        return [torch.stack(x).view_as(query) for x in zip(*results, strict=True)]


def contenders(shape: tuple, dtype) -> tuple[dict[str, Callable], Callable]:
    """name -> function(backward) that computes once; and a check of those with our softmax."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from kernels import BlockLayout, available_backends, block_sparse_attention

    B, H, N, d, bs, density = shape
    generator = torch.Generator().manual_seed(0)
    nb = N // bs
    mask = torch.zeros(nb * nb, dtype=torch.bool)
    mask[torch.randperm(nb * nb, generator=generator)[: kept_blocks(N, bs, density)]] = True
    layout = BlockLayout.from_mask(mask.view(nb, nb), bs).to("cuda")
    query, key, value, dout = (
        torch.randn(B, H, N, d, generator=generator).to("cuda", dtype) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    kept = layout.block_mask
    flex_mask = create_block_mask(
        lambda b, h, q, k: kept[q // bs, k // bs], None, None, N, N, device="cuda"
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    csr = Csr(layout)

    def differentiated(function):
        def run(backward):
            if not backward:
                with torch.no_grad():
                    return [function(*leaves)]
            out = function(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        return run

    def run_csr(backward):
        with torch.no_grad():
            return csr.step(query, key, value, dout if backward else None)

    def cudnn(*qkv):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(*qkv)

    functions = {
        "sdpa": differentiated(F.scaled_dot_product_attention),
        "cudnn": differentiated(cudnn),
        "flex": differentiated(lambda *qkv: compiled(*qkv, block_mask=flex_mask)),
        "csr": run_csr,
        "reference": differentiated(
            lambda *qkv: block_sparse_attention(*qkv, layout, backend="reference")
        ),
        **{
            name: differentiated(partial(_ours, layout, name))
            for name in ("cuda", "triton")
            if available_backends()[name] is True
        },
    }
    if dtype == torch.float32:  # which cuDNN's attention does not take
        del functions["cudnn"]
    choice = torch._fused_sdp_choice(query, key, value)
    print(f"sdpa takes {SDPBackend(choice).name.lower()} for {shape}")

    def check() -> None:
        exact = functions["reference"](True)
        for name in {"cuda", "triton", "csr"} & set(functions):
            got = functions[name](True)
            for a, b in zip(got[-3:], exact[-3:], strict=True):
                error = (a.float() - b.float()).abs().max() / b.float().abs().max()
                if not error < 0.03:  # NaN fails too
                    sys.exit(f"error: {name} is wrong by {error:.3g} of the largest gradient")

    return functions, check


def _ours(layout, backend: str, *qkv):
    from kernels import block_sparse_attention

    return block_sparse_attention(*qkv, layout, backend=backend)


def captured(function: Callable, backward: bool) -> Callable:
    """The function as the replay of a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(backward)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(backward)
    return lambda backward: graph.replay()


def measure(function: Callable, backward: bool) -> tuple[float, int]:
    """Milliseconds of one call, and its peak memory in bytes beyond its inputs."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function(backward)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "attention_cuda.json")
    parser.add_argument("--limits", action="store_true", help="only print what an H100 allows")
    args = parser.parse_args()
    if args.limits:
        print_limits()
        return
    names = args.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"--shapes: no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")
    import torch

    from kernels import available_backends

    reasons = [available_backends()[name] for name in ("cuda", "triton")]
    if True not in reasons:
        parser.error(f"nothing to measure: {'; '.join(map(str, reasons))}")
    ours = "cuda" if reasons[0] is True else "triton"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit}")
    rows = []
    for name in names:
        functions, check = contenders(SHAPES[name], dtype)
        check()
        times: dict[tuple[str, bool], list[float]] = {}
        peaks: dict[tuple[str, bool], int] = {}
        graphs = {
            (contender, backward): captured(functions[contender], backward)
            for contender in functions.keys() & GRAPHED
            for backward in (False, True)
        }
        replays: dict[tuple[str, bool], list[float]] = {at: [] for at in graphs}
        for turn in range(args.rounds + 3):  # the first three warm up
            for contender, function in functions.items():
                for backward in (False, True):
                    taken, peak = measure(function, backward)
                    if turn >= 3:
                        times.setdefault((contender, backward), []).append(taken)
                        peaks[contender, backward] = peak
                    if graph := graphs.get((contender, backward)):
                        replays[contender, backward].append(measure(graph, backward)[0])
        for (contender, backward), taken in times.items():
            median = statistics.median(taken)
            ninths = statistics.quantiles(taken, n=10)
            limit = max(limits(SHAPES[name], args.dtype, backward).values())
            rows.append(
                {
                    "shape": name,
                    "contender": contender,
                    "pass": "forward+backward" if backward else "forward",
                    "ms": median,
                    "graph_ms": (
                        statistics.median(replays[contender, backward][3:])
                        if (contender, backward) in graphs
                        else None
                    ),
                    "spread": (ninths[-1] - ninths[0]) / median,
                    "peak_mib": peaks[contender, backward] / 2**20,
                    "over_ours": median / statistics.median(times[ours, backward]),
                    "h100_limit_ms": limit / 1000,
                }
            )
    header = {"card": card, "dtype": args.dtype, "commit": commit, "torch": torch.__version__}
    args.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    print(f"{args.dtype}; x: ms over those of {ours}")
    print(
        f"{'shape':20}{'contender':11}{'pass':18}{'ms':>9}{'graph ms':>9}{'spread':>8}{'MiB':>8}"
        f"{'x':>8}"
    )
    for row in rows:
        graph = f"{row['graph_ms']:9.3f}" if row["graph_ms"] is not None else f"{'-':>9}"
        numbers = f"{row['ms']:9.3f}{graph}{row['spread']:8.2f}{row['peak_mib']:8.0f}"
        print(
            f"{row['shape']:20}{row['contender']:11}{row['pass']:18}{numbers}{row['over_ours']:8.2f}"
        )


if __name__ == "__main__":
    main()
