"""A point of a sweep: which fields of a classifier's config it sets, and how its folder is named."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_SHORT = {"learning_rate": "lr"}  # in names; every other field is written out
_LONG = {short: field for field, short in _SHORT.items()}

Dataclass = TypeVar("Dataclass")


@dataclass(frozen=True)
class Trial:
    """One point of a sweep.

    Attributes:
        values: of fields by name, nested ones as ``crop.size``; the order is that of the config.
    """

    values: Mapping[str, float]

    def __hash__(self) -> int:
        return hash(frozenset(self.values.items()))

    @property
    def name(self) -> str:
        """Of its folder, such as ``lr=0.05,epochs=30``; equal values give equal names."""
        return ",".join(f"{short(field)}={number(value)}" for field, value in self.values.items())

    @property
    def text(self) -> str:
        """For people: ``lr 0.05, epochs 30``."""
        return self.name.replace("=", " ").replace(",", ", ")

    @property
    def rank(self) -> tuple[float, ...]:
        """By which tables sort trials: the last field first."""
        return tuple(self.values.values())[::-1]

    @classmethod
    def parse(cls, name: str) -> Trial:
        """The trial with this :attr:`name`.

        Raises:
            ValueError: no trial is called so.
        """
        values: dict[str, float] = {}
        for assignment in name.split(","):
            field, _, text = assignment.partition("=")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not field or not math.isfinite(value):
                raise ValueError(f"{name!r} is not the name of a trial, such as 'lr=0.05,epochs=30'.")
            values[_LONG.get(field, field)] = int(value) if value.is_integer() else value
        return cls(values)

    def applied(self, config: Dataclass) -> Dataclass:
        """A copy of a config with these values in its fields."""
        for field, value in self.values.items():
            config = _replaced(config, field, value)
        return config


def short(field: str) -> str:
    """A field as names and tables call it."""
    return _SHORT.get(field, field)


def number(value: float) -> str:
    """The shortest text that gives the number back: ``0.05``, ``1e-05``, ``30`` for 30 and for 30.0."""
    return repr(float(value)).removesuffix(".0")


def trials(sweep: Mapping[str, Sequence[float]]) -> list[Trial]:
    """All combinations of a sweep's values; the last field varies fastest."""
    return [Trial(dict(zip(sweep, point, strict=True))) for point in itertools.product(*sweep.values())]


def axes(points: Sequence[Trial]) -> dict[str, list[float]]:
    """The fields that trials set, each with its values in ascending order."""
    fields = dict.fromkeys(field for point in points for field in point.values)
    return {field: sorted({point.values[field] for point in points if field in point.values}) for field in fields}


def number_fields(config: Any, prefix: str = "") -> dict[str, type]:
    """The fields of a dataclass that hold a number, nested ones as ``crop.size``, each with ``int`` or ``float``."""
    fields: dict[str, type] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            fields |= number_fields(value, f"{prefix}{field.name}.")
        elif type(value) in (int, float):
            fields[prefix + field.name] = type(value)
    return fields


def _replaced(config: Any, field: str, value: float) -> Any:
    head, _, rest = field.partition(".")
    old = getattr(config, head)
    new = _replaced(old, rest, value) if rest else type(old)(value)
    return dataclasses.replace(config, **{head: new})
