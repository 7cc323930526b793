"""The figures of groups of measurements, with their targets, as tables and as a JSON file."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paws_hpc.bench.rounds import CandidateError, Rates, median, race
from paws_hpc.files import write_json
from paws_hpc.provenance import commit, processor

WIDTH = 120  # of a table in a file
_PACKAGES = ("torch", "torchvision", "simplejpeg", "h5py", "numpy", "pillow")


@dataclass(frozen=True)
class Figure:
    """One figure, and what it should be where it has a target.

    Attributes:
        name: what was measured.
        value: None where it could not be measured.
        unit: of the value and the target.
        target: the least that the value should be, or the greatest where ``at_most``.
        only_on: the machine and recipe that the target is for, where this is another one.
        share: of the whole, in [0, 1].
        absent: why there is no value.
    """

    name: str
    value: float | None
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    only_on: str | None = None
    share: float | None = None
    absent: str = "a candidate failed"

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a value or a target, or where it is for another machine."""
        if self.value is None or self.target is None or self.only_on is not None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def verdict(self) -> str:
        """The target, and whether it is reached, for people."""
        if self.target is None:
            return ""
        verdict = {True: "reached", False: "[red]missed[/red]", None: "-"}[self.reached]
        if self.only_on is not None:
            verdict = f"not measured here ({self.only_on})"
        return f"{'<=' if self.at_most else '>='} {self.target:g} {self.unit}: {verdict}"


Race = Callable[..., dict[str, Rates]]
"""``race(candidates, cores=None)``: :func:`paws_hpc.bench.rounds.race` for the rounds of this run."""

Measured = tuple[dict[str, Rates], list[Figure]]
"""What a group gives: rates by candidate, and figures."""


def measure_groups(
    title: str,
    groups: Mapping[str, Callable[[Race], Measured]],
    *,
    prepare: Callable[[], object],
    rounds: int,
    limit_s: float = math.inf,
    about: Mapping[str, Any],
    file: Path,
) -> int:
    """Measure group after group, print the table of each, and write the figures of all so far, with ``about``, as JSON.

    ``prepare`` makes the images; a group's candidates have ``limit_s`` to get ready. Returns the exit status: 1 where a
    group failed as a whole.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    machine, measured, exit_status = describe_machine(), {}, 0
    console.print(f"{title}; {machine['cores']} cores of {machine['processor']}, commit {machine['commit'] or 'none'}")
    with console.status("making images") as status:
        prepare()
        for name, measure in groups.items():
            status.update(name)
            try:
                rates, figures = measure(partial(race, rounds=rounds, limit_s=limit_s, progress=status.update))
            except CandidateError as error:  # the other groups are worth as much without this one
                rates, figures = {}, [Figure(name, None, absent=f"failed: {error}")]
                exit_status = 1
            measured[name] = {
                "rates": {
                    n: asdict(rate) | {"per_s": rate.per_s, "median": median(rate.per_s)} for n, rate in rates.items()
                },
                "figures": [asdict(figure) | {"reached": figure.reached} for figure in figures],
            }
            write_json(file, {**about, "rounds": rounds, "machine": machine, "groups": measured})
            status.stop()
            print_table(console, name, rates, figures)
            status.start()
    console.print(f"figures: {file}")
    return exit_status


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, memory, GPUs, versions and commit; None where one is not known."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(console: Console, title: str, rates: Mapping[str, Rates], figures: Sequence[Figure]) -> None:
    """Rates of candidates, then figures with targets and verdicts."""
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("")
    for head in ("", "lowest to highest, or share", "target"):
        table.add_column(head, justify="right")
    for name, rate in rates.items():
        if (middle := median(rate.per_s)) is None:
            table.add_row(name, "-")
            continue
        spread = f"{_amount(min(rate.per_s))} - {_amount(max(rate.per_s))}"
        table.add_row(name, f"{_amount(middle)} images/s", spread)
    table.add_section()
    for figure in figures:
        value = f"not measured: {figure.absent}" if figure.value is None else f"{_amount(figure.value)} {figure.unit}"
        table.add_row(figure.name, value, "" if figure.share is None else f"{figure.share:.1%}", figure.verdict)
    console.print(table)
    for name, rate in rates.items():
        if rate.failure is not None:
            console.print(f"  {name}: {rate.failure}", highlight=False)
    console.print()


def _amount(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
