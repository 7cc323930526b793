"""What a run directory says, read for the report: every file may be absent, none may be garbled.

Nothing here computes a result. A file that another stage has not written yet is an empty mapping, an empty list or
``None``; a file that is there but cannot be understood is a ``ValueError`` that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

from paws_hpc.config import Identity, flatten
from paws_hpc.engine.tracking import Row, parse_rows
from paws_hpc.exhibits import Exhibit, read_exhibits
from paws_hpc.files import read_json
from paws_hpc.stage_table import DEFAULT_STAGES, STAGES
from paws_hpc.stages.attempts import stage_state
from paws_hpc.trial import Trial

_WORDS = ("event", "message")
_NOT_FINITE = ("nan", "inf", "-inf")  # as the metrics file spells what JSON cannot hold


@dataclass(frozen=True)
class Event:
    """Something a stage wrote into its metrics that is no number, such as a collapse."""

    step: int
    name: str
    message: str


@dataclass(frozen=True)
class Metrics:
    """Rows of one ``metrics.jsonl``, one per value of its axis and in its order.

    Rows of equal step are merged, and of two values the one written later counts: a resumed run repeats the steps
    after its last checkpoint.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    torn: bool = False

    def series(self, key: str, *, axis: str = "step") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The axis and the values, both float64 (N,), of the N rows that have ``key``."""
        rows = [row for row in self.rows if row.get(key) is not None and row.get(axis) is not None]
        x = np.array([row[axis] for row in rows], dtype=np.float64)
        return x, np.array([row[key] for row in rows], dtype=np.float64)


@dataclass(frozen=True)
class TrialRecord:
    """A trial of a sweep as far as it went: ``validation_accuracy`` is None where it has no result (yet)."""

    trial: Trial
    validation_accuracy: float | None
    metrics: Metrics

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.trial.name


@dataclass(frozen=True)
class RunRecord:
    """All that the report shows, as read from ``folder``; ``settings`` are the fields of ``config``, flat."""

    folder: Path
    chain: dict[str, Any]
    config: str | None
    settings: Identity
    prepared: dict[str, Any]
    pretrain: Metrics
    summary: dict[str, Any]
    crops: bytes | None
    finetune: list[TrialRecord]
    baseline: list[TrialRecord]
    selected: dict[str, Any]
    result: dict[str, Any]
    gallery: dict[str, Any]
    gallery_sheet: bytes | None
    exhibits: dict[str, list[Exhibit]]

    @property
    def name(self) -> str:
        """The chain's name, or the folder's where no chain.json says one."""
        return str(self.chain.get("name") or self.folder.resolve().name)

    @property
    def seed(self) -> int | None:
        """The seed that the result states, or before there is one the frozen config's."""
        seed: int | None = self.result.get("seed", self.settings.get("seed"))
        return seed

    @property
    def pretrained(self) -> bool:
        """Whether the run has, or will have, a pre-trained network; its result says where it has none."""
        return bool(self.result.get("pretrained", True))

    @property
    def asked(self) -> list[str]:
        """The stages of the latest launch; all of them where no config says."""
        asked: list[str] = self.settings.get("stages", list(DEFAULT_STAGES))
        return asked

    def sweep(self, stage: str) -> tuple[list[TrialRecord], str | None]:
        """The trials of ``finetune`` or ``baseline``, and the winner's name if selection chose one."""
        if stage == "finetune":
            return self.finetune, self.selected.get("trial")
        return self.baseline, self.selected.get("baseline", {}).get("trial")

    @property
    def digests(self) -> dict[str, str]:
        """Of stores and splits, as far as stages have told them; ``test`` is the test split's."""
        told = self.result.get("digests") or self.prepared.get("digests") or self.summary.get("digests") or {}
        return {name: str(digest) for name, digest in flatten(told).items()}

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Name, state and seconds of every stage; empty where no chain was begun."""
        if not self.chain:
            return []
        told = {stage: stage_state(self.folder / "jobs", stage) for stage in STAGES}
        return [{"name": stage, "state": state, "seconds": seconds} for stage, (state, seconds) in told.items()]

    def state(self, stage: str) -> str:
        """The state of a stage as one word; ``unknown`` where no chain was begun."""
        return next((str(entry["state"]) for entry in self.stages if entry["name"] == stage), "unknown")


def read_run(run: Path) -> RunRecord:
    """Read the run directory ``run``.

    Raises:
        FileNotFoundError: ``run`` is no folder.
        ValueError: a file in it is not what its name says; file and line or key are named.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a run directory: there is no such folder. Give the folder of a run.")
    selected = _mapping(run / "selected.json")
    config, crops = run / "config.yaml", run / "pretrain" / "crops.png"
    sheet = run / "selection" / "gallery.png"
    text = config.read_text(encoding="utf-8") if config.exists() else None
    return RunRecord(
        folder=run,
        chain=_mapping(run / "chain.json"),
        config=text,
        settings={} if text is None else _settings(config, text),
        prepared=_mapping(run / "prepare" / "DONE"),
        pretrain=read_metrics(run / "pretrain" / "metrics.jsonl"),
        summary=_mapping(run / "pretrain" / "summary.json"),
        crops=crops.read_bytes() if crops.exists() else None,
        finetune=_trials(run / "finetune", selected.get("missing", [])),
        baseline=_trials(run / "baseline", selected.get("baseline", {}).get("missing", [])),
        selected=selected,
        result=_mapping(run / "result.json"),
        gallery=_mapping(run / "selection" / "gallery.json"),
        gallery_sheet=sheet.read_bytes() if sheet.exists() else None,
        exhibits={stage: shown for stage in STAGES if (shown := read_exhibits(run / stage))},
    )


