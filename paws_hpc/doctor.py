"""Command: check a cluster before the first submission.

    python -m paws_hpc.doctor experiment=NAME [FIELD=VALUE ...] [--probe]

Takes the overrides of ``python -m paws_hpc.launch``, looks at what such a launch would need, and submits nothing unless
``--probe`` makes it look from a compute node. The exit status is 1 if a problem was found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from paws_hpc.cluster.compose import own_configs, parameters_of
from paws_hpc.cluster.preflight import COMMANDS, CONTROLLER, Check, Parameters, preflight_checks, sbatch_flags
from paws_hpc.cluster.probe import look_from_node
from paws_hpc.cluster.resources import PLACE
from paws_hpc.cluster.scheduler import SchedulerError
from paws_hpc.command import Parser, above_zero, exit_status, program
from paws_hpc.config import Config
from paws_hpc.stages.run_folder import RunFolder

_SLURM = "hydra/launcher=submitit_slurm"
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return exit_status(lambda: _doctor(options), interrupted="a probe's job is cancelled")


def _doctor(options: argparse.Namespace) -> int:
    checks = list(_checks(options))
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print(checks)
    return int(any(check.verdict == "problem" for check in checks))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("doctor"), description="Check a cluster before the first submission.")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=f"as for launch; {_SLURM} goes without")
    parser.add_argument("--config-dir", metavar="FOLDER", help="of recipes of your own (conf)")
    parser.add_argument("--probe", action="store_true", help="submit a tiny job that looks from a compute node")
    parser.add_argument("--probe-timeout", type=above_zero, default=600.0, metavar="S", help="to wait (%(default)g s)")
    parser.add_argument("--json", action="store_true", help="print a list of checks: name, verdict, found, remedy")
    return parser


def _checks(options: argparse.Namespace) -> Iterator[Check]:
    overrides = [*options.overrides, *([] if options.config_dir is None else [f"--config-dir={options.config_dir}"])]
    if not any(override.startswith("hydra/launcher=") for override in overrides):
        overrides.append(_SLURM)
    try:
        config, parameters = parameters_of(own_configs(overrides))
    except ValueError as error:  # a ConfigError, or a size that does not divide by the launcher's ranks
        yield Check("config", "problem", str(error))
        return
    run = RunFolder(Path(config.runs) / config.name)
    yield Check("config", "ok", f"{config.name}: {', '.join(config.stages)}")
    found = list(preflight_checks(config, parameters, run))
    yield from found
    if options.probe and not any(check.name in (COMMANDS, CONTROLLER) for check in found if check.verdict == "problem"):
        yield from _probe(config, parameters, options.probe_timeout)


def _probe(config: Config, parameters: Mapping[str, Parameters], timeout_s: float) -> Iterator[Check]:
    """What a job finds on a node of pre-training's partition."""
    wanted: dict[str, Any] = dict(parameters["pretrain"])
    place = {name: wanted[name] for name in PLACE if name in wanted}
    gpus = {"gpus_per_node": 1} if wanted.get("gpus_per_node") else {}
    stores = [Path(path).resolve() for path in config.data.stores.values() if Path(path).exists()]
    try:
        found = look_from_node(Path(config.runs), stores, sbatch_flags(place | gpus), timeout_s=timeout_s)
    except (TimeoutError, OSError, SchedulerError) as error:
        remedy = "Is the run directory, and Python, on a file system that the nodes share?"
        yield Check("probe", "problem", str(error), remedy)
        return
    yield Check("probe", "ok", f"{found['host']} sees and writes {config.runs}, Python {found['python']}")
    packages = found["packages"]
    broken = {name: version for name, version in packages.items() if version.startswith("cannot")}
    for name, why in broken.items():
        yield Check("probe: packages", "problem", f"{name} {why}", "Install the environment where the nodes see it.")
    if not broken:
        versions = f"torch {packages['torch']}, CUDA {found['cuda'] or 'none'}, NCCL {found['nccl'] or 'none'}"
        yield Check("probe: packages", "ok", versions)
    if gpus and not found["devices"]:
        text = "torch finds no GPU in a job that has one"
        yield Check("probe: devices", "problem", text, "Does the driver fit torch's CUDA?")
    elif gpus:
        yield Check("probe: devices", "ok", ", ".join(found["devices"]))
    elif config.device == "cuda":
        yield Check("probe: devices", "warning", "the job has no GPU", "Set hydra.launcher.gpus_per_node.")
    for path, images in found["stores"].items():
        if isinstance(images, int):
            yield Check("probe: store", "ok", f"{path}: {images:,} images")
        else:
            yield Check("probe: store", "problem", f"{path}: {images}", "Put it where the nodes see it.")


def _print(checks: Sequence[Check]) -> None:
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    for check in checks:
        line = Text.assemble((f"{check.verdict:<9}", _STYLES[check.verdict]), (f"{check.name}: ", "bold"), check.found)
        console.print(line)
        if check.remedy:
            console.print(Text(f"{'':<9}→ {check.remedy}"))
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in _STYLES}
    print(f"{counts['problem']} to mend, {counts['warning']} to think about, {counts['ok']} ok")


if __name__ == "__main__":
    sys.exit(main())
