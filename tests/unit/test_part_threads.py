"""Threads beside the training one: each computes on one core, and the training one keeps its number."""

from __future__ import annotations

import subprocess
import sys

import torch

from paws_hpc.data.part_threads import PartThreads
from paws_hpc.data.prefetch import Prefetch


def test_threads_that_make_batches_have_no_torch_threads_of_their_own() -> None:
    """With them there would be more than cores, and every step of training would wait for sleeping threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        parts = PartThreads(2, "parts").begin(lambda _: torch.get_num_threads(), [slice(0, 1), slice(1, 2)])
        assert parts() == [1, 1]
        with Prefetch(lambda _: torch.get_num_threads, 0, 2) as batches:
            assert list(batches) == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


_FRESH = """
import os
import numpy as np
import torch
from paws_hpc.data.part_threads import PartThreads

def thread_count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
large = torch.from_numpy(np.ones(2_000_000, np.float32))
parts = PartThreads(2, "parts")
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
