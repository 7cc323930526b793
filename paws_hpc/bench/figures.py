"""What a group of measurements found: rates of contenders, single figures, and bars; as a table and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from paws_hpc.bench.contender import ContenderError
from paws_hpc.bench.rounds import Rates
from paws_hpc.files import write_json

_WIDTH = 120  # of the table in a file


@dataclass(frozen=True)
class Bar:
    """A figure and what it should be.

    Attributes:
        work: what was measured.
        value: the figure; None where a contender failed, or nothing was measured.
        unit: of both.
        bar: the least it should be, or the greatest where ``at_most``.
        at_most: see there.
        elsewhere: what the bar is for, where this machine is something else and cannot tell; None where it can.
    """

    work: str
    value: float | None
    unit: str
    bar: float
    at_most: bool = False
    elsewhere: str | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; None where there is no figure, or the bar is for another machine."""
        if self.value is None or self.elsewhere is not None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar


@dataclass(frozen=True)
class Figure:
    """One figure without a bar.

    Attributes:
        work: what was measured.
        value: the figure, or None.
        unit: of it.
        share: of the whole that it is a part of, in [0, 1]; None where it is no part.
        absent: why there is no figure; None where there is one.
    """

    work: str
    value: float | None
    unit: str
    share: float | None = None
    absent: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.absent is not None), "a figure, or the reason why there is none"


@dataclass(frozen=True)
class Measured:
    """The figures of one group.

    Attributes:
        rates: of its contenders.
        bars: and whether they are reached.
        seen: what else there is to say.
        figures: single ones.
        details: for the file alone.
    """

    rates: dict[str, Rates]
    bars: list[Bar]
    seen: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rates": {name: asdict(rates) | {"median": rates.median} for name, rates in self.rates.items()},
            "figures": [asdict(figure) for figure in self.figures],
            "bars": [asdict(bar) | {"reached": bar.reached} for bar in self.bars],
            "seen": self.seen,
            "details": self.details,
        }


def open_console() -> Console:
    """Standard output, as wide as the terminal, or a fixed width in a file."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def measure_groups(
    console: Console,
    status: Status,
    groups: Mapping[str, Callable[[], Measured]],
    *,
    about: dict[str, Any],
    target: Path,
) -> bool:
    """Measure group after group, print its table, and write the figures of all so far as JSON.

    Args:
        console: to print to.
        status: what is shown while a group is measured.
        groups: by name, in their order.
        about: the run, as the file tells it beside ``groups``.
        target: the file.

    Returns:
        Whether no group failed as a whole.
    """
    measured: dict[str, Any] = {}
    none_failed = True
    for name, measure in groups.items():
        try:
            found = measure()
        except ContenderError as error:  # the other groups are worth as much without this one
            found = Measured({}, [], {}, [Figure(name, None, "", absent=f"failed: {error}")])
            none_failed = False
        measured[name] = found.as_json()
        write_json(target, about | {"groups": measured})  # these stay, whatever becomes of the groups to come
        status.stop()
        _show(console, name, found)
        status.start()
    console.print(f"figures: {target}")
    return none_failed


def telling(status: Status, console: Console) -> Callable[[str], None]:
    """Show what is being done, where somebody watches."""
    return status.update if console.is_terminal else lambda _: None


def _show(console: Console, group: str, measured: Measured) -> None:
    """Print a group's table."""
    table = Table(title=group, title_justify="left", show_edge=False)
    table.add_column("")
    for name in ("", "lowest to highest, or share", "bar"):
        table.add_column(name, justify="right")
    for rates in measured.rates.values():
        if rates.median is None:
            table.add_row(rates.name, "-", "", "")
            continue
        spread = f"{amount(min(rates.per_s))} - {amount(max(rates.per_s))}"
        table.add_row(rates.name, f"{amount(rates.median)} {rates.unit}", spread, "")
    table.add_section()
    for figure in measured.figures:
        value = f"not measured: {figure.absent}" if figure.value is None else f"{amount(figure.value)} {figure.unit}"
        table.add_row(figure.work, value, "" if figure.share is None else f"{figure.share:.1%}", "")
    table.add_section()
    for bar in measured.bars:
        value = "not measured" if bar.value is None else f"{bar.value:,.2f} {bar.unit}"
        says = {True: "reached", False: "[red]missed[/red]", None: "-"}[bar.reached]
        if bar.elsewhere is not None:
            says = f"not measured here ({bar.elsewhere})"
        table.add_row(bar.work, value, "", f"{'<=' if bar.at_most else '>='} {bar.bar:g} {bar.unit}: {says}")
    console.print(table)
    for rates in measured.rates.values():
        if rates.failure is not None:
            console.print(f"  {rates.name}: {rates.failure}", highlight=False)
    for name, value in measured.seen.items():
        console.print(f"  {name}: {value}")
    console.print()


def amount(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
