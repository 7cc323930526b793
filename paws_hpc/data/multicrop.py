"""Random crops of records. One object cuts them; where the work runs is a strategy behind it.

| placement    | decoded      | cropped    | travels to the device            |
|--------------|--------------|------------|----------------------------------|
| `cpu-crop`   | on the CPU   | on the CPU | crops                            |
| `cpu-decode` | on the CPU   | there      | decoded images                   |
| `nvjpeg`     | on the GPU   | there      | JPEG files                       |
| `resident`   | at the start | there      | nothing: small raw stores live there |

Boxes and augmentation parameters are the same in each. Pixels of the first, second and fourth differ by at most one of
255 levels where a value lies between two (in no bit for raw stores on a CPU); nvJPEG also decodes in its own way, which
moves pixels by about a level on average and more at sharp edges of colour.

Legend: n records, V crops of a kind from each, C channels, s the side of a crop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from paws_hpc.data.augment import AugmentParameters, draw_parameters
from paws_hpc.data.config import AugmentConfig, CropConfig, Placement
from paws_hpc.data.crops import (
    RaggedImages,
    draw_boxes,
    equal_size_resized_crops,
    resized_crops,
)
from paws_hpc.data.devices import BufferPool
from paws_hpc.data.images import StoreImages, as_tensor
from paws_hpc.data.pixels import Boxes, CutPixels, Encoded, EqualSize, Pixels, Ragged, ResidentRows, Uncut, UncutPixels
from paws_hpc.data.samplers import Positions
from paws_hpc.data.workers import WorkerPool
from paws_hpc.store import ImageStore

_DECODED_AT_ONCE = 16  # images that a thread holds decoded, 9 MB of typical ones: few enough for the cache
_RESIDENT_READ = 4096

DrawBoxes = Callable[[int, slice, NDArray[np.int64], NDArray[np.int64]], Boxes]
"""(kind, which of the n records, their heights, their widths) → (V * m, 4) boxes, view-major."""


@dataclass(frozen=True)
class Crops:
    """Crops, and what augmentation is to do to them.

    Attributes:
        pixels: of N = V * n rows, view-major.
        parameters: of the same N rows.
    """

    pixels: Pixels
    parameters: AugmentParameters

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def images(self) -> Tensor:
        """(N, C, s, s) uint8 on the CPU, C 3, or 1 from grey pixels."""
        return self.pixels.on(torch.device("cpu"))


class Strategy(Protocol):
    """A placement at work on one source of images; any thread may use it, and waits for what it has begun itself."""

    def begin(self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes) -> Callable[[], list[Pixels]]:
        """Begin to cut. The result waits for it and gives, once, per kind its V * n crops, view-major.

        Each record is decoded once.
        """

    def abandon(self) -> None:
        """Give up what the calling thread has begun and not waited for; returns when nothing works on it any more."""


class MultiCrop:
    """Draws boxes and augmentation for records and has the crops cut."""

    def __init__(self, strategy: Strategy, *, seed: int) -> None:
        self.seed, self._strategy = seed, strategy

    def abandon(self) -> None:
        """As of Strategy."""
        self._strategy.abandon()

    def begin(
        self,
        records: Positions,
        kinds: Sequence[tuple[CropConfig, int]],
        *,
        epoch: int,
        config: AugmentConfig,
        repeats: Positions | None = None,
    ) -> Callable[[], list[Crops]]:
        """Begin to cut every kind of crop from each record, which is decoded once.

        What is begun before the last was waited for keeps all threads busy: they end a batch at different times.

        Args:
            records: (n,) positions.
            kinds: crop configurations with the number of their first view.
            epoch: of the draw.
            config: of the augmentation whose parameters travel along.
            repeats: (n,) how often the record came before in this batch, so that its crops differ; never if None.

        Returns:
            what waits for it and gives, per kind, ``count * n`` rows, view-major.
        """
        again = np.zeros_like(records) if repeats is None else repeats

        def views(kind: int, part: slice) -> Positions:
            crop, first = kinds[kind]
            of_view = np.repeat(np.arange(first, first + crop.count), len(records[part]))
            return of_view + crop.count * np.tile(again[part], crop.count)

        def boxes(kind: int, part: slice, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> Boxes:
            crop = kinds[kind][0]
            return draw_boxes(
                crop,
                seed=self.seed,
                epoch=epoch,
                samples=np.tile(records[part], crop.count),
                view=views(kind, part),
                heights=np.tile(heights, crop.count),
                widths=np.tile(widths, crop.count),
            )

        finish = self._strategy.begin(records, [crop for crop, _ in kinds], boxes)
        parameters = [  # while threads cut
            draw_parameters(
                config,
                seed=self.seed,
                epoch=epoch,
                samples=np.tile(records, crop.count),
                view=views(kind, slice(None)),
            )
            for kind, (crop, _) in enumerate(kinds)
        ]
        return lambda: [Crops(*of_kind) for of_kind in zip(finish(), parameters, strict=True)]


def make_strategy(images: StoreImages, placement: Placement, *, threads: int, device: torch.device) -> Strategy:
    """A placement for one source of images.

    Args:
        images: the source.
        placement: where the work runs; see :func:`paws_hpc.data.placement.choose` for what is possible.
        threads: that decode and crop.
        device: of training.
    """
    match placement:
        case "cpu-crop":
            return CpuCrop(images, threads, device)
        case "cpu-decode":
            return CpuDecode(images, threads, device)
        case "nvjpeg":
            return NvJpeg(images, threads)
        case "resident":
            return Resident(images.store, device)


class CpuCrop:
    """Decodes and crops on a few threads, straight into the batch."""

    def __init__(self, images: StoreImages, threads: int, device: torch.device) -> None:
        self._images, self._threads = images, WorkerPool(threads, "crops")
        # By shape: where kinds shared them, small ones would take large memory and large ones ask for more.
        self._buffers: defaultdict[tuple[int, ...], BufferPool] = defaultdict(partial(BufferPool, device))
        self.abandon = self._threads.abandon

    def begin(self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes) -> Callable[[], list[Pixels]]:
        """As of Strategy."""
        shape = self._images.store.shape
        channels, n = 3 if shape is None else shape[2], len(records)
        # As (V, n, s, s, C) in memory: the layout of decoded images, in which cropping is fastest.
        shapes = [(crop.count, n, crop.size, crop.size, channels) for crop in kinds]
        batches = [self._buffers[shape].take(*shape) for shape in shapes]
        views = [batch.permute(0, 1, 4, 2, 3) for batch in batches]
        if shape is None:
            cut_part = self._cutting_jpeg(records, kinds, draw, views)
        else:
            cut_part = partial(self._cut_raw, records, kinds, draw, views)
        wait_for_parts = self._threads.begin(cut_part, self._parts(n))

        def finish() -> list[Pixels]:
            wait_for_parts()
            return [CutPixels(view.flatten(0, 1)) for view in views]

        return finish

    def _parts(self, n: int) -> list[slice]:
        if self._images.store.shape is not None:  # one product per thread: its cost is mostly overhead
            return parts(n, min(self._threads.count, n))
        return parts(n, max(-(-n // _DECODED_AT_ONCE), min(self._threads.count, n)))

    def _cutting_jpeg(
        self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes, out: list[Tensor]
    ) -> Callable[[slice], None]:
        """What a thread does with its part of the records.

        Boxes are drawn before, all at once: numpy would have the threads wait for each other.
        """
        heights, widths = self._images.store.sizes(records)
        everywhere = _boxes_by_record(kinds, draw, slice(None), heights, widths)

        def cut(part: slice) -> None:
            images = self._images.pixels(records[part])
            tensors = [as_tensor(pixels).permute(2, 0, 1) for pixels in images]
            for of_kind, batch in zip(everywhere, out, strict=True):
                resized_crops(tensors, of_kind[part], batch[:, part])

        return cut

    def _cut_raw(
        self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes, out: list[Tensor], part: slice
    ) -> None:
        images = torch.from_numpy(self._images.store.read_raw(records[part])).permute(0, 3, 1, 2)
        heights, widths = equal_sides(images)
        for kind, (crop, batch) in enumerate(zip(kinds, out, strict=True)):
            boxes = draw(kind, part, heights, widths).reshape(crop.count, len(images), 4)
            for view in range(crop.count):
                batch[view, part] = equal_size_resized_crops(images, boxes[view], crop.size)


def _boxes_by_record(
    kinds: Sequence[CropConfig],
    draw: DrawBoxes,
    part: slice,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> list[Boxes]:
    """Per kind (m, V, 4), of every record of a part its boxes."""
    return [
        draw(kind, part, heights, widths).reshape(crop.count, len(heights), 4).swapaxes(0, 1)
        for kind, crop in enumerate(kinds)
    ]


class CpuDecode:
    """Decodes on a few threads; the images travel, and are cropped on the device."""

    def __init__(self, images: StoreImages, threads: int, device: torch.device) -> None:
        self._images, self._buffers, self._threads = images, BufferPool(device), WorkerPool(threads, "decode")
        self.abandon = self._threads.abandon

    def begin(self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes) -> Callable[[], list[Pixels]]:
        """As of Strategy."""
        store = self._images.store
        if store.shape is not None:
            reading = self._threads.begin(lambda part: store.read_raw(records[part]), [slice(None)])
            return lambda: self._equal_size(reading()[0], kinds, draw)
        slices = parts(len(records), max(-(-len(records) // _DECODED_AT_ONCE), min(self._threads.count, len(records))))
        decoding = self._threads.begin(lambda part: self._images.pixels(records[part]), slices)
        return lambda: self._ragged(list(chain.from_iterable(decoding())), kinds, draw)

    def _equal_size(self, pixels: NDArray[np.uint8], kinds: Sequence[CropConfig], draw: DrawBoxes) -> list[Pixels]:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return uncut(EqualSize(images), *equal_sides(images), kinds, draw)

    def _ragged(self, decoded: list[NDArray[np.uint8]], kinds: Sequence[CropConfig], draw: DrawBoxes) -> list[Pixels]:
        heights, widths = sides(decoded)
        starts = np.concatenate(([0], np.cumsum(heights * widths)))
        buffer = self._buffers.take(int(starts[-1]), 3)
        for image, start, stop in zip(decoded, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            buffer[start:stop] = as_tensor(image).view(-1, 3)
        return uncut(Ragged(RaggedImages(buffer, starts[:-1], heights, widths)), heights, widths, kinds, draw)


class NvJpeg:
    """Reads JPEG files; decoding and cropping run on the GPU."""

    def __init__(self, images: StoreImages, threads: int) -> None:
        self._images, self._threads = images, WorkerPool(threads, "read")
        self.abandon = self._threads.abandon

    def begin(self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes) -> Callable[[], list[Pixels]]:
        """As of Strategy."""
        reading = self._read(records)
        return lambda: self._encoded(records, reading(), kinds, draw)

    def _read(self, records: Positions) -> Callable[[], list[NDArray[np.uint8]]]:
        slices = parts(len(records), min(self._threads.count, len(records)))
        reading = self._threads.begin(lambda part: self._images.encoded(records[part]), slices)
        return lambda: list(chain.from_iterable(reading()))

    def _encoded(
        self, records: Positions, files: list[NDArray[np.uint8]], kinds: Sequence[CropConfig], draw: DrawBoxes
    ) -> list[Pixels]:
        try:  # the files themselves, not the index: boxes must lie in what will be decoded
            heights, widths = _sizes(files)
        except ValueError:
            self._images.store.images(records)  # which names the record, or learns what stands in for it
            files = self._read(records)()
            heights, widths = _sizes(files)
        store = self._images.store

        def name(number: int) -> str:
            return f"record {store.keys[int(records[number])]!r} in {store.path}"

        return uncut(Encoded([torch.tensor(file) for file in files], name), heights, widths, kinds, draw)


def _sizes(files: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) heights and (n,) widths of JPEG files, by their headers; ValueError where one has none."""
    heights, widths = np.array([simplejpeg.decode_jpeg_header(file)[:2] for file in files], np.int64).T
    return heights, widths


