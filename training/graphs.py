"""Sparse micro-batches as CUDA graphs: hundreds of launches become one.

A graph repeats its launches with the addresses and numbers of when it was captured. So what
changes from one micro-batch to the next is copied into tensors that it reads: the ids, the labels,
and the dropout key, which the kernels take from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from kernels import DropoutKey, key_words
from training import memory
from training.forward import is_gpu

WARM_UP = 2  # calls before a capture: they compile kernels and make the libraries' workspaces

Batch = Sequence[Tensor | None]  # ids, second ids, labels


class MicroBatchGraphs:
    """One graph for each shape of a micro-batch, captured at its third use.

    off: why nothing is captured, or None.
    """

    def __init__(self, parameters: Sequence[Tensor], off: str | None, say: Callable) -> None:
        self._parameters, self._say = parameters, say
        self.off = off
        self._version: Hashable = None
        self._graphs: dict[Hashable, int | _Graph] = {}

    @property
    def captured(self) -> bool:
        """Whether gradients must stay where they are."""
        return any(isinstance(graph, _Graph) for graph in self._graphs.values())

    def clear(self) -> None:
        self._graphs.clear()

    def call(
        self, function: Callable[..., Tensor], batch: Batch, key: DropoutKey, version: Hashable
    ) -> Tensor:
        """function(*batch, key), which adds to the parameters' gradients and returns a tensor.

        version: whatever else it depends on.
        """
        if self.off or not is_gpu(self._parameters[0].device):
            return function(*batch, key)
        if version != self._version:
            self.clear()
            self._version = version
        shape = tuple(None if part is None else (part.shape, part.dtype) for part in batch)
        graph = self._graphs.get(shape, 0)
        if isinstance(graph, int):
            if graph < WARM_UP:
                self._graphs[shape] = graph + 1
                return function(*batch, key)
            for parameter in self._parameters:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            try:
                graph = _Graph(function, batch, key)
            except RuntimeError as error:
                if memory.is_exhausted(error):
                    raise
                self.off = str(error).splitlines()[0]
                self._say(f"sparse steps are not captured as CUDA graphs: {self.off}")
                self.clear()
                return function(*batch, key)
            self._graphs[shape] = graph
        return graph(batch, key)


class _Graph:
    def __init__(self, function: Callable[..., Tensor], batch: Batch, key: DropoutKey) -> None:
        self._batch = [None if part is None else part.clone() for part in batch]
        self._words = key_words(key, _device(batch)).clone()
        static = DropoutKey(key.seed, key.step, key.first_example, self._words)
        self._replay, self._out = capture(lambda: function(*self._batch, static))

    def __call__(self, batch: Batch, key: DropoutKey) -> Tensor:
        self._words.copy_(key_words(key, self._words.device))
        for mine, given in zip(self._batch, batch, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._replay()
        return self._out


def _device(batch: Batch) -> torch.device:
    return next(part.device for part in batch if part is not None)


def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The graph's replay and what the function returns, whose values a replay fills in."""
    graph = torch.cuda.CUDAGraph()
    # other threads (loading, nccl's watchdog) may go on using the GPU meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = function()
    return graph.replay, out
