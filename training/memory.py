"""How large a micro-batch should be, and how much memory is in use."""

from __future__ import annotations

import ctypes
import sys

import torch

from models.config import ModelConfig
from training.peak import peak_resident_bytes

# On a CPU a micro-batch costs 2 to 3 ms besides its products, and one that leaves the caches costs
# bandwidth: 32 sequences of 1,024 tokens were the best of 8 to 64, dense and sparse, fp32 and
# bf16, on two cores with 32 MiB (docs/benchmarks.md)
CPU_TOKENS = 32768
# share of the free GPU memory that activations may take
GPU_SHARE = 0.6


def bytes_per_example(model: ModelConfig) -> int:
    """What training one example takes at most, in fp32: what is saved for the backward pass, and
    the gradients in flight.

    Per token and layer: two residual sums, two norms, query, key, value, attention output, and
    twice the hidden width before and after GELU.
    """
    inner = model.num_head * model.head_dim
    widths = 6 * model.transformer_dim + 5 * inner + 4 * model.transformer_hidden_dim
    return 4 * model.padded_length * model.num_inputs * (model.num_layers * widths + 4 * widths)


def auto_micro_batch(
    model: ModelConfig, batch_size: int, device: torch.device, processes: int = 1
) -> int:
    """Examples to process at once: a power of two, at most this process's share of the batch.

    CPU: what keeps the activations in cache. CUDA: what the free memory holds with room to spare.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = int(free * GPU_SHARE) // bytes_per_example(model)
    else:
        fits = CPU_TOKENS // (model.padded_length * model.num_inputs)
    fits = max(1, min(fits, -(-batch_size // processes)))
    return 1 << (fits.bit_length() - 1)


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep what is freed; nothing elsewhere.

    By default it gives large tensors back to the system after each micro-batch, which then faults
    every page in again: a fifth of a sparse bf16 step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor in a mapping of its own


def criterion_bytes(model: ModelConfig, groups: int) -> int:
    """This step's and the previous step's mean attention, [L, groups, N, N] fp32 each, and what is
    remembered of 20 steps: pooled attention in fp32, two masks, uniform attention in fp32."""
    a_block = (4 + 2) * model.num_layers + 4 * model.key_padding
    remembered = 20 * a_block * model.num_blocks**2
    return 2 * 4 * model.num_layers * groups * model.padded_length**2 + remembered


def estimate_bytes(model: ModelConfig, groups: int, micro_batch_size: int) -> tuple[int, int]:
    """What the dense and the sparse phase take above the interpreter and the libraries, roughly.

    groups: of the mean attention; 0 for a criterion that does not look at it.
    """
    activations = micro_batch_size * bytes_per_example(model)
    return activations + criterion_bytes(model, groups), activations


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has used: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


# torch on a CPU (two wordings); the CUDA driver; cuBLAS, cuDNN and their kin
_EXHAUSTED = (
    "no memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, or came of one that does: torch's writer of
    files, for one, fails again when it is left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in text for words in _EXHAUSTED):
        return True
    cause = None if error.__suppress_context__ else error.__context__
    return cause is not None and is_exhausted(cause)


def release(device: torch.device) -> None:
    """Gives back what the allocator of a GPU keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def human(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
