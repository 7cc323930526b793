"""``bench step``, ``loss``, ``checkpoint``, ``collectives`` and ``all``: how fast training is.

Targets are ratios within one run. Where the machine or the recipe is not the target's, the figure is printed and the
target is called not measured.
"""

from __future__ import annotations

import argparse
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from paws_hpc.bench import bars, collectives, training
from paws_hpc.bench.figures import Figure, Measured, Race, measure_groups
from paws_hpc.bench.peers import data_loader
from paws_hpc.bench.rounds import Candidate, CandidateError, Rates, Round, median, ratio
from paws_hpc.bench.step_parts import PARTS
from paws_hpc.bench.workloads import Workload, describe_sizes, make_images, plain_images

_STEP = "paws_hpc, data on the device"
_FROM_STORE, _BASELINE = "paws_hpc, from the store", "DataLoader, PIL, per image"
_DETERMINISTIC = "paws_hpc, data on the device, deterministic"
_PLAIN, _PLAIN_COMPILED = "plain ResNet-50", "plain ResNet-50, compiled"
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
        limit_s=options.limit,
        about={
            "recipe": options.recipe, "device": device, "sizes": sizes, "overrides": list(options.overrides),
            "steps": options.steps,
        },
        file=options.json or options.folder / f"{options.recipe}-{device}-{options.command}.json",
    )  # fmt: skip


def _on_device(workload: Workload, options: argparse.Namespace, *overrides: str) -> Candidate:
    workload = replace(workload, overrides=(*workload.overrides, *overrides))
    return partial(training.steps_on_device, workload, options.steps)


