"""What a stream gives for one step, and what moves it: batches, options, state.

Legend: n unlabelled images and S support images per rank, m small crops, V views of each support image, W ranks, A
micro-batches per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from paws_hpc.data.augment import AugmentParameters, augment
from paws_hpc.data.config import Placement
from paws_hpc.data.devices import PrefetchedViews
from paws_hpc.data.multicrop import Crops
from paws_hpc.data.samplers import Positions, Window
from paws_hpc.store import ImageStore


@dataclass(frozen=True)
class StreamOptions:
    """What moves the order of images and where the work runs; the defaults are the paper's order on the CPU.

    Attributes:
        window: of the unlabelled images' order; None shuffles all of them.
        balanced_support: supports take turns instead of being drawn anew in each step.
        placement: where images are decoded and cropped.
        device: of training.
        compile_augmentation: whether a PAWS stream's goes through ``torch.compile`` (paws_hpc/data/compiled.py).
        prefetch_bytes: memory for batches made ahead, on the host and, as augmented views, on the device; 3 batches at
            most.
    """

    window: Window | None = None
    balanced_support: bool = False
    placement: Placement = "cpu-crop"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compile_augmentation: bool = False
    prefetch_bytes: int = 2**30


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: all that it takes to go on, at any number of ranks.

    Attributes:
        seed: of the run.
        epoch: 0-based.
        samples: images consumed in this epoch, over all ranks.
        dataset: digest of the store.
    """

    seed: int
    epoch: int
    samples: int
    dataset: str


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of one micro-batch: b of its n images and s of its S support images, with all their crops.

    Attributes:
        supports: V * s rows, view-major.
        large: 2b rows, view-major.
        small: m * b rows, view-major; None without small crops.
    """

    supports: Crops
    large: Crops
    small: Crops | None = None

    @property
    def crop_groups(self) -> list[Crops]:
        """Supports, large crops and, if there are any, small crops."""
        return [self.supports, self.large] + ([self.small] if self.small is not None else [])


@dataclass(frozen=True)
class PawsBatch:
    """This rank's part of one pre-training step.

    Attributes:
        step: 0-based.
        records: (n,) positions of the unlabelled images in their store.
        micro_batches: A of equal size; number a has image a, a + A, a + 2A, ... of the step's images and of its
            supports, whatever the number of ranks, since each rank's n and S are multiples of A.
        support_classes: (W * V * S,) int64, of **all** ranks' support rows in the order in which gathering puts them,
            view-major as if there were one part; entries are places among the K classes drawn for this step.
        support_images: (W * V * S,) int64, which image each of these rows is a crop of: numbers within this step.
        known: (n,) bool, which of ``records`` are labelled images of a class drawn for this step; none are if labelled
            images come from another store, where nothing tells whether an image is in both.
        known_classes: (n,) int64, their classes' places among the K; 0 where unknown.
        prefetched: the augmented views of the only part, if they were made ahead of the step.
    """

    step: int
    records: Positions
    micro_batches: tuple[MicroBatch, ...]
    support_classes: Tensor
    support_images: Tensor
    known: Tensor
    known_classes: Tensor
    prefetched: PrefetchedViews | None = None

    @property
    def num_support_rows(self) -> int:
        """V * S, of this rank."""
        return sum(len(part.supports) for part in self.micro_batches)

    @property
    def nbytes(self) -> int:
        """Memory of its images on the host, and of views made ahead."""
        held = held_bytes([crops for part in self.micro_batches for crops in part.crop_groups])
        return held if self.prefetched is None else held + self.prefetched.nbytes


@dataclass(frozen=True)
class LabelledBatch:
    """This rank's part of one step of classifier training.

    Attributes:
        step: 0-based.
        records: (n,) positions in the store.
        crops: n rows.
        labels: (n,) int64 classes.
        prefetched: the augmented crops, if they were made ahead of the step.
    """

    step: int
    records: Positions
    crops: Crops
    labels: Tensor
    prefetched: PrefetchedViews | None = None

    @property
    def nbytes(self) -> int:
        """Memory of its images on the host, and of views made ahead."""
        held = held_bytes([self.crops])
        return held if self.prefetched is None else held + self.prefetched.nbytes


def held_bytes(kinds: Sequence[Crops]) -> int:
    """Host memory of crops, of which several kinds may share their images."""
    pixels = {id(crops.pixels.held): crops.pixels.nbytes for crops in kinds}
    return sum(pixels.values())


class Augmentation(Protocol):
    """:func:`paws_hpc.data.augment.augment`, or the same in another form."""

    def __call__(
        self, images: Tensor, parameters: AugmentParameters, *, mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """(n, 3 or 1, H, W) uint8 to (n, 3, H, W) float32 on the same device; channels-last on a GPU."""


def apply(
    crops: Crops, store: ImageStore, device: torch.device, dtype: torch.dtype, augmentation: Augmentation = augment
) -> Tensor:
    """Bring crops to the device and augment them there."""
    images = crops.pixels.on(device)
    return augmentation(images, crops.parameters, mean=store.mean, std=store.std).to(dtype)
