"""The compiled operations as torch operators sat::NAME: their arguments, once for all backends.

Each is called with its inputs, its settings and the name of a backend, whose module computes it in
NAME_forward and its derivative in NAME_backward. Under torch.compile, torch.func and the like it
is a torch operator, with what these need to know; in eager mode an autograd Function does the same
in less than half the time (benchmarks/host_time.py). Differentiating twice is refused.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs; E
features, K width of the attended values, F hidden width, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backends
from kernels.layout import BlockLayout

_library = torch.library.Library("sat", "FRAGMENT")
_OPERATORS: dict[str, Operator] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def run(name: str, module: ModuleType, *arguments: Any) -> Any:
    """Operation `name` by the backend `module`: its own function, or else the operator."""
    own = getattr(module, name, None)
    return own(*arguments) if own else _OPERATORS[name](*arguments, module.name)


class Operator:
    """One row of the table below.

    inputs, outputs: as in a torch schema; "str backend" follows the inputs.
    public: how many outputs the caller gets; the rest is kept for the backward pass.
    differentiable: how many of these have a gradient.
    gradients: names of the inputs that the backward pass gives gradients of, in its order.
    saved: names of the tensors that it reads, inputs or outputs.

    NAME_backward takes a gradient of each differentiable output (None if there is none), what is
    saved, and all inputs that are no tensors.
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        outputs: str,
        fake: Callable,
        public: int = 1,
        differentiable: int = 1,
        gradients: str = "",
        saved: str = "",
        fake_backward: Callable | None = None,
    ) -> None:
        _OPERATORS[name] = self
        self.name, self.public = name, public
        self.operator = self._register(name, f"{inputs}, str backend", outputs, fake)
        self.function: Any = None
        if not gradients:
            return
        types = [part.split() for part in f"{inputs}, str backend".split(", ")]
        names = [name for _, name in types]
        results = [part.split()[1] for part in outputs.split(", ")]
        settings = [i for i, (kind, _) in enumerate(types) if kind not in ("Tensor", "Tensor?")]
        kinds = {name: kind for kind, name in types}
        douts = [f"Tensor? d{name}" for name in results[:differentiable]]
        kept = [f"{kinds.get(name, 'Tensor')} {name}" for name in saved.split()]
        rest = [" ".join(types[i]) for i in settings]
        backward = self._register(
            f"{name}_backward",
            ", ".join(douts + kept + rest),
            ", ".join(f"Tensor d{name}" for name in gradients.split()),
            fake_backward,
        )
        pick_saved = itemgetter(*((names + results).index(name) for name in saved.split()))
        pick_settings = itemgetter(*settings)
        several_saved, several_settings = " " in saved, len(settings) > 1
        # The inputs with gradients stand together.
        first, count = names.index(gradients.split()[0]), len(gradients.split())
        assert names[first : first + count] == gradients.split()
        before, after = (None,) * first, (None,) * (len(names) - first - count)

        def setup(ctx: Any, values: Sequence[Any]) -> None:
            picked = pick_saved(values)
            ctx.save_for_backward(*(picked if several_saved else (picked,)))
            picked = pick_settings(values)
            ctx.settings = picked if several_settings else (picked,)
            ctx.set_materialize_grads(False)

        def differentiate(compute: Callable, ctx: Any, dout: Sequence[Any]) -> tuple[Any, ...]:
            found = compute(*dout[:differentiable], *ctx.saved_tensors, *ctx.settings)
            return (*before, *(found if count > 1 else (found,)), *after)

        def differentiate_operator(ctx: Any, *dout: Any) -> tuple[Any, ...]:
            return differentiate(backward, ctx, dout)

        def setup_operator(ctx: Any, inputs: tuple, output: Any) -> None:
            setup(ctx, (*inputs, *(output if len(results) > 1 else (output,))))

        register = torch.library.register_autograd
        register(f"sat::{name}", differentiate_operator, setup_context=setup_operator)
        register(f"sat::{name}_backward", _refuse)

        def forward(*inputs: Any) -> Any:
            return _compute(f"{name}_forward", inputs)

        def setup_eagerly(ctx: Any, inputs: tuple, output: Any) -> None:
            output = output if len(results) > 1 else (output,)
            setup(ctx, (*inputs, *output))
            ctx.mark_non_differentiable(*output[differentiable:])

        def eager_backward(*values: Any) -> Any:
            return _compute(f"{name}_backward", values)

        once = _function(f"{name}_backward", eager_backward, lambda *context: None, _refuse)

        def differentiate_eagerly(ctx: Any, *dout: Any) -> tuple[Any, ...]:
            compute = once.apply if torch.is_grad_enabled() else eager_backward
            return differentiate(compute, ctx, dout)

        self.function = _function(name, forward, setup_eagerly, differentiate_eagerly)
        # All that Function.apply does otherwise is for torch.func, and slow.
        self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]

    def _register(self, name: str, inputs: str, outputs: str, fake: Callable | None) -> Any:
        _library.define(f"{name}({inputs}) -> ({outputs})")
        implementation = name if name.endswith("_backward") else f"{name}_forward"
        # For any device: the tests run the CUDA kernels emulated on the CPU.
        _library.impl(
            name,
            lambda *values: _apart(_compute(implementation, values)),
            "CompositeExplicitAutograd",
        )
        assert fake is not None
        torch.library.register_fake(f"sat::{name}", lambda *values: fake(*values[:-1]))
        return getattr(torch.ops.sat, name).default

    def __call__(self, *values: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or type(values[0]) not in _PLAIN
            or torch._C._len_torch_dispatch_stack()
        ):
            found = self.operator(*values)
        elif self.function is None:
            return _compute(f"{self.name}_forward", values)
        elif torch._C._are_functorch_transforms_active():
            found = self.function.apply(*values)
        else:
            found = self.apply(*values)
        if isinstance(found, Tensor):
            return found
        return found[0] if self.public == 1 else tuple(found[: self.public])


