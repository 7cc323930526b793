"""Command: measure this program, beside PIL and a DataLoader.

python -m paws_hpc.bench store --images 200 --rounds 1 --only reads
python -m paws_hpc.bench all
python -m paws_hpc.bench step --recipe imagenet --from-store --baseline [FIELD=VALUE ...]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from paws_hpc.bench.bars import bench_bars
from paws_hpc.bench.memory import bench_memory
from paws_hpc.bench.rounds import CandidateError
from paws_hpc.bench.scaling import bench_scaling
from paws_hpc.bench.speed import MEASURE, bench_speed
from paws_hpc.bench.store import GROUPS, bench_store
from paws_hpc.bench.workloads import RECIPES
from paws_hpc.command import Parser, above_zero, at_least, exit_status, program

_SPEED = {
    "step": "a training step and its parts",
    "loss": "loss, gather and LARS as a share of the step",
    "checkpoint": "how long training stands still for a checkpoint",
    "collectives": "the collectives of a step on two ranks, or on all GPUs",
    "all": "all of these, with the data path and the DataLoader baseline",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 measured, 1 could not measure."""
    options = _parser().parse_args(arguments)
    left = "images and the figures of whole groups stay"
    return exit_status(lambda: options.run(options), interrupted=left, errors=(OSError, ValueError, CandidateError))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("bench"), description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="MEASURE")
    store = commands.add_parser("store", help="the image store and the CPU's share of the data path")
    store.add_argument("--images", type=at_least(64), default=2400, help="photographs of 110 KB to make (2400)")
    store.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"of {', '.join(GROUPS)}"
    )
    store.set_defaults(run=bench_store)
    for name, help_text in _SPEED.items():
        command, whole = commands.add_parser(name, help=help_text), name == "all"
        command.add_argument(
            "--recipe", choices=RECIPES, default="digits", help="whose training; smaller without a GPU (digits)"
        )
        command.add_argument("--device", choices=("cpu", "cuda"), help="(a GPU if there is one)")
        command.add_argument("--steps", type=at_least(1), help="of a round (by recipe and device)")
        command.add_argument(
            "--limit", type=above_zero, default=math.inf, help="seconds for all candidates to get ready"
        )
        command.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the recipe's config")
        command.set_defaults(run=bench_speed, command=name, groups=list(MEASURE) if whole else [name])
        command.set_defaults(from_store=whole, baseline=whole, compiled=False, deterministic=False)
        if name == "step":
            command.add_argument("--from-store", action="store_true", help="the step fed from the packed store as well")
            command.add_argument("--baseline", action="store_true", help="and a DataLoader with PIL beside it")
        if name in ("step", "all"):
            command.add_argument(
                "--compiled", action="store_true", help="compiled, and no graph, too; it takes minutes"
            )
            command.add_argument("--deterministic", action="store_true", help="with deterministic=true too")
    for name, command in commands.choices.items():
        rounds = 5 if name == "store" else 3
        command.add_argument(
            "--rounds", type=at_least(1), default=rounds, help="that count, after one that warms up (%(default)s)"
        )
    memory = commands.add_parser("memory", help="what a step keeps on each GPU, without one by a dry run")
    memory.add_argument("--gpus", type=at_least(1), default=1, help="of the run that the overrides make (1)")
    memory.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="a run; without any, the published recipes")
    memory.set_defaults(run=bench_memory)
    scaling = commands.add_parser("scaling", help="a model of the ImageNet recipe's step on 8 to 1,024 GPUs")
    scaling.add_argument("--constants", type=Path, help="file of bench collectives --json, or of some constants")
    scaling.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the recipe's config")
    scaling.set_defaults(run=bench_scaling)
    bars = commands.add_parser("bars", help="the bars of GPU training, from what jobs/gpu_check.sh left in a folder")
    bars.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where it ran (cuda)")
    bars.set_defaults(run=bench_bars)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="file for the figures (in FOLDER)")
        command.add_argument("--folder", type=Path, default=Path("bench"), help="for images and stores (bench)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
