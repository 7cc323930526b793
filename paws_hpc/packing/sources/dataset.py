"""Any data set class with ``__len__`` and ``__getitem__`` → (PIL image, label), such as torchvision's.

The user names the class, and it is imported when it is needed: packing itself imports no such library.
"""

from __future__ import annotations

import importlib
import inspect
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from paws_hpc.files import value_digest
from paws_hpc.packing.sources.base import Source, SourceChangedError, position_keys
from paws_hpc.packing.sources.imagefolder import ImageFolder, folder_listing, size_and_stamp
from paws_hpc.store.format import Encoding, StoreError

DEFAULT_MODULE = "torchvision.datasets"
"""Where a name without a module is looked up."""

_LARGEST_RAW = 64 << 10
_COMPARED = 16
_FILE_LISTS = ("samples", "imgs", "_samples", "_image_files", "_images", "images")
_LABEL_LISTS = ("targets", "_labels", "labels", "y")
_READING = threading.Lock()
"""Data sets need not be safe to share between threads, so one thread at a time takes an item."""


def dataset(name: str, root: Path, split: str | None) -> Source:
    """List the images of a data set on disk; nothing is downloaded.

    Where the class lists its files (torchvision's do under a few names) and a sample of items shows, pixel by pixel,
    that it gives those files, the files themselves are packed; keys are their paths below the folder they share.
    Otherwise every item is read once, for its label and a hash of its pixels. Images of one shape and at most 64 KiB
    are then stored raw. Keys are positions.

    Args:
        name: ``package.module:Class``, or a name in ``torchvision.datasets``.
        root: passed to the class as its first argument.
        split: passed as ``split``, ``train``, ``image_set`` or ``mode``, whichever the class has.

    Raises:
        StoreError: the class cannot be imported or opened, or does not give pairs of image and integer label.
    """
    opened = open_dataset(name, root, split)
    if not hasattr(opened, "__len__") or not hasattr(opened, "__getitem__"):
        raise StoreError(f"{name} is no data set: it gives {type(opened).__name__}, without a length or items.")
    if not len(opened):
        raise StoreError(f"data set {name} at {root} has no items.")
    files = _listed_files(opened, name)
    if files is None:
        return _read_all(opened, name, root, split)
    folder = Path(os.path.commonpath([path.parent for path, _ in files]))
    labels = np.array([label for _, label in files], dtype=np.int64)
    named = [(path.relative_to(folder).as_posix(), *size_and_stamp(path)) for path, _ in files]
    listing = folder_listing(_class_names(opened, labels), named, labels)
    return ImageFolder(folder, listing, kind="dataset", options={"class": _full_name(name), "split": split})


def _full_name(name: str) -> str:
    return name if ":" in name else f"{DEFAULT_MODULE}:{name}"


def open_dataset(name: str, root: Path, split: str | None) -> Any:
    """Import the class and open the data set, without transforms."""
    module, _, attribute = _full_name(name).partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(kind).parameters
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise StoreError(
            f"data set {name!r} cannot be imported ({error}). Give package.module:Class or a name in {DEFAULT_MODULE}."
        ) from error
    arguments: dict[str, Any] = {"download": False} if "download" in parameters else {}
    word = next((word for word in ("split", "image_set", "mode", "train") if word in parameters), None)
    if word == "train":
        if split not in ("train", "test"):
            raise StoreError(f"data set {name} has the splits train and test, not {split!r}: give --split.")
        arguments["train"] = split == "train"
    elif split is not None:
        if word is None:
            raise StoreError(f"data set {name} has no splits: leave --split {split} out.")
        arguments[word] = split
    try:
        return kind(str(root), **arguments)
    except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise StoreError(f"data set {name} cannot be opened at {root} with {arguments}: {error}") from error


def _item(opened: Any, index: int, name: str) -> tuple[Any, int]:
    """One (image, label) pair."""
    try:
        with _READING:
            item = opened[index]
    except Exception as error:  # a class that others wrote, which raises what it likes
        raise StoreError(f"data set {name} cannot give item {index}: {type(error).__name__}: {error}") from error
    if not isinstance(item, Sequence) or len(item) < 2:
        raise StoreError(f"data set {name} gives {type(item).__name__} as item {index}, not (image, label).")
    image, label = item[0], item[1]
    if not isinstance(label, int) and np.ndim(label) == 0 and hasattr(label, "item"):
        label = label.item()  # a number of numpy or torch
    if not isinstance(label, int) or label < 0:
        raise StoreError(f"data set {name} gives label {label!r} in item {index}; classes are numbers from 0.")
    return image, int(label)


