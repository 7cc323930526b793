"""Counter-based random numbers: every draw is a function of (seed, stream, epoch, sample, view), never of history.

Philox4x32-10 is a keyed bijection of 128-bit counters (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Nothing is advanced, so threads, ranks, prefetching and batch composition cannot change a draw, and a resumed
run sees the numbers that an uninterrupted run would have seen.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions
_ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for. Values determine every run's result: append (at most 256), never renumber."""

    CROP = 2
    AUGMENT = 3


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of every counter: (4, ...) 32-bit words as uint64, least significant first, to the same."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]  # below 2**64: both factors are 32-bit words
        product1 = c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c1 = product1 & _WORD
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c3 = product0 & _WORD
        k0 = (k0 + _KEY_INCREMENTS[0]) & 0xFFFFFFFF
        k1 = (k1 + _KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniform(
    *, seed: int, stream: Stream, epoch: int, samples: NDArray[np.int64], view: int | NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 32-bit resolution (multiples of 2**-32), one row per sample.

    A row depends on its own (seed, stream, epoch, sample, view) alone; its first numbers do not depend on ``count``.
    Among some 10**5 rows the resolution makes ties likely: a shuffle should sort by two columns, or break ties.

    Args:
        seed: in [0, 2**64).
        stream: streams are independent.
        epoch: in [0, 2**32); a step's number where the draw belongs to a step.
        samples: (n,) integers in [0, 2**40), repeats allowed.
        view: in [0, 2**16), one for all samples or (n,) integers, one per sample.
        count: numbers per sample: the result is (n, count).

    Raises:
        ValueError: an argument lies outside its range.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or (samples.size and samples.dtype.kind not in "iu"):
        raise ValueError(f"samples must be one row of integers, not {samples.dtype} of shape {samples.shape}")
    views = np.asarray(view)
    if views.dtype.kind not in "iu" or views.shape not in ((), samples.shape):
        raise ValueError(f"view must be one integer or one per sample {samples.shape}, not shape {views.shape}")
    _require_below("seed", seed, 1 << 64)
    _require_below("epoch", epoch, 1 << 32)
    if count < 0:
        raise ValueError(f"count={count} must not be negative")
    if samples.size == 0:
        return np.empty((0, count))
    for name, values, bound in (("samples", samples, 1 << 40), ("view", views, 1 << 16)):
        _require_below(name, int(values.min()), bound)
        _require_below(name, int(values.max()), bound)
    blocks = -(-count // 4)
    counter = np.empty((4, samples.size, blocks), dtype=np.uint64)
    sample = samples.astype(np.uint64)
    counter[0] = (sample & _WORD)[:, None]
    counter[1] = np.uint64(epoch)
    counter[2] = np.arange(blocks, dtype=np.uint64)
    high = (sample >> _SHIFT) | np.uint64(int(stream) << 8) | (views.astype(np.uint64) << np.uint64(16))
    counter[3] = high[:, None]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    numbers = words.transpose(1, 2, 0).reshape(samples.size, blocks * 4)[:, :count]
    return np.multiply(numbers, 2.0**-32, dtype=np.float64)


def _require_below(name: str, value: int, bound: int) -> None:
    if not 0 <= value < bound:
        raise ValueError(f"{name}={value} is outside [0, {bound}): the random numbers' counter has no room for it")
