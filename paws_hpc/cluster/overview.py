"""The state of runs and of their jobs, put together from the run directory and from Slurm.

Config and ``chain.json`` are read as plain values, so that runs of other versions can be shown too, and a half-written
or damaged file makes a note, not an error. Nothing here writes or imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paws_hpc.cluster import scheduler, traces
from paws_hpc.cluster.inventory import Partition, notice_s, partitions, settings
from paws_hpc.cluster.scheduler import AccountedJob, QueuedJob, SchedulerError
from paws_hpc.cluster.traces import JobProgress
from paws_hpc.command import program
from paws_hpc.files import read_json, read_yaml
from paws_hpc.stage_table import DEFAULT_STAGES, STAGES, SWEEPS
from paws_hpc.stages.attempts import Attempt, first_failure, log_of, read_attempts
from paws_hpc.stages.run_folder import RunFolder, original_of
from paws_hpc.trial import Trial, trials

_SILENT_S = 60.0  # six heartbeats
_STUCK_S = 900.0
_LOG_LINES = 12
_REPEATS = 3  # attempts in a row from the same step
_HEADLINES = ("fine_tuned", "paws_nn", "baseline")
_FORGOTTEN = "Slurm no longer knows it"
_HINTS = {
    "DependencyNeverSatisfied": "a job that it waits for failed",
    "JobHeldUser": "it is held, until the launcher or `scontrol release` lets it go",
    "BeginTime": "Slurm lets a job that was queued again wait for about two minutes",
}
_OF_SLURM = {  # Slurm's state → ours; any other is running
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"), "waiting"),
    **dict.fromkeys(scheduler.FAILED, "failed"),
    "CANCELLED": "cancelled",
    "COMPLETED": "ended",
}
_OF_ATTEMPT = {"done": "ended", "requeued": "waiting", "crashed": "failed"}  # how one ended → state; else the same word


@dataclass(frozen=True)
class JobOverview:
    """One job of a run.

    Attributes:
        job: ``pretrain``, ``finetune/lr=0.05,epochs=30``, …
        state: ``done``, ``running``, ``waiting`` (in the queue), ``silent`` (no heartbeat, and Slurm does not say),
            ``failed``, ``cancelled``, ``interrupted``, ``submitted`` (nothing known since), ``lost`` (Slurm no longer
            knows it, and it never said how it ended) or ``not started``.
        reason: in Slurm's words or the job's own; may be empty.
        source: of the state: ``marker``, ``squeue``, ``sacct``, ``attempts`` (its own files) or ``chain`` (nothing but
            the submission is known).
        job_id: under which it was submitted last; None without Slurm.
        restarts: attempts after the first, over all submissions.
        nodes: it runs on, as Slurm abbreviates them.
        seconds: that its attempts ran in all.
        silent_s: since the last heartbeat of an attempt that has not ended.
        failure: of the rank that failed first (``rank``, ``type``, ``message``, ``permanent``, ``host``, ``time``).
        log: of that rank; ``log_tail`` are its last lines.
    """

    job: str
    stage: str
    state: str
    reason: str
    source: str
    job_id: str | None
    restarts: int
    nodes: str
    seconds: float
    silent_s: float | None
    progress: JobProgress | None
    failure: dict[str, Any] | None
    log: str | None
    log_tail: list[str]
    notes: list[str]


@dataclass(frozen=True)
class RunOverview:
    """A run: its jobs in the order of the chain, and what its files and Slurm have trouble with.

    ``state`` is as of a job, or ``unfinished``; ``unknown`` if the files cannot be understood, as a warning says.

    ``copy_of`` is the name of the run whose folder this one is a copy of; None of a run that was launched here.
    ``top1`` is on the test split (a fraction): of the fine-tuned network, else of PAWS-NN, else of the baseline.
    """

    name: str
    copy_of: str | None
    path: str
    state: str
    created: str | None
    cancelled: str | None
    top1: float | None
    jobs: list[JobOverview]
    warnings: list[str]
    trouble: str | None

    @property
    def current(self) -> JobOverview | None:
        """The first job of the run's own state, else the last that is done; None if the run is over, or not begun."""
        if self.state in ("done", "not started"):
            return None
        done = (job for job in reversed(self.jobs) if job.state == "done")
        return next((job for job in self.jobs if job.state == self.state), next(done, None))

    def to_json(self) -> dict[str, Any]:
        """The object that ``status --json`` prints: all fields, with ``seconds_left`` in each progress."""
        value = asdict(self)
        for job, written in zip(self.jobs, value["jobs"], strict=True):
            if job.progress is not None:
                written["progress"]["seconds_left"] = job.progress.seconds_left
        return {"format": 1, "time": datetime.now(UTC).isoformat(timespec="seconds")} | value


