"""Which key blocks each query block attends, as the lists that kernels read.

Shape letters: nb blocks along a side (N / block_size), nnz kept blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept blocks by row (for out and dq) and by column (for dk, dv). Made by `from_mask`."""

    block_mask: Tensor  # bool [nb, nb], True = kept; rows are query blocks, columns keys
    block_size: int
    row_offsets: (
        Tensor  # int32 [nb + 1]; row r keeps row_columns[row_offsets[r] : row_offsets[r + 1]]
    )
    row_columns: Tensor  # int32 [nnz], ascending within a row
    column_offsets: Tensor  # int32 [nb + 1]
    column_rows: Tensor  # int32 [nnz], ascending within a column
    # Rows that keep equally many blocks, so that plain torch can treat them as one batch:
    # pairs of rows int64 [R] and their columns int64 [R, c]; empty rows are in no group.
    row_groups: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def from_mask(cls, block_mask: Tensor, block_size: int) -> BlockLayout:
        """Build the lists of `block_mask`.

        Args:
            block_mask: bool [nb, nb], True = kept; rows and columns may be empty.
            block_size: side of a block in tokens, at least 1.
        Raises: ValueError if the mask is not a square bool matrix or block_size no positive int.
        """
        if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
            found = getattr(block_mask, "dtype", type(block_mask).__name__)
            raise ValueError(f"block_mask must be a bool tensor, not {found}")
        if block_mask.dim() == 3:
            raise ValueError(
                f"block_mask has shape {list(block_mask.shape)}: a mask for each head is not "
                "supported yet, give one [nb, nb] for all heads"
            )
        if block_mask.dim() != 2 or block_mask.shape[0] != block_mask.shape[1]:
            raise ValueError(f"block_mask must be square [nb, nb], not {list(block_mask.shape)}")
        if not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"block_size must be a positive whole number, not {block_size!r}")

        block_mask = block_mask.detach().clone()
        row_offsets, row_columns = _lists(block_mask)
        column_offsets, column_rows = _lists(block_mask.t())
        counts = block_mask.sum(1)
        groups = []
        for count in counts.unique().tolist():
            if count:
                rows = (counts == count).nonzero()[:, 0]
                groups.append((rows, block_mask[rows].nonzero()[:, 1].view(-1, count)))
        return cls(
            block_mask=block_mask,
            block_size=block_size,
            row_offsets=row_offsets,
            row_columns=row_columns,
            column_offsets=column_offsets,
            column_rows=column_rows,
            row_groups=tuple(groups),
        )

    @classmethod
    def full(
        cls, num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> BlockLayout:
        """Every block kept: dense attention in the sparse kernels' terms."""
        mask = torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device)
        return cls.from_mask(mask, block_size)

    @property
    def num_blocks(self) -> int:
        """nb, blocks along one side."""
        return self.block_mask.shape[0]

    @property
    def num_active(self) -> int:
        """nnz, kept blocks."""
        return self.row_columns.shape[0]

    @property
    def length(self) -> int:
        """N, tokens."""
        return self.num_blocks * self.block_size

    @property
    def device(self) -> torch.device:
        return self.block_mask.device

    def check(self, length: int, device: torch.device) -> None:
        """ValueError unless it is for sequences of `length` tokens on `device`."""
        if self.length != length:
            raise ValueError(
                f"layout covers {self.num_blocks} blocks of {self.block_size} = {self.length} "
                f"tokens, but there are {length}"
            )
        if self.device != device:
            raise ValueError(
                f"layout is on {self.device}, the tensors are on {device}: use layout.to(...)"
            )

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its lists on `device`; itself if they are there already."""
        if self.device == torch.device(device):
            return self
        return BlockLayout.from_mask(self.block_mask.to(device), self.block_size)


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [nb + 1] and ascending indices [nnz] of the True entries of each row, int32."""
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    offsets[1:] = mask.sum(1).cumsum(0)
    return offsets, mask.nonzero()[:, 1].to(torch.int32).contiguous()
