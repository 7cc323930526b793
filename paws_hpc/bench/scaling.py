"""``bench scaling``: a model of the step's time on many GPUs, from the collectives that a dry run counts.

Compute is one GPU's measured step; a collective takes what NCCL's own tuning model gives it. See docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from paws_hpc.bench.dry_run import BATCH_NORM, GRADIENTS, LOSS, Collective, dry_run
from paws_hpc.bench.memory import markdown
from paws_hpc.cluster.compose import compose_run
from paws_hpc.config import Config
from paws_hpc.files import read_json, write_json

_RECIPE_GPUS = 64  # of the published ImageNet recipe: 64 images and 105 supports each
_MEASURED = {"small all-reduce": ("launch_s", 1e-3), "bandwidth of an all-reduce": ("node_bandwidth", 1e9)}


@dataclass(frozen=True)
class Constants:
    """Where the model's times come from. ``bench scaling --constants FILE`` replaces any of them.

    Attributes:
        step_s: of one micro-batch on one GPU alone: 64 images in ResNet-50's recipe, H200, compiled, measured.
        backward_share: of it, during which gradients can travel: twice the forward pass's operations.
        gpus_per_node: with NVLink between them.
        launch_s: of any collective; this and the two below from NCCL's src/graph/tuning.cc, protocol LL.
        node_hop_s: from GPU to GPU over NVLink.
        network_hop_s: from node to node, in a ring; ``tree_hop_s`` in a tree.
        node_bandwidth: bytes per second of a GPU over NVLink: what the same source takes for Hopper.
        network_bandwidth: the same between nodes: one InfiniBand NDR port of 400 Gbit/s per GPU.
    """

    step_s: float = 64 / 859
    backward_share: float = 2 / 3
    gpus_per_node: int = 8
    launch_s: float = 6.6e-6
    node_hop_s: float = 0.6e-6
    network_hop_s: float = 2.7e-6
    tree_hop_s: float = 5.0e-6
    node_bandwidth: float = 360e9
    network_bandwidth: float = 50e9


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by what they go to, and what share of them the GPUs compute."""

    compute_s: float
    batch_norm_s: float
    loss_s: float
    gradients_s: float  # beyond the backward pass

    @property
    def step_s(self) -> float:
        """All of them."""
        return self.compute_s + self.batch_norm_s + self.loss_s + self.gradients_s


