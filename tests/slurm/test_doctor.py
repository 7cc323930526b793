"""``doctor`` against a real Slurm: what it finds before a submission is what Slurm would do with one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paws_hpc.doctor import main
from tests.conftest import Stores
from tests.slurm.cluster import Cluster
from tests.slurm.settings import ClusterOptions

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster_options() -> ClusterOptions:
    return ClusterOptions(accounting=True, grace_s=40, extra={"MaxArraySize": "4"})


@pytest.fixture(scope="module")
def good(digits_stores: Stores) -> tuple[str, ...]:
    """A launch that the cluster would run."""
    data = (f"data.train={digits_stores.train}", f"data.test={digits_stores.test}")
    return ("hydra.launcher.partition=low", "hydra.launcher.timeout_min=60", "device=cpu", *data)


Checks = dict[str, dict[str, str]]
Doctor = Callable[..., tuple[int, Checks]]


@pytest.fixture
def doctor(here: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """The command; returns its exit status and the checks by name, of several with one name the worst."""
    order = ("ok", "warning", "problem")

    def run(*arguments: str) -> tuple[int, Checks]:
        status = main([f"runs={tmp_path}", *arguments, "--json"])
        checks = sorted(json.loads(capsys.readouterr().out), key=lambda check: order.index(check["verdict"]))
        return status, {check["name"]: check for check in checks}

    return run


def test_a_sound_launch_has_nothing_to_mend_and_the_probe_comes_back(
    doctor: Doctor, tmp_path: Path, good: tuple[str, ...]
) -> None:
    status, checks = doctor(*good, "--probe")
    assert status == 0, checks
    assert checks["preemption"]["verdict"] == "ok"
    assert "SIGUSR2 and has 45 s to save" in checks["preemption"]["found"]
    assert checks["probe"]["verdict"] == "ok"
    assert "torch" in checks["probe: packages"]["found"]
    assert checks["probe: store"]["verdict"] == "ok"
    assert os.listdir(tmp_path) == []


SHAPES = (
    ("resources.pretrain.gpus_per_node=3", "jobs of pretrain", "n[1-2] has 2 GPUs", "Ask for less"),
    ("resources.report.mem_gb=100", "jobs of report", "n[1-2] has 8000 MB of memory", "Ask for less"),
    ("resources.finetune.nodes=4", "jobs of finetune", "asks for 4 nodes", "Ask for less"),
    ("resources.selection.additional_parameters={constraint: h100}", "jobs of selection", "feature", "Change the"),
)
SHORT = (("resources.baseline.timeout_min=2", "config", "signal_delay_s=120", ""),)
REST = (
    ("hydra.launcher.account=nobody", "account of prepare, pretrain", "nobody is not yours", "test"),
    ("resources.finetune.additional_parameters={qos: gold}", "qos of finetune", "gold is not yours", "normal"),
    ("finetune.sweep.epochs=[1,2,3]", "sweep finetune", "6 trials, but an array may have 4", "Shorten"),
    ("data.train=/nowhere/train", "data.train", "data.train=/nowhere/train is not packed yet. Pack it first", ""),
    ("data.source=null", "data.train", "paws_hpc pack KIND --to /nowhere/train", ""),
)


@pytest.mark.parametrize(
    "faults", [SHAPES, REST, (("hydra.launcher.partition=lou", "jobs of", "there is no partition lou", "low"),), SHORT]
)
def test_what_slurm_would_never_start_is_a_problem_with_a_remedy(
    doctor: Doctor, good: tuple[str, ...], faults: tuple[tuple[str, str, str, str], ...]
) -> None:
    status, checks = doctor(*good, *(override for override, *_ in faults))
    assert status == 1
    for override, name, found, remedy in faults:
        bad = [check for check in checks.values() if check["verdict"] == "problem" and check["name"].startswith(name)]
        assert any(found in check["found"] and remedy in check["remedy"] for check in bad), (override, checks)


def test_a_partition_with_a_limit_and_one_that_is_down(cluster: Cluster, doctor: Doctor, good: tuple[str, ...]) -> None:
    cluster.run("scontrol", "update", "PartitionName=high", "MaxTime=30", "State=DOWN")
    try:
        status, checks = doctor(*good, "hydra.launcher.partition=high")
        said = json.dumps(checks)
        assert status == 1
        assert checks["preemption"]["found"] == "jobs of partition high are not preempted"
        assert "more than partition high allows (30 min)" in said or "partition high is DOWN" in said
    finally:
        cluster.run("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED", "State=UP")


def test_without_a_controller_the_rest_is_still_checked(
    cluster: Cluster, doctor: Doctor, good: tuple[str, ...]
) -> None:
    with cluster.without_controller():
        status, checks = doctor(*good, "--probe")
    assert status == 1
    assert checks["controller"]["verdict"] == "problem"
    assert checks["data.train"]["verdict"] == "ok"
    assert "probe" not in checks


def test_a_misspelt_field_is_one_line(doctor: Doctor) -> None:
    status, checks = doctor("nmae=x")
    assert status == 1
    assert checks["config"]["found"] == "nmae is not a field of the config. Did you mean 'name'?"
