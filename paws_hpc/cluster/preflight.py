"""Whether a cluster can run a chain: checks before the first submission.

Slurm accepts many jobs that can never start (``EnforcePartLimits=NO`` is its default), so that its ``--test-only`` is
used but not relied on.
"""

from __future__ import annotations

import getpass
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

from paws_hpc.cluster.inventory import (
    NodeGroup,
    Partition,
    grace_warnings,
    partitions,
    preemption_notice_s,
    qualities,
    rights,
    seconds,
    settings,
)  # fmt: skip
from paws_hpc.cluster.overview import span
from paws_hpc.cluster.scheduler import SchedulerError, ask
from paws_hpc.cluster.traces import read_progress
from paws_hpc.config import Config, sweep_config
from paws_hpc.data.config import DataConfig
from paws_hpc.stage_table import STAGES, SWEEPS
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore

Parameters = Mapping[str, Any]
"""What submitit.SlurmExecutor.update_parameters takes."""

SHARED = "shared folders"
_LOCAL = {"btrfs", "devtmpfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "squashfs", "tmpfs", "xfs", "zfs"}


@dataclass(frozen=True)
class Check:
    """A question and its answer.

    Attributes:
        name: what was looked at.
        verdict: ``problem`` keeps a chain from running, ``warning`` may.
        found: what is so.
        remedy: what to do about it; empty if there is nothing to do.
    """

    name: str
    verdict: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Check:
    """May keep a chain from running."""
    return Check(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Check:
    """Keeps a chain from running."""
    return Check(name, "problem", found, remedy)


COMMANDS, CONTROLLER = "Slurm commands", "controller"
_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_IN_SERVICE = ("idle", "mixed", "allocated", "completing", "planned", "reserved")
_SHORT_NOTICE_S = 30.0
_DEFAULT_SIGNAL_DELAY_S = 90.0  # submitit's
_FLAGS = {"timeout_min": "time", "tasks_per_node": "ntasks-per-node", "mem_gb": "mem"}
_NOT_FLAGS = {
    "additional_parameters", "array_parallelism", "name", "setup", "signal_delay_s", "srun_args", "stderr_to_stdout",
    "teardown", "use_srun",
}  # fmt: skip


@dataclass(frozen=True)
class _Cluster:
    settings: Mapping[str, str]
    partitions: Mapping[str, Partition]


def preflight_checks(config: Config, stage_parameters: Mapping[str, Parameters], run: RunFolder) -> list[Check]:
    """Look at everything that a submission needs; nothing is submitted, and nothing raises.

    Args:
        config: of the run.
        stage_parameters: what submitit would be given, per stage.
        run: where the run is or will be.

    Returns:
        one verdict per question, in the order in which to mend them.
    """
    by_stage = {stage: stage_parameters[stage] for stage in config.stages}
    return [*_slurm(config, by_stage, run), *check_site(config, by_stage, run)]


def _slurm(config: Config, by_stage: Mapping[str, Parameters], run: RunFolder) -> Iterator[Check]:
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        yield problem(
            "Slurm commands",
            f"{', '.join(missing)} not on PATH",
            "Run this on a login node; maybe `module load slurm`.",
        )
        return
    try:
        cluster = _Cluster(settings(), partitions())
    except SchedulerError as error:
        yield problem(CONTROLLER, str(error), "Ask again later; if it stays, ask those who run the cluster.")
        return
    version, name = cluster.settings.get("SLURM_VERSION", "?"), cluster.settings.get("ClusterName", "?")
    yield ok(CONTROLLER, f"Slurm {version}, cluster {name}, {len(cluster.partitions)} partitions")
    for stages, parameters in _alike(by_stage):
        yield from _shape(stages, parameters, cluster)
    yield from _accounts(by_stage, cluster)
    yield from _preemption(config, by_stage, cluster, run)
    yield from _sweeps(config, cluster)


def _alike(by_stage: Mapping[str, Parameters]) -> list[tuple[str, Parameters]]:
    """Stages that ask for the same thing as one, so that it is said once."""
    groups: list[tuple[list[str], Parameters]] = []
    for stage, parameters in by_stage.items():
        for stages, others in groups:
            if others == parameters:
                stages.append(stage)
                break
        else:
            groups.append(([stage], parameters))
    return [(", ".join(stages), parameters) for stages, parameters in groups]


def _shape(stages: str, parameters: Parameters, cluster: _Cluster) -> Iterator[Check]:
    """Whether the partition can ever hold such a job."""
    partition, title = _partition(parameters, cluster), f"jobs of {stages}"
    if partition is None:
        name = parameters.get("partition")
        near = get_close_matches(str(name), cluster.partitions, n=1, cutoff=0.0)
        found = "no default partition" if name is None else f"there is no partition {name}"
        yield problem(title, found, f"Set hydra.launcher.partition; maybe {near[0]}." if near else "")
        return
    if partition.state != "UP":
        yield problem(title, f"partition {partition.name} is {partition.state}", "Choose another partition, or wait.")
    limit, asked_s = partition.max_time_s, 60.0 * float(parameters.get("timeout_min", 0))
    if limit is not None and asked_s > limit:
        yield problem(
            title,
            f"{span(asked_s)} is more than partition {partition.name} allows ({span(limit)}), so it would never start",
            f"Set hydra.launcher.timeout_min={limit / 60:.0f}: a job that trains saves and is queued again.",
        )
    delay_s = float(parameters.get("signal_delay_s", _DEFAULT_SIGNAL_DELAY_S))
    if 0 < asked_s <= delay_s:
        yield problem(
            title,
            f"the signal to save comes {delay_s:g} s before the end of a job of {span(asked_s)}",
            "Lower hydra.launcher.signal_delay_s or raise timeout_min.",
        )
    nodes = int(parameters.get("nodes", 1))
    lacking = {group.names: _lacks(parameters, group) for group in partition.groups}
    fitting = [group for group in partition.groups if not lacking[group.names]]
    enough, alive = sum(group.count for group in fitting), sum(g.count for g in fitting if _serves(g))
    if enough < nodes or (partition.max_nodes is not None and nodes > partition.max_nodes):
        why = next((f": {names} has {lack}" for names, lack in lacking.items() if lack), "")
        most = "" if partition.max_nodes is None else f", and a job may have {partition.max_nodes}"
        yield problem(
            title,
            f"asks for {nodes} nodes{_needs(parameters)}; partition {partition.name} has {enough} such{most}{why}",
            "Ask for less with hydra.launcher.* or resources.<stage>.*, or choose another partition.",
        )
        return
    if alive < nodes:
        yield warning(title, f"only {alive} of {enough} fitting nodes of {partition.name} are in service", "")
    try:
        ask(["sbatch", "--test-only", *sbatch_flags(parameters), "--wrap", "true"])
    except SchedulerError as error:
        yield problem(title, str(error), "Change the field that Slurm names.")
        return
    limits = "no time limit" if limit is None else f"at most {span(limit)}"
    yield ok(title, f"fit {enough} of {partition.nodes} nodes of partition {partition.name} ({limits})")


def _partition(parameters: Parameters, cluster: _Cluster) -> Partition | None:
    name = parameters.get("partition")
    if name is None:
        return next((partition for partition in cluster.partitions.values() if partition.default), None)
    return cluster.partitions.get(str(name).partition(",")[0])


def _lacks(parameters: Parameters, group: NodeGroup) -> str:
    """What a node has too little of; empty if it fits."""
    tasks = int(parameters.get("tasks_per_node", 1))
    wanted = {
        "CPUs": (tasks * int(parameters.get("cpus_per_task", 1)), group.cpus),
        "GPUs": (int(parameters.get("gpus_per_node", 0)), group.gpus),
        "MB of memory": (round(1024 * float(parameters.get("mem_gb", 0))), group.memory_mb),
    }
    return ", ".join(f"{has} {unit}" for unit, (need, has) in wanted.items() if need > has)


def _needs(parameters: Parameters) -> str:
    words = [f"{int(parameters.get('tasks_per_node', 1)) * int(parameters.get('cpus_per_task', 1))} CPUs"]
    words += [f"{parameters['gpus_per_node']} GPUs"] if parameters.get("gpus_per_node") else []
    words += [f"{parameters['mem_gb']:g} GB"] if parameters.get("mem_gb") else []
    return f" with {' and '.join(words)} each"


def _serves(group: NodeGroup) -> bool:
    return group.state.rstrip("*~#!%$@^-+").lower() in _IN_SERVICE


def sbatch_flags(parameters: Parameters) -> list[str]:
    """submitit's parameters as sbatch takes them."""
    flags = []
    for name, value in {**parameters, **parameters.get("additional_parameters", {})}.items():
        if name in _NOT_FLAGS or value is None or value is False:
            continue
        flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
        value = f"{value:g}GB" if name == "mem_gb" else value  # noqa: PLW2901
        flags.append(flag if value is True else f"{flag}={value}")
    return flags


def _accounts(by_stage: Mapping[str, Parameters], cluster: _Cluster) -> Iterator[Check]:
    """Account and quality of service, where the cluster keeps accounts."""
    if not cluster.settings.get("AccountingStorageType", "").endswith("slurmdbd"):
        yield ok("accounts", "this cluster keeps none; account and qos are not checked")
        return
    try:
        accounts, qos = rights(getpass.getuser())
    except SchedulerError as error:
        yield warning("accounts", f"cannot be read: {error}", "Account and qos are not checked.")
        return
    refused: dict[tuple[str, str, str], list[str]] = {}
    for stage, parameters in by_stage.items():
        partition = _partition(parameters, cluster)
        for field, granted, allowed in (
            ("account", accounts, partition.allowed_accounts if partition else None),
            ("qos", qos, partition.allowed_qos if partition else None),
        ):
            name = parameters.get(field)
            usable = granted if allowed is None else granted & set(allowed)
            if name is not None and name not in usable:
                refused.setdefault((field, str(name), ", ".join(sorted(usable))), []).append(stage)
    for (field, name, usable_names), stages in refused.items():
        yield problem(f"{field} of {', '.join(stages)}", f"{name} is not yours to use", f"Use one of: {usable_names}.")
    if not refused:
        yield ok("accounts", f"yours: {', '.join(sorted(accounts)) or 'none'}; qos {', '.join(sorted(qos))}")


def _preemption(
    config: Config, by_stage: Mapping[str, Parameters], cluster: _Cluster, run: RunFolder
) -> Iterator[Check]:
    """What happens to jobs that must make room, and whether they have the time to save."""
    parameters: Parameters = by_stage.get("pretrain", {})
    partition = _partition(parameters, cluster)
    if partition is not None:
        yield _preempted(parameters, partition, cluster)
        folder = run.pretrain
        seen = read_progress(folder, epochs=config.pretrain.epochs, batch_size=config.pretrain.batch_size)
        for text in grace_warnings(
            "pretrain",
            save_s=seen.save_s,
            step_s=seen.step_s,
            partition=partition,
            settings=cluster.settings,
            signal_delay_s=float(parameters.get("signal_delay_s", _DEFAULT_SIGNAL_DELAY_S)),
        ):
            yield warning("time to save", text, "")
    if cluster.settings.get("JobRequeue") == "0":
        yield ok("JobRequeue", "0, but these jobs ask with --requeue, which counts")


def _preempted(parameters: Parameters, partition: Partition, cluster: _Cluster) -> Check:
    kind = cluster.settings.get("PreemptType", "preempt/none")
    mode, grace_s, of = partition.preempt_mode.upper(), partition.grace_s, f"partition {partition.name}"
    if kind == "preempt/qos":
        name = str(parameters.get("qos") or "normal")
        try:
            own_mode, grace_s = qualities()[name]
        except (KeyError, SchedulerError):
            return warning(
                "preemption", f"by qos, but nothing is known of qos {name}", "Ask those who run the cluster."
            )
        inherits = own_mode.upper() == "CLUSTER"
        mode, of = (cluster.settings.get("PreemptMode", "OFF") if inherits else own_mode).upper(), f"qos {name}"
    if kind == "preempt/none" or mode == "OFF":
        return ok("preemption", f"jobs of {of} are not preempted")
    if "CANCEL" in mode:
        return warning(
            "preemption",
            f"a preempted job of {of} is cancelled, not queued again",
            "Launch again to continue, or choose a partition whose PreemptMode is REQUEUE.",
        )
    if "SUSPEND" in mode:
        return warning(
            "preemption",
            f"a preempted job of {of} is suspended and keeps its memory, on GPUs too; NCCL may time out",
            "Choose a partition whose PreemptMode is REQUEUE if there is one.",
        )
    own = "preempt_send_user_signal" in cluster.settings.get("SlurmctldParameters", "")
    own = own or "send_user_signal" in cluster.settings.get("PreemptParameters", "")
    notice_s = grace_s + (seconds(cluster.settings.get("KillWait", "")) or 0.0)
    if kind == "preempt/partition_prio":
        notice_s = preemption_notice_s(partition, cluster.settings) or notice_s
    text = (
        f"a preempted job of {of} gets {'SIGUSR2' if own else 'SIGTERM'} and has {notice_s:g} s to save (GraceTime "
        f"{grace_s:g} s, KillWait {cluster.settings.get('KillWait', '?')}), then is queued again"
    )
    if notice_s < _SHORT_NOTICE_S:
        return warning(
            "preemption", text, "A large model may not save in time: keep pretrain.checkpoint_every_steps low."
        )
    return ok("preemption", text)


def _sweeps(config: Config, cluster: _Cluster) -> Iterator[Check]:
    most = cluster.settings.get("MaxArraySize", "")
    for sweep in (stage for stage in SWEEPS if stage in config.stages and most.isdigit()):
        trials = len(sweep_config(config, sweep).trials())
        if trials > int(most):
            yield problem(
                f"sweep {sweep}",
                f"has {trials} trials, but an array may have {most} (MaxArraySize)",
                f"Shorten the lists of {sweep}.sweep, or split the sweep over runs.",
            )
        else:
            yield ok(f"sweep {sweep}", f"{trials} trials; an array may have {most}")


def check_site(config: Config, by_stage: Mapping[str, Parameters], run: RunFolder) -> Iterator[Check]:
    """Devices, folders, stores and versions."""
    yield from _devices(config, by_stage)
    yield _folder("run directory", run.path)
    for what, path in config.data.stores.items():
        yield _store(what, path, config.data)
    yield _versions()
    yield _shared(Path(config.runs), *map(Path, config.data.stores.values()), Path(sys.prefix))


def _devices(config: Config, by_stage: Mapping[str, Parameters]) -> Iterator[Check]:
    """One GPU per rank, where training is to have GPUs."""
    shapes: dict[tuple[int, int, bool], list[str]] = {}
    for stage in (name for name, row in STAGES.items() if row.trains):
        if stage in by_stage and config.device != "cpu":
            parameters = by_stage[stage]
            otherwise = any(parameters.get(name) for name in ("gpus_per_task", "gres"))
            shape = int(parameters.get("gpus_per_node", 0)), int(parameters.get("tasks_per_node", 1)), otherwise
            shapes.setdefault(shape, []).append(stage)
    for (gpus, tasks, otherwise), stages in shapes.items():
        fields = f"{', '.join(stages)}: gpus_per_node={gpus}, tasks_per_node={tasks}"
        if gpus == 0 and not otherwise:
            verdict = problem if config.device == "cuda" else warning
            yield verdict("devices", f"{fields}, so no GPU", "Set hydra.launcher.gpus_per_node, or device=cpu.")
        elif 0 < gpus < tasks:
            yield problem("devices", f"{fields}, so some ranks would find no GPU", "Ask for one GPU per task.")
        elif gpus > tasks:
            yield warning("devices", f"{fields}, so {gpus - tasks} GPUs per node idle", "Ask for one task per GPU.")
        elif gpus:
            yield ok("devices", f"{fields}: one GPU per rank")


def _folder(name: str, path: Path) -> Check:
    there = _existing(path)
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(name, f"{there} cannot be written", "Choose another with runs=….")
    return ok(name, f"{path} can be written here")


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.resolve().parents) if parent.exists())


