"""Some classes of another source: ImageNet-100, or the classes that have labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import value_digest
from paws_hpc.packing.sources.base import Images, Source
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.store.format import StoreError


class OfClasses:
    """The images of some classes of a source, under the keys that they have there; see :class:`Source`."""

    def __init__(self, whole: Source, classes: tuple[str, ...]) -> None:
        """Take the images of ``classes``, in the order that labels are to have; StoreError for an unknown name."""
        unknown = [name for name in classes if name not in whole.classes]
        if unknown:
            raise StoreError(
                f"classes {unknown} are not among the {len(whole.classes)} of the {whole.kind} source, which "
                f"begin with {list(whole.classes[:5])}."
            )
        if len(set(classes)) < len(classes):
            raise StoreError(f"classes {list(classes)} name one twice: give each once.")
        new_labels = np.array([classes.index(name) if name in classes else -1 for name in whole.classes], np.int64)
        self._whole, self.classes = whole, classes
        self._members = np.flatnonzero(new_labels[whole.labels] >= 0)
        self.kind, self.encoding = whole.kind, whole.encoding
        self.options = whole.options | {"classes": list(classes)}
        self.digest = value_digest([whole.digest, classes])
        self.keys = [whole.keys[position] for position in self._members.tolist()]
        self.labels = new_labels[whole.labels[self._members]]
        self.sizes, self.stamps = whole.sizes[self._members], whole.stamps[self._members]
        # Another task of the work opens the whole source from its listing, if it has one.
        self.listing: Listing | None = getattr(whole, "listing", None)

    def select(self, indices: NDArray[np.int64]) -> Images:
        """These images, without the rest."""
        return self._whole.select(self._members[indices])

    def load(self, index: int) -> bytes | NDArray[np.uint8]:
        """As of the whole source."""
        return self._whole.load(int(self._members[index]))

    def close(self) -> None:
        """Close the whole source."""
        self._whole.close()
