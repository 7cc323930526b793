"""A view of one image as the paper's code makes it: PIL crops, jitters and blurs; torchvision makes a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from paws_hpc.bench.data_path import BATCH, CROP_GROUPS, VIEWS, shuffled
from paws_hpc.bench.images import jpegs
from paws_hpc.bench.rounds import Work
from paws_hpc.data.augment import OPERATIONS
from paws_hpc.data.config import AugmentConfig, CropConfig


def pil_view(
    crop: CropConfig,
    augment: AugmentConfig,
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Callable[[Image.Image], Tensor]:
    """One random view: an RGB image to (3, s, s) float32.

    Args:
        crop: size and scale.
        augment: operations; those of probability 0 are left out.
        mean, std: of pixels in [0, 1], three values each; ImageNet's.
    """
    steps = [transforms.RandomResizedCrop(crop.size, scale=tuple(crop.scale))]
    for operation in OPERATIONS:
        if chance := getattr(augment, operation.probability):
            steps.append(transforms.RandomApply([operation.pil(augment)], p=chance))
    view: Callable[[Image.Image], Tensor] = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    return view


def pil_augmentation(folder: str, supports: bool = False) -> Work:
    """PIL's crops and augmentation, image by image, as in the paper's code; with ``supports`` one 224 crop of each."""
    torch.set_num_threads(1)
    paths = jpegs(folder)
    chosen = [(1, VIEWS.large)] if supports else [(crop.count, crop) for crop, _ in CROP_GROUPS]
    groups = [(count, pil_view(crop, VIEWS.augment)) for count, crop in chosen]

    def work() -> int:
        some = shuffled(len(paths))[: max(BATCH, len(paths) // 8)].tolist()  # it is slow, and always the same
        for position in some:
            with Image.open(paths[position]) as file:
                image = file.convert("RGB")
            for count, view in groups:
                torch.stack([view(image) for _ in range(count)])
        return len(some)

    return work
