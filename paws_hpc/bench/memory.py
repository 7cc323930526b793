"""``bench memory``: what a step of pre-training keeps on each GPU, of the published recipes or of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from paws_hpc.bench.dry_run import StepMemory, dry_run, measured_peak
from paws_hpc.bench.figures import describe_machine
from paws_hpc.cluster.compose import compose_run
from paws_hpc.config import Config
from paws_hpc.files import write_json

GPUS_GB = (16, 24, 40, 80, 141)
_USABLE = 0.9  # of a GPU: the rest is for the CUDA context, workspaces of libraries and what the allocator cannot use
_RECOMPUTED = "model.checkpoint_activations=true"


@dataclass(frozen=True)
class Setting:
    """A network, on how many GPUs, and the overrides that make the run."""

    network: str
    gpus: int
    overrides: tuple[str, ...]


def _imagenet(network: str, *overrides: str) -> list[Setting]:
    overrides = overrides or ("experiment=imagenet_10pct", f"model={network}")
    return [Setting(network, 64, overrides), Setting(network, 64, (*overrides, _RECOMPUTED))]


PUBLISHED = (
    *_imagenet("resnet50"),
    Setting("resnet50", 8, ("experiment=imagenet_10pct", "pretrain.accumulate_steps=8")),
    *_imagenet("resnet50_2x"),
    *_imagenet("resnet50_4x"),
    *_imagenet("vit_s16", "experiment=imagenet_10pct_vit"),
    Setting("wrn28_2", 1, ("experiment=cifar10_4000",)),
    Setting("wrn28_2", 1, ("experiment=cifar10_4000", "pretrain.accumulate_steps=4")),
    Setting("small_resnet", 1, ("experiment=digits",)),
)


def bench_memory(options: argparse.Namespace) -> int:
    """Print the table of the published recipes, or of the run that ``options.overrides`` make, and write JSON."""
    overrides = tuple(options.overrides)
    settings = [Setting("the run", options.gpus, overrides)] if overrides else PUBLISHED
    records, machine = [], describe_machine()
    print(markdown(("network, GPUs and setting", *StepMemory.__annotations__, "measured peak", "fits in"), []))
    for setting in settings:
        config, _ = compose_run(list(setting.overrides))
        memory, _ = dry_run(config, ranks=setting.gpus)
        peak = _measured(config, setting.gpus) if torch.cuda.is_available() else None
        print(_line(_cells(setting, memory, peak)), flush=True)
        records.append(asdict(setting) | {"estimated": asdict(memory), "measured_peak": peak})
        write_json(options.json or options.folder / "memory.json", {"machine": machine, "settings": records})
    print("\nGB per GPU, estimated by a dry run of the step; a measured peak is of one rank's share alone, as it runs.")
    return 0


def _measured(config: Config, gpus: int) -> int | str:
    """The measured peak in bytes, or ``does not fit`` where this GPU has too little memory."""
    try:
        return measured_peak(config, ranks=gpus)
    except torch.OutOfMemoryError:
        return "does not fit"


def _cells(setting: Setting, memory: StepMemory, measured: int | str | None) -> list[str]:
    changes = [each for each in setting.overrides if not each.startswith(("experiment=", "model="))]
    fits = [size for size in GPUS_GB if memory.peak <= _USABLE * size * 1e9]
    return [
        ", ".join([setting.network, str(setting.gpus), *changes]),
        *(f"{value / 1e9:.3g}" for value in asdict(memory).values()),
        f"{measured / 1e9:.3g}" if isinstance(measured, int) else measured or "",
        f"{fits[0]} GB" if fits else "none of these",
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as it stands in ``docs/``."""
    return "\n".join(_line(cells) for cells in (head, ["---", *["--:"] * (len(head) - 1)], *rows))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
