"""The state of runs and of their jobs, put together from the run directory and from Slurm.

What is known comes from four places, and every job says from which: the markers of finished stages; Slurm's queue, and
its accounting where there is one, for jobs of the last submission; and the attempts, heartbeats and ends that jobs
write themselves, which is all there is for a run without Slurm or when Slurm cannot be asked. Nothing here writes, and
a half-written or damaged file makes a note, not an error. Nothing here imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paws_hpc.cluster import traces
from paws_hpc.cluster.inventory import Partition, grace_warnings
from paws_hpc.cluster.layout import JobLayout, Layout, read_layout
from paws_hpc.cluster.states import SILENT_S, Slurm, ask_slurm, silence, span, state_of
from paws_hpc.cluster.traces import Progress
from paws_hpc.stages.attempts import Attempt, read_attempts

_STUCK_S = 900.0
_LOG_LINES = 12
_TIMELESS = 3  # attempts in a row from the same step

_HINTS = {
    "DependencyNeverSatisfied": "a job that it waits for failed",
    "JobHeldUser": "it is held, until the launcher or `scontrol release` lets it go",
    "BeginTime": "Slurm lets a job that was queued again wait for about two minutes",
}


@dataclass(frozen=True)
class JobOverview:
    """One job of a run.

    Attributes:
        job: ``pretrain``, ``finetune/lr=0.05,epochs=30``, …
        stage: that it belongs to.
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
        progress: of a training job.
        failure: of the rank that failed first (``rank``, ``type``, ``message``, ``permanent``, ``host``, ``time``).
        log: of that rank.
        log_tail: its last lines.
        notes: what else a user should know of it.
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
    progress: Progress | None
    failure: dict[str, Any] | None
    log: str | None
    log_tail: list[str]
    notes: list[str]


@dataclass(frozen=True)
class RunOverview:
    """A run: its jobs in the order of the chain, and what its files and Slurm have trouble with."""

    name: str
    path: str
    state: str
    created: str | None
    cancelled: str | None
    jobs: list[JobOverview]
    warnings: list[str]
    trouble: str | None

    @property
    def current(self) -> JobOverview | None:
        """The job to look at: one that runs, else that failed, else that waits, else the last that is done."""
        for state in ("running", "silent", "failed", "lost", "waiting", "submitted", "interrupted", "cancelled"):
            for job in self.jobs:
                if job.state == state:
                    return job
        return next((job for job in reversed(self.jobs) if job.state == "done"), None)

    def to_json(self) -> dict[str, Any]:
        """The object that ``status --json`` prints: all fields, with ``seconds_left`` in each progress."""
        value = asdict(self)
        for job, written in zip(self.jobs, value["jobs"], strict=True):
            if job.progress is not None:
                written["progress"]["seconds_left"] = job.progress.seconds_left
        return {"format": 1, "time": datetime.now(UTC).isoformat(timespec="seconds")} | value


def overviews(paths: Sequence[Path], *, details: bool = False) -> list[RunOverview]:
    """Look at several runs, asking Slurm once.

    Args:
        paths: of run directories.
        details: also ask for the cluster's settings, for warnings about the time that is left to save.
    """
    layouts = [read_layout(path) for path in paths]
    wanted = {run.path: [job for job in run.jobs if job.job_id and not job.is_done] for run in layouts}
    ids = {job.job_id for jobs in wanted.values() for job in jobs if job.job_id}
    owners = {run.path.stat().st_uid for run in layouts if wanted[run.path]}
    slurm = ask_slurm(ids, owners, details=details)
    return [_run(run, slurm) for run in layouts]


def _run(run: Layout, slurm: Slurm) -> RunOverview:
    jobs = [_job(run, job, slurm) for job in run.jobs]
    warnings = [*run.warnings]
    for asked, job in zip(run.jobs, jobs, strict=True):
        if job.progress is not None and job.state in ("running", "waiting"):
            warnings += grace_warnings(
                job.job,
                save_s=job.progress.save_s,
                step_s=job.progress.step_s,
                partition=_partition(asked, slurm),
                settings=slurm.settings,
                signal_delay_s=asked.notice_s,
            )
    return RunOverview(
        name=run.name,
        path=str(run.path),
        state=_state_of_run(run, jobs),
        created=run.created,
        cancelled=run.cancelled,
        jobs=jobs,
        warnings=warnings,
        trouble=slurm.trouble if any(job.job_id and not job.is_done for job in run.jobs) else None,
    )


