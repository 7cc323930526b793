"""CIFAR10 and CIFAR100 in torchvision's on-disk layout: pickled batches, read without executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.packing.sources.base import ArraySource, position_keys
from paws_hpc.store.format import StoreError

_SIDE = 32
_LAYOUTS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "folder": "cifar-10-batches-py",
        "train": [f"data_batch_{number}" for number in range(1, 6)],
        "test": ["test_batch"],
        "labels": b"labels",
        "meta": "batches.meta",
        "names": b"label_names",
    },
    "cifar100": {
        "folder": "cifar-100-python",
        "train": ["train"],
        "test": ["test"],
        "labels": b"fine_labels",
        "meta": "meta",
        "names": b"fine_label_names",
    },
}


def cifar(root: Path, *, kind: str, split: str) -> ArraySource:
    """Load a split of CIFAR as (N, 32, 32, 3) uint8, in file order; keys are positions in that order.

    Args:
        root: the folder with ``cifar-10-batches-py`` (``cifar-100-python``), or that folder itself.
        kind: ``cifar10`` or ``cifar100`` (fine labels).
        split: ``train`` or ``test``.

    Raises:
        StoreError: a file is missing, is no CIFAR batch, or holds anything but plain data; it is named.
    """
    layout = _LAYOUTS[kind]
    folder = root / layout["folder"] if (root / layout["folder"]).is_dir() else root
    meta = load_plain_pickle(folder / layout["meta"])
    try:
        classes = tuple(name.decode() for name in meta[layout["names"]])
    except (AttributeError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / layout['meta']} has no class names ({error}). Get the data set again.") from error
    batches = [_batch(folder / name, layout["labels"], len(classes)) for name in layout[split]]
    images = np.concatenate([pixels for pixels, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    return ArraySource(
        kind=kind,
        images=images,
        labels=labels,
        keys=position_keys(range(len(images))),
        classes=classes,
        options={"split": split},
    )


def _batch(path: Path, label_field: bytes, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one file: images (n, 32, 32, 3) uint8 and labels (n,) int64."""
    batch = load_plain_pickle(path)
    remedy = "Get the data set again."
    try:
        rows, labels = np.asarray(batch[b"data"]), np.array(batch[label_field], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{path} is not a CIFAR batch: {error}. {remedy}") from error
    if rows.dtype != np.uint8 or rows.shape != (labels.size, 3 * _SIDE * _SIDE):
        raise StoreError(f"{path} is not a CIFAR batch: {labels.size} labels, data {rows.dtype} {rows.shape}. {remedy}")
    if not labels.size or labels.min() < 0 or labels.max() >= num_classes:
        raise StoreError(f"{path} is not a CIFAR batch: its labels are not those of {num_classes} classes. {remedy}")
    # A row is the red plane, then green, then blue.
    return np.ascontiguousarray(rows.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)), labels


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle of containers, numbers, strings and numpy arrays; text of Python 2 arrives as bytes.

    Raises:
        StoreError: the file is missing, no pickle, or asks for anything else, which is named and not executed.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. Point --root to the folder as torchvision unpacks it.") from error
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


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes: ``_codecs.encode`` of text, here limited to its one honest use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


_NDARRAY = object()
"""Stands for the class numpy.ndarray, which pickles name but need not call."""


def _reconstruct(array_type: object, shape: tuple[int, ...], type_code: bytes) -> NDArray[Any]:
    """How pickles begin an array: empty, filled by the state that follows."""
    if array_type is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError(f"an array of {array_type} {shape}")
    return np.ndarray((0,), dtype=np.uint8)


_PLAIN_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
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
