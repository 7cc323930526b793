"""What a group of measurements gives: rates of candidates, and figures with or without a target; table and JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from paws_hpc.bench.rounds import CandidateError, Rates
from paws_hpc.files import write_json
from paws_hpc.provenance import commit

_WIDTH = 120  # of a table in a file
_PACKAGES = ("torch", "torchvision", "simplejpeg", "h5py", "numpy", "pillow")


@dataclass(frozen=True)
class Figure:
    """A figure without a target.

    Attributes:
        name: what was measured.
        value: the figure; None where there is none.
        unit: of it.
        share: of the whole that it is a part of, in [0, 1]; None where it is no part.
        absent: why there is no figure.
    """

    name: str
    value: float | None
    unit: str
    share: float | None = None
    absent: str = "a candidate failed"


@dataclass(frozen=True)
class Target:
    """A figure and what it should be.

    Attributes:
        name: what was measured.
        value: the figure; None where a candidate failed.
        unit: of both.
        target: the least it should be, or the greatest where ``at_most``.
        at_most: see there.
        only_on: the machine and recipe that the target is for, where this is another one.
    """

    name: str
    value: float | None
    unit: str
    target: float
    at_most: bool = False
    only_on: str | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is no figure, or the target is for another machine."""
        if self.value is None or self.only_on is not None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Measured:
    """One group: rates by candidate, figures, targets, and details for the file alone."""

    rates: dict[str, Rates] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rates": {n: asdict(r) | {"per_s": r.per_s, "median": r.median} for n, r in self.rates.items()},
            "figures": [asdict(figure) for figure in self.figures],
            "targets": [asdict(target) | {"reached": target.reached} for target in self.targets],
            "details": self.details,
        }


def describe_machine(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Processor, usable cores, memory, GPUs, versions and commit; None where one is not known."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*_PACKAGES, *packages)},
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def open_console() -> Console:
    """Standard output, as wide as the terminal, or a fixed width in a file."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def progress_line(status: Status, console: Console) -> Callable[[str], None]:
    """Shows what is being done, on a terminal alone."""
    return status.update if console.is_terminal else lambda _: None


def measure_groups(
    console: Console,
    status: Status,
    groups: Mapping[str, Callable[[], Measured]],
    *,
    about: dict[str, Any],
    file: Path,
) -> int:
    """Measure group after group, print its table, and write the figures of all so far to ``file``, after ``about``.

    Returns:
        The exit status: 1 where a group failed as a whole.
    """
    measured: dict[str, Any] = {}
    exit_status = 0
    for name, measure in groups.items():
        try:
            group = measure()
        except CandidateError as error:  # the other groups are worth as much without this one
            group = Measured(figures=[Figure(name, None, "", absent=f"failed: {error}")])
            exit_status = 1
        measured[name] = group.as_json()
        write_json(file, about | {"groups": measured})  # figures stay, whatever becomes of the groups to come
        status.stop()
        _print_table(console, name, group)
        status.start()
    console.print(f"figures: {file}")
    return exit_status


def _print_table(console: Console, name: str, group: Measured) -> None:
    table = Table(title=name, title_justify="left", show_edge=False)
    table.add_column("")
    for title in ("", "lowest to highest, or share", "target"):
        table.add_column(title, justify="right")
    for rates in group.rates.values():
        if rates.median is None:
            table.add_row(rates.name, "-", "", "")
            continue
        spread = f"{amount(min(rates.per_s))} - {amount(max(rates.per_s))}"
        table.add_row(rates.name, f"{amount(rates.median)} {rates.unit}", spread, "")
    table.add_section()
    for figure in group.figures:
        value = f"not measured: {figure.absent}" if figure.value is None else f"{amount(figure.value)} {figure.unit}"
        table.add_row(figure.name, value, "" if figure.share is None else f"{figure.share:.1%}", "")
    table.add_section()
    for target in group.targets:
        value = "not measured" if target.value is None else f"{target.value:,.2f} {target.unit}"
        verdict = {True: "reached", False: "[red]missed[/red]", None: "-"}[target.reached]
        if target.only_on is not None:
            verdict = f"not measured here ({target.only_on})"
        sign = "<=" if target.at_most else ">="
        table.add_row(target.name, value, "", f"{sign} {target.target:g} {target.unit}: {verdict}")
    console.print(table)
    for rates in group.rates.values():
        if rates.failure is not None:
            console.print(f"  {rates.name}: {rates.failure}", highlight=False)
    console.print()


def amount(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
