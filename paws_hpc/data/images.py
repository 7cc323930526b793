"""Where the images of a stream come from: their store, or memory that the processes of a node share."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paws_hpc.data.samplers import Positions
from paws_hpc.data.shared_cache import SharedCache, open_shared_cache
from paws_hpc.store import ImageStore

_LOG = logging.getLogger(__name__)
_GB = 10**9


def as_tensor(image: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 in the image's own memory, which may be read-only; ``torch.from_numpy`` would warn of that."""
    return torch.from_dlpack(image)


class StoreImages:
    """Images read from their store; a context manager, so that a cache can take its place.

    Attributes:
        store: of the images.
    """

    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def pixels(self, records: Positions) -> list[NDArray[np.uint8]]:
        """n images, each (H, W, 3) uint8 RGB; errors as in ``ImageStore.images``."""
        return self.store.images(records)

    def encoded(self, records: Positions) -> list[NDArray[np.uint8]]:
        """n JPEG files, each (bytes,) uint8; errors as in ``ImageStore.read_encoded``."""
        return [np.frombuffer(payload, np.uint8) for payload in self.store.read_encoded(records)]

    def close(self) -> None:
        """Give back what is shared; the store stays open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CachedImages(StoreImages):
    """Images of which some are in a shared cache; the others are read, as are all of them once it is closed."""

    def __init__(self, store: ImageStore, cache: SharedCache) -> None:
        super().__init__(store)
        self._cache = cache

    def pixels(self, records: Positions) -> list[NDArray[np.uint8]]:
        """As of :class:`StoreImages`; those from a decoded cache are read-only views of shared memory."""
        return self._cache.pixels(records, self.store)

    def encoded(self, records: Positions) -> list[NDArray[np.uint8]]:
        """As of :class:`StoreImages`."""
        return self._cache.encoded(records, self.store)

    def close(self) -> None:
        """Leave the cache; the last process to do so removes it."""
        self._cache.close()


def cached_images(store: ImageStore, records: Positions, *, cache_gb: float, decoded: bool = True) -> StoreImages:
    """The images of a store, with ``records`` held in memory once per node as far as the budget allows.

    Decoded if that fits, else as JPEG bytes if those fit, else not at all, which is logged. Returns at once: memory is
    filled in the background, and what is not there yet is read. Pixels and errors are the same in each case. Raw stores
    hold pixels already and the kernel's page cache shares them between processes, so they have none.

    Args:
        store: of the images.
        records: (M,) positions, the labelled ones.
        cache_gb: budget of the node for them, GB (10^9 bytes); 0 turns the cache off.
        decoded: allow pixels; otherwise bytes alone, for images that are to be decoded on a GPU.
    """
    if store.encoding != "jpeg" or cache_gb <= 0:
        return StoreImages(store)
    cache = open_shared_cache(store, records, budget_bytes=round(cache_gb * _GB), decoded=decoded)
    if cache is None:
        return StoreImages(store)
    _LOG.info("%s", cache.description)
    return CachedImages(store, cache)
