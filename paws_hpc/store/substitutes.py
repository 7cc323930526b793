"""What stands in for damaged records, if the user chose that: the next good record of the same class."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from paws_hpc.store.forks import ForkSafeLock
from paws_hpc.store.format import RecordError, StoreError
from paws_hpc.store.index import StoreIndex

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 16


class Substitutes:
    """Damaged records and their substitutes.

    The substitute of a record is the next one in store order, beginning anew behind the last, that has its label and is
    not damaged. It depends on the store's bytes alone: every rank, and every later run, has the same one.

    Attributes:
        limit: records that may be replaced before reading stops.
    """

    def __init__(self, index: StoreIndex, *, limit: int) -> None:
        """Begin with none."""
        self.limit = limit
        self._index = index
        self._next: dict[int, int] = {}
        self._lock = ForkSafeLock()

    @property
    def found(self) -> dict[int, int]:
        """Position of each damaged record that was met → position of its substitute."""
        return {position: self._resolve(position) for position in list(self._next)}

    def apply(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Replace the damaged records that are known among n positions."""
        if not self._next:
            return positions
        return np.array([self._resolve(position) for position in positions.tolist()], np.int64)

    def add(self, error: RecordError) -> None:
        """Take note of a damaged record.

        Raises:
            RecordError: the same one, if the limit is reached or the damage may not be there for others.
            StoreError: no good record of its class is left.
        """
        position = error.position
        if not error.lasting or position is None or not self.limit:
            raise error
        with self._lock:
            if position in self._next:
                return
            if len(self._next) >= self.limit:
                raise RecordError(
                    f"{error} It is damaged record number {len(self._next) + 1}; max_substitutes={self.limit} may be "
                    "replaced.",
                    key=error.key,
                    shard=error.shard,
                    position=position,
                ) from error
            self._next[position] = self._neighbour(position)
            substitute = self._resolve(position)
        _LOG.warning(
            "%s Record %d stands in for it (%d of at most %d).", error, substitute, len(self._next), self.limit
        )

    def _resolve(self, position: int) -> int:
        """Follow the substitutes of substitutes."""
        start = position
        while position in self._next:
            position = self._next[position]
            if position == start:
                raise StoreError(
                    f"every record of the class of record {start} is damaged: nothing can stand in for it."
                )
        return position

    def _neighbour(self, position: int) -> int:
        """The next record of the same label, which is ``position`` itself where there is no other."""
        count = len(self._index)
        label = self._index.label(np.array([position]))[0]
        for start in range(position + 1, position + 1 + count, _CHUNK):
            places = np.arange(start, min(start + _CHUNK, position + 1 + count)) % count
            same = np.flatnonzero(self._index.label(places) == label)
            if len(same):
                return int(places[same[0]])
        raise AssertionError("the record itself has its label")
