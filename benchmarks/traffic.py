"""What one sparse training step on a GPU moves, launches and waits for, counted without a GPU.

    python benchmarks/traffic.py [--task lra-image] [--batch 512] [--detail] [--json FILE]

Contenders, all in bf16 autocast, one micro-batch, forward, backward, clipping and AdamW:

    plain   the model in plain PyTorch with scaled_dot_product_attention (dense attention)
    ours    the training loop's own sparse step

The step runs on fake tensors (shapes without memory), and every operator on its way is counted:

    traffic   bytes of the operator's inputs and outputs, each once. What a kernel reads again or
              keeps in its caches is not seen; our attention's second pass over its inputs is added
    launches  one for each operator that is no view, more where MORE_LAUNCHES knows it
    waits     values read back on the host, and uploads from memory that is not pinned

They are those of a GPU as far as the operators are: fake tensors stand for CPU tensors here (fake
CUDA tensors cannot run backward without a GPU), dropout is taken as the fused operator that it is
on a GPU, and lists of tensors are taken by one operator, as fused optimizers do there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

NO_KERNEL = (  # operators that are no views and launch nothing
    *("prim.", "aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.promote_types"),
    *("aten.lift_fresh", "aten.result_type", "aten.is_pinned", "aten.randint", "profiler."),
)
OVERWRITES = ("aten.zero_.", "aten.fill_.", "aten.copy_.", "aten._foreach_zero_.")
MORE_LAUNCHES = {  # besides the first
    "aten.native_layer_norm_backward": 1,  # input's gradient; weight's and bias's
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 2,  # sums, gradients, rounding
    "aten.embedding_dense_backward": 5,  # sort, counts, sums
    "aten.index_add_": 1,
    "aten.nonzero": 2,
    "sat.attention_backward": 1,  # by rows, by columns
}


@dataclasses.dataclass
class Count:
    """Of one step; the counters by operator."""

    traffic: Counter = dataclasses.field(default_factory=Counter)  # bytes
    launches: Counter = dataclasses.field(default_factory=Counter)
    waits: Counter = dataclasses.field(default_factory=Counter)

    def add(self, name: str, launches: int, traffic: int) -> None:
        self.launches[name] += launches
        self.traffic[name] += traffic


def stored_bytes(tensors: Any) -> int:
    """Of all tensors among `tensors`; elements that an expanded tensor repeats count once."""
    total = 0
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor):
            repeated = [
                size
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
                if stride == 0
            ]
            count = tensor.numel()
            for size in repeated:
                count //= max(size, 1)
            total += count * tensor.element_size()
    return total


class Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(operator)
        if name.startswith("aten._local_scalar_dense"):
            self.count.waits["read of one value"] += 1
            return 1.0 if args[0].is_floating_point() else 1
        out = operator(*args, **kwargs)
        returns = operator._schema.returns
        view = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        if view or name.startswith(NO_KERNEL):
            return out
        read = args[1:] if name.startswith(OVERWRITES) else args
        traffic = stored_bytes((read, kwargs)) + stored_bytes(out if out is not None else args[0])
        if name.startswith(("aten.embedding.", "aten.index_select.")):  # the rows, not the table
            traffic = 2 * stored_bytes(out) + stored_bytes(args[2:] or args[1:])
        if name.startswith("sat.attention_backward"):  # query, key, value, dout again
            traffic += stored_bytes(args[:4])
        base = name.rsplit(".", 1)[0]
        self.count.add(base, 1 + MORE_LAUNCHES.get(base, 0), traffic)
        return out


class Waits(TorchFunctionMode):
    """Counts uploads that wait; `as_on_cuda` counts reads."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count, self.pinned = count, list[Tensor]()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.pin_memory:
            self.pinned.append(args[0])
            return args[0]
        # the string: memory of the host, as `device=x.device` is not
        if function is torch.tensor and not isinstance(kwargs.get("device"), str | None):
            self.count.waits["upload of Python's numbers"] += 1
        pinned = any(args[0] is tensor for tensor in self.pinned) if args else False
        if function is Tensor.to and kwargs.get("non_blocking") and not pinned:
            self.count.waits["upload that is not pinned"] += 1
        return function(*args, **kwargs)


