"""Lets Triton's kernels compute CPU tensors in Triton's interpreter.

with interpreted_triton.active():
    block_sparse_attention(..., backend="triton")
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest

from kernels import triton


def reason_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from kernels import triton_layer

    if not triton_layer.INTERPRETED:  # conftest.py asks for it, if it comes in time
        return "triton compiles for GPUs in this process"
    return None


@contextlib.contextmanager
def active() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "DEVICE", "cpu")
        yield
