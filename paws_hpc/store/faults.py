"""Faults of a store that its manifest and its files' sizes show, without reading them."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paws_hpc.store.format import REMEDY, Manifest, StoreError
from paws_hpc.store.index import read_cached_index


@dataclass(frozen=True)
class Fault:
    """Something wrong with a store (no shard), a shard (no key) or a record; ``problem`` ends a sentence about it."""

    shard: str | None
    key: str | None
    problem: str

    def __str__(self) -> str:
        record = "" if self.key is None else f" record {self.key!r}"
        return f"{self.shard or 'store'}{record} {self.problem}"


def size_fault(folder: Path, manifest: Manifest, number: int) -> Fault | None:
    """Compare the size of shard ``number`` with the manifest.

    A truncated shard cannot be opened any more; where ``index.bin`` is at hand, the first record that is lost is named.
    """
    entry = manifest.shards[number]
    try:
        status = os.stat(folder / entry.name)
    except FileNotFoundError:
        return Fault(entry.name, None, "is missing")
    except OSError as error:
        return Fault(entry.name, None, f"cannot be looked at: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Fault(entry.name, None, "is no file")
    size = status.st_size
    if size == entry.bytes:
        return None
    problem, key = f"has {size:,} bytes instead of {entry.bytes:,}", None
    index = read_cached_index(folder, manifest) if size < entry.bytes else None
    if index is not None and entry.data_offset is not None:
        positions = sum(shard.count for shard in manifest.shards[:number]) + np.arange(entry.count)
        rows = index.rows(positions)
        lost = positions[entry.data_offset + rows["offset"].astype(np.int64) + rows["length"] > size]
        if len(lost):
            key = index.keys(lost[:1])[0].decode(errors="replace")
            problem = f"is the first of {len(lost):,} that are lost: the shard was truncated, it {problem}"
    return Fault(entry.name, key, problem)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Refuse shards that are missing or of another size than when they were packed, by the StoreError of the first."""
    for number in range(len(manifest.shards)):
        if (fault := size_fault(folder, manifest, number)) is not None:
            raise StoreError(f"{folder}: {fault}. {REMEDY}")
