"""A folder of own images → the overrides of a run: what is in it, and the recipe that follows from it.

``data.root``, or ``data.unlabelled`` with ``data.labelled``, on a command line asks for it (docs/own_images.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from paws_hpc.data.config import DataConfig
from paws_hpc.files import value_digest
from paws_hpc.packing import open_source
from paws_hpc.packing.sources.base import IMAGE_EXTENSIONS
from paws_hpc.packing.sources.imagefolder import TEST_FOLDERS
from paws_hpc.stages.prepare import check_same_classes, packed_from

SHARDS = Path("shards")
_EXPERIMENT = "own_images"
_MEASURED = 200  # images whose size is read, evenly spread
_HELD_OUT_FROM = 20  # labels per class from which a fifth is held out for validation


class Derived(NamedTuple):
    """A field, its value as on a command line, and where it comes from."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True)
class OwnImages:
    """What is in the folders.

    Attributes:
        name: of the data set, from its folder.
        folders: see ``DataConfig``.
        digest: of the names, sizes and labels of all files.
        images: that train; ``side`` is the median of their short sides in pixels, ``grey`` whether none has colours.
        classes: names.
        labels: per class at least, and in all.
        tests: test images, None without any.
    """

    name: str
    folders: dict[str, str]
    digest: str
    images: int
    side: int
    grey: bool
    classes: tuple[str, ...]
    fewest: int
    labels: int
    tests: int | None


def is_own(given: Mapping[str, Any]) -> bool:
    """Whether overrides, values by field, name a folder of own images."""
    return any(given.get(f"data.{name}") is not None for name in ("root", "unlabelled"))


def look(given: Mapping[str, Any]) -> OwnImages:
    """List what the folders have that the ``data`` fields of the overrides name.

    Raises:
        ValueError: they have another shape, which is said.
        FileNotFoundError: there is no such folder.
    """
    fields = {name: _path(given, name) for name in ("root", "unlabelled", "labelled", "labels", "test")}
    root, labels = fields["root"] or fields["unlabelled"], fields["labels"]
    assert root is not None, "is_own"
    field = "data.root" if fields["root"] else "data.unlabelled"
    if fields["root"] and fields["unlabelled"]:
        raise ValueError(f"data.root={root} and data.unlabelled={fields['unlabelled']}: give one of them.")
    if labels and fields["labelled"]:
        raise ValueError(f"data.labels={labels} and data.labelled={fields['labelled']}: give one of them.")
    if fields["unlabelled"] and not (labels or fields["labelled"]):
        raise ValueError(f"data.unlabelled={root} has no labels. Add data.labelled=FOLDER or data.labels=FILE.")
    folders = _shape(field, root, listed=bool(labels or fields["labelled"]))
    if fields["labelled"]:
        folders["labelled"] = fields["labelled"]
    elif labels:
        folders["labelled"] = folders["train"]
    if fields["test"]:
        folders["test"] = fields["test"]
    for folder in folders.values():
        if SHARDS.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"{field}={root} would be packed into {SHARDS.resolve()}, inside itself. Launch elsewhere."
            )
    return _listed(root, folders, labels)


def _listed(root: str, folders: dict[str, str], labels: str | None) -> OwnImages:
    data = DataConfig(labels=labels, folders=folders, labelled=folders.get("labelled"))
    sources = {subset: open_source(packed_from(data, subset)) for subset in folders}
    train, labelled, test = sources["train"], sources.get("labelled", sources["train"]), sources.get("test")
    counts = np.bincount(labelled.labels, minlength=len(labelled.classes))
    if len(counts) < 2:
        raise ValueError(
            f"{folders.get('labelled', folders['train'])} has images of one class only ({labelled.classes[0]}), and "
            "there is nothing to tell apart. Give one folder per class, or a list of labels with data.labels=FILE."
        )
    if test is not None:
        check_same_classes(folders["test"], test.classes, folders.get("labelled", folders["train"]), labelled.classes)
    side, grey = _sizes(Path(folders["train"]), train.keys)
    return OwnImages(
        name=re.sub(r"[^\w.+-]+", "-", Path(root).resolve().name).strip("-.") or "images",
        folders=folders,
        digest=value_digest([[subset, source.digest] for subset, source in sorted(sources.items())]),
        images=len(train.keys),
        side=side,
        grey=grey,
        classes=labelled.classes,
        fewest=int(counts.min()),
        labels=len(labelled.keys),
        tests=None if test is None else len(test.keys),
    )


