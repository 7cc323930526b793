"""The configuration files of a test cluster."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2")
GPUS = 2  # of each node; requests for them are scheduled, but there is no device


@dataclass(frozen=True)
class ClusterOptions:
    """What tests vary between clusters.

    Attributes:
        preempt_sends_user_signal: preemption sends a job's own ``--signal``; without it only SIGCONT and SIGTERM.
        accounting: with slurmdbd and a database of its own.
        requeue_wait_s: a requeued job waits for as long as Slurm's credentials live, by default two minutes; what is
            less than 5 counts as the default.
        extra: further lines of slurm.conf.
    """

    preempt_sends_user_signal: bool = True
    accounting: bool = False
    grace_s: int = 20
    kill_wait_s: int = 5
    requeue_wait_s: int = 5
    extra: Mapping[str, str] = field(default_factory=dict)


def slurm_conf(folder: Path, ports: Sequence[int], options: ClusterOptions) -> str:
    """The text of slurm.conf for a cluster whose files lie in ``folder``.

    ``ports`` are those of the controller, of the accounting and of each node, on the loopback interface.
    """
    host = socket.gethostname()
    lines = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire={options.requeue_wait_s}",
        "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool-%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
        "SlurmctldLogFile": f"{folder}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "GresTypes": "gpu",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        "ReturnToService": 2,
        "KillWait": options.kill_wait_s,
        "MinJobAge": 3600,  # for as long as it may take a test to ask what became of a job
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0",
        "SlurmdParameters": "config_overrides",
    }
    if options.preempt_sends_user_signal:
        lines["SlurmctldParameters"] = "preempt_send_user_signal"
    if options.accounting:
        lines |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": ports[1],
            "AccountingStoragePass": f"{folder}/munge.socket",
        }
    else:
        lines["AccountingStorageType"] = "accounting_storage/none"
    lines |= options.extra
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 Gres=gpu:{GPUS}"
        for name, port in zip(NODES, ports[2:], strict=True)
    ]
    partitions = [
        f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={options.grace_s}",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join([*(f"{key}={value}" for key, value in lines.items()), *nodes, *partitions, ""])


def slurmdbd_conf(folder: Path, port: int) -> str:
    """The text of slurmdbd.conf; it must be readable by root alone."""
    lines = {
        "DbdHost": socket.gethostname(),
        "DbdAddr": "127.0.0.1",
        "DbdPort": port,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "PidFile": f"{folder}/slurmdbd.pid",
        "LogFile": f"{folder}/slurmdbd.log",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",  # the socket that MYSQL_UNIX_PORT names
        "StorageUser": "root",
        "StorageLoc": "slurm",
    }
    return "\n".join([*(f"{key}={value}" for key, value in lines.items()), ""])
