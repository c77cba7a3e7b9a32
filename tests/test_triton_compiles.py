"""Every Triton kernel, as it is launched, compiles for sm_80 and sm_90, fits into shared memory
and, at head_dim 32 and 64, into registers: the interpreter takes programs that the compiler
refuses, and knows no limits.

    python tests/test_triton_compiles.py        (without TRITON_INTERPRET)
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# of shared memory in a thread block: GeForce cards run the code of sm_80
SHARED = {80: 101376, 90: 232448}


@pytest.mark.slow
def test_every_kernel_compiles():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(" fits ") >= 2 * 40


def record():
    """Launches of all operations in each dtype, none of which happens: kernel, types of arguments
    by name, constants, arguments that are 1, and those that are multiples of 16."""
    import torch

    from kernels import (
        BlockLayout,
        attention_statistics,
        block_sparse_attention,
        dense_attention,
        triton,
        triton_attention,
        triton_layer,
    )
    from kernels.dropout import DropoutKey
    from kernels.layer import (
        attention_output_feed_forward,
        attention_projections,
        dropout_add_layer_norm,
        embedding_dropout_layer_norm,
        gelu_dropout,
        masked_mean,
    )

    launches = {}

    def launch(kernel, grid, *arguments, **constants):
        """As Triton specialises it: numbers that are 1, pointers and numbers in sixteens."""
        names = [name for name in kernel.arg_names if name not in constants]
        given = dict(zip(names, arguments, strict=True))
        plain = {p.name for p in kernel.params if p.do_not_specialize}
        ones = {n: 1 for n, x in given.items() if type(x) is int and x == 1 and n not in plain}
        types = {name: signature(x) for name, x in given.items() if name not in ones}
        aligned = [
            name
            for name, x in given.items()
            if not isinstance(x, float) and name not in plain | set(ones)
            and (isinstance(x, torch.Tensor) or x % 16 == 0)
        ]  # fmt: skip
        key = repr((kernel.__name__, types, constants, ones, aligned))
        launches[key] = kernel, types, constants, ones, aligned

    def signature(x):
        if isinstance(x, torch.Tensor):
            short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "bool": "i1"}
            name = str(x.dtype).removeprefix("torch.")
            return "*" + short.get(name, name.replace("uint", "u").replace("int", "i"))
        return "fp32" if isinstance(x, float) else "i32"

    triton.DEVICE = "cpu"
    triton_layer.launch = triton_attention.launch = launch
    options = {"p": 0.1, "key": DropoutKey(1, 2, 3), "backend": "triton"}
    B, N, E, F = 4, 256, 64, 128

    def weight(*shape):
        return torch.zeros(*shape, requires_grad=True)

    def layer(d):
        ids = torch.zeros(B, N, dtype=torch.int64)
        norm = weight(E), weight(E)
        x, normed = embedding_dropout_layer_norm(
            ids, weight(512, E), weight(N, E), *norm, site=0, **options
        )
        maps = [(weight(2 * d, E), weight(2 * d)) for _ in range(3)]
        qkv = attention_projections(normed, *maps, heads=2, backend="triton")
        mask = torch.ones(B, N, dtype=torch.bool)
        given = {"key_padding_mask": mask, "backend": "triton"}
        out = dense_attention(*qkv, **given)
        for layout in layouts:
            out = out + block_sparse_attention(*qkv, layout, **given)
        attention_statistics(*qkv[:2], block_size=32, **given)
        attended = out.transpose(1, 2).reshape(B, N, -1)
        z, normed = attention_output_feed_forward(
            x, attended, (weight(E, 2 * d), weight(E)), norm, (weight(F, E), weight(F)),
            (weight(E, F), weight(E)), norm, sites=(1, 2, 3), **options,
        )  # fmt: skip
        _, normed = dropout_add_layer_norm(z, normed, *norm, site=4, **options)
        pooled = masked_mean(gelu_dropout(normed, site=5, **options), mask, backend="triton")
        pooled.sum().backward()

    everything = torch.ones(N // 16, N // 16, dtype=torch.bool)
    layouts = [BlockLayout.from_mask(everything, 16, causal=True), BlockLayout.full(N // 64, 64)]
    for dtype in (torch.bfloat16, torch.float32):
        for d in (32, 64, 128):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                layer(d)
    return launches.values()


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where registers are spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", found)[0]
    return int(registers), int(stack)


def main():
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chosen = sys.argv[1:]
    for kernel, types, constants, ones, aligned in record():
        if chosen and kernel.__name__ not in chosen:
            continue
        options = {k: v for k, v in constants.items() if k.startswith("num_")}
        fixed = {k: v for k, v in constants.items() if k not in options} | ones
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        attributes = {(kernel.arg_names.index(x),): [["tt.divisibility", 16]] for x in aligned}
        for arch, limit in SHARED.items():
            source = ASTSource(kernel, signature, fixed, attributes)
            built = compile(source, GPUTarget("cuda", arch, 32), options)
            shared, (registers, spilled) = built.metadata.shared, resources(built.asm["cubin"])
            what = f"{kernel.__name__} sm_{arch} {constants} {set(types.values())}: {shared} bytes"
            what += f", {registers} registers, {spilled} spilled"
            assert shared <= limit, what
            assert spilled == 0 or constants.get("D", 0) > 64, what
            print(f"{what} fits {limit}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