def _step(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    steps, cuda = options.steps, workload.device == "cuda"
    usual = workload.config().pretrain.execution_on(workload.device)
    others = ("compiled",) if options.compiled else ()
    names = {execution: f"{_STEP}, {execution}" for execution in ("eager", usual, *others)}
    candidates: dict[str, Candidate] = {
        name: _on_device(workload, options, f"pretrain.execution={execution}") for execution, name in names.items()
    }
    plain = _PLAIN if usual == "eager" else _PLAIN_COMPILED
    if workload.recipe == "imagenet":
        sizes = (256, 20) if cuda else (2, 1)
        candidates[plain] = partial(training.plain_resnet50, workload.device, *sizes, compiled=plain == _PLAIN_COMPILED)
    if options.from_store or options.baseline:
        candidates[_FROM_STORE] = partial(training.steps_from_store, workload, steps)
    if options.baseline:
        candidates[_BASELINE] = partial(data_loader.training_steps, workload, steps)
    if options.deterministic:
        candidates[_DETERMINISTIC] = _on_device(workload, options, "deterministic=true")
    rates = race(candidates)
    eager, mine = rates[names.pop("eager")], rates[f"{_STEP}, {usual}"]
    figures = part_figures(eager.rounds)
    figures += [Figure(f"{execution} / eager", ratio(rates[name], eager), "x") for execution, name in names.items()]
    on_imagenet, on_cifar = (
        None if cuda and workload.recipe == recipe else f"{name} recipe, one H100"
        for recipe, name in (("imagenet", "ImageNet"), ("cifar", "CIFAR"))
    )
    if _DETERMINISTIC in rates:
        figures.append(Figure("deterministic / default", ratio(rates[_DETERMINISTIC], mine), "x"))
    share, times = loss_share(eager.rounds), ratio(mine, eager)
    of_default = None if share is None or times is None else share * times
    figures.append(Figure("loss, gather and LARS, of the default step", of_default, "%"))
    if plain in rates:
        figures.append(plain_figure(mine, rates[plain], plain_images(workload.config()), only_on=on_imagenet))
    if _FROM_STORE in rates:
        stored = rates[_FROM_STORE]
        wait = median(100 * each.details["data_wait"] for each in stored.rounds)
        figures += [
            Figure("from the store / step alone", ratio(stored, mine), "x", bars.FROM_STORE, only_on=on_imagenet),
            Figure("data wait, from the store", wait, "%", 2.0, at_most=True, only_on=on_cifar),
        ]
    if _BASELINE in rates:
        end_to_end = ratio(rates[_FROM_STORE], rates[_BASELINE])
        figures.append(Figure("from the store / DataLoader", end_to_end, "x", bars.BASELINE, only_on=on_cifar))
    return rates, figures


def plain_figure(ours: Rates, plain: Rates, worth: float, *, only_on: str | None) -> Figure:
    """Our unlabelled images per second beside the device's rate of plain ResNet-50 images over what one is worth."""
    times = ratio(ours, plain)
    value = None if times is None else times * worth
    return Figure(bars.PLAIN, value, "x", bars.DEVICE_LIMIT, only_on=only_on)


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


def _loss(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    eager = "pretrain.execution=eager"  # whose parts can be told apart
    candidates = {
        _STEP: _on_device(workload, options, eager, f"pretrain.log_every_steps={10**9}"),
        _DIAGNOSED: _on_device(workload, options, eager, "pretrain.log_every_steps=1"),
    }
    rates, every = race(candidates), workload.config().pretrain.log_every_steps
    on_gpu = None if workload.device == "cuda" else "one H100 or H200"
    step, diagnosed = rates[_STEP].rounds, rates[_DIAGNOSED].rounds
    diagnostics = diagnostics_share(step, diagnosed, every)
    return rates, [
        *part_figures(step),
        Figure("loss, gather and LARS, of the step", loss_share(step), "%", bars.LOSS, at_most=True, only_on=on_gpu),
        Figure(f"diagnostics every {every} steps, of the step", diagnostics, "%", 2.0, at_most=True),
    ]


def loss_share(rounds: Sequence[Round]) -> float | None:
    """Loss, gather and LARS, percent of the step; None without rounds."""
    parts = [each.details["parts_s"] for each in rounds]
    return median(100 * (part["loss"] + part["loss, backward"] + part["optimiser"]) / part["step"] for part in parts)


def diagnostics_share(step: Sequence[Round], diagnosed: Sequence[Round], every: int) -> float | None:
    """What diagnostics every ``every`` steps add to the mean step, in percent; None if a measurement failed."""
    pairs = [(a.details["parts_s"], b.details["parts_s"]) for a, b in zip(step, diagnosed, strict=False)]
    return median(100 * (b["loss"] - a["loss"]) / (every * a["step"]) for a, b in pairs)


def _checkpoint(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    saved = race({"saving": partial(training.saving, workload, max(3, options.steps // 4))})["saving"]
    if saved.failure is not None:
        raise CandidateError(saved.failure)
    details = {name: statistics.median(each.details[name] for each in saved.rounds) for name in saved.rounds[0].details}
    share = statistics.median(100 * stopped_share(each) for each in saved.rounds)
    every = details["checkpoint_every_steps"]
    return {}, [
        Figure("training stands still, per save", statistics.median(each.seconds for each in saved.rounds), "s"),
        Figure("steps are slower meanwhile by, per save", details["slowed_s"], "s"),
        Figure("writing", details["writing_s"], "s"),
        Figure("size", details["bytes"] / 1e6, "MB"),
        Figure("step", 1000 * details["step_s"], "ms"),
        Figure(f"of training with a save every {every:g} steps", share, "%", 1.0, at_most=True),
    ]


def stopped_share(save: Round) -> float:
    """Of the time between two checkpoints: standing still, and what steps lose while one is being written."""
    lost = save.seconds + max(0.0, save.details["slowed_s"])
    return float(lost / (save.details["checkpoint_every_steps"] * save.details["step_s"]))


def _collectives(workload: Workload, options: argparse.Namespace, race: Race) -> Measured:
    ranks = 2
    if workload.device == "cuda" and (ranks := torch.cuda.device_count()) < 2:
        return {}, [Figure("collectives", None, absent="they need two GPUs, and this machine has one")]
    seconds = collectives.measure(workload, ranks=ranks, repeats=max(5, options.steps))
    small, large = (seconds.pop(name) for name in (collectives.SMALL, collectives.LARGE))
    steps = {name: seconds.pop(name) for name in collectives.STEPS.values()}
    whole = sum(seconds.values())
    bandwidth = 2 * collectives.LARGE_BYTES * (ranks - 1) / ranks / large
    return {}, [
        *(Figure(name, 1000 * value, "ms", share=value / whole) for name, value in seconds.items()),
        Figure(collectives.SMALL, 1000 * small, "ms"),
        Figure(collectives.BANDWIDTH, bandwidth / 1e9, "GB/s"),
        *(Figure(name, 1000 * value, "ms") for name, value in steps.items()),
        Figure("global / local statistics", operator.truediv(*steps.values()), "x"),
    ]


MEASURE: dict[str, Callable[[Workload, argparse.Namespace, Race], Measured]] = {
    "step": _step,
    "loss": _loss,
    "checkpoint": _checkpoint,
    "collectives": _collectives,
}
