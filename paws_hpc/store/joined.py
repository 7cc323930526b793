"""The joined index of a store: all shards' indexes as one array, cached in ``index.npy`` and memory-mapped."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import atomic_write
from paws_hpc.store.format import INDEX_NAME, REMEDY, Manifest, StoreError, index_hash, join_indexes
from paws_hpc.store.shard import read_shard


def load_index(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    """Return the (N,) joined index that the manifest describes.

    ``index.npy`` is used when its hash is the manifest's; otherwise it is derived from the shards again and written,
    unless the folder cannot be written, in which case it lives in memory.

    Raises:
        StoreError: a shard is missing or damaged, or its index is not the one that was packed; the shard is named.
    """
    cached = read_cached_index(folder, manifest)
    if cached is not None:
        return cached
    joined = _derive(folder, manifest)
    with suppress(OSError):  # a cache only: the folder may be read-only or its disk full
        write_index(folder, joined)
    return joined


def read_cached_index(folder: Path, manifest: Manifest) -> NDArray[np.void] | None:
    """Memory-map ``index.npy``; None when it is absent, unreadable or not the manifest's."""
    try:
        mapped = np.load(folder / INDEX_NAME, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError):
        return None
    cached: NDArray[np.void] = mapped.view(np.ndarray)  # the same memory; np.memmap is slow to index
    return cached if index_hash(cached) == manifest.index_hash else None


def write_index(folder: Path, joined: NDArray[np.void]) -> None:
    """Write ``index.npy`` atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_write(folder / INDEX_NAME) as file:
        np.save(file, joined, allow_pickle=False)


def _derive(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    """Read the index of every shard, check it against the manifest and join them."""
    indexes = []
    for entry in manifest.shards:
        index = read_shard(folder / entry.name).index
        if index.uuid != entry.uuid:
            raise StoreError(
                f"{folder / entry.name} holds another index than was packed (uuid {index.uuid}, not {entry.uuid}). "
                f"{REMEDY}"
            )
        indexes.append(index)
    joined = join_indexes(indexes)
    if index_hash(joined) != manifest.index_hash:
        raise StoreError(f"{folder}: the shards' indexes do not give the manifest's index_hash. {REMEDY}")
    return joined
