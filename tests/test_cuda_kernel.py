"""The backend `cuda` around its kernels: build, report, loading, and what only a GPU shows.

What the kernels compute is tested in test_attention_semantics.py and test_statistics_kernel.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest
import torch

from benchmarks import attention_cuda
from kernels import BlockLayout, attention_statistics, block_sparse_attention, cuda, triton
from kernels.backends import Call, choose

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "kernels" / "libsat_cuda.ptxas.txt"
EVERY_ARCH = "75 80 86 89 90 100 120"


# ---- the build -----------------------------------------------------------------------


def built_here() -> None:
    """Skip unless `sh compile.sh` has built the CUDA library of these sources."""
    if not cuda.LIBRARY.exists() or not REPORT.exists():
        pytest.skip("kernels/libsat_cuda.so is not built: it needs nvcc and sh compile.sh")
    library = ctypes.CDLL(str(cuda.LIBRARY))
    library.sat_source_hash.restype = ctypes.c_char_p
    if library.sat_source_hash().decode() != cuda.source_hash():
        pytest.skip("kernels/libsat_cuda.so is of other sources: run sh compile.sh")


def read_report(text: str) -> list[dict]:
    """What ptxas says of each kernel: arch, type, name, head_dim, spilled bytes, registers."""
    kernels = re.findall(
        r"entry function '_ZN3sat\d+(\w+?)_kernelINS_\d(\w+?)ELi(\d+)E(\S*)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    names = ("name", "type", "head_dim", "rest", "arch", "stores", "loads", "registers")
    return [
        {k: int(v) if v.isdigit() else v for k, v in zip(names, kernel, strict=True)}
        for kernel in kernels
    ]


def check_report(text: str) -> None:
    kernels = read_report(text)
    archs = {kernel["arch"] for kernel in kernels}
    # 3 types, 3 head_dims, 16, 32 or 64 rows, 4 passes; 16 or 32 causal ones, 3 passes; statistics
    # in two sizes. Not of 128 in fp32: 64 rows, the smaller statistics
    assert len(kernels) == len(archs) * ((27 - 1) * 4 + 18 * 3 + 2 * 9 - 1)
    spilled = [k for k in kernels if k["head_dim"] <= 64 and k["stores"] + k["loads"] > 0]
    assert not spilled, f"{len(spilled)} kernels spill registers: {spilled[:4]}"
    assert "warning" not in text


def test_no_spills_at_head_dims_32_and_64():
    built_here()
    check_report(REPORT.read_text())


@pytest.fixture
def copy_of_sources(tmp_path) -> Path:
    """A folder with the CUDA sources and build script only."""
    (tmp_path / "kernels").mkdir()
    shutil.copytree(
        ROOT / "kernels" / "csrc", tmp_path / "kernels" / "csrc", ignore=lambda *_: {"build"}
    )
    return tmp_path


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", folder / "kernels" / "csrc" / "cuda" / "build_cuda.sh"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def fake_nvcc(folder: Path, body: str) -> str:
    """A compiler that notes its arguments in nvcc.log; `body` is shell."""
    script = folder / "fake-nvcc"
    script.write_text(f'#!/bin/sh\necho "$@" >>{folder}/nvcc.log\n{body}\n')
    script.chmod(0o755)
    return str(script)


WRITES_ITS_OUTPUT = 'while [ "$1" != -o ] && [ $# -gt 1 ]; do shift; done; echo "$id" >"$2"'


@pytest.mark.slow
def test_every_architecture_compiles_without_warnings_and_spills(copy_of_sources):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    done = build(copy_of_sources, SAT_CUDA_ARCHS=EVERY_ARCH)
    assert done.returncode == 0 and not done.stderr, done.stderr
    check_report((copy_of_sources / "kernels" / REPORT.name).read_text())


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"NVCC": "no-such-nvcc"}, "no-such-nvcc is not a program that can be run"),
        ({"SAT_CUDA_ARCHS": "80 sm_90"}, 'SAT_CUDA_ARCHS="80 sm_90": sm_90 is not a number'),
        ({"SAT_CUDA_ARCHS": "70"}, "the kernels need compute capability 7.5 or newer, not 70"),
    ],
)
def test_build_mistakes(copy_of_sources, environment, message):
    done = build(copy_of_sources, **{"NVCC": fake_nvcc(copy_of_sources, ""), **environment})
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_failed_compilation_keeps_the_old_library(copy_of_sources):
    library = copy_of_sources / "kernels" / "libsat_cuda.so"
    library.write_text("old")
    nvcc = fake_nvcc(
        copy_of_sources, 'case "$*" in *bfloat*) echo "line 7: no" >&2; exit 1;; esac'
    )
    done = build(copy_of_sources, NVCC=nvcc, SAT_CUDA_ARCHS="80")
    assert done.returncode == 1
    assert (
        "line 7: no" in done.stderr
        and "stopped in kernels/csrc/cuda/attention_bfloat.cu" in done.stderr
    )
    assert library.read_text() == "old"
    assert [p.name for p in (copy_of_sources / "kernels").iterdir() if ".build" in p.name] == []


def test_the_build_knows_its_architectures_and_when_it_is_up_to_date(copy_of_sources):
    # The library "contains" the arguments of its compilation, as the real one does its build id.
    nvcc = fake_nvcc(copy_of_sources, f"id=$(cat {copy_of_sources}/nvcc.log)\n{WRITES_ITS_OUTPUT}")
    done = build(copy_of_sources, NVCC=nvcc, SAT_CUDA_ARCHS="75 90")
    assert done.returncode == 0, done.stderr
    arguments = (copy_of_sources / "nvcc.log").read_text()
    for code in ("sm_75", "sm_90", "compute_90"):
        assert f"code={code}" in arguments
    assert "code=compute_75" not in arguments
    (copy_of_sources / "kernels" / "libsat_cuda.so").write_text(
        "SAT_BUILD=" + re.search(r"SAT_BUILD_ID=\"(\w+)\"", arguments)[1]
    )
    assert "up to date" in build(copy_of_sources, NVCC=nvcc, SAT_CUDA_ARCHS="75 90").stdout
    assert "built" in build(copy_of_sources, NVCC=nvcc, SAT_CUDA_ARCHS="90").stdout


# ---- loading -------------------------------------------------------------------------


def test_without_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.can_run(Call()) == "torch finds no CUDA device"


@pytest.mark.parametrize("state", ["missing", "broken", "foreign", "stale"])
def test_unusable_libraries_are_refused_in_a_sentence(monkeypatch, tmp_path, state):
    path = tmp_path / "libsat_cuda.so"
    if state == "broken":
        path.write_bytes(b"\x7fELF not a library")
    elif state == "foreign":
        path = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    elif state == "stale":  # the emulation says that its sources' hash is "emulated"
        path = Path(emulated_cuda.library()._name)
        monkeypatch.setattr(cuda, "source_hash", lambda: "another")
    monkeypatch.setattr(cuda, "LIBRARY", path)
    library, reason = cuda._load.__wrapped__()
    assert library is None and "\n" not in reason and "sh compile.sh" in reason
    expected = {"missing": "is not built", "stale": "was built from other sources"}
    assert expected.get(state, "cannot be loaded") in reason


def test_the_structs_agree_with_c():
    assert cuda._ATTENTION.size == emulated_cuda.library().sat_cuda_struct_bytes()


def test_triton_is_next_where_the_library_is_not_built(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_load", lambda: (None, "libsat_cuda.so is not built"))
    monkeypatch.setattr(triton, "_reason_unavailable", lambda: None)
    monkeypatch.setattr(triton, "_capability", lambda device: (9, 0))
    call = Call("block_sparse_attention", torch.device("cuda"), (torch.float32,), (32,), 256, 32)
    assert choose(call, "auto") is triton
    with pytest.raises(RuntimeError, match=r"libsat_cuda\.so is not built$"):
        choose(call, "cuda")
    for change, message in (
        ({"block_size": 40}, "block_size 40, it needs a multiple of 16"),
        ({"sizes": (160,)}, "head_dim 160, it goes up to 128"),
    ):
        assert choose(call._replace(**change), "auto").name == "reference"
        with pytest.raises(RuntimeError, match=message):
            choose(call._replace(**change), "triton")


# ---- emulated: what the semantics tests do not reach -----------------------------------


def problem(device="cpu", dtype=torch.float16, B=2, H=2, N=128, d=64, bs=32):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, H, N, d, generator=generator) for _ in range(4)]
    mask = torch.rand(N // bs, N // bs, generator=generator) < 0.5
    mask[1] = False
    padding = torch.rand(B, N, generator=generator) < 0.8
    return (
        [x.to(device, dtype) for x in tensors],
        BlockLayout.from_mask(mask, bs).to(device),
        padding.to(device),
    )


def step(query, key, value, dout, layout, padding, backend="cuda"):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = block_sparse_attention(*leaves, layout, key_padding_mask=padding, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def test_rows_that_are_aligned_are_not_copied(monkeypatch):
    fused = torch.randn(2, 64, 3, 2, 33)
    layout = BlockLayout.full(2, 32)
    layout.lists  # noqa: B018
    clone, copies = torch.Tensor.clone, []
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **k: copies.append(x) or clone(x, **k))
    for inputs, expected_copies in (
        (fused[..., :32].clone(), 0),
        (fused[..., :32], 3),  # rows start at odd multiples of 4 bytes
        (torch.randn(2, 64, 3, 2, 64)[..., ::2], 3),
        (torch.randn(2 * 64 * 6 * 32 + 1)[1:].view(2, 64, 3, 2, 32), 3),
    ):
        qkv = [inputs[:, :, i].transpose(1, 2) for i in range(3)]
        expected = block_sparse_attention(*qkv, layout, backend="reference")
        copies.clear()
        with emulated_cuda.active():
            got = block_sparse_attention(*qkv, layout, backend="cuda")
        assert len(copies) == expected_copies
        torch.testing.assert_close(got, expected)


def test_the_output_lies_as_the_projection_wants_it():
    fused = torch.randn(2, 64, 3, 2, 32)
    query, key, value = (fused[:, :, i].transpose(1, 2) for i in range(3))
    with emulated_cuda.active():
        out = block_sparse_attention(query, key, value, BlockLayout.full(2, 32), backend="cuda")
    assert out.transpose(1, 2).is_contiguous()


def test_strided_padding_masks():
    tensors, layout, padding = problem()
    with emulated_cuda.active():
        expected = step(*tensors, layout, padding)
        strided = padding.t().contiguous().t()
        assert strided.stride() == (1, 2)
        for got, wanted in zip(step(*tensors, layout, strided), expected, strict=True):
            assert torch.equal(got, wanted)


# ---- the benchmark ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse")
def test_the_benchmark_computes_the_original_s_way_right():
    generator = torch.Generator().manual_seed(2)
    query, key, value, dout = (torch.randn(2, 2, 64, 32, generator=generator) for _ in range(4))
    mask = torch.rand(4, 4, generator=generator) < 0.5
    mask[0] = False
    layout = BlockLayout.from_mask(mask, 16)
    expected = step(query, key, value, dout, layout, None, backend="reference")
    csr = attention_cuda.Csr(layout)
    got = [*csr.step(query, key, value), *csr.step(query, key, value, dout)]
    for ours, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_the_computed_limits_need_no_gpu(capsys):
    attention_cuda.print_limits()
    # image, bf16: 16 * 2 * 51 blocks of 32 * 32 scores, 4 * 32 operations each
    assert f"{16 * 2 * 51 * 1024 * 128 / 989e6:.2f}" in capsys.readouterr().out.splitlines()[2]


# ---- on a GPU ------------------------------------------------------------------------


def gpu(test):
    reason = "torch finds no CUDA device"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@gpu
def test_the_emulation_agrees_with_the_gpu():
    tensors, layout, padding = problem()
    with emulated_cuda.active():
        emulated = step(*tensors, layout, padding)
    on_gpu = step(*(x.cuda() for x in tensors), layout.to("cuda"), padding.cuda())
    for got, expected in zip(on_gpu, emulated, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-3, atol=2e-3)


@gpu
def test_no_host_synchronisation():
    tensors, layout, padding = problem("cuda")
    step(*tensors, layout, padding)
    attention_statistics(*tensors[:2], block_size=32, key_padding_mask=padding, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors, layout, padding)
        attention_statistics(*tensors[:2], block_size=32, key_padding_mask=padding, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_cuda_graphs():
    tensors, layout, padding = problem("cuda")
    others = [x.flip(2).contiguous() for x in tensors]
    expected = step(*others, layout, padding)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*tensors, layout, padding)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*tensors, layout, padding)
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)


@gpu
def test_the_current_stream_is_used():
    tensors, layout, padding = problem("cuda")
    expected = step(*tensors, layout, padding)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(x) for x in tensors]
        torch.cuda._sleep(100_000_000)  # on a wrong stream the kernels would read the zeros
        for tensor, source in zip(late, tensors, strict=True):
            tensor.copy_(source)
        got = step(*late, layout, padding)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@gpu
def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    tensors, layout, padding = problem("cuda:0")
    expected = step(*tensors, layout, padding)
    other = step(*(x.to("cuda:1") for x in tensors), layout.to("cuda:1"), padding.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for got, wanted in zip(other, expected, strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), wanted.cpu())


@gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import torch, test_cuda_kernel as t\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for d, bs in ((32, 16), (64, 32), (64, 64), (128, 64)):\n"
        "        tensors, layout, padding = t.problem('cuda', dtype, d=d, bs=bs)\n"
        "        t.step(*tensors, layout, padding)\n"
        "        t.attention_statistics(*tensors[:2], block_size=bs, backend='cuda')\n"
        "torch.cuda.synchronize()\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex"]
    command += ["kns=sat", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
