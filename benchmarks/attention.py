"""Attention kernels against what PyTorch offers: correctness, then time and memory.

    python benchmarks/attention.py [--shapes image,listops,retrieval] [--rounds 7] [--json FILE]

Contenders take turns, one call each a round, so a busy machine hurts them all alike; a table
gives medians and the spread (half the distance between quartiles). Forward is without autograd;
backward is timed alone, forward+backward is their sum. Before anything is timed, every contender's
output and gradients are compared with a float64 restatement of what it should compute.

    torch       probabilities materialised, [B, H, N, N], fp32
    sdpa        scaled_dot_product_attention, fp32 (the baseline of the ratios) and bf16
    gather      the backend `reference`: kept blocks gathered, bmm, fp32
    flex        compiled FlexAttention, forward only, fp32
    sparse      ours with the shape's density, fp32 and bf16
    dense       ours with every block kept, fp32 and bf16
    statistics  ours, [4, N, N] means (added to those of the call before, as a step's micro-batches
                are) and pooled moments; `pooled` without the means. No backward

FLOPs are those of the products on kept blocks (backward: 2.5 times the forward); "of sgemm" is the
share of what torch's fp32 matrix product reaches in the same rounds (1024 cubed). Peak memory is
that of one forward+backward in a process of its own. The process keeps freed memory (MALLOC_*
below): with glibc's defaults most of the time of `torch` would be page faults.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
SHAPES = {  # B, H, N, d, block_size, density
    "image": (16, 2, 1024, 32, 32, 0.05),
    "listops": (8, 2, 2048, 32, 64, 0.04),
    "retrieval": (4, 2, 4096, 32, 64, 0.021),
}
CONTENDERS = [
    *("torch", "sdpa", "sdpa-bf16", "gather", "flex", "sparse", "sparse-bf16"),
    *("dense", "dense-bf16", "statistics", "statistics-bf16", "pooled"),
]
SCALING = [1024 * 2**i for i in range(7)]
SECONDS = 8.0  # a contender that has used so much gets no further round, from the third on


class Problem:
    """Inputs of one shape, cut from a fused projection [B, N, 3, H, d] as in the model."""

    def __init__(self, shape, device):
        import torch

        from kernels import BlockLayout

        self.B, self.H, self.N, self.d, self.bs, density = shape
        generator = torch.Generator().manual_seed(0)
        nb = self.N // self.bs
        kept = torch.rand(nb * nb, generator=generator).topk(int(density * nb * nb)).indices
        mask = torch.zeros(nb * nb, dtype=torch.bool)
        mask[kept] = True
        self.layout = BlockLayout.from_mask(mask.view(nb, nb), self.bs).to(device)
        self.qkv = torch.randn(self.B, self.N, 3, self.H, self.d, generator=generator).to(device)
        self.dout = torch.randn(self.B, self.N, self.H, self.d, generator=generator).to(device)

    def inputs(self, dtype, examples=None):
        qkv = self.qkv[:examples].to(dtype)
        inputs = [x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2)]
        return inputs, self.dout[:examples].to(dtype).transpose(1, 2)


def contender(name: str, problem: Problem):
    """(function of query, key, value; dtype; does it have a backward; which blocks it keeps)."""
    import torch
    import torch.nn.functional as F

    import kernels

    kind = name.removesuffix("-bf16")
    dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
    bs, layout, device = problem.bs, problem.layout, problem.qkv.device
    ours = "cpu" if device.type == "cpu" else "cuda"
    if kind == "torch":
        return lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v, dtype, True, "all"
    if kind == "sdpa":
        return F.scaled_dot_product_attention, dtype, True, "all"
    if kind == "gather":

        def gather(q, k, v):
            return kernels.block_sparse_attention(q, k, v, layout, backend="reference")

        return gather, dtype, True, "kept"
    if kind == "sparse":

        def sparse(q, k, v):
            return kernels.block_sparse_attention(q, k, v, layout, backend=ours)

        return sparse, dtype, True, "kept"
    if kind == "dense":
        return lambda q, k, v: kernels.dense_attention(q, k, v, backend=ours), dtype, True, "all"
    if kind == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block_mask = layout.block_mask.to(device)

        def keep(b, h, i, j):
            return block_mask[i // bs, j // bs]

        mask = create_block_mask(
            keep, None, None, problem.N, problem.N, device=device.type, BLOCK_SIZE=bs
        )
        compiled = torch.compile(flex_attention)

        def flex(*qkv):  # refuses inputs with gradients on a CPU
            return compiled(*(x.detach() for x in qkv), block_mask=mask)

        return flex, dtype, False, "masked"
    groups = math.gcd(4, problem.B)
    full = kind == "statistics"
    out = torch.zeros(groups, problem.N, problem.N, device=device) if full else None

    def take_statistics(q, k, v):
        n = math.gcd(groups, len(q))
        return kernels.attention_statistics(
            q, k, block_size=bs, groups=n, full=full, mean_out=None if out is None else out[:n],
            backend=ours,
        )  # fmt: skip

    return take_statistics, dtype, False, "statistics"


# ---- correctness -------------------------------------------------------------------------------


def check(name: str, problem: Problem) -> None:
    """Compares one example with float64. Raises SystemExit if it is wrong."""
    import torch

    function, dtype, backward, blocks = contender(name, problem)
    examples = problem.B if name == "flex" else 1  # compiled for its shape
    (q, k, v), dout = problem.inputs(dtype, examples)
    exact = [x.detach()[:1].double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT * problem.d**-0.5
    if blocks in ("kept", "masked"):
        kept = problem.layout.block_mask.repeat_interleave(problem.bs, 0)
        kept = kept.repeat_interleave(problem.bs, 1)
        scores = scores.masked_fill(~kept, 0 if blocks == "kept" else -math.inf)
        probs = (scores.softmax(-1) * kept).nan_to_num(0)
    else:
        probs = scores.softmax(-1)
    if blocks == "statistics":
        found = function(q, k, v)
        pairs = [
            (found.pooled_mean, torch.nn.functional.avg_pool2d(probs, problem.bs).mean((0, 1)))
        ]
        if found.mean_attention is not None:
            pairs.append((found.mean_attention[0], probs.mean((0, 1))))
    else:
        out, expected = function(q, k, v), probs @ exact[2]
        pairs = [(out[:1], expected)]
        if backward:
            ours = torch.autograd.grad(out, (q, k, v), dout)
            pairs += zip(ours, torch.autograd.grad(expected, exact, dout.double()), strict=True)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, right in pairs:
        error = ((ours.double() - right).abs().max() / right.abs().max()).item()
        if not error < tolerance:
            raise SystemExit(f"error: {name} is wrong, its relative error is {error:.2g}")


# ---- memory ------------------------------------------------------------------------------------


def peak_memory(name: str, shape, device: str) -> float:
    """MiB that one forward+backward adds, in a child process that has computed nothing yet."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import torch

            problem = Problem(shape, "cpu")
            function, dtype, backward, _ = contender(name, problem)
            inputs, dout = problem.inputs(dtype)
            before = int(_status("VmRSS"))
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            out = function(*inputs)
            if backward:
                torch.autograd.grad(out, inputs, dout)
            os.write(write, f"{(_status('VmHWM') - before) / 1024:.1f}".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    if status or not answer:
        raise SystemExit(f"error: measuring the memory of {name} failed")
    return float(answer)


def _status(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise KeyError(field)


# ---- time --------------------------------------------------------------------------------------


def clock(function, device: str) -> float:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(problem: Problem, names: list[str], rounds: int, device: str) -> dict[str, dict]:
    """Seconds of every round: name -> {"forward": [...], "backward": [...]}; "sgemm" too."""
    import torch

    square = torch.randn(1024, 1024, device=device)
    calls = {"sgemm": {"forward": lambda: square @ square}}
    for name in names:
        function, dtype, backward, _ = contender(name, problem)
        inputs, dout = problem.inputs(dtype)

        def forward(function=function, inputs=inputs):
            with torch.no_grad():
                function(*inputs)

        calls[name] = {"forward": forward}
        forward()
        if backward:
            out = function(*inputs)

            def backward_only(out=out, inputs=inputs, dout=dout):
                torch.autograd.grad(out, inputs, dout, retain_graph=True)

            calls[name]["backward"] = backward_only
            backward_only()
    seconds: dict[str, dict] = {
        name: {part: [] for part in parts} for name, parts in calls.items()
    }
    for _ in range(rounds):
        for name, parts in calls.items():
            used = sum(sum(times) for times in seconds[name].values())
            if used > SECONDS and len(seconds[name]["forward"]) >= 3:
                continue
            for part, call in parts.items():
                repeats = 10 if name == "sgemm" else 1
                seconds[name][part].append(min(clock(call, device) for _ in range(repeats)))
    return seconds


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


def rows_of(shape_name: str, problem: Problem, seconds, memory) -> list[dict]:
    sgemm = 2 * 1024**3 / statistics.median(seconds["sgemm"]["forward"]) / 1e9
    base = seconds.get("sdpa")
    rows = []
    for name in seconds:
        if name == "sgemm":
            continue
        times = {part: statistics.median(values) for part, values in seconds[name].items()}
        kept = ("gather", "flex", "sparse")
        blocks = problem.layout.num_active * problem.bs**2
        pairs = blocks if name.removesuffix("-bf16") in kept else problem.N**2
        flops = 4 * problem.B * problem.H * pairs * problem.d
        row = {"shape": shape_name, "contender": name, "rounds": len(seconds[name]["forward"])}
        row["memory_mib"] = memory.get(name)
        row["sgemm_gflops"] = sgemm
        for part, factor in (("forward", 1.0), ("backward", 2.5)):
            if part in times:
                row[f"{part}_ms"] = times[part] * 1e3
                row[f"{part}_spread_ms"] = spread(seconds[name][part]) * 1e3
                if not name.startswith(("statistics", "pooled")):
                    row[f"{part}_of_sgemm"] = factor * flops / times[part] / 1e9 / sgemm
        if base:
            base_forward, base_backward = (statistics.median(base[p]) for p in base)
            row["forward_ratio"] = base_forward / times["forward"]
            if "backward" in times:
                total = times["forward"] + times["backward"]
                row["ratio"] = (base_forward + base_backward) / total
        rows.append(row)
    return rows


def scaling(rounds: int, device: str) -> list[dict]:
    """Ours at 4 blocks of 64 a row, N from 1k to 64k: time and memory for each token."""
    rows = []
    for N in SCALING:
        shape = (1, 2, N, 32, 64, 4 * 64 / N)
        memory = peak_memory("sparse", shape, device) if device == "cpu" else None
        rows.append({"N": N, "memory_mib": memory, "shape": shape})
    for row in rows:
        problem = Problem(row.pop("shape"), device)
        times = measure(problem, ["sparse"], rounds, device)["sparse"]
        row["milliseconds"] = sum(statistics.median(t) for t in times.values()) * 1e3
        row["microseconds_a_token"] = row["milliseconds"] * 1e3 / row["N"]
    return rows


def number(value, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_tables(rows: list[dict], scale: list[dict]) -> None:
    print(
        "| shape | contender | forward ms | backward ms | of sgemm f / b | f x sdpa | f+b x sdpa "
        "| peak MiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [row["shape"], row["contender"]]
        for part in ("forward", "backward"):
            value, error = row.get(f"{part}_ms"), row.get(f"{part}_spread_ms")
            cells.append("-" if value is None else f"{value:.2f} ± {error:.2f}")
        shares = (row.get(f"{part}_of_sgemm") for part in ("forward", "backward"))
        cells.append(" / ".join(number(share, ".0%") for share in shares))
        cells += [number(row.get("forward_ratio"), ".2f"), number(row.get("ratio"), ".1f")]
        cells.append(number(row["memory_mib"], ".0f"))
        print("| " + " | ".join(cells) + " |")
    if scale:
        print("\n| N, 4 blocks of 64 a row | f+b ms | µs a token | peak MiB |")
        print("| --- | --- | --- | --- |")
        for row in scale:
            print(
                f"| {row['N']} | {row['milliseconds']:.2f} | {row['microseconds_a_token']:.2f} "
                f"| {number(row['memory_mib'], '.1f')} |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=7, help="calls of each contender")
    parser.add_argument("--threads", type=int, help="of torch; default all cores")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no_scaling", action="store_true", help="leave out N = 1k to 64k")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark-attention.json"))
    args = parser.parse_args()
    shapes, names = args.shapes.split(","), args.contenders.split(",")
    for asked, known in ((shapes, SHAPES), (names, CONTENDERS)):
        unknown = [name for name in asked if name not in known]
        if unknown:
            parser.error(f"there is no {', '.join(unknown)}; choose of {', '.join(known)}")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})

    import torch

    import kernels
    from kernels import native

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    reason = kernels.available_backends()[args.device]
    if reason is not True:
        parser.error(f"backend {args.device}: {reason}")
    if args.threads:
        torch.set_num_threads(args.threads)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    header = {
        "commit": commit or "unknown",
        "command": " ".join(["python", *sys.argv]),
        "device": _cpu_name() if args.device == "cpu" else torch.cuda.get_device_name(),
        "isa": _instruction_sets(native.isa()) if args.device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    memory = {}
    if args.device == "cpu":  # before anything computes: a child cannot inherit running threads
        for shape in shapes:
            print(f"{shape}: measuring memory", file=sys.stderr)
            memory[shape] = {
                name: peak_memory(name, SHAPES[shape], "cpu") for name in names if name != "flex"
            }
    scale = [] if args.no_scaling else scaling(args.rounds, args.device)
    rows = []
    for shape in shapes:
        problem = Problem(SHAPES[shape], args.device)
        for name in names:
            print(f"{shape}: checking {name}", file=sys.stderr)
            check(name, problem)
        print(f"{shape}: timing", file=sys.stderr)
        seconds = measure(problem, names, args.rounds, args.device)
        rows += rows_of(shape, problem, seconds, memory.get(shape, {}))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = {**header, "shapes": SHAPES, "rows": rows, "scaling": scale}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{key}: {value}" for key, value in header.items()))
    print(f"the same as JSON: {args.json}\n")
    print_tables(rows, scale)
    return 0


def _instruction_sets(best: str) -> str:
    """What computes fp32 and bf16: beyond avx512 instruction sets multiply bf16 only."""
    return f"{best} for bf16, avx512 for fp32" if best in ("avx512_bf16", "amx") else best


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