def _function(name: str, forward: Callable, setup_context: Callable, backward: Callable) -> Any:
    """An autograd Function called `name`."""
    parts = {"forward": forward, "setup_context": setup_context, "backward": backward}
    static = {key: staticmethod(value) for key, value in parts.items()}
    return type(name, (torch.autograd.Function,), static)


def _compute(function: str, values: Sequence[Any]) -> Any:
    return getattr(backends.module(values[-1]), function)(*values[:-1])


def _apart(found: Any) -> Any:
    """What an operator returns, no two in one memory: views of one sum are copied."""
    if isinstance(found, Tensor):
        return found
    memory: set[int] = set()
    results = []
    for x in found:
        at = x.untyped_storage()._cdata
        results.append(x.clone() if at in memory else x)
        memory.add(at)
    return tuple(results)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("the compiled operations cannot be differentiated twice")


# ---- attention -------------------------------------------------------------------------


def like_query(query: Tensor) -> Tensor:
    """[B, H, N, d]; in memory [B, N, H, d] if query's heads lie together (a projection)."""
    B, H, N, d = query.shape
    _, head, row, _ = query.stride()
    if head < row:
        return query.new_empty(B, N, H, d).transpose(1, 2)
    return query.new_empty(B, H, N, d)


def pad_head_dim(width: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[..., d] -> [..., width]: zeros change no score, and add columns of zeros to the output."""
    more = width - tensors[0].shape[-1]
    return tuple(F.pad(x, (0, more)) for x in tensors) if more else tensors


def attention_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """out like `query`, lse [B, H, N] fp32."""
    B, H, N, _ = query.shape
    return like_query(query), query.new_empty(B, H, N, dtype=torch.float32)


def attention_gradients(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first = like_query(query)
    return first, torch.empty_like(first), torch.empty_like(first)


# A BlockLayout's lists, or none of them for dense attention. lse: log2 of the softmax
# denominator, beyond NO_KEY in rows without a key.
NO_KEY = 1e29
Operator(
    "attention",
    "Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, Tensor? row_offsets, "
    "Tensor? row_columns, Tensor? column_offsets, Tensor? column_rows, int block_size, "
    "float scale, bool pruned_zero, bool causal",
    "Tensor out, Tensor lse",
    lambda query, *rest: attention_outputs(query),
    public=2,
    gradients="query key value",
    saved="query key value out lse key_padding_mask row_offsets row_columns column_offsets "
    "column_rows",
    fake_backward=lambda dout, query, *rest: attention_gradients(query),
)


def attention(
    backend: str,
    width: int,
    block_size: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout | None,
    key_padding_mask: Tensor | None,
    scale: float,
    pruned_zero: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """The operator of a backend compiled for head_dim `width`, and lse as callers get it."""
    d = query.shape[3]
    query, key, value = pad_head_dim(width, query, key, value)
    lists, causal = (layout.lists, layout.causal) if layout else ((None,) * 4, False)
    settings = block_size, scale, pruned_zero, causal, backend
    out, lse = _OPERATORS["attention"](query, key, value, key_padding_mask, *lists, *settings)
    if return_lse:
        lse = torch.where(lse > NO_KEY, -math.inf, lse * math.log(2)).detach()
        if layout and layout.heads is None and not causal:
            # kernels may count the zeros of a row that attends to nothing
            kept = layout.block_mask[None]
            if key_padding_mask is not None:
                kept = kept & key_padding_mask.unflatten(1, (-1, block_size)).any(2)[:, None]
            attends = kept.any(2).repeat_interleave(block_size, 1)
            lse.masked_fill_(~attends[:, None], -math.inf)
    return (out if width == d else out[..., :d]), lse


def _pooled_outputs(query: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    nb = query.shape[2] // block_size
    mean, real = (query.new_empty(nb, nb, dtype=torch.float32) for _ in range(2))
    return mean, query.new_empty((), dtype=torch.float64), real


# mean: [groups, N, N] fp32, overwritten unless `accumulate`; lse: of the same scores, a help;
# row_weights: [B, N] fp32 of pooled_real, which without them nobody reads.
Operator(
    "statistics",
    "Tensor query, Tensor key, Tensor? key_padding_mask, Tensor? row_weights, Tensor? lse, "
    "Tensor(a!)? mean, int block_size, float scale, int groups, bool accumulate, "
    "float mean_weight",
    "Tensor pooled_mean, Tensor pooled_square_mean, Tensor pooled_real",
    lambda query, *rest: _pooled_outputs(query, rest[5]),
    public=3,
)


# ---- the rest of a layer -----------------------------------------------------------------

# p 0: no dropout; the others are a DropoutKey's.
DROP = "float p, SymInt seed, SymInt step, SymInt first_example, Tensor? key_words"


def _parameters(*names: str) -> tuple[str, str]:
    """Names of weight and bias of each, and their part of a schema."""
    all_names = [f"{name}_{part}" for name in names for part in ("weight", "bias")]
    return " ".join(all_names), ", ".join(f"Tensor {name}" for name in all_names)


def _norm_outputs(x: Tensor, norm_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and its norm [B, N, E]; mean and inverse deviation of each token."""
    stats = x.new_empty(*x.shape[:2], 2, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x, dtype=norm_dtype), stats


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


Operator(
    "embed_norm",
    "Tensor ids, Tensor words, Tensor positions, Tensor weight, Tensor bias, float eps, "
    f"{DROP}, int site, ScalarType norm_dtype",
    "Tensor x, Tensor normed, Tensor stats",
    lambda ids, words, *rest: _norm_outputs(words.new_empty(*ids.shape, words.shape[1]), rest[-1]),
    public=2,
    differentiable=2,
    gradients="words positions weight bias",
    saved="ids x stats words positions weight bias",
    fake_backward=lambda dx, dnormed, ids, x, stats, *rest: _like(*rest[:4]),
)
Operator(
    "add_norm",
    "Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps, "
    f"{DROP}, int site, ScalarType norm_dtype",
    "Tensor y, Tensor normed, Tensor stats",
    lambda x, *rest: _norm_outputs(x, rest[-1]),
    public=2,
    differentiable=2,
    gradients="x branch weight bias",
    saved="y stats weight bias",
    fake_backward=lambda dy, dnormed, y, stats, weight, bias, *rest: (
        *_norm_outputs(y, rest[-1])[:2],
        *_like(weight, bias),
    ),
)
Operator(
    "gelu",
    f"Tensor x, {DROP}, int site",
    "Tensor out",
    lambda x, *rest: _like(x)[0],
    gradients="x",
    saved="x",
    fake_backward=lambda dout, x, *rest: _like(x)[0],
)
Operator(
    "masked_mean",
    "Tensor x, Tensor mask, ScalarType dtype",
    "Tensor mean",
    lambda x, mask, dtype: x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32),
    gradients="x",
    saved="mask",
    fake_backward=lambda dmean, mask, dtype: dmean.new_empty(
        *mask.shape, dmean.shape[1], dtype=dtype
    ),
)


