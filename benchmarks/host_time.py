"""What a call of block_sparse_attention costs besides its arithmetic, forward and backward.

At N 64 the arithmetic is a few microseconds, so the time is the host's: checks, choice of the
backend, autograd, the call. Unless `--real` is given, the library's functions do nothing, so
that it is all of the time. On a GPU the host must stay ahead of kernels of this length.

    python benchmarks/host_time.py [--backend cuda] [--repeats 4000] [--real] [--compiled]

Of `cuda`, on CPU tensors, all is there but the question after the current stream.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NO_OP = """
int sat_attention_forward() { return 0; }
int sat_attention_backward() { return 0; }
int sat_cuda_forward() { return 0; }
int sat_cuda_backward() { return 0; }
int sat_cuda_denominators() { return 0; }
int sat_cuda_statistics() { return 0; }
int sat_cuda_fits() { return 0; }
const char* sat_cuda_error(int status) { return ""; }
const char* sat_operation(int i, long* size) {
    *size = SIZE;
    return i == 0 ? "attention_forward" : i == 1 ? "attention_backward" : 0;
}
"""


def no_op_library() -> ctypes.CDLL:
    """A library whose attention returns at once."""
    from kernels import cpu

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "no_op.so"
        size = f"-DSIZE={cpu._ATTENTION.size}"
        command = ["cc", "-x", "c", size, "-shared", "-fPIC", "-o", path, "-"]
        subprocess.run(command, input=NO_OP, text=True, check=True)
        return ctypes.CDLL(str(path))


def measure(run, repeats: int) -> str:
    """Median and quartiles in microseconds of this thread over batches of 50 calls."""
    for _ in range(200):
        run()
    times = []
    for _ in range(repeats // 50):
        start = time.thread_time()
        for _ in range(50):
            run()
        times.append((time.thread_time() - start) / 50 * 1e6)
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:7.1f}  ({low:.1f} .. {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--real", action="store_true", help="the real library")
    parser.add_argument("--compiled", action="store_true", help="torch.compile'd, aot_eager")
    args = parser.parse_args()

    import torch

    from kernels import BlockLayout, block_sparse_attention, cuda, native

    torch.set_num_threads(1)
    if not args.real:
        library = no_op_library()
        native._load = lambda: (library, None)
        declared = cuda.declare(library)
        cuda._load = lambda: (declared, None)
        cuda.DEVICE, cuda._no_device = "cpu", lambda: None
    query, key, value = (torch.randn(1, 1, 64, 32, requires_grad=True) for _ in range(3))
    layout = BlockLayout.full(2, 32)
    dout = torch.randn(1, 1, 64, 32)

    def forward(*qkv):
        return block_sparse_attention(*qkv, layout, backend=args.backend)

    if args.compiled:
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        print(f"forward, no gradient  {measure(lambda: forward(query, key, value), args.repeats)}")

    def both():
        torch.autograd.grad(forward(query, key, value), (query, key, value), dout)

    print(f"forward               {measure(lambda: forward(query, key, value), args.repeats)}")
    print(f"forward and backward  {measure(both, args.repeats)}")
    print(f"microseconds of the thread, median (quartiles); torch {torch.__version__}")


if __name__ == "__main__":
    main()
