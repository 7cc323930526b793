"""The test cluster leaves nothing behind, however it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import require_slurm, slurm_cluster, wait_until
from tests.slurm.reaper import processes_of
from tests.slurm.settings import ClusterOptions

pytestmark = pytest.mark.timeout(120)


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
