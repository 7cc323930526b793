"""Images that two stores share: those of equal pixels, and near duplicates by a difference hash.

Legend: N images of a store; n of one store are looked for among m of another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.data.samplers import Positions
from paws_hpc.data.splits import UNWRITABLE
from paws_hpc.files import atomic_write
from paws_hpc.progress import Progress
from paws_hpc.store import ImageStore
from paws_hpc.store.workers import in_order, slices, usable_cores

_LOG = logging.getLogger(__name__)
NEAR_BITS = 4
"""Of 128, in which near duplicates differ at most: JPEG of quality 50 or half the size change 1 (median) to 4."""
_SHADES = 2  # of 255: smaller differences are noise
_FEATURES = 16  # bits that are set in an image that shows enough to be recognised, unlike a clear sky
_SUM_BYTES = 16
_FINGERPRINT = np.dtype([("pixels", "<u8"), ("across", "<u8"), ("down", "<u8")])
_IMAGES_AT_ONCE, _ROWS, _COLUMNS = 16, 64, 4096  # a block of distances fits a core's cache


def shared(test: ImageStore, store: ImageStore, records: Positions, folder: Path) -> Iterator[tuple[str, str, str]]:
    """``same`` or ``near``, key of a test image, and that of an image like it among ``records`` (m,) of a store."""
    of_test, others = fingerprints(test, folder), fingerprints(store, folder)[records]
    same = same_images(of_test, others)
    for kind, found in (("same", same), ("near", np.where(same < 0, near_images(of_test, others), -1))):
        these = np.flatnonzero(found >= 0)
        for mine, other in zip(test.keys.at(these), store.keys.at(records[found[these]]), strict=True):
            yield kind, mine, other


def fingerprints(store: ImageStore, folder: Path) -> NDArray[np.void]:
    """(N,) of the images as they are decoded: ``pixels``, a hash of all; ``across`` and ``down``, 64 bits each.

    These say where the grey image at 9 x 8 pixels grows brighter from one pixel to the next in a row, and at 8 x 9 in a
    column. They are computed on all cores, once: a file beside the shards keeps them, or in ``folder`` where the
    store cannot be written: a checksum of all, the store's included, and the N rows.

    Raises:
        RecordError: an image is damaged.
    """
    identity = store.manifest.checksum
    paths = [place / f"fingerprints-{identity[:16]}.bin" for place in (store.path, folder)]
    for path in paths:
        with suppress(FileNotFoundError):
            content = path.read_bytes()
            if content[:_SUM_BYTES] == xxhash.xxh3_128_digest(identity.encode() + content[_SUM_BYTES:]):
                return np.frombuffer(content, _FINGERPRINT, offset=_SUM_BYTES)
    rows = np.empty(len(store), _FINGERPRINT)

    def compute(records: range) -> int:
        rows[records.start : records.stop] = [_fingerprint(pixels) for pixels in store.images(records)]
        return len(records)

    looking = Progress(f"looking at {store.path}", total=len(store))
    with ThreadPoolExecutor(usable_cores()) as pool, looking:
        for done in in_order(pool, compute, slices(len(store), _IMAGES_AT_ONCE)):
            looking.advance(done)
    content = xxhash.xxh3_128_digest(identity.encode() + rows.tobytes()) + rows.tobytes()
    try:
        _write(paths[0], content)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _LOG.info("%s cannot be written, so %s keeps the fingerprints of its images.", store.path, folder)
        _write(paths[1], content)
    return rows


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _fingerprint(pixels: NDArray[np.uint8]) -> tuple[int, int, int]:
    grey = Image.fromarray(pixels).convert("L")
    sides = (9, 8), (8, 9)
    across, down = (np.asarray(grey.resize(side, Image.Resampling.BILINEAR)).astype(np.int16) for side in sides)
    steps = across[:, 1:] - across[:, :-1], down[1:] - down[:-1]
    words = [int.from_bytes(np.packbits(each > _SHADES).tobytes(), "little") for each in steps]
    # Images of another width may have the same bytes.
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data, seed=pixels.shape[1]), words[0], words[1]


def same_images(these: NDArray[np.void], others: NDArray[np.void]) -> Positions:
    """(n,) position of an image of equal pixels among m others, for each of n; -1 where there is none."""
    order = np.argsort(others["pixels"])
    places = np.searchsorted(others["pixels"], these["pixels"], sorter=order)
    found = order[np.minimum(places, len(others) - 1)]
    return np.where(others["pixels"][found] == these["pixels"], found, -1)


def near_images(these: NDArray[np.void], others: NDArray[np.void]) -> Positions:
    """(n,) position of the nearest of m others, for each of n; -1 where more than ``NEAR_BITS`` differ, or few are set.

    All n * m pairs are compared, on all cores, in blocks of one size: memory does not grow with their number, and time
    does not depend on what the images show.
    """
    words = [(these[name][:, None].copy(), others[name].copy()) for name in ("across", "down")]

    def nearest(rows: range) -> Positions:
        least, found = np.full(len(rows), NEAR_BITS + 1), np.full(len(rows), -1)
        for columns in slices(len(others), _COLUMNS):
            across, down = (mine[rows.start : rows.stop] ^ word[columns.start : columns.stop] for mine, word in words)
            bits = np.bitwise_count(across) + np.bitwise_count(down)
            column = bits.argmin(axis=1)
            distance = bits[np.arange(len(rows)), column]
            found = np.where(distance < least, columns.start + column, found)
            least = np.minimum(least, distance)
        return found

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = np.concatenate(list(in_order(pool, nearest, slices(len(these), _ROWS))))
    features = np.bitwise_count(these["across"]) + np.bitwise_count(these["down"])
    return np.where(features < _FEATURES, -1, found)
