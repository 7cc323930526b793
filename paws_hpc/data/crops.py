"""Random-resized crops: which box (numpy, a pure function of the draw) and its exact antialiased resize (torch).

Legend: n boxes, C channels (3, or 1 for grey stores), H x W the image, box = (top, left, height, width) in pixels.

Two exact paths. JPEG stores hold images of many sizes: ``resized_crops`` resizes each crop by torch's uint8 antialiased
bilinear kernel. Raw stores hold small images of one size, where that costs mostly overhead (30 µs for 32 x 32):
``equal_size_resized_crops`` resizes the whole batch by two matrix products, on any device. Both equal PIL's crop
followed by ``resize(BILINEAR)`` to 1 of 255 levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from paws_hpc.data.config import CenterCropConfig, CropConfig
from paws_hpc.data.philox import Stream, uniform
from paws_hpc.store.decode import check_aspect

RATIO = (3 / 4, 4 / 3)  # least and greatest width/height
ATTEMPTS = 10
UNIFORMS_PER_BOX = 2 * ATTEMPTS + 2
_LOOPS = torch.jit.CompilationUnit(
    """
def resized_crops(images: List[Tensor], boxes: Tensor, out: Tensor) -> None:
    numbers: List[int] = boxes.tolist()
    size = [out.size(3), out.size(4)]
    crops: List[List[Tensor]] = []
    for view in out.unbind(0):
        crops.append(view.split(1))
    at = 0
    for number, image in enumerate(images):
        channel, row, column = image.stride()
        for of_view in crops:
            top, left, rows, columns = numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]
            corner = image.storage_offset() + top * row + left * column
            box = image.as_strided([1, image.size(0), rows, columns], [0, channel, row, column], corner)
            torch.ops.aten._upsample_bilinear2d_aa(box, size, False, None, None, out=of_view[number])
            at += 4
"""
)
"""A loop that torch's interpreter runs; Python's would hold its lock for longer than a small crop takes.

The operator is that of ``F.interpolate(mode="bilinear", antialias=True)``; its form with ``out`` spares a copy.
"""

_TIE = 2.0**-10  # rounds halves (1 % of the pixels of small images) up on every device, whatever the weights' rounding


def as_tensor(image: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 in the image's own memory, which may be read-only; ``torch.from_numpy`` would warn of that."""
    return torch.from_dlpack(image)


