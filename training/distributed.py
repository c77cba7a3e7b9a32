"""One process a device: who holds which part of the batch, and the few sums they share.

Everything a step exchanges goes through `World`; one process is the plain case in which every
method returns at once.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import UserError

# a process that waits this long for another one in an exchange takes it for dead; they differ by
# little, as all do the same work
PATIENCE_SECONDS = 60
# a process without a sign of life for this long is stopped or starved
SILENCE_SECONDS = 10.0
REMEDY = "start the job again with --resume, or let torchrun do it with --max-restarts"


class PeerLostError(RuntimeError):
    """Another process of the job ended or hangs."""


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and nccl raise, whatever happened
        detail = str(error).splitlines()[0][:160]
        raise PeerLostError(
            f"another process of this job has ended or does not answer ({detail}); {REMEDY}"
        ) from None


class Watch:
    """Ends this process, with one sentence and exit code 1, when its neighbour falls silent.

    A killed process breaks its connections and every exchange with it; a stopped one does not.
    Each process therefore keeps counting in the job's store and watches the next one of the ring:
    unless all are silent, a silent one has a neighbour that notices. The main thread waits in an
    exchange then, which nothing but the end of the process interrupts; the last checkpoint is
    whole at any moment.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        # a connection of its own: the other one may be waiting
        self._store = store.clone()  # type: ignore[attr-defined]
        self._mine, self._other = f"alive/{rank}", (rank + 1) % size
        self._over = threading.Event()
        self._store.set(self._mine, "0")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """To be called once all processes have made theirs."""
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(self._mine, "done")

    def _run(self) -> None:
        heard, count, last = b"", 0, time.monotonic()
        woke = last
        while not self._over.wait(1.0):
            now = time.monotonic()
            if now - woke > SILENCE_SECONDS / 2:
                last = now  # this process was stopped itself, perhaps all were
            woke = now
            count += 1
            try:
                self._store.set(self._mine, str(count))
                word = self._store.get(f"alive/{self._other}")
            except RuntimeError as error:
                self._end(f"the job's store does not answer ({str(error).splitlines()[0][:160]})")
                return
            if word == b"done":
                return
            if word != heard:
                heard, last = word, now
            elif now - last > SILENCE_SECONDS:
                self._end(
                    f"process {self._other} of this job has given no sign of life for "
                    f"{SILENCE_SECONDS:.0f} seconds"
                )

    def _end(self, what: str) -> None:
        if not self._over.is_set():
            print(f"error: {what}; {REMEDY}", file=sys.stderr, flush=True)
            os._exit(1)


class World:
    """The processes of one job. Rank 0 decides, writes and logs."""

    def __init__(self, rank: int = 0, size: int = 1, watch: Watch | None = None) -> None:
        self.rank = rank
        self.size = size
        self._watch = watch

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
        # a dict has the same order on all processes, a set does not
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
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

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank: plain values."""
        found = [value] * self.size
        if self.size > 1:
            with _exchange():
                dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Checks that each process makes for itself: where one finds a mistake, all end with its
        sentence."""
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = str(error)
        first = next((found for found in self.gather(mistake) if found is not None), None)
        if first is not None:
            self.close()
            raise UserError(first)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuses processes that start from different things.

        Args:
            facts: what each starts from, by a name that makes sense in a sentence.
        Raises:
            UserError: the same sentence in all processes.
        """
        first, *others = self.gather(dict(facts))
        for rank, found in enumerate(others, start=1):
            different = [name for name in first if found.get(name) != first[name]]
            if different:
                self.close()
                raise UserError(
                    f"process {rank} of this job does not start from what process 0 starts from: "
                    f"another {' and another '.join(different)}; all need the same arguments and "
                    f"see the same files"
                )

    def wait(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            with _exchange():
                dist.barrier()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """A name that only the processes running now know.

    torchrun keeps one store over all restarts, and under the same keys a process would find the
    addresses of its dead predecessors. So each draws a word, and the first process sends every
    other one its own word back, which no predecessor can have, together with the name.
    """
    word = secrets.token_hex(8)
    store.set(f"hello/{rank}", word)
    unanswered = set(range(1, size)) if rank == 0 else {0}
    end = time.monotonic() + PATIENCE_SECONDS
    while unanswered:
        for other in list(unanswered):
            if rank == 0:
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{other}", f"{store.get(f'hello/{other}').decode()} {word}")
                if (
                    store.check([f"ready/{other}"])
                    and store.get(f"ready/{other}").decode() == word
                ):
                    unanswered.remove(other)
            elif store.check([f"welcome/{rank}"]):
                mine, name = store.get(f"welcome/{rank}").decode().split()
                if mine == word:
                    store.set(f"ready/{rank}", name)
                    return name
        if time.monotonic() > end:
            raise RuntimeError(f"{len(unanswered)} of {size} did not come within a minute")
        time.sleep(0.01)
    return word


def join_world(rank: int, size: int, device: torch.device) -> World:
    """Joins the job that torchrun started (its environment names the meeting point); a single
    process joins nothing.

    Raises:
        PeerLostError: here and in every exchange, if another process does not answer.
    """
    if size == 1:
        return World()
    patience = datetime.timedelta(seconds=PATIENCE_SECONDS)
    with _exchange():
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=patience))
        store = dist.PrefixStore(_meet(store, rank, size), store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=patience,
        )
        watch = Watch(store, rank, size)
        dist.barrier()
    watch.start()
    return World(rank, size, watch)
