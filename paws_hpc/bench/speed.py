"""``bench step``, ``augment``, ``loss``, ``checkpoint``, ``collectives`` and ``all``: how fast training is.

Targets are ratios within one run. Where the machine or the recipe is not the target's, the figure is printed and the
target is called not measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from paws_hpc.bench import collectives, training
from paws_hpc.bench.figures import (
    Figure,
    Measured,
    Target,
    describe_machine,
    measure_groups,
    open_console,
    progress_line,
)
from paws_hpc.bench.peers import data_loader
from paws_hpc.bench.rounds import Candidate, CandidateError, Rates, Round, Work, race, ratio
from paws_hpc.bench.step_parts import LOSS_PARTS, PARTS, plain_images
from paws_hpc.bench.workloads import Workload, describe_sizes, make_images
from paws_hpc.config import Config

_STEP, _COMPILED = "paws_hpc, data on the device", "paws_hpc, data on the device, compiled"
_FROM_STORE, _BASELINE = "paws_hpc, from the store", "DataLoader, PIL, per image"
_PLAIN = "plain ResNet-50"
_BATCHED, _PER_IMAGE = "paws_hpc, a batch at once", "PIL, one image after another"
_DIAGNOSED = "with diagnostics in every step"
_IMAGENET_GPU, _CIFAR_GPU = "ImageNet recipe, one H100", "CIFAR recipe, one H100"


@dataclass(frozen=True)
class Bench:
    """What the groups share.

    Attributes:
        workload: recipe, device and images.
        rounds: that count.
        steps: of one round.
        ranks: of the collectives.
        from_store, baseline, compiled: whether to measure these too.
        progress: shows a line of text.
    """

    workload: Workload
    rounds: int
    steps: int
    ranks: int
    from_store: bool
    baseline: bool
    compiled: bool
    progress: Callable[[str], None]

    @property
    def cuda(self) -> bool:
        """Whether a GPU trains."""
        return self.workload.device == "cuda"

    def candidate(self, name: str, prepare: Callable[..., Work], *overrides: str, **arguments: Any) -> Candidate:
        """A candidate that works on this workload, with further overrides of its config."""
        return Candidate(name, prepare, {"workload": self.workload.with_overrides(*overrides)} | arguments)

    def race(self, *candidates: Candidate, cores: int | None = None) -> dict[str, Rates]:
        """In turns, on so many cores, or on all."""
        return race(candidates, rounds=self.rounds, cores=cores, progress=self.progress)

    def unless(self, recipe: str, machine: str) -> str | None:
        """``machine``, unless this is the recipe on a GPU: what a target is only for."""
        return None if self.workload.recipe == recipe and self.cuda else machine


def bench_speed(options: argparse.Namespace) -> int:
    """Measure the groups that ``options.groups`` names, print tables and write the figures as JSON."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use. Leave --device out to measure the CPU.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(options.recipe, device, options.folder, tuple(options.overrides))
    workload = replace(workload, folder=(options.folder / f"{options.recipe}-{workload.images}").resolve())
    console, machine, config = open_console(), describe_machine(), workload.config()
    sizes, steps = describe_sizes(config), options.steps or workload.steps
    console.print(
        f"{options.recipe} on {', '.join(machine['gpus']) if device == 'cuda' else 'the CPU'}, "
        f"{machine['cores']} cores of {machine['processor']}, commit {machine['commit']}; "
        + ", ".join(f"{name} {value}" for name, value in sizes.items())
    )
    about = {
        "recipe": options.recipe, "device": device, "sizes": sizes, "overrides": list(options.overrides),
        "rounds": options.rounds, "steps": steps, "machine": machine,
    }  # fmt: skip
    file = options.json or options.folder / f"{options.recipe}-{device}-{options.command}.json"
    with console.status("making images") as status:
        make_images(workload)
        bench = Bench(
            workload, options.rounds, steps, options.ranks, options.from_store, options.baseline, options.compiled,
            progress_line(status, console),
        )  # fmt: skip
        groups = {name: partial(MEASURE[name], bench, config) for name in options.groups}
        return measure_groups(console, status, groups, about=about, file=file)