def _path(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(f"data.{name}")
    return None if value is None else str(value)


def _shape(field: str, root: str, *, listed: bool) -> dict[str, str]:
    """The folders of training and test images in ``root``; ValueError if it has no shape that is understood."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{field}={root} is not a folder.")
    below, loose = _entries(Path(root))
    if "train" in below:
        tests = [name for name in TEST_FOLDERS if name in below]
        folders = {"train": str(Path(root) / "train")}
        if tests:
            folders["test"] = str(Path(root) / tests[0])
        return _shape(field, folders["train"], listed=listed) | folders
    if set(below) & set(TEST_FOLDERS) and not listed:
        raise ValueError(f"{field}={root} has {' and '.join(below)}, but no train. Name the folder of training images.")
    if listed:
        return {"train": root}
    if not below:
        found = f"{loose:,} images and no folder per class" if loose else "neither images nor folders"
        raise ValueError(
            f"{field}={root} has {found}. Say which images are what: data.labels=FILE, lines <image>,<label>."
        )
    if loose:
        raise ValueError(
            f"{field}={root} has {len(below)} folders and {loose:,} images beside them. Move the images into folders "
            "of classes, or add data.labels=FILE or data.labelled=FOLDER."
        )
    for name in below:
        inner, images = _entries(Path(root) / name)
        nested = [each for each in inner if _entries(Path(root) / name / each)[1]]
        if not images and len(nested) > 1:
            raise ValueError(
                f"{field}={root}: {name} has no images but the folders {', '.join(nested[:3])} with images. If those "
                f"are the classes, name their folder; otherwise put their images beside each other in {name}."
            )
    return {"train": root}


def _entries(folder: Path) -> tuple[list[str], int]:
    """Names of the folders in it, sorted, and how many images are beside them; hidden ones do not count."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith((".", "@eaDir"))]
    images = sum(Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS for entry in visible if not entry.is_dir())
    return sorted(entry.name for entry in visible if entry.is_dir()), images


def _sizes(root: Path, keys: Any) -> tuple[int, bool]:
    """Median short side, pixels, and whether all are grey; from the headers of some images."""
    sides, modes = [], set()
    for place in np.unique(np.linspace(0, len(keys) - 1, _MEASURED).round().astype(int)).tolist():
        try:
            with Image.open(root / keys[place]) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except OSError:  # packing says which image and why
            continue
    if not sides:
        raise ValueError(f"{root}: none of {len(keys):,} images can be read; the first is {keys[0]}.")
    return int(np.median(sides)), modes <= {"1", "L", "LA", "I", "I;16", "F"}


def recipe(own: OwnImages, given: Mapping[str, Any], *, gpu: bool) -> Iterator[Derived]:
    """Every field that follows from the images, in the order of a table.

    A field in ``given``, values by field, is taken from there by those that depend on it.
    """

    fewest, labels = own.fewest, own.labels
    if (per_class := given.get("labels.per_class")) is not None:
        fewest = min(int(per_class), own.fewest)
        labels = fewest * len(own.classes)
    held_out = given.get("labels.validation_per_class")
    if held_out is None and per_class is None and fewest >= _HELD_OUT_FROM:
        held_out = fewest // 5
    drawn = per_class is not None or "labels.file" in given
    known = f"{own.labels:,} labels, {own.fewest:,} of the smallest class"
    yield Derived("labels.all", str(not drawn).lower(), f"of {known}" if drawn else f"all {known}")
    if held_out is None:
        yield Derived("labels.validation_per_class", "null", f"{fewest} labels a class: cross-validation chooses")
    else:
        yield Derived("labels.validation_per_class", f"{held_out}", "a fifth of each class's labels chooses")
        if per_class is None:
            fewest, labels = max(fewest - int(held_out), 1), labels - int(held_out) * len(own.classes)
    tests = "no test images: nothing is scored on any" if own.tests is None else f"{own.tests:,} test images"
    names = ", ".join(own.classes[:4]) + "…" * (len(own.classes) > 4)
    yield Derived("data.classes", f"{len(own.classes)}", f"{names}; {tests}")
    size = int(given.get("views.large.size", _crop_size(own, gpu=gpu)))
    yield from _crops(own, size, gpu=gpu)
    yield from _training(own, given, size, fewest=fewest, labels=labels, gpu=gpu)


def _crop_size(own: OwnImages, *, gpu: bool) -> int:
    """Pixels."""
    sizes = (32, 64, 128, 224) if gpu else (32, 48)
    return max((each for each in sizes if each <= own.side), default=sizes[0])


def _crops(own: OwnImages, size: int, *, gpu: bool) -> Iterator[Derived]:
    """Large crops of ``size`` pixels, and what follows from them."""
    close = own.side < 2 * size
    large, small, resize = ("[0.6,1.0]", "[0.3,0.6]", size) if close else ("[0.25,1.0]", "[0.08,0.25]", size * 8 // 7)
    share = "the whole image is little more" if close else "parts of larger images"
    yield Derived("views.large.size", f"{size}", f"images of {own.side} pixels, on a {'GPU' if gpu else 'CPU'}")
    yield Derived("views.small.size", f"{size // 2}", "half of it")
    yield Derived("views.large.scale", large, share)
    yield Derived("views.small.scale", small, "below the large ones")
    yield Derived("views.evaluation", f"{{resize: {resize}, size: {size}}}", "the size of training")
    for sweep in ("finetune", "baseline"):
        yield Derived(f"{sweep}.crop", f"{{size: {size}, scale: {large}}}", "as the large crops")
    if own.grey:
        colours = "{saturation: 0.0, hue: 0.0, grayscale_probability: 0.0}"
        for section in ("views", "baseline"):
            yield Derived(f"{section}.augment", colours, "grey images")


def _training(
    own: OwnImages, given: Mapping[str, Any], size: int, *, fewest: int, labels: int, gpu: bool
) -> Iterator[Derived]:
    """The network, the batches and how long they train."""
    network = "small_resnet"
    if gpu:
        network = "wrn28_2" if size <= 64 else "resnet18" if own.images < 50_000 else "resnet50"
    yield Derived("model", network, f"{own.images:,} images of {size} pixels, on a {'GPU' if gpu else 'CPU'}")
    rows, most, steps = (512, 256, 20_000) if gpu else (64, 64, 600)
    classes = int(given.get("pretrain.support.classes", min(len(own.classes), rows)))
    each = max(min(fewest, rows // classes), 1)
    of = "all of them" if classes == len(own.classes) else f"of {len(own.classes)}"
    yield Derived("pretrain.support.classes", f"{classes}", of)
    yield Derived(
        "pretrain.support.images_per_class", f"{each}", f"of at least {fewest} labels; {classes * each} in all"
    )
    if fewest == 1:
        yield Derived("optimizer", "lars_small", "one label of a class: better than sgd there")
    batch = int(given.get("pretrain.batch_size", max(min(most, own.images // 4 // 2 * 2), 2)))
    yield Derived("pretrain.batch_size", f"{batch}", f"of {own.images:,} images")
    per_epoch = max(own.images // batch, 1)
    epochs = int(given.get("pretrain.epochs", min(max(-(-steps // per_epoch), 5), 600)))
    yield Derived("pretrain.epochs", f"{epochs}", f"{per_epoch:,} steps each; {epochs * per_epoch:,} in all")
    yield Derived("optimizer.warmup_epochs", f"{epochs * 0.08:.2g}", "8 % of them")
    yield Derived("pretrain.validate_every_epochs", f"{max(epochs // 5, 1)}", "five times")
    longest = 50 if labels < 5_000 else 30
    for sweep, epochs_of_trial in (("finetune", longest), ("baseline", 3 * longest)):
        yield Derived(f"{sweep}.batch_size", f"{min(labels, most)}", f"of {labels:,} labels")
        rates = f"{{learning_rate: [0.02, 0.1], epochs: [{epochs_of_trial}]}}"
        yield Derived(f"{sweep}.sweep", rates, "two rates" if sweep == "finetune" else "three times as long")


def derived(given: Mapping[str, Any], *, gpu: bool) -> tuple[list[str], list[str], list[Derived]]:
    """Overrides for before and for after those of the command line, and the derived values among them.

    Raises:
        ValueError: the folders have no shape that is understood (:func:`look`).
        FileNotFoundError: there is no such folder.
    """
    own = look(given)
    shards = SHARDS / f"{own.name}-{own.digest[:8]}"
    data: dict[str, Any] = {"name": own.name, "train": str(shards / "train"), "source": None, "folders": own.folders}
    data |= {name: str(shards / name) if name in own.folders else None for name in ("labelled", "test")}
    after = [f"{'++' if name == 'folders' else ''}data.{name}={_written(value)}" for name, value in data.items()]
    if "experiment" in given:
        return [], after, []
    table = [
        each
        for each in recipe(own, given, gpu=gpu)
        if not any(each.field == field or each.field.startswith(f"{field}.") for field in given)
    ]
    before = [f"experiment={_EXPERIMENT}", "name='${data.name}-seed${seed}'"]
    return before + [f"{each.field}={each.value}" for each in table], after, table


def _written(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(each)}" for key, each in value.items()) + "}"
    if value is None:
        return "null"
    quoted = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{quoted}'"
