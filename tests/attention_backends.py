"""What the attention tests share: the backends to test, the formulas in float64, the tolerance.

A backend (or one code path of it) joins every test by one more entry in CASES.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import emulated_amx
import emulated_cuda
import interpreted_triton
import pytest
import torch
from torch import Tensor

from kernels import available_backends, native

EVERY_OP = ("sparse", "dense", "statistics")
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    """One way to compute attention."""

    id: str
    backend: str  # the `backend` argument of the public functions
    activate: Callable[[], AbstractContextManager] = (
        nullcontext  # chooses a code path around a test
    )
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16, FP16)
    head_dims: tuple[int, ...] = (16, 32, 48, 64, 128)
    block_sizes: tuple[int, ...] = (16, 32, 64)
    skip: Callable[[], str | None] = lambda: None  # why this path cannot run here
    ops: tuple[str, ...] = EVERY_OP
    num_examples: int = 300  # of hypothesis in the fast tests; fewer for emulated devices
    max_tokens: int = 2**62  # B * N that it computes in a reasonable time

    @property
    def dtype(self) -> torch.dtype:
        """For tests in which it does not matter."""
        return self.dtypes[0]

    def claims(self, *, op=None, dtype=None, head_dim=None, block_size=None, tokens=0) -> bool:
        """Whether it does this; a claim that fails is a failed test. None is not asked about."""
        asked = (
            (op, self.ops),
            (dtype, self.dtypes),
            (head_dim, self.head_dims),
            (block_size, self.block_sizes),
        )
        known = all(value is None or value in claimed for value, claimed in asked)
        return known and tokens <= self.max_tokens


@contextmanager
def _cpu_isa(isa: str):
    native.select_isa(isa)
    try:
        yield
    finally:
        native.select_isa(os.environ.get("SAT_CPU_ISA", ""))


def _cpu(isa: str, dtypes=(FP32, BF16)) -> Case:
    """The compiled kernels in one instruction set."""
    return Case(
        f"cpu-{isa}",
        "cpu",
        activate=lambda: _cpu_isa(isa),
        dtypes=dtypes,
        block_sizes=(16, 32, 48, 64, 128),
        skip=lambda: native.reason_unavailable() or native.list_isas()[isa],
        num_examples=300 if isa == "avx2" else 100,
    )


CASES = [
    Case(
        "reference",
        "reference",
        dtypes=(FP32, BF16, FP16, FP64),
    ),
    *(_cpu(isa) for isa in ("portable", "avx2", "avx512")),
    _cpu("avx512_bf16", (BF16,)),
    Case(
        "cpu-amx-emulated",
        "cpu",
        activate=emulated_amx.active,
        dtypes=(BF16,),
        block_sizes=(16, 32, 48, 64, 128),
        skip=emulated_amx.reason_unavailable,
        num_examples=50,
        max_tokens=2048,
    ),
    Case("cuda", "cuda", device="cuda"),
    Case("triton", "triton", device="cuda"),
    Case(
        "triton-interpreted",
        "triton",
        activate=interpreted_triton.active,
        skip=interpreted_triton.reason_unavailable,
        head_dims=(32,),
        num_examples=10,
        max_tokens=512,
    ),
    Case("cuda-emulated", "cuda", activate=emulated_cuda.active, num_examples=50, max_tokens=2048),
    Case(
        "cuda-emulated-large-tiles",
        "cuda",
        activate=lambda: emulated_cuda.active(multiprocessors=0),
        ops=("statistics",),
        max_tokens=2048,
    ),
]


def pytest_params(op: str) -> list:
    """The cases that claim `op`, as parameters of a fixture."""
    return [
        pytest.param(case, id=case.id, marks=[pytest.mark.gpu] if case.device == "cuda" else [])
        for case in CASES
        if op in case.ops
    ]


def activated(case: Case):
    """Body of the `case` fixture: skip what cannot run on this machine, switch the path on."""
    if reason := case.skip():
        pytest.skip(f"{case.id}: {reason}")
    with case.activate():
        reason = available_backends()[case.backend]
        if reason is not True:
            pytest.skip(f"{case.backend}: {reason}")
        yield case


def dense_probs(
    query: Tensor,
    key: Tensor,
    block_mask: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    scale: float,
    pruned: str,
    causal: bool = False,
) -> Tensor:
    """p [B, H, N, N] as the specification writes it, in the inputs' dtype, differentiable."""
    exps, total, _ = _softmax(
        query, key, block_mask, block_size, key_padding_mask, scale, pruned, causal
    )
    return exps / total.masked_fill(total == 0, 1)


def log_denominators(query: Tensor, key: Tensor, *arguments) -> Tensor:
    """[B, H, N]: of `dense_probs`; -inf where nothing is attended."""
    exps, total, top = _softmax(query, key, *arguments)
    lse = total.log() + top
    return lse.masked_fill(exps.sum(-1, keepdim=True) == 0, -torch.inf).squeeze(-1)


