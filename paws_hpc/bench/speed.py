"""``bench step``, ``augment``, ``loss``, ``checkpoint``, ``collectives`` and ``all``: how fast training is.

Targets are ratios within one run. Where the machine or the recipe is not the target's, the figure is printed and the
target is called not measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from paws_hpc.bench import collectives, training
from paws_hpc.bench.figures import Figure, Measured, Race, measure_groups
from paws_hpc.bench.peers import data_loader
from paws_hpc.bench.rounds import Candidate, CandidateError, Rates, Round, Work, ratio
from paws_hpc.bench.step_parts import PARTS, plain_images
from paws_hpc.bench.workloads import Workload, describe_sizes, make_images

_STEP, _COMPILED = "paws_hpc, data on the device", "paws_hpc, data on the device, compiled"
_FROM_STORE, _BASELINE = "paws_hpc, from the store", "DataLoader, PIL, per image"
_PLAIN = "plain ResNet-50"
_BATCHED, _PER_IMAGE = "paws_hpc, a batch at once", "PIL, one image after another"
_DIAGNOSED = "with diagnostics in every step"


def bench_speed(options: argparse.Namespace) -> int:
    """Measure the groups that ``options.groups`` names, print tables and write the figures as JSON."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use. Leave --device out to measure the CPU.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(options.recipe, device, options.folder, tuple(options.overrides))
    workload = replace(workload, folder=(options.folder / f"{options.recipe}-{workload.images}").resolve())
    options.steps = options.steps or workload.steps
    sizes = describe_sizes(workload.config())
    return measure_groups(
        f"{options.recipe} on {device}, " + ", ".join(f"{name} {value}" for name, value in sizes.items()),
        {name: partial(MEASURE[name], workload, options) for name in options.groups},
        prepare=partial(make_images, workload),
        rounds=options.rounds,
        about={
            "recipe": options.recipe, "device": device, "sizes": sizes, "overrides": list(options.overrides),
            "steps": options.steps,
        },
        file=options.json or options.folder / f"{options.recipe}-{device}-{options.command}.json",
    )  # fmt: skip


def _candidate(
    name: str, prepare: Callable[..., Work], workload: Workload, *overrides: str, **arguments: Any
) -> Candidate:
    return Candidate(name, prepare, {"workload": workload.with_overrides(*overrides)} | arguments)


def _only_on(recipe: str, machine: str, workload: Workload) -> str | None:
    """``machine``, unless this is the recipe on a GPU: what a target is only for."""
    return None if workload.recipe == recipe and workload.device == "cuda" else machine


