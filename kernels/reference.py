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

from kernels.backends import Call
from kernels.layout import BlockLayout

name = "reference"


def can_run(call: Call) -> str | None:
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout | None,
    key_padding_mask: Tensor | None,
    scale: float,
    pruned_zero: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(query.device.type, enabled=False):
        if layout is None:
            out = _dense(query, key, value, key_padding_mask, scale)
            if not torch.compiler.is_compiling():  # which refuses by itself
                out = _Once.apply(out, query, key, value)
            lse = _dense_lse(query, key, key_padding_mask, scale) if return_lse else None
            return out, lse
        settings = key_padding_mask, scale, pruned_zero
        if layout.heads is None:
            return _BlockSparse.apply(query, key, value, layout, *settings)
        split = (x.split(1, 1) for x in (query, key, value))
        outs, lses = zip(
            *(
                _BlockSparse.apply(*qkv, own, *settings)
                for *qkv, own in zip(*split, layout.of_heads, strict=True)
            ),
            strict=True,
        )
        return torch.cat(outs, 1), torch.cat(lses, 1)


def _dense(
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


@torch.no_grad()
def _dense_lse(
    query: Tensor, key: Tensor, key_padding_mask: Tensor | None, scale: float
) -> Tensor:
    """Log-denominators [B, H, N], one example at a time."""
    query, key = _compute(query) * scale, _compute(key)
    lse = query.new_empty(query.shape[:3])
    rows = _rows_at_once(query, 1)
    for b in range(query.shape[0]):
        for first in range(0, query.shape[2], rows):
            scores = query[b, :, first : first + rows] @ key[b].mT
            if key_padding_mask is not None:
                scores.masked_fill_(~key_padding_mask[b], -math.inf)
            lse[b, :, first : first + rows] = scores.logsumexp(-1)
    return lse


class _Once(torch.autograd.Function):
    """The identity on what attention gives; the gradient it passes on is no function of anything.

    Left to themselves torch's kernels differ in the second derivative: an error, or right values
    at the cost of B * H * N * N.
    """

    @staticmethod
    def forward(ctx, out, *inputs):
        ctx.save_for_backward(*inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        return refuse_twice(dout, *ctx.saved_tensors), None, None, None


class _Refusal(torch.autograd.Function):
    """The identity on `grad`, tied to all that it depends on."""

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("attention cannot be differentiated twice")


def refuse_twice(grad: Tensor, *inputs: Tensor) -> Tensor:
    """`grad`, which cannot be differentiated with respect to `inputs`."""
    return _Refusal.apply(grad, *inputs) if torch.is_grad_enabled() else grad


def statistics_forward(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    row_weights: Tensor | None,
    lse: Tensor | None,
    mean: Tensor | None,
    block_size: int,
    scale: float,
    groups: int,
    accumulate: bool,
    mean_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, _ = query.shape
    bs, nb, group_size = block_size, N // block_size, B // groups
    query, key = _compute(query) * scale, _compute(key)
    if mean is not None and not accumulate:
        mean.zero_()
    pooled_sum = query.new_zeros(nb, nb, dtype=torch.float64)
    square_sum = query.new_zeros(nb, dtype=torch.float64)
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
                    if lse is None:
                        torch.softmax(scores, -1, out=probs)
                    else:
                        torch.exp(scores.sub_(lse[b, h, chunk, None]), out=probs)
                    if real is not None:  # a softmax over nothing is no number
                        probs.masked_fill_(~real.any(), 0)
                    pooled = probs.view(-1, bs, N).sum(1).view(-1, nb, bs).sum(-1).double() / bs**2
                    pooled_sum[blocks] += pooled
                    square_sum[blocks] += pooled.square().sum(1)
                    if row_weights is not None:
                        rows_of_blocks = probs.view(-1, bs, nb, bs).sum(-1)
                        weight = row_weights[b, chunk].to(probs.dtype).view(-1, 1, bs)
                        of_real = torch.matmul(weight, rows_of_blocks).squeeze(1)
                        real_sum[blocks] += of_real.double() / bs**2
                    if mean is not None:
                        total += probs
            if mean is not None:
                mean[group, chunk].add_(total, alpha=mean_weight / (group_size * H))
    pooled_mean, pooled_real = ((x / (B * H)).float() for x in (pooled_sum, real_sum))
    return pooled_mean, square_sum.sum() / (B * H * nb * nb), pooled_real


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
    def forward(ctx, query, key, value, layout, key_padding_mask, scale, pruned_zero):
        B, H, N, d = query.shape
        bs = layout.block_size
        q, k, v = (_blocks(x, bs) for x in (query, key, value))
        out = q.new_zeros(B, H, N // bs, bs, d, dtype=q.dtype)
        lse = q.new_full((B, H, N // bs, bs), -math.inf)
        saved = []
        for rows, columns in layout.row_groups:
            count = columns.shape[1] * bs
            scores = torch.bmm(_take(q, rows, bs).mul(scale), _take(k, columns, count).mT)
            scores = scores.view(B, H, -1, bs, count)
            if key_padding_mask is not None:
                real = key_padding_mask.reshape(B, 1, -1, bs)[:, :, columns]
                scores.masked_fill_(~real.view(B, 1, -1, 1, count), -math.inf)
            num_pruned = scores.new_full((1, 1), N - count)
            if layout.causal:
                query_at, key_at = _positions(rows, bs)[:, :, None], _positions(columns, bs)
                visible = key_at.view(len(rows), 1, count) <= query_at
                scores.masked_fill_(~visible, -math.inf)
                num_pruned = query_at + 1 - visible.sum(-1, keepdim=True)  # [R, bs, 1]
            if not pruned_zero:
                num_pruned = torch.zeros_like(num_pruned)
            top = scores.amax(-1, keepdim=True)
            empty = top == -math.inf
            # Any finite reference keeps the formula exact. 0 is the pruned scores' maximum; a row
            # of padding alone has none, and with 0 its exponentials are zeros.
            top = torch.where(num_pruned > 0, top.clamp_min(0), top.masked_fill(empty, 0))
            exps = scores.sub_(top).exp_()
            total = exps.sum(-1, keepdim=True)
            total += torch.where(num_pruned > 0, num_pruned * (-top).exp(), 0)
            inverse = total.reciprocal().masked_fill(total == 0, 0).view(-1, bs, 1)
            of_rows = (top + total.log()).masked_fill_(empty, -math.inf)
            lse.index_copy_(2, rows, of_rows.squeeze(-1))
            exps = exps.view(-1, bs, count)
            part = torch.bmm(exps, _take(v, columns, count)).mul_(inverse)
            out.index_copy_(2, rows, part.view(B, H, -1, bs, d))
            saved += [exps, inverse]
        out, lse = out.view(B, H, N, d), lse.view(B, H, N)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, out, *saved)
        ctx.mark_non_differentiable(lse)
        return out.to(query.dtype), lse

    @staticmethod
    def backward(ctx, dout, _):
        query, key, value = ctx.saved_tensors[:3]
        with torch.autocast(dout.device.type, enabled=False), torch.no_grad():
            grads = _BlockSparse.gradients(ctx, dout)
        grads = [refuse_twice(grad, dout, query, key, value) for grad in grads]
        return *grads, None, None, None, None

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
        return [x.view(shape).to(query.dtype) for x in (dq, dk, dv)]


def _positions(blocks: Tensor, block_size: int) -> Tensor:
    """Of the tokens of each block: [...] -> [..., bs]."""
    return blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)


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
