"""Folders of image files: one subfolder per class, or flat with a list of labels or none."""

from __future__ import annotations

import csv
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.files import read_lines
from paws_hpc.packing.sources.base import IMAGE_EXTENSIONS, LIST_AGAIN, SourceChangedError
from paws_hpc.packing.sources.listing import ListedSource, Listing
from paws_hpc.store.format import StoreError

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Usual names of a folder of test images beside ``train``, the likeliest first."""
UNLABELLED = "unlabelled"
"""The only class of a store whose labels nobody knows."""


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
    if "train" in classes and set(classes) <= {"train", *TEST_FOLDERS}:
        raise StoreError(f"{root} has {' and '.join(f'{name}/' for name in classes)}, which are no classes. Pack each.")
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


def flat_listing(root: Path, labels: Path | None) -> Listing:
    """List the images anywhere below ``root``, whose folders mean nothing: all, or those that ``labels`` has.

    Without labels all are of one class, :data:`UNLABELLED`.

    Raises:
        StoreError: there are no images, or ``labels`` cannot be read or names a file that is not there.
    """
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder. Point to the folder of the images.")
    files = sorted(_images_below(root, "."))
    if not files:
        raise StoreError(f"{root} has no images (known extensions: {' '.join(sorted(IMAGE_EXTENSIONS))}).")
    if labels is None:
        return folder_listing((UNLABELLED,), files, np.zeros(len(files), dtype=np.int64))
    class_of = read_labels(labels)
    by_name: dict[str, list[tuple[str, int, int]]] = {}
    for file in files:
        for name in {file[0], PurePosixPath(file[0]).name}:
            by_name.setdefault(name, []).append(file)
    heading, *others = class_of
    if others and heading not in by_name and class_of[heading] not in {class_of[name] for name in others}:
        del class_of[heading]
    for name in class_of:
        if len(by_name.get(name, ())) != 1:
            found = f"{len(by_name[name])} images of that name" if name in by_name else "no such image"
            raise StoreError(f"{labels} has a label for {name!r}, but {root} has {found}. Correct the list.")
    classes = tuple(sorted(set(class_of.values())))
    listed = sorted((by_name[name][0], label) for name, label in class_of.items())
    return folder_listing(
        classes, [file for file, _ in listed], np.array([classes.index(label) for _, label in listed], np.int64)
    )


def read_labels(path: Path) -> dict[str, str]:
    """Image → label of a list: lines '<image>,<label>', of which the first may be a heading.

    The first line says whether commas, semicolons or tabs separate. A line without is two words. Of a heading
    ``…,PredictionString``, as Kaggle writes it, the first word is the label.

    Raises:
        StoreError: the file cannot be read, or a line does not give a label, or another one than before.
    """
    try:
        lines = read_lines(path)
        first = next((line for line in lines if line.strip()), "")
        separator = next(
            (mark for mark in ",;\t" if mark in first), ","
        )  # spreadsheets of some languages save ; or tabs
        rows = list(csv.reader(lines, delimiter=separator))
    except (OSError, ValueError, csv.Error) as error:
        raise StoreError(
            f"{path} cannot be read: {error}. It needs lines of '<image>,<class>', saved as UTF-8."
        ) from error
    kaggle = bool(rows) and rows[0][-1:] == ["PredictionString"]
    label_of: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        words = [word.strip() for word in (row[:2] if len(row) > 1 else " ".join(row).split())]
        if not any(words):
            continue
        label = words[-1].split()[0] if kaggle and words[-1] else words[-1]
        if len(words) != 2 or not all(words):
            raise StoreError(
                f"{path}, line {number}: {' '.join(words)!r} is not '<image>,<class>', with a comma where a name has "
                "blanks."
            )
        if (former := label_of.setdefault(words[0], label)) != label:
            raise StoreError(
                f"{path}, line {number}: {words[0]!r} is {label!r}, but {former!r} before. Correct one of the lines."
            )
    if not label_of:
        raise StoreError(f"{path} has no lines '<image>,<class>'.")
    return label_of


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


def hidden(name: str) -> bool:
    """Whether a file or folder is passed over: one that begins with a dot, or a NAS's folder of thumbnails."""
    return name.startswith((".", "@eaDir"))


def entries(folder: Path) -> tuple[list[str], int]:
    """Names of the folders in it, sorted, and how many images are beside them; hidden ones do not count."""
    with os.scandir(folder) as found:
        visible = [entry for entry in found if not hidden(entry.name)]
    images = sum(Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS for entry in visible if not entry.is_dir())
    return sorted(entry.name for entry in visible if entry.is_dir()), images


def _class_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder. Name the folder that holds one folder per class.")
    names, loose = entries(root)
    if not names:
        found = f"only {loose:,} images beside each other" if loose else "neither class folders nor images"
        raise StoreError(f"{root} has {found}. Expected is <root>/<class>/<image>, one folder per class.")
    return tuple(names)


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
        folders[:] = sorted(name for name in folders if not hidden(name))  # so that an error is the same everywhere
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in IMAGE_EXTENSIONS and not hidden(file):
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