def _step(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    steps, cuda = options.steps, workload.device == "cuda"
    candidates = [_candidate(_STEP, training.steps_on_device, workload, steps=steps)]
    if options.from_store or options.baseline:
        candidates.append(_candidate(_FROM_STORE, training.steps_from_store, workload, steps=steps))
    if options.baseline:
        candidates.append(_candidate(_BASELINE, data_loader.training_steps, workload, steps=steps))
    if options.compiled:
        compiled = _candidate(_COMPILED, training.steps_on_device, workload, "pretrain.compile=true", steps=steps)
        candidates.append(compiled)
    if workload.recipe == "imagenet":
        size = {"batch_size": 256, "steps": 20} if cuda else {"batch_size": 2, "steps": 1}
        candidates.append(Candidate(_PLAIN, training.plain_resnet50, {"device": workload.device} | size))
    rates = race(*candidates)
    mine, figures = rates[_STEP], part_figures(rates[_STEP].rounds)
    on_imagenet = _only_on("imagenet", "ImageNet recipe, one H100", workload)
    on_cifar = _only_on("cifar", "CIFAR recipe, one H100", workload)
    if _COMPILED in rates:
        figures.append(Figure(f"{_COMPILED} / eager", ratio(rates[_COMPILED], mine), "x"))
    if _PLAIN in rates:
        figures.append(plain_figure(mine, rates[_PLAIN], plain_images(workload.config()), only_on=on_imagenet))
    if _FROM_STORE in rates:
        stored = rates[_FROM_STORE]
        waits = [100 * each.details["data_wait"] for each in stored.rounds]
        wait = statistics.median(waits) if waits else None
        figures += [
            Figure("from the store / step alone", ratio(stored, mine), "x", 0.95, only_on=on_imagenet),
            Figure("data wait, from the store", wait, "%", 2.0, at_most=True, only_on=on_cifar),
        ]
    if _BASELINE in rates:
        end_to_end = ratio(rates[_FROM_STORE], rates[_BASELINE])
        figures.append(Figure("from the store / DataLoader", end_to_end, "x", 10.0, only_on=on_cifar))
    return rates, figures


def plain_figure(ours: Rates, plain: Rates, worth: float, *, only_on: str | None) -> Figure:
    """Our unlabelled images per second beside the device's rate of plain ResNet-50 images over what one is worth."""
    times = ratio(ours, plain)
    value = None if times is None else times * worth
    return Figure(f"step / (plain ResNet-50 / {worth:.2f})", value, "x", 0.90, only_on=only_on)


def part_figures(rounds: Sequence[Round]) -> list[Figure]:
    """Milliseconds of a step and of what it consists of, medians over rounds, with shares within rounds."""
    parts = [each.details["parts_s"] for each in rounds]
    if not parts:
        return []
    figures = [Figure("step", 1000 * statistics.median(part["step"] for part in parts), "ms")]
    for name in PARTS:
        share = statistics.median(part[name] / part["step"] for part in parts)
        value = 1000 * statistics.median(part[name] for part in parts)
        figures.append(Figure(f"  {name}", value, "ms", share=share))
    return figures


def _augment(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    rates = race(
        _candidate(_BATCHED, training.augmentation, workload, steps=options.steps),
        _candidate(_PER_IMAGE, data_loader.augmentation_per_image, workload, least_s=1.0),
        cores=1,
    )
    return rates, [Figure(f"{_BATCHED} / PIL", ratio(rates[_BATCHED], rates[_PER_IMAGE]), "x")]


def _loss(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    rates = race(
        *(
            _candidate(
                name, training.steps_on_device, workload, f"pretrain.log_every_steps={every}", steps=options.steps
            )
            for name, every in ((_STEP, 10**9), (_DIAGNOSED, 1))
        )
    )
    step, diagnosed = rates[_STEP].rounds, rates[_DIAGNOSED].rounds
    every = workload.config().pretrain.log_every_steps
    diagnostics = diagnostics_share(step, diagnosed, every)
    return rates, [
        *part_figures(step),
        Figure("loss, gather and LARS, of the step", loss_share(step), "%", 3.0, at_most=True),
        Figure(f"diagnostics every {every} steps, of the step", diagnostics, "%", 2.0, at_most=True),
    ]


def loss_share(rounds: Sequence[Round]) -> float | None:
    """Loss, gather and LARS, percent of the step; None without rounds."""
    parts = [each.details["parts_s"] for each in rounds]
    shares = [100 * (part["loss"] + part["loss, backward"] + part["optimiser"]) / part["step"] for part in parts]
    return statistics.median(shares) if shares else None


def diagnostics_share(step: Sequence[Round], diagnosed: Sequence[Round], every: int) -> float | None:
    """Diagnostics in one of ``every`` steps, percent of a step without; None without rounds."""
    if not step or not diagnosed:
        return None
    pairs = [(a.details["parts_s"], b.details["parts_s"]) for a, b in zip(step, diagnosed, strict=True)]
    return statistics.median(100 * (b["loss"] - a["loss"]) / (every * a["step"]) for a, b in pairs)


def _checkpoint(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    saved = race(_candidate("saving", training.saving, workload, steps=max(3, options.steps // 4)))["saving"]
    if saved.failure is not None:
        raise CandidateError(saved.failure)

    def median(name: str) -> float:
        return statistics.median(each.details[name] for each in saved.rounds)

    every = saved.rounds[0].details["checkpoint_every_steps"]
    share = statistics.median(100 * stopped_share(each) for each in saved.rounds)
    return {}, [
        Figure("training stands still, per save", statistics.median(each.seconds for each in saved.rounds), "s"),
        Figure("steps are slower meanwhile by, per save", median("slowed_s"), "s"),
        Figure("writing", median("writing_s"), "s"),
        Figure("size", median("bytes") / 1e6, "MB"),
        Figure("step", 1000 * median("step_s"), "ms"),
        Figure(f"of training with a save every {every} steps", share, "%", 1.0, at_most=True),
    ]


def stopped_share(save: Round) -> float:
    """Of the time between two checkpoints: standing still, and what steps lose while one is being written."""
    lost = save.seconds + max(0.0, save.details["slowed_s"])
    return float(lost / (save.details["checkpoint_every_steps"] * save.details["step_s"]))


def _collectives(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    ranks = options.ranks
    if workload.device == "cuda" and (gpus := torch.cuda.device_count()) < ranks:
        absent = f"they need as many GPUs, and this machine has {gpus}"
        return {}, [Figure(f"collectives on {ranks} ranks", None, absent=absent)]
    seconds = collectives.measure(workload, ranks=ranks, repeats=max(5, options.steps))
    whole = sum(seconds.values())
    return {}, [Figure(name, 1000 * value, "ms", share=value / whole) for name, value in seconds.items()]


MEASURE: dict[str, Callable[[Workload, argparse.Namespace, Race], Measured]] = {
    "step": _step,
    "augment": _augment,
    "loss": _loss,
    "checkpoint": _checkpoint,
    "collectives": _collectives,
}
