"""Which images are labelled, and which validate: drawn from a seed or read from a file, and kept by key.

A split lies beside the shards as ``<store>/splits/<name>.json``. It names its images by key, so that repacking a store
does not change which are labelled, and it records the digest of its data set.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paws_hpc.data.config import LabelsConfig
from paws_hpc.data.samplers import Positions, cipher_key, permute
from paws_hpc.files import read_json, read_lines, value_digest, write_record
from paws_hpc.store import ImageStore

_VERSION = 1
_LABELLED, _VALIDATION, _FOLDS = 11, 12, 13  # so that the draws of one seed are independent
_MOST_FOLDS = 4
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)
"""Of a store that others share, where this user may write nothing: the run does without what would lie there."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """A named set of images of one store."""

    name: str
    origin: dict[str, Any]  # seed and number per class, ``all``, or a list's name and digest
    dataset: str  # digest of the store
    keys: tuple[str, ...]  # sorted by class, then in the order drawn or read

    @property
    def digest(self) -> str:
        """SHA-256 of data set and keys: two runs with equal digests used the same labels."""
        return value_digest([self.dataset, self.keys])

    def records(self, store: ImageStore) -> Positions:
        """(M,) positions of the split's images in its store."""
        return store.find(self.keys)


def labelled_and_validation(
    store: ImageStore, config: LabelsConfig, *, seed: int, save: bool = True
) -> tuple[Split, Split | None]:
    """The two splits of a run, the second None if nothing is held out.

    They are loaded if they exist and otherwise made and, if ``save``, saved beside the shards.

    Raises:
        ValueError: a class has too few images, a listed image is not in the store, the two splits overlap, or a saved
            split belongs to other data.
        FileNotFoundError: a split file is missing.
    """
    config.check_complete()
    files = {
        kind: None if file is None else Path(file.replace("{seed}", str(seed)))
        for kind, file in (("labelled", config.file), ("validation", config.validation_file))
    }

    def make(kind: str, other: Split | None) -> Split:
        if (file := files[kind]) is not None:
            text = _read_list(file)
            origin = {"file": file.name, "sha256": value_digest(text)}
            return _load_or_make(store, f"{kind}-{file.stem}", origin, lambda: _resolve(text, store, file), save=save)
        return _drawn(store, kind, config, seed=seed, apart_from=other, save=save)

    if not config.validated:
        return make("labelled", None), None
    if files["validation"] is None and not config.all:
        labelled = make("labelled", None)
        validation = make("validation", labelled)
    else:  # images that are drawn, or all others, leave out those that are listed
        validation = make("validation", None)
        labelled = make("labelled", validation)
    if shared := set(labelled.keys) & set(validation.keys):
        raise ValueError(
            f"{len(shared)} images are both labelled and for validation, {min(shared)!r} among them "
            f"(splits {labelled.name!r} and {validation.name!r} of {store.path}). Selection would see its own training "
            "images: make the two lists disjoint."
        )
    return labelled, validation


def _drawn(
    store: ImageStore, kind: str, config: LabelsConfig, *, seed: int, apart_from: Split | None, save: bool
) -> Split:
    """The split of a draw that leaves out the images of ``apart_from``; None per class takes all others."""
    per_class = config.per_class if kind == "labelled" else config.validation_per_class
    origin: dict[str, Any] = {"all": True} if per_class is None else {"per_class": per_class, "seed": seed}
    name = f"{kind}-all" if per_class is None else f"{kind}-{per_class}-per-class-seed-{seed}"
    if apart_from is not None:
        origin["apart_from"] = value_digest(apart_from.keys)
        name += f"-without-{origin['apart_from'][:8]}"
    salt = _LABELLED if kind == "labelled" else _VALIDATION
    make = partial(_draw, store, config, per_class, seed=seed, salt=salt, apart_from=apart_from)
    return _load_or_make(store, name, origin, make, save=save)


def _load_or_make(
    store: ImageStore, name: str, origin: dict[str, Any], make: Callable[[], list[str]], *, save: bool
) -> Split:
    """Load the split of this name and origin, or make it, and save it if wanted."""
    path = store.path / "splits" / f"{name}.json"
    if path.exists():
        split = load_split(path)
        if split.origin == origin and split.dataset == store.digest:
            return split
        fault = f"was made for {split.origin}, but this run needs {origin}"
        if split.dataset != store.digest:
            fault = f"was drawn from other images than {store.path} has now"
        raise ValueError(f"{path} {fault}. Remove it if no run needs it any more.")
    split = Split(name, origin, store.digest, tuple(make()))
    if not save:
        return split
    content = {"version": _VERSION, "name": name, "origin": origin, "dataset": split.dataset, "digest": split.digest}
    try:
        write_record(path, content | {"keys": list(split.keys)})
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _LOG.info("%s cannot be written, so the split %s is made again at every start.", path.parent, name)
    return split