def draw_boxes(
    crop: CropConfig,
    *,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    view: int | NDArray[np.int64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> NDArray[np.int64]:
    """(n, 4) boxes of random-resized crops, each a function of (seed, epoch, sample, view) and its image's size alone.

    ``seed``, ``epoch``, ``samples`` and ``view`` are as in ``philox.uniform``; ``heights`` and ``widths`` (n,) pixels.
    """
    numbers = uniform(seed=seed, stream=Stream.CROP, epoch=epoch, samples=samples, view=view, count=UNIFORMS_PER_BOX)
    return sample_boxes(heights, widths, crop, numbers)


def sample_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], crop: CropConfig, uniforms: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The boxes that torchvision's ``RandomResizedCrop.get_params`` would choose from the given uniform numbers.

    Up to ten attempts draw an area and a log-uniform aspect ratio; the first whose rounded box fits is placed
    uniformly. If none fits, the largest central box of the nearest allowed ratio is taken.

    Args:
        heights, widths: (n,) positive integers, pixels.
        crop: its scale is used.
        uniforms: (n, 22) in [0, 1): area and ratio of attempt 1, 2, ... 10, then the top and the left.

    Returns:
        (n, 4) int64 boxes inside their images.
    """
    if uniforms.shape != (len(heights), UNIFORMS_PER_BOX) or len(heights) != len(widths):
        raise ValueError(
            f"{len(heights)} heights and {len(widths)} widths need ({len(heights)}, {UNIFORMS_PER_BOX}) uniform "
            f"numbers, not {uniforms.shape}"
        )
    least, greatest = crop.scale
    area = (heights * widths)[:, None] * (least + (greatest - least) * uniforms[:, 0 : 2 * ATTEMPTS : 2])
    log_least, log_greatest = np.log(RATIO)
    ratio = np.exp(log_least + (log_greatest - log_least) * uniforms[:, 1 : 2 * ATTEMPTS : 2])
    attempt_widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    attempt_heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (attempt_widths > 0) & (attempt_widths <= widths[:, None])
    fits &= (attempt_heights > 0) & (attempt_heights <= heights[:, None])

    chosen = (np.arange(len(heights)), fits.argmax(axis=1))
    box_heights, box_widths = attempt_heights[chosen], attempt_widths[chosen]
    tops = (uniforms[:, -2] * (heights - box_heights + 1)).astype(np.int64)
    lefts = (uniforms[:, -1] * (widths - box_widths + 1)).astype(np.int64)
    boxes = np.stack((tops, lefts, box_heights, box_widths), axis=1)
    failed = ~fits.any(axis=1)
    boxes[failed] = _central_boxes(heights[failed], widths[failed])
    return boxes


def _central_boxes(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, 4) the largest central boxes whose width/height lies within ``RATIO``."""
    least, greatest = RATIO
    ratio = widths / heights
    box_heights = np.where(ratio < least, np.rint(widths / least).astype(np.int64), heights)
    box_widths = np.where(ratio > greatest, np.rint(heights * greatest).astype(np.int64), widths)
    return np.stack(((heights - box_heights) // 2, (widths - box_widths) // 2, box_heights, box_widths), axis=1)


def resized_crops(images: Sequence[Tensor], boxes: NDArray[np.int64], out: Tensor) -> Tensor:
    """k boxes of each of n images, each resized by antialiased bilinear interpolation.

    Images and crops are laid out as (H, W, C) in memory, as decoders write them. The interpreter is free for other
    threads meanwhile.

    Args:
        images: n of (C, H, W) uint8 on the CPU, any sizes.
        boxes: (n, k, 4), each inside its image.
        out: (k, n, C, h, w) uint8, written and returned.

    Raises:
        ValueError: dtype, layout, a box or ``out`` do not fit: torch's kernel would read and write past the ends.
    """
    n, k, channels = len(images), len(out), out.shape[2]
    if boxes.shape != (n, k, 4) or out.shape[1] != n:
        raise ValueError(
            f"{boxes.shape} boxes of {n} images cannot fill {tuple(out.shape)}: (n, k, 4) fill (k, n, C, h, w)"
        )
    for each in [*images, out[0, 0]]:
        if each.dtype != torch.uint8 or len(each) != channels or not each.permute(1, 2, 0).is_contiguous():
            raise ValueError(
                f"need uint8 pixels of {channels} channels, laid out as (H, W, C), not {each.dtype} "
                f"{tuple(each.shape)} with strides {each.stride()}"
            )
    sides = np.array([image.shape[1:] for image in images], np.int64).reshape(n, 1, 2)
    outside = (boxes[..., :2] < 0) | (boxes[..., 2:] < 1) | (boxes[..., :2] + boxes[..., 2:] > sides)
    if outside.any():
        number, view = np.argwhere(outside)[0, :2].tolist()
        raise ValueError(
            f"box {tuple(boxes[number, view].tolist())} must lie in its image, which is "
            f"{' x '.join(map(str, sides[number, 0].tolist()))}"
        )
    _LOOPS.resized_crops(list(images), torch.from_numpy(boxes.ravel()), out)
    return out


def equal_size_resized_crops(images: Tensor, boxes: NDArray[np.int64], size: int) -> Tensor:
    """One box (n, 4) of each image of a batch, resized by two matrix products with triangle-filter weights.

    (n, C, H, W) uint8 on any device to (n, C, size, size) uint8.

    Raises:
        ValueError: dtype or boxes do not fit.
    """
    n, _, height, width = images.shape
    ends = boxes[:, :2] + boxes[:, 2:]
    if images.dtype != torch.uint8 or boxes.shape != (n, 4):
        raise ValueError(f"need uint8 images and (n, 4) boxes, not {images.dtype} {images.shape} and {boxes.shape}")
    if (boxes[:, :2] < 0).any() or (boxes[:, 2:] < 1).any() or (ends > (height, width)).any():
        raise ValueError(f"a box does not lie inside the {height} x {width} images")
    top, left, box_height, box_width = torch.from_numpy(boxes).T.to(images.device, torch.float32, non_blocking=True)
    rows = resample_weights(top, box_height, height, size)[:, None]
    columns = resample_weights(left, box_width, width, size)[:, None]
    pixels = rows @ images.float() @ columns.mT
    return pixels.add_(0.5 + _TIE).clamp_(0, 255).to(torch.uint8)


def resample_weights(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """Weights of an antialiased bilinear resize of the pixels [start, start + length) of a line to ``out_size`` pixels.

    A triangle filter whose half width is one pixel of the coarser grid, cut at the ends of the piece and normalised:
    PIL's and torch's ``antialias=True``. ``start`` and ``length`` are (n,) float32 whole numbers; the weights are
    (n, out_size, in_size) float32.
    """
    scale = (length / out_size)[:, None, None]
    centre = (torch.arange(out_size, device=start.device, dtype=start.dtype) + 0.5)[:, None] * scale
    position = torch.arange(in_size, device=start.device, dtype=start.dtype) - start[:, None, None]
    weights = (position + 0.5 - centre).abs_().div_(scale.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    weights *= (position >= 0) & (position < length[:, None, None])
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def center_crop(pixels: NDArray[np.uint8], crop: CenterCropConfig) -> Tensor:
    """Resize the shorter side (antialiased bilinear), then take the central square: (H, W, C) uint8 to (C, s, s).

    Equal to torchvision's ``Resize(crop.resize)`` followed by ``CenterCrop(crop.size)``.
    ValueError for an image so narrow that it would fill the memory.
    """
    check_aspect(*pixels.shape[:2])
    image, size = as_tensor(pixels).permute(2, 0, 1)[None], crop.size
    height, width = image.shape[-2:]
    shorter = min(height, width)
    resized = [int(crop.resize * side / shorter) for side in (height, width)]  # truncated, as torchvision does
    if resized != [height, width]:
        image = F.interpolate(image, size=resized, mode="bilinear", antialias=True)
    top, left = (round((side - size) / 2) for side in resized)
    return image[0, :, top : top + size, left : left + size]
