"""The first stage: it packs missing stores, draws missing splits, and says what is missing and how to get it.

It does not load torch unless there are weights to start from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from paws_hpc.command import program
from paws_hpc.config import Config, sweep_config
from paws_hpc.data.config import DataConfig
from paws_hpc.data.overlap import NEAR_BITS, shared
from paws_hpc.data.samplers import EpochSampler, Positions, SupportSampler
from paws_hpc.data.splits import Split, folds, labelled_and_validation
from paws_hpc.exhibits import text, write_exhibits
from paws_hpc.files import exclusive, read_record, write_text
from paws_hpc.packing import PackOptions, SourceConfig, open_source, pack
from paws_hpc.stage_table import SWEEPS, import_torch
from paws_hpc.stages.context import StageContext
from paws_hpc.stages.run_folder import RunFolder, has_trained, is_done, mark_done
from paws_hpc.store import ImageStore
from paws_hpc.store.format import MANIFEST_NAME, read_manifest

_LOG = logging.getLogger(__name__)
_OVERLAP = "overlap.tsv"


@dataclass(frozen=True)
class RunStores:
    """The stores and the two splits of a run, which are drawn from ``labelled_store``."""

    config: Config
    train: ImageStore  # of the unlabelled images
    labelled_store: ImageStore  # the same object as ``train`` unless the config names another
    labelled_split: Split
    validation_split: Split | None  # None: cross-validation of the labelled images

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
        }
        if self.validation_split is not None:
            digests["validation"] = self.validation_split.digest
        if self.labelled_store is not self.train:
            digests["labelled_store"] = self.labelled_store.digest
        return digests


def run(context: StageContext) -> None:
    """Pack what is missing, draw or read the splits, and write the digests of all into ``prepare/DONE``.

    Raises:
        FileNotFoundError, ValueError: of :func:`_check_network`.
        ValueError: the images do not suffice for a stage (:func:`check_stages`), are others than those on which the run
            trained, or test images are among the others.
    """
    config, run = context.config, context.run
    _check_network(config)
    for subset, path in config.data.stores.items():
        if (Path(path) / MANIFEST_NAME).exists():
            continue  # without the lock: a shared store may be read-only
        with exclusive(Path(path).parent / f".{Path(path).name}.lock"):  # runs that start together pack once
            if not (Path(path) / MANIFEST_NAME).exists():
                source = open_source(packed_from(config.data, subset))
                pack(source, Path(path), options=PackOptions(), show_progress=True)
    check_images(config, run)  # of stores that were packed only now
    data = open_stores(config)
    for warning in check_stages(config, data):
        _LOG.warning("%s", warning)
    _check_overlap(config, data, run.prepare)
    context.fence()
    test = {} if config.data.test is None else {"test": read_manifest(Path(config.data.test)).digest}
    mark_done(run.prepare, digests=data.digests | test)


def packed_from(data: DataConfig, subset: str) -> SourceConfig:
    """What the store ``train``, ``labelled`` or ``test`` is packed from; FileNotFoundError if nothing is named."""
    if subset not in data.folders:
        if data.source is not None and subset != "labelled":
            return SourceConfig(kind=data.source, root=data.source_path, split=subset)
        path, command = getattr(data, subset), program("pack")
        raise FileNotFoundError(
            f"data.{subset}={path} is not packed yet. Pack it first: {command} KIND --to {path} ({command} --help "
            "lists the kinds)."
        )
    unlabelled = subset == "train" and data.labelled is not None
    listed = data.labels if subset != "test" and not unlabelled else None
    return SourceConfig("flat" if unlabelled or listed else "folder", root=data.folders[subset], labels=listed)


def _check_network(config: Config) -> None:
    """Make a network of timm, or load weights to start from, so that what does not fit ends the chain here."""
    if config.model.init is not None or config.model.timm is not None:
        import_torch()
        from paws_hpc.stages.networks import starting_encoder  # noqa: PLC0415 - loads torch, which is not needed otherwise

        starting_encoder(config)


def check_before_packing(config: Config) -> None:
    """Raise what :func:`_check_network` raises, and :func:`check_stages` if all stores are there; writes nothing."""
    _check_network(config)
    if all((Path(path) / MANIFEST_NAME).exists() for path in config.data.stores.values()):
        list(check_stages(config, open_stores(config, save_splits=False)))


def check_stages(config: Config, data: RunStores) -> Iterator[str]:
    """Check that the images and labels suffice for every stage of the chain, before the first of them trains.

    Yields:
        Warnings: what may not end well.

    Raises:
        ValueError: a stage could not train; the field is named. Or the stores do not go together.
    """
    if config.data.classes not in (None, len(data.classes)):
        raise ValueError(
            f"data.classes={config.data.classes}, but {data.labelled_store.path} has {len(data.classes)} classes. Set "
            f"data.classes={len(data.classes)}."
        )
    if not all(counts := data.labelled_store.manifest.class_counts):
        empty, command = data.classes[counts.index(0)], f"`{program('pack')} … --classes NAME …`"
        raise ValueError(
            f"{data.labelled_store.path} has no image of class {empty!r}. Pack the others alone, by {command}."
        )
    if config.data.test is not None:
        test = read_manifest(Path(config.data.test)).classes
        check_same_classes(config.data.test, test, str(data.labelled_store.path), data.classes)
    fewest = int(np.unique(data.labelled_store.labels[data.labelled], return_counts=True)[1].min())
    if "pretrain" in config.stages:
        yield from _check_pretraining(config, data, fewest)
    labelled = len(data.labelled)
    if data.validation_split is None:
        held_out = folds(data.labelled_store.labels[data.labelled], data.classes, seed=config.seed)
        labelled -= max(int(mask.sum()) for mask in held_out)
    for name in (sweep for sweep in SWEEPS if sweep in config.stages):
        _check_batches(config, name, labelled)
    if config.suncet.steps and "selection" in config.stages and fewest < 2:
        raise ValueError(
            f"suncet.steps={config.suncet.steps} classifies labelled images by the others of their class, but a class "
            "has one labelled image. Label two at least, or set suncet.steps=0."
        )


def _check_overlap(config: Config, data: RunStores, folder: Path) -> None:
    """Look for test images among the training and labelled ones; ``folder`` gets a list of them and an exhibit.

    Raises:
        ValueError: there are some of equal pixels, and ``data.allow_overlap`` is false.
    """
    if config.data.test is None:
        return
    test, found = ImageStore(Path(config.data.test)), list[tuple[str, str, str, str]]()
    others = {"train": (data.train, np.arange(len(data.train)))}
    if data.labelled_store is not data.train:
        splits = [split for split in (data.labelled_split, data.validation_split) if split is not None]
        others["labelled"] = (
            data.labelled_store,
            np.concatenate([split.records(data.labelled_store) for split in splits]),
        )
    for field, (store, records) in others.items():
        found += [(kind, mine, field, other) for kind, mine, other in shared(test, store, records, folder)]
    write_text(folder / _OVERLAP, "".join("\t".join(map(json.dumps, pair)) + "\n" for pair in found))
    words = []
    for kind, what in (("same", "equal pixels"), ("near", f"at least {128 - NEAR_BITS} equal bits of a 128-bit hash")):
        pairs = {mine: f"{mine!r} is {field}'s {other!r}" for of, mine, field, other in found if of == kind}
        examples = f" ({', '.join([*pairs.values()][:3])})" if pairs else ""
        words.append(f"{len(pairs):,} of {len(test):,} test images are among the others by {what}{examples}")
    same = "same" in {kind for kind, *_ in found}
    if same and not config.data.allow_overlap:
        raise ValueError(
            f"data.test={config.data.test}: {words[0]}. All are in {folder / _OVERLAP}. Take them out of one of the "
            "stores, or set data.allow_overlap=true if you mean it."
        )
    _LOG.log(logging.WARNING if same else logging.INFO, "%s; %s.", *words)
    write_exhibits(folder, [text("Test images among the others", f"{'; '.join(words)}. All are in {_OVERLAP}.")])


def check_same_classes(path: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raise ValueError unless test images and labelled images, at two paths, are of the same classes."""
    if list(classes) != list(others):
        raise ValueError(
            f"{path} has {len(classes)} classes, {list(classes)[:5]} …, but {other} has {len(others)}, "
            f"{list(others)[:5]} …. Give both the same."
        )


