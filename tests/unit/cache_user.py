"""A process that uses a shared cache, told what to do line by line.

    python -m tests.unit.cache_user STORE FOLDER [slow]

Opens the cache of all records at once and prints ``open PATH INODE CHECKSUM``; prints ``filling`` when it begins to
read the store, after which a slow one reads nothing more. ``close`` on its standard input makes it leave.
"""

import sys
import time
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paws_hpc.data.shared_cache import open_shared_cache
from paws_hpc.store import ImageStore


def main(path: str, folder: str, *, slow: bool) -> None:
    store = ImageStore.open(path)
    read = store.images

    def announced(indices: ArrayLike) -> list[NDArray[np.uint8]]:
        sys.stdout.write("filling\n")  # in one piece: several threads read
        sys.stdout.flush()
        while slow:
            time.sleep(1)
        return read(indices)

    store.images = announced  # type: ignore[method-assign]
    everything = np.arange(len(store))
    cache = open_shared_cache(store, everything, budget_bytes=10**9, folders=[Path(folder)])
    assert cache is not None
    checksum = 0
    for image in cache.pixels(everything, store):
        checksum = zlib.crc32(image, checksum)
    print("open", cache.path, cache.path.stat().st_ino, checksum, flush=True)
    assert sys.stdin.readline() == "close\n"
    cache.close()
    print("closed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], slow=sys.argv[3:] == ["slow"])
