"""The kernels of the backend `triton`, and their launches; letters as in triton.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.statistics import largest_and_inverse
from kernels.triton_layer import _dot, _put, _to, launch

LOG2E = 1.4426950408889634


# ---- parts of kernels ----------------------------------------------------------------


@triton.jit
def _place(length, heads, T: tl.constexpr):
    """First row of this program's tile; its example, head, and both in one."""
    tiles = length // T
    both = tl.program_id(0) // tiles
    return (tl.program_id(0) % tiles) * T, (both // heads).to(tl.int64), both % heads, both


@triton.jit
def _walk(offsets, head_lists, head, block, blocks_in_all, DENSE: tl.constexpr):
    """Where in its list the kept blocks of `block` begin and end."""
    if DENSE:
        begin, end = blocks_in_all * 0, blocks_in_all
    else:
        offsets += head * head_lists + block
        begin, end = tl.load(offsets), tl.load(offsets + 1)
    return begin, end


@triton.jit
def _first(tile, blocks, block_size, T: tl.constexpr, DENSE: tl.constexpr):
    """First position of a tile of T, counted through the kept blocks."""
    parts = block_size // T
    block = tile // parts
    which = block if DENSE else tl.load(blocks + block)
    return which * block_size + (tile - block * parts) * T


@triton.jit
def _real(mask, batch, mb, mn, keys):
    return tl.load(mask + batch * mb + keys.to(tl.int64) * mn) != 0


@triton.jit
def _rows(pointer, first, stride, T: tl.constexpr, D: tl.constexpr):
    """[T, D]"""
    at = (first + tl.arange(0, T)).to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointer + at)


@triton.jit
def _put_rows(pointer, first, stride, x, T: tl.constexpr, D: tl.constexpr):
    at = (first + tl.arange(0, T)).to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    _put(pointer, at, x, tl.arange(0, T) >= 0)


