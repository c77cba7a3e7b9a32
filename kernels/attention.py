"""The public attention functions: check the arguments, choose a backend, call it.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.

A backend is a module kernels/<name>.py with

    name: str
    reason_unavailable() -> str | None
        Why it cannot run on this machine at all, such as "not built: run sh compile.sh".
    supports(op, query, layout) -> str | None
        Why it cannot do this call. `op` names one of the three functions below; `layout` is the
        call's (None for dense_attention, a full one of its block_size for attention_statistics).
        Looks at dtype, device and shapes, never at values.
    block_sparse_attention(query, key, value, layout, key_padding_mask, scale, pruned) -> Tensor
    dense_attention(query, key, value, key_padding_mask, scale) -> Tensor
    attention_statistics(query, key, block_size, key_padding_mask, scale, groups, full,
                         mean_out, mean_weight) -> AttentionStatistics

Arguments arrive checked: shapes, dtypes and devices agree, strides are arbitrary, `scale` is a
float, masks are bool or None. Autocast has been applied to the inputs and is switched off around
the call, but not around its backward pass. Gradients are the backend's affair; differentiating
twice is refused here, for all of them. The two attentions can be traced by torch.compile, except
for reason_unavailable, which is evaluated while tracing: a library is loaded there.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from types import ModuleType

import torch
from torch import Tensor

from kernels.layout import BlockLayout

log = logging.getLogger("sat.kernels")

BACKENDS = ("cuda", "triton", "cpu", "reference")  # fastest first: the order in which "auto" asks
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_modules: dict[str, ModuleType] = {}  # filled at first use: the backends import from this file
_said: set[str] = set()


def available_backends() -> dict[str, bool | str]:
    """Each backend with True, or the reason why it cannot be used on this machine."""
    return {name: _reason_unavailable(name) or True for name in BACKENDS}


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    pruned: str = "zero",
    backend: str = "auto",
) -> Tensor:
    """Attention over the key blocks that `layout` keeps for each query block.

    Args:
        query, key, value: [B, H, N, d] fp32, bf16 or fp16 (fp64 too on "reference") on one
            device; any strides; B may differ per call. Under autocast they are rounded to its
            dtype, as torch's own attention does.
        layout: BlockLayout with num_blocks * block_size == N, on the same device.
        key_padding_mask: bool [B, N], True = real token; None means all real.
        scale: factor on the scores; None means 1 / sqrt(d).
        pruned: "zero", a pruned score counts as logit 0 in the denominator; "masked", it counts
            as minus infinity.
        backend: "reference", "cpu", "triton", "cuda" or "auto" (choice said once); a named
            backend never falls back.
    Returns: [B, H, N, d], dtype of query. A row without an attended real key is zero and passes
        no gradient.
    Raises: ValueError if shapes, dtypes or devices disagree; RuntimeError if the named backend is
        not built or cannot do this call, and if the result is differentiated twice.
    Source: docs/semantics.md, "Sparse phase".
    """
    query, key, value = autocast_inputs(query, key, value)
    _check(query, key, value, key_padding_mask)
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"layout must be a BlockLayout, not {type(layout).__name__}")
    layout.check(query.shape[2], query.device)
    if pruned not in ("zero", "masked"):
        raise ValueError(f'pruned must be "zero" or "masked", not {pruned!r}')
    scale = check_scale(scale, query)
    query, key, value = _differentiable_once(query, key, value)
    module = choose_backend("block_sparse_attention", backend, query, layout)
    with torch.autocast(query.device.type, enabled=False):
        return module.block_sparse_attention(
            query, key, value, layout, key_padding_mask, scale, pruned
        )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over all keys that are not padded; nothing of size B * H * N * N is kept.

    Args, Returns, Raises: as for `block_sparse_attention`.
    Source: docs/semantics.md, "Dense phase".
    """
    query, key, value = autocast_inputs(query, key, value)
    _check(query, key, value, key_padding_mask)
    scale = check_scale(scale, query)
    query, key, value = _differentiable_once(query, key, value)
    module = choose_backend("dense_attention", backend, query, None)
    with torch.autocast(query.device.type, enabled=False):
        return module.dense_attention(query, key, value, key_padding_mask, scale)


