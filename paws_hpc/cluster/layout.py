"""The jobs that a run consists of, as its folder tells: from the frozen config, ``chain.json`` and the attempts.

The launcher knows this from the typed config; here it is read as plain values, so that runs of other versions can be
looked at too.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from paws_hpc.files import read_json
from paws_hpc.stage_table import DEFAULT_STAGES, STAGES, SWEEPS
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.trial import Trial, trials


@dataclass(frozen=True)
class JobLayout:
    """A job of a run.

    Attributes:
        name: ``pretrain``, ``finetune/lr=0.05,epochs=30``, …
        stage: that it belongs to.
        job_id: under which it was submitted last; None without Slurm.
        partition: it was submitted to, if that is known.
        notice_s: between Slurm's signal and its time limit, if that is known.
        was_done: its result is there.
        is_done: and was made since the last submission.
        epochs: that the config asks for, of a job that trains.
        batch_size: images per step, of a job that trains.
    """

    name: str
    stage: str
    job_id: str | None
    partition: str | None
    notice_s: float | None
    was_done: bool
    is_done: bool
    epochs: int | None
    batch_size: int | None

    @property
    def trains(self) -> bool:
        """Whether it has steps."""
        return self.stage in STAGES and STAGES[self.stage].trains


@dataclass(frozen=True)
class Layout:
    """A run, and what of its files could not be understood."""

    path: Path
    name: str
    created: str | None
    cancelled: str | None
    jobs: list[JobLayout]
    warnings: list[str]


def read_layout(path: Path) -> Layout:
    """Read what a run consists of; whatever its folder holds, this does not raise."""
    warnings: list[str] = []
    chain, config = _chain(path / "chain.json", warnings), _config(path / "config.yaml", warnings)
    submitted = {
        str(job["job"]): (job, str(submission.get("time", "")))
        for submission in chain.get("submissions", [])
        for job in submission.get("jobs", [])
        if isinstance(job, dict) and "job" in job
    }
    stages = config.get("stages") or DEFAULT_STAGES
    names = [name for stage in STAGES if stage in stages for name in _names(config, stage)]
    names += sorted((submitted.keys() | _begun(path)) - set(names))
    names.sort(key=lambda name: _rank(name.partition("/")[0]))  # stable: trials keep the config's order
    return Layout(
        path=path,
        name=str(chain.get("name") or path.resolve().name),
        created=chain.get("created"),
        cancelled=chain.get("cancelled"),
        jobs=[_job(path, name, config, *submitted.get(name, ({}, ""))) for name in names],
        warnings=warnings,
    )


def _names(config: dict[str, Any], stage: str) -> list[str]:
    if stage not in SWEEPS:
        return [stage]
    try:
        return [f"{stage}/{trial.name}" for trial in trials(config[stage]["sweep"])]
    except (KeyError, TypeError, AttributeError, ValueError):  # a config of an older version, or a damaged one
        return []


def _job(path: Path, name: str, config: dict[str, Any], submitted: dict[str, Any], when: str) -> JobLayout:
    stage = name.partition("/")[0]
    made = _made(path, name)
    section = config.get(stage)
    section = section if isinstance(section, dict) else {}
    if stage in SWEEPS:
        section = section | _values(name)
    return JobLayout(
        name=name,
        stage=stage,
        job_id=submitted.get("job_id"),
        partition=submitted.get("partition"),
        notice_s=submitted.get("notice_s"),
        was_done=made is not None,
        is_done=made is not None and made >= _posix(when),
        epochs=epochs if isinstance(epochs := section.get("epochs"), int) else None,
        batch_size=section.get("batch_size"),
    )


def _values(name: str) -> dict[str, float]:
    try:
        return dict(Trial.parse(name.partition("/")[2]).values)
    except ValueError:  # a folder that somebody else made
        return {}


def _made(path: Path, name: str) -> float | None:
    """When the result of a job was made, as a POSIX time; None if it is not there."""
    try:
        return RunFolder(path).marker(name).stat().st_mtime
    except FileNotFoundError:
        return None


def _posix(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _rank(stage: str) -> int:
    return list(STAGES).index(stage) if stage in STAGES else len(STAGES)


def _begun(path: Path) -> set[str]:
    """Names of the jobs that were ever started."""
    folder = path / "jobs"
    return {attempt.parent.relative_to(folder).as_posix() for attempt in folder.glob("**/start-*.json")}


def _chain(path: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.append(str(error))
        return {}
    return value if isinstance(value, dict) else {}


def _config(path: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        value = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        warnings.append(f"{path} cannot be read: {error}")
        return {}
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}
