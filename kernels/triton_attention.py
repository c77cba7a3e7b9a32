"""The kernels of the backend `triton`, and their launches; letters as in triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _walk(offsets, block, blocks_in_all, DENSE: tl.constexpr):
    """Where in its list the kept blocks of `block` begin and end."""
    if DENSE:
        begin, end = blocks_in_all * 0, blocks_in_all
    else:
        begin, end = tl.load(offsets + block), tl.load(offsets + block + 1)
    return begin, end


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
    qb, qh, qn, ob, oh, on, mb, mn, heads, length, block_size, scale,
    T: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, MASK: tl.constexpr,
    ZERO: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """out and lse; without OUT a row's largest score (in lse) and 1 / sum of 2^(s - largest)."""
    row0, batch, head, both = _place(length, heads, T)
    of_q, of_o = batch * qb + head * qh, batch * ob + head * oh
    q = _rows(query + of_q, row0, qn, T, D)
    begin, end = _walk(offsets, row0 // block_size, length // block_size, DENSE)
    num_pruned = length - (end - begin) * block_size
    zeros = ZERO and num_pruned > 0
    highest = tl.zeros((T,), tl.float32) + tl.where(zeros, 0.0, -float("inf"))
    total = tl.zeros((T,), tl.float32) + tl.where(zeros, num_pruned, 0).to(tl.float32)
    sums = tl.zeros((T, D), tl.float32)
    parts = block_size // T
    for tile in range(begin * parts, end * parts):
        block = tile // parts
        which = block if DENSE else tl.load(blocks + block)
        first = which * block_size + (tile - block * parts) * T
        k = _rows(key + of_q, first, qn, T, D)
        scores = _dot(q, tl.trans(k)) * scale
        if MASK:
            at = batch * mb + (first + tl.arange(0, T)).to(tl.int64) * mn
            real = tl.load(mask + at) != 0
            scores = tl.where(real[None, :], scores, -float("inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(now == -float("inf"), 0.0, now)  # nothing attended yet: no NaN
        shrink = tl.exp2(highest - base)
        probs = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(probs, 1)
        highest = now
        if OUT:
            v = _rows(value + of_q, first, qn, T, D)
            sums = sums * shrink[:, None] + _dot(_to(probs, v.dtype), v)
    inverse = tl.where(total > 0, 1 / total, 0.0)
    mine = both.to(tl.int64) * length + row0 + tl.arange(0, T)
    if OUT:
        tl.store(lse + mine, tl.where(total > 0, highest + tl.log2(total), float("inf")))
        _put_rows(out + of_o, row0, on, sums * inverse[:, None], T, D)
    else:
        tl.store(lse + mine, tl.where(total > 0, highest, 0.0))
        tl.store(inverse_out + mine, inverse)


@triton.jit
def backward_rows_kernel(
    query, key, value, out, dout, dquery, lse, delta_out, mask, offsets, blocks,
    qb, qh, qn, ob, oh, on, mb, mn, heads, length, block_size, scale, factor,
    T: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dq, and delta, the sum of out * dout, for the columns."""
    row0, batch, head, both = _place(length, heads, T)
    of_q, of_o = batch * qb + head * qh, batch * ob + head * oh
    q = _rows(query + of_q, row0, qn, T, D)
    do = _rows(dout + of_o, row0, on, T, D)
    o = _rows(out + of_o, row0, on, T, D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    mine = both.to(tl.int64) * length + row0 + tl.arange(0, T)
    tl.store(delta_out + mine, delta)
    of_row = tl.load(lse + mine)
    dq = tl.zeros((T, D), tl.float32)
    begin, end = _walk(offsets, row0 // block_size, length // block_size, DENSE)
    parts = block_size // T
    for tile in range(begin * parts, end * parts):
        block = tile // parts
        which = block if DENSE else tl.load(blocks + block)
        first = which * block_size + (tile - block * parts) * T
        k = _rows(key + of_q, first, qn, T, D)
        v = _rows(value + of_q, first, qn, T, D)
        probs = tl.exp2(_dot(q, tl.trans(k)) * scale - of_row[:, None])
        if MASK:
            at = batch * mb + (first + tl.arange(0, T)).to(tl.int64) * mn
            real = tl.load(mask + at) != 0
            probs = tl.where(real[None, :], probs, 0.0)
        dscores = probs * (_dot(do, tl.trans(v)) - delta[:, None])
        dq += _dot(_to(dscores, k.dtype), k)
    _put_rows(dquery + of_o, row0, on, dq * factor, T, D)


@triton.jit
def backward_columns_kernel(
    query, key, value, dout, dkey, dvalue, lse, delta, mask, offsets, blocks,
    qb, qh, qn, ob, oh, on, mb, mn, heads, length, block_size, scale, factor,
    T: tl.constexpr, D: tl.constexpr, DENSE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dk, dv; scores are transposed: rows are keys, columns queries."""
    column0, batch, head, both = _place(length, heads, T)
    of_q, of_o = batch * qb + head * qh, batch * ob + head * oh
    k = _rows(key + of_q, column0, qn, T, D)
    v = _rows(value + of_q, column0, qn, T, D)
    dk = tl.zeros((T, D), tl.float32)
    dv = tl.zeros((T, D), tl.float32)
    begin, end = _walk(offsets, column0 // block_size, length // block_size, DENSE)
    parts = block_size // T
    for tile in range(begin * parts, end * parts):
        block = tile // parts
        which = block if DENSE else tl.load(blocks + block)
        first = which * block_size + (tile - block * parts) * T
        q = _rows(query + of_q, first, qn, T, D)
        do = _rows(dout + of_o, first, on, T, D)
        rows = both.to(tl.int64) * length + first + tl.arange(0, T)
        probs = tl.exp2(_dot(k, tl.trans(q)) * scale - tl.load(lse + rows)[None, :])
        if MASK:
            at = batch * mb + (column0 + tl.arange(0, T)).to(tl.int64) * mn
            real = tl.load(mask + at) != 0
            probs = tl.where(real[:, None], probs, 0.0)
        dv += _dot(_to(probs, do.dtype), do)
        dscores = probs * (_dot(v, tl.trans(do)) - tl.load(delta + rows)[None, :])
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
            real = tl.load(mask + batch * mb + columns.to(tl.int64) * mn) != 0
            probs = tl.where(real[None, :], probs, 0.0)
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


def _warps(T: int, D: int) -> int:
    return 8 if T * D > 4096 else 4


def _mask(mask: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The padding mask and its strides, or anything."""
    return (other, (0, 0)) if mask is None else (mask, mask.stride())


def forward(query, key, value, out, lse, mask, lists, block_size, scale, pruned_zero) -> None:
    _forward(query, key, value, out, lse, lse, mask, lists, block_size, scale, pruned_zero)


def _forward(
    query, key, value, out, lse, inverse, mask, lists, block_size, scale, pruned_zero
) -> None:
    B, H, N, D = query.shape
    T = _tile(block_size, query)
    real, mask_strides = _mask(mask, query)
    offsets, blocks = lists[:2] if lists else (lse, lse)
    launch(
        forward_kernel, (B * H * (N // T),),
        query, key, value if out is not None else query, query if out is None else out,
        lse, inverse, real, offsets, blocks,
        *query.stride()[:3], *(query if out is None else out).stride()[:3], *mask_strides,
        H, N, block_size, scale * LOG2E,
        T=T, D=D, DENSE=not lists, MASK=mask is not None, ZERO=pruned_zero,
        OUT=out is not None, num_warps=_warps(T, D),
    )  # fmt: skip


def backward(
    dout, query, key, value, out, lse, dquery, dkey, dvalue, mask, lists, block_size, scale
) -> None:
    B, H, N, D = query.shape
    T = _tile(block_size, query)
    real, mask_strides = _mask(mask, query)
    row_lists, column_lists = (lists[:2], lists[2:]) if lists else ((lse, lse), (lse, lse))
    delta = torch.empty_like(lse)
    sizes = (
        *query.stride()[:3], *out.stride()[:3], *mask_strides, H, N, block_size,
        scale * LOG2E, scale,
    )  # fmt: skip
    constants = {"T": T, "D": D, "DENSE": not lists, "MASK": mask is not None}
    constants["num_warps"] = _warps(T, D)
    grid = (B * H * (N // T),)
    launch(
        backward_rows_kernel, grid, query, key, value, out, dout, dquery, lse, delta, real,
        *row_lists, *sizes, **constants,
    )  # fmt: skip
    launch(
        backward_columns_kernel, grid, query, key, value, dout, dkey, dvalue, lse, delta, real,
        *column_lists, *sizes, **constants,
    )  # fmt: skip


def statistics(query, key, mask, mean, pieces, scale, groups, accumulate, factor) -> None:
    B, H, N, D = query.shape
    highest, inverse = query.new_empty(2, B, H, N, dtype=torch.float32)
    _forward(query, key, None, None, highest, inverse, mask, [], N, scale, False)
    T = _tile(N, query)
    real, mask_strides = _mask(mask, query)
    launch(
        statistics_kernel, (groups * (N // T) ** 2,),
        query, key, highest, inverse, real, pieces if mean is None else mean, pieces,
        *query.stride()[:3], *mask_strides, H, N, B // groups, scale * LOG2E, factor,
        T=T, D=D, MASK=mask is not None, MEAN=mean is not None, ACCUMULATE=accumulate,
        num_warps=_warps(T, D),
    )  # fmt: skip
