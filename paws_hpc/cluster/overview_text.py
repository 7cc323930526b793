"""Overviews as text; a console without a terminal leaves out the colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from paws_hpc.cluster.overview import JobOverview, RunOverview, span

_ALIKE = 4  # trials in the same state that are still listed one by one
_STYLES = {
    "done": "green",
    "running": "bold cyan",
    "waiting": "yellow",
    "submitted": "yellow",
    "failed": "bold red",
    "lost": "bold red",
    "silent": "bold red",
    "cancelled": "magenta",
    "interrupted": "magenta",
}
_SOURCES = {
    "marker": "the run directory",
    "squeue": "Slurm's queue",
    "sacct": "Slurm's accounting",
    "attempts": "the jobs' own files",
    "chain": "chain.json",
}
_JOB_COLUMNS = ("job", "state", "restarts", "id", "step", "epoch", "img/s", "left", "val")
_NARROW = 100  # a terminal with fewer columns does without epochs, which the steps say too


def runs_text(runs: list[RunOverview]) -> Group:
    """One line per run."""
    rows = []
    for run in runs:
        failed, current = sum(job.state in ("failed", "lost") for job in run.jobs), run.current
        state = f"{run.state}, {failed} failed" if failed and run.state != "failed" else run.state
        job, _, _, _, step, _, rate, left, _ = [""] * 9 if current is None else _job_row(current)
        rows.append((run.state, (run.name, state, job, step, rate, left)))
    return Group(
        _table(("run", "state", "at", "step", "img/s", "left"), rows),
        *(Text(line, "yellow") for line in _troubles(runs)),
    )


def run_text(run: RunOverview, *, width: int, everything: bool) -> Group:
    """A run's jobs as a table, then warnings and failures.

    Args:
        run: to show.
        width: of the terminal.
        everything: list every trial of a sweep, also where many are alike.
    """
    rows = list(_rows(run, everything=everything))
    used = [
        number
        for number, column in enumerate(_JOB_COLUMNS)
        if any(row[number] for _, row in rows) and not (column == "epoch" and width < _NARROW)
    ]
    columns = [_JOB_COLUMNS[number] for number in used]
    return Group(
        Text.assemble((run.name, "bold"), ": ", (run.state, _STYLES.get(run.state, "")), f" ({run.path})"),
        _table(columns, [(state, [row[number] for number in used]) for state, row in rows]),
        *(Text(line, "yellow") for line in _remarks(run)),
        *(text for job in run.jobs for text in _failure(job)),
    )


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """Rows with the state that colours them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("restarts", "step", "epoch", "img/s", "left", "val")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for state, row in rows:
        styles = (_STYLES.get(state, "") if column == "state" else "" for column in columns)
        table.add_row(*map(Text, row, styles))
    return table


def _rows(run: RunOverview, *, everything: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """State and row of every line; trials of a sweep that are alike and have nothing to show are one line."""
    shown: set[tuple[str, str, str]] = set()
    for job in run.jobs:
        kind = (job.stage, job.state, job.reason)
        alike = [other for other in run.jobs if (other.stage, other.state, other.reason) == kind]
        if everything or len(alike) <= _ALIKE or job.state not in ("done", "waiting", "submitted", "not started"):
            yield job.state, _job_row(job)
        elif kind not in shown:
            shown.add(kind)
            scores = [other.progress.validation_accuracy for other in alike if other.progress is not None]
            best = max((score for score in scores if score is not None), default=None)
            yield job.state, (f"{job.stage}: {len(alike)} trials", _state(job), *[""] * 6, _percent(best))


def _job_row(job: JobOverview) -> tuple[str, ...]:
    step = epoch = rate = left = score = ""
    if (progress := job.progress) is not None:
        total = "?" if progress.total_steps is None else f"{progress.total_steps:,}"
        step = f"{progress.step:,}/{total}" if progress.step or progress.total_steps else ""
        if progress.epoch is not None:
            epoch = f"{progress.epoch:.3g}/{progress.epochs or '?'}"
        score = _percent(progress.validation_accuracy)
        if job.state == "running":
            rate = "" if progress.images_per_s is None else f"{progress.images_per_s:,.0f}"
            left = "" if progress.seconds_left is None else span(progress.seconds_left)
    restarts = str(job.restarts) if job.restarts else ""
    return job.job, _state(job), restarts, job.job_id or "", step, epoch, rate, left, score


def _state(job: JobOverview) -> str:
    return f"{job.state}: {job.reason}" if job.reason else job.state


def _percent(score: float | None) -> str:
    return "" if score is None else f"{score:.1%}"


def _troubles(runs: list[RunOverview]) -> list[str]:
    troubles = {run.trouble for run in runs if run.trouble}
    return [f"Slurm cannot be reached, so states are as the jobs wrote them: {trouble}" for trouble in troubles]


def _remarks(run: RunOverview) -> list[str]:
    """Notes and warnings, and the sources of the states if other than the run directory."""
    lines = [f"{job.job}: {note}" for job in run.jobs for note in job.notes]
    lines += [f"warning: {warning}" for warning in run.warnings]
    if run.cancelled:
        lines.append(f"cancelled by launch at {run.cancelled}")
    lines += _troubles([run])
    used = {job.source for job in run.jobs if job.state != "not started"} - {"marker"}
    if used:
        lines.append(f"known from {', '.join(_SOURCES[source] for source in sorted(used | {'marker'}))}")
    return lines


def _failure(job: JobOverview) -> Iterator[Text]:
    """Why a job failed: the message of the rank that failed first, then the end of its log."""
    if job.failure is not None:
        where = f"rank {job.failure.get('rank')} on {job.failure.get('host')}"
        yield Text(f"{job.job} failed ({where}): {job.failure.get('type')}: {job.failure.get('message')}", "red")
    elif job.log_tail:
        yield Text(f"{job.job}: {job.state}{f', {job.reason}' if job.reason else ''}", "red")
    if job.log is not None:
        yield Text(f"  last lines of {job.log}:", "dim")
        yield from (Text(f"    {line}", "dim") for line in job.log_tail)
