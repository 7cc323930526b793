"""The HTML report: a run directory told as one self-contained page.

It reads nothing but the run directory, needs no network and no script, and works on a run that is unfinished or was
killed: a panel without data says what is missing and which stage writes it. The same files give the same bytes.
"""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from paws_hpc.exhibits import Exhibit
from paws_hpc.files import write_text
from paws_hpc.report.gallery import gallery
from paws_hpc.report.panels import Panel, pretrain_panels
from paws_hpc.report.plots import Curve, Plot, draw
from paws_hpc.report.run_record import RunRecord, read_run
from paws_hpc.report.sweep import SWEEP_TITLES, parallel_panel, sweep_panel
from paws_hpc.report.tables import (
    DASH,
    Notice,
    Score,
    confused_pairs,
    duration,
    flatten,
    percent,
    scores,
    stage_times,
    sweep_grid,
    table_rows,
)
from paws_hpc.stages.context import StageContext

_MOST_CLASSES = 30
_CROPS_PIXELS = 640
_HERE = Path(__file__).parent


def run(context: StageContext) -> None:
    """The stage: write the report of a run."""
    build_report(context.run.path)


def build_report(run: Path, folder: Path | None = None) -> Path:
    """Write the report of the run directory ``run``, atomically, and return its path.

    Args:
        run: to tell of.
        folder: to write ``index.html`` to; ``report/`` in ``run`` if none.

    Raises:
        FileNotFoundError: ``run`` is no folder.
        ValueError: a file of the run is garbled or contradicts itself; it is named. An earlier report stays.
    """
    page = render(_HERE / "report.html.j2", _context(read_run(run)))
    path = (folder or run / "report") / "index.html"
    write_text(path, page)
    return path


