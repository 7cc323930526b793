"""Fifteen steps of pre-training equal the paper's equations worked out in NumPy, by hand down to the gradients.

The derivation below follows the paper's text alone: equation 4 (the objective), equation 2 (momentum), LARS
(arXiv:1708.03888) and the linear warm-up with a cosine decay. It shares no line with the package. The other side is
``Pretraining.step`` itself; only images and convolutions are left out, so that a derivation by hand stays readable.

Legend: R rows of x are [supports, view-major; large views 1; large views 2; small views], S supports, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paws_hpc.data.config import CropConfig, ViewsConfig
from paws_hpc.data.streams import MicroBatch, PawsBatch
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.objective.config import PawsConfig

Array = NDArray[np.float64]
Weights = dict[str, Array]

STEPS, STEPS_PER_EPOCH, WARMUP_STEPS = 15, 5, 5
CLASSES, PER_CLASS, SUPPORT_VIEWS, IMAGES, SMALL = 4, 3, 2, 6, 3
SUPPORTS = CLASSES * PER_CLASS * SUPPORT_VIEWS
WIDTHS = (6, 9, 8, 5)  # of the input and of the three layers' outputs
TAU, SHARPENING, SMOOTHING, FLOOR = 0.1, 0.25, 0.1, 1e-4
START_LR, PEAK_LR, FINAL_LR = 0.3, 6.4, 0.064
MOMENTUM, DECAY, TRUST, EPS = 0.9, 1e-3, 1e-3, 1e-8  # the decay is so large that leaving it out would show


@dataclass
class Step:
    """One step's rows and the class of each support, a place among the K drawn."""

    x: Array
    classes: NDArray[np.int64]


def draw(step: int) -> Step:
    """Images lie around their class's centre, views around their image: classes can be learnt and views differ."""
    rng = np.random.default_rng([7, step])
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTHS[0]))
    order = rng.permutation(CLASSES * PER_CLASS) % CLASSES
    supports = centres[order] + 0.6 * rng.normal(size=(len(order), WIDTHS[0]))
    images = centres[rng.integers(CLASSES, size=IMAGES)] + 0.6 * rng.normal(size=(IMAGES, WIDTHS[0]))
    rows = np.concatenate([np.tile(supports, (SUPPORT_VIEWS, 1)), np.tile(images, (2 + SMALL, 1))])
    return Step(rows + 0.3 * rng.normal(size=rows.shape), np.tile(order, SUPPORT_VIEWS))


def initial_weights() -> Weights:
    rng = np.random.default_rng(11)
    weights = {}
    for layer, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
        weights[f"fc{layer}.weight"] = rng.normal(size=(outputs, inputs)) / math.sqrt(inputs)
        weights[f"fc{layer}.bias"] = 0.1 * rng.normal(size=outputs)
    return weights


# --- the paper in NumPy ---------------------------------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def unit(rows: Array) -> Array:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def rho(p: Array) -> Array:
    """Sharpening, section 3.2."""
    return p ** (1 / SHARPENING) / (p ** (1 / SHARPENING)).sum(1, keepdims=True)


def smoothed_labels(classes: NDArray[np.int64]) -> Array:
    return (1 - SMOOTHING) * np.eye(CLASSES)[classes] + SMOOTHING / CLASSES


def wanted_of_views(h: Array, labels: Array) -> Array:
    """Targets of all unlabelled rows: constants, of the large views' h."""
    p = softmax(unit(h[SUPPORTS : SUPPORTS + 2 * IMAGES]) @ unit(h[:SUPPORTS]).T / TAU) @ labels
    first, second = rho(p)[:IMAGES], rho(p)[IMAGES:]
    wanted = np.concatenate([second, first, *[(first + second) / 2] * SMALL])
    return np.where(wanted < FLOOR, 0.0, wanted)


def objective(z: Array, h: Array, classes: NDArray[np.int64]) -> tuple[dict[str, float], Array]:
    """Equation 4 and its gradient with respect to z; h is constant."""
    labels = smoothed_labels(classes)
    wanted = wanted_of_views(h, labels)
    queries, supports = unit(z[SUPPORTS:]), unit(z[:SUPPORTS])
    q = softmax(queries @ supports.T / TAU)
    p = q @ labels
    sharp = rho(p)
    mean, rows = sharp.mean(0), len(p)
    consistency = -(wanted * np.log(p)).sum() / rows
    me_max = (mean * np.log(mean)).sum()

    of_sharp = np.broadcast_to((np.log(mean) + 1) / rows, p.shape)
    of_p = -wanted / p / rows
    of_p = of_p + sharp / p / SHARPENING * (of_sharp - (of_sharp * sharp).sum(1, keepdims=True))
    of_q = of_p @ labels.T
    of_cosines = q * (of_q - (of_q * q).sum(1, keepdims=True)) / TAU
    of_units = np.concatenate([of_cosines.T @ queries, of_cosines @ supports])
    units = np.concatenate([supports, queries])
    across = of_units - units * (units * of_units).sum(1, keepdims=True)
    losses = {"train/loss_consistency": consistency, "train/loss_me_max": me_max, "train/loss": consistency + me_max}
    return losses, across / np.sqrt((z**2).sum(1, keepdims=True))


