"""One cluster per test file: a file that needs another kind overrides ``cluster_options``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, require_slurm, slurm_cluster
from tests.slurm.settings import ClusterOptions


@pytest.fixture(scope="module")
def cluster_options() -> ClusterOptions:
    return ClusterOptions()


@pytest.fixture(scope="module")
def cluster(cluster_options: ClusterOptions) -> Iterator[Cluster]:
    """A Slurm of two nodes; the tests of a file share it and leave its queue empty."""
    require_slurm(cluster_options)
    with slurm_cluster(cluster_options) as running:
        yield running
