"""Contenders of which test_bench knows what they do."""

import itertools
import os
import subprocess
from collections.abc import Callable


def count(fail_at: int | None) -> Callable[[], int]:
    """Counts its calls; fails at one of them."""
    calls = itertools.count()

    def work() -> int:
        if next(calls) == fail_at:
            raise ValueError("the disk is gone")
        return 10

    return work


def cores() -> Callable[[], int]:
    """How many cores it may use."""
    return lambda: len(os.sched_getaffinity(0))


def hang() -> Callable[[], int]:
    """Never comes back, nor does the process that it starts."""

    def work() -> int:
        return subprocess.run(["sleep", "3600"], check=False).returncode

    return work