def _pixels(image: Any, index: int, name: str) -> NDArray[np.uint8]:
    """Pixels (H, W, 1 or 3) uint8 of an item."""
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise StoreError(f"data set {name} gives {type(image).__name__} in item {index}; PIL images are needed.")
    pixels: NDArray[np.uint8] = np.ascontiguousarray(image if image.ndim == 3 else image[..., None])
    if pixels.shape[-1] not in (1, 3) or not pixels.size:
        raise StoreError(f"data set {name} gives an image of shape {pixels.shape} in item {index}.")
    return pixels


def _class_names(opened: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Names that the data set gives its classes, or their numbers."""
    given = getattr(opened, "classes", None)
    if isinstance(given, list | tuple) and len(given) > labels.max():
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in given)
    return tuple(map(str, range(int(labels.max()) + 1)))


def _listed_files(opened: Any, name: str) -> list[tuple[Path, int]] | None:
    """Files and labels as the data set lists them; None if it does not, or gives something else than its files."""
    for attribute in _FILE_LISTS:
        entries = getattr(opened, attribute, None)
        if not isinstance(entries, list | tuple) or len(entries) != len(opened):
            continue
        if all(isinstance(entry, str | os.PathLike) for entry in entries):
            lists = [getattr(opened, label_list, None) for label_list in _LABEL_LISTS]
            entries = list(zip(entries, next((labels for labels in lists if labels is not None), ()), strict=False))
        files = []
        for entry in entries:
            match entry:
                case (str() | os.PathLike() as path, int() | np.integer() as label):
                    files.append((Path(path), int(label)))
        if len(files) == len(opened) and _gives_its_files(opened, files, name):
            return files
    return None


def _gives_its_files(opened: Any, files: list[tuple[Path, int]], name: str) -> bool:
    """Compare a sample of items with the files that they should come from."""
    for index in sorted({round(place) for place in np.linspace(0, len(files) - 1, _COMPARED)}):
        path, listed = files[index]
        if not path.is_file():
            return False
        try:
            image, label = _item(opened, index, name)
            with Image.open(path) as file:
                pixels = np.asarray(file.convert("RGB"))
        except (StoreError, OSError):  # packing the file will say what is wrong with it, or leave it out
            continue
        same = label == listed and isinstance(image, Image.Image)
        if not same or not np.array_equal(pixels, np.asarray(image.convert("RGB"))):
            return False
    return True


def _read_all(opened: Any, name: str, root: Path, split: str | None) -> DatasetSource:
    """Read every item once."""
    shapes: set[tuple[int, ...]] = set()
    labels, sizes = np.empty((2, len(opened)), dtype=np.int64)
    hashes = np.empty(len(opened), dtype=np.uint64)
    for index in range(len(opened)):
        image, labels[index] = _item(opened, index, name)
        pixels = _pixels(image, index, name)
        sizes[index], hashes[index] = pixels.size, xxhash.xxh3_64_intdigest(pixels.data)
        shapes.add(pixels.shape)
    raw = len(shapes) == 1 and int(sizes[0]) <= _LARGEST_RAW
    return DatasetSource(
        name=name,
        root=root,
        split=split,
        encoding="raw" if raw else "jpeg",
        classes=_class_names(opened, labels),
        positions=np.arange(len(opened)),
        labels=labels,
        sizes=sizes,
        hashes=hashes,
    )


_opened_once = cache(open_dataset)


@dataclass(frozen=True)
class DatasetSource:
    """Items of a data set as its class gives them; another process opens the data set again."""

    name: str
    root: Path
    split: str | None
    encoding: Encoding
    classes: tuple[str, ...]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    """(n,) of the items' pixels, as the first pass over them saw them."""
    kind: str = "dataset"

    @cached_property
    def keys(self) -> Sequence[str]:
        """Positions in the data set."""
        return position_keys(self.positions)

    @property
    def options(self) -> dict[str, Any]:
        """Class and split."""
        return {"class": _full_name(self.name), "split": self.split}

    @property
    def stamps(self) -> NDArray[np.int64]:
        """(n,) zeros: the digest covers the pixels."""
        return np.zeros(len(self.positions), dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Hash of pixels, labels, keys and class names."""
        return value_digest([self.hashes.tolist(), self.labels.tolist(), self.keys, self.classes])

    def select(self, indices: NDArray[np.int64]) -> DatasetSource:
        """Return these items only."""
        columns = {name: getattr(self, name)[indices] for name in ("positions", "labels", "sizes", "hashes")}
        return replace(self, **columns)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels (H, W, 1 or 3) of image ``index``; SourceChangedError if the first pass saw others."""
        position = int(self.positions[index])
        image, _ = _item(_opened_once(self.name, self.root, self.split), position, self.name)
        pixels = _pixels(image, position, self.name)
        if xxhash.xxh3_64_intdigest(pixels.data) != self.hashes[index]:
            raise SourceChangedError(
                f"data set {self.name} gives other pixels for item {position} than before: it is random, or was "
                "changed."
            )
        return pixels

    def close(self) -> None:
        """Nothing is kept open that is not needed for the next shard."""
