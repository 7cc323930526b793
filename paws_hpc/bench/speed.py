"""``bench step``, ``augment``, ``loss``, ``checkpoint``, ``collectives`` and ``all``: how fast training is.

Bars are ratios within one run. Where the machine or the recipe is not the bar's, the figure is there and the bar is
said not to be measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from paws_hpc.bench import collectives
from paws_hpc.bench.contender import Contender
from paws_hpc.bench.counting import NO_GPU, plain_images, training_flops
from paws_hpc.bench.figures import Bar, Figure, Measured, measure_groups, open_console, telling
from paws_hpc.bench.machine import describe
from paws_hpc.bench.recipes import Scene, as_published, describe_sizes, make_images
from paws_hpc.bench.rounds import Entry, Rates, race, ratio
from paws_hpc.bench.timeline import LOSS_PARTS, PARTS
from paws_hpc.config import Config

_DIAGNOSTICS = "diagnostics alone"
_OURS, _OURS_COMPILED = "paws_hpc, data on the device", "paws_hpc, data on the device, compiled"
_FROM_STORE, _BASELINE = "paws_hpc, from the store", "DataLoader, PIL, per image"
_PLAIN, _COMPILED, _MATMUL = "plain ResNet-50", "plain ResNet-50, compiled", "matrix product"
_BATCHED, _PER_IMAGE = "paws_hpc, a batch at once", "PIL, one image after another"
_IMAGENET_GPU, _CIFAR_GPU = "ImageNet recipe, one H100", "CIFAR recipe, one H100"


@dataclass(frozen=True)
class Bench:
    """What the groups share.

    Attributes:
        scene: recipe, device and images.
        rounds: that count.
        steps: of one round.
        ranks: of the collectives.
        from_store, baseline, compiled: whether to measure these too.
        tell: is told what is being done.
    """

    scene: Scene
    rounds: int
    steps: int
    ranks: int
    from_store: bool
    baseline: bool
    compiled: bool
    tell: Callable[[str], None]

    @property
    def cuda(self) -> bool:
        """Whether a GPU trains."""
        return self.scene.device == "cuda"

    def entry(self, name: str, function: str, unit: str = "images/s", **arguments: Any) -> Entry:
        """A contender of this scene."""
        return Entry(name, f"paws_hpc.bench.{function}", {"scene": asdict(self.scene)} | arguments, unit=unit)

    def compiled_entry(self, name: str, function: str, **arguments: Any) -> Entry:
        """The same with ``pretrain.compile``."""
        scene = replace(self.scene, overrides=(*self.scene.overrides, "pretrain.compile=true"))
        return replace(self, scene=scene).entry(name, function, **arguments)

    def race(self, *entries: Entry, on: int | None = None) -> dict[str, Rates]:
        """In turns, on so many cores, or on all."""
        return race(entries, rounds=self.rounds, cores=sorted(os.sched_getaffinity(0))[:on], tell=self.tell)

    def elsewhere(self, recipe: str, *, cuda: bool, words: str) -> str | None:
        """What a bar is for, unless it is for this."""
        return None if self.scene.recipe == recipe and self.cuda == cuda else words


def bench_speed(options: argparse.Namespace) -> int:
    """Measure the groups that ``options.groups`` names, print tables and write the figures as JSON."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use. Leave --device out to measure the CPU.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scene = Scene(options.recipe, device, "", tuple(options.overrides))
    scene = replace(scene, folder=str((options.folder / f"{options.recipe}-{scene.images}").resolve()))
    console, machine, config = open_console(), describe(), scene.config()
    sizes, steps = describe_sizes(config), options.steps or scene.steps
    console.print(
        f"{options.recipe} on {', '.join(machine['gpus']) if device == 'cuda' else 'the CPU'}, "
        f"{machine['cores']} cores of {machine['processor']}, commit {machine['commit']}; "
        + ", ".join(f"{name} {value}" for name, value in sizes.items())
    )
    about = {
        "recipe": options.recipe, "device": device, "sizes": sizes, "overrides": list(options.overrides),
        "rounds": options.rounds, "steps": steps, "machine": machine,
    }  # fmt: skip
    target = options.json or options.folder / f"{options.recipe}-{device}-{options.command}.json"
    with console.status("making images") as status:
        make_images(scene)
        bench = Bench(
            scene, options.rounds, steps, options.ranks, options.from_store, options.baseline, options.compiled,
            telling(status, console),
        )  # fmt: skip
        groups = {name: partial(MEASURE[name], bench, config) for name in options.groups}
        none_failed = measure_groups(console, status, groups, about=about, target=target)
    return 0 if none_failed else 1


