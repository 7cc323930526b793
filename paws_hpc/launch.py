"""Command: compose the config, and submit the chain to Slurm or run it here.

    python -m paws_hpc.launch [experiment=NAME] [FIELD=VALUE ...]
    python -m paws_hpc.launch experiment=NAME hydra/launcher=submitit_slurm [dry_run=true | cancel=true]

Run again, the same command resumes what is unfinished and says so when all is done. ``-m seed=0,1,2`` launches three
and compares them on one page.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paws_hpc.cluster.bootstrap import run_job
from paws_hpc.cluster.chain import Chain, check_begun, forget_untrained
from paws_hpc.cluster.compose import check_named_stores, compose_run, derivation, own_configs, runs_of
from paws_hpc.cluster.frozen import ConfigError, freeze
from paws_hpc.cluster.local import run_chain, submitit_local
from paws_hpc.cluster.overview import overviews
from paws_hpc.cluster.resources import Launcher, resolve
from paws_hpc.cluster.scheduler import SchedulerError
from paws_hpc.cluster.slurm import SlurmChain, cancel_chain
from paws_hpc.command import error_text, exit_status, program
from paws_hpc.config import Config
from paws_hpc.engine.errors import TrainingStoppedError
from paws_hpc.fields import launch_help
from paws_hpc.files import exclusive
from paws_hpc.own_images import Derived
from paws_hpc.progress import Progress
from paws_hpc.report.run_record import read_run
from paws_hpc.report.tables import result_table
from paws_hpc.stages.attempts import LeaseHeldError
from paws_hpc.stages.prepare import check_before_packing
from paws_hpc.stages.run_folder import RunFolder, check_sweep_is_the_scored_one, has_trained, is_done

_SEVERAL = ("-m", "--multirun")
_USER_ERRORS = (ValueError, OSError, TrainingStoppedError, LeaseHeldError, SchedulerError)


def launch(config: Config, launcher: Launcher) -> None:
    """Launch one chain.

    Raises:
        ValueError, OSError, TrainingStoppedError, LeaseHeldError, SchedulerError: a user can repair it.
        KeyboardInterrupt: a person ended it; its text says what of it is saved.
    """
    # Unlike a new handler this one asks for sys.stderr at every record, so that progress stays below what it writes.
    assert logging.lastResort is not None
    above = [logging.lastResort]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=above, force=True)
    run = RunFolder(Path(config.runs) / config.name)
    kind = str(launcher["_target_"]).rpartition(".")[2]
    match kind:
        case "SlurmLauncher":
            _on_slurm(config, run, launcher)
        case "BasicLauncher":
            _here(config, run, kind)
        case "LocalLauncher":
            _here(resolve(config, {"tasks_per_node": launcher["tasks_per_node"]}), run, kind)
        case _:
            raise ConfigError(
                f"hydra/launcher with {kind} cannot run chains. Leave hydra/launcher out to run here, or use "
                "hydra/launcher=submitit_slurm or submitit_local."
            )


def _here(config: Config, run: RunFolder, kind: str) -> None:
    """Run the chain on this machine, and print what came of it."""
    if config.cancel:
        raise ConfigError("cancel is for chains on Slurm: add hydra/launcher=submitit_slurm.")
    if apart := [stage for stage in config.stages if (config.resources[stage].nodes or 1) > 1]:
        resources = config.resources[apart[0]]
        raise ConfigError(
            f"resources.{apart[0]}.nodes={resources.nodes}, but this machine is one node. Add hydra/launcher="
            f"submitit_slurm, or start all ranks here with nodes=1 and tasks_per_node={resources.ranks}."
        )
    if config.dry_run:
        check_begun(config, run)
        check_before_packing(config)
        print(f"{run.path} would run {', '.join(config.stages)} here. Nothing was written.")
        return
    with exclusive(run.path / ".lock", busy=f"Another launch of {run.path} is running. Wait for it, or end it."):
        in_queue = run.chain.exists() and Chain(run).is_submitted  # whose jobs would go on with the former settings
        check_begun(config, run, in_queue=in_queue)
        forget_untrained(config, run)
        freeze(config, run.config)
        if run.result.exists() and "selection" in config.stages:
            check_sweep_is_the_scored_one(config, run)  # which selection would find after all the training before it
        several = any(config.resources[stage].ranks > 1 for stage in config.stages)
        on_ranks = several or kind == "LocalLauncher"
        try:
            worked = run_chain(config, run, submitit_local(config, run) if on_ranks else partial(run_job, run.path))
        except BaseException:
            if not is_done(run.prepare) and not has_trained(run):
                run.config.unlink()
            raise
    if not worked:
        print(f"All stages of {run.path} were done already.")
    table = Table(title=f"{run.path}", show_header=False, title_justify="left")
    for name, value in result_table(read_run(run.path)):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"Report: {run.report}")


def _on_slurm(config: Config, run: RunFolder, launcher: Launcher) -> None:
    """Submit the chain, or show or end it, and print the jobs."""
    if config.cancel:
        if not run.chain.exists():
            raise ConfigError(f"{run.path} has no chain to cancel.")
        ended = cancel_chain(run)
        print(f"{run.path}: cancelled {', '.join(ended)}." if ended else f"{run.path}: no job of it was in the queue.")
        return
    chain = SlurmChain(config, run, launcher)
    if config.dry_run:
        for stage, script in chain.dry_run():
            print(f"# ---- {stage} ----\n{script}")
        return
    if not (submitted := chain.launch()):
        print(f"Nothing to submit: all stages of {run.path} are done or in the queue.")
    else:
        table = Table(title=f"{run.path}: {len(submitted)} jobs submitted", title_justify="left")
        for heading in ("job", "id", "after", "partition"):
            table.add_column(heading)
        for job in submitted:
            table.add_row(job["job"], job["job_id"], job["after"] or "nothing", job["partition"] or "default")
        Console().print(table)
    for warning in overviews([run.path], details=True)[0].warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Watch it: {program('status')} {run.path}")


def _print_derived(table: Sequence[Derived]) -> None:
    """Show what was derived from own images; any of these fields can be given instead."""
    if not table:
        return
    print("Derived from the images (give FIELD=VALUE for another):")
    wide = max(len(f"{each.field}={each.value}") for each in table)
    for each in table:
        print(f"  {f'{each.field}={each.value}':<{wide}}  {each.reason}")


def _compare(composed: Sequence[tuple[Config, Launcher]]) -> None:
    """Write the page that compares runs launched together or, where they were only submitted, print its command."""
    folders = dict.fromkeys(Path(config.runs) / config.name for config, _ in composed)
    runs = [folder for folder in folders if (folder / "chain.json").exists()]
    config, launcher = composed[0]
    if config.dry_run or config.cancel or len(runs) < 2:
        return
    print(f"Compare them: {program('report')} {shlex.join(map(str, runs))}")
    if not str(launcher["_target_"]).endswith("SlurmLauncher"):
        from paws_hpc.report.comparison_page import build_comparison  # noqa: PLC0415 - imports matplotlib: seconds

        try:
            print(f"Comparison: {build_comparison(runs)}")
        except (OSError, ValueError) as error:  # the runs are as they were all the same
            print(f"error: there is no comparison: {error}", file=sys.stderr)


def main() -> int:
    """Launch every run of the arguments, one after another; one that fails does not keep the others from running.

    Returns the exit status. A user's error is one line, or a traceback if HYDRA_FULL_ERROR is set.
    """
    left = "what was not saved yet is done again; the same command goes on from there"
    return exit_status(_main, interrupted=left, errors=() if os.environ.get("HYDRA_FULL_ERROR") else _USER_ERRORS)


def _main() -> int:
    arguments = own_configs(sys.argv[1:])
    flags = [argument for argument in arguments if argument.startswith("-") and argument not in _SEVERAL]
    if {"-h", "--help"} & {*flags}:
        print(launch_help())
        return 0
    if flags:
        raise ConfigError(
            f"{flags[0]} is no option of launch. Fields are given as FIELD=VALUE; --help says more, and "
            f"{program('config')} FIELD=VALUE shows what they make."
        )
    several = any(argument in _SEVERAL for argument in arguments)
    runs = runs_of([argument for argument in arguments if argument not in _SEVERAL])
    with Progress("launch", "reading the config and what it names", show=sys.stderr.isatty()):
        composed = [compose_run(overrides) for overrides in runs]  # all of them before anything starts
    for overrides, (config, _) in zip(runs, composed, strict=True):
        check_named_stores(config, overrides)
    for table in dict.fromkeys(derivation(tuple(overrides))[2] for overrides in runs):
        _print_derived(table)
    if len(runs) > 1 and not several:
        raise ConfigError(f"these arguments ask for {len(runs)} runs: add -m to launch them all.")
    failed = []
    for overrides, (config, launcher) in zip(runs, composed, strict=True):
        try:
            launch(config, launcher)
        except Exception as error:  # the other runs do not depend on it; the exit status says so
            if not several:
                raise
            text = f"error: {error_text(error)}" if isinstance(error, _USER_ERRORS) else traceback.format_exc()
            print(text, file=sys.stderr)
            failed.append(" ".join(overrides))
    if several:
        _compare(composed)
    if failed:
        raise ConfigError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