def _softmax(
    query, key, block_mask, block_size, key_padding_mask, scale, pruned, causal=False
) -> tuple[Tensor, Tensor, Tensor]:
    N = query.shape[2]
    kept = block_mask.repeat_interleave(block_size, -2).repeat_interleave(block_size, -1)
    visible = torch.full((N,), N)
    if causal:  # query i sees i + 1 keys
        kept, visible = kept.tril(), torch.arange(1, N + 1)
    attended = kept if key_padding_mask is None else kept & key_padding_mask[:, None, None]
    scores = (query @ key.mT * scale).masked_fill(~attended, -torch.inf)
    num_pruned = (visible - kept.sum(-1))[..., None].to(query.dtype)
    if pruned == "masked":
        num_pruned = torch.zeros_like(num_pruned)
    top = scores.detach().amax(-1, keepdim=True)
    top = torch.where(num_pruned > 0, top.clamp_min(0), top).masked_fill(top == -torch.inf, 0)
    exps = (scores - top).exp()
    pruned_sum = torch.where(num_pruned > 0, num_pruned * (-top).exp(), 0)
    return exps, exps.sum(-1, keepdim=True) + pruned_sum, top


def dense_restatement(query, key, value, *args) -> Tensor:
    """Attention [B, H, N, d] from `dense_probs`."""
    return dense_probs(query, key, *args) @ value


def forward_backward(function, inputs, dout) -> list[Tensor]:
    """Output and the gradients of `inputs`, detached."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return [out.detach(), *grads]


def compare_with_float64(case: Case, function, inputs, dout, arguments, score_slack=0.0):
    """Hold `function` of query, key, value on the case's device to `dense_restatement`.

    arguments: of `dense_probs` after query and key. score_slack: see `assert_as_exact_as_torch`.
    Returns: output and gradients of `function`, on the CPU.
    """

    def restated(*qkv):
        return dense_restatement(*qkv, *arguments)

    on_device = [x.to(case.device) for x in (*inputs, dout)]
    ours = [x.cpu() for x in forward_backward(function, on_device[:3], on_device[3])]
    plain = forward_backward(restated, inputs, dout)
    doubles = [x.double() for x in (*inputs, dout)]
    exact = forward_backward(restated, doubles[:3], doubles[3])

    # dq and dk sum p * (dp - rowsum(p * dp)) times k or q: how large that is before it cancels
    query, key, value, dout = doubles
    scale = arguments[3]
    probs = dense_probs(query, key, *arguments)
    dprobs = dout @ value.mT
    dscores = probs * (dprobs.abs() + (probs * dprobs).sum(-1, keepdim=True).abs())
    terms = [exact[0], dscores @ key.abs() * scale, dscores.mT @ query.abs() * scale, exact[3]]

    score = largest_score(query, key, scale) + score_slack
    for what, *tensors in zip(("out", "dq", "dk", "dv"), ours, plain, exact, terms, strict=True):
        assert_as_exact_as_torch(*tensors, score, f"{case.id} {what}")
    return ours


def largest_score(query: Tensor, key: Tensor, scale: float) -> float:
    return (query.double() @ key.double().mT * scale).abs().max().item()


def assert_as_exact_as_torch(
    ours: Tensor, plain: Tensor, exact: Tensor, terms: Tensor, score: float, what: str
) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus rounding.

    Rounding is that of the result, of the fp32 `terms` whose sum it is, and, through the
    exponential, of scores as large as `score`: a kernel that recomputes exp(score - lse) for its
    gradients cannot know p better than score * eps. Both in the maximum, where one wrong row
    shows, and in the steadier mean square.
    """
    assert ours.dtype == plain.dtype and ours.shape == exact.shape, what
    rounding, eps = torch.finfo(ours.dtype).eps, torch.finfo(FP32).eps
    if ours.dtype == FP64:  # where plain and exact are one and the same
        rounding, eps = 4 * rounding, 4 * rounding
    for norm, measure in (
        ("max", lambda x: x.abs().max().item()),
        ("rms", lambda x: x.square().mean().sqrt().item()),
    ):
        error = measure(ours.double() - exact)
        error_of_torch = measure(plain.double() - exact)
        bound = (
            2 * error_of_torch + (rounding + eps * score) * measure(exact) + eps * measure(terms)
        )
        assert error <= bound, (  # written so that NaN fails
            f"{what}: {norm} error {error:.3g} exceeds {bound:.3g}, "
            f"plain torch has {error_of_torch:.3g}"
        )


def random_padding(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """bool [B, N]: real tokens first, one hole, the second example all padding."""
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < lengths
    mask[0, :3] = torch.tensor([True, False, True])
    if batch > 1:
        mask[1] = False
    return mask