def read_metrics(path: Path, *, axis: str = "step") -> Metrics:
    """Read a metrics file; an absent one has no rows.

    A killed process may leave its last line unfinished, and that line is left out (``torn`` says so).

    Raises:
        ValueError: any other line is not a JSON object with a number under ``axis``, or a metric in it is no number;
            file and line are named.
    """
    if not path.exists():
        return Metrics()
    rows, torn = parse_rows(path)
    merged: dict[float, Row] = {}
    events: dict[tuple[int, str], Event] = {}
    for number, row in enumerate(rows, start=1):
        position = row.get(axis)
        if not isinstance(position, int | float) or isinstance(position, bool):
            raise ValueError(  # noqa: TRY004 - the file is wrong, not the program
                f"{path}, line {number} has no number under {axis!r}. Every row needs one."
            )
        _check_numbers(path, number, row)
        merged.setdefault(position, {}).update(row)
        if "event" in row:
            event = Event(int(position), str(row["event"]), str(row.get("message", "")))
            events[event.step, event.name] = event
    return Metrics([merged[position] for position in sorted(merged)], list(events.values()), torn)


def _check_numbers(path: Path, number: int, row: Row) -> None:
    """Raise ValueError unless all of a row but an event's words are numbers, or names of those that JSON lacks."""
    for key, value in row.items():
        if isinstance(value, int | float) or value is None or key in _WORDS:
            continue
        if not (isinstance(value, str) and value in _NOT_FINITE):
            raise ValueError(
                f"{path}, line {number}: {key!r} is {value!r}, not a number. Restore the file or remove it."
            )


def _trials(folder: Path, missing: Iterable[str]) -> list[TrialRecord]:
    """The trials of a sweep in their tables' order: those with a folder and those that are known to be missing."""
    names = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
    found = []
    for name in names | set(missing):
        try:
            trial = Trial.parse(name)
        except ValueError:  # a folder that somebody else made
            continue
        accuracy = _mapping(folder / name / "result.json").get("validation_accuracy")
        metrics = read_metrics(folder / name / "metrics.jsonl", axis="epoch")
        found.append(TrialRecord(trial, None if accuracy is None else float(accuracy), metrics))
    return sorted(found, key=lambda record: record.trial.rank)


def _settings(path: Path, text: str) -> Identity:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}. Restore it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not fields. Restore it.")  # noqa: TRY004
    return flatten(value)


def _mapping(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the program
            f"{path} holds {type(value).__name__}, not a JSON object. Restore it or remove it."
        )
    return value
