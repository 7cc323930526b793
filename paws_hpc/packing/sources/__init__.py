"""Where images come from; a new kind of source is a module here and an entry in :data:`SOURCES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paws_hpc.packing.sources.arrays import FASHION_CLASSES, ArraySource, cifar, digits, idx
from paws_hpc.packing.sources.base import Source
from paws_hpc.packing.sources.dataset import DEFAULT_MODULE, dataset
from paws_hpc.packing.sources.imagefolder import ImageFolder, flat_listing
from paws_hpc.packing.sources.listing import Listing
from paws_hpc.packing.sources.subset import OfClasses
from paws_hpc.packing.sources.tars import TarSource, list_tars, list_webdataset
from paws_hpc.renamed import did_you_mean

__all__ = ["SOURCES", "ArraySource", "ImageFolder", "Source", "SourceConfig", "open_source"]

DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package ``dataset-fashion-mnist`` installs the files."""


@dataclass
class SourceConfig:
    """Which images to pack; ``kind`` decides which of the other fields apply."""

    kind: str = "digits"
    """folder, flat, tar, webdataset, cifar10, cifar100, idx, fashion_mnist, dataset or digits."""
    root: str | None = None
    """Folder with the images or files; digits need none, fashion_mnist defaults to Debian's package."""
    split: str | None = None
    """train or test, for the kinds that come divided; a folder is packed whole; a dataset names its own."""
    size: int = 32
    """Side in pixels to which digits are enlarged."""
    labels: str | None = None
    """File of image names and classes, for flat folders and tar archives without class folders."""
    label_field: str = "label"
    """Field of WebDataset's .json files that holds the label, where there is no .cls."""
    dataset: str | None = None
    """Class of a dataset: package.module:Class, or a name in torchvision.datasets."""
    classes: Sequence[str] | None = None
    """Names of the only classes to take, in the order of their labels; None for all of them."""

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            hint = did_you_mean(self.kind, SOURCES) or f"Known are {', '.join(SOURCES)}."
            raise ValueError(f"source.kind={self.kind!r} is not a kind of source. {hint}")
        known = SOURCES[self.kind]
        if known.needs_root and self.root is None:
            raise ValueError(f"source.root is needed for source.kind={self.kind!r}: {known.root_help}.")
        if known.has_splits and self.split not in ("train", "test"):
            raise ValueError(f"source.split={self.split!r}: source.kind={self.kind!r} needs train or test.")
        if not known.has_splits and not known.names_splits and self.split is not None:
            raise ValueError(f"source.split={self.split!r} does not apply to source.kind={self.kind!r}: remove it.")
        for name, given in (("labels", self.labels), ("dataset", self.dataset)):
            if given is not None and name not in known.extra:
                raise ValueError(f"source.{name}={given!r} does not apply to source.kind={self.kind!r}: remove it.")
        if self.dataset is None and "dataset" in known.extra:
            raise ValueError(f"source.dataset is needed for source.kind={self.kind!r}: the name of its class.")
        if self.size < 8:
            raise ValueError(f"source.size={self.size} is below 8, the side of the original digits.")
        if self.classes is not None and not self.classes:
            raise ValueError("source.classes=[] leaves no image: name a class, or leave it out for all of them.")


@dataclass(frozen=True)
class SourceKind:
    """One kind of source: how it is opened and what it needs."""

    help: str
    open: Callable[[SourceConfig, Listing | None], Source]
    """Opens the source, from a list of its files that was made before if it has such a list."""
    root_help: str = ""
    needs_root: bool = False
    has_splits: bool = True
    """Comes divided into train and test."""
    names_splits: bool = False
    """May have any split."""
    extra: tuple[str, ...] = ()
    """Other fields of :class:`SourceConfig` that apply."""


def open_source(config: SourceConfig, listing: Listing | None = None) -> Source:
    """List the images that ``config`` describes.

    ``listing`` is what an earlier call listed, so that a million files need not be looked at again; kinds that have
    nothing to list ignore it.

    Raises:
        StoreError: files are missing or are not what their kind says, or a class is none of theirs.
    """
    whole = SOURCES[config.kind].open(config, listing)
    return whole if config.classes is None else OfClasses(whole, tuple(config.classes))


