"""Images in tar archives, read where they lie: archives of class folders, archives of archives, WebDataset."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import read_at
from paws_hpc.packing.sources.base import IMAGE_EXTENSIONS, LIST_AGAIN, SourceChangedError
from paws_hpc.packing.sources.imagefolder import read_labels
from paws_hpc.packing.sources.listing import ListedSource, Listing
from paws_hpc.packing.sources.tarwalk import Member, tar_members
from paws_hpc.store.format import StoreError

_OPEN_ARCHIVES = 256
_LONGEST_LABEL = 1 << 20


class TarSource(ListedSource):
    """Images inside the tar archives at ``root``; see :func:`list_tars` and :func:`list_webdataset`."""

    def __init__(self, kind: str, root: Path, listing: Listing, options: dict[str, Any]) -> None:
        super().__init__(kind, root, listing, options)
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return TarSource, (self.kind, self.root, self.listing, self.options)

    def select(self, indices: NDArray[np.int64]) -> TarSource:
        """Return these images only."""
        return TarSource(self.kind, self.root, self.listing.take(indices), self.options)

    def load(self, index: int) -> bytes:
        """Return the file of image ``index``; SourceChangedError if the archive is not the one that was listed."""
        name = self.listing.files[self.listing.file_of[index]]
        size, offset = int(self.sizes[index]), int(self.listing.offsets[index])
        with self._lock:
            kept = self._open.get(name)
            descriptor = self._open_archive(name, int(self.stamps[index])) if kept is None else kept
            if kept is None and len(self._open) < _OPEN_ARCHIVES:
                kept = self._open[name] = descriptor
        try:
            content = read_at(descriptor, size, offset)
        finally:
            if kept is None:
                os.close(descriptor)
        if len(content) < size:
            raise SourceChangedError(
                f"{archive_path(self.root, name)} became shorter while it was packed. {LIST_AGAIN}"
            )
        return content

    def _open_archive(self, name: str, stamp: int) -> int:
        path = archive_path(self.root, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(descriptor).st_mtime_ns != stamp:
            os.close(descriptor)
            raise SourceChangedError(f"{path} changed since the source was listed. {LIST_AGAIN}")
        return descriptor

    def close(self) -> None:
        """Close the archives."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


def archive_path(root: Path, name: str) -> Path:
    """Where an archive is: ``root`` itself, or below it."""
    return root / name if root.is_dir() else root


@dataclass(frozen=True)
class _Image:
    """An image in an archive: ``path`` as in a folder source, the archive's number, and its place in it."""

    path: str
    file: int
    offset: int
    size: int


def list_tars(root: Path, labels: Path | None) -> Listing:
    """List the images of an archive, or of all ``*.tar`` below a folder.

    An archive of archives, such as ImageNet's training set, is read two levels deep: ``n01440764.tar`` in it, or
    beside others in the folder, is the class ``n01440764``. In any other archive the class is the first folder, below
    folders that all images share; or what the file ``labels`` says: lines of image name, comma or blank, class name.
    Keys are the paths that the images would have in a folder source: ``n01440764/n01440764_10026.JPEG``.

    Raises:
        StoreError: an archive is damaged or hostile, or an image has no class.
    """
    names = _archives(root)
    images = []
    for number, name in enumerate(names):
        for path, member in _members(archive_path(root, name)):
            file = PurePosixPath(path)
            if file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith("."):
                images.append(_Image(path, number, member.offset, member.size))
    if not images:
        raise StoreError(f"{root} has no images (known extensions: {' '.join(sorted(IMAGE_EXTENSIONS))}).")
    if labels is not None:
        class_of = list(map(_classes_from(labels), images))
    else:
        images = _in_class_folders(root, names, images)
        class_of = [image.path.split("/")[0] for image in images]
    return _listing(root, names, images, class_of, tuple(sorted(set(class_of))))


def _archives(root: Path) -> tuple[str, ...]:
    """Names of the archives: of ``root`` itself, or sorted below it."""
    if root.is_file():
        return (root.name,)
    names = tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar") if path.is_file()))
    if not names:
        raise StoreError(f"{root} is neither a tar archive nor a folder with *.tar files.")
    return names


def _members(path: Path) -> Iterator[tuple[str, Member]]:
    """Files of an archive and of the archives in it, each with the path of a folder source."""
    with open(path, "rb") as file:
        for member in tar_members(file.fileno(), str(path)):
            name = str(PurePosixPath(member.name))
            if name.endswith(".tar"):
                end, inner = member.offset + member.size, f"{path}: {name}"
                for part in tar_members(file.fileno(), inner, begin=member.offset, end=end):
                    if part.name.endswith(".tar"):
                        raise StoreError(f"{inner} holds the archive {part.name!r}: archives are read two levels deep.")
                    yield f"{name.removesuffix('.tar')}/{PurePosixPath(part.name)}", part
            else:
                yield name, member


