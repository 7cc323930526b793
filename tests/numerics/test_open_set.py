"""Weights of unlabelled images: what they are, what they do to the loss, and whom they tell apart in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import norm
from sklearn.datasets import load_sample_images
from torch import Tensor

from paws_hpc.data.config import CenterCropConfig, CropConfig, ViewsConfig
from paws_hpc.data.samplers import Positions
from paws_hpc.data.streams import EvaluationSet, PawsStream
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.engine.evaluate import Representation, forward_set, paws_nn, score
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.objective.config import ObjectiveConfig
from paws_hpc.objective.labels import class_labels
from paws_hpc.objective.open_set import support_similarity_weights
from paws_hpc.objective.paws import PawsLoss, paws_loss
from paws_hpc.packing import ArraySource, pack
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.tiny import STILL

CPU = torch.device("cpu")
IMAGES, SMALL, FEATURES = 6, 2, 5
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]).repeat(2)
PICTURES = torch.arange(9).repeat(2)  # two views of each support


VIEWS = ViewsConfig(
    large=CropConfig(size=16, count=2, scale=[0.6, 1.0]), small=CropConfig(size=8, count=2, scale=[0.3, 0.6]),
    support_views=2, augment=STILL,
)  # fmt: skip


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(z: Tensor, h: Tensor, weights: Tensor | None) -> tuple[PawsLoss, Tensor]:
    """Of rows [supports; large 1; large 2; small ...], with the gradient of the total."""
    z = z.clone().requires_grad_()
    labels, supports = class_labels(CLASSES, 3, smoothing=0.1, device=CPU), len(CLASSES)
    rows = (z[supports:], z[:supports], h[supports:], h[:supports])
    loss = paws_loss(*rows, labels, num_small_crops=SMALL, entropy_weight=0.3, image_weights=weights)
    return loss, torch.autograd.grad(loss.total, z)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_are_no_weights_to_the_bit(dtype: torch.dtype) -> None:
    supports = len(CLASSES)
    z = draw(supports + (2 + SMALL) * IMAGES, FEATURES, dtype=dtype)
    h = draw(supports + 2 * IMAGES, FEATURES, seed=1, dtype=dtype)
    plain, gradient = loss_of(z, h, None)
    found, found_gradient = loss_of(z, h, torch.ones(IMAGES))
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))
    torch.testing.assert_close(found_gradient, gradient, rtol=0, atol=0)


def test_an_image_of_weight_two_counts_as_two_images() -> None:
    """In every term, me-max included; and the scale of the weights does not count."""
    supports, twice = len(CLASSES), torch.tensor([0, 1, 1, 2, 3, 4, 5, 5])
    weights = torch.tensor([1, 2, 1, 1, 1, 2])
    z, h = draw(supports + (2 + SMALL) * IMAGES, FEATURES), draw(supports + 2 * IMAGES, FEATURES, seed=1)
    repeated = [
        torch.cat([rows[:supports], rows[supports:].unflatten(0, (-1, IMAGES))[:, twice].flatten(0, 1)])
        for rows in (z, h)
    ]
    expected, gradient = loss_of(repeated[0], repeated[1], None)
    found, found_gradient = loss_of(z, h, 0.1 * weights.double())
    for name in ("total", "consistency", "me_max", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_gradient[:supports], gradient[:supports], rtol=1e-10, atol=1e-12)


def test_a_weight_is_the_rank_of_an_images_similarity_among_those_of_supports() -> None:
    supports, targets = draw(len(CLASSES), FEATURES), draw(2 * IMAGES, FEATURES, seed=1)
    unit, rows = (values / values.norm(dim=1, keepdim=True) for values in (supports, targets))
    among = [
        max(float(unit[i] @ unit[j]) for j in range(18) if CLASSES[i] == CLASSES[j] and PICTURES[i] != PICTURES[j])
        for i in range(18)
    ]
    nearest = [np.mean([max(float(rows[i + view] @ unit[j]) for j in range(18)) for view in (0, 6)]) for i in range(6)]
    expected = norm.cdf((np.array(nearest) - np.mean(among)) / np.std(among))
    found = support_similarity_weights(targets, supports, CLASSES, PICTURES)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    alone = PICTURES.clone()
    alone[CLASSES == 2] = 99  # a class with one image in the step says nothing of how its images resemble each other
    among = [value for value, label in zip(among, CLASSES, strict=True) if label != 2]
    expected = norm.cdf((np.array(nearest) - np.mean(among)) / np.std(among))
    np.testing.assert_allclose(support_similarity_weights(targets, supports, CLASSES, alone), expected, rtol=1e-10)


def test_strangers_have_small_positive_weights() -> None:
    """Also where all are strangers, so that weighted means exist."""
    supports = torch.eye(4)[CLASSES] + 0.1 * draw(len(CLASSES), 4).float()
    weights = support_similarity_weights(-supports.sum(0).repeat(2, 1), supports, CLASSES, PICTURES)
    assert weights.shape == (1,)
    assert 0 < weights < 1e-4


LABELS = 4
"""Of each known class; images of all ten digits are unlabelled."""


def labelled_digits(store: ImageStore, known: int, *, seed: int) -> Positions:
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(np.flatnonzero(store.labels == d))[:LABELS] for d in range(known)])


def open_set_training(
    store: ImageStore, labelled: Positions, known: int, *, steps: int, seed: int, weighting: bool
) -> tuple[PawsStream, Pretraining]:
    """A short training at 16 pixels."""
    stream = PawsStream(
        store, labelled, views=VIEWS, batch_size=64, support_classes=known, images_per_class=LABELS, seed=seed,
        threads=1,
    )  # fmt: skip
    return stream, Pretraining(
        build_encoder(ModelConfig("small_resnet", channels=[16, 32, 64], projection_dim=64), seed=seed),
        objective=ObjectiveConfig(support_warmup_fraction=0.33, open_set_weighting=weighting),
        optimizer=OptimizerConfig("sgd", nesterov=True, start_lr=0.01, peak_lr=0.1, final_lr=0.001, warmup_epochs=1),
        config=PretrainConfig(
            batch_size=64, epochs=steps // stream.steps_per_epoch, support=SupportConfig(known, LABELS),
            precision="fp32", diagnose_every_steps=steps,
        ),
        stream=stream, device=CPU,
    )  # fmt: skip


def test_digits_of_no_labelled_class_weigh_less(digits_stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second half of a short training."""
    store, steps, known = ImageStore.open(digits_stores.train), 84, 5
    labelled = labelled_digits(store, known, seed=1)
    stream, training = open_set_training(store, labelled, known, steps=steps, seed=1, weighting=True)
    found: list[Tensor] = []

    def noted(*arguments: Tensor) -> Tensor:
        found.append(support_similarity_weights(*arguments))
        return found[-1]

    monkeypatch.setattr("paws_hpc.engine.pretrain.support_similarity_weights", noted)
    strange = []
    for step in range(steps):
        batch = stream.batch(step)
        metrics = training.step(batch)
        strange.append(torch.from_numpy(store.labels[batch.records] >= known))
        assert torch.equal(metrics["train/image_weight"], found[-1].mean())
    weights, outside = torch.cat(found[steps // 2 :]), torch.cat(strange[steps // 2 :])
    assert weights[~outside].mean() > weights[outside].mean() + 0.1


def nearly_blank(count: int, size: int) -> NDArray[np.uint8]:
    """(count, size, size, 1) uint8, the smoothest pieces of scikit-learn's two photographs: sky, blurred leaves."""
    random, pieces = np.random.default_rng(0), []
    photographs = [np.asarray(Image.fromarray(photograph).convert("L")) for photograph in load_sample_images().images]
    for number in range(15 * count):
        photograph, side = photographs[number % 2], random.integers(24, 80)
        top, left = (random.integers(length - side) for length in photograph.shape)
        pieces.append(photograph[top : top + side, left : left + side])
    pieces = sorted(pieces, key=np.std)[:count]
    small = [Image.fromarray(piece).resize((size, size), Image.Resampling.BILINEAR) for piece in pieces]
    return np.stack([np.asarray(image) for image in small])[..., None]


@pytest.fixture(scope="module")
def half_blank(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """The training digits, and as many nearly blank images, of a class that nobody labels."""
    digits, folder = ImageStore.open(digits_stores.train), tmp_path_factory.mktemp("half-blank") / "train"
    blanks = nearly_blank(len(digits), 16)
    pixels = np.concatenate([digits.read_raw(np.arange(len(digits))), blanks])
    labels = np.append(digits.labels, np.full(len(blanks), 10))
    keys = [*digits.keys, *(f"blank{number}" for number in range(len(blanks)))]
    pack(ArraySource("half blank", pixels, labels, keys, (*digits.classes, "blank")), folder)
    return ImageStore.open(folder)


def accuracy(store: ImageStore, test: ImageStore, *, seed: int, weighting: bool, steps: int = 315) -> float:
    """PAWS-NN on test digits after as many whole epochs as fit the steps, with four images of each digit labelled."""
    supports = labelled_digits(store, 10, seed=seed)
    stream, training = open_set_training(store, supports, 10, steps=steps, seed=seed, weighting=weighting)
    for step in range(training.total_steps):
        training.step(stream.batch(step))
    encoder, crop = Representation(training.encoder), CenterCropConfig(resize=16, size=16)
    queries, h = (
        forward_set(encoder, EvaluationSet(images, records, crop, store), CPU)
        for images, records in ((test, np.arange(len(test))), (store, supports))
    )
    classes = torch.from_numpy(store.labels[supports])
    predictions = paws_nn(queries, h, classes, num_classes=10, temperature=0.1)
    return score(predictions, torch.tensor(test.labels)).top1


@pytest.mark.timeout(900)
def test_weighing_strangers_less_helps_where_half_of_the_images_are_nearly_blank(
    half_blank: ImageStore, digits_stores: Stores
) -> None:
    """Mean gain of four seeds, some 6 points with a standard error of 3; docs/results.md has six."""
    test = ImageStore.open(digits_stores.test)
    gains = [
        accuracy(half_blank, test, seed=seed, weighting=True) - accuracy(half_blank, test, seed=seed, weighting=False)
        for seed in (30, 31, 32, 33)
    ]
    assert np.mean(gains) > 0.01, gains
