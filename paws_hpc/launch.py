"""Command: compose the config and run the chain.

    python -m paws_hpc.launch [experiment=NAME] [FIELD=VALUE ...]

Run again, the same command resumes what is unfinished and says so when all is done.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from paws_hpc.cluster.frozen import ConfigError, explain, freeze, to_config
from paws_hpc.cluster.local import Runner, in_process, run_chain, submitit_local
from paws_hpc.config import Config
from paws_hpc.engine.metrics import TrainingStoppedError
from paws_hpc.files import exclusive
from paws_hpc.stages.report_tables import result_table
from paws_hpc.stages.run_folder import RunFolder

CONF = Path(__file__).resolve().parent.parent / "conf"
ConfigStore.instance().store(name="schema", node=Config)


def launch(composed: DictConfig) -> None:
    """Run one chain; what a user can mend ends as one message, with a traceback if HYDRA_FULL_ERROR is set."""
    try:
        _launch(composed)
    except (ValueError, OSError, TrainingStoppedError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {error}")  # not through Hydra, which would print its own advice around it


def _launch(composed: DictConfig) -> None:
    """Freeze the config, run the chain, print the table."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    config = to_config(OmegaConf.to_container(composed, resolve=True))
    run = RunFolder(Path(config.runs) / config.name)
    with exclusive(run.path / ".lock", busy=f"Another launch of {run.path} is running. Wait for it, or end it."):
        _run(config, run)


def _run(config: Config, run: RunFolder) -> None:
    freeze(config, run.config)
    finished = run.result.exists()
    worked = run_chain(config, run, _runner(config, run))
    if not any(job.startswith(("pretrain", "finetune", "baseline")) for job in worked) and finished:
        print(f"All stages of {run.path} were done already.")
    _print_table(run)


def _runner(config: Config, run: RunFolder) -> Runner:
    """How the launcher that Hydra composed runs a job."""
    composed = HydraConfig.get()
    target = composed.launcher["_target_"]
    kind = target.rpartition(".")[2]
    several = [stage for stage, used in vars(config.resources).items() if used.ranks > 1]
    if composed.mode == RunMode.MULTIRUN and kind != "BasicLauncher":
        raise ConfigError("Leave hydra/launcher out with -m: chains then run here, one after another.")
    match kind:
        case "BasicLauncher" if not several:
            return in_process(run)
        case "BasicLauncher" | "LocalLauncher":
            return submitit_local(config, run)
        case _:
            raise ConfigError(
                f"hydra/launcher with {kind} cannot run chains yet. Leave hydra/launcher out to run here, or use "
                "hydra/launcher=submitit_local."
            )


def _print_table(run: RunFolder) -> None:
    table = Table(title=f"{run.path}", show_header=False, title_justify="left")
    for name, value in result_table(run.path):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"Report: {run.report}")


def _check_overrides(arguments: list[str]) -> None:
    """Compose once before Hydra does, so that a misspelt field is one clear line.

    Raises:
        ConfigError: the config does not compose.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([text for text in arguments if not text.startswith("-")])
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            hydra.compose("config", overrides=[_one_of(override) for override in overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def _one_of(override: Override) -> str:
    """The override itself, or the first value of a sweep such as ``seed=0,1,2``."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def main() -> None:
    """Entry point."""
    try:
        if not any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in sys.argv[1:]):
            _check_overrides(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(launch)()


if __name__ == "__main__":
    main()
