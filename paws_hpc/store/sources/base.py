"""What the packer needs from a source of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from paws_hpc.files import value_digest
from paws_hpc.store.format import Encoding


class Source(Protocol):
    """N labelled images that can be loaded one at a time, in any order, from several threads."""

    @property
    def kind(self) -> str:
        """Name in :data:`paws_hpc.store.sources.SOURCES`."""

    @property
    def options(self) -> dict[str, Any]:
        """What selects these images within their origin, as JSON values (split, size); never a path."""

    @property
    def encoding(self) -> Encoding:
        """``jpeg``: :meth:`load` gives image files. ``raw``: it gives pixels, all of one shape."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""

    @property
    def keys(self) -> Sequence[str]:
        """N distinct names by which the images are known in splits and errors."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, positions in :attr:`classes`."""

    @property
    def digest(self) -> str:
        """Identity of the images, cheap to compute: equal digests mean that packing again would change nothing."""

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return image ``index``: the bytes of its file, or its pixels (H, W, C) uint8.

        Raises:
            OSError: the file cannot be read.
        """


@dataclass(frozen=True)
class ArraySource:
    """A source whose images are all in memory: small data sets that ship as arrays.

    Attributes:
        images: (N, H, W, C) uint8, C 1 or 3.
        labels: (N,) int64.
        keys: N names; zero-padded positions in the original files.
    """

    kind: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: Sequence[str]
    classes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    encoding: Encoding = "raw"

    @cached_property
    def digest(self) -> str:
        """Hash of pixels, labels, keys and class names."""
        names = value_digest({"keys": list(self.keys), "classes": list(self.classes), "shape": self.images.shape})
        digest = xxhash.xxh3_128(names.encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels (H, W, C) of image ``index``."""
        image: NDArray[np.uint8] = self.images[index]
        return image


def position_keys(positions: Sequence[int] | NDArray[np.int64]) -> list[str]:
    """Positions in the original files as keys: five digits, so that text order is their order."""
    return [f"{int(position):05d}" for position in positions]
