"""The order of examples: endless seeded permutations, and a fixed subset for evaluation."""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, number: int) -> np.ndarray:
    """Permutation `number` of 0..size-1, int64, read-only: the order of random keys.

    Written out (splitmix64 of a counter) rather than NumPy's permutation, whose result may change
    with its version.
    """
    counter = np.arange(size, dtype=np.uint64)
    key = counter * np.uint64(0x9E3779B97F4A7C15)
    for word in (seed % 2**64, number):
        key = _mix(key ^ _mix(np.full(1, word, dtype=np.uint64)))
    order = np.argsort(key, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, uint64 -> uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def training_indices(size: int, seed: int, first_example: int, count: int) -> np.ndarray:
    """Which examples stand at places first_example .. first_example + count - 1 of an endless
    training order, int64 [count].

    The order is one permutation of 0..size-1 after another, each example once in each; permutation
    number e depends on (seed, e) alone. Batches cross their borders. A pure function of its
    arguments.
    """
    parts = []
    while count > 0:
        number, place = divmod(first_example, size)
        part = _permutation(size, seed, number)[place : place + count]
        parts.append(part)
        first_example += len(part)
        count -= len(part)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def evaluation_subset(size: int, count: int, seed: int) -> np.ndarray:
    """A fixed choice of min(count, size) different examples, ascending, int64."""
    return np.sort(_permutation(size, seed, 2**63)[: min(count, size)])
