"""What a Slurm cluster has and how it is set: its configuration, its partitions and their nodes.

Every function that queries it raises the errors of :mod:`paws_hpc.cluster.scheduler`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from paws_hpc.cluster.scheduler import ask


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of a partition that have the same equipment and the same state (``idle``, ``mixed``, ``down``, …).

    CPUs, memory and GPUs are those of each node; ``names`` are as Slurm abbreviates them.
    """

    count: int
    cpus: int
    memory_mb: int
    gpus: int
    state: str
    names: str


@dataclass(frozen=True)
class Partition:
    """A partition; None means no limit, or all.

    Attributes:
        state: ``UP``, ``DOWN``, ``DRAIN`` or ``INACTIVE``.
        default: whether jobs that name none come here.
        grace_s: Slurm's GraceTime, seconds.
        preempt_mode: what happens to a preempted job: ``OFF``, ``REQUEUE``, ``CANCEL`` or ``SUSPEND``, maybe with
            ``GANG``.
        max_nodes: most nodes of a job.
    """

    name: str
    state: str
    default: bool
    grace_s: float
    preempt_mode: str
    max_time_s: float | None
    max_nodes: int | None
    allowed_accounts: tuple[str, ...] | None
    allowed_qos: tuple[str, ...] | None
    groups: tuple[NodeGroup, ...]

    @property
    def nodes(self) -> int:
        """How many it has, in whatever state."""
        return sum(group.count for group in self.groups)


def settings() -> dict[str, str]:
    """The cluster's configuration, by the names of slurm.conf; ``(null)`` reads as the empty string."""
    lines = ask(["scontrol", "show", "config"]).splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): "" if value.strip() == "(null)" else value.strip() for name, _, value in pairs}


def partitions() -> dict[str, Partition]:
    """The partitions that this user may see, by name, with their nodes."""
    groups: dict[str, list[NodeGroup]] = {}
    for line in ask(["sinfo", "--noheader", "--exact", "-o", "%R|%D|%c|%m|%T|%N|%G"]).splitlines():
        name, count, cpus, memory, state, names, gres = line.strip().split("|", 6)
        group = NodeGroup(int(count), int(cpus), int(memory), gpus_of(gres), state, names)
        groups.setdefault(name, []).append(group)
    lines = ask(["scontrol", "show", "partition", "--oneliner"]).splitlines()
    read = [_partition(dict(re.findall(r"(\S+?)=(\S*)", line)), groups) for line in lines if line.strip()]
    return {partition.name: partition for partition in read}


def _partition(values: dict[str, str], groups: dict[str, list[NodeGroup]]) -> Partition:
    def several(field: str) -> tuple[str, ...] | None:
        value = values.get(field, "ALL")
        return None if value in ("ALL", "(null)", "N/A") else tuple(value.split(","))

    name, most = values["PartitionName"], values.get("MaxNodes", "UNLIMITED")
    return Partition(
        name=name,
        state=values.get("State", "UP"),
        default=values.get("Default") == "YES",
        grace_s=seconds(values.get("GraceTime", "0")) or 0.0,
        preempt_mode=values.get("PreemptMode", "OFF"),
        max_time_s=seconds(values.get("MaxTime", "UNLIMITED")),
        max_nodes=int(most) if most.isdigit() else None,
        allowed_accounts=several("AllowAccounts"),
        allowed_qos=several("AllowQos"),
        groups=tuple(groups.get(name, ())),
    )


def gpus_of(gres: str) -> int:
    """GPUs in a list of generic resources such as ``gpu:a100:4(S:0-1),nvme:1``."""
    counts = re.findall(r"(?:^|,)gpu(?::[^,:(]*[^,:(\d][^,:(]*)?(?::(\d+))?(?:\([^)]*\))?(?=,|$)", gres)
    return sum(int(count or 1) for count in counts)


def seconds(text: str) -> float | None:
    """A duration as Slurm prints it: ``30``, ``30 sec``, ``10:00``, ``1-00:00:00``; None for ``UNLIMITED`` and such."""
    if not re.fullmatch(r"(\d+-(?=\d+:\d+:))?(\d+:){0,2}\d+( sec)?", text):
        return None
    days, _, clock = text.removesuffix(" sec").rpartition("-")
    total = 0
    for number in clock.split(":"):
        total = total * 60 + int(number)
    return float(int(days or 0) * 86400 + total)


def rights(user: str) -> tuple[set[str], set[str]]:
    """The accounts of a user, and the qualities of service that any of them allows."""
    lines = ask(["sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account,qos"]).split()
    rows = [line.split("|") for line in lines]
    return {row[0] for row in rows}, {name for row in rows for name in row[1].split(",")}


def qualities() -> dict[str, tuple[str, float]]:
    """All qualities of service: name → what happens to its preempted jobs, and after how many seconds."""
    lines = ask(["sacctmgr", "-n", "-P", "show", "qos", "format=name,preemptmode,gracetime"]).split()
    rows = [line.split("|") for line in lines]
    return {name: (mode, seconds(grace) or 0.0) for name, mode, grace in rows}


def notice_s(grace_s: float, site: Mapping[str, str]) -> float:
    """Seconds between the first signal of a preemption and the kill, on a cluster with these settings."""
    return grace_s + (seconds(site.get("KillWait", "")) or 0.0)
