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
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from paws_hpc.cluster.overview import RunOverview, overviews
from paws_hpc.cluster.overview_text import plain_run, plain_runs, rich_run, rich_runs
from paws_hpc.files import error_text
from paws_hpc.stages.runs import all_runs, find_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if there is no such run."""
    options = _parser().parse_args(arguments)
    try:
        paths = [find_run(options.run, options.runs)] if options.run else all_runs(options.runs)
        if options.watch:
            _watch(paths, options)
        else:
            _print(_look(paths, options), options)
    except FileNotFoundError as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paws_hpc.status", description="What became of a run, or of all runs under runs/."
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run, or its name under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--watch", action="store_true", help="look again and again, until interrupted")
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between looks (%(default)g)")
    parser.add_argument("--all", action="store_true", help="list every trial of a sweep, also where many are alike")
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one line per look")
    return parser


def _look(paths: Sequence[Path], options: argparse.Namespace) -> list[RunOverview]:
    return overviews(paths, details=options.run is not None)


def _print(runs: list[RunOverview], options: argparse.Namespace) -> None:
    if options.json:
        values = [run.to_json() for run in runs]
        print(json.dumps(values[0] if options.run else values, indent=None if options.watch else 2), flush=True)
    elif sys.stdout.isatty():
        console = Console()
        console.print(_drawn(runs, options, console.width))
    else:
        print("\n".join(plain_run(runs[0], everything=options.all) if options.run else plain_runs(runs)), flush=True)


def _drawn(runs: list[RunOverview], options: argparse.Namespace, width: int) -> RenderableType:
    return rich_run(runs[0], width=width, everything=options.all) if options.run else rich_runs(runs)


def _watch(paths: Sequence[Path], options: argparse.Namespace) -> None:
    """Look again and again; on a terminal in place, otherwise one block or line after another."""
    if options.json or not sys.stdout.isatty():
        while True:
            _print(_look(paths, options), options)
            time.sleep(options.every)
    with Live(auto_refresh=False, screen=True) as live:
        while True:
            runs = _look(paths, options)
            live.update(_drawn(runs, options, live.console.width), refresh=True)
            time.sleep(options.every)


if __name__ == "__main__":
    sys.exit(main())
