"""The compiled library and what only it promises; values are in test_attention_semantics.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import (
    BlockLayout,
    attention_statistics,
    block_sparse_attention,
    dense_attention,
    native,
)

ROOT = Path(__file__).resolve().parents[1]

needs_library = pytest.mark.skipif(
    native.reason_unavailable() is not None, reason=str(native.reason_unavailable())
)


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def threads():
    """Sets torch's number of threads; puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(heads: tuple[int, int], dtype: torch.dtype, bs: int) -> list[torch.Tensor]:
    """Outputs, gradients and statistics of one small problem."""
    B, H = heads
    N, d = 256, 32
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(B, H, N, d, generator=generator) * 2 for _ in range(3)]
    query, key, value = (x.to(dtype).requires_grad_() for x in inputs)
    mask = torch.rand(N // bs, N // bs, generator=generator) < 0.4
    padding = torch.rand(B, N, generator=generator) < 0.8
    results = []
    for out in (
        block_sparse_attention(
            query,
            key,
            value,
            BlockLayout.from_mask(mask, bs),
            key_padding_mask=padding,
            backend="cpu",
        ),
        dense_attention(query, key, value, key_padding_mask=padding, backend="cpu"),
    ):
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), (query, key, value))]
    statistics = attention_statistics(
        query, key, block_size=bs, key_padding_mask=padding, groups=B, backend="cpu"
    )
    return [
        *results,
        statistics.mean_attention,
        statistics.pooled_mean,
        statistics.pooled_square_mean,
    ]


@needs_library
@pytest.mark.parametrize("bs", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2)])
def test_same_bits_for_any_number_of_threads(threads, heads, dtype, bs):
    # (1, 1) and, from 8 threads on, (3, 1) spread the rows and columns of a head over threads.
    threads(1)
    expected = everything(heads, dtype, bs)
    for count in (2, 3, 8):
        threads(count)
        for ours, theirs in zip(everything(heads, dtype, bs), expected, strict=True):
            assert torch.equal(ours, theirs), f"{count} threads give other bits than one"


@needs_library
def test_nan_and_infinity_are_not_swallowed():
    query, key, value = (torch.randn(1, 1, 64, 32) for _ in range(3))
    layout = BlockLayout.full(2, 32)
    for bad in (torch.nan, torch.inf):
        poisoned = query.clone()
        poisoned[0, 0, 5, 3] = bad
        out = block_sparse_attention(poisoned, key, value, layout, backend="cpu")
        assert out[0, 0, 5].isnan().all(), f"{bad} in a query gave {out[0, 0, 5, 0]}"
        assert out[0, 0, 6:].isfinite().all()