def changed_images(config: Config, run: RunFolder, begun: DataConfig | None = None) -> dict[str, str]:
    """Stores that hold other images than when the run was prepared, as the checkpoints' fields name their digests.

    Returns:
        ``digest.train``, ``digest.labelled_store`` or ``digest.test`` → path. A store that is not there is named only
        if ``begun``, the fields with which the run was begun, has no such path: nobody knows what will be packed there.
    """
    if not is_done(run.prepare):
        return {}
    then, data = read_record(run.prepare / "DONE")["digests"], config.data
    paths = {"train": data.train} | ({} if data.test is None else {"test": data.test})
    if data.labelled is not None or "labelled_store" in then:
        paths["labelled_store"] = data.labelled or data.train

    def changed(name: str, path: str) -> bool:
        if (Path(path) / MANIFEST_NAME).exists():
            return read_manifest(Path(path)).digest != then.get(name, then["train"])
        return begun is not None and path not in begun.stores.values()

    accepted = {field.removeprefix("digest.") for field in config.accept_changes}
    return {f"digest.{name}": path for name, path in paths.items() if name not in accepted and changed(name, path)}


def check_images(config: Config, run: RunFolder, begun: DataConfig | None = None) -> None:
    """Raise ValueError if the run was trained or scored on other images than its stores hold, or will hold."""
    if has_trained(run) and (changed := changed_images(config, run, begun)):
        stores = ", ".join(dict.fromkeys(changed.values()))
        raise ValueError(
            f"{run.path} was begun with other images than are now in {stores}. Name the stores that it was begun "
            "with, give this run another name=…, or continue it all the same with "
            f"accept_changes=[{','.join(changed)}]."
        )


