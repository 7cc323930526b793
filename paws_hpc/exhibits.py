"""Exhibits: tables, diagrams and texts that a stage leaves in its folder, and the report shows.

A stage calls :func:`write_exhibits` with what :func:`table`, :func:`lines` and :func:`text` return.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paws_hpc.files import read_json, write_json

EXHIBITS = "exhibits.json"
_KEYS = {"table": {"header", "rows"}, "lines": {"x", "y", "curves"}, "text": {"text"}}

Exhibit = dict[str, Any]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | float]], *, caption: str = "") -> Exhibit:
    """A table; every row has as many entries as the header."""
    entries = {"header": [*header], "rows": [*map(list, rows)]}
    return _checked({"title": title, "caption": caption, "kind": "table", **entries})


def lines(
    title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, caption: str = ""
) -> Exhibit:
    """A line diagram: label → (x values, y values), and the names of both axes."""
    points = {label: [list(map(float, values)) for values in curve] for label, curve in curves.items()}
    return _checked({"title": title, "caption": caption, "kind": "lines", "x": x, "y": y, "curves": points})


def text(title: str, words: str) -> Exhibit:
    """A paragraph."""
    return _checked({"title": title, "caption": "", "kind": "text", "text": words})


def write_exhibits(folder: Path, exhibits: Sequence[Exhibit]) -> None:
    """Write the exhibits of the stage whose folder this is, atomically, in place of earlier ones."""
    write_json(folder / EXHIBITS, list(exhibits))


def read_exhibits(folder: Path) -> list[Exhibit]:
    """The exhibits of a stage; none where it left none.

    Raises:
        ValueError: the file is no list of exhibits; it is named.
    """
    path = folder / EXHIBITS
    if not path.exists():
        return []
    value = read_json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path} is no list of exhibits. Remove it, or run its stage again.")  # noqa: TRY004
    try:
        return [_checked(exhibit) for exhibit in value]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no list of exhibits: {error}. Remove it, or run its stage again.") from error


def _checked(exhibit: Exhibit) -> Exhibit:
    kind, title = exhibit["kind"], exhibit["title"]
    if kind not in _KEYS or exhibit.keys() != {"title", "caption", "kind"} | _KEYS[kind]:
        raise ValueError(f"exhibit {title!r} has the fields {sorted(exhibit)}, which fit none of {', '.join(_KEYS)}")
    if kind == "table" and any(len(row) != len(exhibit["header"]) for row in exhibit["rows"]):
        raise ValueError(f"exhibit {title!r}: every row of the table needs {len(exhibit['header'])} entries")
    if kind == "lines":
        for label, (x, y) in exhibit["curves"].items():
            if not x or len(x) != len(y) or not all(map(math.isfinite, [*x, *y])):
                raise ValueError(f"exhibit {title!r}: line {label!r} needs as many x as y, at least one, all finite")
    return exhibit
