"""Whether a cluster can run a chain: checks before the first submission.

Slurm accepts many jobs that can never start (``EnforcePartLimits=NO`` is its default), so that its ``--test-only`` is
used but not relied on.
"""

from __future__ import annotations

import getpass
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from paws_hpc.cluster.inventory import NodeGroup, Partition, notice_s, partitions, qualities, rights, settings
from paws_hpc.cluster.overview import grace_warnings, span
from paws_hpc.cluster.scheduler import SchedulerError, ask
from paws_hpc.cluster.traces import read_progress
from paws_hpc.command import program
from paws_hpc.config import Config, sweep_config
from paws_hpc.data.config import DataConfig
from paws_hpc.files import try_lock
from paws_hpc.stage_table import STAGES, SWEEPS
from paws_hpc.stages.prepare import check_before_packing, packed_from
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore
from paws_hpc.store.format import MANIFEST_NAME

Parameters = Mapping[str, Any]
"""What submitit.SlurmExecutor.update_parameters takes."""

COMMANDS, CONTROLLER = "Slurm commands", "controller"
Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """What was looked at and found, and what to do about it; a ``problem`` keeps a chain from running."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_IN_SERVICE = ("idle", "mixed", "allocated", "completing", "planned", "reserved")
_SHORT_NOTICE_S = 30.0
_FLAGS = {"timeout_min": "time", "tasks_per_node": "ntasks-per-node", "mem_gb": "mem"}
_NOT_FLAGS = {
    "additional_parameters", "array_parallelism", "name", "setup", "signal_delay_s", "srun_args", "stderr_to_stdout",
    "teardown", "use_srun",
}  # fmt: skip


def preflight_checks(config: Config, stage_parameters: Mapping[str, Parameters], run: RunFolder) -> Iterator[Check]:
    """Look at everything that a submission needs, in the order in which to mend it; nothing is submitted or raised."""
    by_stage = {stage: stage_parameters[stage] for stage in config.stages}
    yield from _slurm(config, by_stage, run)
    yield from _devices(config, by_stage)
    there = next(parent for parent in (run.path, *run.path.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            try_lock(probe)  # which launches need; Lustre may be mounted without
        yield Check("run directory", "ok", f"{run.path} can be written and locked here")
    except OSError as error:
        fault = f"{there} cannot be written or locked: {error.strerror}"
        yield Check("run directory", "problem", fault, "Choose another with runs=….")
    for subset, path in config.data.stores.items():
        yield _store(subset, path, config.data)
    try:
        check_before_packing(config)
    except (OSError, ValueError) as error:
        yield Check("images and labels", "problem", str(error))


def _slurm(config: Config, by_stage: Mapping[str, Parameters], run: RunFolder) -> Iterator[Check]:
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        remedy = "Run this on a login node; maybe `module load slurm`."
        yield Check(COMMANDS, "problem", f"{', '.join(missing)} not on PATH", remedy)
        return
    try:
        site, known = settings(), partitions()
    except SchedulerError as error:
        yield Check(CONTROLLER, "problem", str(error), "Try again later; if it stays, write to the cluster's support.")
        return
    version, name = site.get("SLURM_VERSION", "?"), site.get("ClusterName", "?")
    yield Check(CONTROLLER, "ok", f"Slurm {version}, cluster {name}, {len(known)} partitions")
    for stage, parameters in by_stage.items():
        alike = [other for other in by_stage if by_stage[other] == parameters]
        if stage == alike[0]:  # stages with the same needs are one check
            yield from _shape(f"jobs of {', '.join(alike)}", parameters, known)
    yield from _accounts(by_stage, known, site)
    yield from _preemption(config, by_stage.get("pretrain", {}), known, site, run)
    yield from _sweeps(config, site)


def _shape(title: str, parameters: Parameters, known: Mapping[str, Partition]) -> Iterator[Check]:
    """Whether the partition can ever hold such a job."""
    partition = _partition(parameters, known)
    if partition is None:
        name = parameters.get("partition")
        near = get_close_matches(str(name), known, n=1, cutoff=0.0)
        found = "no default partition" if name is None else f"there is no partition {name}"
        yield Check(title, "problem", found, f"Set hydra.launcher.partition; maybe {near[0]}." if near else "")
        return
    if partition.state != "UP":
        found = f"partition {partition.name} is {partition.state}"
        yield Check(title, "problem", found, "Choose another partition, or wait.")
    limit_s, time_s = partition.max_time_s, 60.0 * float(parameters.get("timeout_min", 0))
    if limit_s is not None and time_s > limit_s:
        yield Check(
            title,
            "problem",
            f"{span(time_s)} is more than partition {partition.name} allows ({span(limit_s)}), so it would never start",
            f"Set hydra.launcher.timeout_min={limit_s / 60:.0f}: a job that trains saves and is queued again.",
        )
    nodes = int(parameters.get("nodes", 1))
    lacking = {group.names: _lacks(parameters, group) for group in partition.groups}
    fitting = [group for group in partition.groups if not lacking[group.names]]
    enough = sum(group.count for group in fitting)
    alive = sum(g.count for g in fitting if g.state.rstrip("*~#!%$@^-+").lower() in _IN_SERVICE)
    if enough < nodes or (partition.max_nodes is not None and nodes > partition.max_nodes):
        why = next((f": {names} has {lack}" for names, lack in lacking.items() if lack), "")
        most = "" if partition.max_nodes is None else f", and a job may have {partition.max_nodes}"
        needs = [f"{int(parameters.get('tasks_per_node', 1)) * int(parameters.get('cpus_per_task', 1))} CPUs"]
        needs += [f"{parameters['gpus_per_node']} GPUs"] if parameters.get("gpus_per_node") else []
        needs += [f"{parameters['mem_gb']:g} GB"] if parameters.get("mem_gb") else []
        yield Check(
            title,
            "problem",
            f"asks for {nodes} nodes with {' and '.join(needs)} each; partition {partition.name} has {enough} such"
            f"{most}{why}",
            "Ask for less with hydra.launcher.* or resources.<stage>.*, or choose another partition.",
        )
        return
    if alive < nodes:
        found = f"only {alive} of {enough} fitting nodes of {partition.name} are in service"
        yield Check(title, "warning", found)
    try:
        ask(["sbatch", "--test-only", *sbatch_flags(parameters), "--wrap", "true"])
    except SchedulerError as error:
        yield Check(title, "problem", str(error), "Change the field that Slurm names.")
        return
    limits = "no time limit" if limit_s is None else f"at most {span(limit_s)}"
    yield Check(title, "ok", f"fit {enough} of {partition.nodes} nodes of partition {partition.name} ({limits})")


def _partition(parameters: Parameters, known: Mapping[str, Partition]) -> Partition | None:
    name = parameters.get("partition")
    if name is None:
        return next((partition for partition in known.values() if partition.default), None)
    return known.get(str(name).partition(",")[0])


def _lacks(parameters: Parameters, group: NodeGroup) -> str:
    """What a node has too little of; empty if it fits."""
    tasks = int(parameters.get("tasks_per_node", 1))
    wanted = {
        "CPUs": (tasks * int(parameters.get("cpus_per_task", 1)), group.cpus),
        "GPUs": (int(parameters.get("gpus_per_node", 0)), group.gpus),
        "MB of memory": (round(1024 * float(parameters.get("mem_gb", 0))), group.memory_mb),
    }
    return ", ".join(f"{has} {unit}" for unit, (need, has) in wanted.items() if need > has)


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


def _accounts(
    by_stage: Mapping[str, Parameters], known: Mapping[str, Partition], site: Mapping[str, str]
) -> Iterator[Check]:
    """Account and quality of service, where the cluster keeps accounts."""
    if not site.get("AccountingStorageType", "").endswith("slurmdbd"):
        yield Check("accounts", "ok", "this cluster keeps none; account and qos are not checked")
        return
    try:
        accounts, qos = rights(getpass.getuser())
    except SchedulerError as error:
        yield Check("accounts", "warning", f"cannot be read: {error}", "Account and qos are not checked.")
        return
    refused: dict[tuple[str, str, str], list[str]] = {}
    for stage, parameters in by_stage.items():
        partition = _partition(parameters, known)
        for field, granted, allowed in (
            ("account", accounts, partition.allowed_accounts if partition else None),
            ("qos", qos, partition.allowed_qos if partition else None),
        ):
            name = parameters.get(field)
            usable = granted if allowed is None else granted & set(allowed)
            if name is not None and name not in usable:
                refused.setdefault((field, str(name), ", ".join(sorted(usable))), []).append(stage)
    for (field, name, names), stages in refused.items():
        title = f"{field} of {', '.join(stages)}"
        yield Check(title, "problem", f"{name} is not yours to use", f"Use one of: {names}.")
    if not refused:
        yours = f"yours: {', '.join(sorted(accounts)) or 'none'}; qos {', '.join(sorted(qos))}"
        yield Check("accounts", "ok", yours)


def _preemption(
    config: Config, parameters: Parameters, known: Mapping[str, Partition], site: Mapping[str, str], run: RunFolder
) -> Iterator[Check]:
    """What happens to jobs of pre-training that must make room, and whether they have the time to save."""
    if (partition := _partition(parameters, known)) is None:
        return
    yield Check("preemption", *_preempted(parameters, partition, site))
    seen = read_progress(run.pretrain, epochs=config.pretrain.epochs, batch_size=config.pretrain.batch_size)
    for text in grace_warnings("pretrain", seen, partition, site, parameters.get("signal_delay_s")):
        yield Check("time to save", "warning", text)


def _preempted(parameters: Parameters, partition: Partition, site: Mapping[str, str]) -> tuple[Verdict, str, str]:
    kind = site.get("PreemptType", "preempt/none")
    mode, grace_s, of = partition.preempt_mode.upper(), partition.grace_s, f"partition {partition.name}"
    if kind == "preempt/qos":
        name = str(parameters.get("qos") or "normal")
        try:
            own_mode, grace_s = qualities()[name]
        except (KeyError, SchedulerError):
            return "warning", f"by qos, but nothing is known of qos {name}", "Write to the cluster's support."
        inherits = own_mode.upper() == "CLUSTER"
        mode, of = (site.get("PreemptMode", "OFF") if inherits else own_mode).upper(), f"qos {name}"
    if kind == "preempt/none" or mode == "OFF":
        return "ok", f"jobs of {of} are not preempted", ""
    another = "choose a partition whose PreemptMode is REQUEUE"
    if "CANCEL" in mode:
        found = f"a preempted job of {of} is cancelled, not queued again"
        return "warning", found, f"Launch again to continue, or {another}."
    if "SUSPEND" in mode:
        found = f"a preempted job of {of} is suspended and keeps its memory, on GPUs too; NCCL may time out"
        return "warning", found, f"If you can, {another}."
    own = "preempt_send_user_signal" in site.get("SlurmctldParameters", "")
    own = own or "send_user_signal" in site.get("PreemptParameters", "")
    notice = notice_s(grace_s, site)
    found = (
        f"a preempted job of {of} gets {'SIGUSR2' if own else 'SIGTERM'} and has {notice:g} s to save (GraceTime "
        f"{grace_s:g} s, KillWait {site.get('KillWait', '?')}), then is queued again"
    )
    if notice < _SHORT_NOTICE_S:
        return "warning", found, "A large model may not save in time: keep pretrain.checkpoint_every_steps low."
    return "ok", found, ""


def _sweeps(config: Config, site: Mapping[str, str]) -> Iterator[Check]:
    most = site.get("MaxArraySize", "")
    for sweep in (stage for stage in SWEEPS if stage in config.stages and most.isdigit()):
        trials = len(sweep_config(config, sweep).trials())
        if trials > int(most):
            found = f"has {trials} trials, but an array may have {most} (MaxArraySize)"
            remedy = f"Shorten the lists of {sweep}.sweep, or split the sweep over runs."
            yield Check(f"sweep {sweep}", "problem", found, remedy)


def _devices(config: Config, by_stage: Mapping[str, Parameters]) -> Iterator[Check]:
    """One GPU per rank, where training is to have GPUs."""
    for stage, parameters in by_stage.items():
        if not STAGES[stage].trains or config.device == "cpu":
            continue
        gpus, tasks = int(parameters.get("gpus_per_node", 0)), int(parameters.get("tasks_per_node", 1))
        fields = f"{stage}: gpus_per_node={gpus}, tasks_per_node={tasks}"
        if gpus == 0 and not any(parameters.get(name) for name in ("gpus_per_task", "gres")):
            verdict: Verdict = "problem" if config.device == "cuda" else "warning"
            yield Check("devices", verdict, f"{fields}, so no GPU", "Set hydra.launcher.gpus_per_node, or device=cpu.")
        elif 0 < gpus < tasks:
            yield Check("devices", "problem", f"{fields}, so some ranks would have no GPU", "Set one GPU per task.")
        elif gpus > tasks:
            idle = f"{fields}, so {gpus - tasks} GPUs per node idle"
            yield Check("devices", "warning", idle, "Set one task per GPU.")
        elif gpus:
            yield Check("devices", "ok", f"{fields}: one GPU per rank")


def _store(subset: str, path: str, data: DataConfig) -> Check:
    name = f"data.{subset}"
    if not (Path(path) / MANIFEST_NAME).exists():
        try:
            source = packed_from(data, subset)
        except FileNotFoundError as error:
            return Check(name, "problem", str(error))
        origin = source.root or source.kind
        return Check(name, "ok", f"{path} is not there yet; the stage prepare packs it from {origin}")
    try:
        store = ImageStore(Path(path))
    except (OSError, ValueError) as error:
        return Check(name, "problem", str(error), f"Look closer with `{program('verify')}`.")
    with store:
        return Check(name, "ok", f"{path}: {len(store):,} images of {len(store.classes):,} classes")
