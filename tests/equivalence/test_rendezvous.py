"""Ranks that do not find each other fail, and say why; nobody trains alone."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paws_hpc.cluster.rank import join

CPU = torch.device("cpu")


def test_a_rank_without_rank_0_fails_and_names_the_file_it_waited_for(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"Rank 0 did not publish its address in .*/job-7\.json within 0\.5 s"):
        join(tmp_path, start="job-7", rank=1, world_size=2, one_node=True, device=CPU, timeout_s=0.5)
    assert not dist.is_initialized()


def test_rank_0_without_the_others_fails_and_does_not_train_alone(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, dist.DistError)):
        join(tmp_path, start="job-8", rank=0, world_size=2, one_node=True, device=CPU, timeout_s=1.0)
    assert not dist.is_initialized()
    assert not (tmp_path / "job-8.json").exists(), "a later start must not take this address for its own"
