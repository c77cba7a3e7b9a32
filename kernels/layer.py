"""The step's operations besides attention: dropout with its neighbours, layer norm, GELU, linear.

Once attention is sparse, most of a training step on a CPU is spent here. Compiled, each function
below is one pass over memory where plain PyTorch makes three to six. What follows the call of a
compiled one is the backend `reference`: it defines what is right. The others give the same dropout
masks bit by bit (dropout.py) and the same numbers up to rounding.

Shape letters: B examples, N tokens, E features, V words.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backends import Call, choose
from kernels.dropout import DropoutKey, dropout_scale, dropout_threshold, keep_mask
from kernels.layout import BlockLayout
from kernels.operators import run


def _wide(x: Tensor) -> Tensor:
    """Half precisions are computed in fp32 and rounded once, at the end of each operation."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _drop(p: float, key: DropoutKey | None) -> tuple[float, int, int, int, Tensor | None]:
    """p and the key as operators take them; without a key, or with next to no p, no dropout."""
    if dropout_threshold(p) == 0 or key is None:
        return 0.0, 0, 0, 0, None
    return p, key.seed, key.step, key.first_example, key.words


def _dropout(x: Tensor, p: float, key: DropoutKey | None, site: int) -> Tensor:
    if key is None or dropout_threshold(p) == 0:
        return x
    keep = keep_mask(key, site, x.shape, p, x.device)
    return torch.where(keep, x * dropout_scale(p), 0.0)


def _norm_dtype(x: Tensor) -> torch.dtype:
    """Under autocast the norm comes out in autocast's type: only products read it."""
    return _product_dtype(x) if x.dtype == torch.float32 else x.dtype


def _product_dtype(x: Tensor) -> torch.dtype:
    """What torch multiplies x in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = _norm_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        wide = _wide(x)
        normed = F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
        return normed.to(dtype)


def _check(x: Tensor, layout: BlockLayout | None = None, /, **others: Tensor) -> None:
    """Everything lies on x's device, and the layout covers x's tokens. ValueError if not."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, the tokens are on {x.device}")
    if layout is not None:
        layout.check(x.shape[1], x.device)


def _check_norm(width: int, norm_weight: Tensor, norm_bias: Tensor) -> None:
    found = tuple(norm_weight.shape), tuple(norm_bias.shape)
    if found != ((width,), (width,)):
        raise ValueError(f"norm_weight and norm_bias must be [{width}], got {found}")


