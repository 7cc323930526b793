"""What each stage asks of Slurm: the launcher's fields, where ``resources.<stage>`` says nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from paws_hpc.config import Config, flatten
from paws_hpc.sizes import check_texts
from paws_hpc.stage_table import STAGES

Launcher = Mapping[str, Any]
"""The fields of ``hydra/launcher=submitit_slurm`` as Hydra composed them."""

PLACE = ("partition", "account", "qos", "constraint", "exclude")
"""Fields that say where a job may run. A stage gives all but the partition in ``additional_parameters``."""

_GPUS = ("gpus_per_node", "gpus_per_task", "gres")
_SHAPE = ("nodes", "tasks_per_node", "gpus_per_node", "gpus_per_task", "gres")
_FIELDS = (
    "timeout_min", "cpus_per_task", "cpus_per_gpu", "mem_gb", "mem_per_gpu", "mem_per_cpu", *PLACE, "comment",
    "signal_delay_s", "array_parallelism",
)  # fmt: skip


def resolve(config: Config, launcher: Launcher) -> Config:
    """Fill what ``resources`` leaves open with the launcher's values, which checks the batch sizes against the ranks.

    Stages of a single task do not take the launcher's nodes, tasks and GPUs: they have one node, one task, and at
    most one GPU.
    """
    fields = {name: value for name, value in launcher.items() if name != "setup"}  # lines of shell, as they are
    check_texts({f"hydra.launcher.{name}": value for name, value in flatten(fields).items()})
    stages = {}
    for stage, row in STAGES.items():
        own = config.resources[stage]
        known = {name.name for name in dataclasses.fields(own)}
        given = {name: value for name, value in launcher.items() if name in known and name != "additional_parameters"}
        if row.one_task:
            gpus = int(row.gpu and any(launcher.get(field) for field in _GPUS))
            given |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": gpus or None}
        filled = {name: value for name, value in given.items() if getattr(own, name) is None}
        extra = {**(launcher.get("additional_parameters") or {}), **own.additional_parameters}
        stages[stage] = dataclasses.replace(own, **filled, additional_parameters=extra)
    return dataclasses.replace(config, resources=stages)


def stage_parameters(config: Config, launcher: Launcher) -> dict[str, dict[str, Any]]:
    """What ``submitit.SlurmExecutor.update_parameters`` is given per stage, for a config of :func:`resolve`."""
    parameters = {}
    for stage, row in STAGES.items():
        resources = config.resources[stage]
        timeout_min, delay_s = resources.timeout_min, launcher.get("signal_delay_s")
        if timeout_min is not None and delay_s is not None and delay_s >= 60 * timeout_min:
            raise ValueError(
                f"hydra.launcher.signal_delay_s={delay_s:g}, but resources.{stage}.timeout_min={timeout_min}: the job "
                "would get its signal to stop before it began, again and again. Ask for more time, or for less notice."
            )
        additional = {name: value for name, value in resources.additional_parameters.items() if value is not None}
        fields = {name: launcher.get(name) for name in (*_FIELDS, *(() if row.one_task else _SHAPE))}
        fields |= dataclasses.asdict(resources)
        fields |= {name: value for name, value in additional.items() if name in PLACE}
        del fields["threads_per_rank"]
        # Since 22.05 srun does not take this from the job, and would give each task one core.
        cpus = [] if fields["cpus_per_task"] is None else [f"--cpus-per-task={fields['cpus_per_task']}"]
        parameters[stage] = {name: value for name, value in fields.items() if value is not None} | {
            "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, **additional},
            # No --wait: ranks that are through must not have rank 0 ended while it still talks to Slurm.
            "srun_args": ["--kill-on-bad-exit=1", "--wait=0", *cpus],
            "setup": [*(launcher.get("setup") or []), *_SETUP],
        }
    return parameters


_SETUP = ["# Signals to the job reach this shell too; it must outlive srun to look after a crash.", "trap : TERM USR2"]