class Resident:
    """A raw store that lives on the device as a whole."""

    def __init__(self, store: ImageStore, device: torch.device) -> None:
        assert store.shape is not None, "only raw stores can be resident, which choose() has checked"
        height, width, channels = store.shape
        self._pixels = torch.empty((len(store), height, width, channels), dtype=torch.uint8, device=device)
        for start in range(0, len(store), _RESIDENT_READ):
            records = np.arange(start, min(start + _RESIDENT_READ, len(store)))
            self._pixels[start : start + len(records)] = torch.from_numpy(store.read_raw(records)).to(device)

    def begin(self, records: Positions, kinds: Sequence[CropConfig], draw: DrawBoxes) -> Callable[[], list[Pixels]]:
        """As of Strategy."""
        _, height, width, _ = self._pixels.shape
        held = ResidentRows(self._pixels, torch.from_numpy(records))
        return lambda: uncut(held, np.full(len(records), height), np.full(len(records), width), kinds, draw)

    def abandon(self) -> None:
        """As of Strategy: there is nothing to wait for."""


def uncut(
    held: Uncut, heights: NDArray[np.int64], widths: NDArray[np.int64], kinds: Sequence[CropConfig], draw: DrawBoxes
) -> list[Pixels]:
    """Every kind of crop of the same images, to be cut on the device."""
    return [UncutPixels(held, draw(kind, slice(None), heights, widths), crop.size) for kind, crop in enumerate(kinds)]


def sides(images: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) heights and (n,) widths of (H, W, C) images as decoded."""
    return np.array([len(image) for image in images], np.int64), np.array(
        [image.shape[1] for image in images], np.int64
    )


def equal_sides(images: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) heights and (n,) widths of (n, C, H, W) images."""
    n, _, height, width = images.shape
    return np.full(n, height), np.full(n, width)


def parts(total: int, count: int) -> list[slice]:
    """``range(total)`` in ``count`` contiguous parts that differ by one at most."""
    bounds = np.linspace(0, total, count + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(bounds)]