def _shared(*paths: Path) -> Check:
    """Whether compute nodes see these folders too, as far as their mounts show."""
    kinds = {path: file_system(_existing(path)) for path in paths}
    local = [f"{path} on {kind}" for path, kind in kinds.items() if kind in _LOCAL]
    if local:
        return warning(
            SHARED,
            f"compute nodes may not see {', '.join(local)}",
            "Move them to a file system that the nodes share, or make sure with --probe that they see them.",
        )
    return ok(SHARED, ", ".join(f"{path} on {kind}" for path, kind in kinds.items()))


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``, as the kernel names it: ``nfs4``, ``lustre``, ``ext4``, …"""
    target, best, kind = str(path.resolve()), "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # blanks are written \040
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def _store(name: str, path: str, data: DataConfig) -> Check:
    if data.source is not None and not (Path(path) / "manifest.json").exists():
        return ok(name, f"{path} is not there yet; the stage prepare packs it from {data.source}")
    try:
        store = ImageStore.open(Path(path))
    except (OSError, ValueError) as error:
        return problem(name, str(error), "Look closer with `python -m paws_hpc.shards verify`.")
    with store:
        return ok(name, f"{path}: {len(store):,} images of {len(store.classes):,} classes")


def _versions() -> Check:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    cuda = torch.version.cuda or "none"
    return ok("packages", f"torch {torch.__version__}, CUDA {cuda}, NCCL {nccl}, as installed here")
