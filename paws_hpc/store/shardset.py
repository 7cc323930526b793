"""All shards of a store, open for reading; each from the node's own disk as soon as a complete copy is there."""

from __future__ import annotations

import errno
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from paws_hpc.store.forks import ForkSafeLock
from paws_hpc.store.format import REMEDY, Manifest, StoreError
from paws_hpc.store.local import LocalFolder
from paws_hpc.store.shard import ShardFile

_LOG = logging.getLogger(__name__)
_LOOK_INTERVAL_S = 2.0
_TRIALS = 3
"""Copies of one shard that may turn out damaged before its copies are left alone."""


@dataclass(frozen=True)
class Problem:
    """Why a record could not be read.

    Attributes:
        text: end of a sentence that begins with the record.
        lasting: the bytes are wrong and stay so for every process; False if the system failed to read them.
    """

    text: str
    lasting: bool


Place = tuple[int, int, int, int | None]
"""Of a record: number of the shard, offset in its ``/data``, length in bytes, and what its CRC32C must be, if checked.

A plain tuple, since one is made for every record that is read."""


class UnreadableError(Exception):
    """Ends :meth:`ShardSet.each` at the record ``number``, counted from 0."""

    def __init__(self, number: int, problem: Problem) -> None:
        super().__init__(number, problem)
        self.number, self.problem = number, problem


_CLOSED = Problem("was not read, the store was closed meanwhile", lasting=False)


