"""From a store to batches: the PAWS stream, the classifier's stream, and evaluation sets.

A batch is a pure function of its step. A background thread cuts crops ahead of training as uint8, and has everything
from flip to normalisation done on the training device, batched, while the step before is running.

Legend: n unlabelled images and S support images per rank, m small crops, V views of each support image, W ranks, A
micro-batches per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data.augment import CompiledAugmentation, augment, augment_groups, normalise
from paws_hpc.data.config import (
    FIRST_FINETUNE_VIEW,
    FIRST_SMALL_VIEW,
    FIRST_SUPPORT_VIEW,
    AugmentConfig,
    CenterCropConfig,
    CropConfig,
    ViewsConfig,
)
from paws_hpc.data.crops import center_crop
from paws_hpc.data.devices import PrefetchedViews, side_stream
from paws_hpc.data.images import StoreImages
from paws_hpc.data.multicrop import Crops, MultiCrop, is_resident
from paws_hpc.data.samplers import EpochSampler, Positions, SupportSampler, Window
from paws_hpc.data.workers import Prefetch, single_threaded
from paws_hpc.store import ImageStore
from paws_hpc.whole_graph import or_eager

_EVALUATION_BATCH = 256
# Batches that are made ahead, and memory of their crops and views; at least one is, and one more is begun.
_AHEAD, _AHEAD_BYTES = 3, 10**9
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """All crops of b of a rank's n images and s of its S support images.

    Rows are view-major: V * s of supports, 2b of large crops and m * b of small ones, None without such.
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
    """One rank's images of one pre-training step.

    Attributes:
        records: (n,) positions of the unlabelled images in their store.
        micro_batches: A of equal size; number a has images a, a + A, a + 2A, ... of the step, and such supports,
            whatever the number of ranks, since each rank's n and S are multiples of A.
        support_classes: (W * V * S,) int64, of **all** ranks' support rows in the order of gathering, view-major as if
            there were one micro-batch; indices into the K classes drawn for this step.
        known: (n,) bool, which of ``records`` are labelled images of a class drawn for this step; none where labelled
            images come from another store.
        known_classes: (n,) int64, their indices into the K classes; 0 where unknown.
        prefetched: the augmented views of the only micro-batch, if they were made ahead of the step.
    """

    step: int
    records: Positions
    micro_batches: tuple[MicroBatch, ...]
    support_classes: Tensor
    known: Tensor
    known_classes: Tensor
    prefetched: PrefetchedViews | None = None

    @property
    def num_support_rows(self) -> int:
        """V * S, of this rank."""
        return sum(len(micro_batch.supports) for micro_batch in self.micro_batches)


@dataclass(frozen=True)
class LabelledBatch:
    """One rank's images of one step of classifier training: (n,) positions, n crops and (n,) int64 classes.

    ``prefetched`` is the augmented crops, if they were made ahead of the step.
    """

    step: int
    records: Positions
    crops: Crops
    labels: Tensor
    prefetched: PrefetchedViews | None = None


Batch = TypeVar("Batch", PawsBatch, LabelledBatch)


def _prefetch(
    begin: Callable[[int], Callable[[], Batch]],
    views: Callable[[Batch], list[Tensor]] | None,
    steps: tuple[int, int],
    *,
    device: torch.device,
    batch_bytes: int,
    abandon: Callable[[], None],
) -> Prefetch[Batch]:
    """The batches of ``range(*steps)``, made ahead; with their ``views`` if these are given."""
    stream = side_stream(device)

    def begin_with_views(step: int) -> Callable[[], Batch]:
        finish = begin(step)

        def finish_with_views() -> Batch:
            batch = finish()
            return batch if views is None else replace(batch, prefetched=PrefetchedViews(partial(views, batch), stream))

        return finish_with_views

    return Prefetch(begin_with_views, *steps, abandon=abandon, ahead=batches_ahead(batch_bytes))


