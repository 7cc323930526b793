"""Ways to look at the files of a store, and to change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paws_hpc.files import file_hash, value_digest


def file_hashes(store: Path) -> dict[str, str]:
    """Name → hash of each file of a store."""
    return {path.name: file_hash(path) if path.is_file() else "folder" for path in sorted(store.iterdir())}


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
