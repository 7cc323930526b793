"""How far predictions can be trusted: calibrated probabilities, scores by class, and images unlike the training images.

Everything is chosen on the local validation split; the test split is only reported on.

Legend: N images, R reference images, K classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor
from torch.nn.functional import normalize

from paws_hpc import distributed
from paws_hpc.config import Config
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.checkpoint import load_tensors, save_tensors
from paws_hpc.engine.evaluate import forward_set
from paws_hpc.exhibits import Exhibit, lines, table, text, write_exhibits
from paws_hpc.files import read_json, write_json
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.pretrain import load_pretrained
from paws_hpc.stages.probing import backbone_features
from paws_hpc.stages.run_data import RunData, open_data
from paws_hpc.stages.run_folder import RunFolder, mark_done
from paws_hpc.stages.selection import load_winner
from paws_hpc.store import ImageStore

BINS = 15
_MOST_REFERENCES = 20_000  # training images that an image is compared with
_USUAL = 0.99  # share of validation images that count as like the training images


@dataclass(frozen=True)
class Calibration:
    """What predictions take from this stage.

    Attributes:
        temperature: by which the fine-tuned network's logits are divided.
        distances: (N,) of the validation images to their nearest reference image, ascending.
        threshold: the distance beyond which an image is unlike the training images.
        references: (R, D) features of training images, of unit length.
    """

    temperature: float
    distances: NDArray[np.float64]
    threshold: float
    references: Tensor

    def unlike(self, features: Tensor) -> list[float | None]:
        """For each row of (N, D) features the share of validation images that are nearer to the training images.

        Returns:
            None where an image is like the training images.
        """
        found = nearest_distances(features, self.references.to(features.device))
        ranks = np.searchsorted(self.distances, found) / len(self.distances)
        return [float(rank) if far > self.threshold else None for far, rank in zip(found, ranks, strict=True)]


def run(context: TorchContext) -> None:
    """Write ``calibrate/calibration.json``, ``references.pt`` and what the report shows."""
    config, run, device, control = context.config, context.run, context.device, context.control
    folder = run.path / context.stage
    if "trial" not in read_json(run.selected):
        if distributed.is_main():
            write_exhibits(folder, [text("Calibration", "This run has no fine-tuned network to calibrate.")])
            mark_done(folder)
        return
    data = open_data(config)
    store = ImageStore.open(Path(config.data.test))
    validation, test = data.validation_images(config), data.images(config, store, np.arange(len(store)))
    classifier, _ = load_winner(config, run, len(data.classes), device)
    logits = {"validation": forward_set(classifier, validation, device, control).double().cpu()}
    logits["test"] = forward_set(classifier, test, device, control).double().cpu()
    labels = {"validation": validation.labels.cpu(), "test": test.labels.cpu()}
    temperature = fit_temperature(logits["validation"], labels["validation"])
    errors = {
        split: {
            "before": calibration_error(logits[split], labels[split]),
            "after": calibration_error(logits[split] / temperature, labels[split]),
        }
        for split in logits
    }
    encoder, _ = load_pretrained(config, run, data, device)
    references = normalize(backbone_features(encoder, _reference_images(config, data), device, control).cpu())
    near = np.sort(nearest_distances(backbone_features(encoder, validation, device, control).cpu(), references))
    threshold = float(np.quantile(near, _USUAL, method="higher"))
    far = nearest_distances(backbone_features(encoder, test, device, control).cpu(), references) > threshold
    control.fence()
    if distributed.is_main():
        save_tensors(folder / "references.pt", {"references": references})
        write_json(
            folder / "calibration.json",
            {
                "temperature": temperature,
                "calibration_error": errors,
                "distances": near.tolist(),
                "threshold": threshold,
                "test_unlike": float(far.mean()),
            },
        )
        shown = {"before": logits["test"], f"temperature {temperature:.3g}": logits["test"] / temperature}
        write_exhibits(
            folder,
            _exhibits(data.classes, shown, labels["test"], errors, temperature=temperature, unlike=float(far.mean())),
        )
        mark_done(folder)


def read_calibration(run: RunFolder, device: torch.device) -> Calibration | None:
    """What the stage left in a run; None where it did not run or had nothing to calibrate."""
    folder = run.path / "calibrate"
    if not (folder / "calibration.json").exists():
        return None
    found = read_json(folder / "calibration.json")
    references = load_tensors(folder / "references.pt", device)["references"]
    return Calibration(found["temperature"], np.array(found["distances"]), found["threshold"], references)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [0.05, 20] with the least negative log-likelihood (Guo et al., arXiv:1706.04599).

    Args:
        logits: (N, K).
        labels: (N,).
    """

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / np.exp(log_temperature), labels).item()

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def reliability(logits: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and images of each of the equally wide bins of confidence that is not empty."""
    confidence, guess = logits.softmax(dim=1).max(dim=1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS)
    found = []
    for number in range(1, BINS + 1):
        inside = place == number
        if count := int(inside.sum()):
            right = (guess[inside] == labels[inside]).double().mean().item()
            found.append((confidence[inside].mean().item(), right, count))
    return found


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The expected calibration error: mean distance of confidence and accuracy over the images, by 15 bins."""
    return sum(abs(sure - right) * count for sure, right, count in reliability(logits, labels)) / len(labels)


def nearest_distances(features: Tensor, references: Tensor) -> NDArray[np.float64]:
    """(N, D) features, (R, D) references of unit length → (N,) cosine distance to the nearest reference."""
    similarities = [
        (normalize(rows) @ references.T).max(dim=1).values.double().cpu().numpy() for rows in features.split(1024)
    ]
    return 1 - np.concatenate(similarities)


def _reference_images(config: Config, data: RunData) -> EvaluationSet:
    """Training images without those for validation, evenly spread over the store where it has more than needed."""
    own = np.arange(len(data.train))
    if data.labelled_store is data.train or config.data.labelled is None:
        own = np.setdiff1d(own, data.validation_split.records(data.labelled_store))
    chosen = own[np.unique(np.linspace(0, len(own) - 1, min(len(own), _MOST_REFERENCES)).round().astype(int))]
    return data.images(config, data.train, chosen)


def _exhibits(
    classes: tuple[str, ...],
    logits: dict[str, Tensor],
    labels: Tensor,
    errors: dict[str, dict[str, float]],
    *,
    temperature: float,
    unlike: float,
) -> list[Exhibit]:
    curves: dict[str, Any] = {"perfect": ([0.0, 1.0], [0.0, 1.0])}
    for name, values in logits.items():
        points = reliability(values, labels)
        curves[name] = ([sure for sure, _, _ in points], [right for _, right, _ in points])
    guess = next(iter(logits.values())).argmax(dim=1)
    precision, recall, f1, count = precision_recall_fscore_support(
        labels.numpy(), guess.numpy(), labels=range(len(classes)), zero_division=0.0
    )
    return [
        lines(
            "Reliability on the test split", curves, x="confidence", y="accuracy",
            caption=f"Images in {BINS} bins of confidence; a bin below the diagonal is surer than it is right.",
        ),
        table(
            "Expected calibration error",
            ["split", "before", "after"],
            [[split, f"{100 * own['before']:.2f} %", f"{100 * own['after']:.2f} %"] for split, own in errors.items()],
            caption=f"Logits are divided by {temperature:.3g}, which was chosen on the validation split. "
            f"{100 * unlike:.1f} % of the test images are farther from the training images than "
            f"{100 * _USUAL:.0f} % of the validation images: predict calls such images unlike the training images.",
        ),
        table(
            "Fine-tuned network by class, test split",
            ["class", "precision", "recall", "F1", "images"],
            [
                [name, f"{p:.3f}", f"{r:.3f}", f"{f:.3f}", int(n)]
                for name, p, r, f, n in zip(classes, precision, recall, f1, count, strict=True)
            ],
        ),
    ]  # fmt: skip
