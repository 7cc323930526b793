"""The first stage: packed images and splits are there, or are made, or their absence is an error with its remedy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paws_hpc.config import Config, DataConfig
from paws_hpc.data.order import Positions
from paws_hpc.data.splits import Split, labelled_and_validation
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.files import exclusive
from paws_hpc.stages.run_folder import RunFolder, mark_done
from paws_hpc.store import ImageStore, PackOptions, SourceConfig, open_source, pack


@dataclass(frozen=True)
class RunData:
    """The training store and the two splits of a run."""

    train: ImageStore
    labelled_split: Split
    validation_split: Split

    @property
    def labelled(self) -> Positions:
        """(M,) positions of the labelled images."""
        return self.labelled_split.records(self.train)

    def labelled_images(self, config: Config) -> EvaluationSet:
        """The labelled images, one centre crop each."""
        return self.images(config, self.train, self.labelled)

    def validation_images(self, config: Config) -> EvaluationSet:
        """The local validation split, one centre crop each."""
        return self.images(config, self.train, self.validation_split.records(self.train))

    def images(self, config: Config, store: ImageStore, records: Positions) -> EvaluationSet:
        """Images of any store to score, one centre crop each, normalised as in training."""
        return EvaluationSet(store, records, config.views.evaluation, self.train, config.data.threads)

    @property
    def digests(self) -> dict[str, str]:
        """Of data set and splits, by name."""
        return {
            "train": self.train.digest,
            "labelled": self.labelled_split.digest,
            "validation": self.validation_split.digest,
        }


def run(config: Config, run: RunFolder, *, control: JobControl = UNATTENDED) -> None:
    """Pack what is missing, draw or read the splits, and write the digests of all into ``prepare/DONE``."""
    for subset, path in (("train", config.data.train), ("test", config.data.test)):
        with exclusive(Path(path).parent / f".{Path(path).name}.lock"):  # runs that start together pack once
            if not (Path(path) / "manifest.json").exists():
                _pack(config.data, subset, Path(path))
    data = open_data(config)
    test = ImageStore.open(Path(config.data.test))
    if test.classes != data.train.classes:
        raise ValueError(
            f"{test.path} has the classes {list(test.classes)[:5]}…, but {data.train.path} has "
            f"{list(data.train.classes)[:5]}…. Pack both from the same data set."
        )
    control.fence()
    mark_done(run.prepare, digests=data.digests | {"test": test.digest})


def open_data(config: Config) -> RunData:
    """Open the training store with the splits of a run.

    Raises:
        FileNotFoundError: there is no store; the command that packs one is named.
        ValueError: store or split is damaged or does not fit the config.
    """
    store = ImageStore.open(Path(config.data.train))
    labelled, validation = labelled_and_validation(store, config.labels, seed=config.seed)
    return RunData(store, labelled, validation)


def _pack(data: DataConfig, subset: str, destination: Path) -> None:
    if data.source is None:
        raise FileNotFoundError(
            f"data.{subset}={destination} is not packed yet. Pack it first: python -m paws_hpc.shards pack KIND --to "
            f"{destination} (python -m paws_hpc.shards pack --help lists the kinds)."
        )
    source = open_source(SourceConfig(kind=data.source, root=data.source_path, split=subset))
    pack(source, destination, options=PackOptions(), show_progress=True)
