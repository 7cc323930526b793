"""A folder with one subfolder of image files per class."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.packing.sources.base import IMAGE_EXTENSIONS, LIST_AGAIN, SourceChangedError
from paws_hpc.packing.sources.listing import ListedSource, Listing
from paws_hpc.store.format import StoreError


class ImageFolder(ListedSource):
    """Images at ``root/<class>/**/<file>``; the key is the path below ``root`` with forward slashes."""

    def __init__(
        self, root: Path, listing: Listing | None = None, *, kind: str = "folder", options: dict[str, Any] | None = None
    ) -> None:
        """List the images, unless somebody did already; StoreError if ``root`` has no class folders with images."""
        super().__init__(kind, root, _list(root) if listing is None else listing, options or {})

    def select(self, indices: NDArray[np.int64]) -> ImageFolder:
        """Return these images only."""
        return ImageFolder(self.root, self.listing.take(indices), kind=self.kind, options=self.options)

    def load(self, index: int) -> bytes:
        """Return the file of image ``index``; SourceChangedError if its size or time is not the listed one."""
        path = self.root / self.keys[index]
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.sizes[index], self.stamps[index]):
                raise SourceChangedError(f"{path} changed since the source was listed. {LIST_AGAIN}")
            return file.read()

    def close(self) -> None:
        """Nothing stays open."""


def _list(root: Path) -> Listing:
    """Walk the class folders; sorted, so that the order does not depend on the file system."""
    classes = _class_names(root)
    files: list[tuple[str, int, int]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(root, name))
        if not found:
            known = " ".join(sorted(IMAGE_EXTENSIONS))
            raise StoreError(
                f"class folder {root / name} has no images (known extensions: {known}). Fill it or remove it."
            )
        files += found
        labels += [label] * len(found)
    return folder_listing(classes, files, np.array(labels, dtype=np.int64))


def folder_listing(classes: tuple[str, ...], files: list[tuple[str, int, int]], labels: NDArray[np.int64]) -> Listing:
    """The listing of files that lie in no archive, given as (key, bytes, modification time in ns)."""
    nothing = np.zeros(len(files), dtype=np.int64)
    return Listing(
        classes=classes,
        keys=[key for key, _, _ in files],
        labels=labels,
        sizes=np.array([size for _, size, _ in files], dtype=np.int64),
        stamps=np.array([stamp for _, _, stamp in files], dtype=np.int64),
        files=(),
        file_of=nothing,
        offsets=nothing,
    )


def _class_names(root: Path) -> tuple[str, ...]:
    """Sorted names of the folders in ``root``; hidden ones are passed over."""
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder. Point --root to the folder that holds one folder per class.")
    with os.scandir(root) as entries:
        names = tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        loose = sum(Path(name).suffix.lower() in IMAGE_EXTENSIONS for name in os.listdir(root))
        found = f"only {loose:,} images beside each other" if loose else "neither class folders nor images"
        raise StoreError(f"{root} has {found}. Expected is <root>/<class>/<image>, one folder per class.")
    return names


def _images_below(root: Path, name: str) -> list[tuple[str, int, int]]:
    """All images below one class folder as (key, bytes, modification time in ns)."""
    found = []
    walked: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root / name, followlinks=True, onerror=_refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in walked:
            raise StoreError(
                f"{folder} is a link to a folder that was listed already: its images would be packed twice."
            )
        walked.add((status.st_dev, status.st_ino))
        folders.sort()  # so that an error is the same everywhere
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in IMAGE_EXTENSIONS and not file.startswith("."):
                found.append((path.relative_to(root).as_posix(), *size_and_stamp(path)))
    return found


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would be left out without a word."""
    raise error


def size_and_stamp(path: Path) -> tuple[int, int]:
    """Size and modification time; zeros for a dangling link, which is listed so that packing reports it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is called like an image but is not a file. Remove it.")
    return status.st_size, status.st_mtime_ns
