"""Training as contenders: steps of this program, from data on the device or from a store, and the device's ceilings.

Every function prepares and returns the work, which times itself; on a GPU it waits for the device at its ends alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paws_hpc.bench.counting import graph_breaks, host_waits, peak_memory_gb
from paws_hpc.bench.recipes import Scene, as_published, cores, on_device, opened_stream, use_threads
from paws_hpc.bench.timeline import Timeline, marked, medians, synchronise
from paws_hpc.config import Config
from paws_hpc.data.streams import PawsBatch
from paws_hpc.engine.metrics import MetricsWindow, ThroughputMeter
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective.config import PawsConfig
from paws_hpc.objective.labels import class_labels
from paws_hpc.objective.neighbours import Labels
from paws_hpc.objective.paws import PawsLoss, diagnose, paws_loss
from paws_hpc.stages.pretrain import make_training

Work = Callable[[], dict[str, Any]]

_BATCHES = 4  # of data on the device, used in turn
_WARM_STEPS = 4  # one more than are made ahead, so that what was ready before does not count
_open_for_good = ExitStack()  # what work needs until its process ends


def on_device_steps(scene: dict[str, Any], steps: int) -> Work:
    """Steps on uint8 crops that are on the device, as this program takes them; the parts of each are timed."""
    training, batches = training_with_data(Scene(**scene))
    cuda = training.device.type == "cuda"
    for _ in range(2):  # memory is allocated, and whatever compiles is compiled
        training.step(next(batches))
    waits = host_waits(lambda: training.step(next(batches)), training.device)

    def work() -> dict[str, Any]:
        if cuda:
            training.step(next(batches))  # takes the memory again that others had meanwhile
        line = Timeline(training.device)
        synchronise(cuda)
        began = time.perf_counter()
        with marked(training, line):
            for _ in range(steps):
                line.begin()
                training.step(next(batches))
            line.close()
        synchronise(cuda)
        return {
            "done": steps * training.config.batch_size,
            "seconds": time.perf_counter() - began,
            "parts_s": medians(line.read()),
            "host_waits": waits,
            "graph_breaks": graph_breaks(),
            "peak_memory_gb": peak_memory_gb(training.device),
        }

    return work


def training_with_data(scene: Scene) -> tuple[Pretraining, Iterator[PawsBatch]]:
    """Training before its first step, and batches without end whose uint8 crops are on the device."""
    config = scene.config()
    use_threads(config)
    stream = _open_for_good.enter_context(opened_stream(config))
    training = make_training(config, stream)
    held = [on_device(stream.batch(step), training.device) for step in range(_BATCHES)]
    numbered = (replace(held[step % _BATCHES], step=step) for step in itertools.count())
    return training, numbered


def steps_from_store(scene: dict[str, Any], steps: int) -> Work:
    """The training loop from the packed store: read, decode, crop, augment, train, read metrics, as in pre-training."""
    config = Scene(**scene).config()
    use_threads(config)
    stream = _open_for_good.enter_context(opened_stream(config))
    training = make_training(config, stream)
    cuda, numbers = training.device.type == "cuda", itertools.count()
    window = MetricsWindow(lambda _: [], remedy="")

    def work() -> dict[str, Any]:
        first = next(numbers) * (steps + _WARM_STEPS)
        meter, began = ThroughputMeter(config.pretrain.batch_size, training.device), 0.0
        with stream.prefetch(first, first + _WARM_STEPS + steps, training.dtype) as batches:
            for batch in meter.waiting_for(batches):
                if batch.step == first + _WARM_STEPS:
                    synchronise(cuda)
                    meter.restart()  # after the wait for the batch that is to be timed: that of the next counts
                    began = time.perf_counter()
                metrics = training.step(batch)
                window.add(batch.step, batch.records, training.learning_rate(batch.step), metrics)
                if (batch.step + 1) % config.pretrain.log_every_steps == 0:
                    window.read(training.encoder)
        synchronise(cuda)
        seconds = time.perf_counter() - began
        return {
            "done": steps * config.pretrain.batch_size,
            "seconds": seconds,
            "data_wait": meter.read(steps)["train/data_wait"],
        }

    return work


def plain_resnet50(device: str, batch_size: int, steps: int, compiled: bool) -> Work:
    """torchvision's ResNet-50 on 224-pixel images that are on the device: cross-entropy, SGD with momentum.

    Precision and layout are those of our step: bf16 autocast and channels-last on a GPU, fp32 and contiguous on a CPU.
    """
    import torchvision  # noqa: PLC0415 - takes seconds, and the other contenders need none of it

    there = torch.device(device)
    cuda = there.type == "cuda"
    torch.set_num_threads(cores())
    layout = torch.channels_last if cuda else torch.contiguous_format
    model = torchvision.models.resnet50().to(there, memory_format=layout)
    if compiled:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, 224, 224, device=there).to(memory_format=layout)
    labels = torch.randint(1000, (batch_size,), device=there)

    def step() -> None:
        with torch.autocast(there.type, torch.bfloat16, enabled=cuda):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return _timed(step, steps, done=batch_size, cuda=cuda)


def matmul(device: str, size: int, steps: int) -> Work:
    """Square matrix products, bf16 on a GPU and fp32 on a CPU; what is done is TFLOP."""
    there = torch.device(device)
    torch.set_num_threads(cores())
    dtype = torch.bfloat16 if there.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=there, dtype=dtype) for _ in range(2))
    result = torch.empty_like(left)
    return _timed(lambda: torch.mm(left, right, out=result), steps, done=2 * size**3 / 1e12, cuda=there.type == "cuda")


def loss_alone(scene: dict[str, Any], published: bool, steps: int) -> Work:
    """The objective of one rank's images, forward and backward, on random representations.

    Args:
        scene: the recipe.
        published: against the supports of all ranks of the published recipe, as after the gather.
        steps: of work.
    """
    loss, (anchors, supports, _), config = _on_random_rows(Scene(**scene), published=published)

    def step() -> None:
        torch.autograd.grad(loss().total, (anchors, supports))

    return _timed(step, steps, done=1, cuda=config.device == "cuda")


def diagnostics_alone(scene: dict[str, Any], steps: int) -> Work:
    """What is measured beside the objective (Fig. 4 of the paper), of one rank's images on random representations."""
    _, (anchors, supports, labels), config = _on_random_rows(Scene(**scene), published=False)
    large = anchors[: 2 * config.pretrain.batch_size]

    def step() -> None:
        diagnose(large, supports, labels, temperature=config.objective.temperature)

    return _timed(step, steps, done=1, cuda=config.device == "cuda")


