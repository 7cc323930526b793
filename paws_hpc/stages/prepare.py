"""The first stage: it packs missing stores, draws missing splits, and says what is missing and how to get it.

It does not load torch unless there are weights to start from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from paws_hpc.config import Config
from paws_hpc.data.samplers import Positions, SupportSampler
from paws_hpc.data.splits import Split, labelled_and_validation
from paws_hpc.files import exclusive, read_json
from paws_hpc.packing import PackOptions, SourceConfig, open_source, pack
from paws_hpc.stage_table import import_torch
from paws_hpc.stages.context import StageContext
from paws_hpc.stages.run_folder import RunFolder, is_done, mark_done
from paws_hpc.store import ImageStore
from paws_hpc.store.format import MANIFEST_NAME, read_manifest

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStores:
    """The stores and the two splits of a run, which are drawn from ``labelled_store``."""

    config: Config
    train: ImageStore  # of the unlabelled images
    labelled_store: ImageStore  # the same object as ``train`` unless the config names another
    labelled_split: Split
    validation_split: Split

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that are learnt."""
        return self.labelled_store.classes

    @cached_property
    def labelled(self) -> Positions:
        """(M,) positions of the labelled images in ``labelled_store``."""
        return self.labelled_split.records(self.labelled_store)

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


def run(context: StageContext) -> None:
    """Pack what is missing, draw or read the splits, and write the digests of all into ``prepare/DONE``.

    Weights to start from are loaded, so that a file that does not fit ends the chain here and not on many nodes.

    Raises:
        FileNotFoundError: ``model.init`` is no file.
        ValueError: it does not fit, the stores do not go together, ``data.classes`` is not their number of classes, or
            the labels do not suffice for the support mini-batches.
    """
    config, run = context.config, context.run
    if config.model.init is not None:
        import_torch()
        from paws_hpc.stages.networks import starting_encoder  # noqa: PLC0415 - loads torch, which is not needed otherwise

        starting_encoder(config)
    labelled = config.data.labelled
    if labelled is not None and not (Path(labelled) / MANIFEST_NAME).exists():
        raise _not_packed("labelled", Path(labelled))
    for subset, path in (("train", config.data.train), ("test", config.data.test)):
        with exclusive(Path(path).parent / f".{Path(path).name}.lock"):  # runs that start together pack once
            if not (Path(path) / MANIFEST_NAME).exists():
                if config.data.source is None:
                    raise _not_packed(subset, Path(path))
                source = SourceConfig(kind=config.data.source, root=config.data.source_path, split=subset)
                pack(open_source(source), Path(path), options=PackOptions(), show_progress=True)
    data = open_stores(config)
    if config.data.classes not in (None, len(data.classes)):
        raise ValueError(
            f"data.classes={config.data.classes}, but {data.labelled_store.path} has {len(data.classes)} classes. Set "
            f"data.classes={len(data.classes)}."
        )
    if "pretrain" in config.stages:
        _check_support(config, data)  # before a job is started that waits for GPUs
    test = ImageStore.open(Path(config.data.test))
    if test.classes != data.classes:
        raise ValueError(
            f"{test.path} has the classes {list(test.classes)[:5]}…, but {data.labelled_store.path} has "
            f"{list(data.classes)[:5]}…. Pack both from the same data set."
        )
    context.fence()
    mark_done(run.prepare, digests=data.digests | {"test": test.digest})


def changed_images(config: Config, run: RunFolder) -> dict[str, str]:
    """Stores that hold other images than when the run was prepared, as the checkpoints' fields name their digests.

    Returns:
        ``digest.train``, ``digest.labelled_store`` or ``digest.test`` → path; none for a store that is not there.
    """
    if not is_done(run.prepare):
        return {}
    then, data = read_json(run.prepare / "DONE")["digests"], config.data
    paths = {"train": data.train, "test": data.test}
    if data.labelled is not None or "labelled_store" in then:
        paths["labelled_store"] = data.labelled or data.train
    return {
        f"digest.{name}": path
        for name, path in paths.items()
        if (Path(path) / MANIFEST_NAME).exists()
        and read_manifest(Path(path)).digest != then.get(name, then["train"])
        and f"digest.{name}" not in config.accept_changes
    }


def check_images(config: Config, run: RunFolder) -> None:
    """Raise ValueError if the run was trained or scored on other images than its stores now hold."""
    trained = run.checkpoints.exists() or (run.path / "baseline").exists() or run.result.exists()
    if trained and (changed := changed_images(config, run)):
        stores = ", ".join(dict.fromkeys(changed.values()))
        raise ValueError(
            f"{run.path} was begun with other images than are now in {stores}. Name the stores that it was begun "
            "with, give this run another name=…, or continue it all the same with "
            f"accept_changes=[{','.join(changed)}]."
        )


def open_stores(config: Config, *, open_store: Callable[[Path], ImageStore] = ImageStore.open) -> RunStores:
    """Open the stores with the splits of a run; ``open_store`` opens the store at a path, or a local copy of it.

    Raises:
        FileNotFoundError: there is no store; the command that packs one is named.
        ValueError: store or split is damaged or does not fit the config.
    """
    train = open_store(Path(config.data.train))
    labelled_store = train if config.data.labelled is None else open_store(Path(config.data.labelled))
    labelled, validation = labelled_and_validation(labelled_store, config.labels, seed=config.seed)
    return RunStores(config, train, labelled_store, labelled, validation)


def _check_support(config: Config, data: RunStores) -> None:
    """Raise ValueError if the labels do not suffice for the support mini-batches; warn of a likely collapse."""
    support, labels = config.pretrain.support, data.labelled_store.labels[data.labelled]
    SupportSampler(
        data.labelled,
        labels,
        num_classes=support.classes,
        images_per_class=support.images_per_class,
        seed=config.seed,
        balanced=config.data.support_order == "balanced",
    )
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    if warning := config.objective.few_labels_warning(fewest):
        _LOG.warning("%s", warning)
    elif fewest == 1 and config.optimizer.name == "sgd":
        _LOG.warning(
            "A class has one labelled image: there optimizer.name=lars with the support warm-up was 8 points better "
            "than sgd on digits (docs/results.md). experiment=digits_one_label has it, optimizer=lars_small its rates."
        )


def _not_packed(field: str, path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"data.{field}={path} is not packed yet. Pack it first: python -m paws_hpc.shards pack KIND --to {path} "
        "(python -m paws_hpc.shards pack --help lists the kinds)."
    )
