"""The page that compares runs, in a real browser, and the command that writes it."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paws_hpc.report.__main__ import main
from paws_hpc.report.comparison import as_json, compare
from paws_hpc.report.comparison_page import build_comparison
from paws_hpc.report.run_record import read_runs
from tests.browser import CONTRAST, CUT_OFF, Page
from tests.integration.launching import launch
from tests.integration.test_report import kill, save_predictions, scored, write_run

PANELS = [
    "table", "loss", "paws-nn-on-the-local-validation-split", "learning-rate", "gradient-norm", "throughput",
    "waiting-for-data", "consistency", "mean-entropy-maximisation", "support-warm-up-loss",
    "confidence-of-the-targets", "instance-discrimination", "support-classification",
    "finetune-sweep", "baseline-sweep",
    "paired", "fields", "provenance",
]  # fmt: skip


def write_seed(folder: Path, seed: int, *, me_max: bool = True, test: str = "33cc") -> Path:
    """A run that differs from others in its seed, in me-max, and in the test images if ``test`` is another digest."""
    name = f"digits-seed{seed}-me_max={me_max}"
    run = write_run(folder / name, me_max=me_max)
    _change(run / "chain.json", name=name)
    config = (run / "config.yaml").read_text().replace("seed: 0", f"seed: {seed}")
    (run / "config.yaml").write_text(config)
    result = json.loads((run / "result.json").read_text())
    _change(run / "result.json", seed=seed, digests={"train": "9f2c" * 8, "test": test * 8})
    with np.load(run / "selection" / "predictions.npz") as file:
        guesses = {name: file[name] for name in file.files if name != "labels"}
    truth = np.arange(360) % 10
    more = np.flatnonzero(guesses["paws_nn"] == truth)[: 7 * seed + 100 * (not me_max)]
    guesses["paws_nn"][more] = (truth[more] + 1) % 10
    save_predictions(run, 10, guesses)
    _change(run / "result.json", test=result["test"] | {"paws_nn": scored(guesses["paws_nn"], 10)})
    return run


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_seed(folder, seed, me_max=me_max) for me_max in (True, False) for seed in range(3)]


@pytest.fixture(scope="module")
def comparison(runs: list[Path]) -> Path:
    return build_comparison(runs)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_panel_is_drawn_and_readable(page: Page, comparison: Path, scheme: str, width: int) -> None:
    page.open(comparison, scheme=scheme, width=width)
    for name in PANELS:
        picture = page.picture(f"#panel-{name}")
        assert picture.shape[1] > 250, name
        assert np.ptp(picture[8:-8, 8:-8]) > 100, name
    assert page.count(".panel") == len(PANELS)
    assert page.script("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    contrasts = page.script(CONTRAST)
    assert len(contrasts) > 150
    assert min(contrasts)[0] >= 4.5, f"WCAG AA: {min(contrasts)}"
    assert page.requests() == [comparison.as_uri()]
    assert page.complaints() == []


def test_lines_of_every_colour_can_be_seen_and_told_apart(page: Page, comparison: Path) -> None:
    """WCAG asks for 3:1 of what a drawing consists of; ten settings, or classes, have ten colours."""
    for scheme in ("light", "dark"):
        page.open(comparison, scheme=scheme)
        page.script("""
            const list = document.querySelector('.legend');
            for (let number = 1; number <= 10; number++) {
                const entry = document.createElement('li');
                entry.textContent = `series ${number}`;
                entry.style.color = `var(--series-${number})`;
                list.append(entry);
            }""")
        ratios = {text: ratio for ratio, text in page.script(CONTRAST) if text.startswith("series ")}
        assert len(ratios) == 10
        assert min(ratios.values()) >= 3
        shown = page.script(
            "return [...document.querySelectorAll('.legend li')].slice(-10).map(e => getComputedStyle(e).color)"
        )
        colours = [[int(part) for part in re.findall(r"\d+", colour)] for colour in shown]
        apart = [math.dist(one, other) for one, other in itertools.combinations(colours, 2)]
        assert min(apart) > 50, "in sRGB, where black and white are 442 apart"


def test_a_row_per_setting_with_mean_and_deviation_over_seeds(page: Page, comparison: Path) -> None:
    page.open(comparison)
    assert page.text("h1") == "6 runs in 2 settings"
    rows = page.script(
        "return [...document.querySelectorAll('#panel-table tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert [row[1:3] for row in rows] == [["true", "3"], ["false", "3"]]
    assert rows[0][3].split("\n") == ["94.2 ± 1.9 %", "96.1 · 94.2 · 92.2"]
    assert page.count("#panel-loss path") > 8
    label = page.label("#panel-paws-nn-on-the-local-validation-split svg")
    assert "me_max=true ends at 96.1 % at epoch 29.9091; me_max=false ends at" in label
    assert page.text("#panel-finetune-sweep tbody tr").count("chosen by 3") == 1
    assert page.text("#panel-fields tbody th") == "objective.me_max"


def test_runs_of_one_seed_are_compared_image_by_image(page: Page, comparison: Path, runs: list[Path]) -> None:
    page.open(comparison)
    rows = page.script(
        "return [...document.querySelectorAll('#panel-paired tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    pairs = [[f"digits-seed{seed}-me_max={value}" for value in (False, True)] for seed in range(3)]
    assert [row[:2] for row in rows] == pairs
    assert rows[0][2] == "\N{MINUS SIGN}27.8\n(0:100), p < 0.001", "a hundred mistakes more, and no other"
    assert rows[0][3] == "+0.0\n(0:0), p = 1.000"
    first = as_json(compare(read_runs(runs)))["paired"][0]
    assert (first["ours"], first["theirs"], first["images"]) == (0, 100, 360)
    assert first["p"] == pytest.approx(2 * 0.5**100)


def test_without_predictions_of_the_same_images_no_paired_test_is_made(
    page: Page, runs: list[Path], tmp_path: Path
) -> None:
    page.open(build_comparison([runs[0], write_seed(tmp_path, 7, test="77dd")], tmp_path / "page"))
    assert "No paired test can be computed" in page.text("#panel-paired")
    older = write_seed(tmp_path, 8)
    (older / "selection" / "predictions.npz").unlink()
    page.open(build_comparison([runs[0], older], tmp_path / "page"))
    assert "No paired test can be computed" in page.text("#panel-paired")
    assert "93.6\N{EN DASH}97.7 %" in build_comparison([runs[0], runs[3]], tmp_path / "page").read_text(), "Wilson's"


def test_a_healthy_run_without_me_max_does_not_look_collapsed(
    page: Page, comparison: Path, runs: list[Path], tmp_path: Path
) -> None:
    """Where predictions are uniform is drawn with each term, and not with the loss, whose terms differ by run."""
    page.open(comparison)
    label = page.label("#panel-loss svg")
    ends = [float(value) for value in re.findall(r"ends at (\S+) at epoch", label)]
    assert len(ends) == 2
    assert max(ends) < 0.5, "far from log 10 = 2.3"
    assert "log K" not in page.text("#panel-loss")
    assert "log K" in page.text("#panel-consistency svg")
    assert "me_max=false" not in page.label("#panel-mean-entropy-maximisation svg")
    page.open(build_comparison(runs[3:], tmp_path))
    assert page.script("return document.querySelector('#panel-mean-entropy-maximisation')") is None


def test_what_differs_names_each_run_with_its_own_value(page: Page, runs: list[Path], tmp_path: Path) -> None:
    """In whatever order the runs are named: here the settings alternate, and rows of the table put them together."""
    page.open(build_comparison([runs[place] for place in (0, 3, 1, 4, 2, 5)], tmp_path))
    shown = page.script(
        "return [...document.querySelectorAll('#panel-fields tbody tr')]"
        ".map(row => [...row.cells].slice(-2).map(cell => cell.innerText))"
    )
    assert [value for value, _ in shown] == ["true", "false"]
    for value, names in shown:
        assert [f"me_max={value.capitalize()}" in name for name in names.split(", ")] == [True] * 3


def test_on_paper_nothing_is_cut_off_and_colours_are_light(page: Page, runs: list[Path], tmp_path: Path) -> None:
    page.open_as_printed(build_comparison([*runs, write_seed(tmp_path, 7, test="77dd")], tmp_path / "page"))
    assert page.count("#panel-table th") > 8
    assert page.script(CUT_OFF) == []
    assert page.script("return getComputedStyle(document.documentElement).getPropertyValue('--card')") == "#ffffff"
    assert min(page.script(CONTRAST))[0] >= 4.5
    broken = page.script("""
        return [...document.querySelectorAll('.mean, .facts-wide td:not(.words)')].filter(element => {
            const text = document.createRange();
            text.selectNodeContents(element);
            return new Set([...text.getClientRects()].map(line => Math.round(line.bottom))).size > 1;
        }).map(element => element.textContent);""")
    assert broken == [], "figures, digests and commits stay whole"
    for name in PANELS:
        assert np.ptp(page.picture(f"#panel-{name}")[8:-8, 8:-8]) > 100, name


def test_different_test_sets_are_said_before_any_number(page: Page, runs: list[Path], tmp_path: Path) -> None:
    other = write_seed(tmp_path, 7, test="77dd")
    killed = kill(write_seed(tmp_path, 8))
    page.open(build_comparison([*runs, other, killed], tmp_path / "page"))
    assert page.text("#warnings .alarm strong") == "These runs have different test sets"
    assert "77dd77dd: digits-seed7-me_max=True" in page.text("#warnings .alarm p")
    assert "1 of 8 runs have no test scores" in page.text("#warnings")
    rows = page.script("return [...document.querySelectorAll('#panel-table tbody tr')].map(r => r.cells[3].innerText)")
    assert sorted(rows) == ["3", "1", "4"] or sorted(rows) == ["1", "3", "4"]
    assert page.complaints() == []


def test_the_command_writes_what_it_is_asked_for(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [run.name for run in runs]
    there = ["--runs", str(runs[0].parent)]
    assert main([names[0], *there]) == 0
    assert capsys.readouterr().out == f"Report: {runs[0] / 'report' / 'index.html'}\n"
    assert main([names[0], *there, "--to", str(tmp_path)]) == 0
    assert (tmp_path / "index.html").read_bytes() == (runs[0] / "report" / "index.html").read_bytes()
    assert main([*names, *there]) == 0
    assert "comparisons/digits-me_max/index.html" in capsys.readouterr().out.replace("digits-me_max=", "digits-me_max")
    assert main([*names, *there, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["settings"] for row in shown["rows"]] == [{"objective.me_max": "true"}, {"objective.me_max": "false"}]
    assert shown["rows"][0]["seeds"] == [0, 1, 2]
    assert main([*names, *there, "--markdown"]) == 0
    assert "| true | 3 | 94.2 ± 1.9 % |" in capsys.readouterr().out
    assert main(["digits-sed0", *there]) == 1
    assert "There is no run digits-sed0" in capsys.readouterr().err


def test_runs_launched_together_are_compared_even_before_they_have_results(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "seed=0,1", "stages=[prepare]", "name=together-${seed}")
    assert done.returncode == 0, done.stderr
    runs = [str(tmp_path / "runs" / f"together-{seed}") for seed in (0, 1)]
    assert f"Compare them: python -m paws_hpc report {' '.join(runs)}" in done.stdout
    written = tmp_path / "runs" / "comparisons" / "together" / "index.html"
    assert f"Comparison: {written}" in done.stdout.replace("\n", "")
    assert "2 of 2 runs have no test scores" in written.read_text()
