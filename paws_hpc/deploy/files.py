"""Image files that a user names, as the pixels that training would see of them. No file is trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.command import printable
from paws_hpc.packing.sources.imagefolder import flat_listing
from paws_hpc.packing.standard import standard_pixels
from paws_hpc.store import ImageStore


def image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among ``paths`` whatever their names, and the images in folders among them, as packing lists them.

    Raises:
        ValueError: a folder has no images.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        yield from (path / key for key in flat_listing(path, None).keys)


def read_image(path: Path, like: ImageStore) -> NDArray[np.uint8]:
    """Decode an image file as if it had been packed into ``like``.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file, or no image that a store takes.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a file")
    return standard_pixels(path.read_bytes(), like.manifest)


def shown(path: Path) -> str:
    """A path as text for people: one line, without what a terminal would take for a command."""
    return printable(os.fsencode(path).decode("utf-8", "replace"))