@needs_library
def test_one_openmp_runtime_in_the_process():
    code = (
        "import torch\nfrom kernels import native\nnative.load()\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line}\n"
        "names = [path.rsplit('/')[-1] for path in paths]\n"
        "print([n for n in names if n.startswith(('libgomp', 'libiomp', 'libomp'))])"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(".so") == 1, result.stdout


@needs_library
def test_loads_from_any_directory(tmp_path):
    result = run_python("from kernels import native; print(native.isa())", cwd=tmp_path)
    assert result.stdout.strip() in native.list_isas(), result.stderr


@needs_library
def test_instruction_set_can_be_forced():
    code = "from kernels import native; print(native.reason_unavailable() or native.isa())"
    assert run_python(code, SAT_CPU_ISA="portable").stdout.strip() == "portable"
    wrong = run_python(code, SAT_CPU_ISA="mmx").stdout.strip()
    assert wrong.startswith("SAT_CPU_ISA=mmx: there is no such instruction set; use one of port")
    missing = [name for name, reason in native.list_isas().items() if reason]
    for name in missing:
        said = run_python(code, SAT_CPU_ISA=name).stdout.strip()
        assert said.startswith(f"SAT_CPU_ISA={name}: ") and "use one of" in said, said


@needs_library
def test_c_refuses_what_it_cannot_do():
    from kernels.cpu import _ATTENTION

    packed = _ATTENTION.pack(*(0,) * 46, 1, 1, 40, 20, 20, 1, 0, 0, 0, 1, 1.0)
    with pytest.raises(RuntimeError, match="a shape or dtype it does not support"):
        native.call("sat_attention_forward", packed)
    with pytest.raises(AssertionError, match=r"abi\.h has another sat_attention_forward"):
        native.call("sat_attention_forward", packed[8:])


# ---- sanitizers ----------------------------------------------------------------------


def build_sanitized(copy: Path) -> None:
    """Builds `copy` with AddressSanitizer and UBSan, the tests beside it."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    built = compile_sh(copy, CXX="g++", CXXFLAGS=flags, NVCC="no-nvcc")
    assert built.returncode == 0, built.stderr


def run_sanitized(copy: Path, file: str, chosen: str) -> subprocess.CompletedProcess:
    """Runs the chosen tests of a file over what `build_sanitized` made."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "PYTHONPATH": str(copy),
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    # -s: the sanitizers end the process at once, with what pytest would have captured
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-k", chosen, f"tests/{file}"],
        cwd=copy,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    copy = clone(tmp_path)
    build_sanitized(copy)
    # neither what is compiled at run time nor how much memory a process has
    chosen = "cpu and not emulated and not any_layout and not inductor and not memory"
    for file, names in (
        ("test_attention_semantics.py", chosen + " and not keeps_nothing"),
        ("test_statistics_kernel.py", chosen),
        ("test_fused.py", "not memory"),
    ):
        found = run_sanitized(copy, file, names)
        assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
        assert " passed" in found.stdout


@pytest.mark.slow
def test_sanitizers_find_planted_overflows(tmp_path):
    copy = clone(tmp_path)
    for file, right, wrong in (
        ("attention.h", "store(lse + i, log2(total)", "store(lse + i + bs, log2(total)"),
        (
            "statistics.h",
            "memset(s.reference, 0, sizeof(float) * T)",
            "memset(s.reference, 0, 4 * T + 4)",
        ),
    ):
        kernel = copy / "kernels" / "csrc" / "cpu" / file
        source = kernel.read_text()
        assert source.count(right) == 1
        kernel.write_text(source.replace(right, wrong))
    build_sanitized(copy)
    for file, chosen, mistake in (
        ("test_attention_semantics.py", "cpu-portable and one_block", "heap-buffer-overflow"),
        # a piece of scratch runs into the gap behind it
        ("test_statistics_kernel.py", "cpu-portable and scale", "use-after-poison"),
    ):
        found = run_sanitized(copy, file, chosen)
        assert found.returncode != 0
        assert f"AddressSanitizer: {mistake}" in found.stdout + found.stderr


# ---- a library that does not fit the sources -----------------------------------------


def clone(tmp_path: Path) -> Path:
    """A copy of what compile.sh and the loader need, without the parts that take long to build."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "kernels",
        copy / "kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.cu", "*.cuh", "build*"),
    )
    shutil.copy(ROOT / "compile.sh", copy)
    return copy


def keep_only_the_frame(copy: Path) -> None:
    """Leaves library.cpp as the only source, so that compile.sh takes a second."""
    for source in (copy / "kernels" / "csrc" / "cpu").glob("*.cpp"):
        if source.name != "library.cpp":
            source.unlink()


def compile_sh(copy: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "compile.sh"],
        cwd=copy,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


REASON = "from kernels import native; print(native.reason_unavailable())"


def test_library_that_is_missing_stale_or_broken_is_refused_in_a_sentence(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    copy = clone(tmp_path)
    keep_only_the_frame(copy)

    def reason():
        return run_python(REASON, cwd=copy, PYTHONPATH=str(copy), SAT_CPU_ISA="").stdout.strip()

    assert reason() == "libsat_cpu.so is not built: run `sh compile.sh`"
    built = compile_sh(copy, CXX="g++", NVCC="no-nvcc")
    assert built.returncode == 0, built.stderr
    assert "built: kernels/libsat_cpu.so" in built.stdout
    assert reason() == "None"
    again = compile_sh(copy, CXX="g++", NVCC="no-nvcc")
    assert "up to date: kernels/libsat_cpu.so" in again.stdout

    with open(copy / "kernels" / "csrc" / "cpu" / "library.cpp", "a") as source:
        source.write("// changed\n")
    said = reason()
    assert said == "libsat_cpu.so was built from other sources than these: run `sh compile.sh`"
    library = copy / "kernels" / "libsat_cpu.so"
    library.write_bytes(b"not a library")
    assert "cannot be loaded" in reason() and "sh compile.sh" in reason()


def test_compile_sh_explains_what_it_cannot_do(tmp_path):
    copy = clone(tmp_path)
    keep_only_the_frame(copy)
    tools = tmp_path / "tools"  # a PATH with everything but compilers
    tools.mkdir()
    for tool in (
        "sh",
        "dirname",
        "mktemp",
        "rm",
        "head",
        "cat",
        "cut",
        "sha256sum",
        "uname",
        "tr",
    ):
        (tools / tool).symlink_to(shutil.which(tool))
    broken = tools / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'broken-g++: internal error' >&2\nexit 1\n")
    broken.chmod(0o755)

    def fails(**environment):
        result = compile_sh(copy, **environment)
        assert result.returncode != 0
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert "training still runs" in lines[0]
        assert not list((copy / "kernels").glob(".build*")), "the build directory stayed behind"
        return lines[0]

    assert "no C++ compiler found" in fails(PATH=str(tools), CXX="")
    assert "CXX=no-such-compiler is not a program" in fails(CXX="no-such-compiler")
    assert "cannot build a small library (broken-g++: internal error)" in fails(
        PATH=f"{tools}:{os.environ['PATH']}", CXX="broken-g++"
    )
    shutil.rmtree(tools / "mktemp", ignore_errors=True)
    (tools / "mktemp").unlink()
    (tools / "mktemp").write_text("#!/bin/sh\nexit 1\n")  # as without permission, also for root
    (tools / "mktemp").chmod(0o755)
    assert "cannot write into" in fails(PATH=f"{tools}:{os.environ['PATH']}")


def test_compile_sh_stops_at_the_first_error(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    copy = clone(tmp_path)
    keep_only_the_frame(copy)
    (copy / "kernels" / "csrc" / "cpu" / "broken.cpp").write_text("this is no C++\n")
    result = compile_sh(copy, CXX="g++")
    assert result.returncode != 0
    assert "g++ stopped in kernels/csrc/cpu/broken.cpp" in result.stderr
    assert not (copy / "kernels" / "libsat_cpu.so").exists()


def test_compile_sh_leaves_out_what_cannot_be_assembled(tmp_path):
    """A compiler may know an instruction that its assembler does not."""
    if shutil.which("g++") is None or os.uname().machine != "x86_64":
        pytest.skip("no g++ for x86-64")
    copy = clone(tmp_path)
    keep_only_the_frame(copy)
    (copy / "kernels" / "csrc" / "cpu" / "none_amx.cpp").write_text("")
    old = tmp_path / "old-g++"
    old.write_text(
        "#!/bin/sh\nfor file; do case $file in *probe.cpp) if grep -q _tile_dpbf16ps $file; then\n"
        "echo 'old-g++: error: no such instruction'; exit 1; fi ;; esac; done\nexec g++ \"$@\"\n"
    )
    old.chmod(0o755)
    result = compile_sh(copy, CXX=str(old), NVCC="no-nvcc")
    assert result.returncode == 0, result.stderr
    assert "left out: kernels/csrc/cpu/none_amx.cpp" in result.stdout
    assert "cannot compile for AMX" in result.stdout


def test_make_says_at_the_end_that_the_kernels_were_not_built(tmp_path):
    copy = clone(tmp_path)
    shutil.copy(ROOT / "Makefile", copy)
    (copy / "experiments").mkdir()
    (copy / "experiments" / "demo.sh").write_text("echo end of the demo; exit 3\n")
    result = subprocess.run(
        ["make", "demo", f"PYTHON={sys.executable}"],
        cwd=copy,
        env={**os.environ, "CXX": "no-such-compiler"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 2 and "Error 3" in result.stdout
    end = result.stdout.partition("end of the demo")[2]
    assert "compile.sh: CXX=no-such-compiler is not a program" in end
    assert "training still runs" in end


def test_scripts_have_no_carriage_returns_wherever_git_puts_some():
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "-c", "core.autocrlf=true", "archive", "--format=tar", "HEAD"]
    found = subprocess.run([*command, "compile.sh", "experiments"], cwd=ROOT, capture_output=True)
    if found.returncode != 0:
        pytest.skip("not a checkout of a git repository")
    assert b"set -u" in found.stdout and b"\r" not in found.stdout


COMPILERS = ("g++-10", "g++-11", "g++-12", "g++-13", "g++-14", "clang++-14", "clang++-15")
COMPILERS += ("clang++-16", "clang++-17")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_compiler_builds_the_same_semantics(tmp_path, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    copy = clone(tmp_path)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    built = compile_sh(copy, CXX=compiler, NVCC="no-nvcc")
    assert built.returncode == 0, built.stderr
    assert built.stderr == "", "warnings"
    assert "left out: kernels" not in built.stdout, built.stdout
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_attention_semantics.py", "tests/test_statistics_kernel.py"]
    found = subprocess.run(
        [*command, "-k", "cpu and not emulated and not inductor and not memory"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert " passed" in found.stdout
