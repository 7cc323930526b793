"""The images of a run as the stages that compute read them: with caches, copies on the node, order and placement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paws_hpc import distributed
from paws_hpc.config import Config, Identity
from paws_hpc.data.batches import StreamOptions
from paws_hpc.data.config import DataConfig
from paws_hpc.data.images import StoreImages, cached_images
from paws_hpc.data.placement import choose
from paws_hpc.data.samplers import Positions, Window
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.files import read_json, write_json
from paws_hpc.stages.prepare import RunStores, open_stores, stage_folder
from paws_hpc.store import ImageStore, start_staging


@dataclass(frozen=True)
class RunData(RunStores):
    """The stores and the two splits of a run, and what reads them.

    Attributes:
        supports: source of the labelled images: their store, or a cache of them.
    """

    supports: StoreImages

    def labelled_images(self, config: Config) -> EvaluationSet:
        """The labelled images, one centre crop each."""
        crop, threads = config.views.evaluation, config.data.threads
        return EvaluationSet(self.labelled_store, self.labelled, crop, self.train, threads, self.supports)

    def validation_images(self, config: Config) -> EvaluationSet:
        """The local validation split, one centre crop each."""
        return self.images(config, self.labelled_store, self.validation_split.records(self.labelled_store))

    def images(self, config: Config, store: ImageStore, records: Positions) -> EvaluationSet:
        """Images of any store to score, one centre crop each, normalised as in training."""
        return EvaluationSet(store, records, config.views.evaluation, self.train, config.data.threads)

    @contextmanager
    def caching(self, config: Config, *, decoded: bool = True) -> Iterator[RunData]:
        """The same with its labelled images in memory that the processes of this node share, as far as allowed."""
        supports = cached_images(self.labelled_store, self.labelled, cache_gb=config.data.cache_gb, decoded=decoded)
        with supports:
            yield replace(self, supports=supports)


def open_data(config: Config, *, staged: bool = False) -> RunData:
    """As :func:`paws_hpc.stages.prepare.open_stores`, with the means to read images."""
    opened = open_stores(config, staged=staged)
    return RunData(
        opened.train,
        opened.labelled_store,
        opened.labelled_split,
        opened.validation_split,
        StoreImages(opened.labelled_store),
    )


def staging(config: Config) -> AbstractContextManager[object]:
    """Copy the stores of training images to this node's disk while the block runs, if the config asks for it."""
    folder = stage_folder(config)
    return nullcontext() if folder is None else start_staging(staged_stores(config.data), folder)


def staged_stores(data: DataConfig) -> list[Path]:
    """The stores that training reads again and again, each once: all but the test images, which are read once."""
    return list(dict.fromkeys(Path(path) for images, path in data.stores.items() if images != "test images"))


def order_window(data: DataConfig, store: ImageStore) -> Window | None:
    """The window of the unlabelled images' order, its blocks counted in records of mean size; None for ``full``."""
    if data.order == "full":
        return None
    record_bytes = sum(shard.bytes for shard in store.manifest.shards) / len(store)
    return Window(min(max(round(data.block_mb * 1e6 / record_bytes), 1), len(store)), data.window_blocks)


def order_identity(config: Config, data: RunData) -> Identity:
    """What determines the order of images beside the seed; the defaults are left out, as runs had no choice once."""
    fields: Identity = {}
    if (window := order_window(config.data, data.train)) is not None:
        fields["data.order"] = f"window of {window.blocks} blocks of {window.block_records} records"
    if config.data.support_order != "paper":
        fields["data.support_order"] = config.data.support_order
    return fields


def stream_options(config: Config, data: RunData, folder: Path, device: torch.device) -> StreamOptions:
    """Order and placement of a stage's stream; all ranks call this together.

    What ``data.placement=auto`` chose stays in ``folder/placement.json``, so that a start that resumes training works
    as the one before did, to the bit on a CPU: timings, by which a GPU's placement is chosen, are never the same twice.
    On another kind of device it is chosen anew.

    Raises:
        ValueError: the placement that is asked for cannot work.
        OtherRankError: another rank failed.
    """
    kept, asked = folder / "placement.json", config.data.placement
    with distributed.failing_together(device):  # whose end all reach before rank 0 writes the file
        found = read_json(kept) if kept.exists() else {}
    if asked == "auto" and found.get("device") == device.type:
        asked = found["placement"]
    stores = (data.train, data.labelled_store)
    try:
        placement = choose(asked, stores, views=config.views, threads=config.data.threads, device=device)
    except ValueError as error:
        if asked == config.data.placement:
            raise
        raise ValueError(
            f"{error} It was data.placement=auto that chose {asked}, at an earlier start: remove {kept} to have it "
            "choose anew."
        ) from error
    with distributed.failing_together(device):
        if distributed.is_main() and found != (choice := {"placement": placement, "device": device.type}):
            write_json(kept, choice)
    return StreamOptions(
        window=order_window(config.data, data.train),
        balanced_support=config.data.support_order == "balanced",
        placement=placement,
        device=device,
        prefetch_bytes=round(config.data.prefetch_gb * 1e9),
    )
