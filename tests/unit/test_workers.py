"""Threads beside the training one: each computes on one core, and the training one keeps its number."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from paws_hpc.data import streams
from paws_hpc.data.config import CenterCropConfig
from paws_hpc.data.crops import center_crop
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.data.workers import Prefetch, WorkerPool
from paws_hpc.store import ImageStore
from tests.conftest import Stores

TWO = [slice(0, 1), slice(1, 2)]


def test_threads_beside_the_training_one_have_no_torch_threads_of_their_own(
    digits_stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that cut, that prefetch and that decode what is scored; else every step would wait for sleeping threads."""
    before, seen = torch.get_num_threads(), []

    def noted(pixels: np.ndarray, crop: CenterCropConfig) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return center_crop(pixels, crop)

    monkeypatch.setattr(streams, "center_crop", noted)
    store = ImageStore(digits_stores.train)
    torch.set_num_threads(3)
    try:
        threads = WorkerPool(2, "parts")
        threads.begin(lambda _: None, TWO)()
        torch.set_num_threads(3)  # of this thread, but what the others had not asked for would change with it
        assert threads.begin(lambda _: torch.get_num_threads(), TWO)() == [1, 1]
        with Prefetch(lambda _: torch.get_num_threads, 0, 2) as batches:
            assert list(batches) == [1, 1]
        scored = EvaluationSet(store, np.arange(8), CenterCropConfig(resize=16, size=16), store, threads=2)
        list(scored.batches(torch.device("cpu"), torch.float32))
        assert seen == [1] * 8
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


_FRESH = """
import os
import numpy as np
import torch
from paws_hpc.data.workers import WorkerPool

def thread_count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
large = torch.from_numpy(np.ones(2_000_000, np.float32))
parts = WorkerPool(2, "parts")
before = thread_count()
parts.begin(lambda _: large * 2 + large @ large, [slice(0, 1), slice(1, 2)])()
beside = thread_count() - before
large * 2
print(beside, thread_count() - before - beside, torch.get_num_threads())
"""


def test_a_process_that_computed_nothing_yet_keeps_its_number_too() -> None:
    """What one thread sets last is what torch gives to a thread that has not asked for its number before."""
    done = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, check=True, timeout=120)
    beside, added, number = map(int, done.stdout.split())
    assert beside <= 2, "the two threads alone"
    assert added == 2, "the training thread and two more"
    assert number == 3
