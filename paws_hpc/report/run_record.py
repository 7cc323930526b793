"""A run directory, read for the report: every file may be absent, none may be garbled.

Nothing here computes a result. A file that another stage has not written yet is an empty mapping, an empty list or
``None``; a file that is there but cannot be understood is a ``ValueError`` that names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paws_hpc.config import Identity, flatten
from paws_hpc.engine.tracking import Row, parse_rows
from paws_hpc.exhibits import Exhibit, read_exhibits
from paws_hpc.files import read_json, read_yaml, sealed_digest
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.attempts import first_failure, log_of, read_attempts, stage_state
from paws_hpc.trial import Trial

_NOT_FINITE = ("nan", "inf", "-inf")  # as the metrics file spells what JSON cannot hold


class Event(NamedTuple):
    """Something in a metrics file that is no number, such as a collapse."""

    step: int
    name: str
    message: str


@dataclass(frozen=True)
class Metrics:
    """The rows of one ``metrics.jsonl``, one for each value of its axis and in its order.

    Of two values at one step the later counts: a resumed run repeats the steps after its last checkpoint. ``torn``:
    the last line is incomplete and left out.
    """

    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    torn: bool = False

    def series(self, key: str, *, axis: str = "step") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The axis and the values, both float64 (N,), of the N rows that have ``key``."""
        rows = [row for row in self.rows if row.get(key) is not None and row.get(axis) is not None]
        x = np.array([row[axis] for row in rows], dtype=np.float64)
        return x, np.array([row[key] for row in rows], dtype=np.float64)


class TrialRecord(NamedTuple):
    """A trial of a sweep; ``validation_accuracy`` is None where it has no result (yet).

    ``folds`` are the trainings of its cross-validation, each scored on the images that it left out.
    """

    trial: Trial
    validation_accuracy: float | None
    metrics: Metrics
    folds: Sequence[Metrics] = ()


@dataclass(frozen=True)
class RunRecord:
    """What the files in ``folder`` hold; ``config`` is the text of config.yaml, ``settings`` are its fields, flat."""

    folder: Path
    chain: dict[str, Any]
    config: str | None
    settings: Identity
    prepared: dict[str, Any]
    pretrain: Metrics
    summary: dict[str, Any]
    finetune: list[TrialRecord]
    baseline: list[TrialRecord]
    selected: dict[str, Any]
    result: dict[str, Any]
    exhibits: dict[str, list[Exhibit]]

    @property
    def name(self) -> str:
        """The chain's name, or the folder's where there is no chain.json."""
        return str(self.chain.get("name") or self.folder.resolve().name)

    @property
    def seed(self) -> int | None:
        """The result's seed, or before there is one the frozen config's."""
        seed: int | None = self.result.get("seed", self.settings.get("seed"))
        return seed

    @property
    def collapsed(self) -> bool:
        """Whether pre-training ended, or was stopped, with uniform predictions."""
        stopped = any(event.name == "collapse" for event in self.pretrain.events)
        return stopped or bool(self.summary.get("collapsed"))

    @property
    def pretrained(self) -> bool:
        """Whether the run has, or will have, a pre-trained network."""
        return bool(self.result.get("pretrained", True))

    def sweep(self, stage: str) -> tuple[list[TrialRecord], str | None]:
        """The trials of ``finetune`` or ``baseline``, and the winner's name if selection chose one."""
        if stage == "finetune":
            return self.finetune, self.selected.get("trial")
        return self.baseline, self.selected.get("baseline", {}).get("trial")

    @property
    def digests(self) -> dict[str, str]:
        """The digests of stores and splits as far as they are known; ``test`` is the test split's."""
        known = self.result.get("digests") or self.prepared.get("digests") or self.summary.get("digests") or {}
        return {name: str(digest) for name, digest in flatten(known).items()}

    @cached_property
    def right(self) -> dict[str, NDArray[np.bool_]]:
        """Method → which test images it classified rightly, in the order of the test store; empty of older runs."""
        path = self.folder / "selection" / "predictions.npz"
        if not self.result or not path.exists():
            return {}
        sealed_digest(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] == file["labels"] for name in file.files if name != "labels"}

    def failures(self, stage: str) -> list[str]:
        """What the jobs of a stage that failed said, and where their logs are."""
        said = []
        for folder in sorted({path.parent for path in (self.folder / "jobs" / stage).rglob("start-*.json")}):
            last = read_attempts(folder)[-1]
            if last.end is None or last.end["how"] not in ("failed", "crashed"):
                continue
            first = first_failure(last)
            words = f"{first['type']}: {first['message']}" if first else last.end["message"] or "It left no message."
            log = log_of(self.folder / "logs" / stage, last.job_id, first["rank"] if first else 0)
            job = f"{folder.relative_to(self.folder / 'jobs').as_posix()}: " if last.job != stage else ""
            said.append(f"{job}{words}{f' Its log: {log.relative_to(self.folder)}.' if log else ''}")
        return said

    @cached_property
    def stages(self) -> dict[str, tuple[str, float | None]]:
        """State and seconds of each stage; empty where there is no chain.json."""
        return {stage: stage_state(self.folder / "jobs", stage) for stage in STAGES} if self.chain else {}

    def state(self, stage: str) -> str:
        """The state of a stage as one word; ``unknown`` where there is no chain.json."""
        return self.stages[stage][0] if self.stages else "unknown"


