"""Predictions about images that no run has seen, with the labelled images that they resemble most.

Legend: n images, M labelled images, K classes, D features, s the side of the evaluation crop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paws_hpc.data.augment import normalise
from paws_hpc.data.crops import center_crop
from paws_hpc.data.workers import single_threaded
from paws_hpc.deploy.files import read_image
from paws_hpc.engine.evaluate import Representation, evaluation_mode, forward_set, paws_nn
from paws_hpc.objective.neighbours import cosine_logits, full_precision
from paws_hpc.stages.calibrate import read_calibration
from paws_hpc.stages.networks import load_neighbours, load_pretrained, load_winner
from paws_hpc.stages.run_data import RunData
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)
METHODS = ("paws-nn", "fine-tuned")
_AT_ONCE = 256  # as many as in evaluation, so that sums, too, are taken in its order


@dataclass(frozen=True)
class Prediction:
    """The classes of one image file.

    Attributes:
        path: of the file.
        doubt: why the classes mean nothing for this image; it is shown instead of them. None as a rule.
        classes: ``name`` and ``probability``, the most probable first.
        nearest: ``key``, ``class`` and ``similarity``, a cosine, of labelled images, the most similar first.
        records: positions of those images.
        crop: (3, s, s) uint8, the input of the network.
    """

    path: Path
    doubt: str | None
    classes: list[dict[str, Any]]
    nearest: list[dict[str, Any]]
    records: list[int]
    crop: Tensor


@dataclass(frozen=True)
class Failure:
    """An image file that cannot be used, and why."""

    path: Path
    reason: str


class Predictor:
    """A network of a finished run that classifies image files as the run's own evaluation classifies packed images."""

    def __init__(self, run: RunFolder, data: RunData, *, method: str, device: torch.device) -> None:
        """Load the network by which PAWS-NN was scored, or the fine-tuned one; represent all labelled images by it.

        Raises:
            FileNotFoundError: the stage that makes the network has not finished.
            ValueError: its weights are damaged or of another experiment, or there is no fine-tuned network.
        """
        self._data, self._crop, self._device = data, data.config.views.evaluation, device
        self._linear: nn.Linear | None = None
        if method == "fine-tuned":
            classifier, _ = load_winner(run, data, device)
            self._network: nn.Module = classifier
            self._linear = classifier.linear
            classifier.add_module("linear", nn.Identity())  # so that the network gives what its last layer would take
        else:
            self._network = Representation(load_neighbours(run, data, device)[0])
        self._calibration = read_calibration(run, device)
        if self._calibration is None:
            _LOG.warning(
                "%s has no calibration: probabilities are as the network gives them, and images unlike the training "
                "images are not recognised. Launch the stage 'calibrate' of this run for both.",
                run.path,
            )
        else:
            self._backbone = load_pretrained(run, data, device)[0].backbone
        images = data.labelled_images()
        self._supports = forward_set(self._network, images, device)
        self._support_labels = images.labels

    def predict(self, paths: Sequence[Path], *, top: int, nearest: int) -> Iterator[Prediction | Failure]:
        """Classify files one after the other; one that cannot be used does not keep the others.

        At most ``top`` classes and ``nearest`` labelled images are named.
        """
        threads, limit = self._data.config.data.threads, single_threaded()
        with ThreadPoolExecutor(threads, thread_name_prefix="predict", initializer=limit) as pool:
            for start in range(0, len(paths), _AT_ONCE):
                read = list(pool.map(self._read, paths[start : start + _AT_ONCE]))
                images = [item for item in read if not isinstance(item, Failure)]
                predictions = iter(self._classify(images, top=top, nearest=nearest) if images else [])
                for item in read:
                    yield item if isinstance(item, Failure) else next(predictions)

    def support_crop(self, record: int) -> Tensor:
        """(3, s, s) uint8, the evaluation crop of a labelled image."""
        return self._data.labelled_images().crops(np.array([record]))[0]

    def _read(self, path: Path) -> tuple[Path, Tensor] | Failure:
        try:
            pixels = read_image(path, self._data.labelled_store)
            return path, center_crop(pixels, self._crop)
        except OSError as error:
            return Failure(path, error.strerror or str(error))
        except ValueError as error:
            return Failure(path, str(error))

    def _classify(self, images: list[tuple[Path, Tensor]], *, top: int, nearest: int) -> Iterator[Prediction]:
        data = self._data
        crops = torch.stack([crop for _, crop in images])
        batch = normalise(crops.to(self._device), mean=data.train.mean, std=data.train.std)
        with evaluation_mode(self._network):
            rows = self._network(batch)
            probability, label = self._probabilities(rows).topk(min(top, len(data.classes)), dim=1)
            with full_precision(rows):
                cosines = cosine_logits(rows, self._supports, temperature=1.0)
            similarity, support = cosines.topk(min(nearest, len(self._supports)), dim=1)
        columns = (values.tolist() for values in (probability, label, similarity, support))
        for (path, crop), doubt, *row in zip(images, self._doubts(batch), *columns, strict=True):
            probabilities, labels, similarities, supports = row
            classes = [
                {"name": data.classes[number], "probability": value}
                for number, value in zip(labels, probabilities, strict=True)
            ]
            records = data.labelled[supports].tolist()
            names = [data.classes[number] for number in self._support_labels[supports].tolist()]
            neighbours = [
                {"key": data.labelled_store.keys[record], "class": name, "similarity": value}
                for record, name, value in zip(records, names, similarities, strict=True)
            ]
            yield Prediction(path, doubt, classes, neighbours, records, crop)

    def _doubts(self, batch: Tensor) -> list[str | None]:
        """Why the classes of each image mean nothing; None where they do, and in runs without calibration."""
        if self._calibration is None:
            return [None] * len(batch)
        with evaluation_mode(self._backbone):
            shares = self._calibration.unlike(self._backbone(batch))
        return [
            None
            if share is None
            else f"unlike the training images: {100 * share:.1f} % of validation images are nearer"
            for share in shares
        ]

    def _probabilities(self, rows: Tensor) -> Tensor:
        """(n, D) → (n, K)."""
        if self._linear is not None:
            temperature = 1.0 if self._calibration is None else self._calibration.temperature
            return (self._linear(rows) / temperature).softmax(dim=1)
        labels, temperature = self._support_labels.to(rows.device), self._data.config.objective.temperature
        return paws_nn(rows, self._supports, labels, num_classes=len(self._data.classes), temperature=temperature)
