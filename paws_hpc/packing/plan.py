"""Which image goes into which shard: decided from the list of the source, before any image is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc.files import value_digest
from paws_hpc.packing.building import Recipe, ShardTask
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.underway import Identity
from paws_hpc.store.format import Encoding, StoreError

_STATISTICS_IMAGES = 2_000


class Plan:
    """The division of a source into shards; a function of the source's list, the seed and the shard size only.

    A shard ends before the image that would take the *source's* bytes beyond the shard size. What an image takes in the
    store may differ (a PNG becomes a JPEG, metadata goes), but that is known only after it was read: if it decided, no
    shard could be begun before the one in front of it is done.
    """

    def __init__(self, source: Source, identity: Identity) -> None:
        """Divide the source.

        Raises:
            StoreError: the source has no images, or keys by which they could not be found again.
        """
        _check_keys(source)
        self.source, self.identity = source, identity
        packing = identity.packing
        self.order = packing_order(source.keys, seed=packing.seed)
        self.bounds = shard_bounds(source.sizes[self.order], packing.shard_bytes)
        self.recipe = Recipe(
            encoding=source.encoding,
            packer=packing.packer,
            source_digest=identity.origin.digest,
            on_error=packing.on_error,
            max_short_side=packing.max_short_side,
            check=packing.check,
        )
        self.stride = statistics_stride(source.encoding, len(self.order))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, number: int) -> NDArray[np.int64]:
        """Positions (n,) in the source of the images of a shard, in order."""
        return self.order[self.bounds[number] : self.bounds[number + 1]]

    @cached_property
    def _identity_digest(self) -> str:
        return value_digest({name: value for name, value in self.identity.to_json().items() if name != "on_error"})

    def fingerprint(self, number: int) -> str:
        """Of the pack and of the modification times of a shard's files: a shard with another one is built again."""
        digest = xxhash.xxh3_128(self._identity_digest.encode())
        digest.update(np.ascontiguousarray(self.source.stamps[self.members(number)]).tobytes())
        return digest.hexdigest()

    def task(self, number: int, path: Path) -> ShardTask:
        """What a worker needs to build a shard into ``path``."""
        return ShardTask(
            number=number,
            path=path,
            images=self.source.select(self.members(number)),
            counted=np.arange(self.bounds[number], self.bounds[number + 1]) % self.stride == 0,
            fingerprint=self.fingerprint(number),
            recipe=self.recipe,
        )


def statistics_stride(encoding: Encoding, count: int) -> int:
    """Every so many-th of ``count`` images in packing order is counted in the statistics; all of a raw store."""
    return 1 if encoding == "raw" else -(-count // _STATISTICS_IMAGES)


def packing_order(keys: Sequence[str], *, seed: int) -> NDArray[np.int64]:
    """The shuffled order (N,) int64: images sorted by a hash of (seed, key), so it depends on nothing else."""
    return np.argsort(packing_ranks(keys, seed=seed), kind="stable")


def packing_ranks(keys: Sequence[str], *, seed: int) -> NDArray[np.uint64]:
    """The hashes (N,) uint64 by which images are sorted."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode(), seed) for key in keys), np.uint64, count=len(keys))


def shard_bounds(sizes: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """Where shards begin and end (shards + 1,): each as many images as fit, at least one.

    Args:
        sizes: (N,) int64 bytes in packing order.
        shard_bytes: that fit into a shard.
    """
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        before = 0 if bounds[-1] == 0 else int(ends[bounds[-1] - 1])
        fitting = int(np.searchsorted(ends, before + shard_bytes, side="right"))
        bounds.append(max(fitting, bounds[-1] + 1))
    return np.array(bounds, dtype=np.int64)


def _check_keys(source: Source) -> None:
    """Refuse what could not be found again by key."""
    if not len(source.keys):
        raise StoreError(f"the {source.kind} source has no images.")
    assert len(source.labels) == len(source.keys), "a source gives one label per key"
    if len(set(source.keys)) < len(source.keys):
        key, times = Counter(source.keys).most_common(1)[0]
        raise StoreError(f"key {key!r} occurs {times} times in the {source.kind} source: keys must be distinct.")
    for key in source.keys:
        if not key or "\0" in key or not (key.isascii() or _is_utf8(key)):
            raise StoreError(f"key {key!r} cannot be stored: it is empty, has a zero byte or is not UTF-8. Rename it.")


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:  # bytes of a file name that are not UTF-8
        return False
    return True
