"""Milliseconds a sample of whole training steps, ours against plain PyTorch.

    python benchmarks/step.py [--task lra-image] [--contenders a,d] [--rounds 5] [--json FILE]
    python benchmarks/step.py --device cuda --batch 512 --micro_batches 128,512
    python benchmarks/step.py --contenders c,d,e --before ../before     # a compiled checkout

A step is what training does: forward, backward, clipping, AdamW; in dense phases also the
attention statistics, the pattern loss and the transition criterion (timed apart and spread over
the task's own batch). Contenders, each in its own process, take turns: a busy machine hurts
them all alike:

    a       the reference's algorithm in PyTorch: attention materialised as [B, H, N, N], fp32
    b, b16  the same model with PyTorch's scaled_dot_product_attention, no statistics, fp32, bf16
    c       ours, dense phase with all its statistics, fp32
    d, e    ours, sparse phase, fp32 and bf16
    c0 ...  with --before, the same of another checkout, by its own benchmarks/step.py

b16 is left out by default where the CPU cannot multiply bf16: it takes seconds a sample there. On
a GPU a time ends when the device is done, and there is no profile by operator.
Every process keeps freed memory (MALLOC_* below): with glibc's defaults each large tensor is given
back to the system and faulted in again, which costs the plain contenders most. Each contender
uses the micro-batch that is fastest for it among --micro_batches. Before it is timed, each
contender's loss must agree with a restatement (`check`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = {
    "a": "reference in torch, fp32",
    "b": "torch SDPA, fp32",
    "b16": "torch SDPA, bf16",
    "c": "ours, dense, fp32",
    "d": "ours, sparse, fp32",
    "e": "ours, sparse, bf16",
}
OURS = ("c", "d", "e")
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


# ---- a and b: the model in plain PyTorch -------------------------------------------------------


def plain_step(model, task, ids, ids_1, labels, materialised, dropout):
    """Loss of one micro-batch, from the parameters of our model (the reference's names).

    materialised: attention as the reference computes it, with the pattern loss; else SDPA and
    nothing else. Returns (loss, per layer the mean attention [N, N] or None).
    """
    import torch
    import torch.nn.functional as F

    config = task.model
    means: list[Any] = []

    def attention(layer, x, real, collect):
        B, N, _ = x.shape
        q, k, v = (
            getattr(layer.mha, name)(x)
            .view(B, N, config.num_head, config.head_dim)
            .transpose(1, 2)
            for name in ("W_q", "W_k", "W_v")
        )
        loss = 0.0
        if materialised:
            scores = torch.matmul(q, k.transpose(-2, -1)) / config.head_dim**0.5
            if real is not None:
                scores = scores - 1e6 * (1.0 - real[:, None, None, :].to(scores.dtype))
            probs = torch.softmax(scores, dim=-1)
            out = torch.matmul(probs, v)
            fixed = probs.detach()
            pooled = F.avg_pool2d(fixed, config.block_size)
            pattern = layer.mha.pattern
            loss = F.mse_loss(pooled, (pattern @ pattern.T).expand_as(pooled))
            if collect:
                means.append(fixed.mean(dim=(0, 1)))
        else:
            keys = None if real is None else real[:, None, None, :]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return layer.mha.ff(out.transpose(1, 2).reshape(B, N, -1)), loss

    def encode(tokens, collect):
        encoder = model.model
        tables = encoder.embeddings
        real = tokens != 0
        x = F.dropout(F.embedding(tokens, tables.word_table) + tables.position_table, dropout)
        pattern_loss = 0.0
        for layer in encoder.layers:
            branch, loss = attention(
                layer, layer.norm1(x), real if config.key_padding else None, collect
            )
            pattern_loss = pattern_loss + loss
            x = x + F.dropout(branch, dropout)
            hidden = F.dropout(F.gelu(layer.mlpblock["0"](layer.norm2(x))), dropout)
            x = x + F.dropout(layer.mlpblock["3"](hidden), dropout)
        x = encoder.norm(x) * real.unsqueeze(-1)
        return x.to(torch.promote_types(x.dtype, torch.float32)).mean(dim=1), pattern_loss

    pooled, loss = encode(ids, True)
    if ids_1 is None:
        logits = model.seq_classifer(pooled)
    else:
        pooled_1, loss_1 = encode(ids_1, False)
        logits = model.seq_classifer(pooled, pooled_1)
        loss = (loss + loss_1) / 2
    total = F.cross_entropy(logits, labels)
    if materialised:
        total = total + task.training.attn_loss_scale * config.num_layers * loss
    return total, means


class Plain:
    """Contenders a, b and b16."""

    def __init__(self, run, name: str) -> None:
        import torch

        self.run, self.materialised, self.bf16 = run, name == "a", name == "b16"
        parameters = list(run.model.parameters())
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, weight_decay=0.0)
        self.means = None

    def loss(self, begin: int, end: int, dropout: float):
        import numpy as np
        import torch

        from training.forward import to_device

        device = self.run.device
        batch = self.run.train_data.batch(np.arange(begin, end))
        ids, ids_1, labels = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return plain_step(
                self.run.model, self.run.config, ids, ids_1, labels, self.materialised, dropout
            )

    def step(self) -> None:
        import torch

        batch, micro = self.run.config.training.batch_size, self.run.options.micro_batch_size
        self.optimizer.zero_grad()
        for begin in range(0, batch, micro):
            end = min(begin + micro, batch)
            loss, means = self.loss(begin, end, self.run.config.model.dropout_prob)
            (loss * ((end - begin) / batch)).backward()
            if means:
                self.means = torch.stack(means)
        torch.nn.utils.clip_grad_value_(self.parameters, 1.0)
        self.optimizer.step()

    def criterion(self) -> None:
        """Skewness and distance of the four stacked means, as the reference has them."""
        import torch

        assert self.means is not None
        stacked = self.means.repeat(1, 4, 1)
        old = torch.zeros_like(stacked)
        for layer, before in zip(stacked, old, strict=True):
            (((layer - layer.mean()) / layer.std(unbiased=False)) ** 3).mean().item()
            torch.linalg.norm(layer - before).item()


class Ours:
    """Contenders c, d and e: the training loop's own step."""

    def __init__(self, run, name: str, pattern: str) -> None:
        from sparsity import select_blocks
        from sparsity.observe import Observation
        from training import loop

        self.run, self.loop = run, loop
        if name != "c":
            observation = Observation(run.model.pattern_scores())
            masks = select_blocks(pattern, observation, run.config.model.density)
            run.model.enter_sparse_phase(masks)
            run.phase_index = 1
            run.optimizer = run.new_optimizer()

    def step(self) -> None:
        self.result = self.loop.train_step(self.run)

    def criterion(self) -> None:
        if self.run.phase == "dense":
            self.loop.decide(self.run, self.result)


def make_contender(name: str, arguments: argparse.Namespace):
    """The contender's step and criterion, on random tokens; same weights for all."""
    import torch

    from config import Config
    from models import build_model
    from training.commands.dry_run import made_up_data
    from training.distributed import World
    from training.interrupt import StopSignal
    from training.recording.log import NullLog
    from training.run import Run, RunOptions
    from training.settings import build_config

    precision = "bf16" if name in ("b16", "e") else "fp32"
    flags = {
        "training.batch_size": arguments.batch,
        "training.skewness": 1e9,
        "run.precision": precision,
    }
    config, _ = build_config(arguments.task, Config[arguments.task], flags=flags)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    run = Run(
        config=config,
        options=RunOptions(
            micro_batch_size=arguments.micro_batches[0],
        ),
        paths=None,
        device=device,
        world=World(),
        log=NullLog(),
        model=build_model(config.model).to(device),
        train_data=made_up_data(config),
        dev_data=made_up_data(config),
        stop=StopSignal(),
    )
    return Plain(run, name) if name in ("a", "b", "b16") else Ours(run, name, arguments.pattern)


# ---- a worker: one contender in a process of its own -------------------------------------------


def check(name: str, contender) -> dict[str, float]:
    """This contender's loss on two examples, no dropout, against a restatement of its own kind.

    a, b, c: plain_step in float64. d, e: our model with backend "reference" in fp32.
    """
    import copy

    import numpy as np
    import torch
    import torch.nn.functional as F

    from training.forward import attention_loss, autocast, to_device

    run = contender.run
    ids, ids_1, labels = to_device(run.train_data.batch(np.arange(2)), run.device)

    def ours(model):
        with torch.no_grad(), autocast(run.device, run.config.run.precision):
            output = model(ids, ids_1)
        loss = F.cross_entropy(output.logits.float(), labels).double()
        if output.statistics is not None:
            loss += attention_loss(model, output, run.config.training.attn_loss_scale)
        return loss.item()

    if name in ("a", "b", "b16", "c"):
        wide = copy.deepcopy(run.model).double()
        with torch.no_grad():
            want = plain_step(wide, run.config, ids, ids_1, labels, name in ("a", "c"), 0.0)[
                0
            ].item()
    else:
        other = copy.deepcopy(run.model)
        for module in other.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
        want = ours(other)
    if isinstance(contender, Plain):
        with torch.no_grad():
            got = contender.loss(0, 2, 0.0)[0].item()
    else:
        got = ours(run.model)
    error = abs(got - want) / abs(want)
    allowed = 3e-3 if name in ("b16", "e") else 1e-5
    if not error <= allowed:
        raise AssertionError(f"contender {name}: loss {got} instead of {want}")
    return {"loss": got, "expected": want}


GROUPS = {  # the profiler's names (or how they begin) -> what a reader calls them
    "attention and its statistics": ("attention",),
    "projections": ("project",),
    "output projection, feed-forward, norms": ("layer",),
    "embedding, dropout, norm": ("embed_norm",),
    "mean over tokens": ("masked_mean",),
    "products of linear layers": ("aten::addmm", "aten::mm", "aten::linear", "mkldnn"),
    "optimizer, clipping": ("Optimizer", "aten::_foreach", "aten::_fused_adam", "aten::linalg"),
    "sums (bias gradients)": ("aten::sum", "aten::mean"),
    "copies, additions": ("aten::copy_", "aten::add", "aten::mul", "aten::to", "aten::fill_"),
}


def profile(contender, steps: int = 2) -> dict[str, float]:
    """Milliseconds of this thread by group and step, from torch's profiler (self time)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    started = time.perf_counter()
    with torch_profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            contender.step()
    total = (time.perf_counter() - started) / steps * 1e3
    found = dict.fromkeys(GROUPS, 0.0)
    for event in record.key_averages():
        for group, parts in GROUPS.items():
            if event.key.startswith(parts):
                found[group] += event.self_cpu_time_total / steps / 1e3
                break
    found["everything else"] = total - sum(found.values())
    return found


def work(arguments: argparse.Namespace) -> None:
    """Reads commands, one a line, and answers each with a line of JSON."""
    import torch

    torch.set_num_threads(arguments.threads)
    contender = make_contender(arguments.worker, arguments)
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    for line in sys.stdin:
        command, _, value = line.strip().partition(" ")
        answer: Any = None
        if command == "check":
            answer = check(arguments.worker, contender)
        elif command == "micro":
            contender.run.options.micro_batch_size = int(value)
        elif command in ("step", "criterion"):
            started = time.perf_counter()
            getattr(contender, command)()
            wait()
            answer = (time.perf_counter() - started) * 1e3
        elif command == "profile":
            answer = profile(contender)
        print(json.dumps(answer), flush=True)


# ---- limits ------------------------------------------------------------------------------------


def measure_machine(threads: int, device: str) -> dict[str, float]:
    """GFLOP/s of a large product in fp32 and bf16, GB/s of a copy beyond the caches."""
    import torch

    torch.set_num_threads(threads)

    def best(function, count=3):
        times = []
        for _ in range(count + 1):
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    found = {}
    sizes = (8192, 8192) if device == "cuda" else (2048, 512)
    for name, dtype, size in zip(
        ("fp32", "bf16"), (torch.float32, torch.bfloat16), sizes, strict=True
    ):
        x = torch.randn(size, size, device=device).to(dtype)
        found[f"gflops_{name}"] = 2 * size**3 / best(lambda x=x: x @ x) / 1e9
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_second"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    return found


def limits(task_name: str, machine: dict[str, float]) -> dict[str, float]:
    """Milliseconds a sample that a step cannot beat at the measured rates.

    flops: the products alone. bytes: every operation's inputs and outputs once through memory
    (28 token rows forward and 41 backward a layer, 11 for the embedding and the last norm), which
    caches can beat.
    """
    from config import Config
    from training.recording.provenance import flops
    from training.settings import build_config

    model = build_config(task_name, Config[task_name])[0].model
    found = {}
    for phase in ("dense", "sparse"):
        for dtype in ("fp32", "bf16"):
            rate = machine[f"gflops_{dtype}"] * 1e6
            found[f"{phase}_{dtype}_flops"] = flops(model, 1, phase)["step"] / rate
    row = 4 * model.transformer_dim * model.padded_length * model.num_inputs
    found["fp32_bytes"] = row * (69 * model.num_layers + 11) / machine["copy_gb_per_second"] / 1e6
    return found


# ---- the parent: lets the workers take turns ---------------------------------------------------


class Worker:
    """A contender's process."""

    def __init__(self, name: str, task: str, arguments: argparse.Namespace) -> None:
        micro = ",".join(map(str, arguments.micro_batches))
        own = name.removesuffix("0")
        root = ROOT if name == own else arguments.before.resolve()
        command = [
            sys.executable, str(root / "benchmarks/step.py"), "--worker", own, "--task", task,
            "--batch", str(arguments.batch), "--threads", str(arguments.threads),
            "--micro_batches", micro, "--pattern", arguments.pattern, "--device", arguments.device,
        ]  # fmt: skip
        environment = dict(os.environ, **MALLOC)
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.name} ended: see its message above")
        return json.loads(line)

    def choose_micro_batch(self, candidates: list[int]) -> int:
        times = {}
        for micro in candidates:
            self.ask(f"micro {micro}")
            self.ask("step")
            times[micro] = self.ask("step")
        best = min(times, key=times.__getitem__)
        self.ask(f"micro {best}")
        return best

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders of one task, interleaved. Times are ms a sample."""
    from config import Config

    spread_over = Config[task]["training"]["batch_size"]  # the criterion runs once a step
    names = list(arguments.contenders)
    if arguments.before is not None:
        names += [f"{name}0" for name in names if name in OURS]
    workers = [Worker(name, task, arguments) for name in names]
    results: dict[str, Any] = {}
    try:
        for worker in workers:
            results[worker.name] = {
                "check": worker.ask("check"),
                "micro_batch": worker.choose_micro_batch(arguments.micro_batches),
                "steps": [],
                "criteria": [],
            }
        for _ in range(arguments.rounds):
            for worker in workers:
                found = results[worker.name]
                found["steps"].append(worker.ask("step") / arguments.batch)
                if worker.name in ("a", "c", "c0"):
                    found["criteria"].append(worker.ask("criterion") / spread_over)
        for worker in workers:
            if arguments.profile and arguments.device == "cpu" and worker.name in OURS:
                parts = worker.ask("profile")
                results[worker.name]["profile"] = {
                    k: v / arguments.batch for k, v in parts.items()
                }
    finally:
        for worker in workers:
            worker.end()
    for found in results.values():
        criterion = statistics.median(found["criteria"]) if found["criteria"] else 0.0
        found["ms"] = statistics.median(found["steps"]) + criterion
        found["criterion_ms"] = criterion
        found["fastest"], found["slowest"] = min(found["steps"]), max(found["steps"])
    return results


def show(task: str, results: dict[str, Any], bounds: dict[str, float]) -> None:
    base = results["a"]["ms"] if "a" in results else None
    print(f"\n{task}: ms a sample (median; fastest to slowest), micro-batch, ratio to a")
    for name, found in results.items():
        ratio = f"{base / found['ms']:6.2f}x" if base else ""
        print(
            f"  {name:4}{NAMES[name.removesuffix('0')]:26}{found['ms']:8.2f}  "
            f"({found['fastest']:.2f} to {found['slowest']:.2f}) {found['micro_batch']:4}  {ratio}"
        )
    for name in OURS:
        if f"{name}0" in results:
            before, now = (
                statistics.quantiles(results[key]["steps"], n=4)[0] for key in (f"{name}0", name)
            )
            medians = results[f"{name}0"]["ms"] / results[name]["ms"]
            print(f"  {name}0 / {name}: lower quartiles {before / now:.3f}, medians {medians:.3f}")
    for name, found in results.items():
        if "profile" in found:
            parts = sorted(found["profile"].items(), key=lambda item: -item[1])
            text = ", ".join(f"{group} {ms:.2f}" for group, ms in parts if ms >= 0.005)
            print(f"  profile of {name} (with the profiler's own cost): {text}")
    print("  limits: " + ", ".join(f"{name} {ms:.2f}" for name, ms in bounds.items()))


def parse(argv: list[str]) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="lra-image", help="tasks, separated by commas")
    parser.add_argument("--contenders", type=names, help="of " + ",".join(NAMES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument(
        "--micro_batches",
        type=numbers,
        default=[8, 16, 32],
        help="each contender takes its fastest",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--pattern", default="random", help="which blocks d and e keep (the task's density)"
    )
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--before", type=Path, help="another checkout to compare with, compiled")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in arguments.contenders or ():
        if name not in NAMES:
            parser.error(f"unknown contender {name!r}: choose from {', '.join(NAMES)}")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    if arguments.worker:
        work(arguments)
        return 0
    import torch

    from kernels import available_backends

    if (reason := available_backends()[arguments.device]) is not True:
        print(f"error: nothing to compare with PyTorch: {reason}", file=sys.stderr)
        return 2
    machine = measure_machine(arguments.threads, arguments.device)
    if arguments.contenders is None:
        slow = machine["gflops_bf16"] < machine["gflops_fp32"] / 10
        arguments.contenders = [name for name in NAMES if not (slow and name == "b16")]
    header = {
        "processor": (
            torch.cuda.get_device_name() if arguments.device == "cuda" else _processor()
        ),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batch": arguments.batch,
        "pattern": arguments.pattern,
        **machine,
    }
    print(
        ", ".join(
            f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in header.items()
        )
    )
    tasks = {}
    for task in arguments.task.split(","):
        results, bounds = compare(task, arguments), limits(task, machine)
        show(task, results, bounds)
        tasks[task] = {"contenders": results, "limits": bounds}
    if arguments.json:
        text = json.dumps({"machine": header, "tasks": tasks}, indent=1)
        Path(arguments.json).write_text(text + "\n")
    return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
