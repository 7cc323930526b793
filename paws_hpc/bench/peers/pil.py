"""A view of one image as the paper's code makes it: PIL crops, jitters and blurs; torchvision makes a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor
from torchvision import transforms

from paws_hpc.data.augment import OPERATIONS
from paws_hpc.data.config import AugmentConfig, CropConfig

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pil_view(
    crop: CropConfig,
    augment: AugmentConfig,
    *,
    mean: Sequence[float] = _IMAGENET[0],
    std: Sequence[float] = _IMAGENET[1],
) -> Callable[[Image.Image], Tensor]:
    """One random view: an RGB image to (3, s, s) float32.

    Args:
        crop: size, scale and ratio.
        augment: operations; those of probability 0 are left out.
        mean, std: of pixels in [0, 1], three values each.
    """
    chances = {operation: getattr(augment, operation.fields[0]) for operation in OPERATIONS}
    view: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(crop.size, scale=tuple(crop.scale), ratio=tuple(crop.ratio)),
            *(
                transforms.RandomApply([operation.pil(augment)], p=chance)
                for operation, chance in chances.items()
                if chance
            ),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return view
