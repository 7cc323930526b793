"""Command: what became of a run, or of all runs.

    python -m paws_hpc.status                      one line per run under runs/
    python -m paws_hpc.status digits-seed0         its stages and jobs, failures and warnings
    python -m paws_hpc.status digits-seed0 --watch

It only reads. ``--json`` prints one object (or a list of them without RUN) with the fields of
:class:`paws_hpc.cluster.overview.RunOverview`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from paws_hpc.cluster.overview import JobOverview, RunOverview, overviews, span
from paws_hpc.command import Parser, above_zero, exit_status, printable, program
from paws_hpc.metrics import percent
from paws_hpc.stages.run_folder import all_runs, find_run

_UNCUT = 10_000  # columns, where no terminal folds the lines
_NARROW = 100  # a terminal with fewer columns does without epochs, which the steps say too
_ALIKE = 4  # trials in the same state that are still listed one by one
_STYLES = {
    "done": "green",
    "running": "bold cyan",
    **dict.fromkeys(("waiting", "submitted"), "yellow"),
    **dict.fromkeys(("failed", "lost", "silent"), "bold red"),
    **dict.fromkeys(("cancelled", "interrupted"), "magenta"),
}
_SOURCES = {
    "marker": "the run directory",
    "squeue": "Slurm's queue",
    "sacct": "Slurm's accounting",
    "attempts": "the jobs' own files",
    "chain": "chain.json",
}
_RUN_COLUMNS = ("run", "begun", "state", "top-1", "at", "step", "img/s", "left")
_JOB_COLUMNS = ("job", "state", "restarts", "id", "step", "epoch", "img/s", "left", "val")
_ON_THE_LEFT = ("run", "begun", "job", "state", "id", "at")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if there is no such run."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _show(options), interrupted="nothing was changed")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("status"), description="What became of a run, or of all runs under runs/.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run, or its name under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--watch", action="store_true", help="look again and again, until interrupted")
    parser.add_argument(
        "--every", type=above_zero, default=10.0, metavar="S", help="seconds between looks (%(default)g)"
    )
    parser.add_argument("--all", action="store_true", help="list every trial of a sweep, also where many are alike")
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one line per look")
    return parser


def _show(options: argparse.Namespace) -> None:
    paths = [find_run(options.run, options.runs)] if options.run else all_runs(options.runs)
    terminal = sys.stdout.isatty() and not options.json
    console = Console(width=None if terminal else _UNCUT)
    with suppress(KeyboardInterrupt), ExitStack() as screen:
        live = screen.enter_context(Live(auto_refresh=False, screen=True)) if options.watch and terminal else None
        while True:
            runs = overviews(paths, details=bool(options.run))
            if options.json:
                values = [run.to_json() for run in runs]
                print(json.dumps(values[0] if options.run else values, indent=None if options.watch else 2), flush=True)
            else:
                width = live.console.width if live else console.width
                text = run_text(runs[0], width=width, everything=options.all) if options.run else runs_text(runs)
                if live:
                    live.update(text, refresh=True)
                else:
                    console.print(text)
            if not options.watch:
                return
            time.sleep(options.every)


def runs_text(runs: Sequence[RunOverview]) -> Group:
    """One line per run."""
    rows = []
    for run in runs:
        failed = sum(job.state in ("failed", "lost") for job in run.jobs)
        row = {} if run.current is None else _job_row(run.current)
        state = f"{run.state}, {failed} failed" if failed and run.state != "failed" else run.state
        own = {"run": run.name, "at": row.get("job", ""), "state": state, "style": _STYLES.get(run.state, "")}
        own["begun"] = str(run.created or "")[:16].replace("T", " ")
        own["top-1"] = "" if run.top1 is None else percent(run.top1)
        rows.append(row | own)
    if not rows:
        return Group(_text("no runs"))
    return Group(_table(_RUN_COLUMNS, rows), *(_text(line, "yellow") for line in _troubles(runs)))


def run_text(run: RunOverview, *, width: int, everything: bool) -> Group:
    """A run's jobs as a table, then warnings and failures; ``everything`` lists trials also where many are alike."""
    columns = [column for column in _JOB_COLUMNS if column != "epoch" or width >= _NARROW]
    return Group(
        Text.assemble((printable(run.name), "bold"), ": ", (run.state, _STYLES.get(run.state, "")), f" ({run.path})"),
        _table(columns, list(_rows(run, everything=everything))),
        *(_text(line, "yellow") for line in _remarks(run)),
        *(text for job in run.jobs for text in _failure(job)),
    )


