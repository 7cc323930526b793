"""Where images come from; a new kind of source is a module here and an entry in :data:`SOURCES`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paws_hpc.store.sources.base import ArraySource, Source
from paws_hpc.store.sources.cifar import cifar
from paws_hpc.store.sources.digits import digits
from paws_hpc.store.sources.idx import FASHION_CLASSES, idx
from paws_hpc.store.sources.imagefolder import ImageFolder

__all__ = ["SOURCES", "ArraySource", "ImageFolder", "Source", "SourceConfig", "SourceKind", "open_source"]

DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package ``dataset-fashion-mnist`` installs the files."""


@dataclass
class SourceConfig:
    """Which images to pack; ``kind`` decides which of the other fields apply."""

    kind: str = "digits"
    """folder, cifar10, cifar100, idx, fashion_mnist or digits."""
    root: str | None = None
    """Folder with the images or files; digits need none, fashion_mnist defaults to Debian's package."""
    split: str | None = None
    """train or test, for the kinds that come divided; a folder is packed whole."""
    size: int = 32
    """Side in pixels to which digits are enlarged."""

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            nearest = difflib.get_close_matches(self.kind, SOURCES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(SOURCES)}."
            raise ValueError(f"source.kind={self.kind!r} is not a kind of source: {hint}")
        known = SOURCES[self.kind]
        if known.needs_root and self.root is None:
            raise ValueError(f"source.root is needed for source.kind={self.kind!r}: {known.root_help}.")
        if known.has_splits and self.split not in ("train", "test"):
            raise ValueError(f"source.split={self.split!r}: source.kind={self.kind!r} needs train or test.")
        if not known.has_splits and self.split is not None:
            raise ValueError(f"source.split={self.split!r} does not apply to source.kind={self.kind!r}: remove it.")
        if self.size < 8:
            raise ValueError(f"source.size={self.size} is below 8, the side of the original digits.")


@dataclass(frozen=True)
class SourceKind:
    """One kind of source: how it is opened and what it needs."""

    help: str
    open: Callable[[SourceConfig], Source]
    root_help: str = ""
    needs_root: bool = False
    has_splits: bool = True
    has_size: bool = False


def open_source(config: SourceConfig) -> Source:
    """List the images that ``config`` describes.

    Raises:
        StoreError: files are missing or are not what their kind says.
    """
    return SOURCES[config.kind].open(config)


def _root(config: SourceConfig) -> Path:
    assert config.root is not None, "SourceConfig checks this"
    return Path(config.root)


def _split(config: SourceConfig) -> str:
    assert config.split is not None, "SourceConfig checks this"
    return config.split


def _fashion_mnist(config: SourceConfig) -> Source:
    root = Path(config.root or DEBIAN_FASHION_MNIST)
    return idx(root, split=_split(config), kind="fashion_mnist", classes=FASHION_CLASSES)


SOURCES: dict[str, SourceKind] = {
    "folder": SourceKind(
        help="one folder of image files per class (ImageNet as it is usually unpacked)",
        open=lambda config: ImageFolder(_root(config)),
        root_help="the folder with one folder per class",
        needs_root=True,
        has_splits=False,
    ),
    "cifar10": SourceKind(
        help="CIFAR10 as torchvision unpacks it",
        open=lambda config: cifar(_root(config), kind="cifar10", split=_split(config)),
        root_help="the folder with cifar-10-batches-py",
        needs_root=True,
    ),
    "cifar100": SourceKind(
        help="CIFAR100 as torchvision unpacks it, fine labels",
        open=lambda config: cifar(_root(config), kind="cifar100", split=_split(config)),
        root_help="the folder with cifar-100-python",
        needs_root=True,
    ),
    "idx": SourceKind(
        help="idx files of the MNIST family, gzipped or not; classes are named by number",
        open=lambda config: idx(_root(config), split=_split(config)),
        root_help="the folder with train-images-idx3-ubyte[.gz]",
        needs_root=True,
    ),
    "fashion_mnist": SourceKind(
        help="Fashion-MNIST's idx files, with its class names",
        open=_fashion_mnist,
        root_help=f"default: Debian's package dataset-fashion-mnist, {DEBIAN_FASHION_MNIST}",
    ),
    "digits": SourceKind(
        help="scikit-learn's handwritten digits, which need no download",
        open=lambda config: digits(split=_split(config), size=config.size),
        has_size=True,
    ),
}
"""Kind → how to open it."""