def _step(bench: Bench, config: Config) -> Measured:
    candidates = [bench.candidate(_STEP, training.steps_on_device, steps=bench.steps)]
    if bench.from_store or bench.baseline:
        candidates.append(bench.candidate(_FROM_STORE, training.steps_from_store, steps=bench.steps))
    if bench.baseline:
        candidates.append(bench.candidate(_BASELINE, data_loader.training_steps, steps=bench.steps))
    if bench.compiled:
        candidates.append(
            bench.candidate(_COMPILED, training.steps_on_device, "pretrain.compile=true", steps=bench.steps)
        )
    if bench.workload.recipe == "imagenet":
        size = {"batch_size": 256, "steps": 20} if bench.cuda else {"batch_size": 2, "steps": 1}
        candidates.append(Candidate(_PLAIN, training.plain_resnet50, {"device": bench.workload.device} | size))
    rates = bench.race(*candidates)
    figures = []
    if rates[_STEP].rounds:
        last = rates[_STEP].rounds[-1].details
        figures = [
            *part_figures(rates[_STEP].rounds),
            Figure("peak memory", last["peak_memory_gb"], "GB"),
            Figure("waits of the host per step", last["host_waits"], "", absent="no GPU"),
        ]
    if bench.compiled:
        figures += compiled_figures(rates[_COMPILED], rates[_STEP])
    return Measured(rates, _step_targets(bench, config, rates), figures)


def _step_targets(bench: Bench, config: Config, rates: dict[str, Rates]) -> list[Target]:
    on_imagenet, on_cifar = bench.unless("imagenet", _IMAGENET_GPU), bench.unless("cifar", _CIFAR_GPU)
    targets = []
    if _PLAIN in rates:
        targets.append(plain_target(rates[_STEP], rates[_PLAIN], plain_images(config), only_on=on_imagenet))
    if _FROM_STORE in rates:
        stored = rates[_FROM_STORE]
        targets.append(
            Target("from the store / step alone", ratio(stored, rates[_STEP]), "x", 0.95, only_on=on_imagenet)
        )
        waits = [100 * each.details["data_wait"] for each in stored.rounds]
        wait = statistics.median(waits) if waits else None
        targets.append(Target("data wait, from the store", wait, "%", 2.0, at_most=True, only_on=on_cifar))
    if _BASELINE in rates:
        end_to_end = ratio(rates[_FROM_STORE], rates[_BASELINE])
        targets.append(Target("from the store / DataLoader", end_to_end, "x", 10.0, only_on=on_cifar))
    return targets


def plain_target(ours: Rates, plain: Rates, worth: float, *, only_on: str | None) -> Target:
    """Our unlabelled images per second beside the device's rate of plain ResNet-50 images over what one is worth."""
    times = ratio(ours, plain)
    value = None if times is None else times * worth
    return Target(f"step / (plain ResNet-50 / {worth:.2f})", value, "x", 0.90, only_on=only_on)


def part_figures(rounds: Sequence[Round]) -> list[Figure]:
    """Milliseconds of a step and of its parts, medians over rounds, with the share of each within its round."""
    parts = [each.details["parts_s"] for each in rounds]
    figures = [Figure("step", 1000 * statistics.median(part["step"] for part in parts), "ms")]
    for name in PARTS:
        share = statistics.median(part[name] / part["step"] for part in parts)
        figures.append(Figure(f"  {name}", 1000 * statistics.median(part[name] for part in parts), "ms", share))
    return figures


def compiled_figures(compiled: Rates, eager: Rates) -> list[Figure]:
    """What compiling gains, and how often it leaves the graph."""
    figures = [Figure(f"{compiled.name} / eager", ratio(compiled, eager), "x")]
    if compiled.rounds:
        breaks = compiled.rounds[-1].details["graph_breaks"]
        figures.append(Figure("  its graph breaks", breaks, "", absent="nothing was compiled"))
    return figures


