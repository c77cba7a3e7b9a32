"""Builds the CUDA sources with g++ against tests/cuda_emulation and runs `cuda` on them.

with emulated_cuda.active():
    block_sparse_attention(..., backend="cuda")     # CPU tensors
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "csrc"
HERE = ROOT / "tests" / "cuda_emulation"
FLAGS = ["-std=c++17", "-fPIC", "-march=native", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-DSAT_CUDA_EMULATION"]
EARLY, REVERSE = 1, 2  # emulation::Mode


def compile_emulated(sources: list[Path], name: str, *flags: str, shared: bool = True) -> Path:
    """Compiles .cu files to a library (or a program) under the build folder, once per content."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    flags = (*FLAGS, f"-I{HERE}", f"-I{SOURCES}", *flags)
    digest = hashlib.sha256(" ".join([*map(str, sources), *flags]).encode())
    for file in sorted([*SOURCES.glob("*.cu*"), *HERE.glob("*"), *sources]):
        digest.update(file.read_bytes())
    folder = SOURCES / "build" / f"{name}-{digest.hexdigest()[:16]}"
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    stamp = f"{os.getpid()}"  # two test runs may build at once
    jobs = []
    for source in sources:
        hashes = ['-DSAT_SOURCE_HASH="emulated"', '-DSAT_BUILD_ID="emulated"']
        output = folder / f"{source.stem}.{stamp}.o"
        command = [compiler, *flags, *hashes, "-x", "c++", "-c", source, "-o", output]
        jobs.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), source, output))
    for job, source, _ in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, f"{source.name} does not compile:\n{errors[:4000]}"
    objects = [output for *_, output in jobs]
    linked = folder / f"{name}.{stamp}"
    kind = ["-shared"] if shared else []
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    subprocess.run([compiler, *kind, *sanitizers, *objects, "-o", linked], check=True)
    linked.replace(target)
    for output in objects:
        output.unlink()
    return target


@functools.cache
def library() -> ctypes.CDLL:
    sources = sorted([*SOURCES.glob("*.cu"), HERE / "control.cu"])
    loaded = cuda.declare(ctypes.CDLL(str(compile_emulated(sources, "emulated.so", "-O2"))))
    loaded.emulation_warp_functions.restype = ctypes.c_int64
    return loaded


@contextlib.contextmanager
def active(arch: int = 800, mode: int = 0) -> Iterator[ctypes.CDLL]:
    """Lets the backend `cuda` take CPU tensors and compute with the emulated library.

    arch: compute capability times 100, 800 or 750: which instructions the kernels may use.
    mode: EARLY and REVERSE, added: when copies land, and in which order threads run.
    """
    loaded = library()
    loaded.emulation_arch(arch)
    loaded.emulation_mode(mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_no_device", lambda: None)
        patch.setattr(cuda, "_load", lambda: (loaded, None))
        patch.setattr(cuda, "_reason_too_large", lambda *shape: None)
        patch.setattr(cuda, "DEVICE", "cpu")
        yield loaded
