"""The test cluster itself: what other tests take for granted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, require_slurm, slurm_cluster, wait_until
from tests.slurm.reaper import processes_of
from tests.slurm.settings import ClusterOptions

pytestmark = pytest.mark.timeout(120)
STUBBORN = "srun env --ignore-signal=TERM,USR2 sleep 100"  # asked to end, it does not; what ends by itself has failed


@pytest.fixture(scope="module")
def cluster_options() -> ClusterOptions:
    return ClusterOptions(grace_s=2)


def test_two_nodes_run_one_job_and_schedule_gpus_that_are_not_there(cluster: Cluster, tmp_path: Path) -> None:
    show = "srun sh -c 'echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_GPUS_ON_NODE'"
    job = cluster.submit("-N2", "--gres=gpu:2", "-o", str(tmp_path / "out"), "--wrap", show)
    cluster.wait_for(job, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["0 n1 2", "1 n2 2"]
    refused = cluster.try_run("sbatch", "--gres=gpu:3", "--wrap", "true")
    assert "not available" in refused.stderr


def test_a_job_survives_the_loss_of_a_node(cluster: Cluster) -> None:
    job = cluster.submit("-N2", "-o", "/dev/null", "--wrap", STUBBORN)
    wait_until(lambda: len(cluster.tasks(job, rank=1)) > 0, 20, cluster.queue)
    cluster.node_down("n2")
    assert cluster.tasks(job, rank=1) == []
    cluster.wait_for(job, "PENDING")
    cluster.node_up("n2")
    cluster.wait_for(job, "RUNNING", timeout_s=30)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")


def test_nothing_is_left_when_a_test_fails(cluster_options: ClusterOptions) -> None:
    require_slurm()
    seen: list[Cluster] = []

    def fail() -> None:
        with slurm_cluster(cluster_options) as cluster:
            seen.append(cluster)
            job = cluster.submit("-N2", "-o", "/dev/null", "--wrap", STUBBORN)
            wait_until(lambda: len(cluster.tasks(job, rank=1)) > 0, 20, cluster.queue)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert processes_of(seen[0].conf) == []
    assert not seen[0].folder.exists()


def test_nothing_is_left_when_the_test_process_is_killed(tmp_path: Path) -> None:
    require_slurm()
    code = (
        "import sys, time\n"
        "from tests.slurm.cluster import slurm_cluster\n"
        "from tests.slurm.settings import ClusterOptions\n"
        "with slurm_cluster(ClusterOptions()) as cluster:\n"
        "    print(cluster.conf, flush=True)\n"
        "    time.sleep(100)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        conf = Path(process.stdout.readline().strip())
        assert len(processes_of(conf)) >= 4
        process.kill()
    wait_until(lambda: not conf.exists() and processes_of(conf) == [], 20, lambda: f"{processes_of(conf)} still run")


def test_a_start_that_fails_half_way_says_why_and_leaves_nothing() -> None:
    require_slurm()
    before = {entry for entry in os.listdir("/tmp") if entry.startswith("slurm-")}
    with pytest.raises(TimeoutError, match="NoSuchOption"), slurm_cluster(ClusterOptions(extra={"NoSuchOption": "1"})):
        raise AssertionError("slurmctld refuses this file")
    assert {entry for entry in os.listdir("/tmp") if entry.startswith("slurm-")} <= before
