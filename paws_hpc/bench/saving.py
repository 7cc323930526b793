"""Saving as a contender: how long training stands still for a checkpoint."""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paws_hpc.bench.recipes import Scene
from paws_hpc.bench.timeline import synchronise
from paws_hpc.bench.training import Work, training_with_data
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.files import read_json

_LIMIT_S = 600.0
_open_for_good = ExitStack()  # the folder, until the process ends


def saving(scene: dict[str, Any], folder: str, steps: int) -> Work:
    """A few steps, a checkpoint of the state as pre-training saves it, and steps until it is written.

    What is done is one save; the seconds are those for which the training loop stood still.

    Args:
        scene: the recipe.
        folder: on the file system that is to be measured.
        steps: whose median is the time of one.
    """
    training, batches = training_with_data(Scene(**scene))
    cuda = training.device.type == "cuda"
    path = Path(_open_for_good.enter_context(TemporaryDirectory(dir=folder)))
    checkpoints = CheckpointFolder(path, identity={}, keep=1)
    numbers = itertools.count(1)

    def step_s() -> float:
        synchronise(cuda)
        began = time.perf_counter()
        training.step(next(batches))
        synchronise(cuda)
        return time.perf_counter() - began

    def work() -> dict[str, Any]:
        number = next(numbers)
        usual = statistics.median(step_s() for _ in range(steps))
        began = time.perf_counter()
        checkpoints.save(number, training.state_dict())
        stall = time.perf_counter() - began
        weights = path / f"step-{number:08d}.pt"
        record, meanwhile = weights.with_suffix(".json"), []
        while not record.exists():
            meanwhile.append(step_s())
            if time.perf_counter() - began > _LIMIT_S:
                raise TimeoutError(f"{weights} was not written within {_LIMIT_S:g} s")
        return {
            "done": 1,
            "seconds": stall,
            "stall_s": stall,
            "step_s": usual,
            "steps_meanwhile": len(meanwhile),
            "slowed_s": sum(meanwhile) - usual * len(meanwhile),
            "writing_s": float(read_json(record)["seconds"]),
            "bytes": weights.stat().st_size,
            "checkpoint_every_steps": training.config.checkpoint_every_steps,
        }

    return work
