"""The objective equals the reference implementation's float64 numbers, values and gradients (tests/golden)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paws_hpc.objective.labels import smooth_labels
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import sharpen, soft_nearest_neighbours
from paws_hpc.objective.paws import paws_targets
from tests.objective import GOLDEN, as_class_labels, load_golden, step_loss

PAWS_FILES = sorted(path.stem for path in GOLDEN.glob("paws_mc*.npz"))
SUNCET_FILES = sorted(path.stem for path in GOLDEN.glob("suncet_*.npz"))


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.to(actual.dtype), rtol=1e-10, atol=1e-10)


def golden_loss(golden: dict[str, Tensor], z: Tensor, **changes: float):
    supports, images = len(golden["labels"]), int(golden["n"])
    arguments = {
        "temperature": golden["tau"].item(),
        "sharpening": golden["T"].item(),
        "me_max": bool(golden["me_max"]),
        **changes,
    }
    h = golden["h"]
    targets = h[supports : supports + 2 * images]
    labels = as_class_labels(golden["labels"])
    return step_loss(z[supports:], z[:supports], targets, h[:supports], labels, **arguments)


def test_there_are_golden_files() -> None:
    assert len(PAWS_FILES) == 6
    assert len(SUNCET_FILES) == 2


@pytest.mark.parametrize("name", PAWS_FILES)
def test_loss_terms_and_their_gradients(name: str) -> None:
    golden = load_golden(name)
    z = golden["z"].requires_grad_()
    loss = golden_loss(golden, z)
    assert_equal(loss.consistency, golden["ploss"])
    assert_equal(loss.me_max, golden["rloss"])
    assert_equal(loss.total, golden["loss"])
    for term, expected in (("consistency", "grad_z_ploss"), ("me_max", "grad_z_rloss"), ("total", "grad_z_loss")):
        value = getattr(loss, term)
        if value.requires_grad:
            assert_equal(torch.autograd.grad(value, z, retain_graph=True)[0], golden[expected])
        else:  # me-max turned off is the constant 0
            assert not golden[expected].any()


@pytest.mark.parametrize("name", PAWS_FILES)
def test_without_the_target_floor_the_loss_is_equation_4(name: str) -> None:
    golden = load_golden(name)
    loss = golden_loss(golden, golden["z"], target_floor=0.0, me_max=True)
    assert_equal(loss.consistency, golden["eq4_ploss_no_threshold"])
    assert_equal(loss.me_max, golden["eq4_rloss"])


@pytest.mark.parametrize("name", PAWS_FILES)
def test_predictions_and_sharpened_targets(name: str) -> None:
    golden = load_golden(name)
    supports, images, tau = len(golden["labels"]), int(golden["n"]), golden["tau"].item()
    z, h = golden["z"], golden["h"]
    predictions = soft_nearest_neighbours(z[supports:], z[:supports], golden["labels"], temperature=tau)
    assert_equal(predictions, golden["probs"])
    large = soft_nearest_neighbours(
        h[supports : supports + 2 * images], h[:supports], golden["labels"], temperature=tau
    )
    swapped = large.roll(images, 0)
    assert_equal(swapped, golden["target_probs"])
    sharpened = sharpen(swapped, temperature=golden["T"].item())
    assert_equal(sharpened, golden["targets_sharp"])
    rates = {"temperature": tau, "sharpening": golden["T"].item()}
    found = paws_targets(h[supports : supports + 2 * images], h[:supports], as_class_labels(golden["labels"]), **rates)
    assert_equal(found.roll(images, 0), golden["targets_sharp"])


@pytest.mark.parametrize("tag", ["a", "b", "c", "e"])  # d records a defect of the reference: rows that sum to 1.1
def test_label_matrices(tag: str) -> None:
    golden = load_golden("label_matrices")
    per_rank, images, world, distinct, smoothing = golden[f"conf_{tag}"].tolist()
    per_rank, images, world = int(per_rank), int(images), int(world)
    cycle = torch.arange(per_rank).repeat(images)
    classes = torch.cat([cycle + rank * per_rank * int(distinct) for rank in range(world)])
    num_classes = per_rank * world if distinct else per_rank
    assert_equal(smooth_labels(classes, num_classes, smoothing=smoothing, dtype=torch.float64), golden[f"labels_{tag}"])


def test_exact_collapse_is_stationary() -> None:
    golden = load_golden("paws_collapse_is_stationary")
    z, supports = golden["z"].requires_grad_(), len(golden["labels"])
    labels = as_class_labels(golden["labels"])
    loss = step_loss(z[supports:], z[:supports], z[supports:].detach(), z[:supports].detach(), labels)
    assert_equal(loss.consistency, golden["log_K"])
    assert_equal(loss.me_max, -golden["log_K"])
    for term in (loss.consistency, loss.me_max):
        (gradient,) = torch.autograd.grad(term, z, retain_graph=True)
        assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("name", SUNCET_FILES)
def test_supervised_nce(name: str) -> None:
    golden = load_golden(name)
    z = golden["z"].requires_grad_()
    loss = supervised_nce(z, as_class_labels(golden["labels"]), temperature=golden["temperature"].item())
    assert_equal(loss, golden["loss"])
    assert_equal(torch.autograd.grad(loss, z)[0], golden["grad_z"])


def test_nt_xent() -> None:
    golden = load_golden("simclr_b6")
    z = golden["z"].requires_grad_()
    loss = nt_xent(z, temperature=golden["temperature"].item())
    assert_equal(loss, golden["loss"])
    assert_equal(torch.autograd.grad(loss, z)[0], golden["grad_z_full_ntxent"])
