"""Builds the AMX kernels with g++ against tests/amx_emulation and runs the backend `cpu` on them.

with emulated_amx.active():
    block_sparse_attention(..., backend="cpu")     # bf16 tensors
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import pytest
from emulation import CSRC, ROOT, build

from kernels import native

SOURCES = CSRC / "cpu"
HERE = ROOT / "tests" / "amx_emulation"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
FLAGS += ["-DSAT_AMX_EMULATION", f"-I{HERE}", f"-I{SOURCES}"]
VECTORS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"]
UNITS = {"library": [], "attention_portable": ["-O0"], "attention_amx": VECTORS}


def reason_unavailable() -> str | None:
    """The emulation has AMX; the rest of its kernel are AVX-512 instructions."""
    return native.reason_unavailable() or native.list_isas()["avx512_bf16"]


@functools.cache
def library() -> ctypes.CDLL:
    native.load()  # shares torch's OpenMP runtime
    units = {SOURCES / f"{name}.cpp": [*FLAGS, *flags] for name, flags in UNITS.items()}
    inputs = [*SOURCES.glob("*.h"), *HERE.glob("*")]
    loaded = ctypes.CDLL(str(build("emulated_amx.so", units, inputs, link=("-shared",))))
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
