"""From a store to batches: the PAWS stream, the classifier's stream, and evaluation sets.

A batch is a pure function of its step. A background thread cuts crops ahead of training as uint8; everything from flip
to normalisation happens on the training device, batched.

Legend: n unlabelled images and S support rows per rank, m small crops, V views of each support image, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data.augment import AugmentParameters, augment, draw_parameters, normalise
from paws_hpc.data.crops import center_crop, draw_boxes, equal_size_resized_crops, resized_crops
from paws_hpc.data.order import EpochOrder, Positions, SupportOrder
from paws_hpc.data.prefetch import Prefetch
from paws_hpc.data.views import (
    FIRST_FINETUNE_VIEW,
    FIRST_SMALL_VIEW,
    FIRST_SUPPORT_VIEW,
    AugmentConfig,
    CenterCropConfig,
    CropConfig,
    ViewsConfig,
)
from paws_hpc.store import ImageStore

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Crops:
    """Crops on the host, and what augmentation is to do to them.

    Attributes:
        images: (N, 3, s, s) uint8, or (N, 1, s, s) from grey pixels, view-major.
        parameters: of the same N rows.
    """

    images: Tensor
    parameters: AugmentParameters


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
        return len(self.supports.images)


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


class Cutter:
    """Decodes records and cuts random crops from them, on a few threads."""

    def __init__(self, store: ImageStore, *, seed: int, threads: int) -> None:
        self.store, self.seed = store, seed
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crops")

    def cut(
        self, records: Positions, kinds: Sequence[tuple[CropConfig, int]], *, epoch: int, config: AugmentConfig
    ) -> list[Crops]:
        """Cut every kind of crop from each record, which is decoded once.

        Args:
            records: (n,) positions.
            kinds: crop configurations with the number of their first view.
            epoch: of the draw.
            config: of the augmentation whose parameters travel along.

        Returns:
            per kind, ``count * n`` rows, view-major.
        """
        parts = np.array_split(records, min(self._threads, len(records)))
        cut = list(self._pool.map(lambda part: self._cut_part(part, kinds, epoch), parts))
        result = []
        for kind, (crop, first_view) in enumerate(kinds):
            images = torch.cat([part[kind] for part in cut], dim=1).flatten(0, 1)
            samples = np.tile(records, crop.count)
            views = np.repeat(np.arange(first_view, first_view + crop.count), len(records))
            parameters = draw_parameters(config, seed=self.seed, epoch=epoch, samples=samples, view=views)
            result.append(Crops(images, parameters))
        return result

    def _cut_part(self, records: Positions, kinds: Sequence[tuple[CropConfig, int]], epoch: int) -> list[Tensor]:
        """Per kind, (count, n, C, s, s) uint8."""
        images, heights, widths = self._decode(records), self.store.heights[records], self.store.widths[records]
        result = []
        for crop, first_view in kinds:
            boxes = [
                draw_boxes(
                    crop, seed=self.seed, epoch=epoch, samples=records, view=view, heights=heights, widths=widths
                )
                for view in range(first_view, first_view + crop.count)
            ]
            result.append(torch.stack([_crop(images, view_boxes, crop.size) for view_boxes in boxes]))
        return result

    def _decode(self, records: Positions) -> Tensor | list[Tensor]:
        """(n, C, H, W) of a raw store, whose images have one size; n times (3, H, W) otherwise."""
        if self.store.encoding == "raw":
            return torch.from_numpy(self.store.read_raw(records)).permute(0, 3, 1, 2)
        return [torch.from_numpy(image).permute(2, 0, 1) for image in self.store.images(records)]


def _crop(images: Tensor | list[Tensor], boxes: NDArray[np.int64], size: int) -> Tensor:
    if isinstance(images, Tensor):
        return equal_size_resized_crops(images, boxes, size)
    return resized_crops(images, boxes, size)


class PawsStream:
    """Unlabelled images and support images of every step, at this rank."""

    def __init__(
        self,
        store: ImageStore,
        labelled: Positions,
        *,
        views: ViewsConfig,
        batch_size: int,
        support_classes: int,
        images_per_class: int,
        seed: int,
        threads: int,
    ) -> None:
        """Prepare; reads nothing yet.

        Args:
            store: of the unlabelled images, the labelled ones among them.
            labelled: (M,) positions of the labelled images.
            views: crops and augmentation.
            batch_size: unlabelled images per step over all ranks.
            support_classes: drawn per step over all ranks, K.
            images_per_class: drawn from each.
            seed: of the run.
            threads: that decode and crop.

        Raises:
            ValueError: a global size does not divide by the ranks, or the labels do not suffice for the support.
        """
        self.store, self.views = store, views
        self._order = EpochOrder(len(store), batch_size, seed)
        self._support = SupportOrder(
            labelled, store.labels[labelled], num_classes=support_classes, images_per_class=images_per_class, seed=seed
        )
        self._cutter = Cutter(store, seed=seed, threads=threads)
        self._images = distributed.per_rank(batch_size, name="pretrain.batch_size")
        self._supports = distributed.per_rank(
            support_classes * images_per_class, name="pretrain.support.classes * pretrain.support.images_per_class"
        )
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> PawsBatch:
        """This rank's part of a 0-based step."""
        epoch, rank = self._order.epoch(step), distributed.rank()
        records = self._order.records(step)[rank * self._images : (rank + 1) * self._images]
        views, kinds = self.views, [(self.views.large, 0)]
        if views.small.count:
            kinds.append((views.small, FIRST_SMALL_VIEW))
        unlabelled = self._cutter.cut(records, kinds, epoch=epoch, config=views.augment)
        drawn, places = self._support.draw(step)
        support_crop = CropConfig(views.large.size, views.support_views, views.large.scale, views.large.ratio)
        supports = self._cutter.cut(
            drawn[rank * self._supports : (rank + 1) * self._supports],
            [(support_crop, FIRST_SUPPORT_VIEW)],
            epoch=step,
            config=views.augment,
        )
        by_rank = np.split(places, distributed.world_size())
        classes = np.concatenate([np.tile(part, views.support_views) for part in by_rank])
        return PawsBatch(
            step,
            records,
            supports[0],
            unlabelled[0],
            unlabelled[1] if views.small.count else None,
            torch.from_numpy(classes),
        )

    def prefetch(self, start: int, stop: int) -> Prefetch[PawsBatch]:
        """The batches of steps ``start`` to ``stop - 1``, made ahead; a context manager."""
        return Prefetch(self.batch, start, stop)

    def augment(self, batch: PawsBatch, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Augmented, normalised views on the device: supports, large crops and, if there are any, small crops."""
        crops = [batch.supports, batch.large] + ([batch.small] if batch.small is not None else [])
        return [apply(crop, self.store, device, dtype) for crop in crops]


class ClassifierStream:
    """Labelled images in epochs, each cropped and augmented once per epoch.

    Attributes:
        batch_size: images per step over all ranks.
        steps_per_epoch: whole batches.
    """

    def __init__(
        self,
        store: ImageStore,
        labelled: Positions,
        *,
        crop: CropConfig,
        augment: AugmentConfig,
        batch_size: int,
        seed: int,
        threads: int,
    ) -> None:
        """Prepare; a labelled set smaller than ``batch_size`` makes one batch of all of it.

        Args:
            store: of the images.
            labelled: (M,) positions.
            crop: training crop.
            augment: operations on it.
            batch_size: over all ranks.
            seed: of the run.
            threads: that decode and crop.

        Raises:
            ValueError: there are more ranks than images in a step.
        """
        self.store, self.batch_size = store, min(batch_size, len(labelled))
        if self.batch_size < distributed.world_size():
            raise ValueError(
                f"A step of {self.batch_size} labelled images leaves some of {distributed.world_size()} ranks without "
                f"one. Use at most {self.batch_size} ranks (resources), or larger batches if there are more labels."
            )
        self._crop, self._augment, self._labelled = crop, augment, labelled
        self._order = EpochOrder(len(labelled), self.batch_size, seed)
        self._cutter = Cutter(store, seed=seed, threads=threads)
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> LabelledBatch:
        """This rank's part of a 0-based step."""
        drawn = self._order.records(step)
        records = self._labelled[drawn[distributed.share(len(drawn))]]
        crops = self._cutter.cut(
            records, [(self._crop, FIRST_FINETUNE_VIEW)], epoch=self._order.epoch(step), config=self._augment
        )
        return LabelledBatch(step, records, crops[0], torch.from_numpy(self.store.labels[records]))

    def prefetch(self, start: int, stop: int) -> Prefetch[LabelledBatch]:
        """The batches of steps ``start`` to ``stop - 1``, made ahead; a context manager."""
        return Prefetch(self.batch, start, stop)

    def augment(self, batch: LabelledBatch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n, 3, s, s) augmented and normalised, on the device."""
        return apply(batch.crops, self.store, device, dtype)


def apply(crops: Crops, store: ImageStore, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bring crops to the device and augment them there."""
    images = crops.images.to(device, non_blocking=True)
    return augment(images, crops.parameters, mean=store.mean, std=store.std, channels_last=device.type == "cuda").to(
        dtype
    )


@dataclass(frozen=True)
class EvaluationSet:
    """Images to score, as one centre crop each, without augmentation.

    Attributes:
        store: of the images.
        records: (N,) positions.
        crop: resize and centre crop.
        training_store: whose mean and standard deviation normalise, as they did in training; a test set's own would map
            its images elsewhere, and would be taken from images that are to be scored one by one.
        threads: that decode and crop.
    """

    store: ImageStore
    records: Positions
    crop: CenterCropConfig
    training_store: ImageStore
    threads: int = 1

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> Tensor:
        """(N,) int64 classes."""
        return torch.from_numpy(self.store.labels[self.records])

    def batches(self, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """This rank's share in order, as (n, 3, s, s) normalised batches; equally many on every rank.

        Shares differ by one image at most, so a rank's last batch may be empty.
        """
        mine = self.records[distributed.share(len(self.records))]
        longest = -(-len(self.records) // distributed.world_size())
        like, channels_last = self.training_store, device.type == "cuda"
        with ThreadPoolExecutor(self.threads, thread_name_prefix="evaluation") as pool:
            for start in range(0, max(longest, 1), _EVALUATION_BATCH):
                records = mine[start : start + _EVALUATION_BATCH]
                if not len(records):
                    yield torch.empty(0, 3, self.crop.size, self.crop.size, device=device, dtype=dtype)
                    continue
                parts = np.array_split(records, min(self.threads, len(records)))
                images = torch.cat(list(pool.map(self._crop_part, parts))).to(device)
                yield normalise(images, mean=like.mean, std=like.std, channels_last=channels_last).to(dtype)

    def _crop_part(self, records: Positions) -> Tensor:
        """(n, 3, s, s) uint8."""
        images = [torch.from_numpy(image).permute(2, 0, 1) for image in self.store.images(records)]
        return torch.stack([center_crop(image, resize=self.crop.resize, size=self.crop.size) for image in images])
