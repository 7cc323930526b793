"""Which record comes when: pure functions of (seed, epoch) and (seed, step), with no state and no stored permutation.

A permutation of N records is computed element by element with a small block cipher on 0..N-1 (a Feistel network with
cycle walking), so that step t of an epoch costs the same for a thousand records as for a billion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paws_hpc.data.config import MAX_SUPPORT_VIEWS

_ROUNDS = 8
_MINIMUM_HALF_BITS = 2  # below this the cipher has too few distinct permutations for classes with a handful of images
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Positions = NDArray[np.int64]


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit changes every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def cipher_key(*numbers: int | Positions) -> NDArray[np.uint64]:
    """Fold non-negative integers into a 64-bit key; arrays, which broadcast together, give one key per element."""
    key = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            key = _mix(key + _GOLDEN + np.asarray(number).astype(np.uint64))
    return key


def permute(positions: Positions, counts: int | Positions, keys: NDArray[np.uint64]) -> Positions:
    """The image of each position in ``[0, count)`` under a pseudo-random permutation of ``range(count)``.

    ``counts`` and ``keys`` (of :func:`cipher_key`) hold one value for all positions or one for each. The result is
    int64 of the broadcast shape; for a fixed key and count it is a bijection of ``range(count)``.
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
        # Cycle walking: a value outside the range is encrypted again. The walk ends because the cipher is a bijection
        # of a domain at most four times the range (64 for tiny ranges).
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


_EPOCH, _CLASSES, _IMAGES = 1, 2, 3  # keeps the permutations below independent of each other
_BLOCKS, _WINDOW, _ROTATION, _BALANCED_CLASSES, _BALANCED_IMAGES = 4, 5, 6, 7, 8


@dataclass(frozen=True)
class Window:
    """How far the order of an epoch may take records from their neighbours on disk.

    Attributes:
        block_records: consecutive records that stay together, about 4-8 MB of them.
        blocks: whose records are shuffled among each other.
    """

    block_records: int
    blocks: int


