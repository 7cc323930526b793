"""Training on 1, 2 and 4 ranks at one global batch is one and the same run: losses, gradients, weights, statistics."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paws_hpc.packing import PackOptions, SourceConfig, open_source, pack
from tests.integration.launching import environment

TOLERANCE = {"fp64": 1e-8, "fp32": 1e-4}
WITHOUT_GRADIENT = ("backbone.norm.bias", "projection.fc1.bias", "projection.fc2.bias")
"""Shifts before a normalisation, which takes them out again: their gradients are rounding errors, and AdamW divides
those by their own size. Nothing else depends on them but the running means, which follow them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    pack(open_source(SourceConfig(kind="digits", split="train")), folder / "store", options=PackOptions())
    return folder


def train(folder: Path, world: int, dtype: str, accumulate_steps: int, recipe: str = "resnet") -> dict[str, Any]:
    path = folder / f"world-{world}-{dtype}-{accumulate_steps}-{recipe}.pt"
    if not path.exists():
        module = [sys.executable, "-m", "tests.equivalence.train_as_rank", str(folder)]
        ranks = [
            subprocess.Popen(
                [*module, str(rank), str(world), dtype, str(accumulate_steps), recipe],
                env=environment() | {"GLOO_SOCKET_IFNAME": "lo"}, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("world", "accumulate_steps", "dtype", "recipe"),
    [
        *((2, 1, "fp64", "resnet"), (4, 1, "fp64", "resnet"), (2, 1, "fp32", "resnet"), (4, 1, "fp32", "resnet")),
        *((2, 4, "fp64", "resnet"), (2, 1, "fp64", "vit")),
    ],
)
def test_any_number_of_ranks_trains_the_run_of_one(
    folder: Path, world: int, accumulate_steps: int, dtype: str, recipe: str
) -> None:
    """Also where micro-batches go through the network one after the other: they are the same on any number of ranks."""
    alone, together = (train(folder, ranks, dtype, accumulate_steps, recipe) for ranks in (1, world))
    assert len(alone["losses"]["train/loss"]) == 10
    assert len(alone["losses"]["train/loss_support_nce"]) == 5, "the warm-up covers the first half of these steps"
    for name, expected in alone["losses"].items():
        if name.startswith("train/loss") or dtype == "fp64":
            compare(name, together["losses"][name], expected, TOLERANCE[dtype])
    if dtype == "fp64":  # gradients and normalisation statistics of all steps are in these, and averages
        for name, expected in alone["weights"].items():
            if recipe == "vit" and name.endswith((*WITHOUT_GRADIENT, "running_mean")):
                continue
            compare(name, together["weights"][name], expected, 1e-8)


def test_a_step_communicates_once_for_supports_once_for_me_max_and_twice_per_normalisation(folder: Path) -> None:
    """Nine layers see two sizes of crops; DistributedDataParallel has one bucket, and asks what is unused."""
    layers, sizes, data_parallel = 9, 2, 2
    assert not train(folder, 1, "fp32", 1)["collectives"]
    assert train(folder, 2, "fp32", 1)["collectives"] == {
        "allgather_base": layers * sizes + 1,
        "reduce_scatter_base": 1,
        "allreduce": layers * sizes + 1 + data_parallel,
    }


def compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=lambda text: f"{name}: {text}")