def embedding_dropout_layer_norm(
    ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float,
    key: DropoutKey | None,
    site: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x = dropout(word_table[ids] + position_table) and its layer norm.

    Args:
        ids: int64 or int32 [B, N], each in 0 .. V - 1.
        word_table, position_table: [V, E], [N, E] of one dtype.
        norm_weight, norm_bias: [E].
        p: dropout probability, realised as a multiple of 2**-16.
        key: None (evaluation) means no dropout.
        site: names this place in the model; two places never share one.
    Returns: (x [B, N, E] in the tables' dtype, LayerNorm(x) in that, or autocast's if it is on).
    Raises: ValueError if shapes, devices or p in [0, 1) disagree; IndexError for a foreign id.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int64 or int32 [B, N], not {ids.dtype} {list(ids.shape)}")
    if word_table.dim() != 2:
        raise ValueError(f"word_table must be [V, E], not {list(word_table.shape)}")
    _check_norm(word_table.shape[1], norm_weight, norm_bias)
    _check(
        ids, word_table=word_table, position_table=position_table, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip
    if position_table.shape != (ids.shape[1], word_table.shape[1]):
        raise ValueError(
            f"position_table must be [{ids.shape[1]}, {word_table.shape[1]}] for ids "
            f"{list(ids.shape)}, got {list(position_table.shape)}"
        )
    if position_table.dtype != word_table.dtype:
        raise ValueError(
            f"both tables must have one dtype, not {word_table.dtype} and {position_table.dtype}"
        )
    norm_dtype = _norm_dtype(word_table)
    types, sizes = (word_table.dtype, norm_dtype, norm_dtype), (word_table.shape[1],)
    vocabulary, N = len(word_table), ids.shape[1]
    call = Call("embedding_dropout_layer_norm", ids.device, types, sizes, N, words=vocabulary)
    if (module := choose(call, backend)).name != "reference":
        tensors = ids, word_table, position_table, norm_weight, norm_bias
        return run("embed_norm", module, *tensors, eps, *_drop(p, key), site, norm_dtype)
    x = _wide(F.embedding(ids, word_table)) + _wide(position_table)
    x = _dropout(x, p, key, site).to(word_table.dtype)
    return x, _layer_norm(x, norm_weight, norm_bias, eps)


def dropout_add_layer_norm(
    x: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float,
    key: DropoutKey | None,
    site: int,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + dropout(branch) and its layer norm: one pre-norm branch ends, the next one starts.

    Args:
        x, branch: [B, N, E]; dtypes may differ (an fp32 stream with bf16 branches).
        norm_weight, norm_bias: [E]; p, key, site: as in embedding_dropout_layer_norm.
    Returns: (y in the wider of the two dtypes, LayerNorm(y) in that, or autocast's if it is on).
    Raises: ValueError if shapes disagree or p is not in [0, 1).
    """
    if x.dim() != 3 or x.shape != branch.shape:
        raise ValueError(
            f"x {list(x.shape)} and branch {list(branch.shape)} must agree and be [B, N, E]"
        )
    _check_norm(x.shape[-1], norm_weight, norm_bias)
    _check(x, branch=branch, norm_weight=norm_weight, norm_bias=norm_bias)
    norm_dtype = _norm_dtype(x)
    types = x.dtype, branch.dtype, norm_dtype
    call = Call("dropout_add_layer_norm", x.device, types, x.shape[2:], x.shape[1])
    if (module := choose(call, backend)).name != "reference":
        drop = *_drop(p, key), site
        return run("add_norm", module, x, branch, norm_weight, norm_bias, eps, *drop, norm_dtype)
    y = _wide(x) + _dropout(_wide(branch), p, key, site)
    y = y.to(torch.promote_types(x.dtype, branch.dtype))
    return y, _layer_norm(y, norm_weight, norm_bias, eps)


def gelu_dropout(
    x: Tensor, *, p: float, key: DropoutKey | None, site: int, backend: str = "auto"
) -> Tensor:
    """dropout(gelu(x)), gelu(x) = x * Phi(x) with the exact normal distribution (erf).

    x: [B, ...]; p, key, site: as in embedding_dropout_layer_norm. Returns x's shape and dtype.
    """
    if (module := choose(Call("gelu_dropout", x.device, (x.dtype,)), backend)).name != "reference":
        return run("gelu", module, x, *_drop(p, key), site)
    return _dropout(F.gelu(_wide(x)), p, key, site).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean over the tokens of each example; those with mask False count as zero.

    x: [B, N, E]; mask: bool [B, N]. Returns [B, E] fp32 (fp64 for fp64).
    """
    if x.dim() != 3 or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"x must be [B, N, E] and mask bool [B, N], not {list(x.shape)} and {mask.dtype} "
            f"{list(mask.shape)}"
        )
    _check(x, mask=mask)
    call = Call("masked_mean", x.device, (x.dtype,), x.shape[2:], x.shape[1])
    if (module := choose(call, backend)).name != "reference":
        return run("masked_mean", module, x, mask, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # as a product: one pass over x, forward and backward
        weights = mask.unsqueeze(1).to(_wide(x).dtype)
        return (weights @ _wide(x)).squeeze(1) / x.shape[1]


def attention_projections(
    x: Tensor,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    *,
    heads: int,
    layout: BlockLayout | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three linear maps before an attention, their columns split into heads.

    Args:
        x: [B, N, E]; query, key, value: weight [H * d, E] and bias [H * d] of each.
        layout: of the attention that follows. What it never reads (queries without an active
            block, keys and values of blocks that nobody attends to) may be left out: zeros.
    Returns: query, key, value [B, H, N, d]; in memory [B, N, H, d].
    Raises: ValueError if shapes disagree.
    """
    parameters = [*query, *key, *value]
    E, K = x.shape[-1], len(query[0])
    found = [tuple(parameter.shape) for parameter in parameters]
    if x.dim() != 3 or found != [(K, E), (K,)] * 3 or K % heads:
        raise ValueError(
            f"x {list(x.shape)} and {heads} heads need three weights [heads * head_dim, {E}] and "
            f"their biases, got {found}"
        )
    _check(x, layout, **{f"parameter {i}": q for i, q in enumerate(parameters)})
    product = _product_dtype(x)
    types = x.dtype, product, product, *(parameter.dtype for parameter in parameters)
    call = Call("attention_projections", x.device, types, (E, K), x.shape[1])
    if (module := choose(call, backend)).name != "reference":
        return run("project", module, x, *parameters, *_active(layout), heads)
    # one product; the attention kernels read the strided parts without a copy
    weight, bias = torch.cat(parameters[::2]), torch.cat(parameters[1::2])
    parts = linear(x, weight, bias, backend=backend).view(*x.shape[:2], 3, heads, K // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _active(layout: BlockLayout | None) -> tuple[Tensor | None, int]:
    return (None, 1) if layout is None else (layout.active, layout.block_size)


def attention_output_feed_forward(
    x: Tensor,
    attended: Tensor,
    output: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    expand: tuple[Tensor, Tensor],
    contract: tuple[Tensor, Tensor],
    next_norm: tuple[Tensor, Tensor],
    *,
    p: float,
    key: DropoutKey | None,
    sites: tuple[int, int, int],
    layout: BlockLayout | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What stands between two attentions: output projection and feed-forward block.

        y = x + dropout(linear(attended, *output))
        hidden = dropout(gelu(linear(LayerNorm(y, *norm), *expand)))
        z = y + dropout(linear(hidden, *contract))

    Args:
        x: [B, N, E], the residual stream; attended: [B, N, K], the heads' values side by side.
        output, norm, expand, contract, next_norm: weight and bias of each; [E, K], [E], [F, E],
            [E, F], [E].
        p, key: as in embedding_dropout_layer_norm; sites: of the three dropouts, in order.
        layout: of the attention; `attended` is zero where it leaves a query without a block, so
            products with those rows are left out.
    Returns: (z, LayerNorm(z, *next_norm)), dtypes as dropout_add_layer_norm gives them.
    Raises: ValueError if shapes disagree or p is not in [0, 1).
    """
    parameters = [*output, *norm, *expand, *contract, *next_norm]
    E, K, hidden = x.shape[-1], attended.shape[-1], len(expand[0])
    expected = [(E, K), (E,), (E,), (E,), (hidden, E), (hidden,), (E, hidden), (E,), (E,), (E,)]
    found = [tuple(parameter.shape) for parameter in parameters]
    if x.dim() != 3 or found != expected or attended.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"x {list(x.shape)} and attended {list(attended.shape)} need parameters of shapes "
            f"{expected}, got {found}"
        )
    _check(x, layout, attended=attended, **{f"parameter {i}": q for i, q in enumerate(parameters)})
    rest = x.dtype, *(parameter.dtype for parameter in parameters)
    types = attended.dtype, _product_dtype(attended), _norm_dtype(x), *rest
    call = Call("attention_output_feed_forward", x.device, types, (E, K, hidden), x.shape[1])
    if (module := choose(call, backend)).name != "reference":
        settings = *_active(layout), eps, *_drop(p, key), list(sites)
        return run("layer", module, x, attended, *parameters, *settings)
    # one part after the other, of which some may be compiled
    drop: dict[str, Any] = {"p": p, "key": key, "backend": backend}
    branch = linear(attended, *output, backend=backend)
    y, normed = dropout_add_layer_norm(x, branch, *norm, site=sites[0], eps=eps, **drop)
    wide = linear(normed, *expand, backend=backend)
    branch = linear(gelu_dropout(wide, site=sites[1], **drop), *contract, backend=backend)
    return dropout_add_layer_norm(y, branch, *next_norm, site=sites[2], eps=eps, **drop)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto") -> Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear (autocast included).

    x: [..., E]; weight: [O, E]; bias: [O] or None. Returns [..., O]. Every backend uses torch's
    product: in fp32 MKL's reaches 93 % of what the machine can do at the model's sizes. The one
    exception is bf16 on a CPU that cannot multiply it: PyTorch would take a hundred times longer
    than in fp32, so the product is taken in fp32 and rounded once.
    """
    if x.device.type == "cpu" and backend != "reference" and not _multiplies_bf16():
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                # rounded to bf16 as autocast would, then widened
                bias = None if bias is None else bias.to(dtype).float()
                return F.linear(x.to(dtype).float(), weight.to(dtype).float(), bias).to(dtype)
    return F.linear(x, weight, bias)


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
