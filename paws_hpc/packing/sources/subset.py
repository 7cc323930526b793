"""Some classes of another source: ImageNet-100, or the classes that have labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import value_digest
from paws_hpc.packing.sources.base import Images, Source
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.store.format import Encoding, StoreError


@dataclass(frozen=True)
class _Relabelled:
    """Images whose labels are positions in fewer classes.

    Attributes:
        images: of these classes alone.
        renumbering: (classes of the whole,) int64, the new label of each.
    """

    images: Images
    renumbering: NDArray[np.int64]

    @property
    def keys(self) -> Sequence[str]:
        return self.images.keys

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.renumbering[self.images.labels]

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        return self.images.load(index)

    def close(self) -> None:
        self.images.close()


@dataclass(frozen=True)
class OfClasses:
    """The images of some classes of a source, under the keys that they have there.

    Attributes:
        whole: the source.
        classes: M of its class names, in the order that labels are to have.

    Raises:
        StoreError: a name is unknown or there twice.
    """

    whole: Source
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.classes if name not in self.whole.classes]
        if unknown:
            raise StoreError(
                f"classes {unknown} are not among the {len(self.whole.classes)} of the {self.whole.kind} source, which "
                f"begin with {list(self.whole.classes[:5])}."
            )
        if len(set(self.classes)) < len(self.classes):
            raise StoreError(f"classes {list(self.classes)} name one twice: give each once.")

    @cached_property
    def _renumbering(self) -> NDArray[np.int64]:
        """(classes of the whole,) int64; -1 for those that are left out, which no image of ours has."""
        return np.array(
            [self.classes.index(name) if name in self.classes else -1 for name in self.whole.classes], np.int64
        )

    @cached_property
    def _members(self) -> NDArray[np.int64]:
        """(N,) int64 positions of our images in the whole source."""
        return np.flatnonzero(self._renumbering[self.whole.labels] >= 0)

    @cached_property
    def keys(self) -> Sequence[str]:
        """N keys, as in the whole source."""
        return [self.whole.keys[place] for place in self._members]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64 positions in :attr:`classes`."""
        return self._renumbering[self.whole.labels[self._members]]

    @property
    def kind(self) -> str:
        """Of the whole source."""
        return self.whole.kind

    @property
    def options(self) -> dict[str, Any]:
        """Of the whole source, and the classes."""
        return self.whole.options | {"classes": list(self.classes)}

    @property
    def encoding(self) -> Encoding:
        """Of the whole source."""
        return self.whole.encoding

    @property
    def digest(self) -> str:
        """Of the whole source and the classes."""
        return value_digest([self.whole.digest, self.classes])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) int64 bytes."""
        return self.whole.sizes[self._members]

    @property
    def stamps(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return self.whole.stamps[self._members]

    @property
    def listing(self) -> Listing | None:
        """Of the whole source, if it has files to list: what another part of the work opens it from."""
        return getattr(self.whole, "listing", None)

    def select(self, indices: NDArray[np.int64]) -> Images:
        """These images, without the rest."""
        return _Relabelled(self.whole.select(self._members[indices]), self._renumbering)

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        """As of the whole source."""
        return self.whole.load(int(self._members[index]))

    def close(self) -> None:
        """Close the whole source."""
        self.whole.close()
