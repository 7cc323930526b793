"""What a stream gives for one step, and what moves it: batches, options, state.

Legend: n unlabelled images and S support rows per rank, m small crops, V views of each support image, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paws_hpc.data.augment import augment
from paws_hpc.data.cutting import Crops, Placement
from paws_hpc.data.order import Positions, Window
from paws_hpc.store import ImageStore


@dataclass(frozen=True)
class StreamOptions:
    """What moves the order of images and where the work runs; the defaults are the paper's order on the CPU.

    Attributes:
        window: of the unlabelled images' order; None shuffles all of them.
        balanced_support: supports take turns instead of being drawn anew in each step.
        placement: where images are decoded and cropped.
        device: of training.
        prefetch_bytes: host memory for batches made ahead; 3 batches at most.
    """

    window: Window | None = None
    balanced_support: bool = False
    placement: Placement = "cpu-crop"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
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
class PawsBatch:
    """This rank's part of one pre-training step.

    Attributes:
        step: 0-based.
        records: (n,) positions of the unlabelled images in their store.
        supports: V * S rows, view-major.
        large: 2n rows, view-major.
        small: m * n rows, view-major; None without small crops.
        support_classes: (W * V * S,) int64, of **all** ranks' support rows in the order in which gathering puts them;
            entries are places among the K classes drawn for this step.
    """

    step: int
    records: Positions
    supports: Crops
    large: Crops
    small: Crops | None
    support_classes: Tensor

    @property
    def num_support_rows(self) -> int:
        """V * S, of this rank."""
        return len(self.supports)

    @property
    def nbytes(self) -> int:
        """Host memory of its images."""
        return held_bytes([self.supports, self.large, self.small])


@dataclass(frozen=True)
class LabelledBatch:
    """This rank's part of one step of classifier training.

    Attributes:
        step: 0-based.
        records: (n,) positions in the store.
        crops: n rows.
        labels: (n,) int64 classes.
    """

    step: int
    records: Positions
    crops: Crops
    labels: Tensor

    @property
    def nbytes(self) -> int:
        """Host memory of its images."""
        return held_bytes([self.crops])


def held_bytes(kinds: Sequence[Crops | None]) -> int:
    """Host memory of crops, of which several kinds may share their images."""
    pixels = {id(crops.pixels.held): crops.pixels.nbytes for crops in kinds if crops is not None}
    return sum(pixels.values())


def apply(crops: Crops, store: ImageStore, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bring crops to the device and augment them there."""
    images = crops.pixels.on(device)
    return augment(images, crops.parameters, mean=store.mean, std=store.std, channels_last=device.type == "cuda").to(
        dtype
    )
