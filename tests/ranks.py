"""Running functions on several ranks over gloo, each rank a process of its own.

A test names functions ``work(rank, world) -> result`` of its own module; :func:`run_on_ranks` starts one process that
imports torch once and forks into ranks, and :func:`results_of` reads what each rank returned.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
Work = Callable[[int, int], Any]


class Collectives(TorchDispatchMode):
    """Counts what this rank communicates, backward passes and DistributedDataParallel included.

    Attributes:
        counts: name of a collective as torch's c10d library has it → calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function._opname.strip("_")] += 1
        return function(*args, **(kwargs or {}))


def run_on_ranks(folder: Path, works: Mapping[int, Sequence[Work]], *, timeout_s: float = 200) -> None:
    """Run functions at several numbers of ranks.

    Args:
        folder: for the results.
        works: number of ranks → functions defined at the top level of a test module.
        timeout_s: for all of it.
    """
    asked = [f"{world}:{_module_of(work)}:{work.__name__}" for world, several in works.items() for work in several]
    command = [sys.executable, "-m", "tests.ranks", str(folder), *asked]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=timeout_s, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def results_of(work: Work, world: int, folder: Path) -> list[Any]:
    """What ``work(rank, world)`` returned on each of ``world`` ranks."""
    return [torch.load(folder / f"{world}-{rank}.pt")[work.__name__] for rank in range(world)]


def _module_of(work: Work) -> str:
    path = Path(inspect.getfile(work)).relative_to(ROOT)
    return ".".join(path.with_suffix("").parts)


def _rank(rank: int, world: int, folder: Path, works: list[Work]) -> None:
    store = f"file://{folder}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save({work.__name__: work(rank, world) for work in works}, folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def _main(folder: Path, asked: list[str]) -> None:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    by_world: dict[int, list[Work]] = {}
    for text in asked:
        world, module, name = text.split(":")
        by_world.setdefault(int(world), []).append(getattr(importlib.import_module(module), name))
    for world, works in by_world.items():
        mp.start_processes(_rank, (world, folder, works), nprocs=world, start_method="fork")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