@dataclass
class _Slurm:
    """Jobs that the controller and the accounting know, and why one of them cannot be reached."""

    queue: dict[str, QueuedJob] = field(default_factory=dict)
    accounts: dict[str, AccountedJob] = field(default_factory=dict)
    partitions: dict[str, Partition] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    trouble: str | None = None


def overviews(paths: Sequence[Path], *, details: bool = False) -> list[RunOverview]:
    """Look at several run directories, querying Slurm once; ``details`` adds warnings about the time to save."""
    runs, slurm = [_RunFiles(path) for path in paths], _Slurm()
    ids = set().union(*(run.unfinished_ids for run in runs))
    try:
        for owner in sorted({run.path.stat().st_uid for run in runs if run.unfinished_ids}):
            slurm.queue |= scheduler.queue(str(owner))
        if ids and details:
            slurm.partitions, slurm.settings = partitions(), settings()
        if forgotten := ids - slurm.queue.keys():
            slurm.accounts = scheduler.accounting(forgotten) or {}
    except SchedulerError as error:
        slurm.trouble = str(error)
    return [_overview(run, slurm) for run in runs]


class _RunFiles:
    """The config and ``chain.json`` of a run as plain values; whatever its folder holds, this does not raise."""

    def __init__(self, path: Path) -> None:
        self.path, self.warnings = path, list[str]()
        self.chain = self._mapping("chain.json")
        self.config = self._mapping("config.yaml")
        self.result = self._mapping("result.json")
        named = str(self.chain.get("name") or path.resolve().name)
        original, has_other_name = original_of(path, self.chain), named not in (path.name, path.resolve().name)
        self.copy_of = named if has_other_name or original is not None else None
        if self.copy_of is not None:
            self.chain = {"created": self.chain.get("created")}  # the jobs are the original's
            which = named if has_other_name else original
            self.warnings.append(
                f"this is a copy of {which}, or was renamed by hand: `{program('runs')} rename` makes it a run"
            )
        self.submitted: dict[str, dict[str, Any]] = {  # job → what its last submission says
            str(job["job"]): job | {"time": submission.get("time")}
            for submission in _objects(self.chain.get("submissions"))
            for job in _objects(submission.get("jobs"))
            if "job" in job
        }
        listed = self.config.get("stages")
        stages = listed if isinstance(listed, list) and listed else DEFAULT_STAGES
        names = [name for stage in STAGES if stage in stages for name in self._jobs_of(stage)]
        begun = {file.parent.relative_to(path / "jobs").as_posix() for file in (path / "jobs").glob("**/start-*.json")}
        order = {stage: number for number, stage in enumerate(STAGES)}
        self.names = sorted(  # stable: trials keep the config's order
            [*names, *sorted((self.submitted.keys() | begun) - set(names))],
            key=lambda name: order.get(name.partition("/")[0], len(order)),
        )
        ids = {job: str(facts["job_id"]) for job, facts in self.submitted.items() if facts.get("job_id")}
        self.unfinished_ids = {job_id for job, job_id in ids.items() if self.marker_state(job) != "done"}

    def _mapping(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.warnings.append(str(error) if name in str(error) else f"{path} cannot be read: {error}")
            return {}
        return value if isinstance(value, dict) else {}

    def _jobs_of(self, stage: str) -> list[str]:
        if stage not in SWEEPS:
            return [stage]
        try:
            return [f"{stage}/{trial.name}" for trial in trials(self.config[stage]["sweep"])]
        except (KeyError, TypeError, AttributeError, ValueError):  # a config of an older version, or a damaged one
            return []

    def marker_state(self, job: str) -> str:
        """``done``, ``stale`` if its result is from before its last submission, or ``absent``."""
        try:
            made = RunFolder(self.path).marker(job).stat().st_mtime
        except FileNotFoundError:
            return "absent"
        submitted = 0.0
        with suppress(ValueError):
            submitted = datetime.fromisoformat(str(self.submitted.get(job, {}).get("time"))).timestamp()
        return "done" if made >= submitted else "stale"

    def progress(self, job: str) -> JobProgress | None:
        """Of a job that trains."""
        stage, _, trial = job.partition("/")
        if stage not in STAGES or not STAGES[stage].trains:
            return None
        section = self.config.get(stage)
        section = section if isinstance(section, dict) else {}
        if stage in SWEEPS:
            with suppress(ValueError):  # a folder that is no trial's
                section = section | dict(Trial.parse(trial).values)
        sizes = {name: size for name in ("epochs", "batch_size") if isinstance(size := section.get(name), int)}
        folder = self.path / job
        if not (folder / "metrics.jsonl").exists():  # the folds of its cross-validation come first
            folder = max(folder.glob("fold-*"), default=folder)
        return traces.read_progress(folder, **sizes)


def _objects(value: object) -> list[dict[str, Any]]:
    """The objects of a JSON list; whatever else stands there is passed over."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _top1(result: Mapping[str, Any]) -> float | None:
    """The accuracy that heads a ``result.json``; None if there is none, or it is no number."""
    test = result.get("test")
    scores = [test[method] for method in _HEADLINES if method in test] if isinstance(test, dict) else []
    top1 = scores[0].get("top1") if scores and isinstance(scores[0], dict) else None
    return top1 if isinstance(top1, int | float) and not isinstance(top1, bool) else None


def _overview(run: _RunFiles, slurm: _Slurm) -> RunOverview:
    """The state of one run; ``unknown``, with a warning, if its files hold values of other kinds than we write."""
    try:
        return _looked_at(run, slurm)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"its files cannot be understood: {type(error).__name__}: {error}"
        name, warnings = run.path.resolve().name, [*run.warnings, fault]
        return RunOverview(name, run.copy_of, str(run.path), "unknown", None, None, None, [], warnings, None)


def _looked_at(run: _RunFiles, slurm: _Slurm) -> RunOverview:
    jobs, warnings = [_job(run, name, slurm) for name in run.names], list(run.warnings)
    default = next((partition for partition in slurm.partitions.values() if partition.default), None)
    for job in jobs:
        if job.progress is not None and job.state in ("running", "waiting"):
            facts = run.submitted.get(job.job, {})
            partition = slurm.partitions.get(facts["partition"]) if facts.get("partition") else default
            warnings += grace_warnings(job.job, job.progress, partition, slurm.settings, facts.get("notice_s"))
    cancelled = run.chain.get("cancelled")
    return RunOverview(
        name=str(run.chain.get("name") or run.path.resolve().name),
        copy_of=run.copy_of,
        path=str(run.path),
        state=_state_of_run({job.state for job in jobs}, cancelled=cancelled is not None),
        created=run.chain.get("created"),
        cancelled=cancelled,
        top1=_top1(run.result),
        jobs=jobs,
        warnings=warnings,
        trouble=slurm.trouble if run.unfinished_ids else None,
    )


def _state_of_run(states: set[str], *, cancelled: bool) -> str:
    if states == {"done"}:
        return "done"
    if cancelled and not states & {"running", "silent"}:
        return "cancelled"
    order = ("running", "silent", "waiting", "submitted", "failed", "lost", "cancelled", "interrupted")
    return next((state for state in order if state in states), "unfinished" if "done" in states else "not started")


def _job(run: _RunFiles, name: str, slurm: _Slurm) -> JobOverview:
    attempts, notes = list[Attempt](), list[str]()
    try:
        attempts = read_attempts(run.path / "jobs" / name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        notes.append(f"its attempts cannot be read: {error}")
    last = attempts[-1] if attempts else None
    silent_s = None
    if last is not None and last.end is None and run.copy_of is not None:
        last = replace(last, end={"how": "interrupted", "message": "copied while it ran"})
    elif last is not None and last.end is None:
        seen = last.beat["time"] if last.beat is not None else last.began
        silent_s = max((datetime.now(UTC) - datetime.fromisoformat(seen)).total_seconds(), 0.0)
    stage, job_id, progress = name.partition("/")[0], run.submitted.get(name, {}).get("job_id"), run.progress(name)
    state, reason, source = _state(run.marker_state(name), job_id, last, silent_s, slurm)
    queued = slurm.queue.get(job_id or "")
    unlucky = state in ("failed", "interrupted", "lost", "silent")
    failure = first_failure(last) if last is not None and unlucky else None
    log = log_of(run.path / "logs" / stage, job_id, failure["rank"] if failure else 0) if unlucky else None
    return JobOverview(
        job=name,
        stage=stage,
        state=state,
        reason=reason,
        source=source,
        job_id=job_id,
        restarts=max(len(attempts) - 1, (queued.restarts or 0) if queued else 0),
        nodes=queued.nodes if queued else "",
        seconds=sum(attempt.seconds for attempt in attempts),
        silent_s=silent_s,
        progress=progress,
        failure=failure,
        log=str(log) if log else None,
        log_tail=traces.last_lines(log, _LOG_LINES) if log else [],
        notes=[*notes, *_notes(state, reason, attempts, silent_s, progress)],
    )


def _state(
    marker: str, job_id: str | None, last: Attempt | None, silent_s: float | None, slurm: _Slurm
) -> tuple[str, str, str]:
    """State, reason and source: by the marker first, then as Slurm says, then as the job wrote itself."""
    if marker == "done":
        return "done", "", "marker"
    queued, accounted = slurm.queue.get(job_id or ""), slurm.accounts.get(job_id or "")
    if queued is not None:
        (state, reason), source = _of_slurm(queued.state, queued.reason), "squeue"
    elif accounted is not None:
        (state, reason), source = _of_slurm(accounted.state, f"exit code {accounted.exit_code}"), "sacct"
    else:
        forgotten = job_id is not None and not slurm.trouble  # by a Slurm that answers
        state, reason, source = _of_attempts(job_id, last, silent_s, forgotten=forgotten)
    if state in ("ended", "lost") and marker == "stale":  # the last submission found nothing to do
        return "done", "", "marker"
    return ("failed", "ended without finishing", source) if state == "ended" else (state, reason, source)


def _of_slurm(word: str, reason: str) -> tuple[str, str]:
    state = _OF_SLURM.get(word, "running")
    if state == "failed":
        reason = word if reason in ("", "None", "NonZeroExitCode") else f"{word} ({reason})"
    elif state == "cancelled":
        reason = reason if reason.startswith("Dependency") else ""
    elif state != "waiting":
        reason = "" if word in ("RUNNING", "COMPLETED") else word
    return state, reason


def _of_attempts(
    job_id: str | None, last: Attempt | None, silent_s: float | None, *, forgotten: bool
) -> tuple[str, str, str]:
    if last is None or (job_id is not None and last.job_id != job_id):
        if job_id is None:
            return "not started", "", "attempts"
        return ("lost", _FORGOTTEN, "chain") if forgotten else ("submitted", "", "chain")
    state, reason = "running", ""
    if last.end is not None:
        how = str(last.end.get("how"))
        state, reason = _OF_ATTEMPT.get(how, how), str(last.end.get("message") or "")
    elif silent_s is not None and silent_s > _SILENT_S:
        state, reason = "silent", f"silent for {span(silent_s)}"
    if forgotten and state in ("running", "silent", "waiting"):
        state, reason = "lost", _FORGOTTEN
    return state, reason, "attempts"


def _notes(
    state: str, reason: str, attempts: Sequence[Attempt], silent_s: float | None, progress: JobProgress | None
) -> Iterator[str]:
    if reason in _HINTS:
        yield f"{reason}: {_HINTS[reason]}"
    if state == "running" and silent_s is not None and silent_s > _SILENT_S:
        yield f"silent for {span(silent_s)}: Slurm says that it runs, but its heartbeat stopped"
    if state == "running" and not attempts:
        yield "starting: Python has not begun yet"
    if state == "running" and attempts and progress is not None:
        since = max(progress.changed or 0.0, datetime.fromisoformat(attempts[-1].began).timestamp())
        if time.time() - since > _STUCK_S:
            yield f"no new metrics for {span(time.time() - since)}"
    steps = [attempt.progress for attempt in attempts]
    repeated = next((i for i, step in enumerate(reversed(steps)) if step != steps[-1]), len(steps))
    if progress is not None and state != "done" and repeated >= _REPEATS and progress.saved_step <= steps[-1]:
        yield f"does not advance: the last {repeated} attempts all began at step {steps[-1]}"
    over = attempts[:-1] if state == "running" else attempts if state == "waiting" else []
    crashes = [attempt for attempt in over if attempt.end and attempt.end.get("how") in ("failed", "crashed")]
    if crashes:
        failure = first_failure(crashes[-1]) or crashes[-1].end or {}
        kind = f"{failure['type']}: " if "type" in failure else ""
        yield f"attempt {crashes[-1].number} of {len(attempts)} crashed: {kind}{failure.get('message')}"


def grace_warnings(
    job: str, progress: JobProgress, partition: Partition | None, site: Mapping[str, str], signal_delay_s: float | None
) -> list[str]:
    """Warnings for a user whose job cannot save in time; empty if it can, or if nothing was measured yet.

    ``site`` are the cluster's settings; partition and signal_delay_s (before the time limit) are None if unknown.
    """
    save_s, step_s, warnings = progress.save_s, progress.step_s or 0.0, []
    if save_s is None:
        return []
    needed = 2 * save_s + step_s
    needs = (
        f"{job} may need {needed:.1f} s to save (a step {step_s:.1f} s, a checkpoint {save_s:.1f} s, and as "
        "long for the one before it)"
    )
    mode = partition.preempt_mode.upper() if partition is not None else "OFF"
    preempts = site.get("PreemptType") == "preempt/partition_prio" and ("REQUEUE" in mode or "CANCEL" in mode)
    if partition is not None and preempts and (notice := notice_s(partition.grace_s, site)) < needed:
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


def span(seconds: float) -> str:
    """A length of time for people: ``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 04 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"
