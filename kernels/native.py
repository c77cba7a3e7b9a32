"""Compiled libraries: loading them, and what is handed to them.

Nothing is loaded at import. `reason_unavailable()` says in a sentence why kernels/libsat_cpu.so
(the backend `cpu`, built by `sh compile.sh`) cannot be used: it is not built, it was built from
other sources, or SAT_CPU_ISA asks for an instruction set that cannot run here.
"""

import ctypes
import functools
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ABI = 4  # SAT_ABI in csrc/cpu/abi.h
LIBRARY = Path(__file__).resolve().parent / "libsat_cpu.so"
SOURCES = LIBRARY.parent / "csrc" / "cpu"
ERRORS = {  # what functions return but 0: SatStatus in abi.h
    1: (MemoryError, "{} failed: not enough memory for scratch space"),
    2: (RuntimeError, "{} failed: a shape or dtype it does not support"),
    100: (IndexError, "a token id is outside the word table"),
}


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
    """Raises what the status of a function of the library means, if it is not 0."""
    if status != 0:
        error, message = ERRORS.get(status, (RuntimeError, f"{{}} failed: status {status}"))
        raise error(message.format(what))


def Struct(fields: str) -> struct.Struct:
    """A C struct in the notation of Python's struct module, padded as C does."""
    return struct.Struct(f"@{fields}0q")


def call(function: str, packed: bytes, *numbers: int) -> None:
    """Calls an operation of csrc/cpu/abi.h with its struct: packed settings, then addresses (0 is
    null) and 64-bit numbers."""
    library = load()
    if numbers:
        packed += struct.pack(f"{len(numbers)}q", *numbers)
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


def list_pointers(
    lists: Sequence[Tensor | None], num_blocks: int, device: torch.device
) -> tuple[int, list[int]]:
    """How many masks a layout's four lists hold, one or one a head, and their addresses; without
    lists, or for one that is not needed, 0."""
    if lists[0] is None:
        return 1, [0, 0, 0, 0]
    masks = len(lists[0]) // (num_blocks + 1)
    shapes = ((masks * (num_blocks + 1),), (masks * num_blocks * (num_blocks + 1),)) * 2
    return masks, [
        0 if x is None else pointer(x, shape, torch.int32, device)
        for x, shape in zip(lists, shapes, strict=True)
    ]


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
    """As compile.sh has it."""
    return hash_of(SOURCES, "*.cpp", "*.h")


def hash_of(folder: Path, *patterns: str) -> str | None:
    """sha256 over the files of one pattern after the other, by name. None without any."""
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def open_library(
    path: Path, abi: int, sources: str | None, where: str, declare: Callable
) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason in one sentence why there is none.

    abi, sources: its ABI number and the hash of its sources as they must be; where: to build it,
    for the sentence; declare: sets the types of its functions.
    """
    if not path.exists():
        return None, f"{path.name} is not built: run `sh compile.sh`{where}"
    try:
        library = declare(ctypes.CDLL(str(path)))
        library.sat_source_hash.restype = ctypes.c_char_p
        built_abi, built_from = library.sat_abi_version(), library.sat_source_hash().decode()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}): run `sh compile.sh` again"
    if built_abi != abi or sources not in (None, built_from):
        return None, f"{path.name} was built from other sources than these: run `sh compile.sh`"
    return library, None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        _share_openmp()
    except OSError as error:
        return None, str(error)
    library, reason = open_library(LIBRARY, ABI, source_hash(), "", _declare)
    if library is None:
        return None, reason
    name = os.environ.get("SAT_CPU_ISA", "")
    if library.sat_select_isa(name.encode()) != 0:
        return None, _reason_isa(name, _list_isas(library))
    return library, None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.sat_isa_name.restype = library.sat_list_isa.restype = ctypes.c_char_p
    return library


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