def choose_backend(op: str, backend: str, query: Tensor, layout: BlockLayout | None) -> ModuleType:
    """The module that shall do `op`: the named one, or for "auto" the first of BACKENDS that can.

    Raises: ValueError for an unknown name, RuntimeError if the named one cannot.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of auto, {', '.join(BACKENDS)}, not {backend!r}"
            )
        reason = reason_against(backend, op, query, layout)
        if reason:
            raise RuntimeError(f"backend {backend} cannot do {op}: {reason}")
        return _modules[backend]
    passed = []
    for name in BACKENDS:
        reason = reason_against(name, op, query, layout)
        if reason is None:
            break
        passed.append(f"{name}: {reason}")
    _say_once(f"{op} uses backend {name}" + (f" ({'; '.join(passed)})" if passed else ""))
    return _modules[name]


def check_scale(scale: float | None, query: Tensor) -> float:
    """`scale` as a float, 1 / sqrt(d) for None."""
    if scale is None:
        return 1 / math.sqrt(query.shape[3])
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, not {scale}")
    return float(scale)


def check_padding(key_padding_mask: Tensor | None, query: Tensor) -> None:
    if key_padding_mask is None:
        return
    expected = [query.shape[0], query.shape[2]]
    if key_padding_mask.dtype != torch.bool or list(key_padding_mask.shape) != expected:
        raise ValueError(
            f"key_padding_mask must be bool {expected} (True = real token), "
            f"not {key_padding_mask.dtype} {list(key_padding_mask.shape)}"
        )
    if key_padding_mask.device != query.device:
        raise ValueError(
            f"key_padding_mask is on {key_padding_mask.device}, query on {query.device}"
        )


def check_inputs(**tensors: Tensor) -> None:
    """All [B, H, N, d] of one shape, one floating dtype, on one device."""
    (first, query), *others = tensors.items()
    if query.dim() != 4:
        raise ValueError(f"{first} must be [B, H, N, d], not {list(query.shape)}")
    if query.numel() == 0:
        raise ValueError(f"{first} is empty: {list(query.shape)}")
    if query.dtype not in DTYPES:
        raise ValueError(
            f"{first} must be float32, bfloat16, float16 or float64, not {query.dtype}"
        )
    for name, tensor in others:
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(query, what), getattr(tensor, what)
            if ours != theirs:
                raise ValueError(
                    f"{first} and {name} must agree in {what}, found {ours} and {theirs}"
                )


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inputs in autocast's dtype where it is on; fp64 stays, as in torch's own rule."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def _check(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> None:
    check_inputs(query=query, key=key, value=value)
    check_padding(key_padding_mask, query)


def _say_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        log.info(message)


# A constant to torch.compile, which can trace neither an import nor the loading of a library.
@torch.compiler.assume_constant_result
def _reason_unavailable(name: str) -> str | None:
    if not _modules:
        for other in BACKENDS:
            if importlib.util.find_spec(f"kernels.{other}"):
                _modules[other] = importlib.import_module(f"kernels.{other}")
    if name not in _modules:
        return "not part of this installation"
    return _modules[name].reason_unavailable()


def reason_against(name: str, op: str, query: Tensor, layout: BlockLayout | None) -> str | None:
    """Why the backend `name` cannot do `op`, a function's name, on such a query; None: it can."""
    return _reason_unavailable(name) or _modules[name].supports(op, query, layout)


class _Once(torch.autograd.Function):
    """The identity on `tensor`, one of `inputs`; what it passes back cannot be differentiated.

    It stands before the inputs, so that every second derivative passes it. Left to themselves the
    backends differ: an error, silent zeros, or right values at the cost of B * H * N * N.
    """

    @staticmethod
    def forward(ctx, tensor, *inputs):
        ctx.save_for_backward(*inputs)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return _Refusal.apply(grad, *ctx.saved_tensors), None, None, None


class _Refusal(torch.autograd.Function):
    """The identity on `grad`, tied to all inputs: a kernel's gradient looks like a constant."""

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("attention cannot be differentiated twice")


def _differentiable_once(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    inputs = (query, key, value)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # which refuses by itself
        return inputs
    return tuple(_Once.apply(x, *inputs) if x.requires_grad else x for x in inputs)