class ShardSet:
    """Reads records from any thread while shards are being switched to their local copies.

    A thread that reads holds a reference to the open shard, and the descriptor is closed with the last reference: so a
    shard is switched, or the set closed, without a lock and without closing what somebody is reading.

    Attributes:
        fallbacks: local copies that were found missing or damaged and are not used any more.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, copy_to: Path | None = None) -> None:
        """Open all shards; see :class:`paws_hpc.store.reader.ImageStore` for the errors."""
        self._folder, self._manifest = folder, manifest
        self._local = None if copy_to is None else LocalFolder(copy_to, manifest)
        self._use = None if self._local is None else self._local.use()
        self._shared = dict.fromkeys(range(len(manifest.shards)), True)
        self._failures: Counter[int] = Counter()
        self._looking = ForkSafeLock()
        self._next_look = 0.0
        self._told = False
        self._files: list[ShardFile] | None = _open_shared(folder, manifest)
        self.fallbacks = 0
        self.look()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._files is None

    @property
    def local(self) -> int:
        """Number of shards that are read from their local copy."""
        return sum(not shared for shared in self._shared.values())

    def close(self) -> None:
        """Let go of all files; those that a thread is reading are closed when it has finished."""
        self._files = None
        if self._use is not None:
            self._use.close()

    def look(self) -> None:
        """Begin to use the local copies that are complete by now; looks at most every two seconds."""
        if self._local is None or time.monotonic() < self._next_look or not self._looking.acquire(blocking=False):
            return
        try:
            for number, path in self._local.marked().items():
                if self._shared[number] and self._failures[number] < _TRIALS:
                    self._adopt(number, path)
        except OSError as error:  # the node's disk fails: the store itself is there to be read
            if not self._told:
                self._told = True
                _LOG.warning("local copies in %s cannot be looked for: %s", self._local.path, error)
            self._next_look = time.monotonic() + _LOOK_INTERVAL_S
        else:
            everything = not any(self._shared.values())
            self._next_look = float("inf") if everything else time.monotonic() + _LOOK_INTERVAL_S
        finally:
            self._looking.release()

    def read(self, place: Place) -> bytes | Problem:
        """Return a record, or why it cannot be had; a local copy that fails is replaced by the store's own shard."""
        shard, offset, length, crc32c = place
        files = self._files
        if files is None:
            return _CLOSED
        file = files[shard]
        content = _read(file, length, offset, crc32c)
        if not isinstance(content, Problem) or file.path.parent == self._folder:
            return content
        self._fall_back(shard, file, content.text)
        return _read(files[shard], length, offset, crc32c)

    def read_into(self, place: Place, buffer: NDArray[np.uint8]) -> Problem | None:
        """Fill ``buffer`` with a record of its length; otherwise as :meth:`read`."""
        shard, offset, _, crc32c = place
        files = self._files
        if files is None:
            return _CLOSED
        file = files[shard]
        problem = _read_into(file, buffer, offset, crc32c)
        if problem is None or file.path.parent == self._folder:
            return problem
        self._fall_back(shard, file, problem.text)
        return _read_into(files[shard], buffer, offset, crc32c)

    def each(self, places: Sequence[Place], buffer: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Yield records one after the other, each in the same ``buffer``, which the longest must fit.

        What is done here once per record counts: a copy of 110 KB out of the page cache takes 20 µs, and leaves none of
        the interpreter in the processor's inner caches. All that is not the usual case is left to :meth:`read_into`.

        Raises:
            UnreadableError: a record cannot be read.
        """
        preadv, checksum = os.preadv, google_crc32c.value
        for number, place in enumerate(places):
            shard, offset, length, crc32c = place
            record, files = buffer[:length], self._files
            if files is not None and (start := (file := files[shard]).data_offset) is not None:
                try:  # ``file`` keeps the descriptor open
                    read = preadv(file.descriptor, [record], start + offset)  # type: ignore[list-item, arg-type]
                except OSError:
                    read = 0
                if read == length and (crc32c is None or checksum(record) == crc32c):
                    yield record
                    continue
            problem = self.read_into(place, record)
            if problem is not None:
                raise UnreadableError(number, problem)
            yield record

    def _adopt(self, number: int, path: Path) -> None:
        """Switch a shard to its local copy."""
        entry, files = self._manifest.shards[number], self._files
        if files is None:
            return
        try:
            size = path.stat().st_size
            file = ShardFile(path, entry.data_offset)
        except OSError as error:
            self._give_up(number, path, f"cannot be opened: {error.strerror}")
            return
        if size != entry.bytes:
            self._give_up(number, path, f"has {size:,} bytes instead of {entry.bytes:,}")
            return
        files[number] = file
        self._shared[number] = False

    def _fall_back(self, number: int, file: ShardFile, problem: str) -> None:
        """Switch a shard back to the store's own file, unless another thread has done so."""
        files = self._files
        with self._looking:
            if files is None or files[number] is not file:
                return
            self._give_up(number, file.path, f"has a record that {problem}")
            entry = self._manifest.shards[number]
            try:
                files[number] = ShardFile(self._folder / entry.name, entry.data_offset)
            except OSError as error:
                raise StoreError(
                    f"{self._folder / entry.name} cannot be opened ({error.strerror}), and its local copy {file.path} "
                    f"{problem}. {REMEDY}"
                ) from error
            self._shared[number] = True
            self._next_look = time.monotonic() + _LOOK_INTERVAL_S

    def _give_up(self, number: int, path: Path, problem: str) -> None:
        """Count and report a local copy that cannot be used."""
        assert self._local is not None, "only local copies are given up"
        self.fallbacks += 1
        self._failures[number] += 1
        self._local.unmark(self._manifest.shards[number])
        _LOG.warning(
            "local copy %s %s: reading %s instead (%d local copies have failed)",
            path,
            problem,
            self._folder / path.name,
            self.fallbacks,
        )


def _read(file: ShardFile, length: int, offset: int, crc32c: int | None) -> bytes | Problem:
    try:
        content = file.read(length, offset)
    except OSError as error:
        return Problem(f"cannot be read: {error}", lasting=False)
    return _problem(content, len(content), length, crc32c) or content


def _read_into(file: ShardFile, buffer: NDArray[np.uint8], offset: int, crc32c: int | None) -> Problem | None:
    try:
        read = file.read_into(buffer, offset)
    except OSError as error:
        return Problem(f"cannot be read: {error}", lasting=False)
    if crc32c is None and read == len(buffer):
        return None
    return _problem(buffer, read, len(buffer), crc32c)


def _problem(content: bytes | NDArray[np.uint8], read: int, length: int, crc32c: int | None) -> Problem | None:
    """What is wrong with the bytes of a record."""
    if read < length:
        return Problem(f"is cut off: {read:,} of {length:,} bytes are there", lasting=True)
    if crc32c is not None and google_crc32c.value(content) != crc32c:
        return Problem("is damaged: its CRC32C differs from the index", lasting=True)
    return None


def _open_shared(folder: Path, manifest: Manifest) -> list[ShardFile]:
    """Open all shards for reading."""
    _allow_open_files(len(manifest.shards))
    shards: list[ShardFile] = []
    for entry in manifest.shards:
        try:
            shards.append(ShardFile(folder / entry.name, entry.data_offset))
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise StoreError(
                    f"{folder} has {len(manifest.shards):,} shards, more files than this process may open (as "
                    "`ulimit -Hn` says): pack with a larger --shard-mib, or have whoever set the limit raise it to "
                    f"{4 * len(manifest.shards):,}."
                ) from error
            raise StoreError(f"{folder / entry.name} cannot be opened: {error.strerror}. {REMEDY}") from error
    return shards


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit, often 1,024, as far as its hard limit lets a store of ``count`` shards open."""
    wanted = 2 * count + 256  # local copies are opened beside the shards, and others have files open too
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
