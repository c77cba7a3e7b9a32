"""The AMX kernels on emulated tiles: that they use them, threads, how strict the emulation is.

Values are in test_attention_semantics.py and test_statistics_kernel.py (case `cpu-amx-emulated`).
"""

from __future__ import annotations

import shutil
import subprocess

import emulated_amx
import pytest
import torch
from test_cpu_kernel import everything, threads  # noqa: F401

from kernels import dense_attention, native

needs_vectors = pytest.mark.skipif(
    emulated_amx.reason_unavailable() is not None, reason=str(emulated_amx.reason_unavailable())
)


@needs_vectors
@pytest.mark.parametrize("d, per_product", [(32, 16), (48, 8)])
def test_products_are_those_of_the_formula(d, per_product):
    """Each of the 2 + 5 products of a full layout is taken by tiles, once."""
    B, H, N = 1, 2, 64
    inputs = [torch.randn(B, H, N, d).bfloat16().requires_grad_() for _ in range(3)]
    with emulated_amx.active():
        assert native.isa() == "amx"
        before = emulated_amx.count("products")
        out = dense_attention(*inputs, backend="cpu")
        out.sum().backward()
        used = emulated_amx.count("products") - before
    assert used == 7 * B * H * (N // 16) ** 2 * (d // 16) * 16 // (2 * per_product)


@needs_vectors
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2)])
def test_same_bits_for_any_number_of_threads(threads, heads):  # noqa: F811
    with emulated_amx.active():
        threads(1)
        expected = everything(heads, torch.bfloat16, 32)
        for count in (2, 3, 8):
            threads(count)
            for ours, theirs in zip(everything(heads, torch.bfloat16, 32), expected, strict=True):
                assert torch.equal(ours, theirs), f"{count} threads give other bits than one"


MISTAKES = {
    "_tile_zero(0);": "no configuration is loaded (tile 0)",
    "config.palette = 2; _tile_loadconfig(&config);": "only palette 1 has tiles (tile -1)",
    "config.rows[3] = 17; _tile_loadconfig(&config);": "a tile has at most 16 rows",
    "config.rows[3] = 0; _tile_loadconfig(&config);": "zero together (tile 3)",
    "_tile_loadconfig(&config); _tile_zero(7);": "the tile is not configured (tile 7)",
    "_tile_loadconfig(&config); _tile_stored(0, memory, 64);": "read before it is written",
    "_tile_loadconfig(&config); zero_all(); _tile_release(); _tile_dpbf16ps(0, 4, 6);": (
        "no configuration is loaded (tile 0)"
    ),
    "_tile_loadconfig(&config); zero_all(); _tile_loadconfig(&config); "
    "_tile_dpbf16ps(0, 4, 6);": "read before it is written (tile 0)",
    "_tile_loadconfig(&config); zero_all(); _tile_dpbf16ps(0, 4, 4);": "not distinct",
    "config.rows[0] = 8; _tile_loadconfig(&config); zero_all(); _tile_dpbf16ps(0, 4, 6);": (
        "C and A have different numbers of rows"
    ),
    "config.row_bytes[0] = 32; _tile_loadconfig(&config); zero_all(); "
    "_tile_dpbf16ps(0, 4, 6);": "C and B have different numbers of columns",
    "config.rows[6] = 8; _tile_loadconfig(&config); zero_all(); _tile_dpbf16ps(0, 4, 6);": (
        "A's pairs are not B's rows"
    ),
    "_tile_loadconfig(&config); zero_all(); _tile_dpbf16ps(0, 4, 6); "
    "_tile_stored(0, memory, 64);": "",
}

PROGRAM = """
#include "amx_emulation.h"
static amx_emulation::Config config;
static float memory[256];
static void zero_all() { for (int tile = 0; tile < 7; ++tile) _tile_zero(tile); }
static void begin() {
    amx_emulation::state = {};
    amx_emulation_error[0] = 0;
    config = {};
    config.palette = 1;
    for (int tile = 0; tile < 7; ++tile) config.rows[tile] = 16, config.row_bytes[tile] = 64;
}
static void end() { puts(amx_emulation_error); }
int main() {
%s
}
"""


def test_emulation_finds_planted_mistakes(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    source = tmp_path / "mistakes.cpp"
    source.write_text(PROGRAM % "\n".join(f"begin(); {code} end();" for code in MISTAKES))
    program = tmp_path / "mistakes"
    command = ["g++", "-std=c++17", f"-I{emulated_amx.HERE}", source, "-o", program]
    subprocess.run(command, check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    for (code, expected), line in zip(MISTAKES.items(), said.splitlines(), strict=True):
        assert expected in line and bool(expected) == bool(line), f"{code} gave {line!r}"