def _on_random_rows(
    place: Scene, *, published: bool
) -> tuple[Callable[[], PawsLoss], tuple[Tensor, Tensor, Labels], Config]:
    """The objective as a function, its anchors, supports and labels, and the config."""
    config = place.config()
    use_threads(config)
    device, objective = torch.device(config.device), config.objective
    assert isinstance(objective, PawsConfig)
    support = (as_published(place) if published else config).pretrain.support
    with torch.device("meta"):
        features = Encoder(config.model).output_dim
    rows, n = support.classes * support.images_per_class * config.views.support_views, config.pretrain.batch_size
    small = config.views.small.count
    anchors = torch.randn((2 + small) * n, features, device=device, requires_grad=True)
    supports = torch.randn(rows, features, device=device, requires_grad=True)
    places = torch.arange(rows) // (rows // support.classes)
    labels = class_labels(places, support.classes, smoothing=objective.label_smoothing, device=device)

    def loss() -> PawsLoss:
        return paws_loss(
            anchors,
            supports,
            anchors[: 2 * n].detach(),
            supports.detach(),
            labels,
            temperature=objective.temperature,
            sharpening=objective.sharpening,
            num_small_crops=small,
            me_max=objective.me_max,
        )

    return loss, (anchors, supports, labels), config


def _timed(step: Callable[[], object], steps: int, *, done: float, cuda: bool) -> Work:
    def work() -> dict[str, Any]:
        if cuda:
            step()  # takes the memory again that others had meanwhile
        synchronise(cuda)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(cuda)
        return {"done": steps * done, "seconds": time.perf_counter() - began}

    return work
