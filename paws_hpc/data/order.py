"""Which record comes when: pure functions of (seed, epoch) and (seed, step), with no state and no stored permutation.

A permutation of N records is computed element by element with a small block cipher on 0..N-1 (a Feistel network with
cycle walking), so that step t of an epoch costs the same for a thousand records as for a billion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MINIMUM_HALF_BITS = 2  # below this the cipher has too few distinct permutations for classes with a handful of images
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Positions = NDArray[np.int64]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit changes every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def cipher_key(*parts: int | Positions) -> NDArray[np.uint64]:
    """Fold numbers into 64-bit keys; arrays give one key per element.

    Args:
        parts: non-negative integers or integer arrays that broadcast together.
    """
    key = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            key = _mix(key + _GOLDEN + np.asarray(part).astype(np.uint64))
    return key


def permute(positions: Positions, counts: int | Positions, keys: NDArray[np.uint64]) -> Positions:
    """The image of each position under a pseudo-random permutation of ``range(count)`` chosen by its key.

    Args:
        positions: integers, each in ``[0, count)``.
        counts: the length of the permuted range, one for all or one per position.
        keys: from :func:`cipher_key`, one for all or one per position.

    Returns:
        int64, of the broadcast shape. For a fixed key and count this is a bijection of ``range(count)``.
    """
    values, limits, keys = np.broadcast_arrays(
        np.asarray(positions).astype(np.uint64), np.asarray(counts).astype(np.uint64), keys
    )
    half = np.maximum(np.ceil(np.log2(np.maximum(limits, 2)) / 2), _MINIMUM_HALF_BITS).astype(np.uint64)
    result = np.empty(values.shape, np.uint64)
    pending = np.ones(values.shape, bool)
    values = values.copy()
    while pending.any():
        values[pending] = _encrypt(values[pending], half[pending], keys[pending])
        # Cycle walking: whoever lands outside the range is encrypted again; the walk ends because the cipher is a
        # bijection of a domain at most four times the range (64 for tiny ranges).
        done = pending & (values < limits)
        result[done] = values[done]
        pending &= ~done
    return result.astype(np.int64)


def _encrypt(values: NDArray[np.uint64], half: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    with np.errstate(over="ignore"):
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right + keys + np.uint64(number + 1) * _GOLDEN) & mask)
    return (left << half) | right


_EPOCH, _CLASSES, _IMAGES = 1, 2, 3  # keeps the three permutations below independent of each other


@dataclass(frozen=True)
class EpochOrder:
    """One pass over all records per epoch, in an order drawn anew for each; an incomplete last batch is left out.

    Attributes:
        count: records, N.
        batch_size: global batch, B.
        seed: of the run.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.count:
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the data set of {self.count} images; "
                f"a batch of at most {self.count} would fit."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the records."""
        return self.count // self.batch_size

    def epoch(self, step: int) -> int:
        """The 0-based epoch to which a 0-based step belongs."""
        return step // self.steps_per_epoch

    def records(self, step: int) -> Positions:
        """The global batch of a step: (B,) distinct record positions."""
        start = step % self.steps_per_epoch * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        return permute(positions, self.count, cipher_key(self.seed, _EPOCH, self.epoch(step)))


class SupportOrder:
    """The support mini-batch of each step (paper, Appendix A): classes first, then the same number of images of each.

    Classes are drawn without replacement inside a step, and so are the images of a class; both return to the pool for
    the next step.
    """

    def __init__(
        self, records: Positions, labels: Positions, *, num_classes: int, images_per_class: int, seed: int
    ) -> None:
        """Group the labelled records by class.

        Args:
            records: (M,) positions of the labelled images in their store.
            labels: (M,) their classes.
            num_classes: drawn per step, K.
            images_per_class: drawn from each.
            seed: of the run.

        Raises:
            ValueError: more classes are asked for than are labelled, or a class has too few labelled images.
        """
        grouped = np.argsort(labels, kind="stable")
        self._records = np.asarray(records)[grouped]
        self._classes, self._starts, self._counts = np.unique(
            np.asarray(labels)[grouped], return_index=True, return_counts=True
        )
        if num_classes > len(self._classes):
            raise ValueError(
                f"support.classes={num_classes}, but only {len(self._classes)} classes have labelled images. "
                f"Ask for at most {len(self._classes)}."
            )
        if self._counts.min() < images_per_class:
            scarce = int(self._counts.argmin())
            raise ValueError(
                f"support.images_per_class={images_per_class}, but class {self._classes[scarce]} has only "
                f"{self._counts[scarce]} labelled images. Lower support.images_per_class to at most "
                f"{self._counts[scarce]} or label more images of that class."
            )
        self.num_classes, self.images_per_class, self.seed = num_classes, images_per_class, seed

    def draw(self, step: int) -> tuple[Positions, Positions]:
        """The global support batch of a step, class-major.

        Returns:
            (S,) record positions and (S,) places of their classes among the K drawn ones, S = K * images_per_class.
        """
        drawn = permute(np.arange(self.num_classes), len(self._classes), cipher_key(self.seed, _CLASSES, step))
        keys = cipher_key(self.seed, _IMAGES, step, self._classes[drawn])[:, None]
        inside = permute(np.arange(self.images_per_class)[None], self._counts[drawn][:, None], keys)
        records = self._records[self._starts[drawn][:, None] + inside]
        return records.reshape(-1), np.repeat(np.arange(self.num_classes), self.images_per_class)
