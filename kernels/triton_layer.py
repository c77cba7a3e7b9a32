"""The rest of a layer on GPUs, in Triton: each operation of layer.py in one launch and one pass.

A program walks tiles of M tokens; the weights stay on the chip meanwhile. What only the next
operation reads never leaves it: between two attentions a step writes the two residual sums, the
hidden values before GELU and the norm, and nothing else. The backward pass draws the dropout masks
anew and takes the norms from the sums. Gradients of parameters are summed by each program over its
tiles, then over the programs, in a fixed order: the same bits every time.

Products take operands in the dtype that autocast gives and are summed in fp32, everything else is
fp32. Nothing here waits for the GPU, and the dropout key is read from device memory, so that all
of it can be captured in a CUDA graph.

Shape letters: B examples, N tokens of each, T = B * N, M tokens of a tile, E features, K width of
the attended values, F hidden width, V words. E, K and F are powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # two for each multiprocessor of an H100; fixed, as sums depend on it
TILE = 4096  # elements of a tile where no product is taken
MAX_WIDTH = TILE
# Of products; the weights and gradients of fp32 would not fit into a multiprocessor.
PRODUCTS = (torch.bfloat16, torch.float16)
MAX_WEIGHTS = 20480  # elements of a layer's three weights, whose gradients stay in registers
WORDS_IN_REGISTERS = 16384  # elements; larger tables are gone through several times
MAX_WORDS = 2048
MAX_EMBEDDING = 256

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


# ---- parts of kernels ----------------------------------------------------------------


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # which multiplies bf16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")  # of fp32; three products of tf32 are as exact


@triton.jit
def _to(x, dtype: tl.constexpr):
    """fp32 x rounded to `dtype`, to nearest even."""
    if (
        INTERPRETED and x.dtype == tl.float32 and dtype == tl.bfloat16
    ):  # where a cast would cut the digits off
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def _put(pointer, offsets, x, there):
    tl.store(pointer + offsets, _to(x, pointer.dtype.element_ty), mask=there[:, None])


@triton.jit
def _mix64(z):
    z ^= z >> 30
    z *= 0xBF58476D1CE4E5B9
    z ^= z >> 27
    z *= 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _example_keys(words, site, example):
    """Two 32-bit keys for each example, as dropout._example_keys; words: seed, step, first."""
    z = _mix64(tl.load(words).to(tl.uint64, bitcast=True) + GOLDEN)
    z = _mix64(z + tl.load(words + 1).to(tl.uint64, bitcast=True) + GOLDEN)
    z = _mix64(z + site.to(tl.uint64) + GOLDEN)
    z = z + tl.load(words + 2).to(tl.uint64, bitcast=True) + GOLDEN
    z = _mix64(z + example.to(tl.uint64))
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def _kept(element, key0, key1, threshold):
    """Whether elements of an example are kept."""
    element = element.to(tl.uint32)
    word = ((element >> 5) << 4) + (element & 15) + key0
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= key1
    word ^= word >> 15
    word *= 0x846CA68B
    word ^= word >> 16
    bits = tl.where((element & 16) != 0, word >> 16, word & 0xFFFF)
    return bits >= threshold.to(tl.uint32)


@triton.jit
def _dropout(x, words, site, tokens, length, threshold, scale, WIDTH: tl.constexpr):
    """x [M, WIDTH] of `tokens` [M], as dropout.keep_mask has it; a threshold of 0 keeps all."""
    key0, key1 = _example_keys(words, site, tokens // length)
    element = (tokens % length)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    kept = _kept(element, key0[:, None], key1[:, None], threshold)
    return tl.where(kept, x * scale, 0.0)


@triton.jit
def _normalise(x, eps, WIDTH: tl.constexpr):
    """(x - mean) / deviation of each row, and 1 / deviation."""
    centred = x - (tl.sum(x, 1) / WIDTH)[:, None]
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _normalise_backward(dnormed, weight, normal, inverse, WIDTH: tl.constexpr):
    g = dnormed * weight[None, :]
    along = tl.sum(g * normal, 1) / WIDTH
    return inverse[:, None] * (g - (tl.sum(g, 1) / WIDTH)[:, None] - normal * along[:, None])


@triton.jit
def _normal_distribution(x):
    """Phi(x), of which GELU is x times."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tile(first, M: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of tokens first .. first + M in [T, WIDTH]."""
    inside = tl.arange(0, M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return first.to(tl.int64) * WIDTH + inside


@triton.jit
def _rows(pointer, offsets, there):
    return tl.load(pointer + offsets, mask=there[:, None], other=0.0)


@triton.jit
def _vector(pointer, WIDTH: tl.constexpr):
    return tl.load(pointer + tl.arange(0, WIDTH)).to(tl.float32)


@triton.jit
def _matrix(pointer, HIGH: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, HIGH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + at).to(tl.float32)


@triton.jit
def _put_vector(pointer, x, WIDTH: tl.constexpr):
    tl.store(pointer + tl.arange(0, WIDTH), x)


@triton.jit
def _put_matrix(pointer, x, HIGH: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, HIGH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(pointer + at, x)


# ---- kernels -------------------------------------------------------------------------


@triton.jit(do_not_specialize=["site", "threshold"])
def embed_forward(
    ids, words, positions, weight, bias, key, x_out, normed_out,
    tokens_in_all, length, words_in_all, site, threshold, scale, eps,
    M: tl.constexpr, E: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * M
    tokens = first + tl.arange(0, M)
    there = tokens < tokens_in_all
    columns = tl.arange(0, E)[None, :]
    word = tl.load(ids + tokens, mask=there, other=0).to(tl.int32)
    known = (word >= 0) & (word < words_in_all)  # a foreign id gives NaN
    x = tl.load(words + word[:, None] * E + columns, mask=known[:, None], other=float("nan"))
    x = x.to(tl.float32)
    x += tl.load(positions + (tokens % length)[:, None] * E + columns).to(tl.float32)
    if DROPOUT:
        x = _dropout(x, key, site, tokens, length, threshold, scale, E)
    normal, _ = _normalise(x, eps, E)
    at = _tile(first, M, E)
    _put(x_out, at, x, there)
    normed = normal * _vector(weight, E)[None, :] + _vector(bias, E)[None, :]
    _put(normed_out, at, normed, there)


@triton.jit(do_not_specialize=["site", "threshold"])
def embed_backward(
    ids, x_in, dx_in, dnormed_in, weight, key, dpositions, dparameters,
    examples, length, words_in_all, site, threshold, scale, eps,
    M: tl.constexpr, E: tl.constexpr, V: tl.constexpr, DROPOUT: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """Program (i, j, k): tokens i M .. (i + 1) M of the examples j, j + programs, ...; words
    k V .. (k + 1) V."""
    first = tl.program_id(0) * M
    split, splits = tl.program_id(1), tl.num_programs(1)
    inside = first + tl.arange(0, M)
    there = inside < length
    words = tl.program_id(2) * V + tl.arange(0, V)
    gamma = _vector(weight, E)
    of_positions = tl.zeros((M, E), tl.float32)
    of_words = tl.zeros((V, E), tl.float32)
    of_weight, of_bias = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    for example in range(split, examples, splits):
        begin = example * length + first
        tokens = begin + tl.arange(0, M)
        at = _tile(begin, M, E)
        x = _rows(x_in, at, there).to(tl.float32)
        dnormed = _rows(dnormed_in, at, there).to(tl.float32)
        normal, inverse = _normalise(x, eps, E)
        of_weight += tl.sum(dnormed * normal, 0)
        of_bias += tl.sum(dnormed, 0)
        dx = _normalise_backward(dnormed, gamma, normal, inverse, E)
        if DX:
            dx += _rows(dx_in, at, there).to(tl.float32)
        if DROPOUT:
            dx = _dropout(dx, key, site, tokens, length, threshold, scale, E)
        of_positions += dx
        word = tl.load(ids + tokens, mask=there, other=0).to(tl.int32)
        chosen = (words[:, None] == word[None, :]).to(tl.float32)
        of_words += _dot(chosen, dx)
    columns = tl.arange(0, E)[None, :]
    program = split * tl.num_programs(0) + tl.program_id(0)
    dparameters += program.to(tl.int64) * (words_in_all * E + 2 * E)
    at = 2 * E + words[:, None] * E + columns
    tl.store(dparameters + at, of_words, mask=words[:, None] < words_in_all)
    if tl.program_id(2) == 0:
        of_tile = split * length * E + inside[:, None] * E + columns
        _put(dpositions, of_tile, of_positions, there)
        _put_vector(dparameters, of_weight, E)
        _put_vector(dparameters + E, of_bias, E)


@triton.jit
def project_forward(
    x_in, query_w, query_b, key_w, key_b, value_w, value_b, query, key, value, tokens_in_all,
    M: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    dtype = x_in.dtype.element_ty
    wq = tl.trans(_to(_matrix(query_w, K, E), dtype))
    wk = tl.trans(_to(_matrix(key_w, K, E), dtype))
    wv = tl.trans(_to(_matrix(value_w, K, E), dtype))
    bq, bk, bv = _vector(query_b, K), _vector(key_b, K), _vector(value_b, K)
    for tile in range(tl.program_id(0), tl.cdiv(tokens_in_all, M), tl.num_programs(0)):
        first = tile * M
        there = first + tl.arange(0, M) < tokens_in_all
        x = _rows(x_in, _tile(first, M, E), there)
        at = _tile(first, M, K)
        _put(query, at, _dot(x, wq) + bq[None, :], there)
        _put(key, at, _dot(x, wk) + bk[None, :], there)
        _put(value, at, _dot(x, wv) + bv[None, :], there)


@triton.jit
def project_backward(
    x_in, query_w, key_w, value_w, dquery_in, dkey_in, dvalue_in, dx_out, dparameters,
    tokens_in_all, M: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    dtype = x_in.dtype.element_ty
    wq = _to(_matrix(query_w, K, E), dtype)
    wk = _to(_matrix(key_w, K, E), dtype)
    wv = _to(_matrix(value_w, K, E), dtype)
    of_wq = tl.zeros((K, E), tl.float32)
    of_wk = tl.zeros((K, E), tl.float32)
    of_wv = tl.zeros((K, E), tl.float32)
    of_bq = tl.zeros((K,), tl.float32)
    of_bk = tl.zeros((K,), tl.float32)
    of_bv = tl.zeros((K,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens_in_all, M), tl.num_programs(0)):
        first = tile * M
        there = first + tl.arange(0, M) < tokens_in_all
        of_x, at = _tile(first, M, E), _tile(first, M, K)
        x = _rows(x_in, of_x, there)
        dq = _rows(dquery_in, at, there)
        of_wq += _dot(tl.trans(dq), x)
        of_bq += tl.sum(dq.to(tl.float32), 0)
        dx = _dot(dq, wq)
        dk = _rows(dkey_in, at, there)
        of_wk += _dot(tl.trans(dk), x)
        of_bk += tl.sum(dk.to(tl.float32), 0)
        dx += _dot(dk, wk)
        dv = _rows(dvalue_in, at, there)
        of_wv += _dot(tl.trans(dv), x)
        of_bv += tl.sum(dv.to(tl.float32), 0)
        dx += _dot(dv, wv)
        _put(dx_out, of_x, dx, there)
    SIZE: tl.constexpr = K * E + K
    dparameters += tl.program_id(0).to(tl.int64) * (3 * SIZE)
    _put_matrix(dparameters, of_wq, K, E)
    _put_vector(dparameters + K * E, of_bq, K)
    _put_matrix(dparameters + SIZE, of_wk, K, E)
    _put_vector(dparameters + SIZE + K * E, of_bk, K)
    _put_matrix(dparameters + 2 * SIZE, of_wv, K, E)
    _put_vector(dparameters + 2 * SIZE + K * E, of_bv, K)


@triton.jit(do_not_specialize=["site0", "site1", "site2", "threshold"])
def layer_forward(
    x_in, attended_in, output_w, output_b, norm_w, norm_b, expand_w, expand_b,
    contract_w, contract_b, next_w, next_b, key, y_out, hidden_out, z_out, normed_out,
    tokens_in_all, length, site0, site1, site2, threshold, scale, eps,
    M: tl.constexpr, E: tl.constexpr, K: tl.constexpr, F: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    dtype = attended_in.dtype.element_ty
    output = tl.trans(_to(_matrix(output_w, E, K), dtype))
    expand = tl.trans(_to(_matrix(expand_w, F, E), dtype))
    contract = tl.trans(_to(_matrix(contract_w, E, F), dtype))
    for tile in range(tl.program_id(0), tl.cdiv(tokens_in_all, M), tl.num_programs(0)):
        first = tile * M
        tokens = first + tl.arange(0, M)
        there = tokens < tokens_in_all
        at, of_hidden = _tile(first, M, E), _tile(first, M, F)

        branch = _dot(_rows(attended_in, _tile(first, M, K), there), output)
        branch += _vector(output_b, E)[None, :]
        if DROPOUT:
            branch = _dropout(branch, key, site0, tokens, length, threshold, scale, E)
        y = _rows(x_in, at, there).to(tl.float32) + branch
        _put(y_out, at, y, there)

        normal, _ = _normalise(y, eps, E)
        normed = normal * _vector(norm_w, E)[None, :] + _vector(norm_b, E)[None, :]
        hidden = _dot(_to(normed, dtype), expand) + _vector(expand_b, F)[None, :]
        hidden = _to(hidden, dtype)
        _put(hidden_out, of_hidden, hidden, there)
        wide = hidden.to(tl.float32)  # rounded: the backward pass starts from the same
        wide *= _normal_distribution(wide)
        if DROPOUT:
            wide = _dropout(wide, key, site1, tokens, length, threshold, scale, F)

        branch = _dot(_to(wide, dtype), contract) + _vector(contract_b, E)[None, :]
        if DROPOUT:
            branch = _dropout(branch, key, site2, tokens, length, threshold, scale, E)
        z = y + branch
        _put(z_out, at, z, there)
        normal, _ = _normalise(z, eps, E)
        normed = normal * _vector(next_w, E)[None, :] + _vector(next_b, E)[None, :]
        _put(normed_out, at, normed, there)


@triton.jit(do_not_specialize=["site0", "site1", "site2", "threshold"])
def layer_backward(
    attended_in, y_in, hidden_in, z_in, dz_in, dnormed_in, output_w, norm_w, norm_b, expand_w,
    contract_w, next_w, key, dx_out, dattended_out, dparameters,
    tokens_in_all, length, site0, site1, site2, threshold, scale, eps,
    M: tl.constexpr, E: tl.constexpr, K: tl.constexpr, F: tl.constexpr, DROPOUT: tl.constexpr,
    DZ: tl.constexpr,
):  # fmt: skip
    dtype = attended_in.dtype.element_ty
    output = _to(_matrix(output_w, E, K), dtype)
    expand = _to(_matrix(expand_w, F, E), dtype)
    contract = _to(_matrix(contract_w, E, F), dtype)
    of_output = tl.zeros((E, K), tl.float32)
    of_expand = tl.zeros((F, E), tl.float32)
    of_contract = tl.zeros((E, F), tl.float32)
    of_output_b, of_contract_b = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    of_norm_w, of_norm_b = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    of_next_w, of_next_b = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    of_expand_b = tl.zeros((F,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens_in_all, M), tl.num_programs(0)):
        first = tile * M
        tokens = first + tl.arange(0, M)
        there = tokens < tokens_in_all
        at, of_hidden, of_heads = _tile(first, M, E), _tile(first, M, F), _tile(first, M, K)

        # normed = LayerNorm(z)
        dnormed = _rows(dnormed_in, at, there).to(tl.float32)
        normal, inverse = _normalise(_rows(z_in, at, there).to(tl.float32), eps, E)
        of_next_w += tl.sum(dnormed * normal, 0)
        of_next_b += tl.sum(dnormed, 0)
        dy = _normalise_backward(dnormed, _vector(next_w, E), normal, inverse, E)
        if DZ:
            dy += _rows(dz_in, at, there).to(tl.float32)

        # z = y + dropout(contract(dropout(gelu(hidden))))
        dbranch = dy
        if DROPOUT:
            dbranch = _dropout(dy, key, site2, tokens, length, threshold, scale, E)
        of_contract_b += tl.sum(dbranch, 0)
        dbranch = _to(dbranch, dtype)
        hidden = _rows(hidden_in, of_hidden, there).to(tl.float32)
        phi = _normal_distribution(hidden)
        wide = hidden * phi
        dwide = _dot(dbranch, contract)
        if DROPOUT:
            wide = _dropout(wide, key, site1, tokens, length, threshold, scale, F)
            dwide = _dropout(dwide, key, site1, tokens, length, threshold, scale, F)
        of_contract += _dot(tl.trans(dbranch), _to(wide, dtype))
        density = 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
        dhidden = dwide * (phi + hidden * density)
        of_expand_b += tl.sum(dhidden, 0)
        dhidden = _to(dhidden, dtype)

        # hidden = expand(LayerNorm(y))
        normal, inverse = _normalise(_rows(y_in, at, there).to(tl.float32), eps, E)
        normed = normal * _vector(norm_w, E)[None, :] + _vector(norm_b, E)[None, :]
        of_expand += _dot(tl.trans(dhidden), _to(normed, dtype))
        dnormed = _dot(dhidden, expand)
        of_norm_w += tl.sum(dnormed * normal, 0)
        of_norm_b += tl.sum(dnormed, 0)
        dy += _normalise_backward(dnormed, _vector(norm_w, E), normal, inverse, E)
        _put(dx_out, at, dy, there)

        # y = x + dropout(output(attended))
        if DROPOUT:
            dy = _dropout(dy, key, site0, tokens, length, threshold, scale, E)
        of_output_b += tl.sum(dy, 0)
        dbranch = _to(dy, dtype)
        of_output += _dot(tl.trans(dbranch), _rows(attended_in, of_heads, there))
        _put(dattended_out, of_heads, _dot(dbranch, output), there)

    # as the parameters follow each other in `Layer`
    to = dparameters + tl.program_id(0).to(tl.int64) * (E * K + 2 * E * F + F + 6 * E)
    _put_matrix(to, of_output, E, K)
    to += E * K
    _put_vector(to, of_output_b, E)
    _put_vector(to + E, of_norm_w, E)
    _put_vector(to + 2 * E, of_norm_b, E)
    to += 3 * E
    _put_matrix(to, of_expand, F, E)
    to += E * F
    _put_vector(to, of_expand_b, F)
    to += F
    _put_matrix(to, of_contract, E, F)
    to += E * F
    _put_vector(to, of_contract_b, E)
    _put_vector(to + E, of_next_w, E)
    _put_vector(to + 2 * E, of_next_b, E)


@triton.jit(do_not_specialize=["site", "threshold"])
def add_norm_forward(
    x_in, branch_in, weight, bias, key, y_out, normed_out,
    tokens_in_all, length, site, threshold, scale, eps,
    M: tl.constexpr, E: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * M
    tokens = first + tl.arange(0, M)
    there = tokens < tokens_in_all
    at = _tile(first, M, E)
    branch = _rows(branch_in, at, there).to(tl.float32)
    if DROPOUT:
        branch = _dropout(branch, key, site, tokens, length, threshold, scale, E)
    y = _rows(x_in, at, there).to(tl.float32) + branch
    _put(y_out, at, y, there)
    normal, _ = _normalise(y, eps, E)
    normed = normal * _vector(weight, E)[None, :] + _vector(bias, E)[None, :]
    _put(normed_out, at, normed, there)


@triton.jit(do_not_specialize=["site", "threshold"])
def add_norm_backward(
    y_in, dy_in, dnormed_in, weight, key, dx_out, dbranch_out, dparameters,
    tokens_in_all, length, site, threshold, scale, eps,
    M: tl.constexpr, E: tl.constexpr, DROPOUT: tl.constexpr, DY: tl.constexpr,
):  # fmt: skip
    gamma = _vector(weight, E)
    of_weight, of_bias = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens_in_all, M), tl.num_programs(0)):
        first = tile * M
        tokens = first + tl.arange(0, M)
        there = tokens < tokens_in_all
        at = _tile(first, M, E)
        dnormed = _rows(dnormed_in, at, there).to(tl.float32)
        normal, inverse = _normalise(_rows(y_in, at, there).to(tl.float32), eps, E)
        of_weight += tl.sum(dnormed * normal, 0)
        of_bias += tl.sum(dnormed, 0)
        dx = _normalise_backward(dnormed, gamma, normal, inverse, E)
        if DY:
            dx += _rows(dy_in, at, there).to(tl.float32)
        _put(dx_out, at, dx, there)
        if DROPOUT:
            dx = _dropout(dx, key, site, tokens, length, threshold, scale, E)
        _put(dbranch_out, at, dx, there)
    dparameters += tl.program_id(0) * 2 * E
    _put_vector(dparameters, of_weight, E)
    _put_vector(dparameters + E, of_bias, E)


@triton.jit(do_not_specialize=["site", "threshold"])
def gelu(
    x_in, dout_in, key, out, size, site, threshold, scale,
    SIZE: tl.constexpr, DROPOUT: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Program (i, b): elements i SIZE .. (i + 1) SIZE of the `size` of example b."""
    element = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    at = tl.program_id(1).to(tl.int64) * size + element
    x = tl.load(x_in + at, mask=element < size, other=0.0).to(tl.float32)
    y = _normal_distribution(x)
    if BACKWARD:
        y += x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
        y *= tl.load(dout_in + at, mask=element < size, other=0.0).to(tl.float32)
    else:
        y *= x
    if DROPOUT:
        key0, key1 = _example_keys(key, site, tl.program_id(1))
        y = tl.where(_kept(element, key0, key1, threshold), y * scale, 0.0)
    tl.store(out + at, _to(y, out.dtype.element_ty), mask=element < size)


@triton.jit
def mean_forward(x_in, mask, out, length, M: tl.constexpr, E: tl.constexpr):
    """Program b: example b."""
    begin = tl.program_id(0).to(tl.int64) * length
    total = tl.zeros((M, E), tl.float32)
    for first in range(0, length, M):
        inside = first + tl.arange(0, M)
        real = tl.load(mask + begin + inside, mask=inside < length, other=0) != 0
        total += _rows(x_in, _tile(begin + first, M, E), real).to(tl.float32)
    _put_vector(out + tl.program_id(0) * E, tl.sum(total, 0) / length, E)


@triton.jit
def mean_backward(dout, mask, dx_out, tokens_in_all, length, M: tl.constexpr, E: tl.constexpr):
    first = tl.program_id(0) * M
    tokens = first + tl.arange(0, M)
    there = tokens < tokens_in_all
    real = tl.load(mask + tokens, mask=there, other=0) != 0
    of_example = (tokens // length)[:, None] * E + tl.arange(0, E)[None, :]
    dx = tl.load(dout + of_example, mask=real[:, None], other=0.0) / length
    _put(dx_out, _tile(first, M, E), dx, there)


# ---- launches ------------------------------------------------------------------------


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """All that runs here goes through this (benchmarks/traffic.py counts it)."""
    with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
        kernel[grid](*arguments, **constants)


def fits(*widths: int) -> bool:
    return all(16 <= width <= MAX_WIDTH and width & (width - 1) == 0 for width in widths)


class Drop(NamedTuple):
    """A dropout as kernels take it."""

    words: Tensor  # int64 [3]: seed, step, first example; anything if nothing is dropped
    threshold: int  # 0: nothing is dropped
    scale: float


def _walk(tokens: int, M: int) -> tuple[int]:
    return (min(PROGRAMS, triton.cdiv(tokens, M)),)


def _refuse_twice() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("the compiled operations cannot be differentiated twice (create_graph)")


def _dense(grad: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient as a contiguous tensor; zeros if none came."""
    return torch.zeros_like(like, dtype=dtype) if grad is None else grad.contiguous()


def _sum_of_programs(partial: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """[programs, size] -> the gradient of each parameter, in its dtype."""
    parts = partial.sum(0).split([parameter.numel() for parameter in parameters])
    return [x.view_as(p).to(p.dtype) for x, p in zip(parts, parameters, strict=True)]


class EmbedNorm(torch.autograd.Function):
    """layer.embedding_dropout_layer_norm; keeps x."""

    @staticmethod
    def forward(ctx, ids, words, positions, weight, bias, eps, drop, site, norm_dtype):
        ids, words, positions = ids.contiguous(), words.contiguous(), positions.contiguous()
        (B, N), (V, E) = ids.shape, words.shape
        x = words.new_empty(B, N, E)
        normed = torch.empty_like(x, dtype=norm_dtype)
        M = 32
        launch(
            embed_forward, (triton.cdiv(B * N, M),),
            ids, words, positions, weight, bias, drop.words, x, normed,
            B * N, N, V, site, drop.threshold, drop.scale, eps,
            M=M, E=E, DROPOUT=drop.threshold > 0, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(ids, x, weight, bias, words, positions, drop.words)
        ctx.rest = eps, drop.threshold, drop.scale, site, norm_dtype
        ctx.set_materialize_grads(False)
        return x, normed

    @staticmethod
    def backward(ctx, dx, dnormed):
        _refuse_twice()
        ids, x, weight, bias, words, positions, key = ctx.saved_tensors
        eps, threshold, scale, site, norm_dtype = ctx.rest
        (B, N, E), V = x.shape, len(words)
        dnormed = _dense(dnormed, x, norm_dtype)
        M = 16
        tiles = triton.cdiv(N, M)
        splits = min(B, max(1, PROGRAMS // tiles))
        dpositions = x.new_empty(splits, N, E, dtype=torch.float32)
        partial = x.new_empty(splits * tiles, (2 + V) * E, dtype=torch.float32)
        at_once = min(WORDS_IN_REGISTERS // E, max(16, triton.next_power_of_2(V)))
        launch(
            embed_backward, (tiles, splits, triton.cdiv(V, at_once)),
            ids, x, x if dx is None else dx.contiguous(), dnormed, weight, key, dpositions,
            partial, B, N, V, site, threshold, scale, eps,
            M=M, E=E, V=at_once, DROPOUT=threshold > 0, DX=dx is not None, num_warps=8,
        )  # fmt: skip
        dweight, dbias, dwords = _sum_of_programs(partial, [weight, bias, words])
        if ctx.needs_input_grad[2]:
            dpositions = dpositions.sum(0).to(positions.dtype)
        else:
            dpositions = None
        return None, dwords, dpositions, dweight, dbias, None, None, None, None


class Project(torch.autograd.Function):
    """layer.attention_projections; keeps its arguments."""

    @staticmethod
    def forward(ctx, x, heads, *parameters):
        x = x.contiguous()
        (B, N, E), K = x.shape, len(parameters[0])
        parts = [x.new_empty(B, N, K) for _ in range(3)]
        M = 64
        launch(project_forward, _walk(B * N, M), x, *parameters, *parts, B * N, M=M, E=E, K=K)
        ctx.save_for_backward(x, *parameters)
        return tuple(part.view(B, N, heads, -1).transpose(1, 2) for part in parts)

    @staticmethod
    def backward(ctx, *grads):
        _refuse_twice()
        x, *parameters = ctx.saved_tensors
        (B, N, E), K = x.shape, len(parameters[0])
        dparts = [grad.transpose(1, 2).contiguous() for grad in grads]  # [B, N, H, d], no copy
        dx = torch.empty_like(x)
        M = 32
        grid = _walk(B * N, M)
        partial = x.new_empty(*grid, 3 * (K * E + K), dtype=torch.float32)
        launch(
            project_backward, grid,
            x, *parameters[::2], *dparts, dx, partial, B * N, M=M, E=E, K=K, num_warps=8,
        )  # fmt: skip
        return dx, None, *_sum_of_programs(partial, parameters)


class Layer(torch.autograd.Function):
    """layer.attention_output_feed_forward; keeps y, the hidden values before GELU, and z."""

    @staticmethod
    def forward(ctx, x, attended, drop, sites, eps, *parameters):
        x, attended = x.contiguous(), attended.contiguous()
        (B, N, E), K, F = x.shape, attended.shape[2], len(parameters[4])
        y, z = torch.empty_like(x), torch.empty_like(x)
        normed = torch.empty_like(x, dtype=attended.dtype)
        hidden = attended.new_empty(B, N, F)
        M = 32
        launch(
            layer_forward, _walk(B * N, M),
            x, attended, *parameters, drop.words, y, hidden, z, normed,
            B * N, N, *sites, drop.threshold, drop.scale, eps,
            M=M, E=E, K=K, F=F, DROPOUT=drop.threshold > 0, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(attended, y, hidden, z, drop.words, *parameters)
        ctx.rest = drop.threshold, drop.scale, sites, eps
        ctx.set_materialize_grads(False)
        return z, normed

    @staticmethod
    def backward(ctx, dz, dnormed):
        _refuse_twice()
        attended, y, hidden, z, key, *parameters = ctx.saved_tensors
        threshold, scale, sites, eps = ctx.rest
        (B, N, E), K, F = y.shape, attended.shape[2], hidden.shape[2]
        dnormed = _dense(dnormed, y, attended.dtype)
        dx, dattended = torch.empty_like(y), torch.empty_like(attended)
        output_w, _, norm_w, norm_b, expand_w, _, contract_w, _, next_w, _ = parameters
        M = 16  # with 32 registers would not suffice
        grid = _walk(B * N, M)
        size = sum(parameter.numel() for parameter in parameters)
        partial = y.new_empty(*grid, size, dtype=torch.float32)
        launch(
            layer_backward, grid,
            attended, y, hidden, z, y if dz is None else dz.contiguous(), dnormed,
            output_w, norm_w, norm_b, expand_w, contract_w, next_w, key, dx, dattended, partial,
            B * N, N, *sites, threshold, scale, eps,
            M=M, E=E, K=K, F=F, DROPOUT=threshold > 0, DZ=dz is not None, num_warps=8,
            num_stages=2,
        )  # fmt: skip
        return dx, dattended, None, None, None, *_sum_of_programs(partial, parameters)


class AddNorm(torch.autograd.Function):
    """layer.dropout_add_layer_norm; keeps y."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, drop, site, norm_dtype):
        x, branch = x.contiguous(), branch.contiguous()
        B, N, E = x.shape
        y, normed = torch.empty_like(x), torch.empty_like(x, dtype=norm_dtype)
        M = max(1, TILE // E)
        launch(
            add_norm_forward, (triton.cdiv(B * N, M),),
            x, branch, weight, bias, drop.words, y, normed,
            B * N, N, site, drop.threshold, drop.scale, eps,
            M=M, E=E, DROPOUT=drop.threshold > 0,
        )  # fmt: skip
        ctx.save_for_backward(y, weight, bias, drop.words)
        ctx.rest = eps, drop.threshold, drop.scale, site, branch.dtype, norm_dtype
        ctx.set_materialize_grads(False)
        return y, normed

    @staticmethod
    def backward(ctx, dy, dnormed):
        _refuse_twice()
        y, weight, bias, key = ctx.saved_tensors
        eps, threshold, scale, site, branch_dtype, norm_dtype = ctx.rest
        B, N, E = y.shape
        dx, dbranch = torch.empty_like(y), torch.empty_like(y, dtype=branch_dtype)
        M = max(1, TILE // E)
        grid = _walk(B * N, M)
        partial = y.new_empty(*grid, 2 * E, dtype=torch.float32)
        launch(
            add_norm_backward, grid,
            y, y if dy is None else dy.contiguous(), _dense(dnormed, y, norm_dtype), weight, key,
            dx, dbranch, partial, B * N, N, site, threshold, scale, eps,
            M=M, E=E, DROPOUT=threshold > 0, DY=dy is not None, num_warps=8,
        )  # fmt: skip
        return dx, dbranch, *_sum_of_programs(partial, [weight, bias]), None, None, None, None


class GeluDropout(torch.autograd.Function):
    """layer.gelu_dropout; keeps x."""

    @staticmethod
    def forward(ctx, x, drop, site):
        x = x.contiguous()
        ctx.save_for_backward(x, drop.words)
        ctx.rest = site, drop.threshold, drop.scale
        return _gelu(False, x, x, drop.words, *ctx.rest)

    @staticmethod
    def backward(ctx, dout):
        _refuse_twice()
        x, key = ctx.saved_tensors
        return _gelu(True, x, dout.contiguous(), key, *ctx.rest), None, None


def _gelu(backward: bool, x, dout, key, site, threshold, scale) -> Tensor:
    out, size = torch.empty_like(x), x.numel() // x.shape[0]
    launch(
        gelu, (triton.cdiv(size, TILE), x.shape[0]), x, dout, key, out, size, site, threshold,
        scale, SIZE=TILE, DROPOUT=threshold > 0, BACKWARD=backward,
    )  # fmt: skip
    return out


class MaskedMean(torch.autograd.Function):
    """layer.masked_mean; keeps the mask."""

    @staticmethod
    def forward(ctx, x, mask):
        x, ctx.mask, ctx.dtype = x.contiguous(), mask.contiguous(), x.dtype
        B, N, E = x.shape
        out = x.new_empty(B, E, dtype=torch.float32)
        launch(mean_forward, (B,), x, ctx.mask, out, N, M=max(1, TILE // E), E=E)
        return out

    @staticmethod
    def backward(ctx, dout):
        _refuse_twice()
        dout, (B, N), E = dout.contiguous(), ctx.mask.shape, dout.shape[1]
        dx = dout.new_empty(B, N, E, dtype=ctx.dtype)
        M = max(1, TILE // E)
        launch(mean_backward, (triton.cdiv(B * N, M),), dout, ctx.mask, dx, B * N, N, M=M, E=E)
        return dx, None