def _state_of_run(run: Layout, jobs: list[JobOverview]) -> str:
    states = {job.state for job in jobs}
    if states == {"done"}:
        return "done"
    for state in ("running", "silent"):
        if state in states:
            return state
    if run.cancelled:
        return "cancelled"
    for state in ("waiting", "submitted", "failed", "lost", "cancelled", "interrupted"):
        if state in states:
            return state
    return "unfinished" if "done" in states else "not started"


def _job(run: Layout, job: JobLayout, slurm: Slurm) -> JobOverview:
    notes: list[str] = []
    try:
        attempts = read_attempts(run.path / "jobs" / job.name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        attempts = []
        notes.append(f"its attempts cannot be read: {error}")
    last = attempts[-1] if attempts else None
    silent_s = silence(last)
    state, reason, source = state_of(job, last, silent_s, slurm)
    queued = slurm.queue.get(job.job_id or "")
    progress = None
    if job.trains:
        progress = traces.read_progress(run.path / job.name, epochs=job.epochs, batch_size=job.batch_size)
    failure = traces.first_failure(last) if last is not None else None
    unlucky = state in ("failed", "interrupted", "lost", "silent")
    log = traces.log_of(run.path / "logs" / job.stage, job.job_id, failure["rank"] if failure else 0)
    log = log if unlucky else None
    notes += _notes(state, reason, attempts, silent_s, progress)
    return JobOverview(
        job=job.name,
        stage=job.stage,
        state=state,
        reason=reason,
        source=source,
        job_id=job.job_id,
        restarts=max(len(attempts) - 1, (queued.restarts or 0) if queued else 0),
        nodes=queued.nodes if queued else "",
        seconds=sum(attempt.seconds for attempt in attempts),
        silent_s=silent_s,
        progress=progress,
        failure=failure if unlucky else None,
        log=str(log) if log else None,
        log_tail=traces.last_lines(log, _LOG_LINES) if log else [],
        notes=notes,
    )


def _partition(job: JobLayout, slurm: Slurm) -> Partition | None:
    """To which a job was submitted."""
    if job.partition is not None:
        return slurm.partitions.get(job.partition)
    return next((partition for partition in slurm.partitions.values() if partition.default), None)


def _notes(
    state: str, reason: str, attempts: list[Attempt], silent_s: float | None, progress: Progress | None
) -> list[str]:
    notes = [f"{reason}: {_HINTS[reason]}"] if reason in _HINTS else []
    if state == "running" and silent_s is not None and silent_s > SILENT_S:
        notes.append(f"silent for {span(silent_s)}: Slurm says that it runs, but its heartbeat stopped")
    if state == "running" and not attempts:
        notes.append("starting: Python has not begun yet")
    if state == "running" and attempts and progress is not None:
        since = max(progress.changed or 0.0, datetime.fromisoformat(attempts[-1].began).timestamp())
        if time.time() - since > _STUCK_S:
            notes.append(f"no new metrics for {span(time.time() - since)}")
    came = [attempt.holder.progress for attempt in attempts]
    repeated = next((i for i, step in enumerate(reversed(came)) if step != came[-1]), len(came))
    if progress is not None and state != "done" and repeated >= _TIMELESS and progress.saved_step <= came[-1]:
        notes.append(f"does not advance: the last {repeated} attempts all began at step {came[-1]}")
    over = attempts[:-1] if state == "running" else attempts if state == "waiting" else []
    if crashes := [
        attempt for attempt in over if attempt.end is not None and attempt.end.get("how") in ("failed", "crashed")
    ]:
        failure = traces.first_failure(crashes[-1]) or crashes[-1].end or {}
        kind = f"{failure['type']}: " if "type" in failure else ""
        notes.append(f"attempt {crashes[-1].number} of {len(attempts)} crashed: {kind}{failure.get('message')}")
    return notes
