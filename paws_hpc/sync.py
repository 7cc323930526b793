"""Command: replay ``metrics.jsonl`` into Weights & Biases, from wherever there is a connection.

    python -m paws_hpc.sync digits-seed0        what is missing of a run
    python -m paws_hpc.sync --all               of all runs under runs/
    python -m paws_hpc.sync --all --dry-run     only say what is missing

Each stage is continued after the last row that the server has. So it can be interrupted and repeated, and rows that
`wandb sync` has uploaded are not uploaded again. The exit status is 1 if something is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paws_hpc.command import Parser, above_zero, exit_status, program
from paws_hpc.engine import wandb_run
from paws_hpc.engine.tracking import read_rows
from paws_hpc.files import exclusive
from paws_hpc.stages.run_folder import all_runs, find_run, is_done

_STILL_WRITTEN_S = 60.0  # a file of a stage that is not done and changed so recently belongs to a run that goes on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 if nothing is left to upload."""
    options = _parser().parse_args(arguments)
    os.environ["WANDB_MODE"] = "online"  # runs may be kept offline; this is the upload
    return exit_status(lambda: _sync_all(options), interrupted="the same command goes on from there")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("sync"), description="Upload metrics that Weights & Biases lacks.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("run", nargs="?", metavar="RUN", help="folder of a run, or its name under --runs")
    which.add_argument("--all", action="store_true", help="all runs under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only say what is left")
    parser.add_argument(
        "--timeout-min", type=above_zero, default=30.0, metavar="MIN", help="for one stage, minutes (%(default)g)"
    )
    return parser


def _sync_all(options: argparse.Namespace) -> int:
    paths = all_runs(options.runs) if options.all else [find_run(options.run, options.runs)]
    if not paths:
        print(f"no runs under {options.runs}: nothing kept by Weights & Biases here")
    left = [path for path in paths if not _sync(path, options)]
    return 1 if left else 0


def _sync(path: Path, options: argparse.Namespace) -> bool:
    """Upload what is left of a run and say what was done; returns whether nothing is left."""
    with exclusive(path / ".sync.lock", busy=f"Another sync of {path} is running. Wait for it, or end it."):
        stages = [spec.parents[1] for spec in sorted(path.glob("**/wandb/run.json"))]
        if not stages:
            print(f"{path.name}: nothing kept by Weights & Biases here")
        left = [folder for folder in stages if not _sync_stage(path, folder, options)]
    return not left


def _sync_stage(run: Path, folder: Path, options: argparse.Namespace) -> bool:
    metrics, name = folder / "metrics.jsonl", f"{run.name}: {folder.relative_to(run).as_posix()}"
    rows = [wandb_run.position(row) for row in read_rows(metrics)]
    missing = sum(position > wandb_run.reached(folder)["online"] for position in rows)
    if not missing:
        print(f"{name}: nothing left of {len(rows)} rows")
        return True
    if options.dry_run:
        print(f"{name}: {missing} of {len(rows)} rows left")
        return False
    if not is_done(folder) and time.time() - metrics.stat().st_mtime < _STILL_WRITTEN_S:
        print(f"{name}: {missing} of {len(rows)} rows left: {metrics} is still being written; run this again later")
        return False
    fault = _replay(folder, timeout_s=60 * options.timeout_min)
    print(f"{name}: {missing} rows left: {fault}" if fault else f"{name}: all of {len(rows)} rows are online")
    return fault is None


def _replay(folder: Path, *, timeout_s: float) -> str | None:
    """Show a stage's rows in W&B; returns what went wrong.

    Raises:
        ConnectionError: there is no server, or it takes no key from here.
    """
    process = wandb_run.start_process(folder.resolve(), "upload", patience_s=timeout_s)
    wandb_run.end_process(process, exit_code=int(not is_done(folder)), preempted=False, patience_s=timeout_s)
    process.stdin = None  # which is closed already
    try:
        lines = process.communicate(timeout=timeout_s + 5)[0].splitlines()
    except subprocess.TimeoutExpired:
        process.kill()
        return f"no answer within {timeout_s:g} s; is there a connection?"
    messages = [json.loads(line) for line in lines]
    for message in messages:
        if message["unreachable"]:
            raise ConnectionError(f"nothing can be uploaded: {message['message']}")
    if process.returncode == 0:
        # `wandb sync` would upload the rows of the offline files a second time.
        for file in folder.glob("wandb/offline-run-*/run-*.wandb"):
            Path(f"{file}.synced").touch()
        return None
    return messages[-1]["message"] if messages else f"no answer within {timeout_s:g} s; is there a connection?"


if __name__ == "__main__":
    sys.exit(main())
