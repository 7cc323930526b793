"""One command leads through the whole chain on Slurm, disturbed or not; this cluster keeps accounts."""

from __future__ import annotations

import json
import re

import pytest

from paws_hpc.stage_table import STAGES
from tests.slurm.chain import Run, assert_same_results
from tests.slurm.cluster import Cluster
from tests.slurm.settings import ClusterOptions

pytestmark = pytest.mark.timeout(900)  # of which it needs a sixth on a machine of its own

CHAIN = (
    "pretrain.epochs=4",
    "pretrain.checkpoint_every_steps=7",
    "finetune.sweep.epochs=[1,60]",
    "baseline.sweep.epochs=[60]",
)
PRETRAIN, SHORT, LONG, BASELINE = (
    "pretrain",
    "finetune/lr=0.1,epochs=1",
    "finetune/lr=0.1,epochs=60",
    "baseline/lr=0.1,epochs=60",
)
TRAINED = (PRETRAIN, SHORT, LONG, BASELINE)


@pytest.fixture(scope="module")
def cluster_options() -> ClusterOptions:
    return ClusterOptions(accounting=True, preempt_sends_user_signal=True)


@pytest.fixture(scope="module")
def launched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A chain that nobody disturbs, and what its launch printed."""
    run = Run(cluster, tmp_path_factory.mktemp("chain"), *CHAIN, name="finished")
    return run, run.launch()


@pytest.fixture(scope="module")
def finished(launched: tuple[Run, str]) -> Run:
    launched[0].wait_done()
    return launched[0]


def test_the_command_prints_the_jobs_and_returns_while_the_first_of_them_waits_or_runs(
    launched: tuple[Run, str],
) -> None:
    run, table = launched
    assert set(run.states().values()) - {"PENDING"} <= {"RUNNING"}
    assert run.states()["pretrain"] == "PENDING"
    for job, job_id in run.job_ids().items():
        assert re.search(rf"{job} .* {job_id} ", table)


def test_all_stages_are_done_in_order_and_the_report_is_there(finished: Run) -> None:
    spans = {job: finished.span(job) for job in finished.job_ids()}
    for job, before in (
        (PRETRAIN, "prepare"),
        (BASELINE, "prepare"),
        (SHORT, PRETRAIN),
        (LONG, PRETRAIN),
        *(("selection", trained) for trained in TRAINED),
        ("report", "selection"),
    ):
        (began, _), (_, ended) = spans[job], spans[before]
        assert began >= ended, f"{job} began before {before} had ended"
    assert {job.partition("/")[0] for job in spans} == set(STAGES)
    assert "<html" in (finished.path / "report/index.html").read_text()
    assert json.loads((finished.path / "selected.json").read_text())["missing"] == []


def test_a_chain_is_preempted_requeued_and_launched_again_while_it_runs(finished: Run) -> None:
    run = Run(finished.cluster, finished.folder, *CHAIN, name="disturbed")
    run.launch()
    ids = run.job_ids()

    run.wait_rows(PRETRAIN, 12)
    run.cluster.preempt(ids[PRETRAIN])
    assert run.ends(PRETRAIN) == ["requeued"]
    assert {run.states()[job] for job in (SHORT, LONG, "selection", "report")} == {"PENDING"}, "they go on waiting"
    assert "Nothing to submit" in run.launch()

    run.wait_rows(LONG, 10)
    run.cluster.run("scontrol", "requeue", ids[LONG])  # by hand: no signal ahead of it
    assert "Nothing to submit" in run.launch()
    run.wait_done()

    assert run.job_ids() == ids, "the same jobs to the end"
    assert [len(run.attempts(job)) for job in (PRETRAIN, SHORT, LONG)] == [2, 1, 2]
    assert_same_results(run, finished, TRAINED)
