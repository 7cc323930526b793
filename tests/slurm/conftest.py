"""One cluster per test file: a file that needs another kind overrides ``cluster_options``."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from paws_hpc.files import exclusive
from tests.slurm.chain import Run
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


@pytest.fixture
def here(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, to which commands of this process talk too."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


PRETRAINING = (
    "stages=[prepare,pretrain]",
    "pretrain.epochs=6",  # 60 steps
    "pretrain.checkpoint_every_steps=7",
    "pretrain.validate_every_epochs=3",
    "labels.validation_per_class=100",  # three batches of evaluation per rank, and
    "views.evaluation.resize=64",
    "views.evaluation.size=64",  # each takes a while, so that a signal can meet it
)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A pre-training that nothing happened to; processes that test side by side make it once."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    run = Run(cluster, shared / "undisturbed", *PRETRAINING, name="undisturbed")
    with exclusive(shared / "undisturbed.lock"):
        if not run.path.exists():
            run.folder.mkdir()
            run.launch()
            run.wait_done()
    assert run.ends("pretrain") == ["done"]
    assert run.rows("pretrain")[-1]["step"] == 59
    return run


@pytest.fixture
def run(cluster: Cluster, undisturbed: Run, request: pytest.FixtureRequest) -> Run:
    """A run of the same settings and stores."""
    return Run(cluster, undisturbed.folder, *PRETRAINING, name=request.node.name)


_LONGEST_FIRST = ("faults", "chain", "launches", "failures", "crashes", "time_limit", "status", "doctor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: where files run side by side, none is to run on alone at the end."""
    names = [f"test_{name}.py" for name in _LONGEST_FIRST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the jobs of a test that failed: they would take the processor from all tests that follow."""
    report = yield
    running = item.funcargs.get("cluster") if isinstance(item, pytest.Function) else None
    if report.failed and isinstance(running, Cluster):
        running.run("scancel", "--user=root")
    return report
