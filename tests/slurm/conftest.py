"""One cluster per test file: a file that needs another kind overrides ``cluster_options``."""

from __future__ import annotations

from collections.abc import Generator, Iterator

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first, so that where files run side by side it does not run on alone."""
    items.sort(key=lambda item: item.path.name != "test_faults.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the jobs of a test that failed: they would take the processor from all tests that follow."""
    report = yield
    running = item.funcargs.get("cluster") if isinstance(item, pytest.Function) else None
    if report.failed and isinstance(running, Cluster):
        running.run("scancel", "--user=root")
    return report
