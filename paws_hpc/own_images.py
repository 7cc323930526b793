"""A folder of own images → the overrides of a run: what is in it, and the recipe that follows from it.

``data.root``, or ``data.unlabelled`` with ``data.labelled``, on a command line asks for it (docs/own_images.md).
"""

from __future__ import annotations

import functools
import math
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
from paws_hpc.packing.sources.imagefolder import TEST_FOLDERS, entries
from paws_hpc.renamed import did_you_mean
from paws_hpc.stages.prepare import check_same_classes, packed_from

SHARDS = Path("shards")
_EXPERIMENT = "own_images"
_FIELDS = ("root", "unlabelled", "labelled", "labels", "test", "train", "source")
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
        name: of the folder.
        folders: see ``DataConfig``.
        digest: of the names, sizes and labels of all files.
        images: that train; ``side`` is the median of their short sides in pixels, ``grey`` whether none has colours.
        classes: names.
        counts: labels of each class.
        tests: test images, None without any.
    """

    name: str
    folders: dict[str, str]
    digest: str
    images: int
    side: int
    grey: bool
    classes: tuple[str, ...]
    counts: tuple[int, ...]
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
    fields = {name: str(given[f"data.{name}"]) for name in _FIELDS if given.get(f"data.{name}") is not None}
    name = "root" if "root" in fields else "unlabelled"
    root, labels, field = fields[name], fields.get("labels"), f"data.{name}"
    for one, other in ((name, "unlabelled"), (name, "train"), (name, "source"), ("labels", "labelled")):
        if one != other and fields.keys() >= {one, other}:
            raise ValueError(f"data.{one}={fields[one]} and data.{other}={fields[other]}: give one of them.")
    listed = fields.keys() & {"labels", "labelled"}
    if name == "unlabelled" and not listed:
        raise ValueError(f"{field}={root} has no labels. Add data.labelled=FOLDER or data.labels=FILE.")
    folders = _shape(field, root, listed=bool(listed))
    if listed:
        folders["labelled"] = fields.get("labelled", folders["train"])
    if "data.test" in given:
        folders = {subset: folder for subset, folder in folders.items() if subset != "test"}
        folders |= {"test": fields["test"]} if "test" in fields else {}
    for folder in folders.values():
        if SHARDS.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"{field}={root} would be packed into {SHARDS.resolve()}, inside itself. Launch elsewhere."
            )
    return _listed(root, tuple(folders.items()), labels)


@functools.cache  # for the runs of a sweep, which have the same images
def _listed(root: str, named: tuple[tuple[str, str], ...], labels: str | None) -> OwnImages:
    folders = dict(named)
    data = DataConfig(root=root, labels=labels, folders=folders, labelled=folders.get("labelled"))
    sources = {subset: open_source(packed_from(data, subset)) for subset in folders}
    train, labelled, test = sources["train"], sources.get("labelled", sources["train"]), sources.get("test")
    counts = np.bincount(labelled.labels, minlength=len(labelled.classes))
    place = folders.get("labelled", folders["train"])
    if len(counts) < 2:
        raise ValueError(
            f"{place} has images of one class only ({labelled.classes[0]}), and there is nothing to tell apart. Give "
            "one folder per class, or a list of labels with data.labels=FILE."
        )
    if test is not None:
        check_same_classes(folders["test"], test.classes, place, labelled.classes)
    side, grey = _sizes(Path(folders["train"]), train.keys)
    return OwnImages(
        name=re.sub(r"[^\w.+-]+", "-", Path(root).resolve().name).strip("-.") or "images",
        folders=folders,
        digest=value_digest([[subset, source.digest] for subset, source in sorted(sources.items())]),
        images=len(train.keys),
        side=side,
        grey=grey,
        classes=labelled.classes,
        counts=tuple(counts.tolist()),
        tests=None if test is None else len(test.keys),
    )


def _shape(field: str, root: str, *, listed: bool) -> dict[str, str]:
    """The folders of training and test images in ``root``; ValueError if it has no shape that is understood."""
    if not Path(root).is_dir():
        beside = [path.name for path in Path(root).parent.glob("*/")]
        raise FileNotFoundError(
            f"{field}={root} is not a folder. {did_you_mean(Path(root).name, beside)}Name the folder of the images."
        )
    below, loose = entries(Path(root))
    if "train" in below:
        folders = _shape(field, str(Path(root) / "train"), listed=listed)
        tests = [str(Path(root) / name) for name in TEST_FOLDERS if name in below]
        return folders | ({"test": tests[0]} if tests else {})
    if listed:
        return {"train": root}
    if set(below) & set(TEST_FOLDERS):
        raise ValueError(f"{field}={root} has {' and '.join(below)}, but no train. Name the folder of training images.")
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
        inner, images = entries(Path(root) / name)
        nested = [each for each in inner if entries(Path(root) / name / each)[1]]
        if not images and ("train" in inner or len(nested) > 1):
            raise ValueError(
                f"{field}={root}: {name} has no images but the folders {', '.join(inner[:3])}. If {name} is what holds "
                f"the classes, name it; otherwise put its images beside each other."
            )
    return {"train": root}


def _sizes(root: Path, keys: Any) -> tuple[int, bool]:
    """Median short side, pixels, and whether all are grey; from the headers of some images."""
    sides, modes = [], set()
    for place in np.unique(np.linspace(0, len(keys) - 1, _MEASURED).round().astype(int)).tolist():
        try:
            with Image.open(root / keys[place]) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # packing says which image and why
            continue
    if not sides:
        raise ValueError(f"{root}: none of {len(keys):,} images can be read; the first is {keys[0]}.")
    return int(np.median(sides)), modes <= {"1", "L", "LA", "I", "I;16", "F"}


def _number(given: Mapping[str, Any], field: str) -> int | None:
    """The value of a field, None if it is not given; ValueError unless it is a whole number from 1 on."""
    value = given.get(field)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{field}={value} must be a whole number, at least 1.")
    return value


def recipe(own: OwnImages, given: Mapping[str, Any], *, gpu: bool, ranks: int = 1) -> Iterator[Derived]:
    """Every field that follows from the images, in the order of a table.

    A field in ``given``, values by field, is taken from there by those that depend on it. What each step of
    pre-training takes divides by its ``ranks``.

    Raises:
        ValueError: a given value cannot be, or there are too few labels.
    """
    for field in ("labels", "labels.file"):
        if given.get(field) is not None:
            raise ValueError(
                f"{field}={given[field]} is for stores. Of own images give labels.per_class=N, or data.labels=FILE."
            )
    per_class, held_out = _number(given, "labels.per_class"), _number(given, "labels.validation_per_class")
    known, count = min(own.counts), len(own.classes)
    listed = given.get("labels.validation_file") is not None
    if per_class is None and known >= _HELD_OUT_FROM and not listed and "labels.validation_per_class" not in given:
        held_out = known // 5
    smallest = f"class {own.classes[own.counts.index(known)]!r} has {known}"
    if (needed := (per_class or 1) + (held_out or 0)) > known:
        wanted = [
            f"labels.{name}={n}" for name, n in (("per_class", per_class), ("validation_per_class", held_out)) if n
        ]
        raise ValueError(f"{' and '.join(wanted)} need {needed} labels of each class, but {smallest}. Ask for fewer.")
    if (per_class or known) == 1 and held_out is None and not listed:
        found = "labels.per_class=1" if per_class else smallest
        raise ValueError(
            f"Cross-validation needs two labels of each class, but {found}. Label two at least, or hold out other "
            "images with labels.validation_per_class or labels.validation_file."
        )
    fewest, labels = per_class or known - (held_out or 0), sum(own.counts) - (held_out or 0) * count
    labels = labels if per_class is None else per_class * count
    of = f"{sum(own.counts):,} labels, {known:,} of the smallest class"
    yield Derived("labels.all", str(per_class is None).lower(), f"all {of}" if per_class is None else f"of {of}")
    if held_out is not None:
        yield Derived("labels.validation_per_class", f"{held_out}", "a fifth of the smallest class's labels chooses")
    elif not listed:
        yield Derived("labels.validation_per_class", "null", f"{fewest} labels a class: cross-validation chooses")
    names = ", ".join(own.classes[:4]) + "…" * (count > 4)
    yield Derived("data.classes", f"{count}", f"{names}; {_tests(own)}")
    sizes = (32, 64, 128, 224) if gpu else (32, 48)  # pixels
    size = _number(given, "views.large.size") or max((each for each in sizes if each <= own.side), default=sizes[0])
    yield from _crops(own, size, gpu=gpu)
    yield from _training(own, given, size, fewest=fewest, labels=labels, gpu=gpu, ranks=ranks)


def _tests(own: OwnImages) -> str:
    """Which test images there are, and which that could be are not used."""
    if own.tests is None:
        return "no test images: nothing is scored on any"
    folder = Path(own.folders["test"])
    beside = folder.parent == Path(own.folders["train"]).parent
    others = [name for name in TEST_FOLDERS if beside and name != folder.name and (folder.parent / name).is_dir()]
    unused = f"; {' and '.join(others)} is not used" if others else ""
    return f"{own.tests:,} test images in {folder.name}{unused}"


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
    own: OwnImages, given: Mapping[str, Any], size: int, *, fewest: int, labels: int, gpu: bool, ranks: int
) -> Iterator[Derived]:
    """The network, the batches and how long they train."""
    network = "small_resnet"
    if gpu:
        network = "wrn28_2" if size <= 64 else "resnet18" if own.images < 50_000 else "resnet50"
    yield Derived("model", network, f"{own.images:,} images of {size} pixels, on a {'GPU' if gpu else 'CPU'}")
    rows, most, steps = (512, 256, 20_000) if gpu else (64, 64, 600)
    pieces = ranks * (_number(given, "pretrain.accumulate_steps") or 1)  # a step's micro-batches, which are equal
    most_classes = _number(given, "pretrain.support.classes")
    for classes in (most_classes,) if most_classes else range(min(len(own.classes), rows), 1, -1):
        each = _multiple(min(fewest, rows // classes), pieces // math.gcd(classes, pieces))
        if classes * each <= rows and each <= fewest:
            break
    of = "all of them" if classes == len(own.classes) else f"of {len(own.classes)}"
    yield Derived("pretrain.support.classes", f"{classes}", of)
    yield Derived(
        "pretrain.support.images_per_class", f"{each}", f"of at least {fewest} labels; {classes * each} in all"
    )
    if fewest == 1:
        yield Derived("optimizer", "lars_small", "one label of a class: better than sgd there")
    batch = _number(given, "pretrain.batch_size") or _multiple(min(most, own.images // 4), math.lcm(2, pieces))
    yield Derived("pretrain.batch_size", f"{batch}", f"of {own.images:,} images")
    per_epoch = max(own.images // batch, 1)
    epochs = _number(given, "pretrain.epochs") or min(max(-(-steps // per_epoch), 5), 600)
    yield Derived("pretrain.epochs", f"{epochs}", f"{per_epoch:,} steps each; {epochs * per_epoch:,} in all")
    yield Derived("optimizer.warmup_epochs", f"{epochs * 0.08:.2g}", "8 % of them")
    yield Derived("pretrain.validate_every_epochs", f"{max(epochs // 5, 1)}", "five times")
    longest = 50 if labels < 5_000 else 30
    for sweep, epochs_of_trial in (("finetune", longest), ("baseline", 3 * longest)):
        yield Derived(f"{sweep}.batch_size", f"{min(labels, most)}", f"of {labels:,} labels")
        rates = f"{{learning_rate: [0.02, 0.1], epochs: [{epochs_of_trial}]}}"
        yield Derived(f"{sweep}.sweep", rates, "two rates" if sweep == "finetune" else "three times as long")


def _multiple(most: int, of: int) -> int:
    """The greatest multiple that is not above ``most``, or the least."""
    return max(most // of * of, of)


def derived(
    given: Mapping[str, Any], *, gpu: bool, ranks: int
) -> tuple[list[str], dict[str, Any], tuple[Derived, ...]]:
    """Overrides for before those of the command line, fields of ``data``, and the derived values among the former.

    Raises:
        ValueError: the folders have no shape that is understood (:func:`look`), or have too few labels.
        FileNotFoundError: there is no such folder.
    """
    own = look(given)
    shards = SHARDS / f"{own.name}-{own.digest[:8]}"
    stores = {name: str(shards / name) if name in own.folders else None for name in ("train", "labelled", "test")}
    data = {"name": given.get("data.name", own.name), "source": None, "folders": own.folders} | stores
    if "experiment" in given:
        return [], data, ()
    table = tuple(
        each
        for each in recipe(own, given, gpu=gpu, ranks=ranks)
        if not any(each.field == field or each.field.startswith(f"{field}.") for field in given)
    )
    before = [f"experiment={_EXPERIMENT}", "name='${data.name}-seed${seed}'"]
    return before + [f"{each.field}={each.value}" for each in table], data, table