def folds(labels: Positions, classes: Sequence[str], *, seed: int) -> list[NDArray[np.bool_]]:
    """Divide (M,) labelled images for cross-validation: masks (M,) of the images that each fold holds out.

    Every class, of which ``classes`` are the names, is spread evenly over four folds, or as many as its labels where
    one has fewer.

    Raises:
        ValueError: a class has one label, so that none would be left to learn from.
    """
    present, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[present[counts.argmin()]]!r} has one labelled image, and cross-validation holds some out "
            "in turn. Label two of each class, or hold out images with labels.validation_per_class or "
            "labels.validation_file."
        )
    number, of = min(_MOST_FOLDS, int(counts.min())), np.empty(len(labels), np.int64)
    for place, (label, count) in enumerate(zip(present, counts, strict=True)):  # so that what is over is spread too
        drawn = permute(np.arange(count), int(count), cipher_key(seed, _FOLDS, int(label)))
        of[labels == label] = (drawn + place) % number
    return [of == fold for fold in range(number)]


def load_split(path: Path) -> Split:
    """Read a split and check its digest.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: it is of another version, or was edited so that its digest no longer fits.
    """
    value = read_json(path)
    fields = {"version", "name", "origin", "dataset", "digest", "keys"}
    if not isinstance(value, dict) or value.keys() != fields:
        raise ValueError(f"{path} is not a split: it must have {', '.join(sorted(fields))}. Remove it to make it anew.")
    if value["version"] != _VERSION:
        raise ValueError(f"{path} has version {value['version']!r}; this program reads version {_VERSION}.")
    split = Split(value["name"], value["origin"], value["dataset"], tuple(value["keys"]))
    if split.digest != value["digest"]:
        raise ValueError(f"{path} does not fit its digest: it was edited or damaged. Remove it to make it anew.")
    return split


def _check_enough(
    store: ImageStore, config: LabelsConfig, per_class: int, *, labelled: bool, apart_from: Split | None
) -> None:
    """Raise ValueError, with a number that suits all classes and both sets, if a class has too few images to draw."""
    counts = np.bincount(store.labels, minlength=len(store.classes))
    if apart_from is not None:
        counts -= np.bincount(store.labels[apart_from.records(store)], minlength=len(store.classes))
    scarce = int(counts.argmin())
    if (fewest := int(counts[scarce])) < per_class:
        field = "labels.per_class" if labelled else "labels.validation_per_class"
        kept = (config.validation_per_class or 0) if labelled and apart_from is None else 0
        apart = f", of which {kept} are for validation" if kept else " others" if apart_from else ""
        most = fewest - kept
        remedy = f"Draw at most {most} per class." if most > 0 else "Label more of it, or pack the others by --classes."
        raise ValueError(
            f"{field}={per_class} images of each class are to be drawn, but class {store.classes[scarce]!r} of "
            f"{store.path} has only {fewest}{apart}. {remedy}"
        )


def _draw(
    store: ImageStore, config: LabelsConfig, per_class: int | None, *, seed: int, salt: int, apart_from: Split | None
) -> list[str]:
    """Draw from each class by the order of its keys: the same images however the store was shuffled.

    Memory holds the keys of one class and 8 bytes per record.
    """
    elsewhere = set() if apart_from is None else set(apart_from.keys)
    count = len(store.classes)
    narrow = store.labels.astype(np.min_scalar_type(count - 1))  # numpy sorts 8 and 16 bits in linear time
    by_class = np.split(np.argsort(narrow, kind="stable"), np.cumsum(np.bincount(store.labels, minlength=count))[:-1])
    keys: list[str] = []
    if per_class is not None:
        _check_enough(store, config, per_class, labelled=salt == _LABELLED, apart_from=apart_from)
    for label, records in enumerate(by_class):
        members = sorted(key for key in store.keys.at(records) if key not in elsewhere)
        if per_class is None:
            keys += members
            continue
        drawn = permute(np.arange(per_class), len(members), cipher_key(seed, salt, label))
        keys += [members[position] for position in drawn]
    return keys


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"The split file {path} does not exist. Labels are never drawn in place of a list.")
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"The split file {path} lists no images.")
    return lines


def _resolve(lines: list[str], store: ImageStore, path: Path) -> list[str]:
    """The keys that a list means: its first line decides how it spells all of them."""
    width = len(store.keys[0])
    spellings: tuple[Callable[[str], str], ...] = (
        str,
        lambda line: f"{line.partition('_')[0]}/{line}",  # ImageNet: the class is the text before the underscore
        lambda line: line.zfill(width),  # CIFAR: an index into the training images
    )
    for spell in spellings:
        if store.look_up([spell(lines[0])])[1].all():
            break
    else:
        raise ValueError(
            f"{path}, line 1: {lines[0]!r} is not an image of {store.path} (its keys look like {store.keys[0]!r}), "
            "neither as a key, nor as ImageNet's nXXXXXXXX_id.JPEG, nor as an index."
        )
    keys = [spell(line) for line in lines]
    records, known = store.look_up(keys)
    if len(missing := np.flatnonzero(~known)):
        raise ValueError(
            f"{path} lists {len(missing)} images that are not in {store.path}; the first is {lines[missing[0]]!r}. "
            "Pack the data set that the list belongs to, or correct the list."
        )
    if len(set(keys)) < len(keys):  # after spelling: 7 and 007 are one index
        twice = Counter(keys).most_common(1)[0][0]
        raise ValueError(f"The split file {path} lists {twice!r} more than once. Remove the repetition.")
    return [keys[position] for position in np.argsort(store.labels[records], kind="stable")]
