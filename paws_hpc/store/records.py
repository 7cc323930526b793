"""The records of a store at given positions: read, checked and decoded, and named where that fails.

What a store lets stand in for damaged records, and which positions it has, is :mod:`paws_hpc.store.reader`'s to know.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.store.decode import decode_jpeg
from paws_hpc.store.format import REMEDY, Manifest, RecordError
from paws_hpc.store.index import StoreIndex
from paws_hpc.store.keys import Keys
from paws_hpc.store.shardset import Place, Problem, ShardSet, UnreadableError


class Records:
    """Reads n records at positions (n,) int64 in [0, N). Safe to share between threads and through a fork."""

    def __init__(self, path: Path, manifest: Manifest, index: StoreIndex, shards: ShardSet, *, check: bool) -> None:
        """Prepare.

        Args:
            path: the store's folder.
            manifest: of the store.
            index: of all its records.
            shards: open.
            check: compare the CRC32C of every record.
        """
        self._path, self._manifest, self._index, self._shards, self._check = path, manifest, index, shards, check
        self._ends = list(accumulate(shard.count for shard in manifest.shards))
        self._own = threading.local()

    def encoded(self, positions: NDArray[np.int64]) -> list[bytes]:
        """Read n records as they are.

        Raises:
            RecordError: one cannot be read or its CRC32C is wrong.
        """
        payloads = []
        for position, place in zip(positions.tolist(), self._places(self._rows(positions), positions), strict=True):
            payload = self._shards.read(place)
            if isinstance(payload, Problem):
                raise self._fault(position, payload)
            payloads.append(payload)
        return payloads

    def fill(self, positions: NDArray[np.int64], pixels: NDArray[np.uint8]) -> None:
        """Read n records of one length into the rows of (n, length); raises as :meth:`encoded`."""
        places = self._places(self._rows(positions), positions)
        for position, place, buffer in zip(positions.tolist(), places, pixels, strict=True):
            problem = self._shards.read_into(place, buffer)
            if problem is not None:
                raise self._fault(position, problem)

    def decoded(self, positions: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read and decode n JPEGs, each (H, W, 3) uint8 RGB of the size that the index says.

        Raises:
            RecordError: as :meth:`encoded`, or one cannot be decoded.
        """
        rows = self._rows(positions)
        sizes = list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))
        images = []
        try:
            for number, record in enumerate(self._each(rows, positions)):
                try:
                    images.append(decode_jpeg(record, size=sizes[number]))
                except ValueError as error:
                    raise self._fault(
                        int(positions[number]), Problem(f"cannot be decoded: {error}", lasting=True)
                    ) from error
        except UnreadableError as error:
            raise self.unreadable(positions, error) from error
        return images

    def each(self, positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        """Read n records one after the other, each (bytes,) in this thread's buffer, which the next one overwrites.

        Raises:
            UnreadableError: one cannot be read or its CRC32C is wrong; :meth:`unreadable` names it.
        """
        return self._each(self._rows(positions), positions)

    def unreadable(self, positions: NDArray[np.int64], error: UnreadableError) -> RecordError:
        """Name the one of n records at which reading them ended."""
        return self._fault(int(positions[error.number]), error.problem)

    def _each(self, rows: NDArray[np.void], positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        places = self._places(rows, positions)
        return self._shards.each(places, self._buffer(max(rows["length"].tolist(), default=0)))

    def _buffer(self, length: int) -> NDArray[np.uint8]:
        """At least so many bytes of this thread's own, used again: new memory costs half as much as reading."""
        buffer: NDArray[np.uint8] | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._own.buffer = np.empty(2 * length, np.uint8)
        return buffer

    def _rows(self, positions: NDArray[np.int64]) -> NDArray[np.void]:
        """The index's rows (n,) of the records."""
        if self._shards.closed:
            raise ValueError(f"the store {self._path} was closed: open it again to read.")
        self._shards.look()
        return self._index.rows(positions)

    def _places(self, rows: NDArray[np.void], positions: NDArray[np.int64]) -> list[Place]:
        """Where n records lie, and their CRC32C if it is to be checked."""
        # Column by column: ten times as fast as the rows of a structured array one by one. Reading leaves little in
        # the processor's caches, so the fewer and smaller calls win, as bisect does over searchsorted.
        shards = [bisect_right(self._ends, position) for position in positions.tolist()]
        offsets, lengths = rows["offset"].tolist(), rows["length"].tolist()
        sums = rows["crc32c"].tolist() if self._check else [None] * len(rows)
        return list(zip(shards, offsets, lengths, sums, strict=True))

    def _fault(self, position: int, problem: Problem) -> RecordError:
        """Name a record that cannot be used."""
        key = Keys(self._index)[position]
        shard = self._manifest.shards[bisect_right(self._ends, position)].name
        return RecordError(
            f"record {key!r} in {self._path / shard} {problem.text}. {REMEDY}",
            key=key,
            shard=shard,
            position=position,
            lasting=problem.lasting,
        )
