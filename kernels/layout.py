"""Which key blocks each query block attends, as the lists that kernels read.

Shape letters: nb blocks along a side (N / block_size), nnz kept blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept blocks, and what kernels read of them. Made by `from_mask`.

    The lists are built when first asked for. But for `num_active` and `row_groups` nothing waits
    for the device: the number of kept blocks stays there.
    """

    # bool [nb, nb], True = kept; rows are query blocks, columns keys. [H, nb, nb]: for each head
    block_mask: Tensor
    block_size: int
    causal: bool = False  # a query attends to no later key: diagonal blocks are cut to a triangle

    @classmethod
    def from_mask(cls, block_mask: Tensor, block_size: int, causal: bool = False) -> BlockLayout:
        """The layout that keeps the blocks of `block_mask`.

        Args:
            block_mask: bool [nb, nb], or [H, nb, nb] for each head its own; True = kept; rows and
                columns may be empty. It is copied.
            block_size: side of a block in tokens, at least 1.
            causal: no query attends to a later key. Blocks above the diagonal are dropped, those
                on it are cut to the triangle.
        Raises: ValueError if the mask is not bool and square or block_size no positive int.
        """
        if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
            found = getattr(block_mask, "dtype", type(block_mask).__name__)
            raise ValueError(f"block_mask must be a bool tensor, not {found}")
        if block_mask.dim() not in (2, 3) or block_mask.shape[-2] != block_mask.shape[-1]:
            raise ValueError(
                f"block_mask must be square, [nb, nb] or [H, nb, nb], not {list(block_mask.shape)}"
            )
        if not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"block_size must be a positive whole number, not {block_size!r}")
        mask = block_mask.detach()
        return cls(mask.tril() if causal else mask.clone(), block_size, bool(causal))

    @classmethod
    def full(
        cls, num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> BlockLayout:
        """Every block kept: dense attention in the sparse kernels' terms."""
        mask = torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device)
        return cls.from_mask(mask, block_size)

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """By row (for out and dq) and by column (for dk, dv), int32 on the mask's device.

        row_offsets [nb + 1], row_columns, column_offsets [nb + 1], column_rows: row r keeps
        row_columns[row_offsets[r] : row_offsets[r + 1]], ascending; columns likewise. The other
        two have nb * nb entries, of which the first nnz count, then nb: the rows (or columns),
        those that keep most first. Those of several heads follow each other, and their offsets
        run on.
        """
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return *_lists(self.block_mask), *_lists(self.block_mask.mT)
        with torch._C._DisableFuncTorch():  # they outlive torch.func's transform
            return *_lists(self.block_mask), *_lists(self.block_mask.mT)

    @cached_property
    def active(self) -> Tensor:
        """uint8 [nb]; bit 0: a block's queries attend to something, bit 1: its keys are attended
        to."""
        mask = self.block_mask if self.heads is None else self.block_mask.any(0)
        queries, keys = mask.any(1), mask.any(0)
        return queries.to(torch.uint8) + 2 * keys.to(torch.uint8)

    @cached_property
    def row_groups(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Rows that keep equally many blocks, so that plain torch can treat them as one batch.

        Pairs of rows int64 [R] and their columns int64 [R, c]; empty rows are in no group. Of a
        layout for all heads.
        """
        counts = self.block_mask.sum(1)
        groups = []
        for count in counts.unique().tolist():
            if count:
                rows = (counts == count).nonzero()[:, 0]
                groups.append((rows, self.block_mask[rows].nonzero()[:, 1].view(-1, count)))
        return tuple(groups)

    @cached_property
    def num_active(self) -> int:
        """nnz, kept blocks."""
        return int(self.block_mask.sum())

    @property
    def num_blocks(self) -> int:
        """nb, blocks along one side."""
        return self.block_mask.shape[-1]

    @property
    def heads(self) -> int | None:
        """H if each head has a mask of its own, None if all share one."""
        return self.block_mask.shape[0] if self.block_mask.dim() == 3 else None

    @cached_property
    def of_heads(self) -> tuple[BlockLayout, ...]:
        """One layout for each head."""
        masks = self.block_mask.unbind(0)
        return tuple(BlockLayout(mask, self.block_size, self.causal) for mask in masks)

    @property
    def length(self) -> int:
        """N, tokens."""
        return self.num_blocks * self.block_size

    @property
    def device(self) -> torch.device:
        return self.block_mask.device

    def check(self, length: int, device: torch.device) -> None:
        """ValueError unless it is for sequences of `length` tokens on `device`."""
        mask = self.block_mask
        if mask.shape[-1] * self.block_size == length and mask.device == device:
            return
        if self.length != length:
            raise ValueError(
                f"layout covers {self.num_blocks} blocks of {self.block_size} = {self.length} "
                f"tokens, but there are {length}"
            )
        raise ValueError(
            f"layout is on {self.device}, the tensors are on {device}: use layout.to(...)"
        )

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its lists on `device`; itself if they are there already."""
        if self.device == torch.device(device):
            return self
        return BlockLayout(self.block_mask.to(device), self.block_size, self.causal)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of each row; ascending indices of its True entries and the order of the rows, as
    `BlockLayout.lists`."""
    nb, device = mask.shape[-1], mask.device
    mask = mask.reshape(-1, nb, nb)
    counts = mask.sum(2)
    ends = counts.flatten().cumsum(0).view(-1, nb)
    order = counts.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    offsets = torch.zeros(len(mask), nb + 1, dtype=torch.int32, device=device)
    offsets[:, 1:], offsets[1:, 0] = ends, ends[:-1, -1]
    # Where each entry goes: those that are kept by their order, the others behind the last.
    size, flat = mask.numel(), mask.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, size)
    indices = torch.zeros(size + 1, dtype=torch.int32, device=device)
    columns = torch.arange(nb, dtype=torch.int32, device=device).repeat(size // nb)
    blocks = indices.scatter_(0, place, columns)[:-1]
    return offsets.flatten(), torch.cat([blocks, order.flatten()])
