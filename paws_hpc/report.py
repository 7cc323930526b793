"""Command: write the report of a run, or one page that compares several.

    python -m paws_hpc.report digits-seed0                        the run's own report, in its folder
    python -m paws_hpc.report digits-seed0 digits-seed1 …         one page for all: table, curves, sweeps, provenance
    python -m paws_hpc.report digits-seed* --to FOLDER            FOLDER/index.html

It reads the files of the runs and nothing else, so it works while they run, after they were killed, and on copies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paws_hpc.cluster.runs import find_run
from paws_hpc.stages.report import build_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if a run is not there or cannot be read."""
    options = _parser().parse_args(arguments)
    try:
        runs = [find_run(name, options.runs) for name in options.run]
        for run in runs:
            print(f"Report: {build_report(run)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paws_hpc.report", description="Write the report of a run, or one page that compares several."
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="folder of a run, or its name under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
