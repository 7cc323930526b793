"""The HTML report: a run directory as one self-contained page.

It reads nothing but the run directory, needs no network and no script, and works on a run that is unfinished or was
killed: a panel without data says what is missing and which stage writes it. The same files give the same bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from paws_hpc.files import write_text
from paws_hpc.metrics import percent
from paws_hpc.report.gallery import data_uri, gallery, opened_png
from paws_hpc.report.panels import SWEEP_TITLES, exhibit_panel, pretrain_panels, sweep_panel
from paws_hpc.report.run_record import RunRecord, read_run
from paws_hpc.report.tables import (
    DASH,
    METHODS,
    Notice,
    Score,
    by_class,
    confused_pairs,
    duration,
    labels_text,
    points,
    result_table,
    scores,
    sweep_grid,
    text_rows,
    timed_stages,
)
from paws_hpc.stage_table import DEFAULT_STAGES
from paws_hpc.stages.context import StageContext

_MOST_CLASSES = 30
_CROPS_PIXELS = 640
_HERE = Path(__file__).parent


def run(context: StageContext) -> None:
    """The stage: write the report of a run."""
    build_report(context.run.path)


def build_report(run: Path, folder: Path | None = None) -> Path:
    """Write the report of a run directory, ``index.html`` in ``folder`` or in ``report/`` of the run, atomically.

    Raises as :func:`read_run`, and ValueError where files contradict each other; then an earlier report stays.
    """
    page = render(_HERE / "report.html.j2", _context(read_run(run)))
    path = (folder or run / "report") / "index.html"
    write_text(path, page)
    return path


LAUNCHED_BY = "launched by"
"""Row of :func:`provenance` with the command line, which may name folders and accounts."""


def render(template: Path, context: dict[str, Any]) -> str:
    """A page in the project's style: a string of the context is text there, never markup; the head needs ``style``.

    Headings of sections make its contents, and each of the glossary's words is explained in the section where it first
    stands.
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
    page = environment.get_template(template.name).render(shown)
    headings = re.findall(r'<section id="([^"]+)"[^>]*>\s*<h2 id[^>]*>(.+?)</h2>', page)
    if not headings:
        return page
    links = "".join(f'<li><a href="#{section}">{title}</a></li>' for section, title in headings)
    contents = f'<nav class="contents" aria-label="Contents"><ol>{links}</ol></nav>'
    return _explained(page.replace("<main>", f"{contents}\n<main>", 1))


def _explained(page: str) -> str:
    """The page with the words of the glossary below the heading of the section where each first stands."""
    unknown, sections = glossary(), re.split("(?=<section )", page)
    for number, section in enumerate(sections):
        head, heading, body = section.partition("</h2>")
        text = re.sub(r"<(pre|svg|style)\b.*?</\1>|<[^>]*>", " ", section, flags=re.DOTALL)
        found = [word for word in unknown if re.search(rf"(?<![\w-]){re.escape(word)}s?(?![\w-])", text, re.IGNORECASE)]
        if heading and found:
            meanings = "".join(f"<dt>{escape(word)}</dt><dd>{escape(unknown.pop(word))}</dd>" for word in found)
            summary = f"<summary>Words: {', '.join(map(escape, found))}</summary>"
            heading += f'<details class="words">{summary}<dl>{meanings}</dl></details>'
        sections[number] = f"{head}{heading}{body}"
    return "".join(sections)


def glossary() -> dict[str, str]:
    """Word → meaning, of the tables of docs/glossary.md but that of benchmarks; of several with one word the first."""
    page = (_HERE / "glossary.md").read_text(encoding="utf-8").partition("\n## Benchmarks")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    words = {
        re.sub(r" \(.*\)", "", word): meaning.replace("`", "")
        for term, meaning in reversed(rows)
        for word in term.split(", ")
    }
    return {word: words[word] for word in sorted(words, key=str.lower) if len(word) > 1 and word != "term"}


def _context(record: RunRecord) -> dict[str, Any]:
    methods = scores(record)
    return {
        "record": record,
        "notices": notices(record),
        "facts": dict(result_table(record)),
        "labels": labels_text(record),
        "methods": methods,
        "points": points,
        "floor": min((int(10 * score.low) * 10 for score in methods), default=0),  # percent: the ten below the lowest
        "stages": timed_stages(record),
        "total": sum(seconds or 0.0 for _, seconds in timed_stages(record).values()),
        "duration": duration,
        "panels": pretrain_panels(record),
        "sweeps": [
            {
                "stage": stage,
                "title": f"{title}: sweep",
                "grid": sweep_grid(*record.sweep(stage)),
                "panel": sweep_panel(record, stage),
            }
            for stage, title in SWEEP_TITLES.items()
            if record.pretrained or stage == "baseline"
        ],
        "exhibits": {
            stage: [exhibit_panel(stage, number, exhibit) for number, exhibit in enumerate(exhibits, start=1)]
            for stage, exhibits in record.exhibits.items()
        },
        "confusion": _confusion(record, methods),
        "by_class": _by_class(record, methods),
        "gallery": gallery(record),
        "crops": _crops(record.folder / "pretrain" / "crops.png"),
        "provenance": provenance(record),
    }


