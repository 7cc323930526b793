"""From a store to batches: the PAWS stream, the classifier's stream, and evaluation sets.

A batch is a pure function of its step. A background thread cuts crops ahead of training as uint8, and has everything
from flip to normalisation done on the training device, batched, while the step before is running.

Legend: n unlabelled images and S support rows per rank, m small crops, V views of each support image, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data.augment import augment, normalise
from paws_hpc.data.batches import Augmentation, LabelledBatch, MicroBatch, PawsBatch, StreamOptions, StreamState, apply
from paws_hpc.data.compiled import CompiledAugmentation
from paws_hpc.data.config import (
    FIRST_FINETUNE_VIEW,
    FIRST_SMALL_VIEW,
    FIRST_SUPPORT_VIEW,
    MAX_SUPPORT_VIEWS,
    AugmentConfig,
    CenterCropConfig,
    CropConfig,
    ViewsConfig,
)
from paws_hpc.data.crops import center_crop
from paws_hpc.data.devices import PrefetchedViews, side_stream
from paws_hpc.data.images import StoreImages, as_tensor
from paws_hpc.data.multicrop import MultiCrop, make_strategy
from paws_hpc.data.prefetch import Prefetch
from paws_hpc.data.samplers import EpochSampler, Positions, SupportSampler
from paws_hpc.data.workers import single_threaded
from paws_hpc.store import ImageStore

_EVALUATION_BATCH = 256
_Batch = TypeVar("_Batch", PawsBatch, LabelledBatch)
_DEFAULT = StreamOptions()


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
        options: StreamOptions = _DEFAULT,
    ) -> None:
        """Prepare; reads nothing yet, unless the placement is ``resident``.

        Args:
            store: of the unlabelled images.
            labelled: (M,) positions of the labelled images in their store.
            views: crops and augmentation.
            batch_size: unlabelled images per step over all ranks.
            support_classes: drawn per step over all ranks, K.
            images_per_class: drawn from each.
            seed: of the run.
            threads: that decode and crop.
            accumulate_steps: micro-batches per step, A.
            supports: source of the labelled images; None means ``store``, of which they are part.
            options: order and placement.

        Raises:
            ValueError: a global size does not divide by the ranks and micro-batches, the labels do not suffice for the
                support, or an image would be repeated more often in a step than there are numbers for its views.
        """
        self.store, self.views, self.options, self.seed = store, views, options, seed
        images = StoreImages(store)
        supports = images if supports is None else supports
        self._order = EpochSampler(len(store), batch_size, seed, options.window)
        self._support = SupportSampler(
            labelled,
            supports.store.labels[labelled],
            num_classes=support_classes,
            images_per_class=images_per_class,
            seed=seed,
            balanced=options.balanced_support,
        )
        self._labels_are_here = supports.store is store
        _check_views_suffice(self._support.most_repeats, views)
        unlabelled = make_strategy(images, options.placement, threads=threads, device=options.device)
        # A resident store lives on the device once; and threads are shared wherever the images are.
        shared = supports is images or (options.placement == "resident" and supports.store is store)
        self._cutter = MultiCrop(unlabelled, seed=seed)
        self._support_cutter = (
            self._cutter
            if shared
            else MultiCrop(
                make_strategy(supports, options.placement, threads=threads, device=options.device), seed=seed
            )
        )
        self._images = distributed.per_rank(batch_size, name="pretrain.batch_size", accumulate_steps=accumulate_steps)
        self._supports = distributed.per_rank(
            support_classes * images_per_class,
            name="pretrain.support.classes * pretrain.support.images_per_class",
            accumulate_steps=accumulate_steps,
        )
        self._parts = accumulate_steps
        self._augmentation: Augmentation = (
            CompiledAugmentation(views.augment) if options.compile_augmentation else augment
        )
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> PawsBatch:
        """This rank's part of a 0-based step."""
        return self.begin(step)()

    def begin(self, step: int) -> Callable[[], PawsBatch]:
        """Begin to make this rank's part of a 0-based step; the result waits for it."""
        rank = distributed.rank()
        records = self._order.records(step)[rank * self._images : (rank + 1) * self._images]
        drawn, mine = self._support.draw(step), slice(rank * self._supports, (rank + 1) * self._supports)
        supports, repeats = drawn.records[mine], drawn.repeats[mine]
        every = [slice(part, None, self._parts) for part in range(self._parts)]
        parts = [self._begin_part(step, records[rows], supports[rows], repeats[rows]) for rows in every]
        images = np.unique(drawn.records, return_inverse=True)[1]
        known, places = self._support.known_classes(records, drawn)
        known &= self._labels_are_here
        return lambda: PawsBatch(
            step,
            records,
            tuple(finish() for finish in parts),
            support_classes=self._as_gathered(drawn.places),
            support_images=self._as_gathered(images),
            known=torch.from_numpy(known),
            known_classes=torch.from_numpy(places * known),
        )

    def _as_gathered(self, values: Positions) -> Tensor:
        """(W * S,) values of all supports to the (W * V * S,) of their rows, as gathering puts them."""
        by_rank = np.split(values, distributed.world_size())
        return torch.from_numpy(np.concatenate([np.tile(part, self.views.support_views) for part in by_rank]))

    def _begin_part(
        self, step: int, records: Positions, supports: Positions, repeats: Positions
    ) -> Callable[[], MicroBatch]:
        views, kinds = self.views, [(self.views.large, 0)]
        if views.small.count:
            kinds.append((views.small, FIRST_SMALL_VIEW))
        unlabelled = self._cutter.begin(records, kinds, epoch=self._order.epoch(step), config=views.augment)
        support_crop = CropConfig(views.large.size, views.support_views, views.large.scale, views.large.ratio)
        labelled = self._support_cutter.begin(
            supports, [(support_crop, FIRST_SUPPORT_VIEW)], epoch=step, config=views.augment, repeats=repeats
        )

        def finish() -> MicroBatch:
            (large, *small), (support,) = unlabelled(), labelled()
            return MicroBatch(support, large, small[0] if small else None)

        return finish

    def state(self, step: int) -> StreamState:
        """Where the stream stands before a 0-based step."""
        epoch = self._order.epoch(step)
        samples = (step - epoch * self.steps_per_epoch) * self._order.batch_size
        return StreamState(self.seed, epoch, samples, self.store.digest)

    def step_at(self, state: StreamState) -> int:
        """The step with which to go on.

        Raises:
            ValueError: the state is of another seed or data set, or inside a batch.
        """
        epoch, samples = state.epoch, state.samples
        step = epoch * self.steps_per_epoch + samples // self._order.batch_size
        if self.state(step) != state:
            raise ValueError(
                f"{state} is no place in this stream, whose nearest is {self.state(step)}. Go on with the seed, the "
                "data set and the batch size of the run that left it."
            )
        return step

    def prefetch(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Prefetch[PawsBatch]:
        """The batches of steps ``start`` to ``stop - 1``, made ahead; a context manager.

        Args:
            start, stop: steps.
            dtype: of the views that are made ahead too; None leaves them to the step, and so do several micro-batches:
                with them a step is not to hold the views of all its images at once.
        """
        device = self.options.device
        beside = side_stream(device)

        def with_views(batch: PawsBatch) -> PawsBatch:
            if dtype is None or self._parts > 1:
                return batch
            return replace(
                batch, prefetched=PrefetchedViews(lambda: self.augment(batch.micro_batches[0], device, dtype), beside)
            )

        return _prefetch(self.begin, with_views, self._abandon, range(start, stop), self.options)

    def _abandon(self) -> None:
        self._cutter.abandon()
        self._support_cutter.abandon()

    def augment(self, part: MicroBatch, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Augmented, normalised views on the device, by kind."""
        # The supports too are normalised as the unlabelled images are, wherever they come from: one network sees both.
        views = [apply(crops, self.store, device, dtype, self._augmentation) for crops in part.crop_groups]
        for crops in part.crop_groups:  # only now: kinds share their images
            crops.pixels.release()
        return views


def _check_views_suffice(repeats: int, views: ViewsConfig) -> None:
    if repeats * views.support_views > MAX_SUPPORT_VIEWS:
        raise ValueError(
            f"pretrain.support.images_per_class needs {repeats} repeats of an image, each with views.support_views="
            f"{views.support_views} crops. There are numbers for {MAX_SUPPORT_VIEWS} crops of an image per step: lower "
            "pretrain.support.images_per_class."
        )


def _prefetch(
    begin: Callable[[int], Callable[[], _Batch]],
    with_views: Callable[[_Batch], _Batch],
    abandon: Callable[[], None],
    steps: range,
    options: StreamOptions,
) -> Prefetch[_Batch]:
    def begin_with_views(step: int) -> Callable[[], _Batch]:
        finish = begin(step)
        return lambda: with_views(finish())

    size, budget = (lambda batch: batch.nbytes), options.prefetch_bytes
    return Prefetch(begin_with_views, steps.start, steps.stop, abandon=abandon, size=size, budget_bytes=budget)


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
        options: StreamOptions = _DEFAULT,
    ) -> None:
        """Prepare; a labelled set smaller than ``batch_size`` makes one batch of all of it.

        Args:
            store: of the labelled images.
            labelled: (M,) positions.
            crop: training crop.
            augment: operations on it.
            batch_size: over all ranks.
            seed: of the run.
            threads: that decode and crop.
            images: their source; None reads ``store``.
            normalised_as: store whose mean and standard deviation normalise; None means ``store``.
            options: placement; the order has none.

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
        self._order = EpochSampler(len(labelled), self.batch_size, seed)
        self._like, self._options = normalised_as or store, options
        source = images or StoreImages(store)
        self._cutter = MultiCrop(
            make_strategy(source, options.placement, threads=threads, device=options.device), seed=seed
        )
        self.steps_per_epoch = self._order.steps_per_epoch

    def batch(self, step: int) -> LabelledBatch:
        """This rank's part of a 0-based step."""
        return self.begin(step)()

    def begin(self, step: int) -> Callable[[], LabelledBatch]:
        """Begin to make this rank's part of a 0-based step; the result waits for it."""
        drawn = self._order.records(step)
        records = self._labelled[drawn[distributed.share(len(drawn))]]
        cut = self._cutter.begin(
            records, [(self._crop, FIRST_FINETUNE_VIEW)], epoch=self._order.epoch(step), config=self._augment
        )
        return lambda: LabelledBatch(step, records, cut()[0], torch.from_numpy(self.store.labels[records]))

    def prefetch(self, start: int, stop: int, dtype: torch.dtype) -> Prefetch[LabelledBatch]:
        """The batches of steps ``start`` to ``stop - 1`` with their views, made ahead; a context manager."""
        device = self._options.device
        beside = side_stream(device)

        def with_views(batch: LabelledBatch) -> LabelledBatch:
            return replace(batch, prefetched=PrefetchedViews(lambda: [self.augment(batch, device, dtype)], beside))

        return _prefetch(self.begin, with_views, self._cutter.abandon, range(start, stop), self._options)

    def augment(self, batch: LabelledBatch, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n, 3, s, s) augmented and normalised, on the device."""
        return apply(batch.crops, self._like, device, dtype)


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
        source: of the pixels; None reads ``store``.
    """

    store: ImageStore
    records: Positions
    crop: CenterCropConfig
    training_store: ImageStore
    threads: int = 1
    source: StoreImages | None = None

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
        like = self.training_store
        alone = single_threaded()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="evaluation", initializer=alone) as pool:
            for start in range(0, max(longest, 1), _EVALUATION_BATCH):
                records = mine[start : start + _EVALUATION_BATCH]
                if not len(records):
                    yield torch.empty(0, 3, self.crop.size, self.crop.size, device=device, dtype=dtype)
                    continue
                parts = np.array_split(records, min(self.threads, len(records)))
                images = torch.cat(list(pool.map(self.crops, parts))).to(device)
                yield normalise(images, mean=like.mean, std=like.std).to(dtype)

    def crops(self, records: Positions) -> Tensor:
        """(n, 3, s, s) uint8: the centre crops of some of ``records``, as they are scored but for normalisation."""
        source = self.source or StoreImages(self.store)
        images = [as_tensor(image).permute(2, 0, 1) for image in source.pixels(records)]
        return torch.stack([center_crop(image, resize=self.crop.resize, size=self.crop.size) for image in images])