def _flat(config: SourceConfig, listing: Listing | None) -> Source:
    root, labels = Path(config.root or ""), Path(config.labels) if config.labels else None
    return ImageFolder(root, listing or flat_listing(root, labels), kind="flat")


def _tar(config: SourceConfig, listing: Listing | None) -> Source:
    root = Path(config.root or "")
    return TarSource("tar", root, listing or list_tars(root, Path(config.labels) if config.labels else None), {})


def _webdataset(config: SourceConfig, listing: Listing | None) -> Source:
    root, field = Path(config.root or ""), config.label_field
    return TarSource("webdataset", root, listing or list_webdataset(root, field), {"label_field": field})


def _idx(config: SourceConfig, _: Listing | None) -> Source:
    default, classes = (DEBIAN_FASHION_MNIST, FASHION_CLASSES) if config.kind == "fashion_mnist" else ("", None)
    return idx(Path(config.root or default), split=config.split or "", kind=config.kind, classes=classes)


def _cifar(config: SourceConfig, _: Listing | None) -> Source:
    return cifar(Path(config.root or ""), kind=config.kind, split=config.split or "")


SOURCES: dict[str, SourceKind] = {
    "folder": SourceKind(
        help="one folder of image files per class (ImageNet as it is usually unpacked)",
        open=lambda config, listing: ImageFolder(Path(config.root or ""), listing),
        root_help="the folder with one folder per class",
        needs_root=True,
        has_splits=False,
    ),
    "flat": SourceKind(
        help="a folder of image files whose folders mean nothing: those with a label in --labels, or all without one",
        open=_flat,
        root_help="the folder with the images",
        needs_root=True,
        has_splits=False,
        extra=("labels",),
    ),
    "tar": SourceKind(
        help="tar archives, read without unpacking: ImageNet's archive of class archives, class archives beside each "
        "other, or archives of class folders",
        open=_tar,
        root_help="the archive, or the folder with *.tar",
        needs_root=True,
        has_splits=False,
        extra=("labels",),
    ),
    "webdataset": SourceKind(
        help="WebDataset archives: NAME.jpg beside NAME.cls or NAME.json",
        open=_webdataset,
        root_help="the archive, or the folder with *.tar",
        needs_root=True,
        has_splits=False,
        extra=("label_field",),
    ),
    "dataset": SourceKind(
        help=f"a data set class, such as those of {DEFAULT_MODULE}, on files that are there (nothing is downloaded)",
        open=lambda config, _: dataset(config.dataset or "", Path(config.root or ""), config.split),
        root_help="the folder that the class is given",
        needs_root=True,
        has_splits=False,
        names_splits=True,
        extra=("dataset",),
    ),
    "cifar10": SourceKind(
        help="CIFAR10 as torchvision unpacks it",
        open=_cifar,
        root_help="the folder with cifar-10-batches-py",
        needs_root=True,
    ),
    "cifar100": SourceKind(
        help="CIFAR100 as torchvision unpacks it, fine labels",
        open=_cifar,
        root_help="the folder with cifar-100-python",
        needs_root=True,
    ),
    "idx": SourceKind(
        help="idx files of the MNIST family, gzipped or not; classes are named by number",
        open=_idx,
        root_help="the folder with train-images-idx3-ubyte[.gz]",
        needs_root=True,
    ),
    "fashion_mnist": SourceKind(
        help="Fashion-MNIST's idx files, with its class names",
        open=_idx,
        root_help=f"default: Debian's package dataset-fashion-mnist, {DEBIAN_FASHION_MNIST}",
    ),
    "digits": SourceKind(
        help="scikit-learn's handwritten digits, which need no download",
        open=lambda config, _: digits(split=config.split or "", size=config.size),
        extra=("size",),
    ),
}