def notices(record: RunRecord) -> list[Notice]:
    """What stands at the top of the page: collapse, failed stages, lost trials, torn files, an unfinished run."""
    listed = [
        # The message may begin with the event's name, as it does on the terminal; the title says it already.
        Notice("alarm", f"{name} at step {event.step:,}", event.message.removeprefix(f"{name}: "))
        for event in record.pretrain.events
        if (name := event.name.capitalize())
    ]
    if record.summary.get("collapsed") and not listed:
        text = "Pretraining ended with uniform predictions; no accuracy below means anything."
        listed.append(Notice("alarm", "Collapse", text))
    for stage, (state, _) in record.stages.items():
        if state == "failed":
            listed.append(Notice("alarm", f"Stage {stage} failed", " ".join(record.failures(stage))))
    if not record.pretrained:
        text = "Only the supervised baseline was launched; PAWS-NN, the probes and fine-tuning need pre-training."
        listed.append(Notice("note", "This run has no pre-training", text))
    if record.result:
        for sweep, title in SWEEP_TITLES.items():
            listed += _missing_trials(record, sweep, title)
    else:
        states = ", ".join(f"{stage} {state}" for stage, (state, _) in timed_stages(record).items())
        text = f"result.json is not there yet: the test split has not been scored. Stages: {states or 'unknown'}."
        listed.append(Notice("note", "This run is unfinished", text))
    files = {"pretrain": record.pretrain}
    for sweep in SWEEP_TITLES:
        files |= {f"{sweep}/{trial.trial.name}": trial.metrics for trial in record.sweep(sweep)[0]}
    for folder, metrics in files.items():
        if metrics.torn:
            text = "The process was killed while writing it; everything before that line is shown."
            listed.append(Notice("note", f"The last line of {folder}/metrics.jsonl is incomplete", text))
    return listed


def _missing_trials(record: RunRecord, stage: str, title: str) -> list[Notice]:
    """The trials of a sweep that have no result; none of a sweep that was never launched."""
    trials, winner = record.sweep(stage)
    missing = [trial.trial.name for trial in trials if trial.validation_accuracy is None]
    begun = any(trial.metrics.rows for trial in trials)
    if not missing or (winner is None and not begun and stage not in record.settings.get("stages", DEFAULT_STAGES)):
        return []
    count = "1 trial has" if len(missing) == 1 else f"{len(missing)} trials have"
    choice = "The winner was chosen among the others."
    if winner is None:
        choice = "None had one when selection chose, so the result has no score of it."
    return [Notice("alarm", f"{title}: {count} no result", f"{choice} Missing: {'; '.join(missing)}.")]


def _by_class(record: RunRecord, methods: list[Score]) -> dict[str, Any] | None:
    """Figures by class of the fine-tuned network, without one of the first method that has a confusion matrix."""
    able = {score.name: score.confusion for score in methods if score.confusion is not None}
    if not able:
        return None
    name = METHODS["fine_tuned"] if METHODS["fine_tuned"] in able else next(iter(able))
    rows = by_class(able[name], [str(each) for each in record.result["classes"]])
    return {"name": name, "rows": rows[:_MOST_CLASSES], "of": len(rows)}


def _crops(path: Path) -> dict[str, Any] | None:
    """The grid of crops, with its size in pixels and the whole factor by which a small one is enlarged."""
    if not path.exists():
        return None
    grid = opened_png(path)
    factor = max(1, _CROPS_PIXELS // grid.width)
    size = {"width": grid.width * factor, "height": grid.height * factor, "enlarged": factor > 1}
    return size | {"data": data_uri(path, grid)}


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


def provenance(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of where the numbers come from: (caption, rows)."""
    commit, seed = record.chain.get("commit"), record.seed
    version = record.chain.get("versions", {}).get("paws_hpc", "unknown")
    run = [
        ("name", record.name),
        ("created", str(record.chain.get("created", "unknown"))),
        ("commit", str(commit) if commit else f"none: version {version}, not from a git tree"),
        (LAUNCHED_BY, str(record.chain.get("command", "unknown"))),
        ("launched on", f"{record.chain.get('processor', 'unknown')}, {record.chain.get('host_cores', '?')} cores"),
        ("trained on", str(record.summary.get("device", "unknown"))),
        ("seed", "unknown" if seed is None else str(seed)),
    ]
    tables = [
        ("Run", run),
        ("Versions", text_rows(record.chain.get("versions", {}))),
        ("Digests of data and splits", list(record.digests.items())),
        (
            "Pretraining",
            text_rows({key: value for key, value in record.summary.items() if key not in ("digests", "device")}),
        ),
    ]
    return [(caption, rows) for caption, rows in tables if rows]
