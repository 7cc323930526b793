"""The supervised baseline alone: a chain without pre-training scores it, says so, and scores nothing else."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from paws_hpc.cluster.bootstrap import run_job
from paws_hpc.cluster.frozen import freeze
from paws_hpc.cluster.local import run_chain
from paws_hpc.config import Config
from paws_hpc.report.comparison import as_markdown, compare
from paws_hpc.report.comparison_page import build_comparison
from paws_hpc.report.run_record import read_run
from paws_hpc.report.tables import DASH, result_table
from paws_hpc.stage_table import STAGES
from paws_hpc.stages import finetune, selection
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.networks import load_neighbours
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder, check_sweep_is_the_scored_one
from tests.conftest import Stores
from tests.finished import CPU
from tests.tiny import tiny_config

BASELINE = ["prepare", "baseline", "selection", "report"]


def supervised(stores: Stores, runs: Path, name: str) -> tuple[Config, RunFolder]:
    config = tiny_config(stores.train, stores.test, runs)
    config.name, config.stages = name, BASELINE
    return config, RunFolder(runs / name)


def run_here(config: Config, run: RunFolder) -> None:
    freeze(config, run.config)
    run_chain(config, run, partial(run_job, run.path))


@pytest.fixture(scope="module")
def runs(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Config, RunFolder]]:
    """On the labelled images, which here do not suffice for the supports of pre-training, and on all labels."""
    folder = tmp_path_factory.mktemp("runs")
    subset, everything = (supervised(digits_stores, folder, name) for name in ("subset", "all"))
    subset[0].labels.per_class = 3
    everything[0].labels.per_class, everything[0].labels.all = None, True
    for config, run in (subset, everything):
        run_here(config, run)
    return [subset, everything]


def test_the_baseline_is_scored_alone_and_the_result_says_so(runs: list[tuple[Config, RunFolder]]) -> None:
    for (config, run), labels in zip(runs, (30, 1397 - 40), strict=True):
        result = json.loads(run.result.read_text())
        assert result["labels"] == labels == len(open_data(config).labelled)
        assert result["pretrained"] is False
        assert result["missing"] == {"finetune": [], "baseline": []}
        assert result["test"].keys() == {"count", "baseline"}
        assert json.loads(run.selected.read_text())["baseline"]["trial"] == "lr=0.1,epochs=2"
        shown = dict(result_table(read_run(run.path)))
        assert (shown["PAWS-NN"], shown["fine-tuned"], shown["linear probe"]) == (DASH, DASH, DASH)
        page = run.report.read_text()
        assert "This run has no pre-training" in page
        assert 'id="panel-baseline-sweep"' in page
        assert 'id="pretraining"' not in page
        assert 'id="panel-finetune-sweep"' not in page
        assert "No mistakes on the test split" not in page


def test_the_comparison_has_a_row_for_each_and_no_column_but_the_baseline(
    runs: list[tuple[Config, RunFolder]],
) -> None:
    folders = [run.path for _, run in runs]
    comparison = compare([read_run(folder) for folder in folders])
    assert list(comparison.columns) == ["baseline"]
    assert [row.label for row in comparison.rows] == ["per_class=3, all=false", "per_class=null, all=true"]
    assert "| baseline |" in as_markdown(comparison)
    assert build_comparison(folders).exists()


def test_a_run_that_was_scored_so_is_done_and_not_taken_for_one_with_pretraining(
    runs: list[tuple[Config, RunFolder]], digits_stores: Stores
) -> None:
    _, run = runs[0]
    config, _ = supervised(digits_stores, run.path.parent, "subset")
    scored = run.result.read_bytes()
    selection.run(TorchContext(config, run))
    assert run.result.read_bytes() == scored
    config.stages = list(STAGES)
    with pytest.raises(ValueError, match="was scored without pre-training, but the sweep now has"):
        check_sweep_is_the_scored_one(config, run)


def test_what_needs_pretraining_says_so(
    runs: list[tuple[Config, RunFolder]], digits_stores: Stores, tmp_path: Path
) -> None:
    config, run = supervised(digits_stores, tmp_path, "subset")
    shutil.copytree(runs[0][1].path, run.path)
    config.labels.per_class = 3
    with pytest.raises(FileNotFoundError, match="pretrain is not done: run the stage 'pretrain'"):
        finetune.run(TorchContext(config, run, "finetune", config.finetune.trials()[0]))
    with pytest.raises(FileNotFoundError, match="pretrain is not done: run the stage 'pretrain'"):
        load_neighbours(run, open_data(config), CPU)
    for path in (run.result, run.selected):
        path.unlink()
    config.finetune.min_trials = 0
    run.job("pretrain").mkdir(parents=True)  # it began: whoever asks for a score now would lose it
    with pytest.raises(FileNotFoundError, match="pretrain is not done"):
        selection.run(TorchContext(config, run))
    run.job("pretrain").rmdir()
    config.baseline.min_trials = 0
    shutil.rmtree(run.path / "baseline")
    with pytest.raises(ValueError, match="has nothing to score"):
        selection.run(TorchContext(config, run))
    assert not run.result.exists()
