"""Builds the CUDA sources with g++ against tests/cuda_emulation and runs `cuda` on them.

with emulated_cuda.active():
    block_sparse_attention(..., backend="cuda")     # CPU tensors
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulation import CSRC, ROOT, build

from kernels import cuda

SOURCES = CSRC / "cuda"
HERE = ROOT / "tests" / "cuda_emulation"
FLAGS = ["-std=c++17", "-fPIC", "-march=native", "-Wall", "-Wextra", "-Werror"]
# what is read only where there is a padding mask is set only there: a value costs a register
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-DSAT_CUDA_EMULATION"]
EARLY, REVERSE = 1, 2  # emulation::Mode


def compile_emulated(sources: list[Path], name: str, *flags: str, shared: bool = True) -> Path:
    """Compiles .cu files to a library (or a program), once per content."""
    both = [*FLAGS, f"-I{HERE}", f"-I{SOURCES}", *flags, "-x", "c++"]
    sanitizers = tuple(flag for flag in flags if flag.startswith("-fsanitize"))
    link = (*(["-shared"] if shared else []), *sanitizers)
    inputs = [*SOURCES.glob("*.cu*"), *HERE.glob("*")]
    return build(name, dict.fromkeys(sources, both), inputs, link)


@functools.cache
def library() -> ctypes.CDLL:
    sources = sorted([*SOURCES.glob("*.cu"), HERE / "control.cu"])
    loaded = cuda.declare(ctypes.CDLL(str(compile_emulated(sources, "emulated.so", "-O2"))))
    loaded.emulation_warp_functions.restype = ctypes.c_int64
    return loaded


@contextlib.contextmanager
def active(arch: int = 800, mode: int = 0, multiprocessors: int = 132) -> Iterator[ctypes.CDLL]:
    """Lets the backend `cuda` take CPU tensors and compute with the emulated library.

    arch: compute capability times 100, 800 or 750: which instructions the kernels may use.
    mode: EARLY and REVERSE, added: when copies land, and in which order threads run.
    multiprocessors: few of them get the statistics in large tiles.
    """
    loaded = library()
    loaded.emulation_arch(arch)
    loaded.emulation_mode(mode)
    loaded.emulation_multiprocessors(multiprocessors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_no_device", lambda: None)
        patch.setattr(cuda, "_load", lambda: (loaded, None))
        patch.setattr(cuda, "_reason_too_large", lambda *shape: None)
        patch.setattr(cuda, "DEVICE", "cpu")
        yield loaded
