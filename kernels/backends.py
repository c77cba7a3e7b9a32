"""Which backend does a call.

A backend is a module kernels/<name>.py, named in BACKENDS, with

    name: str
    can_run(call) -> str | None
        Why it cannot do `call`, in words that follow "backend NAME cannot do OP: ", or None if it
        can. The one place that knows: choosing, checking, available_backends() and every error
        sentence ask it. It looks at what a Call holds, never at values. Fields that are not set
        are not asked about: an empty Call asks whether it can work on this machine at all, one
        with a device whether it takes tensors that are there.
    attention(query, key, value, layout, key_padding_mask, scale, pruned_zero, return_lse)
        block-sparse, or dense if layout is None; gives out and, if asked for, the public lse.
    NAME_forward, NAME_backward
        for the operations in compiled code that operators.py makes torch operators of; their
        arguments are listed there.
    NAME
        instead, for one in terms of torch's own operations, with a derivative of its own. (What
        belongs to a layer is defined in plain torch in layer.py: so the backend `reference`.)

Arguments arrive checked: shapes, dtypes and devices agree; strides are arbitrary.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import NamedTuple

import torch

log = logging.getLogger("sat.kernels")

BACKENDS: tuple[str, ...] = (
    "cuda",
    "triton",
    "cpu",
    "reference",
)  # the order in which "auto" asks
# What needs a kernel: plain torch takes many times longer or more memory. A named backend does it
# or refuses. Other operations go to the next backend that can do them: that costs time only.
NEEDS_A_KERNEL = {"block_sparse_attention", "dense_attention", "attention_statistics"}

_modules: dict[str, ModuleType] = {}  # filled at first use: they import from here
_said: set[tuple[str, ...]] = set()


class Call(NamedTuple):
    """What a backend is asked to do."""

    op: str | None = None  # name of the public function
    device: torch.device | None = None
    # attention: of query; norms: of the residual stream, the branch, the norm; others with
    # products: of the operand, what torch multiplies it in, the norm, the other tensors
    dtypes: tuple[torch.dtype, ...] = ()
    sizes: tuple[int, ...] = ()  # head_dim, or the widths of rows (E; E, K; E, K, F)
    length: int = 0  # N
    block_size: int | None = None  # None: dense attention, without a layout
    words: int = 0  # V, rows of the word table


def available_backends() -> dict[str, bool | str]:
    """Each backend with True, or the reason why it cannot be used on this machine."""
    return {name: can_run(name, Call()) or True for name in BACKENDS}


def can_run(name: str, call: Call) -> str | None:
    """The reason why backend `name` cannot do `call`, None if it can."""
    return module(name).can_run(call)


def module(name: str) -> ModuleType:
    """kernels/<name>.py."""
    if name not in _modules:
        _import(name)
    return _modules[name]


@torch.compiler.assume_constant_result  # torch.compile can trace no import
def _import(name: str) -> None:
    _modules[name] = importlib.import_module(f"kernels.{name}")


def choose(call: Call, backend: str) -> ModuleType:
    """Who shall do `call`: the backend named, or for "auto" the first that can.

    Raises: ValueError for an unknown name, RuntimeError if the named one cannot.
    """
    candidates = BACKENDS
    if backend != "auto":
        if backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"backend must be one of auto, {known}, not {backend!r}")
        candidates = (backend,)
        if call.op not in NEEDS_A_KERNEL:
            if reason := can_run(backend, Call(device=call.device)):
                raise RuntimeError(f"backend {backend} cannot do {call.op}: {reason}")
            beside = ("triton",) if backend == "cuda" else ()  # they differ in attention alone
            candidates = (backend, *beside, "reference")
    passed: list[str] = []
    for name in candidates:
        reason = can_run(name, call)
        if reason is None:
            if call.op in NEEDS_A_KERNEL and backend == "auto":
                _say_once(f"{call.op} uses backend {name}", passed)
            return module(name)
        passed.append(f"{name}: {reason}")
    raise RuntimeError(f"backend {backend} cannot do {call.op}: {passed[0].split(': ', 1)[1]}")


def _say_once(choice: str, passed: list[str]) -> None:
    if not torch.compiler.is_compiling() and (key := (choice, *passed)) not in _said:
        _said.add(key)
        log.info(choice + (f" ({'; '.join(passed)})" if passed else ""))
