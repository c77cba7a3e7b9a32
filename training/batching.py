"""How a global batch is cut: into groups for the criterion, into micro-batches for memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """One micro-batch: examples [begin, end) of the global batch.

    It holds num_groups whole statistics groups from first_group on, or, with num_groups 1, part of
    one; group_weight is the share of the group(s) it holds.
    """

    begin: int
    end: int
    first_group: int
    num_groups: int
    group_weight: float


def plan_chunks(
    batch_size: int, groups: int, micro_batch_size: int, begin: int = 0, end: int | None = None
) -> list[Chunk]:
    """Cuts examples [begin, end) of a batch into micro-batches that never hold parts of two
    groups.

    Groups are contiguous and their sizes differ by one at most.

    Raises:
        ValueError: more groups than examples, or a micro-batch below one.
    """
    if not 1 <= groups <= batch_size:
        raise ValueError(f"{batch_size} examples cannot be split into {groups} groups")
    if micro_batch_size < 1:
        raise ValueError(f"the micro-batch must hold at least one example, not {micro_batch_size}")
    end = batch_size if end is None else end
    bounds = [batch_size * group // groups for group in range(groups + 1)]
    equal = batch_size % groups == 0
    size = batch_size // groups
    chunks = []
    position, group = begin, 0
    while position < end:
        while bounds[group + 1] <= position:
            group += 1
        whole = min(micro_batch_size, end - position) // size
        if equal and whole >= 2 and position == bounds[group]:
            stop, count, weight = position + whole * size, whole, 1.0
        else:
            stop, count = min(position + micro_batch_size, bounds[group + 1], end), 1
            weight = (stop - position) / (bounds[group + 1] - bounds[group])
        chunks.append(Chunk(position, stop, group, count, weight))
        position = stop
    return chunks
