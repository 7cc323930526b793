"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels that ship with the package."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.packing.sources.base import ArraySource, position_keys

TEST_IMAGES_PER_CLASS = 40
_LARGEST_VALUE = 16


def digits(*, split: str, size: int) -> ArraySource:
    """Load the digits as (N, size, size, 1) uint8.

    The data set has no official split. Ours is fixed, independent of any run's seed: in each class the 40 images whose
    keys have the smallest SHA-256 are the test split (400), the others train (1,397). Values 0..16 are scaled to
    0..255, then the image is enlarged bicubically: crops are cut on whole pixels, and 8 x 8 leaves them no room.

    Args:
        split: ``train`` or ``test``.
        size: side of the stored images in pixels.
    """
    # Here, not above: it takes a second, which every command that only reads a store would pay.
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    chosen = np.flatnonzero(_is_test(labels) == (split == "test"))
    pixels = np.rint(bunch.images[chosen] * (255 / _LARGEST_VALUE)).astype(np.uint8)
    return ArraySource(
        kind="digits",
        images=np.stack([_enlarge(image, size) for image in pixels])[..., None],
        labels=labels[chosen],
        keys=position_keys(chosen),
        classes=tuple(str(name) for name in bunch.target_names),
        options={"split": split, "size": size},
    )


def _is_test(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool: the images of the test split."""
    ranks = [hashlib.sha256(f"digits {key}".encode()).hexdigest() for key in position_keys(range(len(labels)))]
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        test[sorted(members, key=ranks.__getitem__)[:TEST_IMAGES_PER_CLASS]] = True
    return test


def _enlarge(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize a grey (H, W) image to (size, size)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