def open_stores(
    config: Config, *, open_store: Callable[[Path], ImageStore] = ImageStore, save_splits: bool = True
) -> RunStores:
    """Open the stores with the splits of a run; ``open_store`` opens the store at a path, or a local copy of it.

    Splits that are drawn now are kept beside the store unless ``save_splits`` is false.

    Raises:
        FileNotFoundError: there is no store; the command that packs one is named.
        ValueError: store or split is damaged or does not fit the config.
    """
    train = open_store(Path(config.data.train))
    labelled_store = train if config.data.labelled is None else open_store(Path(config.data.labelled))
    labelled, validation = labelled_and_validation(labelled_store, config.labels, seed=config.seed, save=save_splits)
    return RunStores(config, train, labelled_store, labelled, validation)


def _check_pretraining(config: Config, data: RunStores, fewest: int) -> Iterator[str]:
    """Raise ValueError if there are too few images or labels for a step; yield a warning of a likely collapse.

    ``fewest`` labelled images are in the smallest class.
    """
    support, labels = config.pretrain.support, data.labelled_store.labels[data.labelled]
    EpochSampler(len(data.train), config.pretrain.batch_size, config.seed)
    sampler = SupportSampler(
        data.labelled,
        labels,
        num_classes=support.classes,
        images_per_class=support.images_per_class,
        seed=config.seed,
        balanced=config.data.support_order == "balanced",
    )
    sampler.check_repeats(config.views.support_views)
    if warning := config.objective.few_labels_warning(fewest):
        yield warning
    elif fewest == 1 and config.optimizer.name == "sgd":
        yield (
            "A class has one labelled image: there optimizer.name=lars with the support warm-up was 8 points better "
            "than sgd on digits (docs/results.md). experiment=digits_one_label has it, optimizer=lars_small its rates."
        )


def _check_batches(config: Config, sweep: str, labelled: int) -> None:
    """Raise ValueError if a step of a trial has fewer than two of the ``labelled`` images for each rank."""
    ranks, settings = config.resources[sweep].ranks, sweep_config(config, sweep)
    size = min(labelled, *(settings.of_trial(trial).batch_size for trial in settings.trials()))
    if size < 2 * ranks:
        raise ValueError(
            f"{sweep}.batch_size: a step has {size} of the {labelled} labelled images for {ranks} rank"
            f"{'s' if ranks > 1 else ''} (resources.{sweep}), and batch normalisation needs two on each. Use larger "
            "batches, fewer ranks or more labels."
        )
