"""The images of a run as training and scoring read them: with caches, local copies, and order."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paws_hpc.config import Config, Identity
from paws_hpc.data.images import StoreImages, cached_images
from paws_hpc.data.samplers import Positions, Window
from paws_hpc.data.splits import folds
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import Interrupted, JobControl
from paws_hpc.progress import doing
from paws_hpc.stages.prepare import RunStores, open_stores
from paws_hpc.store import ImageStore
from paws_hpc.store.local_copy import CopyStoppedError, open_copy

# data.order=window: so much of a store stays together, and so many blocks are shuffled among each other.
_BLOCK_BYTES = 8e6
_WINDOW_BLOCKS = 256


@dataclass(frozen=True)
class RunData(RunStores):
    """The stores and the two splits of a run, and what reads them.

    Attributes:
        supports: source of the labelled images: their store, or a cache of them.
    """

    supports: StoreImages

    def labelled_images(self) -> EvaluationSet:
        """The labelled images, one centre crop each."""
        return replace(self.images(self.labelled_store, self.labelled), source=self.supports)

    def validation_images(self) -> EvaluationSet | None:
        """The local validation split, one centre crop each; None where labelled images are cross-validated instead."""
        if self.validation_split is None:
            return None
        return self.images(self.labelled_store, self.validation_split.records(self.labelled_store))

    def folds(self) -> list[NDArray[np.bool_]]:
        """Which of the (M,) labelled images each fold of the cross-validation holds out."""
        return folds(self.labelled_store.labels[self.labelled], self.classes, seed=self.config.seed)

    def test_images(self) -> EvaluationSet | None:
        """The test split, which is opened now, one centre crop each; None where there is none."""
        if self.config.data.test is None:
            return None
        store = ImageStore(Path(self.config.data.test))
        return self.images(store, np.arange(len(store)))

    def images(self, store: ImageStore, records: Positions) -> EvaluationSet:
        """Images of any store to score, one centre crop each, normalised as in training."""
        return EvaluationSet(store, records, self.config.views.evaluation, self.train, self.config.data.threads)

    @contextmanager
    def caching(self) -> Iterator[RunData]:
        """The same with its labelled images in memory that the processes of this node share, where there is room."""
        doing("decoding the labelled images")
        with cached_images(self.labelled_store, self.labelled) as supports:
            yield replace(self, supports=supports)


def open_data(config: Config, *, control: JobControl | None = None) -> RunData:
    """Open the stores and splits of a run.

    With the ``control`` of a job, which reads the training images again and again, they are copies in ``data.copy_to``,
    which one process of each node completes first.

    Raises:
        FileNotFoundError: there is no store; the command that packs one is named.
        ValueError: store or split is damaged or does not fit the config, or the stores cannot be copied.
        PreemptedError: the job must stop while stores are copied.
    """
    doing("opening the stores")
    folder = None if control is None else copy_folder(config)
    if control is None or folder is None:
        stores = open_stores(config)
    else:
        try:
            with suppress(CopyStoppedError):
                stores = open_stores(config, open_store=partial(open_copy, folder=folder, stop=control.requested))
            control.check()
            control.check()  # the answer of all ranks to the first check: all of them stop, or none
        except Interrupted:
            raise PreemptedError(0) from None
    return RunData(**vars(stores), supports=StoreImages(stores.labelled_store))


def copy_folder(config: Config) -> Path | None:
    """Where this node keeps copies of stores; None for nowhere.

    Raises:
        ValueError: a name in ``data.copy_to`` is not in this node's environment.
    """
    if config.data.copy_to is None:
        return None
    folder = os.path.expandvars(config.data.copy_to)
    if "$" in folder:
        raise ValueError(
            f"data.copy_to={config.data.copy_to!r} names something that is not in the environment of "
            f"{socket.gethostname()}. Name a folder on the node's own disk, or set data.copy_to=null."
        )
    return Path(folder)


def order_window(data: RunData) -> Window | None:
    """The window of the unlabelled images' order, its blocks counted in records of mean size; None for ``full``."""
    if data.config.data.order == "full":
        return None
    store = data.train
    record_bytes = sum(shard.bytes for shard in store.manifest.shards) / len(store)
    return Window(min(max(round(_BLOCK_BYTES / record_bytes), 1), len(store)), _WINDOW_BLOCKS)


def order_identity(data: RunData) -> Identity:
    """What determines the order of images beside the seed, without defaults: old runs could not choose."""
    fields: Identity = {}
    if (window := order_window(data)) is not None:
        fields["data.order"] = f"window of {window.blocks} blocks of {window.block_records} records"
    if data.config.data.support_order != "paper":
        fields["data.support_order"] = data.config.data.support_order
    return fields
