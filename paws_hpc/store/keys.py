"""The keys of a store, read when asked for: as strings, a hundred million of them would fill the memory.

Finding keys needs no sorted copy: records are sorted by a hash of their keys (shards/FORMAT.md), so that a key's hash
says about where its record is, and a few looks find it.

Legend: N records of the store, n keys that are looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc.store.index import StoreIndex

_CHUNK = 1 << 16
_READ_ALL_SHARE = 8
_HASHES = 2.0**64


class Keys(Sequence[str]):
    """The N keys in store order."""

    def __init__(self, index: StoreIndex) -> None:
        """Read them from ``index``."""
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [key.decode() for key in self._index.keys(np.arange(*item.indices(len(self))))]
        if not -len(self) <= item < len(self):
            raise IndexError(f"key {item} of {len(self):,}")
        return self._index.keys(np.array([item % len(self)]))[0].decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def at(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """Yield the keys at n positions in [0, N), in their order."""
        for start in range(0, len(positions), _CHUNK):
            yield from (key.decode() for key in self._index.keys(positions[start : start + _CHUNK]))


def find_keys(index: StoreIndex, keys: Sequence[str], *, seed: int) -> NDArray[np.int64]:
    """Positions (n,) int64 of ``keys``; -1 where a key is not in the store.

    Args:
        index: of the store.
        keys: n keys.
        seed: with which the store was packed.
    """
    encoded = [key.encode() for key in keys]
    wanted = _hashes(encoded, seed)
    if _READ_ALL_SHARE * len(keys) >= len(index):
        ranks = np.concatenate([_ranks(index, positions, seed) for positions in _chunks(len(index))])
        return _settle(index, encoded, wanted, np.searchsorted(ranks, wanted).astype(np.int64), seed)
    parts = [
        _settle(index, encoded[at : at + _CHUNK], part, _search(index, part, seed), seed)
        for at in range(0, len(keys), _CHUNK)
        if len(part := wanted[at : at + _CHUNK])
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def in_order(index: StoreIndex, *, seed: int, samples: int = 64) -> bool:
    """Whether some records across the store are in the order of (seed, key), as packing left them."""
    ranks = _ranks(index, np.unique(np.linspace(0, len(index) - 1, samples).astype(np.int64)), seed)
    return bool((ranks[1:] >= ranks[:-1]).all())


def _hashes(keys: Sequence[bytes], seed: int) -> NDArray[np.uint64]:
    return np.fromiter((xxhash.xxh3_64_intdigest(key, seed) for key in keys), np.uint64, count=len(keys))


def _ranks(index: StoreIndex, positions: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """What the records are sorted by."""
    return _hashes(index.keys(positions), seed)


def _chunks(count: int) -> Iterator[NDArray[np.int64]]:
    return (np.arange(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


def _search(index: StoreIndex, wanted: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    """First positions (n,) whose rank is at least the wanted one: hashes are spread evenly, so guess and look."""
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(index), np.int64)
    low_rank, high_rank = np.zeros(len(wanted)), np.full(len(wanted), _HASHES)
    turn = 0
    while (open_ := np.flatnonzero(low < high)).size:
        span = high[open_] - low[open_]
        share = (wanted[open_] - low_rank[open_]) / np.maximum(high_rank[open_] - low_rank[open_], 1)
        if turn % 3 == 2:  # halving ends the search whatever the keys are
            share = np.full(len(open_), 0.5)
        guess = low[open_] + np.clip((share * span).astype(np.int64), 0, span - 1)
        ranks = _ranks(index, guess, seed)
        below = ranks < wanted[open_]
        low[open_[below]], low_rank[open_[below]] = guess[below] + 1, ranks[below]
        high[open_[~below]], high_rank[open_[~below]] = guess[~below], ranks[~below]
        turn += 1
    return low


def _settle(
    index: StoreIndex, keys: Sequence[bytes], wanted: NDArray[np.uint64], places: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Compare the keys at ``places`` with the wanted ones; where another key has the same hash, look behind it."""
    found = np.full(len(keys), -1, np.int64)
    there = np.flatnonzero(places < len(index))
    for number, first in zip(there.tolist(), index.keys(places[there]), strict=True):
        place, key = int(places[number]), first
        while key != keys[number] and xxhash.xxh3_64_intdigest(key, seed) == wanted[number] and place + 1 < len(index):
            place += 1
            key = index.keys(np.array([place]))[0]
        if key == keys[number]:
            found[number] = place
    return found
