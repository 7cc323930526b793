"""Slurm's own commands: questions about jobs, and orders to queue, release and cancel them.

Their text output is read, in formats that 22.05 and later versions share; the JSON output changes from version to
version. Every function raises :class:`SchedulerUnreachableError` if Slurm does not answer; every other error that
leaves this module is a :class:`SchedulerError`.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

TIMEOUT_S = 60.0  # a busy controller may take tens of seconds

_UNREACHABLE = re.compile(
    r"unable to contact|unable to process configuration|configuration source|connection (?:refused|timed out|reset)"
    r"|unexpected message received"  # all that 22.05's `scontrol requeue` says when the controller is gone
    r"|timed out|communication|no route to host|authentication|munge|zero bytes|controller (?:is|not)",
    re.IGNORECASE,
)
_UNKNOWN_JOB = re.compile(r"invalid job id|job \S+ not found", re.IGNORECASE)
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled|accounting_storage/none", re.IGNORECASE)
_FORMATTING = re.compile(r"(SQUEUE|SACCT|SINFO|SPRIO)_|SLURM_TIME_FORMAT$|SLURM_BITSTR_LEN$")
# squeue's fields and their widths; the name comes last, as it alone may hold anything.
_COLUMNS = {"JobArrayID": 40, "State": 24, "RestartCnt": 12, "Reason": 160, "NodeList": 256, "Name": 512}

Fate = Literal["runs", "replaced", "ended"]

FAILED = ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")
ENDED = frozenset({*FAILED, "CANCELLED", "COMPLETED"})
"""States in which a job neither runs nor will, unless somebody puts it back into the queue."""


class SchedulerError(RuntimeError):
    """Slurm refused; the message holds the command and Slurm's own words."""


class SchedulerUnreachableError(SchedulerError):
    """Slurm cannot be reached: its commands are missing, hang, or do not reach the controller."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that the controller knows: waiting, running, or finished within its MinJobAge (300 s by default).

    Attributes:
        job_id: ``17``, or ``18_0`` for an array's element.
        reason: why it waits or ended, in Slurm's word; empty if there is none.
        nodes: as Slurm abbreviates them, ``n[1-2]``; empty while it waits.
    """

    job_id: str
    name: str
    state: str
    reason: str
    restarts: int | None
    nodes: str


class AccountedJob(NamedTuple):
    """A job as the accounting data base has it: its last state, in one word, and its exit code, ``status:signal``."""

    state: str
    exit_code: str


def queue(user: str | None = None) -> dict[str, QueuedJob]:
    """The jobs of ``user`` (name or number; of this user if None) that the controller knows, by their ids.

    Elements of arrays are listed one by one, and jobs that ended stay for some minutes.
    """
    fields = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={user or os.getuid()}", "--Format", fields]
    ends = list(itertools.accumulate(_COLUMNS.values(), initial=0))
    jobs = {}
    for line in ask(command).splitlines():
        if line.strip() and not line.startswith("CLUSTER:"):
            job_id, state, restarts, reason, nodes, name = (line[a:b].strip() for a, b in itertools.pairwise(ends))
            count = int(restarts) if restarts.isdigit() else None
            jobs[job_id] = QueuedJob(job_id, name, state, "" if reason == "None" else reason, count, nodes)
    return jobs


def accounting(job_ids: Iterable[str]) -> dict[str, AccountedJob] | None:
    """What the accounting data base says of jobs, by their ids; those it does not know are left out.

    An id is ``17``, ``18_0``, or ``18`` for all elements of an array. None where this cluster keeps no accounts.
    """
    if not (ids := ",".join(sorted(set(job_ids)))):
        return {}
    fields = "JobID,State,ExitCode"
    try:
        rows = ask(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={ids}", "-o", fields])
    except SchedulerError as error:
        if _NO_ACCOUNTING.search(str(error)):
            return None
        raise
    jobs: dict[str, AccountedJob] = {}
    for row in filter(None, rows.splitlines()):
        listed, state, code = row.split("|")
        jobs |= dict.fromkeys(expand_array(listed), AccountedJob(state.split()[0], code))
    return jobs


def job_state(job_id: str) -> str | None:
    """The state of a job now, ``RUNNING`` or ``CANCELLED`` say; None if the controller knows no such job."""
    return _shown(job_id).get("JobState")


def fate(job_id: str, restart: int) -> tuple[Fate, str]:
    """What has become of the attempt of a job that counts ``restart`` attempts before it, and Slurm's words for it.

    ``replaced`` if Slurm has put the job back into the queue or started it elsewhere, after a node was lost say;
    ``ended`` if it was cancelled or is over.
    """
    shown = _shown(job_id)
    state, restarts = shown.get("JobState", "forgotten"), shown.get("Restarts", "0")
    text = f"{state} after {restarts} restarts"
    if int(restarts) > restart:
        return "replaced", text
    return "runs" if state == "RUNNING" else "ended", text


def _shown(job_id: str) -> dict[str, str]:
    """The fields of one job that are single words; empty if the controller knows no such job."""
    try:
        text = ask(["scontrol", "show", "job", "--oneliner", job_id])
    except SchedulerError as error:
        if _UNKNOWN_JOB.search(str(error)):
            return {}
        raise
    return dict(re.findall(r"(\w+)=(\S*)", text))


def requeue(job_id: str) -> None:
    """End a running job and put it back into the queue under the same id."""
    ask(["scontrol", "requeue", job_id])


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that ended already, or that the controller has forgotten, are no error."""
    if ids := list(job_ids):
        try:
            ask(["scancel", *ids])
        except SchedulerError as error:
            if not _UNKNOWN_JOB.search(str(error)):
                raise


def release(job_ids: Iterable[str]) -> None:
    """Let jobs start that were submitted with ``--hold``."""
    if ids := list(job_ids):
        ask(["scontrol", "release", ",".join(ids)])


def expand_array(text: str) -> list[str]:
    """``18_[0-2,7%4]`` → ``18_0``, ``18_1``, ``18_2``, ``18_7``; any other id is itself."""
    match = re.fullmatch(r"(\d+)_\[([^\]%]*)(?:%\d+)?\]", text)
    if match is None:
        return [text]
    elements: list[int] = []
    for indices in match.group(2).split(","):
        first, _, rest = indices.partition("-")
        last, _, step = rest.partition(":")
        elements += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{match.group(1)}_{element}" for element in elements]


def ask(command: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> str:
    """Run one of Slurm's commands and return what it printed."""
    shown = textwrap.shorten(shlex.join(command), 160, placeholder=" …")
    # A user's own taste in formats must not change what is read here.
    environment = {name: value for name, value in os.environ.items() if not _FORMATTING.match(name)}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False,
            env=environment | {"LC_ALL": "C.UTF-8"}, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise SchedulerUnreachableError(f"{command[0]} is not installed here, or not on PATH.") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnreachableError(f"`{shown}` gave no answer within {timeout_s:g} s.") from error
    if done.returncode == 0:
        return done.stdout
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split()) or "nothing"
    if _UNREACHABLE.search(said):
        raise SchedulerUnreachableError(f"`{shown}` could not reach Slurm: {said}")
    raise SchedulerError(f"`{shown}` was refused (status {done.returncode}): {said}")
