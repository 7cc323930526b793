"""A folder with one subfolder of image files per class."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import value_digest
from paws_hpc.store.format import Encoding, StoreError

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"),
)
"""Files with other extensions (lists, checksums, archives) are not images and are passed over."""


class ImageFolder:
    """Images at ``root/<class>/**/<file>``; the key is the path below ``root`` with forward slashes.

    The digest covers keys and file sizes: the images themselves are not read before they are packed.
    """

    kind = "folder"
    encoding: Encoding = "jpeg"

    def __init__(self, root: Path) -> None:
        """List the images.

        Raises:
            StoreError: ``root`` is not a folder, has no class folders, or a class folder has no images.
        """
        self.root = root
        self.options: dict[str, Any] = {}
        self.classes = _class_names(root)
        files: list[tuple[str, int]] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = sorted(_images_below(root, name))
            if not found:
                raise StoreError(f"class folder {root / name} has no images ({_known()}). Fill it or remove it.")
            files += found
            labels += [label] * len(found)
        self.keys = [key for key, _ in files]
        self.labels: NDArray[np.int64] = np.array(labels, dtype=np.int64)
        self._sizes = [size for _, size in files]

    @cached_property
    def digest(self) -> str:
        """Hash of all keys with their file sizes."""
        return value_digest([self.keys, self._sizes])

    def load(self, index: int) -> bytes:
        """Return the file of image ``index``."""
        return (self.root / self.keys[index]).read_bytes()


def _class_names(root: Path) -> tuple[str, ...]:
    """Sorted names of the folders in ``root``; hidden ones are passed over."""
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder. Point --root to the folder that holds one folder per class.")
    with os.scandir(root) as entries:
        names = tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        loose = sum(Path(name).suffix.lower() in EXTENSIONS for name in os.listdir(root))
        found = f"only {loose:,} images beside each other" if loose else "neither class folders nor images"
        raise StoreError(f"{root} has {found}. Expected is <root>/<class>/<image>, one folder per class.")
    return names


def _images_below(root: Path, name: str) -> list[tuple[str, int]]:
    """All images below one class folder as (key, bytes)."""
    found = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in EXTENSIONS and not file.startswith("."):
                # A dangling link has no size; it is listed so that packing reports it.
                found.append((path.relative_to(root).as_posix(), path.stat().st_size if path.exists() else -1))
    return found


def _known() -> str:
    return "known extensions: " + " ".join(sorted(EXTENSIONS))
