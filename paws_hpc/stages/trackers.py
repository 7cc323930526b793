"""The trackers of one stage, and the config without secrets, accounts and folders, as trackers publish it."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paws_hpc import distributed
from paws_hpc.config import Config
from paws_hpc.engine.console import ProgressTracker
from paws_hpc.engine.event_file import TensorboardTracker
from paws_hpc.engine.tracking import MetricsFile, Tracker, Trackers
from paws_hpc.engine.wandb_run import WandbTracker
from paws_hpc.sizes import SECRET
from paws_hpc.stages.catalogue import catalogue
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.trial import Trial

_MACHINE = ("nodes", "tasks_per_node", "threads_per_rank", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
_HOME = re.compile(r"/(?:home|Users)/[^/\s:;,'\"]+")  # of other users
_WORD = re.compile(r"(?!file:)\w+://[^\s'\",;]*|[^\s'\",;:=()<>|\[\]]+")  # a URL, or what may be a path


def open_trackers(
    config: Config,
    run: RunFolder,
    folder: Path,
    *,
    job: str,
    start: int,
    total_steps: int,
    awaits_validation: bool,
    used: dict[str, str] | None = None,
    made: Path | None = None,
) -> Tracker:
    """``metrics.jsonl`` and progress always, Weights & Biases unless disabled, TensorBoard if the config says so.

    On ranks other than 0 nothing is written. ``start`` steps are done already, and ``awaits_validation`` says whether
    they end with a validation that is still to be done; ``used`` is the :func:`network` that the stage begins with,
    ``made`` the file of weights that is there when it has ended well.
    """
    if not distributed.is_main():
        return Tracker()
    metrics = folder / "metrics.jsonl"
    trackers: list[Tracker] = [MetricsFile(metrics, resume_step=start, awaits_validation=awaits_validation)]
    if config.tracking.tensorboard:
        trackers.append(TensorboardTracker(folder / "tensorboard", metrics=metrics))
    if is_watched(config):
        trackers.append(watch(config, run, folder, job=job, used=used, made=made))
    trackers.append(ProgressTracker(job, total_steps=total_steps, start=start))  # last: it takes the terminal
    return Trackers(*trackers)


def is_watched(config: Config) -> bool:
    """Whether Weights & Biases shows this run, online or offline."""
    mode = config.tracking.wandb
    return (os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode) != "disabled"


def watch(
    config: Config, run: RunFolder, folder: Path, *, job: str, used: dict[str, str] | None, made: Path | None = None
) -> WandbTracker:
    """Show the ``metrics.jsonl`` in a stage's folder in Weights & Biases, as a run of the chain's group."""
    stage, _, trial = job.partition("/")
    own: dict[str, Any] = {"chain": run.describe().get("id")}
    if used is not None:
        own["lineage"] = used
    if trial:
        own["trial"] = dict(Trial.parse(trial).values)  # else only the whole sweep is in the config
    spec = {
        "run": {
            "project": config.tracking.project,
            "entity": config.tracking.entity,
            "id": run_id(run, job),  # stable across restarts, so that a requeued job continues its run
            "name": f"{config.name}/{job}",
            "group": config.name,
            "job_type": stage,
            "tags": [config.data.name, *(config.tracking.tags or [])],
            "config": settings(config) | own,
        },
        "best": {metric.pattern: metric.best for metric in catalogue().values()},
        "used": used,
        "made": made and {"name": f"network-{run_id(run, job)}", "path": made.relative_to(folder).as_posix()},
    }
    return WandbTracker(folder, spec, mode=config.tracking.wandb)


def run_id(run: RunFolder, job: str) -> str:
    """The W&B id of a job's run: the chain's, which the launcher drew, and the job's name."""
    return f"{run.describe().get('id')}-{job}".translate(str.maketrans("/=,.", "----"))


def network(run: RunFolder, job: str, file: str, checksum: str) -> dict[str, str]:
    """Describe a file of weights that a job made, for W&B's lineage; ``checksum`` is its ``file_hash``."""
    return {"name": f"network-{run_id(run, job)}", "file": file, "checksum": checksum}


def settings(config: Config) -> dict[str, Any]:
    """The config as others may see it: without secrets, accounts and the folders that paths lead through."""
    fields = asdict(config)
    del fields["runs"]
    shapes = {stage: {name: shape[name] for name in _MACHINE} for stage, shape in fields["resources"].items()}
    shown: dict[str, Any] = _public(fields | {"resources": shapes})
    return shown


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return _without_folders(value) if isinstance(value, str) else value


def _without_folders(text: str) -> str:
    """Text in which of every path that leads through folders of this machine only the last name is left."""
    home = os.path.expanduser("~")
    homes = _HOME if home == "/" else re.compile(rf"{re.escape(home)}(?![\w.-])|{_HOME.pattern}")
    text = homes.sub("/~", text)
    if Path(text).is_absolute():  # as a whole, so that it may have spaces
        return _last_name(text)
    return _WORD.sub(lambda word: _last_name(word[0]), text)


def _last_name(path: str) -> str:
    """``…/name`` of a path that leads out of the folder where a run was started; anything else as it is."""
    leads_out = path.startswith(("/", "~", "$")) or ".." in Path(path).parts
    return f"…/{Path(path).name}" if leads_out and path.strip("/") else path
