"""The state of a job: its marker first, then what Slurm says, then what it wrote itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.inventory import Partition, partitions, settings
from paws_hpc.cluster.layout import JobLayout
from paws_hpc.cluster.scheduler import AccountedJob, QueuedJob, SchedulerError, SchedulerUnreachableError
from paws_hpc.stages.attempts import Attempt

SILENT_S = 60.0  # six heartbeats

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
_FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}
_FORGOTTEN = "Slurm no longer knows it"
_HOW = {  # how an attempt ended → state of the job, as far as its own files tell
    "done": "ended",
    "requeued": "waiting",
    "failed": "failed",
    "crashed": "failed",
    "cancelled": "cancelled",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class Slurm:
    """What Slurm said.

    Attributes:
        queue: jobs that the controller knows.
        accounts: jobs that the data base knows.
        trouble: why it could not be asked, or not all of it; None if it could.
        partitions: by name.
        settings: of the cluster.
    """

    queue: dict[str, QueuedJob] = field(default_factory=dict)
    accounts: dict[str, AccountedJob] = field(default_factory=dict)
    trouble: str | None = None
    partitions: dict[str, Partition] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


def ask_slurm(job_ids: Iterable[str], owners: Iterable[int], *, details: bool) -> Slurm:
    """Ask for jobs: the controller first, and the accounting for those that it has forgotten; never raises.

    Args:
        job_ids: those of interest; nothing is asked if there are none.
        owners: user numbers whose queue to read.
        details: also partitions and settings.
    """
    ids, known = set(job_ids), Slurm()
    if not ids:
        return known
    try:
        for owner in sorted(owners):
            known = replace(known, queue=known.queue | scheduler.queue(str(owner)))
        if details:
            known = replace(known, partitions=partitions(), settings=settings())
        if forgotten := ids - known.queue.keys():
            known = replace(known, accounts=scheduler.accounting(forgotten) or {})
    except (SchedulerUnreachableError, SchedulerError) as error:
        return replace(known, trouble=str(error))
    return known


def state_of(job: JobLayout, last: Attempt | None, silent_s: float | None, slurm: Slurm) -> tuple[str, str, str]:
    """State, reason and source of a job, as :class:`paws_hpc.cluster.overview.JobOverview` explains them."""
    if job.is_done:
        return "done", "", "marker"
    if (queued := slurm.queue.get(job.job_id or "")) is not None:
        state, reason = _of_slurm(queued.state, queued.reason)
        source = "squeue"
    elif (accounted := slurm.accounts.get(job.job_id or "")) is not None:
        state, reason = _of_slurm(accounted.state, f"exit code {accounted.exit_code}")
        source = "sacct"
    else:
        state, reason, source = _of_starts(job, last, silent_s, asked=job.job_id is not None and not slurm.trouble)
    if state in ("ended", "lost") and job.was_done:  # before this submission, which found nothing to do
        return "done", "", "marker"
    if state == "ended":
        return "failed", "ended without finishing", source
    return state, reason, source


def _of_slurm(state: str, reason: str) -> tuple[str, str]:
    if state in _WAITING:
        return "waiting", reason
    if state in _FAILED:
        return "failed", state if reason in ("", "None", "NonZeroExitCode") else f"{state} ({reason})"
    if state == "CANCELLED":
        return "cancelled", reason if reason.startswith("Dependency") else ""
    if state == "COMPLETED":
        return "ended", ""
    return "running", "" if state == "RUNNING" else state


def _of_starts(job: JobLayout, last: Attempt | None, silent_s: float | None, *, asked: bool) -> tuple[str, str, str]:
    """What the job's own files tell: ``asked`` says that Slurm was asked and does not know the job."""
    if last is None or (job.job_id is not None and last.holder.job_id != job.job_id):
        known = "not started" if job.job_id is None else "lost" if asked else "submitted"
        return known, _FORGOTTEN if known == "lost" else "", "attempts" if job.job_id is None else "chain"
    state, reason = "running", ""
    if last.end is not None:
        how = str(last.end.get("how"))
        state, reason = _HOW.get(how, how), str(last.end.get("message") or "")
    elif silent_s is not None and silent_s > SILENT_S:
        state, reason = "silent", f"silent for {span(silent_s)}"
    if asked and state in ("running", "silent", "waiting"):
        state, reason = "lost", _FORGOTTEN
    return state, reason, "attempts"


def silence(last: Attempt | None) -> float | None:
    """Seconds since an attempt that has not ended gave a sign of life."""
    if last is None or last.end is not None:
        return None
    seen = last.beat["time"] if last.beat is not None else last.began
    return max((datetime.now(UTC) - datetime.fromisoformat(seen)).total_seconds(), 0.0)


def span(seconds: float) -> str:
    """A length of time for people: ``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 04 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"
