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

from rich.console import Console, Group
from rich.live import Live

from paws_hpc.cluster.overview import overviews
from paws_hpc.cluster.overview_text import run_text, runs_text
from paws_hpc.files import error_text
from paws_hpc.stages.run_folder import all_runs, find_run

_UNCUT = 10_000  # columns, where no terminal folds the lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if there is no such run."""
    options = _parser().parse_args(arguments)
    terminal = sys.stdout.isatty() and not options.json
    try:
        paths = [find_run(options.run, options.runs)] if options.run else all_runs(options.runs)
        if options.watch and terminal:
            with Live(auto_refresh=False, screen=True) as live:
                while True:
                    live.update(_text(paths, options, live.console.width), refresh=True)
                    time.sleep(options.every)
        while True:
            if options.json:
                values = [run.to_json() for run in overviews(paths, details=bool(options.run))]
                indent = None if options.watch else 2
                print(json.dumps(values[0] if options.run else values, indent=indent), flush=True)
            else:
                console = Console(width=None if terminal else _UNCUT)
                console.print(_text(paths, options, console.width))
            if not options.watch:
                return 0
            time.sleep(options.every)
    except FileNotFoundError as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
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


def _text(paths: Sequence[Path], options: argparse.Namespace, width: int) -> Group:
    runs = overviews(paths, details=bool(options.run))
    return run_text(runs[0], width=width, everything=options.all) if options.run else runs_text(runs)


if __name__ == "__main__":
    sys.exit(main())