def losses_and_gradients(weights: Weights, step: Step, prediction_head: bool) -> tuple[dict[str, float], Weights]:
    """Three layers; with a prediction head h is the output of the second, otherwise it is z."""
    first = step.x @ weights["fc1.weight"].T + weights["fc1.bias"]
    second = np.maximum(first, 0) @ weights["fc2.weight"].T + weights["fc2.bias"]
    z = np.maximum(second, 0) @ weights["fc3.weight"].T + weights["fc3.bias"]
    losses, of_z = objective(z, second if prediction_head else z, step.classes)
    of_second = (of_z @ weights["fc3.weight"]) * (second > 0)
    of_first = (of_second @ weights["fc2.weight"]) * (first > 0)
    inputs = (step.x, np.maximum(first, 0), np.maximum(second, 0))
    gradients = {}
    for layer, (rows, of_rows) in enumerate(zip(inputs, (of_first, of_second, of_z), strict=True), start=1):
        gradients[f"fc{layer}.weight"] = of_rows.T @ rows
        gradients[f"fc{layer}.bias"] = of_rows.sum(0)
    return losses, gradients


def rate(step: int) -> float:
    if step < WARMUP_STEPS:
        return START_LR + (PEAK_LR - START_LR) * step / WARMUP_STEPS
    angle = math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * (1 + math.cos(angle)) / 2


def descend(weights: Weights, velocities: Weights, gradients: Weights, lr: float) -> None:
    """Equation 2 with LARS; biases have neither adaptation nor decay."""
    for name, gradient in gradients.items():
        weight, move = weights[name], gradient
        if name.endswith("weight"):
            size, slope = np.sqrt((weight**2).sum()), np.sqrt((gradient**2).sum())
            move = (gradient + DECAY * weight) * TRUST * size / (slope + DECAY * size + EPS)
        velocities[name] = MOMENTUM * velocities[name] + lr * move
        weights[name] = weight - velocities[name]


# --- the package ----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """As an encoder: views to (h, z)."""

    def __init__(self, prediction_head: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*pair) for pair in pairwise(WIDTHS))
        self.prediction_head = prediction_head

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        h = self.fc2(torch.relu(self.fc1(torch.cat(views))))
        z = self.fc3(torch.relu(h))
        return (h, z) if self.prediction_head else (z, z)


class Vectors:
    """A stream whose images are the vectors of :func:`draw`."""

    steps_per_epoch = STEPS_PER_EPOCH
    views = ViewsConfig(
        large=CropConfig(size=1, count=2), small=CropConfig(size=1, count=SMALL), support_views=SUPPORT_VIEWS
    )

    def batch(self, step: int) -> PawsBatch:
        drawn = draw(step)
        rows: Any = np.split(drawn.x, [SUPPORTS, SUPPORTS + 2 * IMAGES])
        nobody = np.zeros(IMAGES, np.int64)
        classes, unknown = torch.from_numpy(drawn.classes), torch.from_numpy(nobody)
        return PawsBatch(step, nobody, (MicroBatch(*rows),), classes, unknown.bool(), unknown)

    def augment(self, part: MicroBatch, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        rows: Any = part.crop_groups
        return [torch.from_numpy(kind).to(device, dtype) for kind in rows]


def training_of(prediction_head: bool) -> Pretraining:
    network: Any = Network(prediction_head).double()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in initial_weights().items()})
    stream: Any = Vectors()
    return Pretraining(
        network,
        objective=PawsConfig(temperature=TAU, sharpening=SHARPENING, label_smoothing=SMOOTHING),
        optimizer=OptimizerConfig(
            "lars", momentum=MOMENTUM, weight_decay=DECAY, start_lr=START_LR, peak_lr=PEAK_LR,
            final_lr=FINAL_LR, warmup_epochs=WARMUP_STEPS / STEPS_PER_EPOCH,
        ),
        config=PretrainConfig(
            batch_size=IMAGES, epochs=STEPS // STEPS_PER_EPOCH, support=SupportConfig(CLASSES, PER_CLASS),
            precision="fp64",
        ),
        stream=stream,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("prediction_head", [True, False])
def test_fifteen_steps_are_the_papers_equations(prediction_head: bool) -> None:
    training = training_of(prediction_head)
    weights = initial_weights()
    velocities = {name: np.zeros_like(value) for name, value in weights.items()}
    assert training.total_steps == STEPS
    for step in range(STEPS):
        expected, gradients = losses_and_gradients(weights, draw(step), prediction_head)
        descend(weights, velocities, gradients, rate(step))
        found = training.step(training.stream.batch(step))
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-9, abs=0), (step, name)
        for name, value in training.encoder.named_parameters():
            assert distance(value, weights[name]) <= 1e-9, (step, name)
            assert distance(training.optimizer.state[value]["momentum_buffer"], velocities[name]) <= 1e-9, (step, name)
    moved = max(distance(torch.from_numpy(value), weights[name]) for name, value in initial_weights().items())
    assert moved > 0.1, "a trajectory of some length"


def distance(found: Tensor, expected: Array) -> float:
    """Relative, in the Euclidean norm."""
    return float(np.linalg.norm(found.detach().numpy() - expected) / np.linalg.norm(expected))
