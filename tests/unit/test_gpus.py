"""GPUs by node: one row tells of every node, and a GPU that cannot be read costs a warning and nothing else."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from paws_hpc.engine.gpus import GpuMeter, by_node
from paws_hpc.engine.metrics import ThroughputMeter
from paws_hpc.engine.tracking import Row
from tests.ranks import results_of, run_on_ranks

CPU = torch.device("cpu")
READ = [("z", 0.9, 60.0), ("z", 0.7, 61.5), ("a", 0.2, math.nan), ("a", math.nan, math.nan)]
"""Host, utilisation and memory in GB, by rank."""


def together(rank: int, world: int) -> Row:
    return by_node(*READ[rank], CPU)


def test_rank_zero_tells_of_every_node(tmp_path: Path) -> None:
    """The mean of a node's GPUs, its fullest one, and nothing of what no rank knows; nodes in the order of ranks."""
    run_on_ranks(tmp_path, {4: [together]})
    for row in results_of(together, 4, tmp_path):
        assert row == pytest.approx({
            "gpu/node0/utilisation": 0.8, "gpu/node0/memory_gb": 61.5,
            "gpu/node1/utilisation": 0.2,
        })  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_cannot_be_read_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    meter = GpuMeter(torch.device("cuda", 0))
    for _ in range(3):
        assert math.isnan(meter._value("utilisation"))
        assert math.isnan(meter._value("memory"))
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        "The GPU's utilisation is not logged from here on",
        "The GPU's memory is not logged from here on",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.needs_gpu
def test_a_gpu_is_read() -> None:
    row = ThroughputMeter(8, torch.device("cuda", 0)).read(1)
    assert 0 <= row["gpu/node0/utilisation"] <= 1
    assert row["gpu/node0/memory_gb"] > 0
