"""Runs as one table: what shares a row, what the spread is, and what must not be compared in silence."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from paws_hpc.report.comparison import Comparison, as_json, as_markdown, compare, warnings
from paws_hpc.report.comparison_page import build_comparison, comparison_folder
from paws_hpc.report.run_record import read_runs

CONFIG = "name: {name}\nseed: {seed}\ndevice: cpu\noptimizer:\n  peak_lr: 5.0\nlabels:\n  per_class: 4\n"


def write(
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    right: int | None = 90,
    test: str = "t",
    config: str = CONFIG,
    **chain: Any,
) -> Path:
    """A run of 100 test images with ``right`` of them right, or one that has no result."""
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text(config.format(name=name, seed=seed))
    (run / "chain.json").write_text(json.dumps({"name": name, "commit": "c0ffee"} | chain))
    if right is not None:
        result = {
            "seed": seed,
            "test": {"count": 100, "paws_nn": {"top1": right / 100}},
            "digests": {"test": test * 32},
        }
        (run / "result.json").write_text(json.dumps(result))
    return run


def compared(*runs: Path) -> Comparison:
    return compare(read_runs(runs))


def titles(comparison: Comparison) -> list[str]:
    return [notice.title for notice in warnings(comparison)]


def test_a_field_that_is_younger_than_a_run_does_not_set_it_apart(tmp_path: Path) -> None:
    older = write(tmp_path, "r-seed0", seed=0)
    newer = write(tmp_path, "r-seed1", seed=1, config=CONFIG + "  all: false\n")
    other = write(tmp_path, "s-seed1", seed=1, config=CONFIG + "  all: true\n")
    assert len(compared(older, newer).rows) == 1
    assert compared(older, other).differing == {"labels.all": {"r-seed0": "false", "s-seed1": "true"}}


def test_runs_that_differ_only_in_the_seed_are_one_row_with_the_deviation_of_a_sample(tmp_path: Path) -> None:
    rights = [90, 93, 87, 96]
    comparison = compared(*(write(tmp_path, f"r-seed{seed}", seed=seed, right=n) for seed, n in enumerate(rights)))
    (row,) = comparison.rows
    summary = row.summary("paws_nn")
    assert summary is not None
    assert (row.label, row.seeds, comparison.differing) == ("r", [0, 1, 2, 3], {})
    assert summary.mean == pytest.approx(0.915)
    assert summary.deviation == pytest.approx(statistics.stdev(rights) / 100)
    assert str(summary) == "91.5 ± 3.9 %"
    assert list(summary.values) == ["r-seed0", "r-seed1", "r-seed2", "r-seed3"]
    assert titles(comparison) == []


def test_any_field_with_an_effect_makes_a_row_and_others_do_not(tmp_path: Path) -> None:
    almost = CONFIG.replace("5.0", "5.0000001")
    device = CONFIG.replace("cpu", "cuda")
    comparison = compared(
        write(tmp_path, "a"), write(tmp_path, "b", config=almost), write(tmp_path, "c", seed=1, config=device)
    )
    assert [row.fields for row in comparison.rows] == [
        {"optimizer.peak_lr": "5.0"},
        {"optimizer.peak_lr": "5.0000001"},
    ]
    assert [[run.name for run in row.runs] for row in comparison.rows] == [["a", "c"], ["b"]]
    assert as_markdown(comparison).splitlines()[:4] == [
        "| optimizer.peak_lr | runs | PAWS-NN |",
        "| --- | --- | --- |",
        "| 5.0 | 2 | 90.0 ± 0.0 % |",
        "| 5.0000001 | 1 | 90.0 % |",
    ]


def test_runs_on_different_test_images_share_no_row_and_an_alarm_says_so(tmp_path: Path) -> None:
    comparison = compared(write(tmp_path, "a"), write(tmp_path, "b", seed=1, test="u"))
    assert len(comparison.rows) == 2
    (alarm,) = warnings(comparison)
    assert (alarm.level, alarm.title) == ("alarm", "These runs have different test sets")
    assert "tttttttt: a; uuuuuuuu: b" in alarm.text
    assert "**These runs have different test sets**" in as_markdown(comparison)
    assert as_json(comparison)["warnings"][0]["level"] == "alarm"


def test_a_run_without_a_result_stands_with_its_setting_and_not_in_the_mean(tmp_path: Path) -> None:
    comparison = compared(write(tmp_path, "a"), write(tmp_path, "b", seed=1, right=None))
    (row,) = comparison.rows
    summary = row.summary("paws_nn")
    assert summary is not None
    assert (len(row.runs), summary.values, summary.deviation) == (2, {"a": 0.9}, None)
    assert titles(comparison) == ["1 of 2 runs have no test scores"]


def test_what_else_a_reader_must_know(tmp_path: Path) -> None:
    again = write(tmp_path, "b", commit="other")
    (again / "pretrain").mkdir()
    (again / "pretrain" / "summary.json").write_text('{"collapsed": true}')
    assert titles(compared(write(tmp_path, "a"), again)) == [
        "1 of 2 runs collapsed",
        "2 runs of one setting have the seed 0",
        "These runs were begun with different code",
    ]


def test_many_differing_fields_are_told_by_the_names_of_runs(tmp_path: Path) -> None:
    other = CONFIG + "".join(f"model.{letter}: 1\n" for letter in "uvwxyz")
    comparison = compared(write(tmp_path, "digits-seed0"), write(tmp_path, "fashion-seed0", config=other))
    assert [row.label for row in comparison.rows] == ["digits", "fashion"]
    assert comparison.fields == []
    assert as_markdown(comparison).startswith("| setting | runs | PAWS-NN |\n| --- | --- | --- |\n| digits | 1 |")


def test_one_run_named_twice_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path, "a")
    with pytest.raises(ValueError, match=r"a, .*a: a run is compared with others\. Name each run once"):
        compared(run, run.parent / "." / "a")


def test_runs_of_one_name_in_different_folders_are_told_apart_by_these(tmp_path: Path) -> None:
    runs = []
    for place, right in (("here", 90), ("there", 80)):
        (tmp_path / place).mkdir()
        runs.append(write(tmp_path / place, "a", right=right))
    (row,) = compared(*runs).rows
    summary = row.summary("paws_nn")
    assert summary is not None
    assert summary.values == {f"a ({runs[0]})": 0.9, f"a ({runs[1]})": 0.8}
    assert build_comparison(runs).parent == tmp_path / "here" / "comparisons" / "a"


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["digits-seed1", "digits-seed10"], "digits"),
        (["digits-seed0-me_max=True", "digits-seed0-me_max=False"], "digits-me_max"),
        (["a", "b", "c"], "a-and-2-more"),
    ],
)
def test_a_comparison_has_a_place_of_its_own(tmp_path: Path, names: list[str], folder: str) -> None:
    assert comparison_folder([tmp_path / name for name in names]) == tmp_path / "comparisons" / folder
