"""``bench scaling``: a model of the step's time on many GPUs, from the collectives that a dry run counts.

Compute is one GPU's step; a collective takes what NCCL's own tuning model gives it. See docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from paws_hpc.bench.collectives import BANDWIDTH, SMALL
from paws_hpc.bench.dry_run import BATCH_NORM, GRADIENTS, LOSS, Collective, dry_run
from paws_hpc.bench.memory import markdown
from paws_hpc.cluster.compose import compose_run
from paws_hpc.files import read_json, write_json

_RECIPE_GPUS = 64  # of the published ImageNet recipe: 64 images and 105 supports each
_POST_S = 1e-6  # the least that any hop of a ring over several nodes takes, in the same source as the protocols


@dataclass(frozen=True)
class Protocol:
    """How NCCL sends, by its own tuning model: src/graph/tuning.cc, for Hopper GPUs and Intel processors.

    Attributes:
        launch_s: of any collective.
        ring_s, tree_s: of a hop in a ring and in a tree: over NVLink, and between nodes.
        most: bytes per second that a GPU sends at the most: in a node, and over several.
    """

    launch_s: float
    ring_s: tuple[float, float]
    tree_s: tuple[float, float]
    most: tuple[float, float] = (math.inf, math.inf)


PROTOCOLS = {
    "LL": Protocol(6.6e-6, ring_s=(0.6e-6, 2.7e-6), tree_s=(0.6e-6, 5.0e-6), most=(87.7e9, 20.4e9)),
    "LL128": Protocol(14e-6, ring_s=(1.9e-6, 4.0e-6), tree_s=(1.25e-6, 8.5e-6)),
}


@dataclass(frozen=True)
class Constants:
    """Where the model's other times come from. ``bench scaling --constants FILE`` replaces any of them.

    NCCL is taken to make one ring through each of a node's network ports and to send a part of every message round each
    of them, so that a GPU has all ports of its node. Of its algorithms, ring and tree: what needs switches that add
    (NVLS, SHARP) is faster where there are some, and PAT is for nodes of one GPU.

    Attributes:
        step_s: of a step on one GPU alone, a CUDA graph: 64 images in ResNet-50's recipe. **Expected**: the kernels of
            the compiled step on one H200 take that long, augmentation included.
        compiled_s: the same without a graph, as micro-batches run. **Measured** on that GPU: the host limits it.
        forward_share: of a step, in the forward pass: the backward pass has twice its operations.
        gpus_per_node: with NVLink between them, and as many network ports.
        call_s: of any collective, what NCCL's model leaves out.
        node_bandwidth: bytes per second of a GPU over NVLink: by NCCL's model 0.92 of 360e9 on Hopper.
        network_bandwidth: of one port: InfiniBand NDR, 400 Gbit/s.
    """

    step_s: float = 51.5e-3
    compiled_s: float = 64 / 859
    forward_share: float = 1 / 3
    gpus_per_node: int = 8
    call_s: float = 0.0
    node_bandwidth: float = 331e9
    network_bandwidth: float = 50e9


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by what they go to. Nothing overlaps: see docs/scaling.md."""

    compute_s: float
    batch_norm_s: float
    loss_s: float
    gradients_s: float

    @property
    def step_s(self) -> float:
        """All of them."""
        return self.compute_s + self.batch_norm_s + self.loss_s + self.gradients_s


def collective_s(collective: Collective, gpus: int, constants: Constants) -> float:
    """By the fastest of NCCL's protocols: the latency of its hops, and the bytes that pass a GPU's slowest link.

    All-gather and reduce-scatter go round a ring of all GPUs; an all-reduce twice, or up and down a tree of the nodes.
    """
    nodes = -(-gpus // constants.gpus_per_node)
    bandwidth = constants.node_bandwidth
    if nodes > 1:
        bandwidth = min(bandwidth, constants.gpus_per_node * constants.network_bandwidth)
    times = 2 if collective.kind == "allreduce" else 1
    seconds = []
    for protocol in PROTOCOLS.values():
        local, between = protocol.ring_s
        hops = times * ((gpus - nodes) * (local if nodes == 1 else max(local, _POST_S)) + (nodes - 1) * between)
        if collective.kind == "allreduce":
            local, between = protocol.tree_s
            in_node = min(gpus, constants.gpus_per_node) - 1
            hops = min(hops, 2 * (in_node * local + math.log2(nodes) * between))
        sent = times * collective.bytes * (gpus - 1) / gpus
        seconds.append(protocol.launch_s + hops + sent / min(bandwidth, protocol.most[nodes > 1]))
    return constants.call_s + min(seconds)


def predict(
    collectives: Sequence[Collective], *, gpus: int, constants: Constants, accumulate_steps: int = 1
) -> Prediction:
    """The step whose ``collectives`` a dry run on ``gpus`` ranks gave."""
    seconds = dict.fromkeys((BATCH_NORM, LOSS, GRADIENTS), 0.0)
    for each in collectives:
        seconds[each.part] += collective_s(each, gpus, constants)
    compute = constants.step_s
    if accumulate_steps > 1:  # each goes forward twice, the first time without gradient
        compute = accumulate_steps * constants.compiled_s * (1 + constants.forward_share)
    return Prediction(compute, seconds[BATCH_NORM], seconds[LOSS], seconds[GRADIENTS])


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


def read_constants(path: Path) -> Constants:
    """Read some fields of :class:`Constants` from a JSON object, or derive them from a file of ``bench collectives``.

    Raises:
        ValueError: a field that there is not, or collectives that were not measured on GPUs.
    """
    values = read_json(path)
    if "groups" in values:
        figures = {each["name"]: each["value"] for each in values["groups"]["collectives"]["figures"]}
        gpus = len(values["machine"]["gpus"])
        if gpus < 2 or SMALL not in figures:
            raise ValueError(
                f"{path}: no collectives of GPUs. Run bench collectives --device cuda on a node of several."
            )
        node = replace(Constants(), gpus_per_node=gpus, node_bandwidth=figures[BANDWIDTH] * 1e9)
        modelled = collective_s(Collective(LOSS, "allreduce", 4), gpus, node)
        return replace(node, call_s=figures[SMALL] / 1000 - modelled)
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
        counts.append([part, kind, f"{len(sizes)}", f"{sum(sizes) / 1e6:,.3f}"])
    print(markdown(("part", "collective", "calls", "MB on 64 GPUs"), counts) + "\n")
    head = ("GPUs", "compute", "batch normalisation", "loss", "gradients", "step", "efficiency")
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
