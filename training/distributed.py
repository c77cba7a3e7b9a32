"""One process a device: who holds which part of the batch, and the few sums they share.

Everything a step exchanges goes through `World`; one process is the plain case in which every
method returns at once.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# a process that waits this long for another one takes it for dead; they differ by little, as all
# do the same work
PATIENCE_SECONDS = 60


class PeerLostError(RuntimeError):
    """Another process of the job ended or hangs."""


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and nccl raise, whatever happened
        detail = str(error).splitlines()[0][:160]
        raise PeerLostError(
            f"another process of this job has ended or does not answer ({detail}); "
            f"start the job again with --resume, or let torchrun do it with --max-restarts"
        ) from None


class World:
    """The processes of one job. rank 0 decides, writes and speaks."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """[begin, end) of this process's contiguous share of `count` things; shares differ by one
        at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in one exchange a dtype."""
        if self.size == 1 or not tensors:
            return
        for dtype in {tensor.dtype for tensor in tensors}:
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            if len(same) == 1 and same[0].is_contiguous():
                with _exchange():
                    dist.all_reduce(same[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            with _exchange():
                dist.all_reduce(flat)
            for tensor, part in zip(
                same, flat.split([tensor.numel() for tensor in same]), strict=True
            ):
                tensor.copy_(part.view_as(tensor))

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """rank 0's values, in place."""
        if self.size > 1:
            with _exchange():
                dist.broadcast(tensor, 0)
        return tensor

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _exchange():
                dist.barrier()

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_world(rank: int, size: int, device: torch.device) -> World:
    """Joins the job that torchrun started (its environment names the meeting point); a single
    process joins nothing.

    Raises:
        PeerLostError: here and in every exchange, if another process does not answer.
    """
    if size > 1:
        with _exchange():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=PATIENCE_SECONDS),
            )
    return World(rank, size)