# ---- kernels -------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    query, key, value, out, lse, inverse_out, mask, offsets, blocks,
    qb, qh, qn, ob, oh, on, mb, mn, heads, length, block_size, head_lists, scale,
    T: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, ZERO: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """out and lse; without OUT a row's largest score (in lse) and 1 / sum of 2^(s - largest)."""
    row0, batch, head, both = _place(length, heads, T)
    of_q, of_o = batch * qb + head * qh, batch * ob + head * oh
    q = _rows(query + of_q, row0, qn, T, D)
    row_block, rows = row0 // block_size, row0 + tl.arange(0, T)
    begin, end = _walk(offsets, head_lists, head, row_block, length // block_size, DENSE)
    highest = tl.full((T,), -float("inf"), tl.float32)
    total = tl.zeros((T,), tl.float32)
    sums = tl.zeros((T, D), tl.float32)
    parts = block_size // T
    for tile in range(begin * parts, end * parts):
        first = _first(tile, blocks, block_size, T, DENSE)
        k = _rows(key + of_q, first, qn, T, D)
        scores = _dot(q, tl.trans(k)) * scale
        columns = first + tl.arange(0, T)
        if MASK:
            scores = tl.where(_real(mask, batch, mb, mn, columns)[None, :], scores, -float("inf"))
        if CAUSAL:
            scores = tl.where(rows[:, None] >= columns[None, :], scores, -float("inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(now == -float("inf"), 0.0, now)  # nothing attended yet: no NaN
        shrink = tl.exp2(highest - base)
        probs = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(probs, 1)
        highest = now
        if OUT:
            v = _rows(value + of_q, first, qn, T, D)
            sums = sums * shrink[:, None] + _dot(_to(probs, v.dtype), v)
    attends, top, shrink = highest > -float("inf"), highest, 1.0
    if ZERO:  # the pruned scores come last: exp(0) each
        seen = (end - begin) * block_size
        pruned = length - seen
        if CAUSAL:
            last = tl.load(blocks + end - 1, mask=end > begin, other=-1)
            pruned = tl.where(last == row_block, (row_block + 1) * block_size, rows + 1) - seen
        top = tl.where(pruned > 0, tl.maximum(highest, 0.0), highest)
        shrink = tl.exp2(highest - top)
        total = total * shrink + tl.where(pruned > 0, pruned * tl.exp2(-top), 0.0)
    inverse = tl.where(attends, shrink / total, 0.0)
    mine = both.to(tl.int64) * length + rows
    if OUT:
        tl.store(lse + mine, tl.where(attends, top + tl.log2(total), float("inf")))
        _put_rows(out + of_o, row0, on, sums * inverse[:, None], T, D)
    else:
        tl.store(lse + mine, tl.where(attends, highest, 0.0))
        tl.store(inverse_out + mine, inverse)


@triton.jit
def backward_rows_kernel(
    query, key, value, out, dout, dquery, lse, delta_out, mask, offsets, blocks,
    qb, qh, qn, ob, oh, on, mb, mn, heads, length, block_size, head_lists, scale,
    factor, T: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq, and delta, the sum of out * dout, for the columns."""
    row0, batch, head, both = _place(length, heads, T)
    of_q, of_o = batch * qb + head * qh, batch * ob + head * oh
    q = _rows(query + of_q, row0, qn, T, D)
    do = _rows(dout + of_o, row0, on, T, D)
    o = _rows(out + of_o, row0, on, T, D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = row0 + tl.arange(0, T)
    mine = both.to(tl.int64) * length + rows
    tl.store(delta_out + mine, delta)
    of_row = tl.load(lse + mine)
    dq = tl.zeros((T, D), tl.float32)
    block = row0 // block_size
    begin, end = _walk(offsets, head_lists, head, block, length // block_size, DENSE)
    parts = block_size // T
    for tile in range(begin * parts, end * parts):
        first = _first(tile, blocks, block_size, T, DENSE)
        k = _rows(key + of_q, first, qn, T, D)
        v = _rows(value + of_q, first, qn, T, D)
        probs = tl.exp2(_dot(q, tl.trans(k)) * scale - of_row[:, None])
        columns = first + tl.arange(0, T)
        if MASK:
            probs = tl.where(_real(mask, batch, mb, mn, columns)[None, :], probs, 0.0)
        if CAUSAL:
            probs = tl.where(rows[:, None] >= columns[None, :], probs, 0.0)
        dscores = probs * (_dot(do, tl.trans(v)) - delta[:, None])
        dq += _dot(_to(dscores, k.dtype), k)
    _put_rows(dquery + of_o, row0, on, dq * factor, T, D)


@triton.jit
def backward_columns_kernel(
    query, key, value, dout, dkey, dvalue, lse, delta, mask, offsets, blocks,
    qb, qh, qn, ob, oh, on, mb, mn, heads, length, block_size, head_lists, scale,
    factor, T: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk, dv; scores are transposed: rows are keys, columns queries."""
    column0, batch, head, both = _place(length, heads, T)
    of_q, of_o = batch * qb + head * qh, batch * ob + head * oh
    k = _rows(key + of_q, column0, qn, T, D)
    v = _rows(value + of_q, column0, qn, T, D)
    dk = tl.zeros((T, D), tl.float32)
    dv = tl.zeros((T, D), tl.float32)
    columns = column0 + tl.arange(0, T)
    block = column0 // block_size
    begin, end = _walk(offsets, head_lists, head, block, length // block_size, DENSE)
    parts = block_size // T
    for tile in range(begin * parts, end * parts):
        first = _first(tile, blocks, block_size, T, DENSE)
        q = _rows(query + of_q, first, qn, T, D)
        do = _rows(dout + of_o, first, on, T, D)
        rows = first + tl.arange(0, T)
        at = both.to(tl.int64) * length + rows
        probs = tl.exp2(_dot(k, tl.trans(q)) * scale - tl.load(lse + at)[None, :])
        if MASK:
            probs = tl.where(_real(mask, batch, mb, mn, columns)[:, None], probs, 0.0)
        if CAUSAL:
            probs = tl.where(rows[None, :] >= columns[:, None], probs, 0.0)
        dv += _dot(_to(probs, do.dtype), do)
        dscores = probs * (_dot(v, tl.trans(do)) - tl.load(delta + at)[None, :])
        dk += _dot(_to(dscores, q.dtype), q)
    _put_rows(dkey + of_o, column0, on, dk * factor, T, D)
    _put_rows(dvalue + of_o, column0, on, dv, T, D)


@triton.jit
def statistics_kernel(
    query, key, highest_in, inverse_in, mask, mean, pieces,
    qb, qh, qn, mb, mn, heads, length, examples, scale, factor,
    T: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, MEAN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """A T x T piece of [N, N] of one group of examples, which walks their heads: the mean, and of
    each head the sums over 16 x 16 pieces."""
    side = length // T
    group, piece = tl.program_id(0) // (side * side), tl.program_id(0) % (side * side)
    row0, column0 = piece // side * T, piece % side * T
    P: tl.constexpr = T // 16
    rows, columns = row0 + tl.arange(0, T), column0 + tl.arange(0, T)
    total = tl.zeros((T, T), tl.float32)
    for index in range(examples * heads):
        batch = (group * examples + index // heads).to(tl.int64)
        of_q = batch * qb + index % heads * qh
        both = batch * heads + index % heads
        q = _rows(query + of_q, row0, qn, T, D)
        k = _rows(key + of_q, column0, qn, T, D)
        highest = tl.load(highest_in + both * length + rows)
        inverse = tl.load(inverse_in + both * length + rows)
        probs = tl.exp2(_dot(q, tl.trans(k)) * scale - highest[:, None]) * inverse[:, None]
        if MASK:
            probs = tl.where(_real(mask, batch, mb, mn, columns)[None, :], probs, 0.0)
        total += probs
        sums = tl.sum(tl.sum(tl.reshape(probs, (P, 16, P, 16)), 3), 1)
        i, j = row0 // 16 + tl.arange(0, P), column0 // 16 + tl.arange(0, P)
        at = (both * (length // 16) + i[:, None]) * (length // 16) + j[None, :]
        tl.store(pieces + at, sums)
    if MEAN:
        at = (group.to(tl.int64) * length + rows[:, None]) * length + columns[None, :]
        total *= factor
        if ACCUMULATE:
            total += tl.load(mean + at)
        tl.store(mean + at, total)


# ---- launches ------------------------------------------------------------------------


def _tile(size: int, like: Tensor) -> int:
    """The largest tile that blocks of `size` can be cut into and registers hold."""
    largest = 64 if like.element_size() == 2 else (32 if like.shape[3] <= 64 else 16)
    return min(largest, size & -size)


def _options(like: Tensor, T: int) -> dict[str, int]:
    """For which registers suffice at D 32 and 64 (tests/test_triton_compiles.py)."""
    if like.element_size() == 4:  # tf32x3 keeps two parts of each operand
        return {"num_warps": 8, "num_stages": 2} if T > 16 else {"num_warps": 4}
    # wide rows: three stages would be more shared memory than a GeForce has
    return {"num_warps": 8, "num_stages": 2} if T * like.shape[3] > 4096 else {"num_warps": 4}


def _mask(mask: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The padding mask and its strides, or anything."""
    return (other, (0, 0)) if mask is None else (mask, mask.stride())


def _lists(lists: Sequence[Tensor | None], like: Tensor, blocks: int) -> tuple[Any, int]:
    """Rows' offsets and blocks, columns' likewise (anything if attention is dense), and from one
    head's offsets to those of the next."""
    if lists[0] is None:
        return (like,) * 4, 0
    return lists, 0 if len(lists[0]) == blocks + 1 else blocks + 1


def forward(
    query, key, value, out, lse, inverse, mask, lists, block_size, scale, pruned_zero, causal
) -> None:
    B, H, N, D = query.shape
    T = _tile(block_size, query)
    real, mask_strides = _mask(mask, query)
    (offsets, blocks, *_), head_lists = _lists(lists, lse, N // block_size)
    launch(
        forward_kernel, (B * H * (N // T),),
        query, key, query if value is None else value, query if out is None else out,
        lse, inverse, real, offsets, blocks,
        *query.stride()[:3], *(query if out is None else out).stride()[:3], *mask_strides,
        H, N, block_size, head_lists, scale * LOG2E,
        T=T, D=D, DENSE=lists[0] is None, MASK=mask is not None, CAUSAL=causal, ZERO=pruned_zero,
        OUT=out is not None, **_options(query, T),
    )  # fmt: skip


def backward(
    dout, query, key, value, out, lse, dquery, dkey, dvalue, mask, lists, block_size, scale, causal
) -> None:
    B, H, N, D = query.shape
    T = _tile(block_size, query)
    real, mask_strides = _mask(mask, query)
    each, head_lists = _lists(lists, lse, N // block_size)
    delta = torch.empty_like(lse)
    sizes = (
        *query.stride()[:3], *out.stride()[:3], *mask_strides, H, N, block_size, head_lists,
        scale * LOG2E, scale,
    )  # fmt: skip
    constants = {"T": T, "D": D, "DENSE": lists[0] is None, "MASK": mask is not None}
    constants |= {"CAUSAL": causal, **_options(query, T)}
    grid = (B * H * (N // T),)
    launch(
        backward_rows_kernel, grid, query, key, value, out, dout, dquery, lse, delta, real,
        *each[:2], *sizes, **constants,
    )  # fmt: skip
    launch(
        backward_columns_kernel, grid, query, key, value, dout, dkey, dvalue, lse, delta, real,
        *each[2:], *sizes, **constants,
    )  # fmt: skip


def statistics(query, key, mask, lse, mean, pieces, scale, groups, accumulate, factor) -> None:
    B, H, N, D = query.shape
    highest, inverse = rows = query.new_empty(2, B, H, N, dtype=torch.float32)
    if lse is None:
        settings = mask, (None,), N, scale, False, False
        forward(query, key, None, None, highest, inverse, *settings)
    else:
        largest_and_inverse(lse, rows)
    T = _tile(N, query)
    real, mask_strides = _mask(mask, query)
    launch(
        statistics_kernel, (groups * (N // T) ** 2,),
        query, key, highest, inverse, real, pieces if mean is None else mean, pieces,
        *query.stride()[:3], *mask_strides, H, N, B // groups, scale * LOG2E, factor,
        T=T, D=D, MASK=mask is not None, MEAN=mean is not None, ACCUMULATE=accumulate,
        **_options(query, T),
    )  # fmt: skip