@dataclass(frozen=True)
class EpochSampler:
    """One pass over all records per epoch, in an order drawn anew for each; an incomplete last batch is left out.

    Without a window the order is a permutation of all records. With one, records are cut into blocks of neighbours
    (from an offset drawn for each epoch, so that no two records are always together), the blocks are permuted, and the
    records of every few consecutive blocks are shuffled. All ranks then read from a few regions of a few MB, which a
    parallel file system caches; a full permutation seeks for every record until the page caches are warm. But a batch
    is drawn from ``blocks * block_records`` records alone. That matters little while they are many times the batch, as
    the packer has shuffled the records. On local disks and in warm caches a window gains nothing.

    ``count`` is the number of records, ``batch_size`` B that of all ranks.
    """

    count: int
    batch_size: int
    seed: int
    window: Window | None = None

    def __post_init__(self) -> None:
        if self.batch_size > self.count:
            raise ValueError(
                f"pretrain.batch_size={self.batch_size} is larger than the data set of {self.count} images; "
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
        if self.window is not None:
            return self._windowed(positions, self.epoch(step), self.window)
        return permute(positions, self.count, cipher_key(self.seed, _EPOCH, self.epoch(step)))

    def _windowed(self, positions: Positions, epoch: int, window: Window) -> Positions:
        """The records at these positions of an epoch: window → slot of a permuted block → record, all by the cipher."""
        span = window.block_records * window.blocks
        number = positions // span
        first = number * span
        keys = cipher_key(self.seed, _WINDOW, epoch, number)
        slot, inside = np.divmod(
            first + permute(positions - first, np.minimum(span, self.count - first), keys), window.block_records
        )
        whole = self.count // window.block_records
        blocks = slot.copy()  # an incomplete block comes last; the rotation moves it about
        moved = slot < whole
        if moved.any():
            blocks[moved] = permute(slot[moved], whole, cipher_key(self.seed, _BLOCKS, epoch))
        rotation = int(permute(np.zeros(1, np.int64), self.count, cipher_key(self.seed, _ROTATION, epoch))[0])
        return (rotation + blocks * window.block_records + inside) % self.count


class SupportDraw(NamedTuple):
    """The global support batch of a step, class-major: S = K * images_per_class rows."""

    records: Positions
    class_indices: Positions  # among the K drawn ones
    repeats: Positions  # how often the same record came before in this step; a repeated image is cropped anew


class SupportSampler:
    """The support mini-batch of each step: classes first, then the same number of images of each.

    ``paper`` (Appendix A): each step draws classes, and the images of each class, without replacement.
    ``balanced``: classes, and the images of each class, take turns in an order that is drawn anew after all have had
    equally many. At any step the uses of two images of a class differ by one at most, and so do those of two classes.
    A class with fewer images than a step needs repeats them as evenly as possible, as other crops of the same image.
    """

    def __init__(
        self,
        records: Positions,
        labels: Positions,
        *,
        num_classes: int,
        images_per_class: int,
        seed: int,
        balanced: bool = False,
    ) -> None:
        """Group (M,) labelled records by their (M,) classes; each step draws ``num_classes``, K.

        Raises:
            ValueError: fewer than K classes are labelled, or a class has too few labelled images to draw from.
        """
        grouped = np.argsort(labels, kind="stable")
        self._records = np.asarray(records)[grouped]
        self._classes, self._starts, self._counts = np.unique(
            np.asarray(labels)[grouped], return_index=True, return_counts=True
        )
        self._by_record = np.argsort(self._records)
        if num_classes > len(self._classes):
            raise ValueError(
                f"pretrain.support.classes={num_classes}, but only {len(self._classes)} classes have labelled images. "
                f"Ask for at most {len(self._classes)}."
            )
        if not balanced and self._counts.min() < images_per_class:
            scarce = int(self._counts.argmin())
            raise ValueError(
                f"pretrain.support.images_per_class={images_per_class}, but class {self._classes[scarce]} has only "
                f"{self._counts[scarce]} labelled images. Lower pretrain.support.images_per_class to at most "
                f"{self._counts[scarce]}, label more images of that class, or set data.support_order=balanced, which "
                "repeats images of such classes with other crops."
            )
        self.num_classes, self.images_per_class = num_classes, images_per_class
        self.seed, self.balanced = seed, balanced

    @property
    def most_repeats(self) -> int:
        """How often a step may hold the same image at most."""
        return int(-(-self.images_per_class // self._counts.min()))

    def check_repeats(self, support_views: int) -> None:
        """Raise ValueError if a step would hold more crops of an image than there are numbers for."""
        if self.most_repeats * support_views > MAX_SUPPORT_VIEWS:
            raise ValueError(
                f"pretrain.support.images_per_class={self.images_per_class} needs {self.most_repeats} repeats of an "
                f"image, each with views.support_views={support_views} crops. There are numbers for "
                f"{MAX_SUPPORT_VIEWS} crops of an image per step: lower pretrain.support.images_per_class."
            )

    def draw(self, step: int) -> SupportDraw:
        """The supports of a 0-based step."""
        if self.balanced:
            drawn, inside, repeats = self._take_turns(step)
        else:
            drawn = permute(np.arange(self.num_classes), len(self._classes), cipher_key(self.seed, _CLASSES, step))
            keys = cipher_key(self.seed, _IMAGES, step, self._classes[drawn])[:, None]
            inside = permute(np.arange(self.images_per_class)[None], self._counts[drawn][:, None], keys)
            repeats = np.zeros_like(inside)
        records = self._records[self._starts[drawn][:, None] + inside]
        class_indices = np.repeat(np.arange(self.num_classes), self.images_per_class)
        return SupportDraw(records.reshape(-1), class_indices, repeats.reshape(-1))

    def known_classes(self, records: Positions, draw: SupportDraw) -> tuple[NDArray[np.bool_], Positions]:
        """Which of n records of the labelled images' store are labelled, in a class that the step has drawn.

        Returns:
            (n,) bool, and (n,) the class's index among the K drawn, 0 where it is not known.
        """
        class_index = np.full(len(self._classes), -1)
        class_index[self._look_up(draw.records)[1]] = draw.class_indices
        labelled, groups = self._look_up(records)
        known = labelled & (class_index[groups] >= 0)
        return known, np.where(known, class_index[groups], 0)

    def _look_up(self, records: Positions) -> tuple[NDArray[np.bool_], Positions]:
        """(n,) whether each record is labelled, and (n,) its index in ``self._classes``; any index if it is not."""
        rank = np.searchsorted(self._records, records, sorter=self._by_record)
        positions = self._by_record[np.minimum(rank, len(self._records) - 1)]
        return self._records[positions] == records, np.searchsorted(self._starts, positions, side="right") - 1

    def _take_turns(self, step: int) -> tuple[Positions, Positions, Positions]:
        """(K,) classes, (K, images_per_class) positions among the images of each, and (K, images_per_class) repeats.

        Members of a group of n go round in one order for n / gcd(n, m) turns of m members. By then all have had
        equally many, and the next order is drawn. So no turn meets a member twice unless m > n.
        """
        n, m = len(self._classes), self.num_classes
        turns = n // math.gcd(n, m)
        round_, turn = divmod(step, turns)
        went = turn * m + np.arange(m)
        drawn = permute(went % n, n, cipher_key(self.seed, _BALANCED_CLASSES, round_))
        # How often the class had its turn before: in the rounds before, and in this one.
        used = (round_ * (m // math.gcd(n, m)) + went // n)[:, None]
        counts, m = self._counts[drawn][:, None], self.images_per_class
        rounds, turn_of_class = np.divmod(used, counts // np.gcd(counts, m))
        went = turn_of_class * m + np.arange(m)
        keys = cipher_key(self.seed, _BALANCED_IMAGES, rounds, self._classes[drawn][:, None])
        return drawn, permute(went % counts, counts, keys), np.broadcast_to(np.arange(m) // counts, went.shape)
