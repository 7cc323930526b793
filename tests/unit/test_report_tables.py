"""The report's numbers: intervals, tables, sweeps, and what it makes of a metrics file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paws_hpc.report.panels import pretrain_panels
from paws_hpc.report.plots import Curve, Plot, draw, thin
from paws_hpc.report.run_record import Metrics, TrialRecord, read_metrics, read_run
from paws_hpc.report.tables import confused_pairs, duration, result_table, scores, sweep_grid, wilson_interval
from tests.attempts import write_attempt
from tests.tiny import trial_at


def _result(run: Path, **test: Any) -> Path:
    (run / "result.json").write_text(json.dumps({"labels": 40, "classes": ["a", "b"], "test": {"count": 10, **test}}))
    return run


@pytest.mark.parametrize(("correct", "count"), [(384, 400), (1, 7), (25_000, 50_000), (49_999, 50_000)])
def test_both_ends_of_the_interval_lie_1_96_standard_errors_from_the_estimate(correct: int, count: int) -> None:
    # Wilson's interval is defined by this: the error is taken at the end, not at the estimate.
    for bound in wilson_interval(correct, count):
        error = math.sqrt(bound * (1 - bound) / count)
        assert abs(bound - correct / count) / error == pytest.approx(1.959964, abs=1e-5)


def test_the_interval_ends_at_the_possible() -> None:
    z2 = 1.959964**2
    assert wilson_interval(0, 10) == (0.0, pytest.approx(z2 / (10 + z2), abs=1e-6))
    assert wilson_interval(10, 10) == (pytest.approx(10 / (10 + z2), abs=1e-6), 1.0)
    for correct, count in [(0, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="not a proportion"):
            wilson_interval(correct, count)


def test_the_table_has_a_dash_for_what_was_not_scored(tmp_path: Path) -> None:
    _result(tmp_path, paws_nn={"top1": 0.9, "top5": None, "confusion": [[5, 0], [1, 4]]})
    table = dict(result_table(read_run(tmp_path)))
    assert table["labels"] == "40"
    assert table["PAWS-NN"] == "90.0 % (95 % interval 59.6\N{EN DASH}98.2 %)"
    assert table["fine-tuned"] == table["baseline"] == "\N{EN DASH}"


def test_a_result_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    _result(tmp_path, paws_nn={"top1": 0.9, "confusion": [[5, 0], [2, 3]]})
    with pytest.raises(ValueError, match=r"result\.json: test\.paws_nn\.confusion has 8 of 10 .* means 9"):
        scores(read_run(tmp_path))


def test_seconds_add_up_over_starts_and_leave_the_report_out(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text(json.dumps({"name": "x"}))
    write_attempt(tmp_path, "pretrain", how="requeued", seconds=1800)
    write_attempt(tmp_path, "pretrain", how="done", seconds=3600, number=2)
    write_attempt(tmp_path, "finetune/lr=0.1,epochs=2", how="done", seconds=2)
    write_attempt(tmp_path, "finetune/lr=0.2,epochs=2", how="failed", seconds=1)
    write_attempt(tmp_path, "report", how=None)
    assert result_table(read_run(tmp_path))[-6:] == [
        ("stage prepare", "\N{EN DASH}"),
        ("stage pretrain", "5,400 s (1 h 30 min)"),
        ("stage finetune", "3.0 s"),
        ("stage baseline", "\N{EN DASH}"),
        ("stage selection", "\N{EN DASH}"),
        ("stage calibrate", "\N{EN DASH}"),
    ]
    assert read_run(tmp_path).state("finetune") == "failed"
    assert duration(599.96) == "600.0 s"


def test_a_run_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a run directory"):
        result_table(read_run(tmp_path / "nowhere"))


def test_a_torn_last_line_is_left_out_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 0, "a": 1.0}\n{"step": 1, "a": 2.0}\n{"step": 2, "event": "ü'.encode()[:-1])
    metrics = read_metrics(path)
    assert metrics.torn
    assert metrics.series("a")[1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "line",
    ['{"step": 1, "a"', "[1]", '{"a": 1.0}', '{"step": "1"}', '{"step": true}', '{"step": 1, "train/loss": "hello"}',
     '{"step": 1, "train/loss": [1.0]}'],
)  # fmt: skip
def test_any_other_bad_line_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2\b.*(needs one|Restore the file or remove it)\."):
        read_metrics(path)


def test_steps_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    rows = [(0, 9.0), (1, 8.0), (2, 7.0), (1, 8.5), (2, 7.5), (3, 6.5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "a": value}) + "\n" for step, value in rows))
    x, y = read_metrics(path).series("a")
    assert x.tolist() == [0, 1, 2, 3]
    assert y.tolist() == [9.0, 8.5, 7.5, 6.5]


def test_values_that_are_not_finite_are_said_and_not_hidden(tmp_path: Path) -> None:
    values = [1.0, "nan", "inf", 2.0]  # as the metrics file spells what JSON cannot hold
    rows = [json.dumps({"step": step, "train/grad_norm": value}) for step, value in enumerate(values)]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "metrics.jsonl").write_text("\n".join(rows))
    panel = next(panel for panel in pretrain_panels(read_run(tmp_path)) if panel.name == "gradient-norm")
    assert panel.caption.endswith("Gradient norm has values that are not finite, first at step 1.")
    assert panel.svg is not None


def test_the_grid_has_a_place_for_every_combination() -> None:
    trials = [
        TrialRecord(trial_at(0.01, 30), 0.9, Metrics()),
        TrialRecord(trial_at(0.1, 30), 0.8, Metrics()),
        TrialRecord(trial_at(0.1, 50), None, Metrics()),
    ]
    grid = sweep_grid(trials, "lr=0.01,epochs=30")
    assert (grid["field"], grid["columns"], grid["corner"]) == ("lr", ["0.01", "0.1"], "epochs")
    assert [head for head, _ in grid["rows"]] == ["30", "50"]
    assert [[cell["state"] for cell in row] for _, row in grid["rows"]] == [["chosen", "done"], ["absent", "missing"]]
    assert [cell["strength"] for cell in grid["rows"][0][1]] == [1.0, 0.0]
    assert sweep_grid([], None)["rows"] == []


def test_only_folders_that_are_named_as_trials_are_trials(tmp_path: Path) -> None:
    for name in ("lr=0.05,epochs=30", "logs", "lr=x,epochs=3"):
        (tmp_path / "finetune" / name).mkdir(parents=True)
    assert [record.trial.name for record in read_run(tmp_path).finetune] == ["lr=0.05,epochs=30"]


def test_pairs_are_ordered_by_images_and_leave_right_answers_out() -> None:
    confusion = np.array([[9, 1, 0], [0, 6, 4], [0, 0, 10]])
    assert confused_pairs(confusion, ["a", "b", "c"]) == [("b", "c", 4, 0.4), ("a", "b", 1, 0.1)]
    assert confused_pairs(confusion, ["a", "b", "c"], limit=1) == [("b", "c", 4, 0.4)]


def test_a_long_curve_keeps_its_spike() -> None:
    y = np.zeros(100_000)
    y[77_777] = 5.0
    x, mean, low, high = thin(np.arange(100_000.0), y)
    assert len(x) == len(mean) == 400
    assert (high.max(), low.max()) == (5.0, 0.0)
    assert mean.mean() == pytest.approx(y.mean())


def test_a_drawing_takes_its_colours_from_the_page_and_survives_awkward_values() -> None:
    x = np.arange(5.0)
    curves = [
        Curve("a", x, np.array([1e-6, np.nan, np.inf, 1e6, 1.0])),
        Curve("b", x[:1], np.array([3.0]), series=2),
        Curve("", x, np.full(5, 2.0), series=0),
    ]
    svg = draw("one", [Plot("", curves, log=True)], xlabel="step", description='a "quoted" <text>')
    assert "#00000" not in svg
    assert "var(--series-2)" in svg
    assert 'aria-label="a &quot;quoted&quot; &lt;text&gt;"' in svg
    assert svg == draw("one", [Plot("", curves, log=True)], xlabel="step", description='a "quoted" <text>')
