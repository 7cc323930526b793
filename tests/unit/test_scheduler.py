"""Slurm's commands read: outputs recorded from Slurm 22.05.8, printed by programs of the same names on PATH.

tests/slurm asks a real Slurm; here are the answers that one cluster does not give.
"""

from __future__ import annotations

import time

import pytest

from paws_hpc.cluster import inventory, scheduler
from paws_hpc.cluster.inventory import NodeGroup, gpus_of, partitions, seconds
from paws_hpc.cluster.scheduler import SchedulerError, SchedulerUnreachableError
from tests.conftest import Program

UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_queue_tells_arrays_element_by_element(program: Program) -> None:
    widths = scheduler._COLUMNS.values()
    rows = [
        ("18_0", "RUNNING", "2", "None", "n[1-2]", "run|a b"),
        ("18_1", "PENDING", "0", "JobArrayTaskLimit", "", "run|a b"),
    ]
    program("squeue", "".join("".join(map(str.ljust, row, widths)) + "\n" for row in rows))
    jobs = scheduler.queue()
    running, pending = jobs["18_0"], jobs["18_1"]
    assert (running.state, running.restarts, running.nodes, running.reason) == ("RUNNING", 2, "n[1-2]", "")
    assert (pending.state, pending.reason, pending.nodes) == ("PENDING", "JobArrayTaskLimit", "")
    assert running.name == "run|a b"


def test_formats_of_the_user_change_nothing(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    program("squeue", before="/usr/bin/env | /bin/grep -E 'SLURM_TIME_FORMAT|SQUEUE_FORMAT' >&2 && exit 1")
    assert scheduler.queue() == {}


@pytest.mark.parametrize(
    "said",
    [
        UNREACHABLE,
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "squeue: fatal: Unable to process configuration file",
        "squeue: error: fetch_config: DNS SRV lookup failed squeue: fatal: Could not establish a configuration source",
        "slurm_load_jobs error: Protocol authentication error",
        "Unexpected message received for job 17",
    ],
)
def test_a_controller_that_does_not_answer_is_not_a_refusal(program: Program, said: str) -> None:
    program("squeue", err=said, status=1)
    with pytest.raises(SchedulerUnreachableError, match="could not reach Slurm"):
        scheduler.queue()


def test_a_command_that_hangs_is_given_up(program: Program) -> None:
    program("squeue", before="exec /bin/sleep 60")
    began = time.monotonic()
    with pytest.raises(SchedulerUnreachableError, match=r"gave no answer within 0\.5 s"):
        scheduler.ask(["squeue"], timeout_s=0.5)
    assert time.monotonic() - began < 10


def test_a_machine_without_slurm_is_named_as_such(program: Program) -> None:
    with pytest.raises(SchedulerUnreachableError, match="scontrol is not installed here"):
        scheduler.job_state("17")


def test_a_job_that_the_controller_forgot_has_no_state(program: Program) -> None:
    program("scontrol", err="slurm_load_jobs error: Invalid job id specified", status=1)
    assert scheduler.job_state("17") is None
    program("scontrol", err="Job 18_9 not found", status=1)
    assert scheduler.job_state("18_9") is None
    program("scontrol", err=UNREACHABLE, status=1)
    with pytest.raises(SchedulerUnreachableError):
        scheduler.job_state("17")


def test_a_refusal_holds_the_command_and_what_slurm_said(program: Program) -> None:
    program("scontrol", err="2_0-2: Job is pending execution", status=1)
    with pytest.raises(SchedulerError, match=r"`scontrol requeue 2_1` was refused .*: Job is pending execution"):
        scheduler.requeue("2_1")


def test_accounts_tell_the_state_in_one_word_and_arrays_element_by_element_where_a_cluster_keeps_some(
    program: Program,
) -> None:
    program("sacct", "3|CANCELLED by 0|0:0\n1_[0-4:2,7%1]|PENDING|0:0\n")
    accounts = scheduler.accounting(["3", "1_0"])
    assert accounts is not None
    assert accounts["3"].state == "CANCELLED"
    assert sorted(accounts) == ["1_0", "1_2", "1_4", "1_7", "3"]
    program("sacct", err="Slurm accounting storage is disabled", status=1)
    assert scheduler.accounting(["17"]) is None
    program("sacct", err="sacct: error: Sending PersistInit msg: Connection refused", status=1)
    with pytest.raises(SchedulerUnreachableError):
        scheduler.accounting(["17"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("01:00:00", 3600),
        ("10:00", 600),
        ("30", 30),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_durations(text: str, expected: float | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu", 1),
        ("gpu:tesla", 1),
        ("gpu:a100:4(S:0-1),nvme:1", 4),
        ("gpu:a100:4,gpu:1g.5gb:7", 11),
        ("gpu:8(IDX:0-7)", 8),
        ("nvme:4", 0),
        ("(null)", 0),
    ],
)
def test_gpus_of_a_node(gres: str, expected: int) -> None:
    assert gpus_of(gres) == expected


def test_partitions_have_their_limits_and_the_nodes_that_sinfo_groups(program: Program) -> None:
    program("sinfo", "low|1|4|8000|mixed|n1|gpu:2\nlow|3|64|256000|idle|n[2-4]|gpu:a100:4(S:0-1)\n")
    program(
        "scontrol",
        "PartitionName=low AllowGroups=ALL AllowAccounts=lab,guest AllowQos=ALL Default=YES QoS=N/A DefaultTime=NONE "
        "GraceTime=10 MaxNodes=2 MaxTime=1-00:00:00 Nodes=n[1-4] PriorityTier=1 PreemptMode=REQUEUE State=UP\n",
    )
    low = partitions()["low"]
    assert (low.grace_s, low.max_time_s, low.max_nodes, low.nodes) == (10, 86400, 2, 4)
    assert (low.allowed_accounts, low.allowed_qos, low.default, low.state) == (("lab", "guest"), None, True, "UP")
    assert low.groups[0] == NodeGroup(1, 4, 8000, 2, "mixed", "n1")


def test_rights_come_from_all_accounts_of_the_user(program: Program) -> None:
    program("sacctmgr", "lab|normal,long\nguest|normal\n")
    assert inventory.rights("me") == ({"lab", "guest"}, {"normal", "long"})
