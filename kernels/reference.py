"""Attention in plain torch: runs on any device and defines what is right.

Shape letters: B batch, H heads, N padded length, d head_dim, bs block_size, nb = N / bs.

The sparse form treats the rows of blocks that keep equally many (c) as one batch: their queries
[B*H*R, bs, d] meet their gathered keys [B*H*R, c*bs, d], so the softmax is an ordinary one over
the last dimension and nothing larger than the kept blocks exists. 16-bit inputs are computed in
fp32 and rounded at the end.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import BlockLayout
from kernels.statistics import AttentionStatistics, real_row_weights

name = "reference"


def reason_unavailable() -> str | None:
    return None


def supports(op: str, query: Tensor, layout: BlockLayout | None) -> str | None:
    return None


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    key_padding_mask: Tensor | None,
    scale: float,
    pruned: str,
) -> Tensor:
    return _BlockSparse.apply(query, key, value, layout, key_padding_mask, scale, pruned)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, scale: float
) -> Tensor:
    # With a strided last dimension torch would leave its fused kernel for B * H * N * N memory.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    # An example without a real key attends to all of its padding instead, and the result is
    # thrown away: what a softmax over nothing gives differs between torch's kernels.
    real = key_padding_mask.any(1)
    mask = key_padding_mask | ~real[:, None]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None, None], scale=scale
    )
    return out.masked_fill(~real[:, None, None, None], 0)


@torch.compiler.disable  # it would unroll the loops
def attention_statistics(
    query: Tensor,
    key: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    scale: float,
    groups: int,
    full: bool,
    mean_out: Tensor | None,
    mean_weight: float,
) -> AttentionStatistics:
    B, H, N, _ = query.shape
    bs, nb, group_size = block_size, N // block_size, B // groups
    query, key = _compute(query) * scale, _compute(key)
    if full and mean_out is None:
        mean_out, mean_weight = query.new_zeros(groups, N, N, dtype=torch.float32), 1.0
    pooled_sum = query.new_zeros(nb, nb, dtype=torch.float64)
    square_sum = query.new_zeros(nb, dtype=torch.float64)
    weights = None if key_padding_mask is None else real_row_weights(key_padding_mask)
    real_sum = torch.zeros_like(pooled_sum)
    # One chunk of rows of one head at a time, in buffers that are reused: fresh memory of this
    # size comes from the operating system page by page.
    rows = _rows_at_once(query, bs)
    buffers = [query.new_empty(rows, N) for _ in range(3)]
    for first in range(0, N, rows):
        chunk = slice(first, min(first + rows, N))
        blocks = slice(chunk.start // bs, chunk.stop // bs)
        scores, probs, total = (buffer[: chunk.stop - first] for buffer in buffers)
        for group in range(groups):
            total.zero_()
            for b in range(group * group_size, (group + 1) * group_size):
                real = None if key_padding_mask is None else key_padding_mask[b]
                for h in range(H):
                    torch.mm(query[b, h, chunk], key[b, h].t(), out=scores)
                    if real is not None:
                        scores.masked_fill_(~real, -math.inf)
                    torch.softmax(scores, -1, out=probs)
                    if real is not None:  # a softmax over nothing is no number
                        probs.masked_fill_(~real.any(), 0)
                    pooled = probs.view(-1, bs, N).sum(1).view(-1, nb, bs).sum(-1).double() / bs**2
                    pooled_sum[blocks] += pooled
                    square_sum[blocks] += pooled.square().sum(1)
                    if weights is not None:
                        rows_of_blocks = probs.view(-1, bs, nb, bs).sum(-1)
                        weight = weights[b, chunk].to(probs.dtype).view(-1, 1, bs)
                        of_real = torch.matmul(weight, rows_of_blocks).squeeze(1)
                        real_sum[blocks] += of_real.double() / bs**2
                    if mean_out is not None:
                        total += probs
            if mean_out is not None:
                mean_out[group, chunk].add_(total, alpha=mean_weight / (group_size * H))
    pooled_mean = (pooled_sum / (B * H)).float()
    return AttentionStatistics(
        mean_attention=mean_out,
        pooled_mean=pooled_mean,
        pooled_square_mean=square_sum.sum() / (B * H * nb * nb),
        pooled_real=pooled_mean if weights is None else (real_sum / (B * H)).float(),
    )


def _rows_at_once(query: Tensor, block_size: int) -> int:
    """Rows of probabilities to hold at a time: a multiple of block_size, cache-sized on a CPU."""
    N = query.shape[2]
    elements = 2**17 * torch.get_num_threads() if query.device.type == "cpu" else N * N
    return min(N, block_size * max(1, elements // (N * block_size)))


def _compute(tensor: Tensor) -> Tensor:
    """In the dtype that the arithmetic uses: fp64 stays, everything else is fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _BlockSparse(torch.autograd.Function):
    """Keeps for the backward pass: exp(scores) of the kept blocks and one factor a row."""

    @staticmethod
    def forward(ctx, query, key, value, layout, key_padding_mask, scale, pruned):
        B, H, N, d = query.shape
        bs = layout.block_size
        q, k, v = (_blocks(x, bs) for x in (query, key, value))
        out = q.new_zeros(B, H, N // bs, bs, d, dtype=q.dtype)
        saved = []
        for rows, columns in layout.row_groups:
            count = columns.shape[1] * bs
            scores = torch.bmm(_take(q, rows, bs).mul(scale), _take(k, columns, count).mT)
            scores = scores.view(B, H, -1, bs, count)
            if key_padding_mask is not None:
                real = key_padding_mask.reshape(B, 1, -1, bs)[:, :, columns]
                real = real.view(B, 1, -1, 1, count)
                scores.masked_fill_(~real, -math.inf)
            top = scores.amax(-1, keepdim=True)
            num_pruned = N - count if pruned == "zero" else 0
            # Any finite reference keeps the formula exact. 0 is the pruned scores' maximum; a row
            # of padding alone has none, and with 0 its exponentials are zeros.
            top = top.clamp_min(0) if num_pruned else top.masked_fill(top == -math.inf, 0)
            exps = scores.sub_(top).exp_()
            total = exps.sum(-1, keepdim=True)
            if num_pruned:
                total += num_pruned * (-top).exp()
            inverse = total.reciprocal().masked_fill(total == 0, 0).view(-1, bs, 1)
            exps = exps.view(-1, bs, count)
            part = torch.bmm(exps, _take(v, columns, count)).mul_(inverse)
            out.index_copy_(2, rows, part.view(B, H, -1, bs, d))
            saved += [exps, inverse]
        out = out.view(B, H, N, d)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, out, *saved)
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx, dout):
        with torch.autocast(dout.device.type, enabled=False):
            return _BlockSparse.gradients(ctx, dout)

    @staticmethod
    def gradients(ctx, dout):
        query, key, value, out, *saved = ctx.saved_tensors
        layout, scale, bs = ctx.layout, ctx.scale, ctx.layout.block_size
        shape = query.shape
        q, k, v, o, do = (_blocks(x, bs) for x in (query, key, value, out, dout))
        dq, dk, dv = (torch.zeros_like(o) for _ in range(3))
        delta = (do * o).sum(-1, keepdim=True)  # rowsum(p * dp), as out = p v
        for (rows, columns), exps, inverse in zip(
            layout.row_groups, saved[::2], saved[1::2], strict=True
        ):
            count = columns.shape[1] * bs
            group = (*shape[:2], -1, bs, shape[3])
            # The rows' factors go where rows are d columns wide instead of c * bs.
            do_rows = _take(do, rows, bs).mul(inverse)
            delta_rows = _take(delta, rows, bs).mul(inverse)
            _add_blocks(dv, columns, torch.bmm(exps.mT, do_rows).view(group))
            dscores = torch.bmm(do_rows, _take(v, columns, count).mT).sub_(delta_rows).mul_(exps)
            k_rows, q_rows = _take(k, columns, count), _take(q, rows, bs).mul(scale)
            dq.index_copy_(2, rows, torch.bmm(dscores, k_rows).mul_(scale).view(group))
            _add_blocks(dk, columns, torch.bmm(dscores.mT, q_rows).view(group))
        dq, dk, dv = (x.view(shape).to(query.dtype) for x in (dq, dk, dv))
        return dq, dk, dv, None, None, None, None


def _blocks(tensor: Tensor, block_size: int) -> Tensor:
    """[B, H, N, d] -> [B, H, nb, bs, d] in the compute dtype."""
    return _compute(tensor).unflatten(2, (-1, block_size))


def _take(blocks: Tensor, index: Tensor, rows: int) -> Tensor:
    """The blocks [B, H, nb, bs, d] named by `index`, as matrices [-1, rows, d]."""
    return blocks.index_select(2, index.flatten()).view(-1, rows, blocks.shape[-1])


def _add_blocks(blocks: Tensor, index: Tensor, source: Tensor) -> None:
    """Add `source` to the blocks [B, H, nb, bs, d] named by `index`, in the same order each time.

    Each of the two does so on one kind of device only.
    """
    if blocks.device.type == "cpu":
        blocks.index_add_(2, index.flatten(), source)
    else:
        blocks.transpose(0, 2).index_put_(
            (index.flatten(),), source.transpose(0, 2), accumulate=True
        )