def _text(words: str, style: str = "") -> Text:
    """Text without control characters: it may come from another user's files."""
    return Text(printable(words), style)


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows by column, without columns that are empty; ``style`` colours the state."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    used = [column for column in columns if any(row.get(column) for row in rows)]
    for column in used:
        table.add_column(column, justify="left" if column in _ON_THE_LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(name, ""), row["style"] if name == "state" else "") for name in used))
    return table


def _rows(run: RunOverview, *, everything: bool) -> Iterator[dict[str, str]]:
    """A row per job; trials of a sweep that are alike and have nothing to show are one row."""
    shown: set[tuple[str, str, str]] = set()
    for job in run.jobs:
        kind = (job.stage, job.state, job.reason)
        alike = [other for other in run.jobs if (other.stage, other.state, other.reason) == kind]
        if everything or len(alike) <= _ALIKE or job.state not in ("done", "waiting", "submitted", "not started"):
            yield _job_row(job)
        elif kind not in shown:
            shown.add(kind)
            scores = [other.progress.validation_accuracy for other in alike if other.progress is not None]
            best = max((score for score in scores if score is not None), default=None)
            first = _job_row(job)
            yield {
                "job": f"{job.stage}: {len(alike)} trials",
                "state": first["state"],
                "style": first["style"],
                "val": "" if best is None else f"{best:.1%}",
            }


def _job_row(job: JobOverview) -> dict[str, str]:
    row = {
        "job": job.job,
        "state": f"{job.state}: {job.reason}" if job.reason else job.state,
        "style": _STYLES.get(job.state, ""),
        "restarts": str(job.restarts or ""),
        "id": job.job_id or "",
    }
    if (progress := job.progress) is None:
        return row
    if progress.step or progress.total_steps:
        row["step"] = f"{progress.step:,}/" + ("?" if progress.total_steps is None else f"{progress.total_steps:,}")
    if progress.epoch is not None:
        row["epoch"] = f"{progress.epoch:.3g}/{progress.epochs or '?'}"
    if progress.validation_accuracy is not None:
        row["val"] = f"{progress.validation_accuracy:.1%}"
    if job.state == "running" and progress.images_per_s is not None:
        row["img/s"] = f"{progress.images_per_s:,.0f}"
    if job.state == "running" and progress.seconds_left is not None:
        row["left"] = span(progress.seconds_left)
    return row


def _troubles(runs: Sequence[RunOverview]) -> list[str]:
    troubles = {run.trouble for run in runs if run.trouble}
    return [f"Slurm cannot be reached, so states are as the jobs wrote them: {trouble}" for trouble in troubles]


def _remarks(run: RunOverview) -> Iterator[str]:
    """Notes and warnings, and the sources of the states if other than the run directory."""
    yield from (f"{job.job}: {note}" for job in run.jobs for note in job.notes)
    yield from (f"warning: {warning}" for warning in run.warnings)
    if run.cancelled:
        yield f"cancelled by launch at {run.cancelled}"
    yield from _troubles([run])
    used = {job.source for job in run.jobs if job.state != "not started"} - {"marker"}
    if used:
        yield f"known from {', '.join(_SOURCES[source] for source in sorted(used | {'marker'}))}"


def _failure(job: JobOverview) -> Iterator[Text]:
    """Why a job failed: the message of the rank that failed first, then the end of its log."""
    if job.failure is not None:
        where = f"rank {job.failure.get('rank')} on {job.failure.get('host')}"
        yield _text(f"{job.job} failed ({where}): {job.failure.get('type')}: {job.failure.get('message')}", "red")
    elif job.log_tail:
        yield _text(f"{job.job}: {_job_row(job)['state']}", "red")
    if job.log is not None:
        yield _text(f"  last lines of {job.log}:", "dim")
        yield from (_text(f"    {line}", "dim") for line in job.log_tail)


if __name__ == "__main__":
    sys.exit(main())
