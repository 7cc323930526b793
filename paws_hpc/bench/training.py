"""The work of the benchmarks of training: steps from data on the device or from a store, and saving.

Every function prepares and returns the work, which takes the time itself and waits for a GPU at its ends alone.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from paws_hpc.bench.rounds import Round, until_exit
from paws_hpc.bench.step_parts import Timeline, marked, medians, synchronise
from paws_hpc.bench.workloads import Workload, cores, on_device, opened_stream
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.graphs import StepGraphs
from paws_hpc.engine.metrics import MetricsWindow, ThroughputMeter
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.files import read_json
from paws_hpc.stages.pretrain import make_training

TimedWork = Callable[[], Round]

_BATCHES = 4  # of data on the device, used in turn
_WARM_STEPS = 4  # one more than are made ahead, so that what was ready before does not count
_SAVE_LIMIT_S = 600.0


def steps_on_device(workload: Workload, steps: int) -> TimedWork:
    """Steps on uint8 crops that are on the device; ``parts_s`` of the round, medians over its steps, unless graphed."""
    training, batches = training_with_data(workload)
    _prepare(training, batches)

    def work() -> Round:
        if training.config.execution_on(training.device.type) == "graphed":  # one launch, which has no parts
            return _timed(
                lambda: training.step(next(batches)), steps, images=training.config.batch_size, device=training.device
            )
        line = Timeline(training.device)

        def step() -> None:
            with line.step():
                training.step(next(batches))

        with marked(training, line):
            timed = _timed(step, steps, images=training.config.batch_size, device=training.device)
        return replace(timed, details={"parts_s": medians(line.read())})

    return work


def training_with_data(workload: Workload) -> tuple[Pretraining, Iterator[PawsBatch]]:
    """Training before its first step, and batches without end whose uint8 crops are on the device."""
    training, stream = _training(workload)
    held = [on_device(stream.batch(step), training.device) for step in range(_BATCHES)]
    return training, (replace(held[step % _BATCHES], step=step) for step in itertools.count())


def _prepare(training: Pretraining, batches: Iterator[PawsBatch]) -> None:
    """Take steps until memory is allocated, what compiles is compiled, and both kinds of steps have their graph."""
    graphs = training.differentiate
    for _ in range(graphs.first_steps if isinstance(graphs, StepGraphs) else 0):
        training.step(next(batches))
    for step in (0, 1):  # diagnosed, and not
        training.step(replace(next(batches), step=step))


def _training(workload: Workload) -> tuple[Pretraining, PawsStream]:
    config = workload.config()
    stream = until_exit.enter_context(opened_stream(config))
    return make_training(config, stream), stream


def steps_from_store(workload: Workload, steps: int) -> TimedWork:
    """The training loop from the packed store: read, decode, crop, augment, train, read metrics, as in pre-training."""
    training, stream = _training(workload)
    config, numbers, window = training.config, itertools.count(), MetricsWindow(lambda _: [], remedy="")
    _prepare(training, itertools.repeat(on_device(stream.batch(0), training.device)))

    def work() -> Round:
        first = next(numbers) * (steps + _WARM_STEPS)
        meter, began = ThroughputMeter(config.batch_size, training.device), 0.0
        with stream.prefetch(first, first + _WARM_STEPS + steps, training.dtype) as batches:
            for batch in meter.waiting_for(batches):
                if batch.step == first + _WARM_STEPS:
                    synchronise(training.device)
                    meter.restart()  # after the wait for the batch that is to be timed: that of the next counts
                    began = time.perf_counter()
                window.add(batch.step, batch.records, training.learning_rate(batch.step), training.step(batch))
                if (batch.step + 1) % config.log_every_steps == 0:
                    window.read(training.encoder)
        synchronise(training.device)
        seconds = time.perf_counter() - began
        return Round(steps * config.batch_size, seconds, {"data_wait": meter.read(steps)["train/data_wait"]})

    return work


def plain_resnet50(device: str, batch_size: int, steps: int, *, compiled: bool = False) -> TimedWork:
    """torchvision's ResNet-50 on 224-pixel images that are on the device: cross-entropy, SGD with momentum.

    Precision and layout are those of our step: bf16 autocast and channels-last on a GPU, fp32 and contiguous on a CPU.
    """
    import torchvision  # noqa: PLC0415 - takes seconds, and the other candidates need none of it

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

    return lambda: _timed(step, steps, images=batch_size, device=there)


def _timed(step: Callable[[], object], steps: int, *, images: int, device: torch.device) -> Round:
    if device.type == "cuda":
        step()  # takes the memory again that other candidates had meanwhile
    synchronise(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return Round(steps * images, time.perf_counter() - began)


def saving(workload: Workload, steps: int) -> TimedWork:
    """``steps`` steps, a checkpoint in the workload's folder as pre-training saves it, and steps until it is written.

    The round is one save; its seconds are those for which the training loop stood still.
    """
    training, batches = training_with_data(workload)
    path = Path(until_exit.enter_context(TemporaryDirectory(dir=workload.folder)))
    checkpoints, numbers = CheckpointFolder(path, identity={}, keep=1), itertools.count(1)
    _prepare(training, batches)

    def step_s() -> float:
        synchronise(training.device)
        began = time.perf_counter()
        training.step(next(batches))
        synchronise(training.device)
        return time.perf_counter() - began

    def work() -> Round:
        number = next(numbers)
        usual = statistics.median(step_s() for _ in range(steps))
        began = time.perf_counter()
        checkpoints.save(number, training.state_dict())
        stall = time.perf_counter() - began
        weights = path / f"step-{number:08d}.pt"
        record, meanwhile = weights.with_suffix(".json"), []
        while not record.exists():
            meanwhile.append(step_s())
            if time.perf_counter() - began > _SAVE_LIMIT_S:
                raise TimeoutError(f"{weights} was not written within {_SAVE_LIMIT_S:g} s")
        details = {
            "step_s": usual,
            "slowed_s": sum(meanwhile) - usual * len(meanwhile),
            "writing_s": float(read_json(record)["seconds"]),
            "bytes": weights.stat().st_size,
            "checkpoint_every_steps": training.config.checkpoint_every_steps,
        }
        return Round(1, stall, details)

    return work