def _augment(bench: Bench, config: Config) -> Measured:
    rates = bench.race(
        bench.candidate(_BATCHED, training.augmentation, steps=bench.steps),
        bench.candidate(_PER_IMAGE, data_loader.augmentation_per_image, least_s=3.0 if bench.cuda else 1.0),
        cores=1,
    )
    return Measured(rates, figures=[Figure(f"{_BATCHED} / PIL", ratio(rates[_BATCHED], rates[_PER_IMAGE]), "x")])


def _loss(bench: Bench, config: Config) -> Measured:
    def steps(name: str, every: int) -> Candidate:
        override = f"pretrain.log_every_steps={every}"
        return bench.candidate(name, training.steps_on_device, override, steps=bench.steps)

    rates = bench.race(steps(_STEP, 10**9), steps(_DIAGNOSED, 1))
    step, diagnosed = rates[_STEP].rounds, rates[_DIAGNOSED].rounds
    every = config.pretrain.log_every_steps
    return Measured(
        rates,
        [
            Target("loss, gather and LARS, of the step", loss_share(step), "%", 3.0, at_most=True),
            Target(
                f"diagnostics every {every} steps, of the step",
                diagnostics_share(step, diagnosed, every),
                "%",
                2.0,
                at_most=True,
            ),
        ],
        part_figures(step) if step else [],
    )


def loss_share(rounds: Sequence[Round]) -> float | None:
    """Loss, gather and LARS, percent of the step; None without rounds."""
    parts = [each.details["parts_s"] for each in rounds]
    shares = [100 * sum(part[name] for name in LOSS_PARTS) / part["step"] for part in parts]
    return statistics.median(shares) if shares else None


def diagnostics_share(step: Sequence[Round], diagnosed: Sequence[Round], every: int) -> float | None:
    """Diagnostics in one of ``every`` steps, percent of a step without; None without rounds."""
    if not step or not diagnosed:
        return None
    pairs = [(a.details["parts_s"], b.details["parts_s"]) for a, b in zip(step, diagnosed, strict=True)]
    return statistics.median(100 * (b["loss"] - a["loss"]) / (every * a["step"]) for a, b in pairs)


def _checkpoint(bench: Bench, config: Config) -> Measured:
    candidate = bench.candidate("saving", training.saving, steps=max(3, bench.steps // 4))
    saved = bench.race(replace(candidate, unit="saves/s"))["saving"]
    if saved.failure is not None:
        raise CandidateError(saved.failure)

    def median(name: str) -> float:
        return statistics.median(each.details[name] for each in saved.rounds)

    every = saved.rounds[0].details["checkpoint_every_steps"]
    share = statistics.median(100 * stopped_share(each) for each in saved.rounds)
    return Measured(
        {},
        [Target(f"of training with a save every {every} steps", share, "%", 1.0, at_most=True)],
        [
            Figure("training stands still, per save", statistics.median(each.seconds for each in saved.rounds), "s"),
            Figure("steps are slower meanwhile by, per save", median("slowed_s"), "s"),
            Figure("writing", median("writing_s"), "s"),
            Figure("size", median("bytes") / 1e6, "MB"),
            Figure("step", 1000 * median("step_s"), "ms"),
        ],
    )


def stopped_share(save: Round) -> float:
    """Of the time between two checkpoints: standing still, and what steps lose while one is being written."""
    lost = save.seconds + max(0.0, save.details["slowed_s"])
    return float(lost / (save.details["checkpoint_every_steps"] * save.details["step_s"]))


def _collectives(bench: Bench, config: Config) -> Measured:
    name = f"collectives on {bench.ranks} ranks"
    if bench.cuda and (gpus := torch.cuda.device_count()) < bench.ranks:
        absent = f"they need as many GPUs, and this machine has {gpus}"
        return Measured(figures=[Figure(name, None, "ms", absent=absent)])
    bench.progress(name)
    seconds = collectives.measure(bench.workload, ranks=bench.ranks, repeats=max(5, bench.steps))
    whole = sum(seconds.values())
    return Measured(figures=[Figure(each, 1000 * value, "ms", value / whole) for each, value in seconds.items()])


MEASURE: dict[str, Callable[[Bench, Config], Measured]] = {
    "step": _step,
    "augment": _augment,
    "loss": _loss,
    "checkpoint": _checkpoint,
    "collectives": _collectives,
}
