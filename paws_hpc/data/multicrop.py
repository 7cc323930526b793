"""Random crops of records: boxes and augmentation are drawn here, and the crops are cut from each record once.

Crops are cut on CPU threads. A small raw store on a GPU is copied there as a whole, and its crops are cut on the GPU.
Boxes and augmentation parameters are the same in both cases; pixels differ by at most one of 255 levels.

Legend: n records, V crops of a group from each, C channels, s the side of a crop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paws_hpc.data.augment import draw_parameters
from paws_hpc.data.config import AugmentConfig, CropConfig
from paws_hpc.data.crops import as_tensor, draw_boxes, equal_size_resized_crops, resized_crops
from paws_hpc.data.devices import BufferPool, to_device
from paws_hpc.data.images import StoreImages
from paws_hpc.data.samplers import Positions
from paws_hpc.data.workers import WorkerPool
from paws_hpc.store import ImageStore

_DECODED_AT_ONCE = 16  # images that a thread holds decoded, 9 MB of typical ones: few enough for the cache
_RESIDENT_SHARE = 1 / 8  # of a GPU's memory, for each of at most two stores: the rest is for training
_RESIDENT_READ = 4096  # records

CropGroup: TypeAlias = tuple[CropConfig, int]
"""Crops of one size, and the number of their first view."""


@dataclass(frozen=True)
class CutCrops:
    """Crops with the parameters of their augmentation: (V * n, C, s, s) uint8, view-major; C is 1 for grey images."""

    images: Tensor
    parameters: Tensor

    def __len__(self) -> int:
        return len(self.parameters)

    def on(self, device: torch.device) -> Tensor:
        """The images on a device."""
        return self.images.to(device, non_blocking=True)


@dataclass(frozen=True)
class ResidentCrops:
    """Crops of images that live on a GPU, which are cut there at each use."""

    store: Tensor  # (N, H, W, C) uint8 on the device
    records: Positions  # (n,)
    boxes: NDArray[np.int64]  # (V * n, 4), view-major
    size: int  # pixels
    parameters: Tensor  # of the V * n rows

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def images(self) -> Tensor:
        """(V * n, C, s, s) uint8 on the CPU."""
        return self.on(torch.device("cpu"))

    def on(self, device: torch.device) -> Tensor:
        """(V * n, C, s, s) uint8 on a device."""
        rows = to_device(torch.from_numpy(self.records), self.store.device)
        images = self.store[rows].permute(0, 3, 1, 2)
        views = self.boxes.reshape(-1, len(images), 4)
        return torch.cat([equal_size_resized_crops(images, boxes, self.size) for boxes in views]).to(device)


Crops: TypeAlias = CutCrops | ResidentCrops


def is_resident(store: ImageStore, device: torch.device) -> bool:
    """Whether a store lives on the device: raw, and small beside the memory of a GPU, used or not."""
    if device.type != "cuda" or store.shape is None:
        return False
    return len(store) * int(np.prod(store.shape)) <= _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[1]


class MultiCrop:
    """Draws crops of records and cuts them; any thread may use it, and waits for what it has begun itself.

    Attributes:
        store: of the records.
    """

    def __init__(self, images: StoreImages, *, seed: int, threads: int, device: torch.device) -> None:
        """Prepare ``threads`` that decode and crop; copies a resident store to the device of training."""
        self.store, self._images, self._seed = images.store, images, seed
        self._pool = WorkerPool(threads, "crops")
        # One pool per shape: small batches in large buffers would waste memory.
        self._buffers: defaultdict[tuple[int, ...], BufferPool] = defaultdict(partial(BufferPool, device))
        self._resident = _copied_to(device, self.store) if is_resident(self.store, device) else None

    def begin(
        self,
        records: Positions,
        crop_groups: Sequence[CropGroup],
        *,
        epoch: int,
        config: AugmentConfig,
        repeats: Positions | None = None,
    ) -> Callable[[], list[Crops]]:
        """Begin to cut every group of crops from each record, which is decoded once.

        Begin a batch before you wait for the last one: threads end a batch at different times. ``repeats`` says how
        often each of n records came before in this batch, so that its crops differ; None means never.

        Returns:
            a function that waits, and gives ``count * n`` crops per group, view-major, once.
        """
        n, shape = len(records), self.store.shape
        heights, widths = self.store.sizes(records) if shape is None else (np.full(n, shape[0]), np.full(n, shape[1]))
        again = np.zeros_like(records) if repeats is None else repeats
        rows: list[dict[str, Any]] = []  # what draws depend on, of the count * n crops of each group
        for crop, first in crop_groups:
            view = np.arange(first, first + crop.count)[:, None] + crop.count * again
            samples = np.tile(records, crop.count)
            rows.append({"seed": self._seed, "epoch": epoch, "samples": samples, "view": view.reshape(-1)})
        # All at once and in this thread: numpy makes workers wait for each other.
        boxes = [
            draw_boxes(crop, **of, heights=np.tile(heights, crop.count), widths=np.tile(widths, crop.count))
            for (crop, _), of in zip(crop_groups, rows, strict=True)
        ]
        if (resident := self._resident) is not None:
            parameters = [draw_parameters(config, **of) for of in rows]
            sizes = [crop.size for crop, _ in crop_groups]
            crops = [ResidentCrops(resident, records, *each) for each in zip(boxes, sizes, parameters, strict=True)]
            return lambda: list(crops)
        wait = self._begin_cut(records, crop_groups, boxes)
        parameters = [draw_parameters(config, **of) for of in rows]  # while workers cut
        return lambda: [CutCrops(*each) for each in zip(wait(), parameters, strict=True)]

    def abandon(self) -> None:
        """As :meth:`WorkerPool.abandon`."""
        self._pool.abandon()

    def _begin_cut(
        self, records: Positions, crop_groups: Sequence[CropGroup], boxes: Sequence[NDArray[np.int64]]
    ) -> Callable[[], list[Tensor]]:
        """Begin to cut (V * n, 4) boxes per group into (V * n, C, s, s) uint8 per group."""
        n, shape = len(records), self.store.shape
        # (V, n, s, s, C) in memory: the layout of decoded images, in which cropping is fastest.
        shapes = [(crop.count, n, crop.size, crop.size, 3 if shape is None else shape[2]) for crop, _ in crop_groups]
        groups = [self._buffers[shape].take(*shape).permute(0, 1, 4, 2, 3) for shape in shapes]
        by_view = [of_group.reshape(-1, n, 4) for of_group in boxes]

        def cut_jpeg(rows: slice) -> None:
            images = [as_tensor(pixels).permute(2, 0, 1) for pixels in self._images.pixels(records[rows])]
            for of_group, out in zip(by_view, groups, strict=True):
                resized_crops(images, of_group[:, rows].swapaxes(0, 1), out[:, rows])

        def cut_raw(rows: slice) -> None:
            images = torch.from_numpy(self.store.read_raw(records[rows])).permute(0, 3, 1, 2)
            for of_group, out in zip(by_view, groups, strict=True):
                for view, of_view in zip(out, of_group, strict=True):
                    view[rows] = equal_size_resized_crops(images, of_view[rows], out.shape[-1])

        # A raw store gets one product per thread: its cost is mostly overhead.
        count = max(-(-n // _DECODED_AT_ONCE) if shape is None else 1, min(self._pool.count, n))
        bounds = np.linspace(0, n, count + 1).astype(int).tolist()
        wait = self._pool.begin(cut_jpeg if shape is None else cut_raw, [slice(*pair) for pair in pairwise(bounds)])

        def finish() -> list[Tensor]:
            wait()
            return [group.flatten(0, 1) for group in groups]

        return finish


def _copied_to(device: torch.device, store: ImageStore) -> Tensor:
    """(N, H, W, C) uint8: all images of a raw store."""
    assert store.shape is not None
    pixels = torch.empty((len(store), *store.shape), dtype=torch.uint8, device=device)
    for start in range(0, len(store), _RESIDENT_READ):
        records = np.arange(start, min(start + _RESIDENT_READ, len(store)))
        pixels[start : start + len(records)] = torch.from_numpy(store.read_raw(records)).to(device)
    return pixels
