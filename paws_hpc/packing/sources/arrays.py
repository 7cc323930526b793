"""Small data sets that ship as arrays: CIFAR, idx files (the MNIST family), scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import math
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.files import value_digest
from paws_hpc.packing.sources.base import position_keys
from paws_hpc.store.format import Encoding, StoreError

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TEST_DIGITS_PER_CLASS = 40


@dataclass(frozen=True)
class ArraySource:
    """A source whose images (N, H, W, 1 or 3) are all in memory."""

    kind: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: Sequence[str]
    """Zero-padded positions in the original files."""
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

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) equal sizes: H * W * C."""
        return np.full(len(self.keys), math.prod(self.images.shape[1:]), dtype=np.int64)

    @property
    def stamps(self) -> NDArray[np.int64]:
        """(N,) zeros: the digest covers the pixels."""
        return np.zeros(len(self.keys), dtype=np.int64)

    def select(self, indices: NDArray[np.int64]) -> ArraySource:
        """Copy these images."""
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            keys=[self.keys[index] for index in indices],
        )

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels (H, W, C) of image ``index``."""
        image: NDArray[np.uint8] = self.images[index]
        return image

    def close(self) -> None:
        """Nothing is open."""


def digits(*, split: str, size: int) -> ArraySource:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels as (N, size, size, 1) uint8.

    The data set has no official split. Ours is fixed, independent of any run's seed: in each class the 40 images whose
    keys have the smallest SHA-256 are the test split (400), the others train (1,397). Values 0..16 are scaled to
    0..255, then the image is enlarged bicubically: crops are cut on whole pixels, and 8 x 8 leaves them no room.
    """
    # Here, not above: it takes a second, which every command that only reads a store would pay.
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    ranks = [hashlib.sha256(f"digits {key}".encode()).hexdigest() for key in position_keys(range(len(labels)))]
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        is_test[sorted(members, key=ranks.__getitem__)[:TEST_DIGITS_PER_CLASS]] = True
    chosen = np.flatnonzero(is_test == (split == "test"))
    pixels = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in pixels]
    return ArraySource(
        kind="digits",
        images=np.stack(enlarged)[..., None],
        labels=labels[chosen],
        keys=position_keys(chosen),
        classes=tuple(str(name) for name in bunch.target_names),
        options={"split": split, "size": size},
    )


