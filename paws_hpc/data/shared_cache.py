"""Some records of a JPEG store in memory that all processes of a node share: one file, mapped by each of them.

The file lies in ``/dev/shm`` or, where that has no room, in the temporary folder. Its name says what it holds (store,
records, pixels or bytes) and for which boot of the machine, so that equal names mean equal content and runs with the
same labels, such as the trials of a sweep on one node, share it too.

Nobody waits for it. A record that is not there yet is read from the store, which gives the same pixels. One process of
the node, the leader, fills the file on background threads; if it ends, another goes on where it stopped.

    presence   M bytes: 1 where a record is here
    records    M times the pixels, or the JPEG file, one after another

Where a record lies follows from the store's index alone, so every process knows it, and a record's bytes are the same
whoever writes them, and however often. It is declared present by one byte, written by a system call of its own after
that which wrote the record: it cannot be seen in part.

Legend: M records of the cache, n records that are asked for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from paws_hpc.data.samplers import Positions
from paws_hpc.data.shared_file import SharedFile, file_name, hold, sweep
from paws_hpc.store import ImageStore, StoreError, decode_jpeg

_LOG = logging.getLogger(__name__)

Form = Literal["pixels", "bytes"]
Blob = NDArray[np.uint8]

_VERSION = "2"  # of the layout
_PRESENT = np.ones(1, np.uint8)
_SHARE_OF_CORES = 4  # one core in so many fills, the others are training's
_LEADER_CHECK_S = 1.0
_CLOSE_S = 0.25  # a thread that waits longer for a file system is left to itself


@dataclass(frozen=True)
class Layout:
    """Where records lie in the file; a function of the store's index.

    Attributes:
        form: what is held of each record.
        records: (M,) positions in the store, ascending.
        offsets: (M + 1,) int64, where each record begins in the file; the last is the file's size.
        heights, widths: (M,) int64, pixels.
    """

    form: Form
    records: Positions
    offsets: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    @classmethod
    def of(cls, store: ImageStore, records: Positions, form: Form) -> Layout:
        """Lay out ascending records of a strict store: a substitute has another size."""
        heights, widths = store.sizes(records)
        sizes = heights * widths * 3 if form == "pixels" else store.lengths(records)
        return cls(form, records, np.cumsum([len(records), *sizes.tolist()]), heights, widths)

    @property
    def size(self) -> int:
        """Of the file, bytes."""
        return int(self.offsets[-1])


class SharedCache:
    """This process's hold on a cache; safe to share between threads and to inherit through a fork.

    Attributes:
        path: of the file, as long as somebody uses it.
        form: what it holds of each image.
        description: for the log.
    """

    def __init__(self, file: SharedFile, store: ImageStore, layout: Layout) -> None:
        """Use :func:`open_shared_cache`."""
        self.path, self.form = file.path, layout.form
        self._file, self._layout = file, layout
        self._bytes = file.mapped()
        self._present = np.zeros(len(layout.records), np.bool_)
        self._release = weakref.finalize(self, _leave, file, _Filling(file, store, layout), os.getpid())
        self.description = (
            f"{len(layout.records):,} labelled images as {self.form} in {self.path} ({layout.size / 1e9:.2f} GB), "
            "shared by the processes of this node and filled while they work"
        )

    @property
    def absent(self) -> int:
        """Number of records that are not in the file yet, or cannot be read."""
        return int(np.count_nonzero(~_presence(self._file, self._layout)))

    def close(self) -> None:
        """Leave; the last process to do so removes the file. Arrays handed out stay valid, all else is then read."""
        self._release()

    def pixels(self, records: Positions, store: ImageStore) -> list[Blob]:
        """n decoded images (H, W, 3) uint8; records that are not here are read from ``store``, with its errors.

        Images that are here as pixels are read-only views of the shared memory.
        """
        found = [None if place is None else self._pixels(place) for place in self._find(records, store)]
        absent = [record for record, image in zip(records, found, strict=True) if image is None]
        read = iter(store.images(absent) if absent else [])
        return [next(read) if image is None else image for image in found]

    def encoded(self, records: Positions, store: ImageStore) -> list[Blob]:
        """n JPEG files (bytes,) uint8; records that are not here, or only as pixels, are read from ``store``."""
        places = self._find(records, store) if self.form == "bytes" else [None] * len(records)
        absent = [record for record, place in zip(records, places, strict=True) if place is None]
        read = iter(store.read_encoded(absent) if absent else [])
        return [np.frombuffer(next(read), np.uint8) if place is None else self._blob(place) for place in places]

    def _find(self, records: Positions, store: ImageStore) -> list[int | None]:
        """Places in the cache of n records; None for those that are to be read from the store."""
        if not self._release.alive:
            return [None] * len(records)
        known = self._layout.records
        places = np.minimum(np.searchsorted(known, records), len(known) - 1)
        cached = known[places] == records
        if not self._present[places[cached]].all():
            self._present = _presence(self._file, self._layout)
        here = cached & self._present[places]
        if substituted := store.substitutes:  # what stands in for a damaged record is up to each run's settings
            here &= ~np.isin(records, list(substituted))
        return [place if there else None for place, there in zip(places.tolist(), here.tolist(), strict=True)]

    def _blob(self, place: int) -> Blob:
        return self._bytes[self._layout.offsets[place] : self._layout.offsets[place + 1]]

    def _pixels(self, place: int) -> Blob | None:
        """(H, W, 3) uint8; None where the bytes are no such image, which the store knows how to report or replace."""
        size = int(self._layout.heights[place]), int(self._layout.widths[place])
        if self.form == "pixels":
            return self._blob(place).reshape(*size, 3)
        try:
            return decode_jpeg(self._blob(place), size=size)
        except ValueError:
            return None


def open_shared_cache(
    store: ImageStore,
    records: Positions,
    *,
    budget_bytes: int,
    decoded: bool = True,
    folders: Sequence[Path] | None = None,
) -> SharedCache | None:
    """Map the cache of these records, and fill it in the background if no other process of this node does.

    Args:
        store: a JPEG store.
        records: (M,) positions, in any order.
        budget_bytes: of the file.
        decoded: prefer pixels to bytes.
        folders: where it may lie, in order of preference.

    Returns:
        None, with a line in the log, where it would not fit the budget or no folder has room.
    """
    records, strict = np.unique(records), store.strict()
    forms: list[Form] = ["pixels", "bytes"] if decoded else ["bytes"]
    layouts = [Layout.of(strict, records, form) for form in forms]
    layout = next((layout for layout in layouts if layout.size <= budget_bytes), None)
    if layout is None:
        _LOG.warning(
            "The %s labelled images are read from %s again and again: they would take %.2f GB in memory, more than "
            "data.cache_gb=%g allows.", f"{len(records):,}", store.path, layouts[-1].size / 1e9, budget_bytes / 1e9,
        )  # fmt: skip
        return None
    name = file_name(_identity(store, layout))
    refusals = []
    for folder in folders or (Path("/dev/shm"), Path(tempfile.gettempdir())):
        try:
            sweep(folder, but=name)
            return SharedCache(hold(folder / name, layout.size), strict, layout)
        except OSError as error:
            refusals.append(f"{folder}: {error.strerror or error}")
    _LOG.warning(
        "The labelled images are read from %s again and again, as there is no room for %.2f GB of them (%s).",
        store.path, layout.size / 1e9, "; ".join(refusals),
    )  # fmt: skip
    return None


def _identity(store: ImageStore, layout: Layout) -> str:
    """Digest of all that determines the content, and of the boot: what a power cut left on a disk may be torn.

    The store's place is part of it, as a copy of the store may be damaged where this one is not.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    known = (_VERSION, str(store.path.resolve()), store.manifest.checksum, layout.form, boot, simplejpeg.__version__)
    digest = hashlib.sha256("\n".join(known).encode())
    digest.update(layout.records.astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def _presence(file: SharedFile, layout: Layout) -> NDArray[np.bool_]:
    """Which records are in the file (M,).

    Asked of the system, not of the mapping: processors may read memory ahead of time, and so a record before the byte
    that declares it present.
    """
    return file.read(0, len(layout.records)) != 0


def _leave(file: SharedFile, filling: _Filling, owner: int) -> None:
    if os.getpid() == owner:  # a fork has none of its parent's threads
        filling.stop()
    file.leave()


class _Filling:
    """This process's readiness to fill the file: it does so if it is, or becomes, the leader."""

    def __init__(self, file: SharedFile, store: ImageStore, layout: Layout) -> None:
        """Begin.

        Args:
            file: to fill.
            store: strict: what is damaged is left to whoever asks for it, and must not count as replaced before.
            layout: of the file.
        """
        self._file, self._store, self._layout = file, store, layout
        self._leaving, self._full = threading.Event(), threading.Event()
        self._refusal = ""
        self._thread = threading.Thread(target=self._run, name="cache", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the threads; returns at once, or in a quarter of a second where they wait for a file system.

        Those end as soon as they can, and until then keep the file's descriptor and do no harm: what they write is
        what anybody would write there.
        """
        self._leaving.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while not self._file.try_to_lead():
            if self._leaving.wait(_LEADER_CHECK_S) or _presence(self._file, self._layout).all():
                return
        absent = np.flatnonzero(~_presence(self._file, self._layout))
        if not len(absent):
            return
        started = time.monotonic()
        count = max(1, len(os.sched_getaffinity(0)) // _SHARE_OF_CORES)
        parts = [absent[first::count] for first in range(count)]
        threads = [threading.Thread(target=self._fill, args=(part,), name="cache", daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not (self._leaving.is_set() or self._store.shards.closed):
            self._report(time.monotonic() - started)

    def _fill(self, places: NDArray[np.int64]) -> None:
        for place in places.tolist():
            if self._leaving.is_set() or self._full.is_set() or self._store.shards.closed:
                return
            blob = self._read(place)
            if blob is None:
                continue
            start, stop = self._layout.offsets[place : place + 2].tolist()
            assert blob.nbytes == stop - start, "a strict store gives what its index says or raises"
            try:
                self._file.write(start, blob)
                self._file.write(place, _PRESENT)
            except OSError as error:
                self._refusal = f"{self._file.path.parent}: {error.strerror}"
                self._full.set()

    def _read(self, place: int) -> Blob | None:
        """A record's pixels or bytes; None where it cannot be read: training is told so if it asks for it."""
        record = self._layout.records[place : place + 1]
        try:
            if self._layout.form == "pixels":
                return self._store.images(record)[0]
            return np.frombuffer(self._store.read_encoded(record)[0], np.uint8)
        except StoreError:
            return None
        except ValueError:
            if self._store.shards.closed:  # meanwhile
                return None
            raise

    def _report(self, seconds: float) -> None:
        present, count = int(np.count_nonzero(_presence(self._file, self._layout))), len(self._layout.records)
        if self._refusal:
            _LOG.warning(
                "%s of %s labelled images are in memory, the others are read from %s again and again: there is no "
                "more room (%s).", f"{present:,}", f"{count:,}", self._store.path, self._refusal,
            )  # fmt: skip
        else:
            _LOG.info(
                "%s of %s labelled images are in memory%s; that took %.1f s in the background.",
                f"{present:,}", f"{count:,}", ", the others cannot be read" * (present < count), seconds,
            )  # fmt: skip
