"""Loads kernels/libsat_cpu.so, the C++ side of the backend `cpu` (built by `sh compile.sh`).

Nothing is loaded at import. `reason_unavailable()` says in a sentence why the library cannot be
used: it is not built, it was built from other sources, or SAT_CPU_ISA asks for an instruction set
that cannot run here.
"""

import ctypes
import functools
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ABI = 4  # SAT_ABI in csrc/cpu/abi.h
LIBRARY = Path(__file__).resolve().parent / "libsat_cpu.so"
SOURCES = LIBRARY.parent / "csrc" / "cpu"
STATUS = {1: "not enough memory for scratch space", 2: "a shape or dtype it does not support"}


def reason_unavailable() -> str | None:
    """None if the library can be used, else the reason in one sentence."""
    return _load()[1]


def load() -> ctypes.CDLL:
    """The library. Raises RuntimeError with `reason_unavailable()`."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def isa() -> str:
    """Name of the instruction set in use."""
    return load().sat_isa_name().decode()


def list_isas() -> dict[str, str | None]:
    """Instruction sets, worst first: name -> None if it can run here, else the reason why not."""
    return _list_isas(load())


def select_isa(name: str) -> None:
    """Chooses the instruction set from now on ("": the best); ValueError if unusable."""
    if load().sat_select_isa(name.encode()) != 0:
        raise ValueError(_reason_isa(name, list_isas()))


def check(status: int, what: str) -> None:
    """Raises MemoryError or RuntimeError if a function of the library did not return 0."""
    if status == 100:
        raise IndexError("a token id is outside the word table")
    if status != 0:
        kind = MemoryError if status == 1 else RuntimeError
        raise kind(f"{what} failed: {STATUS.get(status, f'status {status}')}")


def call(function: str, *arguments: int | bytes | None) -> None:
    """Calls an operation of csrc/cpu/abi.h with its struct, given in pieces.

    The first piece is packed settings; then come addresses (None is null) and 64-bit numbers.
    """
    library = load()
    packed = b"".join(x if isinstance(x, bytes) else struct.pack("q", x or 0) for x in arguments)
    assert len(packed) == _struct_sizes(library)[function], f"abi.h has another {function}"
    check(getattr(library, function)(packed), function)


@functools.cache
def _struct_sizes(library: ctypes.CDLL) -> dict[str, int]:
    """Bytes of each operation's struct in C."""
    library.sat_operation.restype = ctypes.c_char_p
    sizes: dict[str, int] = {}
    size = ctypes.c_int64()
    while name := library.sat_operation(len(sizes), ctypes.byref(size)):
        sizes[f"sat_{name.decode()}"] = size.value
    return sizes


def pointer(
    tensor: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    strided: bool = False,
) -> int:
    """Address of what compiled code reads or writes; nothing else in kernels/ takes one.

    Compiled code trusts what it is told, so that the tensor is just this is checked here.
    strided: its strides are passed on too; else it must be contiguous.
    Raises: ValueError if it differs.
    """
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device != device
        or not (strided or tensor.is_contiguous())
    ):
        raise ValueError(
            f"a kernel needs {dtype} {list(shape)} on {device}{'' if strided else ', contiguous'}"
            f", not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            f" with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def _list_isas(library: ctypes.CDLL) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    reason = ctypes.c_char_p()
    while name := library.sat_list_isa(len(found), ctypes.byref(reason)):
        found[name.decode()] = reason.value.decode() if reason.value else None
    return found


def _reason_isa(name: str, isas: dict[str, str | None]) -> str:
    usable = ", ".join(isa for isa, reason in isas.items() if reason is None)
    if name not in isas:
        return f"SAT_CPU_ISA={name}: there is no such instruction set; use one of {usable}"
    return f"SAT_CPU_ISA={name}: {isas[name]}; use one of {usable}"


def source_hash() -> str | None:
    """sha256 over csrc/cpu/*.cpp, then its *.h, by name, as compile.sh has it. None without."""
    files = sorted(SOURCES.glob("*.cpp")) + sorted(SOURCES.glob("*.h"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not LIBRARY.exists():
        return None, f"{LIBRARY.name} is not built: run `sh compile.sh`"
    try:
        _share_openmp()
        library = ctypes.CDLL(str(LIBRARY))
        library.sat_source_hash.restype = ctypes.c_char_p
        library.sat_isa_name.restype = ctypes.c_char_p
        library.sat_list_isa.restype = ctypes.c_char_p
        built_abi, built_from = library.sat_abi_version(), library.sat_source_hash().decode()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded ({error}): run `sh compile.sh` again"
    if built_abi != ABI or source_hash() not in (None, built_from):
        return None, f"{LIBRARY.name} was built from other sources than these: run `sh compile.sh`"
    name = os.environ.get("SAT_CPU_ISA", "")
    if library.sat_select_isa(name.encode()) != 0:
        return None, _reason_isa(name, _list_isas(library))
    return library, None


def _share_openmp() -> None:
    """Gives the library, which is linked to no OpenMP runtime, the one that torch has loaded."""
    with open("/proc/self/maps") as maps:
        loaded = {Path(line.split(maxsplit=5)[-1].strip()) for line in maps if ".so" in line}
    runtimes = [p for p in loaded if p.name.startswith(("libgomp", "libiomp5", "libomp"))]
    if not runtimes:
        raise OSError("torch has loaded no OpenMP runtime")
    # Another package may have brought a second one: the one beside torch is torch's.
    home = Path(torch.__file__).parent
    ctypes.CDLL(str(min(runtimes, key=lambda p: (home not in p.parents, p))), ctypes.RTLD_GLOBAL)
