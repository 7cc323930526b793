"""Command: write the report of a run, or one page that compares several.

    python -m paws_hpc.report digits-seed0                        the run's own report, in its folder
    python -m paws_hpc.report digits-seed0 digits-seed1 …         one page for all: table, curves, sweeps, provenance
    python -m paws_hpc.report runs/digits-* --markdown            that table as text; --json for programs
    python -m paws_hpc.report runs/digits-* --wandb               one report in Weights & Biases

It reads the files of the runs and nothing else, so it works while they run, after they were killed, and on copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from paws_hpc.command import Parser, above_zero, exit_status, program
from paws_hpc.report.comparison import as_json, as_markdown, compare
from paws_hpc.report.comparison_page import build_comparison
from paws_hpc.report.page import build_report
from paws_hpc.report.run_record import read_runs
from paws_hpc.report.wandb_saving import save_wandb_report
from paws_hpc.stages.run_folder import find_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if a run is not there or cannot be read, or W&B failed."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _report(options), interrupted="an earlier report stays as it was")


def _report(options: argparse.Namespace) -> None:
    runs = [find_run(name, options.runs) for name in options.run]
    if options.json:
        print(json.dumps(as_json(compare(read_runs(runs))), indent=2))
    elif options.markdown:
        print(as_markdown(compare(read_runs(runs))), end="")
    elif options.wandb:
        print(save_wandb_report(runs, options.to, timeout_s=60 * options.timeout_min))
    elif len(runs) == 1:
        print(f"Report: {build_report(runs[0], options.to)}")
    else:
        print(f"Comparison: {build_comparison(runs, options.to)}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("report"), description="Write the report of a run, or one page that compares several.")
    parser.add_argument("run", nargs="+", metavar="RUN", help="folder of a run, or its name under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER",
        help="write FOLDER/index.html, or with --wandb FOLDER/wandb.json; without it a run's report goes to "
        "RUN/report, and a comparison to comparisons/NAME beside the first run, where NAME is what the names of the "
        "runs share",
    )  # fmt: skip
    table = parser.add_mutually_exclusive_group()
    table.add_argument(
        "--wandb",
        action="store_true",
        help="write no page, but save a report in Weights & Biases (pip install paws-hpc[report])",
    )
    parser.add_argument(
        "--timeout-min", type=above_zero, default=5.0, metavar="MIN",
        help="with --wandb: give up after so many minutes (%(default)g)",
    )  # fmt: skip
    table.add_argument("--json", action="store_true", help="write no page, but print its table and provenance as JSON")
    table.add_argument("--markdown", action="store_true", help="write no page, but print its table as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
