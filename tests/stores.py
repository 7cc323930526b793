"""Ways to look at the files of a store, and to change them."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from paws_hpc.files import file_hash, value_digest
from paws_hpc.packing import ArraySource
from paws_hpc.store.format import read_manifest
from paws_hpc.store.index import load_index


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, which is the nearest to a full disk without being root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def wait_until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def noise(count: int, shape: tuple[int, int, int], *, seed: int = 0) -> ArraySource:
    """A source of ``count`` raw images of random pixels in four classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    labels, keys = np.arange(count, dtype=np.int64) % 4, [f"{place:05d}" for place in range(count)]
    return ArraySource(f"noise{seed}", pixels, labels, keys, tuple("abcd"))


def file_hashes(store: Path) -> dict[str, str]:
    """Name → hash of each file of a store."""
    return {path.name: file_hash(path) if path.is_file() else "folder" for path in sorted(store.iterdir())}


def place_in_file(store: Path, position: int) -> tuple[Path, int, int]:
    """Shard file, offset in it and length of one record."""
    manifest = read_manifest(store)
    row = load_index(store, manifest).rows(np.array([position]))[0]
    number = int(np.searchsorted(np.cumsum([shard.count for shard in manifest.shards]), position, side="right"))
    shard = manifest.shards[number]
    assert shard.data_offset is not None
    return store / shard.name, shard.data_offset + int(row["offset"]), int(row["length"])


def flip_bit(path: Path, offset: int | None = None) -> None:
    """Change a bit of a file; in its middle, unless another place is given."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 16
    path.write_bytes(content)


def edit_manifest(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a store's manifest and make its checksum fit."""
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("checksum")
    change(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest | {"checksum": value_digest(manifest)}))


def forget_offsets(store: Path) -> None:
    """Make a store whose records have to be read through HDF5."""
    edit_manifest(store, lambda manifest: [shard.update(data_offset=None) for shard in manifest["shards"]])