def read_run(run: Path) -> RunRecord:
    """Read the run directory ``run``.

    Raises:
        FileNotFoundError: ``run`` is no folder.
        ValueError: a file in it is not what its name says; file and line or key are named.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a run directory: there is no such folder. Give the folder of a run.")
    selected, config = _mapping(run / "selected.json"), run / "config.yaml"
    return RunRecord(
        folder=run,
        chain=_mapping(run / "chain.json"),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        settings=flatten(_mapping(config)),
        prepared=_mapping(run / "prepare" / "DONE"),
        pretrain=read_metrics(run / "pretrain" / "metrics.jsonl"),
        summary=_mapping(run / "pretrain" / "summary.json"),
        finetune=_trials(run / "finetune", selected.get("missing", [])),
        baseline=_trials(run / "baseline", selected.get("baseline", {}).get("missing", [])),
        selected=selected,
        result=_mapping(run / "result.json"),
        exhibits={stage: exhibits for stage in STAGES if (exhibits := read_exhibits(run / stage))},
    )


def read_runs(runs: Sequence[Path]) -> list[RunRecord]:
    """Read several run directories; of those that have one name, the name says in which folder each is.

    Raises:
        ValueError: as :func:`read_run`, or one run is there twice.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"{', '.join(map(str, runs))}: a run is compared with others. Name each run once.")
    records = [read_run(run) for run in runs]
    counts = Counter(record.name for record in records)
    return [
        record if counts[record.name] == 1
        else replace(record, chain=record.chain | {"name": f"{record.name} ({record.folder})"})
        for record in records
    ]  # fmt: skip


def read_metrics(path: Path, *, axis: str = "step") -> Metrics:
    """Read a metrics file; an absent one has no rows.

    Raises:
        ValueError: a line other than a torn last one is not a JSON object with a number under ``axis``, or a metric in
            it is no number; file and line are named.
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
        for key, value in row.items():
            if not (value is None or isinstance(value, int | float) or key in ("event", "message")) and (
                not isinstance(value, str) or value not in _NOT_FINITE
            ):
                raise ValueError(
                    f"{path}, line {number}: {key!r} is {value!r}, not a number. Restore the file or remove it."
                )
        merged.setdefault(position, {}).update(row)
        if "event" in row:
            event = Event(int(position), str(row["event"]), str(row.get("message", "")))
            events[event.step, event.name] = event
    return Metrics([merged[position] for position in sorted(merged)], list(events.values()), torn)


def _trials(folder: Path, missing: list[str]) -> list[TrialRecord]:
    """The trials of a sweep in the order of its tables: those with a folder, and the ``missing`` ones."""
    names = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
    records = []
    for name in names | set(missing):
        try:
            trial = Trial.parse(name)
        except ValueError:  # a folder that somebody else made
            continue
        accuracy = _mapping(folder / name / "result.json").get("validation_accuracy")
        metrics, *folds = [
            read_metrics(place / "metrics.jsonl", axis="epoch")
            for place in (folder / name, *sorted((folder / name).glob("fold-*")))
        ]
        records.append(TrialRecord(trial, None if accuracy is None else float(accuracy), metrics, folds))
    return sorted(records, key=lambda record: record.trial.rank)


def _mapping(path: Path) -> dict[str, Any]:
    """The JSON object or YAML mapping in ``path``; empty where there is no such file."""
    if not path.exists():
        return {}
    value = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not the program
            f"{path} holds {type(value).__name__}, not fields by name. Restore it or remove it."
        )
    return value
