"""Command: list, rename and remove runs.

    python -m paws_hpc.runs                              all runs under runs/, a line each, as status lists them
    python -m paws_hpc.runs rename digits-seed0 first
    python -m paws_hpc.runs remove digits-seed1 digits-seed2

A run of which a job runs or waits is left alone. Stores, W&B's server and files outside the run's folder stay as they
are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from paws_hpc.cluster.bootstrap import is_alive
from paws_hpc.cluster.chain import Chain
from paws_hpc.cluster.frozen import rename_frozen
from paws_hpc.cluster.overview import RunOverview, overviews
from paws_hpc.command import Parser, exit_status, program
from paws_hpc.config import Config
from paws_hpc.files import exclusive
from paws_hpc.stages.attempts import read_attempts
from paws_hpc.stages.run_folder import RunFolder, all_runs, find_run
from paws_hpc.status import runs_text

_LOCK = ".lock"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 if a run is not there or is at work."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.action(options), interrupted="the same command goes on from there")


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--runs", type=Path, default=argparse.SUPPRESS, help="folder of all runs (runs)")
    parser = Parser(prog=program("runs"), description="List, rename or remove runs.", parents=[common])
    parser.set_defaults(action=_list, runs=Path("runs"))
    commands = parser.add_subparsers(metavar="{rename,remove}")
    rename = commands.add_parser("rename", parents=[common], help="give a run another name")
    rename.add_argument("run", metavar="RUN", help="folder of a run, or its name under --runs")
    rename.add_argument("name", metavar="NAME", help="new name, of a folder beside it")
    rename.set_defaults(action=_rename)
    remove = commands.add_parser("remove", parents=[common], help="remove runs with all that they trained")
    remove.add_argument("run", nargs="+", metavar="RUN", help="folder of a run, or its name under --runs")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.set_defaults(action=_remove)
    return parser


def _list(options: argparse.Namespace) -> None:
    Console(width=None if sys.stdout.isatty() else 10_000).print(runs_text(overviews(all_runs(options.runs))))


def _rename(options: argparse.Namespace) -> None:
    path, name = find_run(options.run, options.runs), Config(name=options.name).name  # which checks it
    new = path.with_name(name)
    if new != path and (new.exists() or new.is_symlink()):
        raise ValueError(f"{new} is there already. Choose another name, or remove it first.")
    with _at_rest(path) as overview:
        run = RunFolder(path)
        for frozen in (*path.glob("config.yaml"), *path.glob("submissions/*/config.yaml")):
            rename_frozen(frozen, name)
        if overview.copy_of is not None:  # the original goes on with its runs in W&B, as this one must not
            for folder in [*path.glob("**/wandb")]:
                shutil.rmtree(folder)
        Chain(run).rename(name, copied=overview.copy_of is not None)
        path.rename(new)  # last: until then the same command can be given again
    if RunFolder(new).report.exists():
        from paws_hpc.report.page import build_report  # noqa: PLC0415 - imports matplotlib: seconds

        build_report(new)
    print(f"{path} is now {new}. What was exported of it, or is in W&B, keeps the name under which it was made.")


def _remove(options: argparse.Namespace) -> None:
    with ExitStack() as held:
        emptied, names = [], list[str]()
        for name in options.run:
            if _is_emptied(options.runs / name):
                emptied.append(options.runs / name)
            else:
                names.append(name)
        paths = list(dict.fromkeys(find_run(name, options.runs) for name in names))
        for path, overview in [(path, held.enter_context(_at_rest(path))) for path in paths]:
            size = sum(file.lstat().st_size for file in path.glob("**/*"))
            print(f"{path}: {overview.state}, {size / 1e6:,.1f} MB")
        if not options.yes:
            if not sys.stdin.isatty():
                raise ValueError("removing runs asks for a yes on a terminal. Give --yes where there is none.")
            if input("Remove all of this? It cannot be undone. [y/N] ").strip().lower() not in ("y", "yes"):
                print("Nothing was removed.")
                return
        for path in paths:
            for entry in path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name not in ("chain.json", _LOCK):  # by which it is still a run if this is interrupted
                    entry.unlink()
            RunFolder(path).chain.unlink()
    # NFS keeps a file that is open, under another name, and with it the folder: the locks are closed now.
    for path in [*emptied, *paths]:
        (path / _LOCK).unlink(missing_ok=True)
        path.rmdir()
        print(f"{path} is removed.")


def _is_emptied(path: Path) -> bool:
    """Whether a folder is what an interrupted removal leaves of a run: at most its lock, perhaps as NFS keeps it."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(entry.name == _LOCK or entry.name.startswith(".nfs") for entry in path.iterdir())


@contextmanager
def _at_rest(path: Path) -> Iterator[RunOverview]:
    """Keep launches from a run while the block runs.

    Raises:
        ValueError: it is a link or nothing that a launch began, or a job of it runs, waits, or may do so.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is left alone. Name what it leads to, {path.resolve()}.")
    if not {"id", "submissions"} <= RunFolder(path).describe().keys():
        raise ValueError(f"{path} has no chain.json of a launch, so it may be no run. It is left alone.")
    with exclusive(path / _LOCK, busy=f"A launch of {path} is running. Wait for it, or end it."):
        (overview,) = overviews([path])
        if overview.trouble is not None:
            raise ValueError(f"Slurm cannot say whether jobs of {path} are in its queue: {overview.trouble}")
        if overview.state == "unknown":
            raise ValueError(f"{path} is left alone: {overview.warnings[-1]}")
        for job in overview.jobs:
            active = job.state in ("running", "waiting")
            if job.source == "attempts" and job.silent_s is not None:  # it may have been killed, and wrote no end
                active = is_alive(read_attempts(path / "jobs" / job.job)[-1], own_job_id=None)
            if active:
                raise ValueError(f"{job.job} of {path} is {job.state}. Wait for it, or end it.")
        yield overview


if __name__ == "__main__":
    sys.exit(main())
