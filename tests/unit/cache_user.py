"""A process that uses a shared cache of all records of a store, told what to do line by line.

    python -m tests.unit.cache_user STORE FOLDER [stops-after COUNT]

Prints ``open PATH INODE``. On its standard input, ``read`` makes it print ``read CHECKSUM`` of all images, ``full``
makes it wait for the last record and print ``full``, ``close`` makes it leave and print ``closed``. It may stop after
so many records that it puts into the cache, as if the next one took for ever to read.
"""

import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paws_hpc.data.shared_cache import open_shared_cache
from paws_hpc.store import ImageStore


def stopping(store: ImageStore, count: int) -> ImageStore:
    """A store whose strict view gives so many records and then never another."""
    strict, lock = store.strict(), threading.Lock()
    read, left = strict.images, iter(range(count))

    def images(indices: ArrayLike) -> list[NDArray[np.uint8]]:
        with lock:
            if next(left, None) is None:
                while True:
                    time.sleep(1)
        return read(indices)

    strict.images = images  # type: ignore[method-assign]
    store.strict = lambda: strict  # type: ignore[method-assign]
    return store


def main(path: str, folder: str, manner: str = "", count: str = "0") -> None:
    store = ImageStore.open(path)
    if manner == "stops-after":
        store = stopping(store, int(count))
    everything = np.arange(len(store))
    cache = open_shared_cache(store, everything, budget_bytes=10**9, folders=[Path(folder)])
    assert cache is not None
    print("open", cache.path, cache.path.stat().st_ino, flush=True)
    for command in sys.stdin:
        match command.strip():
            case "read":
                checksum = 0
                for image in cache.pixels(everything, store):
                    checksum = zlib.crc32(image, checksum)
                print("read", checksum, flush=True)
            case "full":
                while cache.absent:
                    time.sleep(0.01)
                print("full", flush=True)
            case "close":
                cache.close()
                print("closed", flush=True)
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
