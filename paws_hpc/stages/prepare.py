"""The first stage: packed images and splits are there, or are made, or their absence is an error with its remedy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from paws_hpc import distributed
from paws_hpc.config import Config, DataConfig, Identity
from paws_hpc.data.batches import StreamOptions
from paws_hpc.data.images import StoreImages, cached_images
from paws_hpc.data.order import Positions, SupportOrder, Window
from paws_hpc.data.placement import choose
from paws_hpc.data.splits import Split, labelled_and_validation
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.files import exclusive, read_json, write_json
from paws_hpc.stages.run_folder import RunFolder, mark_done
from paws_hpc.store import ImageStore, PackOptions, SourceConfig, open_source, pack, start_staging


@dataclass(frozen=True)
class RunData:
    """The stores and the two splits of a run.

    Attributes:
        train: store of the unlabelled images.
        labelled_store: of the labelled images and those for validation; the same object as ``train`` unless the config
            names another.
        labelled_split, validation_split: drawn from ``labelled_store``.
        supports: source of the labelled images: their store, or a cache of them.
    """

    train: ImageStore
    labelled_store: ImageStore
    labelled_split: Split
    validation_split: Split
    supports: StoreImages

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that are learnt."""
        return self.labelled_store.classes

    @cached_property
    def labelled(self) -> Positions:
        """(M,) positions of the labelled images in ``labelled_store``."""
        return self.labelled_split.records(self.labelled_store)

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

    @property
    def digests(self) -> dict[str, str]:
        """Of stores and splits, by name."""
        digests = {
            "train": self.train.digest,
            "labelled": self.labelled_split.digest,
            "validation": self.validation_split.digest,
        }
        if self.labelled_store is not self.train:
            digests["labelled_store"] = self.labelled_store.digest
        return digests

    @contextmanager
    def caching(self, config: Config, *, decoded: bool = True) -> Iterator[RunData]:
        """The same with its labelled images in memory that the processes of this node share, as far as allowed."""
        supports = cached_images(self.labelled_store, self.labelled, cache_gb=config.data.cache_gb, decoded=decoded)
        with supports:
            yield replace(self, supports=supports)


def run(config: Config, run: RunFolder, *, control: JobControl = UNATTENDED) -> None:
    """Pack what is missing, draw or read the splits, and write the digests of all into ``prepare/DONE``.

    Raises:
        ValueError: the stores do not go together, or the labels do not suffice for the support mini-batches.
    """
    labelled = config.data.labelled
    if labelled is not None and not (Path(labelled) / "manifest.json").exists():
        raise _not_packed("labelled", Path(labelled))
    for subset, path in (("train", config.data.train), ("test", config.data.test)):
        with exclusive(Path(path).parent / f".{Path(path).name}.lock"):  # runs that start together pack once
            if not (Path(path) / "manifest.json").exists():
                _pack(config.data, subset, Path(path))
    data = open_data(config)
    support_order(config, data)  # before a job is started that waits for GPUs
    test = ImageStore.open(Path(config.data.test))
    if test.classes != data.classes:
        raise ValueError(
            f"{test.path} has the classes {list(test.classes)[:5]}…, but {data.labelled_store.path} has "
            f"{list(data.classes)[:5]}…. Pack both from the same data set."
        )
    control.fence()
    mark_done(run.prepare, digests=data.digests | {"test": test.digest})


def open_data(config: Config, *, staged: bool = False) -> RunData:
    """Open the stores with the splits of a run.

    Args:
        config: of the run.
        staged: read training images from ``data.stage_to`` as far as they are copied there (:func:`staging`).

    Raises:
        FileNotFoundError: there is no store; the command that packs one is named.
        ValueError: store or split is damaged or does not fit the config.
    """
    data, folder = config.data, stage_folder(config) if staged else None
    train = ImageStore.open(Path(data.train), stage_to=folder, max_substitutes=data.max_substitutes)
    labelled_store = train
    if data.labelled is not None:
        labelled_store = ImageStore.open(Path(data.labelled), stage_to=folder, max_substitutes=data.max_substitutes)
    labelled, validation = labelled_and_validation(labelled_store, config.labels, seed=config.seed)
    return RunData(train, labelled_store, labelled, validation, StoreImages(labelled_store))


def support_order(config: Config, data: RunData) -> SupportOrder:
    """The support mini-batches of a run.

    Raises:
        ValueError: the labels do not suffice for them.
    """
    support = config.pretrain.support
    return SupportOrder(
        data.labelled,
        data.labelled_store.labels[data.labelled],
        num_classes=support.classes,
        images_per_class=support.images_per_class,
        seed=config.seed,
        balanced=config.data.support_order == "balanced",
    )


def stage_folder(config: Config) -> Path | None:
    """Where this node keeps copies of stores; None for nowhere.

    Raises:
        ValueError: a name in ``data.stage_to`` is not in this node's environment.
    """
    if config.data.stage_to is None:
        return None
    folder = os.path.expandvars(config.data.stage_to)
    if "$" in folder:
        raise ValueError(
            f"data.stage_to={config.data.stage_to!r} names something that is not in the environment of "
            f"{socket.gethostname()}. Name a folder on the node's own disk, or set data.stage_to=null."
        )
    return Path(folder)


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


def _pack(data: DataConfig, subset: str, destination: Path) -> None:
    if data.source is None:
        raise _not_packed(subset, destination)
    source = open_source(SourceConfig(kind=data.source, root=data.source_path, split=subset))
    pack(source, destination, options=PackOptions(), show_progress=True)


def _not_packed(field: str, path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"data.{field}={path} is not packed yet. Pack it first: python -m paws_hpc.shards pack KIND --to {path} "
        "(python -m paws_hpc.shards pack --help lists the kinds)."
    )
