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
    """Nodes of a partition that have the same equipment and the same state.

    Attributes:
        count: of nodes.
        cpus: of each, as Slurm counts them.
        memory_mb: of each.
        gpus: of each, of all types.
        state: ``idle``, ``mixed``, ``allocated``, ``down``, ``drained``, …
        names: as Slurm abbreviates them.
    """

    count: int
    cpus: int
    memory_mb: int
    gpus: int
    state: str
    names: str


@dataclass(frozen=True)
class Partition:
    """A partition.

    Attributes:
        name: of it.
        state: ``UP``, ``DOWN``, ``DRAIN`` or ``INACTIVE``.
        default: whether jobs that name none come here.
        grace_s: seconds between the first signal of a preemption and the kill.
        preempt_mode: what happens to a preempted job: ``OFF``, ``REQUEUE``, ``CANCEL`` or ``SUSPEND``, maybe with
            ``GANG``.
        max_time_s: longest time limit; None if there is none.
        max_nodes: most nodes of a job; None if there is no limit.
        allowed_accounts: that may submit; None for all.
        allowed_qos: that jobs may name; None for all.
        groups: its nodes.
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


def grace_warnings(
    job: str,
    *,
    save_s: float | None,
    step_s: float | None,
    partition: Partition | None,
    settings: Mapping[str, str],
    signal_delay_s: float | None,
) -> list[str]:
    """Warnings for a user whose job cannot save in time; empty if it can, or if nothing was measured yet.

    Args:
        job: its name.
        save_s: seconds that the last checkpoint took (``traces.read_progress``).
        step_s: seconds of a step.
        partition: where it runs; None if that is unknown.
        settings: of the cluster, as :func:`settings` returns them.
        signal_delay_s: between Slurm's signal and the job's time limit; None if that is unknown.
    """
    if save_s is None:
        return []
    needed = 2 * save_s + (step_s or 0.0)
    needs = (
        f"{job} may need {needed:.1f} s to save (a step {step_s or 0.0:.1f} s, a checkpoint {save_s:.1f} s, and as "
        "long for the one before it)"
    )
    warnings = []
    if partition is not None and (notice := preemption_notice_s(partition, settings)) is not None and notice < needed:
        warnings.append(
            f"{needs}, but partition {partition.name} leaves a preempted job {notice:g} s (GraceTime "
            f"{partition.grace_s:g} s and KillWait): work since the last periodic checkpoint would be lost. Save more "
            "often with a lower pretrain.checkpoint_every_steps, or ask for a longer GraceTime."
        )
    if signal_delay_s is not None and signal_delay_s < needed:
        warnings.append(
            f"{needs}, but gets its signal only {signal_delay_s:g} s before its time limit. Raise "
            "hydra.launcher.signal_delay_s."
        )
    return warnings


def preemption_notice_s(partition: Partition, settings: Mapping[str, str]) -> float | None:
    """Seconds between the first signal of a preemption and the kill; None where nothing is preempted by partition."""
    mode = partition.preempt_mode.upper()
    if settings.get("PreemptType") != "preempt/partition_prio" or not ("REQUEUE" in mode or "CANCEL" in mode):
        return None
    return partition.grace_s + (seconds(settings.get("KillWait", "")) or 0.0)
