"""Candidates for test_bench."""

import importlib
import itertools
import os
import subprocess

from paws_hpc.bench.rounds import Work


def count(fail_at: int | None) -> Work:
    """Counts its calls; fails at one of them."""
    calls = itertools.count()

    def work() -> int:
        if next(calls) == fail_at:
            raise ValueError("the disk is gone")
        return 10

    return work


def usable_cores() -> Work:
    """How many cores it may use."""
    return lambda: len(os.sched_getaffinity(0))


def imported(library: str) -> Work:
    """A library that need not be installed."""
    return importlib.import_module(library).work


def hang() -> Work:
    """Never returns, nor does the process that it starts."""
    return lambda: subprocess.run(["sleep", "3600"], check=False).returncode
