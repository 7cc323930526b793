"""The objective over several ranks is the objective of one process on the whole batch, values and gradients."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paws_hpc.distributed import gather_rows, gather_rows_and_constants
from paws_hpc.objective.nce import supervised_nce
from tests.objective import labels_for, load_golden, step_loss
from tests.ranks import results_of, run_on_ranks

WORLDS = [2, 4]
GOLDEN_NAMES = ["dist2_unique_v1", "dist2_nonunique_v1"]
CLASSES, IMAGES_PER_CLASS, IMAGES, SMALL, INPUTS, D = 8, 4, 8, 2, 7, 6
CASES = list(product(["disjoint", "shared"], [1, 2]))
"""How ranks divide the classes, and the number of support views."""


def losses(weight: Tensor, inputs: Tensor, classes: Tensor, num_classes: int, small: int) -> dict[str, Tensor]:
    """One rank's (or the only process's) part of a step on a linear network, of inputs [supports; view-major crops]."""
    z = inputs @ weight
    z.retain_grad()
    supports, large = len(classes), 2 * (len(inputs) - len(classes)) // (2 + small)
    labels = labels_for(gather_rows(classes), num_classes, smoothing=0.1)
    gathered, targets = gather_rows_and_constants(z[:supports], z[:supports], dtype=z.dtype)
    loss = step_loss(z[supports:], gathered, z[supports : supports + large].detach(), targets, labels)
    results = {"consistency": loss.consistency, "me_max": loss.me_max, "total": loss.total}
    results["nce"] = supervised_nce(gathered, labels, temperature=0.1)
    gradients = {}
    for name, value in results.items():
        weight.grad = z.grad = None
        value.backward(retain_graph=True)
        assert weight.grad is not None
        assert z.grad is not None
        gradients[f"weight_gradient_{name}"] = weight.grad
        gradients[f"z_gradient_{name}"] = z.grad
    return {name: value.detach().clone() for name, value in (results | gradients).items()}


def golden_rank(name: str, rank: int) -> dict[str, Tensor]:
    golden = load_golden(name)
    per_rank, images, distinct = (int(golden[key]) for key in ("classes_per_rank", "imgs_per_class", "unique_classes"))
    classes = torch.arange(per_rank).repeat(images * int(golden["support_views"])) + rank * per_rank * distinct
    num_classes = per_rank * 2 if distinct else per_rank
    weight = golden["weight"].requires_grad_()
    return losses(weight, golden["x"][rank], classes, num_classes, int(golden["multicrop"]))


def own_rank(division: str, views: int, rank: int, world: int) -> dict[str, Tensor]:
    """A rank's part of one fixed batch, whose supports are divided by class or within each class."""
    generator = torch.Generator().manual_seed(views)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(INPUTS, D).requires_grad_()
    supports = draw(views, CLASSES, IMAGES_PER_CLASS, INPUTS)
    crops = draw(2 + SMALL, IMAGES, INPUTS)
    classes = torch.arange(CLASSES).view(1, CLASSES, 1).expand(views, CLASSES, IMAGES_PER_CLASS)
    dimension = 1 if division == "disjoint" else 2
    mine = supports.chunk(world, dimension)[rank].flatten(0, 2)
    my_classes = classes.chunk(world, dimension)[rank].flatten()
    inputs = torch.cat([mine, crops.chunk(world, 1)[rank].flatten(0, 1)])
    return losses(weight, inputs, my_classes, CLASSES, SMALL)


def all_cases(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        f"{division}-{views}": own_rank(division, views, rank, world) for division, views in CASES
    }
    if world == 2:
        results |= {name: golden_rank(name, rank) for name in GOLDEN_NAMES}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every rank of every world left what it computed."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {world: [all_cases] for world in WORLDS})
    return folder


@pytest.fixture(params=WORLDS, ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each rank computed, for every case."""
    return results_of(all_cases, request.param, folder)


two_ranks = pytest.mark.parametrize("ranks", [2], indirect=True, ids="{} ranks".format)


def mean(ranks: list[dict[str, Any]], case: str, quantity: str) -> Tensor:
    return torch.stack([results[case][quantity] for results in ranks]).mean(0)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("division", "views"), CASES)
def test_ranks_together_are_one_process(ranks: list[dict[str, Any]], division: str, views: int) -> None:
    """Gradients are averaged over ranks, as DistributedDataParallel does; losses over gathered rows agree on all."""
    alone = own_rank(division, views, 0, 1)
    case = f"{division}-{views}"
    for term in ("consistency", "me_max", "total", "nce"):
        assert_equal(mean(ranks, case, term), alone[term])
        assert_equal(mean(ranks, case, f"weight_gradient_{term}"), alone[f"weight_gradient_{term}"])
        assert alone[f"weight_gradient_{term}"].abs().max() > 1e-3
    for results in ranks:
        assert_equal(results[case]["me_max"], alone["me_max"])
        assert_equal(results[case]["nce"], alone["nce"])


@two_ranks
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_two_ranks_are_the_single_process_of_the_golden_files(ranks: list[dict[str, Any]], name: str) -> None:
    golden = load_golden(name)
    assert_equal(mean(ranks, name, "consistency"), golden["single_process_ploss"])
    assert_equal(mean(ranks, name, "me_max"), golden["single_process_rloss"])
    assert_equal(mean(ranks, name, "weight_gradient_total"), golden["single_process_grad_weight"])


@two_ranks
def test_two_ranks_are_the_two_ranks_of_the_reference(ranks: list[dict[str, Any]]) -> None:
    """Where the reference is right (distinct classes, one view), each rank's own numbers agree too."""
    golden = load_golden("dist2_unique_v1")
    for rank, results in enumerate(ranks):
        ours = results["dist2_unique_v1"]
        assert_equal(ours["consistency"], golden["ploss"][rank])
        assert_equal(ours["me_max"], golden["rloss"][rank])
        assert_equal(ours["z_gradient_total"], golden["grad_z"][rank])
