"""RoPAWS: its closed form solves its equation, on one rank and on several, and tells images of no known class."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from paws_hpc.objective.config import RopawsConfig
from paws_hpc.objective.labels import smooth_labels
from paws_hpc.objective.neighbours import soft_nearest_neighbours
from paws_hpc.objective.ropaws import Ropaws, calibrated_posteriors
from tests.ranks import results_of, run_on_ranks

K, IMAGES, SMALL, D = 3, 8, 2, 5
CLASSES = torch.arange(K).repeat_interleave(4)
LABELS = smooth_labels(CLASSES, K, smoothing=0.1, dtype=torch.float64)
OPTIONS = {"temperature": 0.1, "prior_temperature": 3.0, "label_ratio": 5.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("label_ratio", [0.01, 5.0])
@pytest.mark.parametrize("prior_temperature", [0.5, 3.0])
def test_the_closed_form_is_where_the_fixed_point_iteration_ends(label_ratio: float, prior_temperature: float) -> None:
    """In NumPy: ``p <- diag(prior) (C_S y + C_U p)`` from zero."""
    images, supports = draw(IMAGES, D), draw(len(CLASSES), D, seed=1)
    found = calibrated_posteriors(
        images, supports, LABELS, temperature=0.1, prior_temperature=prior_temperature, label_ratio=label_ratio
    )
    u, s = (rows.numpy() / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, supports))
    kernel_s = np.exp(u @ s.T / 0.1) * label_ratio * IMAGES / len(CLASSES)
    kernel_u = np.exp(u @ u.T / 0.1) * (1 - np.eye(IMAGES))
    density = kernel_s.sum(1, keepdims=True) + kernel_u.sum(1, keepdims=True)
    prior = np.exp(((u @ s.T).max(1, keepdims=True) - 1) / prior_temperature)
    p = np.zeros((IMAGES, K))
    for _ in range(5000):
        p = prior * (kernel_s / density @ LABELS.numpy() + kernel_u / density @ p)
    np.testing.assert_allclose(found, p, rtol=1e-9)
    assert found.sum(1).max() < 1


def test_a_single_image_has_the_posterior_of_paws_times_its_prior() -> None:
    image, supports = draw(1, D), draw(len(CLASSES), D, seed=1)
    found = calibrated_posteriors(image, supports, LABELS, **OPTIONS)
    paws = soft_nearest_neighbours(image, supports, LABELS, temperature=0.1)
    torch.testing.assert_close(found / found.sum(), paws)


def test_images_that_resemble_no_support_are_of_no_known_class_and_their_targets_nearly_uniform() -> None:
    supports = torch.eye(D, dtype=torch.float64)[CLASSES] + 0.1 * draw(len(CLASSES), D)
    images = torch.cat([supports[:4], -supports.sum(0, keepdim=True) + 0.1 * draw(4, D, seed=2)])
    in_domain = calibrated_posteriors(images, supports, LABELS, **OPTIONS | {"prior_temperature": 0.3}).sum(1)
    assert in_domain[:4].min() > 0.9
    assert in_domain[4:].max() < 0.1


def losses(rank: int, world: int) -> dict[str, Tensor]:
    """One rank's part of a fixed step on a linear network, averaged over ranks; and its gradient."""
    weight = draw(7, D, seed=3).requires_grad_()
    supports, crops = draw(4, K, 7, seed=4), draw(2 + SMALL, IMAGES, 7, seed=5)
    mine = torch.cat([supports.chunk(world)[rank].flatten(0, 1), crops.chunk(world, 1)[rank].flatten(0, 1)])
    classes = torch.arange(K).repeat(4)
    batch = SimpleNamespace(step=0, support_classes=classes)
    z = mine @ weight
    objective = Ropaws(RopawsConfig(), num_classes=K, total_steps=1)
    total, metrics = objective(objective.inputs(batch), z, z, images=IMAGES // world, diagnosed=False)
    total.backward()
    assert weight.grad is not None
    return {"total": total.detach(), "gradient": weight.grad} | {key: value.detach() for key, value in metrics.items()}


def test_ranks_together_are_one_process(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {2: [losses]})
    ranks, alone = results_of(losses, 2, tmp_path), losses(0, 1)
    for name, value in alone.items():
        mean = torch.stack([results[name] for results in ranks]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert 0 < alone["train/in_domain"] < 1


@pytest.mark.parametrize("field", ["prior_temperature", "label_ratio", "weight_power"])
def test_an_impossible_value_names_its_field(field: str) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{field}=-1"):
        RopawsConfig(**{field: -1.0})