@contextlib.contextmanager
def as_on_cuda(count: Count) -> Iterator[None]:
    """Lets fake CPU tensors take the ways of CUDA tensors, as far as operators are concerned."""
    from torch.nn.utils import clip_grad

    from kernels import cuda, triton, triton_layer
    from kernels.dropout import _uploaded as dropout_keys
    from training import forward

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, training)[0]

    def launch(kernel, grid, *arguments, **constants):
        tensors = {id(x): x for x in arguments if isinstance(x, Tensor)}
        count.add(f"triton.{kernel.__name__}", 1, stored_bytes(list(tensors.values())))

    def tolist(tensor):
        count.waits["read of a tensor"] += 1
        return [1.0] * tensor.numel()

    replaced: list[tuple[Any, str, Any]] = [
        (FakeTensor, "tolist", tolist),
        (clip_grad, "_has_foreach_support", lambda tensors, device: True),
        (F, "dropout", dropout),
        (forward, "is_gpu", lambda device: True),
        (triton_layer, "launch", launch),
        (triton, "DEVICE", "cpu"),
        (cuda, "_no_device", lambda: None),
        (cuda, "_load", lambda: (None, None)),
        (cuda, "_reason_too_large", lambda *shape: None),
        (cuda, "DEVICE", "cpu"),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)
        dropout_keys.cache_clear()  # of fake tensors


def count_step(contender: str, task: str, batch: int, backend: str) -> Count:
    """One step of `plain` or `ours`, after one that does not count."""
    from benchmarks.step import make_contender
    from training.optim import PhaseOptimizer

    name = {"plain": "b16", "ours": "e"}[contender]
    made = make_contender(
        name,
        argparse.Namespace(
            task=task, batch=batch, device="cpu", micro_batches=[batch], pattern="random"
        ),
    )
    run = made.run
    count = Count()
    assert importlib.util.find_spec("triton"), "the fused operations need triton"
    with as_on_cuda(count), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in run.model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        tensors[key] = fake.from_tensor(tensor)
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        if contender == "plain":
            made.parameters = parameters
            made.optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, fused=True)
        else:
            run.optimizer = PhaseOptimizer(parameters, run.config.training, "sparse", fused=True)
        with Waits(Count()):
            made.step()  # makes the optimizer's state
        for counter in (count.traffic, count.launches, count.waits):
            counter.clear()
        with Waits(count), Operators(count):
            made.step()
    return count


def show(name: str, count: Count, detail: bool) -> None:
    print(
        f"{name:8}{sum(count.traffic.values()) / 1e9:14.2f}{sum(count.launches.values()):10}"
        f"{sum(count.waits.values()):8}"
    )
    if detail:
        for operator, traffic in count.traffic.most_common():
            if traffic >= 1e6 or count.launches[operator] > 1:
                print(f"    {operator:50}{traffic / 1e9:10.3f}{count.launches[operator]:8}")
        for what, times in count.waits.items():
            print(f"    {what}: {times}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="lra-image")
    parser.add_argument("--batch", type=int, default=512, help="examples a step, one micro-batch")
    parser.add_argument("--backend", default="cuda", help="of our model's kernels")
    parser.add_argument("--detail", action="store_true", help="by operator, the largest first")
    parser.add_argument("--json", help="file for all numbers")
    arguments = parser.parse_args(argv)
    print(
        f"counted, not measured: {arguments.task}, batch {arguments.batch}, bf16, torch "
        f"{torch.__version__}, backend {arguments.backend}"
    )
    print(f"{'step':8}{'traffic GB':>14}{'launches':>10}{'waits':>8}")
    results = {}
    for name in ("plain", "ours"):
        count = count_step(name, arguments.task, arguments.batch, arguments.backend)
        show(name, count, arguments.detail)
        results[name] = dataclasses.asdict(count)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