def _step(bench: Bench, config: Config) -> Measured:
    entries = [bench.entry(_OURS, "training:on_device_steps", steps=bench.steps)]
    if bench.from_store or bench.baseline:
        entries.append(bench.entry(_FROM_STORE, "training:steps_from_store", steps=bench.steps))
    if bench.baseline:
        entries.append(bench.entry(_BASELINE, "plain_loader:data_loader_steps", steps=bench.steps))
    if bench.compiled:
        entries.append(bench.compiled_entry(_OURS_COMPILED, "training:on_device_steps", steps=bench.steps))
    rates = bench.race(*entries, *_ceilings(bench))
    ours = rates[_OURS]
    found = Measured(rates, _step_bars(bench, config, rates), {})
    if ours.seen:
        found.figures.extend(part_figures(ours.seen))
        found.figures.extend(_device_figures(ours, rates[_MATMUL], training_flops(config)))
    if bench.compiled:
        found.figures.extend(compiled_figures(rates[_OURS_COMPILED], ours))
    return found


def _ceilings(bench: Bench) -> list[Entry]:
    """What the device can do; ResNet-50 where the recipe is made of it."""
    module, device = "paws_hpc.bench.training", {"device": bench.scene.device}
    product = device | {"size": 8192 if bench.cuda else 1536, "steps": 50 if bench.cuda else 4}
    entries = [Entry(_MATMUL, f"{module}:matmul", product, unit="TFLOP/s")]
    if bench.scene.recipe == "imagenet":
        plain = device | {"batch_size": 256 if bench.cuda else 2, "steps": 20 if bench.cuda else 1}
        entries.append(Entry(_PLAIN, f"{module}:plain_resnet50", plain | {"compiled": False}))
        if bench.cuda:
            entries.append(Entry(_COMPILED, f"{module}:plain_resnet50", plain | {"compiled": True}))
    return entries


def _step_bars(bench: Bench, config: Config, rates: dict[str, Rates]) -> list[Bar]:
    """What this run can say of the bars of its recipe, and of those of another: a figure, not whether it is reached."""
    on_imagenet = bench.elsewhere("imagenet", cuda=True, words=_IMAGENET_GPU)
    on_cifar = bench.elsewhere("cifar", cuda=True, words=_CIFAR_GPU)
    bars = []
    if _PLAIN in rates:
        worth = plain_images(config)
        bars.append(plain_bar(rates[_OURS], rates[_PLAIN], worth, elsewhere=on_imagenet))
    if _FROM_STORE in rates:
        stored = rates[_FROM_STORE]
        bars.append(Bar("from the store / step alone", ratio(stored, rates[_OURS]), "x", 0.95, elsewhere=on_imagenet))
        wait = statistics.median(100 * seen["data_wait"] for seen in stored.seen) if stored.seen else None
        bars.append(Bar("data wait, from the store", wait, "%", 2.0, at_most=True, elsewhere=on_cifar))
    if _BASELINE in rates:
        end_to_end = ratio(rates[_FROM_STORE], rates[_BASELINE])
        bars.append(Bar("from the store / DataLoader", end_to_end, "x", 10.0, elsewhere=on_cifar))
    return bars


def plain_bar(ours: Rates, plain: Rates, worth: float, *, elsewhere: str | None) -> Bar:
    """Our unlabelled images per second beside the device's rate of plain ResNet-50 images over what one is worth."""
    times = ratio(ours, plain)
    value = None if times is None else times * worth
    return Bar(f"step / (plain ResNet-50 / {worth:.2f})", value, "x", 0.90, elsewhere=elsewhere)


