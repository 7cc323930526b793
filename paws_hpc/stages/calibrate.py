"""How far predictions can be trusted: calibrated probabilities, and images unlike the training images.

Everything is chosen on the local validation split; the test split is only reported on.

Legend: N images, R reference images, K classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import normalize

from paws_hpc import distributed
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.checkpoint import load_tensors, save_tensors
from paws_hpc.engine.evaluate import forward_set
from paws_hpc.exhibits import Exhibit, lines, table, text, write_exhibits
from paws_hpc.files import file_hash, read_record, write_record
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.networks import load_pretrained, load_winner
from paws_hpc.stages.run_data import RunData, open_data
from paws_hpc.stages.run_folder import RunFolder, is_done, mark_done

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
        distances = nearest_distances(features, self.references.to(features.device))
        shares = np.searchsorted(self.distances, distances) / len(self.distances)
        return [float(share) if far > self.threshold else None for far, share in zip(distances, shares, strict=True)]


def run(context: TorchContext) -> None:
    """Write ``calibrate/calibration.json``, ``references.pt`` and what the report shows, once for the same networks."""
    run, device, control = context.run, context.device, context.control
    folder = run.path / context.stage
    if "trial" not in read_record(run.selected):
        if distributed.is_main():
            write_exhibits(folder, [text("Calibration", "This run has no fine-tuned network to calibrate.")])
            mark_done(folder)
        return
    data = open_data(context.config)
    validation, test = data.validation_images(), data.test_images()
    if validation is None or test is None:
        if distributed.is_main():
            lacking = "validation" if validation is None else "test"
            write_exhibits(folder, [text("Calibration", f"Nothing is calibrated: the run has no {lacking} images.")])
            mark_done(folder)
        return
    classifier, winner = load_winner(run, data, device)
    encoder, pretrained = load_pretrained(run, data, device)
    of = {"fine_tuned": file_hash(winner), "pretrained": file_hash(pretrained)}
    written = folder / "calibration.json"
    if is_done(folder) and written.exists() and read_record(written).get("of") == of:
        return
    images = {"validation": validation, "test": test}
    labels = {split: own.labels for split, own in images.items()}
    logits = {split: forward_set(classifier, own, device, control).double().cpu() for split, own in images.items()}
    temperature = fit_temperature(logits["validation"], labels["validation"])
    errors = {
        split: {
            "before": calibration_error(own, labels[split]),
            "after": calibration_error(own / temperature, labels[split]),
        }
        for split, own in logits.items()
    }
    references = normalize(forward_set(encoder.backbone, _reference_images(data), device, control).cpu())
    distances = {
        split: nearest_distances(forward_set(encoder.backbone, own, device, control).cpu(), references)
        for split, own in images.items()
    }
    threshold = float(np.quantile(distances["validation"], _USUAL, method="higher"))
    result = {
        "of": of,
        "temperature": temperature,
        "calibration_error": errors,
        "distances": np.sort(distances["validation"]).tolist(),
        "threshold": threshold,
        "test_unlike": float((distances["test"] > threshold).mean()),
    }
    control.fence()
    if distributed.is_main():
        save_tensors(folder / "references.pt", {"references": references})
        write_record(written, result)
        write_exhibits(folder, _exhibits(logits["test"], labels["test"], result))
        mark_done(folder)


def read_calibration(run: RunFolder, device: torch.device) -> Calibration | None:
    """What the stage left in a run; None where it did not run or had nothing to calibrate."""
    folder = run.path / "calibrate"
    if not (folder / "calibration.json").exists():
        return None
    value = read_record(folder / "calibration.json")
    references = load_tensors(folder / "references.pt", device)["references"]
    return Calibration(value["temperature"], np.array(value["distances"]), value["threshold"], references)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [0.05, 20] with the least negative log-likelihood (Guo et al., arXiv:1706.04599).

    Args:
        logits: (N, K).
        labels: (N,).
    """

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / np.exp(log_temperature), labels).item()

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(best.x))


def reliability(logits: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each equally wide bin of confidence that is not empty."""
    confidence, guess = logits.softmax(dim=1).max(dim=1)
    numbers = (confidence * BINS).ceil().long().clamp(1, BINS)
    bins = []
    for number in numbers.unique():
        members = numbers == number
        accuracy = (guess[members] == labels[members]).double().mean().item()
        bins.append((confidence[members].mean().item(), accuracy, int(members.sum())))
    return bins


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The expected calibration error: mean distance of confidence and accuracy over the images, by 15 bins."""
    bins = reliability(logits, labels)
    return sum(abs(confidence - accuracy) * count for confidence, accuracy, count in bins) / len(labels)


def nearest_distances(features: Tensor, references: Tensor) -> NDArray[np.float64]:
    """(N, D) features, (R, D) references of unit length → (N,) cosine distance to the nearest reference."""
    similarities = [
        (normalize(rows) @ references.T).max(dim=1).values.double().cpu().numpy() for rows in features.split(1024)
    ]
    return 1 - np.concatenate(similarities)


def _reference_images(data: RunData) -> EvaluationSet:
    """Training images without those for validation, evenly spread over the store where it has more than needed."""
    records = np.arange(len(data.train))
    if data.labelled_store is data.train and data.validation_split is not None:
        records = np.setdiff1d(records, data.validation_split.records(data.train))
    count = min(len(records), _MOST_REFERENCES)
    spread = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int))
    return data.images(data.train, records[spread])


def _exhibits(logits: Tensor, labels: Tensor, result: dict[str, Any]) -> list[Exhibit]:
    """What the report shows; logits and labels are those of the test split."""
    temperature = result["temperature"]
    curves: dict[str, Any] = {"perfect": ([0.0, 1.0], [0.0, 1.0])}
    for name, values in (("before", logits), (f"temperature {temperature:.3g}", logits / temperature)):
        confidence, accuracy, _ = zip(*reliability(values, labels), strict=True)
        curves[name] = confidence, accuracy
    return [
        lines(
            "Reliability on the test split", curves, x="confidence", y="accuracy",
            caption=f"Images in {BINS} bins of confidence; a bin below the diagonal is surer than it is right.",
        ),
        table(
            "Expected calibration error",
            ["split", "before", "after"],
            [
                [split, f"{100 * own['before']:.2f} %", f"{100 * own['after']:.2f} %"]
                for split, own in result["calibration_error"].items()
            ],
            caption=f"Logits are divided by {temperature:.3g}, which was chosen on the validation split. "
            f"{100 * result['test_unlike']:.1f} % of the test images are farther from the training images than "
            f"{100 * _USUAL:.0f} % of the validation images: predict calls such images unlike the training images.",
        ),
    ]  # fmt: skip