def collective_s(collective: Collective, gpus: int, constants: Constants) -> float:
    """Latency of the hops, and the bytes that pass a GPU's slowest link.

    All-gather and reduce-scatter go round a ring of all GPUs; an all-reduce twice, or up and down a tree of the nodes.
    """
    nodes = -(-gpus // constants.gpus_per_node)
    between = nodes if nodes > 1 else 0
    ring = (gpus - 1 - between) * constants.node_hop_s + between * constants.network_hop_s
    times = 1
    if collective.kind == "allreduce":
        local = (min(gpus, constants.gpus_per_node) - 1) * constants.node_hop_s
        ring, times = min(2 * ring, 2 * (local + math.log2(nodes) * constants.tree_hop_s)), 2
    bandwidth = constants.network_bandwidth if nodes > 1 else constants.node_bandwidth
    return constants.launch_s + ring + times * collective.bytes * (gpus - 1) / gpus / bandwidth


def predict(
    collectives: Sequence[Collective], *, gpus: int, constants: Constants, accumulate_steps: int = 1
) -> Prediction:
    """The step whose ``collectives`` a dry run on ``gpus`` ranks gave."""
    seconds = {part: [0.0] for part in (BATCH_NORM, LOSS, GRADIENTS)}
    for each in collectives:
        seconds[each.part].append(collective_s(each, gpus, constants))
    backward = constants.backward_share * constants.step_s
    again = constants.step_s - backward if accumulate_steps > 1 else 0.0  # the forward pass without gradient
    *overlapped, last = seconds[GRADIENTS]
    return Prediction(
        compute_s=accumulate_steps * (constants.step_s + again),
        batch_norm_s=sum(seconds[BATCH_NORM]),
        loss_s=sum(seconds[LOSS]),
        gradients_s=max(0.0, sum(overlapped) - backward) + last,
    )


def on_more_gpus(collectives: Sequence[Collective], *, gpus: int, more: int) -> list[Collective]:
    """The collectives of a step with the same work on each of ``more`` GPUs: what is gathered grows with them."""
    grown = [replace(each, bytes=each.bytes * more // gpus) for each in collectives]
    return [old if old.kind == "allreduce" else new for old, new in zip(collectives, grown, strict=True)]


def in_micro_batches(collectives: Sequence[Collective], accumulate_steps: int) -> list[Collective]:
    """The collectives of a step of so many micro-batches of that size: each goes forward twice and backward once.

    Rows of the loss add up, and gradients are exchanged once.
    """
    step: list[Collective] = []
    forward = 2 * accumulate_steps if accumulate_steps > 1 else 1
    for each in collectives:
        if each.part == BATCH_NORM:
            step += [each] * (accumulate_steps if each.kind == "allreduce" else forward)
        elif each.part == LOSS and each.kind != "allreduce":
            step.append(replace(each, bytes=each.bytes * accumulate_steps))
        else:
            step.append(each)
    return step


def predict_config(config: Config, *, gpus: int, constants: Constants) -> Prediction:
    """The model of any run, whose micro-batch takes one GPU ``constants.step_s``."""
    _, collectives = dry_run(config, ranks=gpus)
    return predict(collectives, gpus=gpus, constants=constants, accumulate_steps=config.pretrain.accumulate_steps)


def read_constants(path: Path) -> Constants:
    """From a JSON object of some fields of :class:`Constants`, or what ``bench collectives --json`` wrote.

    Raises:
        ValueError: a field that there is not.
    """
    values = read_json(path)
    if "groups" in values:
        figures = {each["name"]: each["value"] for each in values["groups"]["collectives"]["figures"]}
        values = {field: figures[name] * unit for name, (field, unit) in _MEASURED.items()}
    known = [field.name for field in fields(Constants)]
    if wrong := sorted(set(values) - set(known)):
        raise ValueError(f"{path}: {wrong[0]!r} is no constant of the model. Known are {', '.join(known)}.")
    return replace(Constants(), **values)


def bench_scaling(options: argparse.Namespace) -> int:
    """Print the tables of docs/scaling.md for the ImageNet recipe, and write JSON."""
    constants = read_constants(options.constants) if options.constants else Constants()
    recipe, _ = compose_run(["experiment=imagenet_10pct", *options.overrides])
    _, collectives = dry_run(recipe, ranks=_RECIPE_GPUS)
    rows = []
    for gpus, steps in ((8, 1), (8, 8), (64, 1), (512, 1), (1024, 1)):
        grown = in_micro_batches(on_more_gpus(collectives, gpus=_RECIPE_GPUS, more=gpus), steps)
        predicted = predict(grown, gpus=gpus, constants=constants, accumulate_steps=steps)
        rows.append((f"{gpus}" if steps == 1 else f"{gpus}, accumulate_steps={steps}", steps, predicted))
    counts = []
    for part, kind in dict.fromkeys((each.part, each.kind) for each in collectives):
        sizes = [each.bytes for each in collectives if (each.part, each.kind) == (part, kind)]
        counts.append([part, kind, f"{len(sizes)}", f"{sum(sizes) / 1e6:,.3f}", "yes" if part == GRADIENTS else "no"])
    print(markdown(("part", "collective", "calls", "MB on 64 GPUs", "overlaps"), counts) + "\n")
    head = ("GPUs", "compute", "batch normalisation", "loss", "gradients, not hidden", "step", "efficiency")
    cells = []
    for name, steps, each in rows:
        seconds = (*asdict(each).values(), each.step_s)
        share = steps * constants.step_s / each.step_s
        cells.append([name, *(f"{1000 * value:.1f}" for value in seconds), f"{share:.0%}"])
    print(markdown(head, cells))
    predictions = {name: asdict(each) | {"step_s": each.step_s} for name, _, each in rows}
    write_json(
        options.json or options.folder / "scaling.json",
        {"constants": asdict(constants), "collectives": [asdict(each) for each in collectives], "steps": predictions},
    )
    return 0