def idx(root: Path, *, split: str, kind: str = "idx", classes: tuple[str, ...] | None = None) -> ArraySource:
    """Load ``<train|t10k>-images-idx3-ubyte[.gz]`` and its labels from ``root`` as (N, H, W, 1) uint8.

    Read here and not by torchvision, which wants them unpacked in folders of its own.
    ``split`` is ``train`` or ``test`` (the files named t10k). Classes are by default named by the labels' numbers.

    Raises:
        StoreError: a file is missing, is not idx, or images and labels do not belong together.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images_path, images = _read_idx(root, f"{prefix}-images", dimensions=3)
    labels_path, labels = _read_idx(root, f"{prefix}-labels", dimensions=1)
    if len(images) != len(labels):
        raise StoreError(f"{images_path} has {len(images):,} images but {labels_path} {len(labels):,} labels.")
    if not len(images):
        raise StoreError(f"{images_path} has no images.")
    names = classes or tuple(str(label) for label in range(int(labels.max()) + 1))
    if labels.max() >= len(names):
        raise StoreError(f"{labels_path} has label {labels.max()}, but there are {len(names)} class names.")
    return ArraySource(
        kind=kind,
        images=images[..., None],
        labels=labels.astype(np.int64),
        keys=position_keys(range(len(images))),
        classes=names,
        options={"split": split},
    )


def _read_idx(root: Path, stem: str, *, dimensions: int) -> tuple[Path, NDArray[np.uint8]]:
    """Read the idx file of unsigned bytes ``<stem><-|.>idx<dimensions>-ubyte[.gz]``: magic bytes, shape, values."""
    names = [f"{stem}{separator}idx{dimensions}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise StoreError(f"{root} has no {names[0]} (or {', '.join(names[1:])}). Name their folder.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise StoreError(f"{path} cannot be read: {error}. Get the file again.") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise StoreError(f"{path} is not an idx file of bytes with {dimensions} dimensions. Get the file again.")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise StoreError(
            f"{path} has {len(content) - header:,} values, its header says {math.prod(shape):,}. Get the file again."
        )
    return path, np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


_CIFAR_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR = {
    "cifar10": ("cifar-10-batches-py", _CIFAR_TRAIN, ("test_batch",), b"labels", "batches.meta", b"label_names"),
    "cifar100": ("cifar-100-python", ("train",), ("test",), b"fine_labels", "meta", b"fine_label_names"),
}
"""Kind → folder, files of train and of test, field of the labels; file and field of the class names."""


def cifar(root: Path, *, kind: str, split: str) -> ArraySource:
    """Load a split of CIFAR in torchvision's layout as (N, 32, 32, 3) uint8, in file order; cifar100 with fine labels.

    Read here and not by torchvision, which unpickles the files: what they name would be executed.
    ``root`` is the folder with ``cifar-10-batches-py`` (``cifar-100-python``), or that folder itself.

    Raises:
        StoreError: a file is missing, is no CIFAR batch, or holds anything but plain data; it is named.
    """
    name, train, test, label_field, meta_name, names_field = _CIFAR[kind]
    folder = root / name if (root / name).is_dir() else root
    meta = load_plain_pickle(folder / meta_name)
    try:
        classes = tuple(name.decode() for name in meta[names_field])
    except (AttributeError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / meta_name} has no class names ({error}). Get the data set again.") from error
    batches = [_cifar_batch(folder / name, label_field, len(classes)) for name in (train if split == "train" else test)]
    images = np.concatenate([pixels for pixels, _ in batches])
    return ArraySource(
        kind=kind,
        images=images,
        labels=np.concatenate([labels for _, labels in batches]),
        keys=position_keys(range(len(images))),
        classes=classes,
        options={"split": split},
    )


def _cifar_batch(path: Path, label_field: bytes, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one file: images (n, 32, 32, 3) uint8 and labels (n,) int64."""
    batch = load_plain_pickle(path)
    remedy = "Get the data set again."
    try:
        rows, labels = np.asarray(batch[b"data"]), np.array(batch[label_field], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{path} is not a CIFAR batch: {error}. {remedy}") from error
    if rows.dtype != np.uint8 or rows.shape != (labels.size, 3 * 32 * 32):
        raise StoreError(f"{path} is not a CIFAR batch: {labels.size} labels, data {rows.dtype} {rows.shape}. {remedy}")
    if not labels.size or labels.min() < 0 or labels.max() >= num_classes:
        raise StoreError(f"{path} is not a CIFAR batch: its labels are not those of {num_classes} classes. {remedy}")
    # A row is the red plane, then green, then blue.
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle of containers, numbers, strings and numpy arrays; text of Python 2 arrives as bytes.

    Raises StoreError if the file is missing, no pickle, or asks for anything else, which is not executed.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. Name the folder as torchvision unpacks it.") from error
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:  # what damaged pickles are known to raise
        raise StoreError(f"{path} cannot be read as plain data: {error}. Get the data set again.") from error


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes, limited to that use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _reconstruct(array_type: object, shape: tuple[int, ...], type_code: bytes) -> NDArray[Any]:
    """How pickles begin an array: empty, filled by the state that follows."""
    if array_type is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError(f"an array of {array_type} {shape}")
    return np.ndarray((0,), dtype=np.uint8)


_NDARRAY = object()  # numpy.ndarray, which pickles name; called, it would take any bytes for pointers
_PLAIN_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows arrays and bytes and resolves no other name, so that a file cannot execute anything."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name of the short list above."""
        try:
            return _PLAIN_GLOBALS[module, name]
        except KeyError as error:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which image data does not need; nothing was executed"
            ) from error
