"""Overviews as text: tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
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
_Row = tuple[str, str, str, str, str, str, str, str, str]
_HEADINGS = ("job", "state", "restarts", "id", "step", "epoch", "img/s", "left", "val")
_WIDE = 100  # columns of a terminal from which on epochs are shown beside steps


def rich_runs(runs: list[RunOverview]) -> RenderableType:
    """One line per run."""
    table = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False)
    for heading in ("run", "state", "at", "step", "img/s", "left"):
        table.add_column(heading, justify="right" if heading in ("step", "img/s", "left") else "left", overflow="fold")
    for run in runs:
        name, state, *rest = _run_row(run)
        table.add_row(name, Text(state, _STYLES.get(run.state, "")), *rest)
    return Group(table, *(Text(line, "yellow") for line in _troubles(runs)))


def plain_runs(runs: list[RunOverview]) -> list[str]:
    """One line per run, in columns."""
    rows = [("run", "state", "at", "step", "img/s", "left"), *(_run_row(run) for run in runs)]
    return [*_columns(rows), *_troubles(runs)]


def _run_row(run: RunOverview) -> tuple[str, ...]:
    current, state = run.current, run.state
    failed = sum(job.state in ("failed", "lost") for job in run.jobs)
    if failed and state != "failed":
        state += f", {failed} failed"
    if current is None or run.state in ("done", "not started"):
        return run.name, state, "", "", "", ""
    _, _, _, _, step, _, rate, left, _ = _job_row(current)
    return run.name, state, current.job, step, rate, left


def _troubles(runs: list[RunOverview]) -> list[str]:
    troubles = {run.trouble for run in runs if run.trouble}
    return [f"Slurm cannot be reached, so states are as the jobs wrote them: {trouble}" for trouble in troubles]


def rich_run(run: RunOverview, *, width: int, everything: bool = False) -> RenderableType:
    """A run's jobs as a table, with what failed and what to know below it.

    Args:
        run: to show.
        width: of the terminal.
        everything: list every trial of a sweep, also where many are alike.
    """
    head = Text.assemble((run.name, "bold"), "  ", (run.state, _STYLES.get(run.state, "")), f"  {run.path}")
    rows = list(_rows(run, everything=everything))
    hidden = () if width >= _WIDE else ("epoch",)
    used = [
        column
        for column, heading in enumerate(_HEADINGS)
        if heading not in hidden and any(row[column] for _, _, row in rows)
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in used:
        right = _HEADINGS[column] not in ("job", "state", "id")
        table.add_column(_HEADINGS[column], justify="right" if right else "left", no_wrap=_HEADINGS[column] != "state")
    sweep = ""
    for stage, state, row in rows:
        name = row[0].removeprefix(f"{stage}/")
        if name != row[0]:
            if stage != sweep:
                table.add_row(stage)
            name = f"  {name}"
        sweep = stage
        texts = (name, Text(row[1], _STYLES.get(state, "")), *row[2:])
        table.add_row(*(texts[column] for column in used))
    lines: list[RenderableType] = [Text(line, "yellow") for line in _remarks(run)]
    for job in run.jobs:
        lines += [Text(line, "red" if number == 0 else "dim") for number, line in enumerate(_failure(job))]
    return Group(head, table, *lines)


def plain_run(run: RunOverview, *, everything: bool = False) -> list[str]:
    """The same as lines of plain text, nothing of them cut."""
    rows = [_HEADINGS, *(row for _, _, row in _rows(run, everything=everything))]
    failures = [line for job in run.jobs for line in _failure(job)]
    return [f"{run.name}: {run.state} ({run.path})", *_columns(rows), *_remarks(run), *failures]


def _rows(run: RunOverview, *, everything: bool) -> Iterator[tuple[str, str, _Row]]:
    """Stage, state and row of every line; trials of a sweep that are alike and have nothing to show are one line."""
    shown: set[tuple[str, str, str]] = set()
    for job in run.jobs:
        kind = (job.stage, job.state, job.reason)
        alike = [other for other in run.jobs if (other.stage, other.state, other.reason) == kind]
        if everything or len(alike) <= _ALIKE or job.state not in ("done", "waiting", "submitted", "not started"):
            yield job.stage, job.state, _job_row(job)
        elif kind not in shown:
            shown.add(kind)
            scores = [other.progress.validation_accuracy for other in alike if other.progress is not None]
            best = max((score for score in scores if score is not None), default=None)
            row = (f"{job.stage}: {len(alike)} trials", _state(job), "", "", "", "", "", "", _percent(best))
            yield job.stage, job.state, row


def _job_row(job: JobOverview) -> _Row:
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


def _remarks(run: RunOverview) -> list[str]:
    """Notes and warnings, and from where the states are known if not from the run directory alone."""
    lines = [f"{job.job}: {note}" for job in run.jobs for note in job.notes]
    lines += [f"warning: {warning}" for warning in run.warnings]
    if run.cancelled:
        lines.append(f"cancelled by launch at {run.cancelled}")
    lines += _troubles([run])
    used = {job.source for job in run.jobs if job.state != "not started"} - {"marker"}
    if used:
        lines.append(f"known from {', '.join(_SOURCES[source] for source in sorted(used | {'marker'}))}")
    return lines


def _failure(job: JobOverview) -> list[str]:
    """Why a job failed: the message of the rank that failed first, then the end of its log."""
    lines = []
    if job.failure is not None:
        where = f"rank {job.failure.get('rank')} on {job.failure.get('host')}"
        lines.append(f"{job.job} failed ({where}): {job.failure.get('type')}: {job.failure.get('message')}")
    elif job.log_tail:
        lines.append(f"{job.job}: {job.state}{f', {job.reason}' if job.reason else ''}")
    if job.log is not None:
        lines += [f"  last lines of {job.log}:", *(f"    {line}" for line in job.log_tail)]
    return lines


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
