"""Command: upload what Weights & Biases kept on disk, from wherever there is a connection.

    python -m paws_hpc.sync digits-seed0        what is left of a run
    python -m paws_hpc.sync --all               of all runs under runs/
    python -m paws_hpc.sync --all --dry-run     only say what is left

It can be interrupted and repeated. The exit status is 1 if something is left. Before the first upload it asks the
server whether it takes anything, so that a missing key or connection is said once and not for every file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from paws_hpc.files import error_text, exclusive
from paws_hpc.stages.runs import all_runs, find_run
from paws_hpc.stages.wandb_asking import unusable
from paws_hpc.stages.wandb_segments import Segment, ServerError, find_segments, rows_left, upload_next

_ASKING_S = 60.0  # to wait for the server's first word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 if nothing is left to upload."""
    options = _parser().parse_args(arguments)
    server = _Server(timeout_s=min(_ASKING_S, 60 * options.timeout_min))
    try:
        paths = all_runs(options.runs) if options.all else [find_run(options.run, options.runs)]
        if not paths:
            print(f"no runs under {options.runs}: nothing kept by Weights & Biases here")
        left = [path for path in paths if not _sync(path, options, server)]
    except (ValueError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 1
    finally:
        if server.was_unusable:
            print(f"error: nothing can be uploaded: {server.fault}", file=sys.stderr)
    return 1 if left else 0


class _Server:
    """Weights & Biases' server, which is asked once."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s, self.was_unusable = timeout_s, False

    @cached_property
    def fault(self) -> str | None:
        """Why it takes nothing from here."""
        fault = unusable(timeout_s=self._timeout_s)
        self.was_unusable = fault is not None
        return fault


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paws_hpc.sync", description="Upload what Weights & Biases kept on disk."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("run", nargs="?", metavar="RUN", help="folder of a run, or its name under --runs")
    which.add_argument("--all", action="store_true", help="all runs under --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only say what is left")
    parser.add_argument(
        "--timeout-min", type=_minutes, default=30.0, metavar="MIN", help="for one file, minutes (%(default)g)"
    )
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait; give minutes above 0")
    return minutes


def _sync(path: Path, options: argparse.Namespace, server: _Server) -> bool:
    """Upload what is left of a run and say what was done; returns whether nothing is left."""
    with exclusive(path / ".sync.lock", busy=f"Another sync of {path} is running. Wait for it, or end it."):
        stages = find_segments(path)
        if not stages:
            print(f"{path.name}: nothing kept by Weights & Biases here")
        clean = [_sync_stage(f"{path.name}: {stage}", found, options, server) for stage, found in stages.items()]
    return all(clean)


def _pending(segments: list[Segment]) -> int:
    """How many are not online."""
    return sum(not segment.is_synced for segment in segments)


def _sync_stage(name: str, segments: list[Segment], options: argparse.Namespace, server: _Server) -> bool:
    pending = _pending(segments)
    if pending and options.dry_run:
        print(f"{name}: {pending} of {len(segments)} files left")
        return False
    fault = None
    try:
        while fault is None and _pending(segments):
            fault = upload_next(segments, timeout_s=60 * options.timeout_min, unusable=lambda: server.fault)
    except ServerError:  # which is told once, at the end
        print(f"{name}: {_pending(segments)} of {len(segments)} files left")
        return False
    left = _pending(segments)
    if fault is None:
        fault = rows_left(segments)
    done = f"{pending - left} files uploaded, {left} left" if pending else f"nothing left of {len(segments)} files"
    print(f"{name}: {done}{f': {fault}' if fault else ''}")
    return fault is None


if __name__ == "__main__":
    sys.exit(main())
