"""The list of a source's image files, which is all that packing needs to divide the work, and can be kept in a file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc.files import atomic_write, value_digest
from paws_hpc.store.format import Encoding


@dataclass(frozen=True)
class Listing:
    """N image files, on their own or inside archives, as columns of N entries."""

    classes: tuple[str, ...]
    keys: Sequence[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """Bytes; 0 for a file that cannot be reached, which packing reports."""
    stamps: NDArray[np.int64]
    """Modification times in ns, of the file or its archive."""
    files: tuple[str, ...]
    """Names of the archives below the root; empty for a folder of files."""
    file_of: NDArray[np.int64]
    """Positions in ``files``; all 0 for a folder."""
    offsets: NDArray[np.int64]
    """Where the image begins in its archive, in bytes; all 0 for a folder."""

    @cached_property
    def digest(self) -> str:
        """Hash of all keys with their sizes and labels; neither paths nor times count."""
        return value_digest([list(self.keys), self.sizes.tolist(), self.labels.tolist(), self.classes])

    def take(self, indices: NDArray[np.int64]) -> Listing:
        """These entries, in this order, with the archives that hold them."""
        used, file_of = np.unique(self.file_of[indices], return_inverse=True)
        return Listing(
            classes=self.classes,
            keys=[self.keys[index] for index in indices],
            labels=self.labels[indices],
            sizes=self.sizes[indices],
            stamps=self.stamps[indices],
            files=tuple(self.files[file] for file in used) if self.files else (),
            file_of=file_of.reshape(-1).astype(np.int64),
            offsets=self.offsets[indices],
        )

    def save(self, path: Path) -> None:
        """Write the listing atomically: a hash, and what numpy's .npz makes of it; OSError if that is impossible."""
        encoded = [key.encode() for key in self.keys]
        content = io.BytesIO()
        np.savez(
            content,
            names=np.frombuffer(json.dumps({"classes": self.classes, "files": self.files}).encode(), dtype=np.uint8),
            key_blob=np.frombuffer(b"".join(encoded), dtype=np.uint8),
            key_bounds=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            **{name: getattr(self, name) for name in _COLUMNS},
        )
        with atomic_write(path) as file:
            file.write(xxhash.xxh3_128_digest(content.getbuffer()))
            file.write(content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Listing:
        """Read what :meth:`save` wrote; FileNotFoundError if there is none, ValueError if it is damaged."""
        whole = path.read_bytes()
        digest, content = whole[:_HASH_BYTES], whole[_HASH_BYTES:]
        if xxhash.xxh3_128_digest(content) != digest:
            raise ValueError(f"{path} is damaged. Remove it: the source is then listed again.")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            names = json.loads(arrays["names"].tobytes())
            blob, bounds = arrays["key_blob"].tobytes(), arrays["key_bounds"].tolist()
            return cls(
                classes=tuple(names["classes"]),
                keys=[blob[start:stop].decode() for start, stop in pairwise(bounds)],
                files=tuple(names["files"]),
                **{name: arrays[name] for name in _COLUMNS},
            )


class ListedSource:
    """A source of image files, which are listed but not read before they are packed.

    A file that changes while it is being packed is noticed by its size and modification time.
    """

    encoding: Encoding = "jpeg"

    def __init__(self, kind: str, root: Path, listing: Listing, options: dict[str, Any]) -> None:
        self.kind, self.root, self.listing, self.options = kind, root, listing, options
        self.classes, self.keys, self.labels = listing.classes, listing.keys, listing.labels
        self.sizes, self.stamps = listing.sizes, listing.stamps

    @property
    def digest(self) -> str:
        """Hash of all keys with their file sizes and labels."""
        return self.listing.digest


_HASH_BYTES = 16
_COLUMNS = ("labels", "sizes", "stamps", "file_of", "offsets")
