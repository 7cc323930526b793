"""Pixels of a batch: crops that were cut on the host, or images from which the device is still to cut them.

Legend: n images, V crops of a kind from each, C channels, s the side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paws_hpc.data.crops import RaggedImages, equal_size_resized_crops, ragged_resized_crops
from paws_hpc.data.devices import to_device

Boxes = NDArray[np.int64]


class Pixels(Protocol):
    """Crops that are cut, or will be where they are asked for."""

    @property
    def held(self) -> object:
        """What keeps the memory; kinds of crops of the same images share it."""

    @property
    def nbytes(self) -> int:
        """Host memory of :attr:`held`."""

    def on(self, device: torch.device) -> Tensor:
        """(V * n, C, s, s) uint8 on the device."""

    def release(self) -> None:
        """Forget what :meth:`on` left on the device for other kinds of crops; it can be made again."""


@dataclass(frozen=True)
class CutPixels:
    """Crops on the host: (N, C, s, s) uint8."""

    crops: Tensor

    @property
    def held(self) -> object:
        """The crops themselves."""
        return self.crops

    @property
    def nbytes(self) -> int:
        """As of Pixels."""
        return self.crops.nbytes

    def on(self, device: torch.device) -> Tensor:
        """As of Pixels."""
        return self.crops.to(device, non_blocking=True)

    def release(self) -> None:
        """Nothing was left there."""


class Uncut(Protocol):
    """The images of a batch, from which crops are still to be cut."""

    @property
    def nbytes(self) -> int:
        """Of host memory."""

    def cut(self, boxes: Boxes, size: int, device: torch.device) -> Tensor:
        """(V * n, 4) boxes, view-major → (V * n, C, size, size) uint8 on the device."""

    def release(self) -> None:
        """As of Pixels."""


@dataclass(frozen=True)
class UncutPixels:
    """Crops that are cut on the device: (V * n, 4) boxes, view-major, of n images."""

    held: Uncut
    boxes: Boxes
    size: int

    @property
    def nbytes(self) -> int:
        """As of Pixels."""
        return self.held.nbytes

    def on(self, device: torch.device) -> Tensor:
        """As of Pixels."""
        return self.held.cut(self.boxes, self.size, device)

    def release(self) -> None:
        """As of Pixels."""
        self.held.release()


class EqualSize:
    """(n, C, H, W) uint8 on the host; they travel once for all kinds of crops."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._there: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """As of Uncut."""
        return self._images.nbytes

    def cut(self, boxes: Boxes, size: int, device: torch.device) -> Tensor:
        """As of Uncut."""
        if self._there is None or self._there.device.type != device.type:
            self._there = to_device(self._images, device)
        return _cut_views(self._there, boxes, size)

    def release(self) -> None:
        """As of Pixels."""
        self._there = None


class ResidentRows:
    """Rows of a (N, H, W, C) uint8 tensor on the device: (n,) positions."""

    def __init__(self, pixels: Tensor, rows: Tensor) -> None:
        self._pixels, self._rows = pixels, rows

    @property
    def nbytes(self) -> int:
        """As of Uncut."""
        return self._rows.nbytes

    def cut(self, boxes: Boxes, size: int, device: torch.device) -> Tensor:
        """As of Uncut."""
        images = self._pixels[to_device(self._rows, self._pixels.device)].permute(0, 3, 1, 2)
        return _cut_views(images, boxes, size).to(device)

    def release(self) -> None:
        """As of Pixels: the store itself stays."""


class Ragged:
    """Decoded images of any sizes on the host; they travel once for all kinds of crops."""

    def __init__(self, images: RaggedImages) -> None:
        self._images = images
        self._there: RaggedImages | None = None

    @property
    def nbytes(self) -> int:
        """As of Uncut."""
        return self._images.pixels.nbytes

    def cut(self, boxes: Boxes, size: int, device: torch.device) -> Tensor:
        """As of Uncut."""
        if self._there is None or self._there.pixels.device.type != device.type:
            self._there = replace(self._images, pixels=to_device(self._images.pixels, device))
        return _cut_ragged(self._there, boxes, size)

    def release(self) -> None:
        """As of Pixels."""
        self._there = None


class Encoded:
    """JPEG files on the host, each (bytes,) uint8; the device decodes them once for all kinds of crops."""

    def __init__(self, files: list[Tensor], name: Callable[[int], str]) -> None:
        """Take the files, and what an error is to call one of them, by its number."""
        self._files, self._name = files, name
        self._decoded: RaggedImages | None = None

    @property
    def nbytes(self) -> int:
        """As of Uncut."""
        return sum(file.nbytes for file in self._files)

    def cut(self, boxes: Boxes, size: int, device: torch.device) -> Tensor:
        """As of Uncut."""
        if self._decoded is None or self._decoded.pixels.device.type != device.type:
            try:
                self._decoded = decode_files(self._files, device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of torchvision, which does not say which file it was
                raise self._fault(device) or error from error
        return _cut_ragged(self._decoded, boxes, size)

    def release(self) -> None:
        """As of Pixels."""
        self._decoded = None

    def _fault(self, device: torch.device) -> ValueError | None:
        """The first file that cannot be decoded, alone as little as among the others."""
        for number, file in enumerate(self._files):
            try:
                decode_files([file], device)
            except RuntimeError as error:
                return ValueError(
                    f"{self._name(number)} cannot be decoded on {device}: {error}. With data.placement=cpu-decode it "
                    "can be replaced, if data.max_substitutes allows."
                )
        return None


def decode_files(files: list[Tensor], device: torch.device) -> RaggedImages:
    """Decode JPEG files, each (bytes,) uint8 on the host, on the device: by nvJPEG on a GPU."""
    from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415 - takes a second to import, for GPUs only

    if device.type == "cuda":
        # torchvision (0.26) decodes on a stream of its own and lets ours wait for it, but not it for ours: it could
        # write to memory that work of ours, queued before, is still to read.
        torch.cuda.current_stream(device).synchronize()
    decoded = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    heights, widths = np.array([image.shape[1:] for image in decoded], np.int64).T
    starts = np.concatenate(([0], np.cumsum(heights * widths)))[:-1]
    return RaggedImages(
        torch.cat([image.permute(1, 2, 0).reshape(-1, 3) for image in decoded]), starts, heights, widths
    )


def _cut_views(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """View by view, as :class:`CpuCrop` does it, so that a CPU gives the same bits."""
    return torch.cat([equal_size_resized_crops(images, view, size) for view in boxes.reshape(-1, len(images), 4)])


def _cut_ragged(images: RaggedImages, boxes: Boxes, size: int) -> Tensor:
    """View-major crops of all images."""
    return ragged_resized_crops(images, np.resize(np.arange(len(images.starts)), len(boxes)), boxes, size)
