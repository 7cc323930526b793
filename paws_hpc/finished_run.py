"""A run that has trained, opened for commands, programs and notebooks: its networks, rows and representations.

Legend: N images, S the side of the evaluation crop, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from paws_hpc.cluster.frozen import read_config
from paws_hpc.config import Config
from paws_hpc.data.augment import normalise
from paws_hpc.data.config import DataConfig
from paws_hpc.data.crops import center_crop
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.deploy import Network, load_network
from paws_hpc.engine.evaluate import forward_set
from paws_hpc.engine.tracking import Row
from paws_hpc.files import read_record
from paws_hpc.packing.standard import image_pixels
from paws_hpc.report.run_record import read_run
from paws_hpc.stages.run_data import RunData, open_data
from paws_hpc.stages.run_folder import RunFolder, find_run, is_done
from paws_hpc.store.format import MANIFEST_NAME, StoreError, read_manifest


class Embeddings(NamedTuple):
    """Representations h (N, D) float32 of N images, their classes (N,) int64, both on the CPU, and their keys."""

    features: Tensor
    labels: Tensor
    keys: list[str]


def load_run(name: str, runs: Path | str = "runs", stores: Path | str | None = None) -> FinishedRun:
    """Open a run; ``name`` is its folder, or its name below ``runs``. What it holds is read when it is asked for.

    A store's path counts from the working folder, or from where the run was launched. ``stores`` is a folder below
    which they are now; they are known by their digests.

    Raises:
        FileNotFoundError: there is no such run (the message has names that are spelled alike), or it never started.
        ValueError: its config is damaged, or of another version.
    """
    run = RunFolder(find_run(name, Path(runs)))
    if not run.config.exists():
        raise FileNotFoundError(f"{run.path} has no {run.config.name}: nothing of it was started. Launch it first.")
    return FinishedRun(run, read_config(run.config), None if stores is None else Path(stores))


def stores_of(run: RunFolder, config: Config, folder: Path | None = None) -> DataConfig:
    """Where the stores of a run are now: at their paths from here or from where it was launched, or below ``folder``.

    A store at such a place counts only if it has the digest of the one that the run was prepared with.

    Raises:
        FileNotFoundError: one is nowhere.
    """
    digests = read_record(run.prepare / "DONE")["digests"] if is_done(run.prepare) else {}
    launched, below = run.path.resolve().parent, () if Path(config.runs).is_absolute() else Path(config.runs).parts
    here = [Path()]
    if below and launched.parts[-len(below) :] == below:  # a relative path, and nobody moved the run
        here.append(launched.parents[len(below) - 1])
    moved = [path.parent for path in folder.expanduser().glob(f"**/{MANIFEST_NAME}")] if folder is not None else []
    found = replace(config.data)
    for subset, path in config.data.stores.items():
        digest = digests.get("labelled_store" if subset == "labelled" else subset)
        places = [*(place / path for place in here), *moved]
        place = next((place for place in places if _has_digest(place, digest)), None)
        if place is None:
            looked = " nor ".join(f"from {each.resolve()}" for each in here)
            raise FileNotFoundError(
                f"{run.path} was made from data.{subset}={path}, and that store is not there {looked}, or is another "
                "by now. Name the folder below which it is with --stores."
            )
        setattr(found, subset, str(place))
    return found


def _has_digest(store: Path, digest: str | None) -> bool:
    """Whether there is a store with this digest, or with any where the run has not noted one."""
    with suppress(StoreError):
        return read_manifest(store).digest == digest or digest is None
    return False


class FinishedRun:
    """A run's ``folder`` and ``config``, and what can be made of them.

    Everything but :attr:`metrics` needs the stores that the config names. What a stage makes that has not finished is a
    FileNotFoundError, and damaged weights are a ValueError.
    """

    def __init__(self, folder: RunFolder, config: Config, stores: Path | None = None) -> None:
        self.folder, self.config, self._stores = folder, config, stores

    @cached_property
    def data(self) -> RunData:
        """The stores and splits."""
        return open_data(replace(self.config, data=stores_of(self.folder, self.config, self._stores)))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.classes

    @cached_property
    def encoder(self) -> nn.Module:
        """The network by which PAWS-NN is scored: normalised images (N, 3, S, S) float32 to h (N, D)."""
        return self.network("projection").module

    def network(self, head: str) -> Network:
        """Another network of the run, and what to know of it; ``head`` is one of :data:`paws_hpc.deploy.HEADS`."""
        return load_network(self.folder, self.data, head)

    def transform(self, image: Image.Image | NDArray[np.uint8]) -> Tensor:
        """An image, or its pixels (H, W, 3), to the encoder's input (3, S, S) float32, as this run's scores see it."""
        pixels = image_pixels(image) if isinstance(image, Image.Image) else image
        crop = center_crop(pixels, self.config.views.evaluation)[None]
        return normalise(crop, mean=self.data.train.mean, std=self.data.train.std)[0]

    @property
    def metrics(self) -> list[Row]:
        """What every stage logged, one flat row for each step or epoch, for ``pandas.DataFrame``.

        ``stage`` is ``pretrain``, ``finetune`` or ``baseline``; rows of the latter two name their ``trial``.
        """
        record = read_run(self.folder.path)
        rows: list[Row] = [{"stage": "pretrain", **row} for row in record.pretrain.rows]
        for stage in ("finetune", "baseline"):
            for each in record.sweep(stage)[0]:
                rows += [{"stage": stage, "trial": each.trial.name, **row} for row in each.metrics.rows]
        return rows

    def embeddings(self, subset: str = "test") -> Embeddings:
        """Representations of the ``train``, ``labelled``, ``validation`` or ``test`` images, one centre crop each.

        They are computed where :attr:`encoder` is, which ``run.encoder.cuda()`` moves.

        Raises:
            ValueError: the run has no such images.
        """
        data = self.data
        makers: dict[str, Callable[[], EvaluationSet | None]] = {
            "train": lambda: data.images(data.train, np.arange(len(data.train))),
            "labelled": data.labelled_images,
            "validation": data.validation_images,
            "test": data.test_images,
        }
        if subset not in makers or (images := makers[subset]()) is None:
            raise ValueError(
                f"{self.folder.path} has no {subset!r} images. Choose train, labelled, validation or test."
            )
        features = forward_set(self.encoder, images, next(self.encoder.parameters()).device)
        return Embeddings(features.cpu(), images.labels, list(images.store.keys.at(images.records)))
