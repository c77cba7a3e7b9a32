"""The examples of one split. B batch, N padded length."""

import numpy as np
import torch


class Dataset:
    """The examples of one split. Attributes: size, length (N), num_inputs, labels (unsigned array
    [size]), sha256 (hex, of the pickle's bytes: known from when its cache was written)."""

    def __init__(self, ids: list[np.ndarray], labels: np.ndarray, sha256: str):
        self._ids = ids
        self.labels = labels
        self.sha256 = sha256
        self.size, self.length = ids[0].shape
        self.num_inputs = len(ids)

    def __len__(self) -> int:
        return self.size

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The examples at `indices` (int64 array [B]): ids [B, N], second ids [B, N] or None,
        labels [B], of the unsigned types that they are stored in."""
        ids = [torch.from_numpy(column[indices]) for column in self._ids]
        labels = torch.from_numpy(self.labels[indices])
        return ids[0], ids[1] if self.num_inputs == 2 else None, labels