def _in_class_folders(root: Path, names: tuple[str, ...], images: list[_Image]) -> list[_Image]:
    """Give each image a path that begins with its class."""
    loose = [image for image in images if "/" not in image.path]
    if not loose:  # take away leading folders that all images share, as long as a class folder is left
        parts = [image.path.split("/") for image in images]
        fewest, shared = min(map(len, parts)), 0
        while fewest > shared + 2 and len({part[shared] for part in parts}) == 1:
            shared += 1
        return [replace(image, path="/".join(part[shared:])) for part, image in zip(parts, images, strict=True)]
    if root.is_dir() and len(loose) == len(images):  # an archive for each class, beside each other
        return [replace(image, path=f"{PurePosixPath(names[image.file]).stem}/{image.path}") for image in images]
    raise StoreError(
        f"{archive_path(root, names[loose[0].file])}: image {loose[0].path!r} is in no class folder, so its class is "
        "not known. Give --labels FILE with a line '<image>,<class>' for each image, or archives of class folders."
    )


def _classes_from(labels: Path) -> Callable[[_Image], str]:
    """What maps an image to its class by a list (:func:`read_labels`)."""
    class_of = read_labels(labels)

    def of_image(image: _Image) -> str:
        path = PurePosixPath(image.path)
        for name in (image.path, path.name, path.stem):
            if name in class_of:
                return class_of[name]
        raise StoreError(f"{labels} has no line for image {image.path!r}.")

    return of_image


def _listing(
    root: Path, names: tuple[str, ...], images: list[_Image], class_of: list[str], classes: tuple[str, ...]
) -> Listing:
    """Put the images into columns, sorted by key as a folder would be."""
    label_of = {name: label for label, name in enumerate(classes)}
    order = sorted(zip(class_of, images, strict=True), key=lambda entry: (entry[0], entry[1].path))
    for (_, first), (_, second) in pairwise(order):
        if first.path == second.path:
            where = " and ".join(dict.fromkeys((names[first.file], names[second.file])))
            raise StoreError(f"image {first.path!r} occurs twice in {where}: names must be distinct. Remove one.")
    stamps = np.array([archive_path(root, name).stat().st_mtime_ns for name in names], dtype=np.int64)
    files, sizes, offsets = np.array([(image.file, image.size, image.offset) for _, image in order], dtype=np.int64).T
    return Listing(
        classes=classes,
        keys=[image.path for _, image in order],
        labels=np.array([label_of[name] for name, _ in order], dtype=np.int64),
        sizes=sizes,
        stamps=stamps[files],
        files=names,
        file_of=files,
        offsets=offsets,
    )


def list_webdataset(root: Path, label_field: str) -> Listing:
    """List WebDataset archives: files that share the name before the first dot are one sample.

    A sample has one image and its label in ``.cls`` or in the field ``label_field`` of ``.json``: a number, or a name.
    Numbers give the classes ``0`` to the largest; names are sorted. The key is the path of the image.

    Raises:
        StoreError: an archive is damaged or hostile, or a sample has no image, two images, or no label.
    """
    names = _archives(root)
    found: list[_Image] = []
    labels: list[int | str] = []
    for number, name in enumerate(names):
        path = archive_path(root, name)
        with open(path, "rb") as file:
            for sample, parts in _samples(file.fileno(), path).items():
                images = [part for name, part in parts.items() if f".{name.rpartition('.')[2]}" in IMAGE_EXTENSIONS]
                if len(images) != 1:
                    raise StoreError(
                        f"{path}: sample {sample!r} has {len(images)} images ({', '.join(parts)}), it needs one."
                    )
                image = images[0]
                found.append(_Image(str(PurePosixPath(image.name)), number, image.offset, image.size))
                labels.append(_label(file.fileno(), parts, label_field, sample, path))
    if not found:
        raise StoreError(f"{root} has no samples.")
    numbers = [label for label in labels if isinstance(label, int)]
    if numbers and len(numbers) < len(labels):
        raise StoreError(f"{root} has labels that are numbers and labels that are names: {numbers[0]}, {labels}."[:300])
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(labels):
        raise StoreError(
            f"{root} has labels from {min(numbers)} to {max(numbers)} on {len(labels):,} images: they count from 0."
        )
    classes = tuple(map(str, range(max(numbers) + 1))) if numbers else tuple(sorted({str(label) for label in labels}))
    return _listing(root, names, found, [str(label) for label in labels], classes)


def _samples(descriptor: int, path: Path) -> dict[str, dict[str, Member]]:
    """Sample → extension in lower case → file."""
    samples: dict[str, dict[str, Member]] = {}
    for member in tar_members(descriptor, str(path)):
        folder, _, base = str(PurePosixPath(member.name)).rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue  # hidden files and files without an extension belong to no sample
        parts = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if extension.lower() in parts:
            raise StoreError(f"{path}: {member.name!r} occurs twice: names must be distinct. Remove one.")
        parts[extension.lower()] = member
    return samples


def _label(descriptor: int, parts: dict[str, Member], field: str, sample: str, path: Path) -> int | str:
    """The label of a sample."""
    part = parts.get("cls", parts.get("json"))
    if part is None or part.size > _LONGEST_LABEL:
        problem = "neither .cls nor .json" if part is None else f"a label file of {part.size:,} bytes"
        raise StoreError(f"{path}: sample {sample!r} has {problem}, so its class is not known.")
    try:
        text = read_at(descriptor, part.size, part.offset).decode()
        value = text.strip() if "cls" in parts else json.loads(text)[field]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: {part.name!r} has no label in the field {field!r} ({type(error).__name__}: {error}). "
            "Name the field with --label-field."
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise StoreError(f"{path}: {part.name!r} has the label {value!r}: it must be a number or a name.")
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10 else value