def _projected(x: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, ...]:
    """query, key, value [B, H, N, d]; in memory [B, N, H, d]."""
    B, N, K = *x.shape[:2], len(weight)
    return tuple(x.new_empty(B, N, heads, K // heads).transpose(1, 2) for _ in range(3))


# active: uint8 [nb]; bit 0, the block's queries attend to something; bit 1, its keys are attended
# to. None: all of them.
_names, _schema = _parameters("query", "key", "value")
Operator(
    "project",
    f"Tensor x, {_schema}, Tensor? active, int block_size, int heads",
    "Tensor query, Tensor key, Tensor value",
    lambda x, weight, *rest: _projected(x, weight, rest[-1]),
    public=3,
    differentiable=3,
    gradients=f"x {_names}",
    saved=f"x {_names} active",
    fake_backward=lambda dq, dk, dv, *rest: _like(*rest[:7]),
)


def _layer_outputs(x: Tensor, attended: Tensor, expand: Tensor) -> tuple[Tensor, ...]:
    z, y = torch.empty_like(x), torch.empty_like(x)
    normed = torch.empty_like(x, dtype=attended.dtype)
    hidden = attended.new_empty(*x.shape[:2], len(expand))
    return z, normed, y, hidden, x.new_empty(*x.shape[:2], 4, dtype=torch.float32)


_names, _schema = _parameters("output", "norm", "expand", "contract", "next_norm")
Operator(
    "layer",
    f"Tensor x, Tensor attended, {_schema}, Tensor? active, int block_size, float eps, "
    f"{DROP}, int[] sites",
    "Tensor z, Tensor normed, Tensor y, Tensor hidden, Tensor stats",
    lambda x, attended, *rest: _layer_outputs(x, attended, rest[4]),
    public=2,
    differentiable=2,
    gradients=f"x attended {_names}",
    saved=f"y attended {_names} hidden z stats active",
    fake_backward=lambda dz, dnormed, *rest: _like(*rest[:12]),
)
