"""Rates of several contenders, taken in turns, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from paws_hpc.bench.contender import Contender, ContenderError


@dataclass(frozen=True)
class Entry:
    """A contender to be.

    Attributes:
        name: in the table.
        function: ``module:function``; see :mod:`paws_hpc.bench.contender`.
        arguments: of it.
        needs: module and package without which it cannot work, and which need not be installed.
        unit: of its rate.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, str] | None = None
    unit: str = "images/s"


@dataclass
class Rates:
    """What one contender did.

    Attributes:
        name: of the contender.
        per_s: units per second of each round; empty where it failed.
        failure: why, or None.
        unit: of the rate.
        seen: what else it said in each round.
    """

    name: str
    per_s: list[float] = field(default_factory=list)
    failure: str | None = None
    unit: str = "images/s"
    seen: list[dict[str, Any]] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """Of the rates; None where it failed."""
        return statistics.median(self.per_s) if self.per_s else None


def race(
    entries: Sequence[Entry], *, rounds: int, cores: Sequence[int], tell: Callable[[str], None]
) -> dict[str, Rates]:
    """Let every contender work once per round, in turns; one more round before warms up and does not count.

    Args:
        entries: who.
        rounds: that count.
        cores: to which each is bound while the others wait.
        tell: is told what is being done.

    Returns:
        by name; a contender that failed says why and takes no further part.
    """
    results = {entry.name: Rates(entry.name, unit=entry.unit) for entry in entries}
    with ExitStack() as running:
        contenders: dict[str, Contender] = {}
        for entry in entries:
            tell(f"{entry.name}: preparing")
            try:
                contenders[entry.name] = running.enter_context(
                    closing(Contender(entry.function, entry.arguments, cores=cores))
                )
            except ContenderError as error:
                results[entry.name].failure = _why(entry, error)
        for number in range(rounds + 1):
            first = number % len(entries)  # nobody always follows the same one
            for entry in (*entries[first:], *entries[:first]):
                if entry.name not in contenders:
                    continue
                tell(f"{entry.name}: round {number} of {rounds}")
                try:
                    done, seconds = contenders[entry.name].work()
                except ContenderError as error:
                    contenders.pop(entry.name)
                    results[entry.name] = Rates(entry.name, failure=_why(entry, error))
                    continue
                if number:
                    results[entry.name].per_s.append(done / seconds)
                    results[entry.name].seen.append(contenders[entry.name].seen)
    return results


def _why(entry: Entry, error: ContenderError) -> str:
    if entry.needs is not None and str(error).endswith(f"No module named '{entry.needs[0]}'"):
        return f"not installed: pip install {entry.needs[1]}, or all of them by `make bench`"
    return str(error)


def ratio(mine: Rates, other: Rates) -> float | None:
    """How many times as fast: the median over rounds of the ratio within a round; None where one of them failed."""
    if not mine.per_s or not other.per_s:
        return None
    return statistics.median(a / b for a, b in zip(mine.per_s, other.per_s, strict=True))
