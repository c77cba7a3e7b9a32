"""Builds the AMX kernels with g++ against tests/amx_emulation and runs the backend `cpu` on them.

with emulated_amx.active():
    block_sparse_attention(..., backend="cpu")     # bf16 tensors
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

from kernels import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "csrc"
HERE = ROOT / "tests" / "amx_emulation"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
FLAGS += ["-DSAT_AMX_EMULATION", f"-I{HERE}", f"-I{SOURCES}"]
WITHOUT = ["-DSAT_WITHOUT_AVX2", "-DSAT_WITHOUT_AVX512", "-DSAT_WITHOUT_AVX512BF16"]
VECTORS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"]
NAMES = {"library": [], "attention": [], "attention_portable": ["-O0"], "attention_amx": VECTORS}


def reason_unavailable() -> str | None:
    """The emulation has AMX; the rest of its kernel are AVX-512 instructions."""
    return native.reason_unavailable() or native.list_isas()["avx512_bf16"]


def compile_emulated() -> Path:
    """The library with AMX emulated, under the build folder, once per content."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    digest = hashlib.sha256(" ".join(FLAGS + WITHOUT + VECTORS).encode())
    for file in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"), *HERE.glob("*")]):
        digest.update(file.read_bytes())
    target = SOURCES / "build" / f"emulated_amx-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    hashes = ['-DSAT_SOURCE_HASH="emulated"', '-DSAT_BUILD_ID="emulated"']
    jobs, stamp = [], f"{os.getpid()}"  # two test runs may build at once
    for name, flags in NAMES.items():
        output = target.with_suffix(f".{name}.{stamp}.o")
        source = SOURCES / f"{name}.cpp"
        command = [compiler, *FLAGS, *WITHOUT, *hashes, *flags, "-c", source, "-o", output]
        jobs.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), name, output))
    for job, name, _ in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, f"{name}.cpp does not compile:\n{errors[:4000]}"
    objects = [output for *_, output in jobs]
    linked = target.with_suffix(f".{stamp}.so")
    subprocess.run([compiler, "-shared", *objects, "-o", linked], check=True)
    linked.replace(target)
    for output in objects:
        output.unlink()
    return target


@functools.cache
def library() -> ctypes.CDLL:
    native.load()  # shares torch's OpenMP runtime
    loaded = ctypes.CDLL(str(compile_emulated()))
    loaded.sat_isa_name.restype = loaded.sat_list_isa.restype = ctypes.c_char_p
    assert loaded.sat_select_isa(b"amx") == 0
    return loaded


def error() -> str:
    """The first mistake that the emulation has seen; "" if none."""
    return (ctypes.c_char * 256).in_dll(library(), "amx_emulation_error").value.decode()


def count(what: str) -> int:
    """`open`: configurations that no thread has released; `products` computed so far."""
    return ctypes.c_long.in_dll(library(), f"amx_emulation_{what}").value


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Lets the backend `cpu` compute bf16 with the emulated library; fails at its complaints."""
    loaded = library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", lambda: (loaded, None))
        yield
    assert error() == ""
    assert count("open") == 0, "a thread kept its tile configuration"
