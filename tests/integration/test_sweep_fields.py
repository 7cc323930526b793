"""A sweep over any field of the classifier's config, from the command line to the report."""

from __future__ import annotations

from pathlib import Path

import torch

from paws_hpc.cluster.compose import compose_run
from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.files import read_json
from paws_hpc.report.comparison import as_markdown, compare
from paws_hpc.report.page import build_report
from paws_hpc.report.run_record import read_run
from paws_hpc.report.tables import sweep_grid
from paws_hpc.stages import finetune, pretrain, selection
from paws_hpc.stages.context import TorchContext
from tests.conftest import Stores
from tests.finished import begin
from tests.tiny import tiny_config


def test_weight_decay_is_swept_and_shown_everywhere(digits_stores: Stores, tmp_path: Path) -> None:
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    config.finetune = ClassifierConfig(
        {"learning_rate": [0.02, 0.1], "weight_decay": [0, 1e-3]}, epochs=1, batch_size=20, crop=config.finetune.crop
    )
    config.baseline.min_trials = 0
    run = begin(config)
    pretrain.run(TorchContext(config, run))
    for trial in config.finetune.trials():
        finetune.run(TorchContext(config, run, "finetune", trial))
    selection.run(TorchContext(config, run))

    selected, result = read_json(run.selected), read_json(run.result)
    names = [f"lr={rate},weight_decay={decay}" for rate in (0.02, 0.1) for decay in (0, 0.001)]
    assert selected["trials"] == names
    winner = selected["trial"]
    own = {"learning_rate": selected["learning_rate"], "weight_decay": selected["weight_decay"]}
    assert own.items() <= result["test"]["fine_tuned"].items()
    checkpoints = (run.path / "finetune" / names[1] / "checkpoints").glob("*.pt")
    optimizer = torch.load(max(checkpoints), weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["weight_decay"] == 1e-3

    record = read_run(run.path)
    grid = sweep_grid(record.finetune, winner)
    assert (grid["field"], grid["columns"], grid["corner"]) == ("lr", ["0.02", "0.1"], "weight_decay")
    assert [head for head, _ in grid["rows"]] == ["0", "0.001"]
    page = build_report(run.path).read_text()
    for text in (">weight_decay", ">0.001<", f"lr {own['learning_rate']:g}, weight_decay "):
        assert text in page, text
    assert "fine-tuned" in as_markdown(compare([record]))


def test_a_command_adds_a_field_to_the_sweep_of_its_recipe() -> None:
    swept = compose_run(["experiment=digits", "finetune.sweep.weight_decay=[0,1e-4]"])[0].finetune.sweep
    assert swept == {"learning_rate": [0.02, 0.1], "epochs": [30, 50], "weight_decay": [0, 1e-4]}
    swept = compose_run(["finetune.sweep={learning_rate:[0.1],weight_decay:[0,1e-4],epochs:null}"])[0].finetune.sweep
    assert swept == {"learning_rate": [0.1], "weight_decay": [0, 1e-4]}
