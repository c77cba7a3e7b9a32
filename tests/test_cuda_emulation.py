"""The emulation that proves the CUDA kernels on a CPU: it computes right and finds mistakes."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess

import emulated_cuda
import pytest
import torch
from emulated_cuda import EARLY, HERE, REVERSE, SOURCES

from kernels import BlockLayout, attention_statistics, block_sparse_attention, cuda

MODES = [0, EARLY, REVERSE, EARLY | REVERSE]
SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@functools.cache
def planted() -> ctypes.CDLL:
    sources = [HERE / "planted_bugs.cu", HERE / "control.cu"]
    library = ctypes.CDLL(str(emulated_cuda.compile_emulated(sources, "planted.so", "-O1")))
    library.emulation_error.restype = ctypes.c_char_p
    return library


def run_planted(name: str, mode: int = 0) -> tuple[str, torch.Tensor]:
    """The emulation's error ("" for none) and what the kernel wrote."""
    library = planted()
    library.emulation_mode(mode)
    numbers = torch.arange(128.0)
    out = torch.full((64,), -1.0)
    status = library.run_planted(
        name.encode(), ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(out.data_ptr())
    )
    error = library.emulation_error().decode()
    assert (status != 0) == bool(error), f"status {status}, but {error!r}"
    return error, out


# ---- mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("missed barrier", "divergence at a barrier: .* is at __syncthreads .* has ended"),
        ("other barrier", "divergence at a barrier: .* in line [0-9]+, .* in line [0-9]+"),
        ("missed shuffle", "divergence in a warp: .* is at a shuffle, thread 20 .* has ended"),
        ("copy out of bounds", "asynchronous copy: out of the bounds of shared .* at byte 256"),
        ("load out of bounds", "matrix load: out of the bounds of shared memory at byte 256"),
    ],
)
def test_reported_mistakes(name, message):
    error, _ = run_planted(name)
    assert re.search(message, error), error


def test_uninitialised_shared_memory_is_nan():
    error, out = run_planted("uninitialised")
    assert not error and torch.equal(out[:63], torch.arange(1.0, 64)) and out[63].isnan()


def test_a_missing_wait_leaves_nan():
    _, right = run_planted("right")
    assert torch.equal(right, torch.arange(1.0, 65) % 64)
    assert run_planted("missing wait")[1].isnan().all()


@pytest.mark.parametrize("name", ["missing barrier", "missing barrier between buffers"])
def test_a_missing_barrier_shows_in_some_order(name):
    fine = "right buffers" if "buffers" in name else "right"
    results = [run_planted(fine, mode)[1] for mode in MODES]
    assert all(torch.equal(result, results[0]) for result in results)
    wrong = [run_planted(name, mode)[1] for mode in MODES]
    assert any(not torch.equal(result, results[0]) for result in wrong)


@pytest.mark.parametrize("name", ["store out of bounds", "read out of bounds"])
def test_address_sanitizer_sees_plain_accesses(name):
    done = subprocess.run([sanitized(kernels=False), name], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
    done = subprocess.run([sanitized(kernels=False), "right"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def sanitized(kernels: bool):
    """A program built with AddressSanitizer and UBSan: a planted bug by name, or the kernels."""
    if kernels:
        sources, name = [*sorted(SOURCES.glob("*.cu")), HERE / "sanitized.cu"], "sanitized"
    else:
        sources, name = [HERE / "planted_bugs.cu", HERE / "planted_main.cu"], "sanitized_bugs"
    return emulated_cuda.compile_emulated(sources, name, *SANITIZE, shared=False)


@pytest.mark.slow
def test_kernels_under_address_sanitizer():
    done = subprocess.run([sanitized(kernels=True)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


# ---- the kernels ---------------------------------------------------------------------


def compute(dtype, head_dim, block_size, num_blocks, arch=800, mode=0):
    """Everything the kernels compute, on memory that is NaN where they do not write."""
    generator = torch.Generator().manual_seed(head_dim + block_size)
    B, H, N = 2, 2, num_blocks * block_size
    query, key, value, dout = (
        torch.randn(B, H, N, head_dim, generator=generator).to(dtype) for _ in range(4)
    )
    mask = torch.rand(num_blocks, num_blocks, generator=generator) < 0.5
    mask[0], mask[:, -1] = False, False
    layout = BlockLayout.from_mask(mask, block_size, causal=block_size == 16)
    padding = torch.rand(B, N, generator=generator) < 0.7
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        with emulated_cuda.active(arch, mode):
            out = block_sparse_attention(*leaves, layout, key_padding_mask=padding, backend="cuda")
            grads = torch.autograd.grad(out, leaves, dout)
            statistics = attention_statistics(
                query,
                key,
                block_size=block_size,
                key_padding_mask=padding,
                groups=2,
                backend="cuda",
            )
    finally:
        torch.use_deterministic_algorithms(False)
    return [out.detach(), *grads, statistics.mean_attention, statistics.pooled_mean]


SHAPES = [(32, 16, 5), (64, 32, 3), (64, 64, 2), (128, 64, 2)]


@pytest.mark.parametrize("head_dim, block_size, num_blocks", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_order_of_threads_and_copies_matters(dtype, head_dim, block_size, num_blocks):
    first, *others = (compute(dtype, head_dim, block_size, num_blocks, mode=m) for m in MODES)
    assert all(tensor.isfinite().all() for tensor in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_older_gpus_compute_the_same(dtype):
    """Compute capability 7.5: no asynchronous copies, no matrix products of bf16 and tf32."""
    for new, old in zip(
        compute(dtype, 64, 32, 3), compute(dtype, 64, 32, 3, arch=750), strict=True
    ):
        rounding = {torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
        torch.testing.assert_close(new, old, rtol=rounding, atol=rounding * new.abs().max().item())


def test_a_gpu_that_the_library_was_not_built_for_is_passed_by_auto(monkeypatch):
    fits = cuda._cached_reason_too_large.__wrapped__
    query = torch.zeros(1, 1, 64, 32)
    with emulated_cuda.active() as library:
        monkeypatch.setattr(cuda, "_reason_too_large", fits)
        layout = BlockLayout.full(2, 32)
        assert block_sparse_attention(query, query, query, layout, backend="cuda").shape
        cuda._cached_reason_too_large.cache_clear()
        library.emulation_foreign(1)
        try:
            reason = "libsat_cuda.so was built for newer GPUs: run `sh compile.sh`"
            with pytest.raises(RuntimeError, match=reason):
                block_sparse_attention(query, query, query, layout, backend="cuda")
            assert block_sparse_attention(query, query, query, layout).shape == query.shape
        finally:
            library.emulation_foreign(0)


def test_too_little_shared_memory_is_an_error():
    with emulated_cuda.active() as library:
        library.emulation_shared_limit(48 * 1024)
        try:
            query = torch.zeros(1, 1, 64, 128, dtype=torch.float32)
            with pytest.raises(RuntimeError, match="too little shared memory for this shape"):
                block_sparse_attention(
                    query, query, query, BlockLayout.full(1, 64), backend="cuda"
                )
        finally:
            library.emulation_shared_limit(227 * 1024)
