"""The portable kernels on a processor that is emulated here.

Cross-compiled for 64-bit ARM, run by qemu-user and compared with this machine's float64 formula.
The rest of a layer is compiled only.
"""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest
import torch
from attention_backends import dense_restatement
from emulation import CSRC, HASHES, ROOT

from kernels import BlockLayout, attention_statistics

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = CSRC / "cpu"


@pytest.mark.slow
def test_aarch64_gives_the_formulas_numbers(tmp_path):
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    driver = tmp_path / "driver"
    sources = [
        ROOT / "tests" / "abi_driver.cpp",
        *(
            path
            for path in SOURCES.glob("*.cpp")
            if "avx" not in path.name and "amx" not in path.name
        ),
    ]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *HASHES]
    jobs = [
        subprocess.Popen(
            [COMPILER, *flags, f"-I{SOURCES}", "-c", source, "-o", tmp_path / f"{i}.o"]
        )
        for i, source in enumerate(sources)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    objects = sorted(tmp_path.glob("*.o"))
    subprocess.run([COMPILER, "-static", "-fopenmp", *objects, "-o", driver], check=True)

    B, H, N, d, bs = 2, 2, 96, 32, 16
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, H, N, d, generator=generator) * 2 for _ in range(4)]
    mask = torch.rand(N // bs, N // bs, generator=generator) < 0.5
    real = torch.rand(B, N, generator=generator) < 0.8
    layout = BlockLayout.from_mask(mask, bs)
    of_rows, columns, of_columns, rows = layout.lists
    lists = of_rows, columns[: layout.num_active], of_columns, rows[: layout.num_active]
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        inputs = [x.to(dtype) for x in tensors]
        header = struct.pack(
            "8qf", B, H, N, d, bs, layout.num_active, 1, dtype == torch.bfloat16, d**-0.5
        )
        data = [
            x.contiguous().view(torch.uint8).numpy().tobytes() for x in (*inputs, real, *lists)
        ]
        (tmp_path / "in").write_bytes(header + b"".join(data))
        subprocess.run([EMULATOR, driver, tmp_path / "in", tmp_path / "out"], check=True)
        found = (tmp_path / "out").read_bytes()

        def take(count, dtype):
            nonlocal found
            size = count * dtype.itemsize
            values, found = torch.frombuffer(bytearray(found[:size]), dtype=dtype), found[size:]
            return values.double()

        wide = [x.double().requires_grad_() for x in inputs[:3]]
        out = dense_restatement(*wide, mask, bs, real, d**-0.5, "zero")
        grads = torch.autograd.grad(out, wide, inputs[3].double())
        for name, expected in zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True):
            ours = take(B * H * N * d, dtype).view_as(expected)
            error = (ours - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{name} of {dtype}: {error:.1e}"
        take(B * H * N, torch.float32)
        statistics = attention_statistics(
            wide[0], wide[1], block_size=bs, key_padding_mask=real, backend="reference"
        )
        mean = take(N * N, torch.float32).view(N, N)
        assert torch.allclose(mean, statistics.mean_attention[0].double(), rtol=0, atol=1e-6)
        pooled = take((N // bs) ** 2, torch.float64).view(N // bs, N // bs) / (B * H)
        assert torch.allclose(pooled, statistics.pooled_mean.double(), rtol=0, atol=1e-6)
        assert (
            abs(
                take(N // bs, torch.float64).sum() / (B * H * (N // bs) ** 2)
                - statistics.pooled_square_mean
            )
            < 1e-9
        )
        assert not found