def render(template: Path, context: dict[str, Any]) -> str:
    """A page of the project's looks: whatever the context holds is text there, never markup.

    Args:
        template: of the page; it puts ``style`` into its head.
        context: everything that it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    shown = {"style": style, "percent": percent, "dash": DASH} | context
    return environment.get_template(template.name).render(shown)


def _context(record: RunRecord) -> dict[str, Any]:
    """Everything the template shows; it computes nothing itself."""
    methods = scores(record)
    return {
        "record": record,
        "byline": _byline(record),
        "notices": notices(record),
        "facts": dict(table_rows(record)),
        "methods": methods,
        "gains": _gains(methods),
        "floor": _floor(methods),
        "stages": stage_times(record),
        "total": duration(sum(stage.elapsed for stage in stage_times(record))),
        "panels": pretrain_panels(record),
        "sweeps": _sweeps(record),
        "exhibits": [(stage, _exhibits(stage, shown)) for stage, shown in record.exhibits.items()],
        "confusion": _confusion(record, methods),
        "gallery": gallery(record),
        "crops": _crops(record),
        "provenance": _provenance(record),
    }


def notices(record: RunRecord) -> list[Notice]:
    """What stands at the top of the page: collapse, failed stages, lost trials, torn files, an unfinished run."""
    found = [
        # The message may begin with the event's name, as it does on the terminal; the title says it already.
        Notice("alarm", f"{name} at step {event.step:,}", event.message.removeprefix(f"{name}: "))
        for event in record.pretrain.events
        if (name := event.name.capitalize())
    ]
    if record.summary.get("collapsed") and not found:
        text = "Pretraining ended with uniform predictions; no accuracy below means anything."
        found.append(Notice("alarm", "Collapse", text))
    for stage in record.stages:
        if stage["state"] == "failed":
            found.append(Notice("alarm", f"Stage {stage['name']} failed", "Its log in the run directory says why."))
    if not record.pretrained:
        text = "The supervised baseline alone was asked for; PAWS-NN, the probes and fine-tuning need pre-training."
        found.append(Notice("note", "This run has no pre-training", text))
    if record.result:
        for sweep, title in SWEEP_TITLES.items():
            found += _missing_trials(record, sweep, title)
    else:
        states = ", ".join(f"{stage['name']} {stage['state']}" for stage in record.stages if stage["name"] != "report")
        text = f"result.json is not there yet: the test split has not been scored. Stages: {states or 'unknown'}."
        found.append(Notice("note", "This run is unfinished", text))
    files = [("pretrain", record.pretrain)]
    files += [(f"finetune/{trial.name}", trial.metrics) for trial in record.finetune]
    files += [(f"baseline/{trial.name}", trial.metrics) for trial in record.baseline]
    for folder, metrics in files:
        if metrics.torn:
            text = "The process was killed while writing it; everything before that line is shown."
            found.append(Notice("note", f"The last line of {folder}/metrics.jsonl is incomplete", text))
    return found


def _missing_trials(record: RunRecord, stage: str, title: str) -> list[Notice]:
    """What a sweep that was asked for lacks; of one that nobody asked for nothing is missing."""
    trials, winner = record.sweep(stage)
    missing = [trial.name for trial in trials if trial.validation_accuracy is None]
    begun = any(trial.metrics.rows for trial in trials)
    if not missing or (winner is None and not begun and stage not in record.asked):
        return []
    count = "1 trial has" if len(missing) == 1 else f"{len(missing)} trials have"
    choice = "The winner was chosen among the others."
    if winner is None:
        choice = "None had one when selection chose, so the result has no score of it."
    return [Notice("alarm", f"{title}: {count} no result", f"{choice} Missing: {'; '.join(missing)}.")]


def _byline(record: RunRecord) -> list[str]:
    """When, by which version, from which commit, with which seed: as far as it is known."""
    commit, seed = record.chain.get("commit"), record.seed
    version = record.chain.get("versions", {}).get("paws_hpc")
    parts = [
        str(record.chain.get("created", ""))[:16].replace("T", " "),
        version and f"paws_hpc {version}",
        f"commit {commit if len(commit) <= 20 else commit[:12]}" if commit else "commit unknown",
        None if seed is None else f"seed {seed}",
    ]
    return [str(part) for part in parts if part]


def _gains(methods: list[Score]) -> dict[str, str]:
    """Percentage points above the baseline, by method; empty without a baseline."""
    base = next((score.top1 for score in methods if score.key == "baseline"), None)
    if base is None:
        return {}
    # A true minus sign, as wide as the plus it stands under.
    return {
        score.key: f"{100 * (score.top1 - base):+.1f}".replace("-", "\N{MINUS SIGN}")
        for score in methods
        if score.key != "baseline"
    }


def _floor(methods: list[Score]) -> int:
    """Where the strips of the result table begin, in percent: the ten below the lowest bound."""
    return min((int(10 * score.low) * 10 for score in methods), default=0)


def _sweeps(record: RunRecord) -> list[dict[str, Any]]:
    """Both sweeps, the fine-tuned network's and the baseline's, as grid and curves."""
    shown = []
    for stage, title in SWEEP_TITLES.items():
        if record.pretrained or stage == "baseline":
            trials, winner = record.sweep(stage)
            shown.append({
                "stage": stage, "title": f"{title}: sweep", "grid": sweep_grid(trials, winner),
                "panels": [parallel_panel(record, stage), sweep_panel(record, stage)],
            })  # fmt: skip
    return shown


def _exhibits(stage: str, exhibits: list[Exhibit]) -> list[Exhibit | Panel]:
    """What a stage left for the report; diagrams are drawn."""
    shown: list[Exhibit | Panel] = []
    for number, exhibit in enumerate(exhibits, start=1):
        if exhibit["kind"] != "lines":
            shown.append(exhibit)
            continue
        curves = [
            Curve(label, np.array(x), np.array(y), series)
            for series, (label, (x, y)) in enumerate(exhibit["curves"].items(), start=1)
        ]
        name, description = f"{stage}-{number}", f"{exhibit['title']}. {exhibit['caption']}"
        svg = draw(name, [Plot(exhibit["y"], curves)], xlabel=exhibit["x"], description=description)
        shown.append(Panel(name, exhibit["title"], exhibit["caption"], Markup(svg)))
    return shown


def _crops(record: RunRecord) -> dict[str, Any] | None:
    """The grid of crops as base64, with its size in pixels and the whole factor by which a small one is enlarged."""
    if record.crops is None:
        return None
    if record.crops[:8] != b"\x89PNG\r\n\x1a\n" or len(record.crops) < 24:
        raise ValueError(f"{record.folder / 'pretrain' / 'crops.png'} is not a PNG file. Remove it and report again.")
    width, height = struct.unpack(">II", record.crops[16:24])
    factor = max(1, _CROPS_PIXELS // width)
    return {"data": base64.b64encode(record.crops).decode("ascii"), "width": width * factor, "height": height * factor,
            "enlarged": factor > 1}  # fmt: skip


def _confusion(record: RunRecord, methods: list[Score]) -> list[dict[str, Any]]:
    """Per method either the whole matrix as rows of (images, share of the true class) or its most confused pairs."""
    classes = [str(name) for name in record.result.get("classes", [])]
    shown = []
    for score in methods:
        if score.confusion is None:
            continue
        if len(classes) != len(score.confusion):
            raise ValueError(
                f"{record.folder / 'result.json'}: {len(classes)} classes, but test.{score.key}.confusion has "
                f"{len(score.confusion)} rows. Score the test split again."
            )
        totals = score.confusion.sum(axis=1)
        rows = [
            [(int(images), float(images) / max(int(total), 1)) for images in row]
            for row, total in zip(score.confusion, totals, strict=True)
        ] if len(classes) <= _MOST_CLASSES else []  # fmt: skip
        shown.append({
            "score": score,
            "classes": classes,
            "totals": [int(total) for total in totals],
            "rows": rows,
            "upright": max(map(len, classes)) <= 2,
            "pairs": [] if rows else confused_pairs(score.confusion, classes),
        })  # fmt: skip
    return shown


def _provenance(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of where the numbers come from: (caption, rows)."""
    commit, seed = record.chain.get("commit"), record.seed
    run = [
        ("name", record.name),
        ("created", str(record.chain.get("created", "unknown"))),
        ("commit", str(commit) if commit else "unknown: the code was not run from a git checkout"),
        ("host cores", str(record.chain.get("host_cores", "unknown"))),
        ("seed", "unknown" if seed is None else str(seed)),
    ]
    tables = [
        ("Run", run),
        ("Versions", flatten(record.chain.get("versions", {}))),
        ("Digests of data and splits", list(record.digests.items())),
        ("Pretraining", flatten({key: value for key, value in record.summary.items() if key != "digests"})),
    ]
    return [(caption, rows) for caption, rows in tables if rows]