def batches_ahead(batch_bytes: int) -> int:
    """How many batches are made ahead, if one has that many bytes of crops and views."""
    return min(max(_AHEAD_BYTES // batch_bytes, 1), _AHEAD)


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
        accumulate_steps: int = 1,
        supports: StoreImages | None = None,
        window: Window | None = None,
        balanced_support: bool = False,
        device: torch.device = _CPU,
        compile_augmentation: bool = False,
    ) -> None:
        """Prepare; reads nothing yet, unless a store is small enough to live on the GPU.

        A step has ``batch_size`` images of ``store`` over all ranks, and ``images_per_class`` supports of each of
        ``support_classes`` classes, K, drawn from the (M,) positions ``labelled`` in the store of ``supports`` (None:
        in ``store``). Without a ``window`` all unlabelled images are shuffled; with ``balanced_support`` supports take
        turns instead of being drawn anew in each step.

        Raises:
            ValueError: a global size does not divide by the ranks and micro-batches, the labels do not suffice for the
                support, or an image would be repeated more often in a step than there are numbers for its views.
        """
        self.store, self.views, self.device = store, views, device
        images = StoreImages(store)
        supports = images if supports is None else supports
        self._sampler = EpochSampler(len(store), batch_size, seed, window)
        self._support_sampler = SupportSampler(
            labelled, supports.store.labels[labelled], num_classes=support_classes, images_per_class=images_per_class,
            seed=seed, balanced=balanced_support,
        )  # fmt: skip
        self._labels_are_here = supports.store is store
        self._support_sampler.check_repeats(views.support_views)
        self._multicrop = MultiCrop(images, seed=seed, threads=threads, device=device)
        # A resident store lives on the device once; and workers are shared wherever the images are.
        shared = supports is images or (self._labels_are_here and is_resident(store, device))
        self._support_multicrop = (
            self._multicrop if shared else MultiCrop(supports, seed=seed, threads=threads, device=device)
        )
        self._num_images = distributed.per_rank(
            batch_size, name="pretrain.batch_size", accumulate_steps=accumulate_steps
        )
        self._num_supports = distributed.per_rank(
            support_classes * images_per_class,
            name="pretrain.support.classes * pretrain.support.images_per_class",
            accumulate_steps=accumulate_steps,
        )
        self._accumulate_steps = accumulate_steps
        self._augmentation: Callable[..., list[Tensor]] = augment_groups
        if compile_augmentation:
            self._augmentation = or_eager(CompiledAugmentation(views.augment), augment_groups, name="the augmentation")
        self.steps_per_epoch = self._sampler.steps_per_epoch

    def batch(self, step: int) -> PawsBatch:
        """This rank's batch of a 0-based step."""
        return self.begin(step)()

    def begin(self, step: int) -> Callable[[], PawsBatch]:
        """Begin to make this rank's batch of a 0-based step; the function that is returned waits for it."""
        rank = distributed.rank()
        records = self._sampler.records(step)[rank * self._num_images : (rank + 1) * self._num_images]
        drawn = self._support_sampler.draw(step)
        mine = slice(rank * self._num_supports, (rank + 1) * self._num_supports)
        supports, repeats = drawn.records[mine], drawn.repeats[mine]
        every = [slice(number, None, self._accumulate_steps) for number in range(self._accumulate_steps)]
        begun = [self._begin_micro_batch(step, records[rows], supports[rows], repeats[rows]) for rows in every]
        known, classes = self._support_sampler.known_classes(records, drawn)
        known &= self._labels_are_here
        return lambda: PawsBatch(
            step,
            records,
            tuple(finish() for finish in begun),
            support_classes=self._as_gathered(drawn.class_indices),
            known=torch.from_numpy(known),
            known_classes=torch.from_numpy(classes * known),
        )

    def _as_gathered(self, values: Positions) -> Tensor:
        """(W * S,) values of all supports to the (W * V * S,) of their rows in the order of gathering."""
        by_rank = np.split(values, distributed.world_size())
        return torch.from_numpy(np.concatenate([np.tile(of_rank, self.views.support_views) for of_rank in by_rank]))

    def _begin_micro_batch(
        self, step: int, records: Positions, supports: Positions, repeats: Positions
    ) -> Callable[[], MicroBatch]:
        views, crop_groups = self.views, [(self.views.large, 0)]
        if views.small.count:
            crop_groups.append((views.small, FIRST_SMALL_VIEW))
        unlabelled = self._multicrop.begin(records, crop_groups, epoch=self._sampler.epoch(step), config=views.augment)
        support_crop = CropConfig(views.large.size, views.support_views, views.large.scale)
        labelled = self._support_multicrop.begin(
            supports, [(support_crop, FIRST_SUPPORT_VIEW)], epoch=step, config=views.augment, repeats=repeats
        )

        def finish() -> MicroBatch:
            (large, *small), (support,) = unlabelled(), labelled()
            return MicroBatch(support, large, small[0] if small else None)

        return finish

    def prefetch(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Prefetch[PawsBatch]:
        """The batches of steps ``start`` to ``stop - 1``, made ahead; a context manager.

        Their views are made ahead too, in ``dtype``, unless that is None, or there are several micro-batches: then a
        step must not hold the views of all its images at once.
        """
        config, views, channel_bytes = self.views, None, 1
        if dtype is not None and self._accumulate_steps == 1:
            channel_bytes += dtype.itemsize

            def views(batch: PawsBatch) -> list[Tensor]:
                return self.augment(batch.micro_batches[0], self.device, dtype)

        def abandon() -> None:
            self._multicrop.abandon()
            self._support_multicrop.abandon()

        pixels = (2 * self._num_images + config.support_views * self._num_supports) * config.large.size**2
        pixels += config.small.count * self._num_images * config.small.size**2
        batch_bytes = 3 * pixels * channel_bytes
        return _prefetch(self.begin, views, (start, stop), device=self.device, batch_bytes=batch_bytes, abandon=abandon)

    def augment(self, micro_batch: MicroBatch, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Augmented views on the device, by group of crops; supports too are normalised by the store's statistics."""
        groups = micro_batch.crop_groups
        images, parameters = [crops.on(device) for crops in groups], [crops.parameters for crops in groups]
        views = self._augmentation(images, parameters, mean=self.store.mean, std=self.store.std)
        return [each.to(dtype) for each in views]


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
        images: StoreImages | None = None,
        normalised_as: ImageStore | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """Prepare; (M,) labelled images fewer than ``batch_size`` (over all ranks) make one batch.

        ``images`` is their source, ``normalised_as`` the store whose mean and standard deviation normalise; both are
        ``store`` by default.

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
        self._sampler = EpochSampler(len(labelled), self.batch_size, seed)
        self._normalised_as, self._device = normalised_as or store, device
        self._multicrop = MultiCrop(images or StoreImages(store), seed=seed, threads=threads, device=device)
        self.steps_per_epoch = self._sampler.steps_per_epoch

    def batch(self, step: int) -> LabelledBatch:
        """This rank's batch of a 0-based step."""
        return self.begin(step)()

    def begin(self, step: int) -> Callable[[], LabelledBatch]:
        """Begin to make this rank's batch of a 0-based step; the function that is returned waits for it."""
        drawn = self._sampler.records(step)
        records = self._labelled[drawn[distributed.share(len(drawn))]]
        finish = self._multicrop.begin(
            records, [(self._crop, FIRST_FINETUNE_VIEW)], epoch=self._sampler.epoch(step), config=self._augment
        )
        return lambda: LabelledBatch(step, records, finish()[0], torch.from_numpy(self.store.labels[records]))

    def prefetch(self, start: int, stop: int, dtype: torch.dtype) -> Prefetch[LabelledBatch]:
        """The batches of steps ``start`` to ``stop - 1`` with their views, made ahead; a context manager."""
        images = -(-self.batch_size // distributed.world_size())
        return _prefetch(
            self.begin, lambda batch: [self.augment(batch, self._device, dtype)], (start, stop), device=self._device,
            batch_bytes=3 * images * self._crop.size**2 * (1 + dtype.itemsize), abandon=self._multicrop.abandon,
        )  # fmt: skip

    def augment(self, batch: LabelledBatch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n, 3, s, s) augmented and normalised, on the device."""
        like = self._normalised_as
        return augment(batch.crops.on(device), batch.crops.parameters, mean=like.mean, std=like.std).to(dtype)


@dataclass(frozen=True)
class EvaluationSet:
    """Images to score, (N,) positions in their store, as one centre crop each, without augmentation."""

    store: ImageStore
    records: Positions
    crop: CenterCropConfig
    training_store: ImageStore  # whose mean and standard deviation normalise
    threads: int = 1
    source: StoreImages | None = None  # of the pixels; None reads ``store``

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> Tensor:
        """(N,) int64 classes."""
        return torch.from_numpy(self.store.labels[self.records])

    def batches(self, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """This rank's share in order, as (n, 3, s, s) normalised batches; equally many on every rank, maybe empty."""
        mine = self.records[distributed.share(len(self.records))]
        longest = -(-len(self.records) // distributed.world_size())
        like = self.training_store
        limit = single_threaded()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="evaluation", initializer=limit) as pool:
            for start in range(0, max(longest, 1), _EVALUATION_BATCH):
                records = mine[start : start + _EVALUATION_BATCH]
                if not len(records):
                    yield torch.empty(0, 3, self.crop.size, self.crop.size, device=device, dtype=dtype)
                    continue
                slices = np.array_split(records, min(self.threads, len(records)))
                images = torch.cat(list(pool.map(self.crops, slices))).to(device)
                yield normalise(images, mean=like.mean, std=like.std).to(dtype)

    def crops(self, records: Positions) -> Tensor:
        """(n, 3, s, s) uint8: the centre crops of some of ``records``, not normalised."""
        source = self.source or StoreImages(self.store)
        return torch.stack([center_crop(pixels, self.crop) for pixels in source.pixels(records)])
