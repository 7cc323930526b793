"""``status`` and the scheduler's commands against a real Slurm."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.scheduler import SchedulerError
from tests.conftest import Stores
from tests.slurm.chain import Run
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.settings import ClusterOptions

pytestmark = pytest.mark.timeout(900)  # of which it needs a tenth on a machine of its own
LONG = ("stages=[prepare,pretrain,report]", "pretrain.epochs=300", "optimizer.warmup_epochs=1")


@pytest.fixture(scope="module")
def cluster_options() -> ClusterOptions:
    return ClusterOptions(grace_s=0, kill_wait_s=2, requeue_wait_s=20, accounting=True)


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, digits_stores: Stores) -> Run:
    shutil.copytree(digits_stores.train.parent, tmp_path / "shards")
    return Run(cluster, tmp_path)


def status(run: Run, *arguments: str) -> str:
    """What the command prints about a run."""
    return run.cluster.run(sys.executable, "-m", "paws_hpc.status", str(run.path), *arguments)


def job(run: Run, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(status(run, "--json"))
    return next(job for job in value["jobs"] if job["job"] == name)


def test_status_follows_a_chain_through_preemption_loss_of_the_controller_and_cancelling(run: Run) -> None:
    cluster = run.cluster
    run.launch(*LONG)
    run.wait_rows("pretrain", 4)
    found = job(run, "pretrain")
    assert (found["state"], found["source"], found["job_id"]) == ("running", "squeue", run.job_ids()["pretrain"])
    assert found["progress"]["total_steps"] == 3000
    assert found["progress"]["step"] >= 4
    assert found["progress"]["seconds_left"] > 0
    assert (job(run, "report")["state"], job(run, "report")["reason"]) == ("waiting", "Dependency")

    cluster.preempt(run.job_ids()["pretrain"])
    found = job(run, "pretrain")
    assert (found["state"], found["restarts"]) == ("waiting", 1)
    assert "BeginTime" in status(run)
    cluster.release_begin_time(run.job_ids()["pretrain"])
    run.wait_start("pretrain", 2)

    with cluster.without_controller():
        found = job(run, "pretrain")
        assert (found["state"], found["source"]) == ("running", "attempts")
        assert "Slurm cannot be reached" in status(run)

    run.launch("cancel=true")
    run.wait_over()
    text = status(run)
    assert re.search(r"^pretrain +cancelled", text, re.MULTILINE), text
    assert "cancelled by launch at" in text


def test_a_failure_is_shown_with_the_end_of_its_log_and_what_it_stopped(run: Run) -> None:
    run.launch("stages=[prepare,pretrain,selection]", "optimizer.peak_lr=1e30", "optimizer.start_lr=1e30")
    run.wait_over()
    found = job(run, "pretrain")
    assert found["state"] == "failed"
    assert found["failure"]["permanent"]
    assert "not finite" in found["failure"]["message"]
    assert found["log_tail"]
    text = status(run)
    assert "TrainingStoppedError" in text
    assert re.search(r"^selection +cancelled", text, re.MULTILINE), text


def test_jobs_and_elements_of_arrays_are_listed_released_requeued_and_cancelled(here: Cluster) -> None:
    held = here.submit("-H", "-p", "low", "--array=0-2", "-o", "/dev/null", "--wrap", "exec sleep 100")
    names = [f"{held}_{index}" for index in range(3)]
    known = scheduler.queue()
    assert [known[name].state for name in names] == ["PENDING"] * 3
    assert known[names[0]].reason == "JobHeldUser"
    scheduler.release([held])
    here.wait_for(names[1], "RUNNING")
    assert scheduler.job_state(names[1]) == "RUNNING"
    scheduler.requeue(names[1])
    here.wait_for(names[1], "PENDING")
    assert scheduler.queue()[names[1]].restarts == 1
    with pytest.raises(SchedulerError, match="Job is pending execution"):
        scheduler.requeue(names[1])
    scheduler.cancel([*names, "99999"])
    for name in names:
        here.wait_for(name, "CANCELLED")
    scheduler.cancel(names)
    assert scheduler.job_state("99999") is None


def test_accounts_know_what_the_queue_forgets(here: Cluster) -> None:
    failed = here.submit("-o", "/dev/null", "--wrap", "exit 3")
    here.wait_for(failed, "FAILED")

    def accounted() -> bool:
        found = scheduler.accounting([failed, "99999"])
        assert found is not None
        return failed in found and found[failed].state == "FAILED" and found[failed].exit_code == "3:0"

    wait_until(accounted, 20, here.queue)
