"""CUDA graphs without a GPU: what a capture would record is recorded, a replay does it again.

Operators are recorded with the tensors that they were given and those that they returned, which a
replay overwrites; Triton's launches with their arguments. Numbers are those of the capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import triton_attention, triton_layer

Tape = list[Callable[[], object]]


class _Operators(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert "_local_scalar_dense" not in str(operator), "a capture cannot wait for the GPU"
        out = operator(*args, **kwargs)
        returns = operator._schema.returns
        view = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        if not view and not str(operator).startswith(("aten.empty", "aten.new_empty", "sat_")):

            def again():
                pairs = zip(tree_leaves(out), tree_leaves(operator(*args, **kwargs)), strict=True)
                for recorded, new in pairs:
                    if isinstance(recorded, Tensor) and recorded is not new:
                        recorded.copy_(new)

            self.tape.append(again)
        return out


@contextlib.contextmanager
def active(model: nn.Module | None) -> Iterator[list[int]]:
    """Lets training.graphs capture on the CPU; gives the number of records of each capture.

    model: whose gradients a capture must leave alone, as a real one does: it computes nothing.
    """
    from training import graphs

    launch, captures, tapes = triton_layer.launch, list[int](), list[Tape]()

    def recording_launch(kernel, grid, *arguments, **constants):
        def again():
            launch(kernel, grid, *arguments, **constants)

        for tape in tapes:
            tape.append(again)
        again()

    def capture(function):
        parameters = [] if model is None else list(model.parameters())
        before = [(p.grad, p.grad.clone()) for p in parameters if p.grad is not None]
        tapes.append([])
        tape = tapes[0]
        try:
            with _Operators(tape):
                out = function()
        finally:
            tapes.clear()
            for grad, values in before:
                grad.copy_(values)
        with torch.no_grad():
            out.fill_(torch.nan)
        captures.append(len(tape))

        def replay():
            with torch.no_grad():
                for again in tape:
                    again()

        return replay, out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "is_gpu", lambda device: True)
        patch.setattr(graphs, "capture", capture)
        for module in (triton_layer, triton_attention):
            patch.setattr(module, "launch", recording_launch)
        yield captures