def part_figures(rounds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Milliseconds of a step and of its parts, medians over rounds, with the share of each within its round."""
    parts = [seen["parts_s"] for seen in rounds]
    figures = [Figure("step", 1000 * statistics.median(part["step"] for part in parts), "ms")]
    for name in PARTS:
        share = statistics.median(part[name] / part["step"] for part in parts)
        figures.append(Figure(f"  {name}", 1000 * statistics.median(part[name] for part in parts), "ms", share))
    return figures


def _device_figures(ours: Rates, product: Rates, flops: int) -> list[Figure]:
    last = ours.seen[-1]
    achieved = [flops / seen["parts_s"]["step"] / 1e12 for seen in ours.seen]
    shares = [mine / ceiling for mine, ceiling in zip(achieved, product.per_s, strict=True)] if product.per_s else []
    waits = last["host_waits"]
    return [
        Figure(
            "encoder's FLOPs / time of a step, and of the matrix product's",
            statistics.median(achieved),
            "TFLOP/s",
            statistics.median(shares) if shares else None,
        ),
        Figure("peak memory", last["peak_memory_gb"], "GB"),
        Figure("waits of the host per step", waits, "", absent=NO_GPU if waits is None else None),
        _breaks("graph breaks", last["graph_breaks"]),
    ]


def _breaks(name: str, reasons: dict[str, int] | None) -> Figure:
    return (
        Figure(name, None, "", absent="nothing was compiled")
        if reasons is None
        else Figure(name, sum(reasons.values()), "")
    )


def compiled_figures(compiled: Rates, written: Rates) -> list[Figure]:
    """What compiling gains, and whether all of it is one graph per size."""
    times = ratio(compiled, written)
    figures = [
        Figure(f"{compiled.name} / as written", times, "x", absent="one of them failed" if times is None else None)
    ]
    if compiled.seen:
        figures.append(_breaks("  its graph breaks", compiled.seen[-1]["graph_breaks"]))
    return figures


def _augment(bench: Bench, config: Config) -> Measured:
    rates = bench.race(
        bench.entry(_BATCHED, "augmenting:augmentation", steps=bench.steps),
        bench.entry(_PER_IMAGE, "augmenting:per_image", least_s=3.0 if bench.cuda else 1.0),
        on=1,
    )
    times = ratio(rates[_BATCHED], rates[_PER_IMAGE])
    figure = Figure(f"{_BATCHED} / PIL", times, "x", absent="one of them failed" if times is None else None)
    return Measured(
        rates, [], {"counted in": "unlabelled images with all their views and supports; one core"}, [figure]
    )


def _loss(bench: Bench, config: Config) -> Measured:
    entries = [
        bench.entry(_OURS, "training:on_device_steps", steps=bench.steps),
        bench.entry("loss alone", "training:loss_alone", "losses/s", published=False, steps=bench.steps),
        bench.entry(_DIAGNOSTICS, "training:diagnostics_alone", "times/s", steps=bench.steps),
    ]
    published = as_published(bench.scene).pretrain.support
    if published != config.pretrain.support:
        rows = published.classes * published.images_per_class * config.views.support_views
        name = f"loss alone, {rows:,} supports of {published.classes} classes"
        entries.append(bench.entry(name, "training:loss_alone", "losses/s", published=True, steps=bench.steps))
    rates = bench.race(*entries)
    ours = rates[_OURS]
    shares = [sum(seen["parts_s"][part] for part in LOSS_PARTS) / seen["parts_s"]["step"] for seen in ours.seen]
    share = 100 * statistics.median(shares) if shares else None
    every, diagnostics = config.pretrain.log_every_steps, None
    if ours.seen and (per_s := rates[_DIAGNOSTICS].median):
        diagnostics = 100 / (per_s * every * statistics.median(seen["parts_s"]["step"] for seen in ours.seen))
    bars = [
        Bar("loss, gather and LARS, of the step", share, "%", 3.0, at_most=True),
        Bar(f"diagnostics every {every} steps, of the step", diagnostics, "%", 2.0, at_most=True),
    ]
    return Measured(rates, bars, {}, part_figures(ours.seen) if ours.seen else [])


def _checkpoint(bench: Bench, config: Config) -> Measured:
    entry = bench.entry("saving", "saving:saving", folder=str(bench.scene.store.parent), steps=max(3, bench.steps // 4))
    bench.tell("saving")
    with closing(Contender(entry.function, entry.arguments, cores=sorted(os.sched_getaffinity(0)))) as contender:
        seen = []
        for _ in range(bench.rounds + 1):
            contender.work()
            seen.append(contender.seen)
    rounds = seen[1:]
    every = rounds[0]["checkpoint_every_steps"]
    shares = [100 * stopped_share(found) for found in rounds]

    def median(name: str) -> float:
        return statistics.median(found[name] for found in rounds)

    figures = [
        Figure("training stands still, per save", median("stall_s"), "s"),
        Figure("steps are slower meanwhile by, per save", median("slowed_s"), "s"),
        Figure("writing", median("writing_s"), "s"),
        Figure("size", median("bytes") / 1e6, "MB"),
        Figure("step", 1000 * median("step_s"), "ms"),
    ]
    bar = Bar(f"of training with a save every {every} steps", statistics.median(shares), "%", 1.0, at_most=True)
    return Measured({}, [bar], {}, figures, {"rounds": rounds})


def stopped_share(found: dict[str, Any]) -> float:
    """Of the time between two checkpoints: standing still, and what steps lost while one was being written."""
    lost = found["stall_s"] + max(0.0, found["slowed_s"])
    return float(lost / (found["checkpoint_every_steps"] * found["step_s"]))


def _collectives(bench: Bench, config: Config) -> Measured:
    if bench.cuda and torch.cuda.device_count() < bench.ranks:
        there = torch.cuda.device_count()
        absent = f"{bench.ranks} ranks need as many GPUs, there {'is' if there == 1 else 'are'} {there}"
        return Measured({}, [], {}, [Figure("collectives", None, "ms", absent=absent)])
    bench.tell(f"collectives on {bench.ranks} ranks")
    found = collectives.measure(bench.scene, ranks=bench.ranks, repeats=max(5, bench.steps))
    whole = sum(kind["seconds"] for kind in found["kinds"].values())
    figures = [
        Figure(
            f"{name}: {kind['calls']} calls, {kind['bytes'] / 1e6:,.3f} MB",
            1000 * kind["seconds"],
            "ms",
            kind["seconds"] / whole,
        )
        for name, kind in found["kinds"].items()
    ]
    seen = {"ranks": found["ranks"], "backend": found["backend"]}
    return Measured({}, [], seen, figures, {"kinds": found["kinds"]})


MEASURE: dict[str, Callable[[Bench, Config], Measured]] = {
    "step": _step,
    "augment": _augment,
    "loss": _loss,
    "checkpoint": _checkpoint,
    "collectives": _collectives,
}
GROUPS = tuple(MEASURE)
