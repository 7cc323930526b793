"""What the packer needs from a source of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paws_hpc.store.format import Encoding, StoreError

IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"))
"""Files with other extensions (lists, checksums, archives) are not images and are passed over."""

LIST_AGAIN = "List it again: pack without --part, or with --plan-only first."
"""What to do about a source that changed."""


class SourceChangedError(StoreError):
    """The source is not what it was when it was listed; what was packed from it would be a mixture."""


class Images(Protocol):
    """n images that can be loaded in any order, from several threads, and pickled for another process to load."""

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return image ``index``: the bytes of its file, or its pixels (H, W, C) uint8.

        Raises:
            OSError: the file cannot be read.
            ValueError: the image is damaged; other images may be whole.
            SourceChangedError: the file is not the one that was listed.
        """

    def close(self) -> None:
        """Close what was opened for loading."""


class Source(Images, Protocol):
    """All labelled images of a data set, listed but not read."""

    @property
    def keys(self) -> Sequence[str]:
        """N distinct names by which the images are known in splits and errors."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, positions in the source's classes."""

    @property
    def kind(self) -> str:
        """Name in :data:`paws_hpc.packing.sources.SOURCES`."""

    @property
    def options(self) -> dict[str, Any]:
        """What selects these images within their origin, as JSON values (split, size); never a path."""

    @property
    def encoding(self) -> Encoding:
        """``jpeg``: :meth:`load` gives image files, or pixels of any size. ``raw``: pixels, all of one shape."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""

    @property
    def digest(self) -> str:
        """Identity of the images, cheap to compute; equal wherever the same images lie, so without paths or times."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64 bytes of each image as the source has it; they decide where a shard ends."""

    @property
    def stamps(self) -> NDArray[np.int64]:
        """(N,) int64 that change when a file is written again; 0 where the digest covers the contents."""

    def select(self, indices: NDArray[np.int64]) -> Images:
        """Return these images, in this order, without the rest of the source."""


def position_keys(positions: Sequence[int] | NDArray[np.int64]) -> list[str]:
    """Positions in the original files as keys: five digits, so that text order is their order."""
    return [f"{int(position):05d}" for position in positions]
