"""Pre-training that can no longer succeed says so, with what its user needs to know, and keeps what is of use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paws_hpc.config import Config
from paws_hpc.engine.config import CollapseConfig
from paws_hpc.engine.errors import TrainingStoppedError
from paws_hpc.engine.tracking import Row, read_rows
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder, is_done
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.integration.test_preemption import make_store
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def all_alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture, 120 times in 4 classes."""
    return make_store(tmp_path_factory.mktemp("alike") / "store", alike=True, count=120)


def collapsing(store: Path, folder: Path, *, action: str) -> tuple[Config, RunFolder]:
    config = tiny_config(store, folder / "absent", folder)
    config.pretrain.batch_size, config.pretrain.epochs = 12, 3
    config.pretrain.support.classes = 4
    for crop in (config.views.large, config.views.small):
        crop.scale = [1.0, 1.0]
    config.pretrain.log_every_steps = 4
    config.pretrain.collapse = CollapseConfig(patience_steps=8, action=action)
    return config, RunFolder(folder / "run")


def events(run: RunFolder) -> list[Row]:
    return [row for row in read_rows(run.pretrain / "metrics.jsonl") if "event" in row]


@pytest.mark.parametrize("me_max", [True, False])
def test_a_collapse_stops_the_run_by_name(all_alike: Path, tmp_path: Path, me_max: bool) -> None:
    config, run = collapsing(all_alike, tmp_path, action="stop")
    config.objective.me_max = me_max
    for _ in ("first", "launched again"):
        with pytest.raises(
            TrainingStoppedError, match=r"Collapse: predictions have been uniform over 4 classes"
        ) as told:
            pretrain.run(TorchContext(config, run))
        assert "for 8 steps (step 7:" in str(told.value)
        assert "objective.support_warmup_fraction" in str(told.value)
        assert [(row["event"], row["step"]) for row in events(run)] == [("collapse", 7)]
        assert not is_done(run.pretrain)


def test_a_collapse_can_be_a_warning_that_is_given_once_and_stays_in_the_summary(
    all_alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = collapsing(all_alike, tmp_path, action="warn")
    pretrain.run(TorchContext(config, run))
    assert capsys.readouterr().err.count("Collapse:") == 1
    summary = json.loads((run.pretrain / "summary.json").read_text())
    assert (summary["collapsed"], summary["steps"]) == (True, 30)
    assert [(row["event"], row["step"]) for row in events(run)] == [("collapse", 7)]
    # Killed after the warning and resumed: it is not given again, and not forgotten.
    for path in (run.pretrain / "DONE", run.pretrain / "summary.json", *run.checkpoints.glob("step-0000003*")):
        path.unlink()
    pretrain.run(TorchContext(config, run))
    assert json.loads((run.pretrain / "summary.json").read_text())["collapsed"] is True
    assert [(row["event"], row["step"]) for row in events(run)] == [("collapse", 7)]


def test_real_images_do_not_collapse(digits_stores: Stores, tmp_path: Path) -> None:
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    config.pretrain.collapse = CollapseConfig(patience_steps=2, action="stop")
    run = RunFolder(tmp_path / "run")
    pretrain.run(TorchContext(config, run))
    assert json.loads((run.pretrain / "summary.json").read_text())["collapsed"] is False


def finite(value: Any) -> bool:
    """Whether every number in nested values is finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    return not isinstance(value, list) or all(finite(item) for item in value)


DIVERGENCES = {  # learning rate from step 8 on, steps between checkpoints, the step that is named
    "The loss is": (1e300, 5, 9),
    "Weights or running statistics are": (1e300, 1, 8),
    "running statistics are": (1e12, 1, 9),  # they overflow, and the loss stays finite
}


@pytest.mark.parametrize("what", DIVERGENCES)
def test_a_run_that_diverges_names_step_rate_and_images_and_its_checkpoints_are_finite(
    digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """From step 8 on the learning rate is too high by far; metrics are read before each checkpoint is written."""
    lr, every, step = DIVERGENCES[what]
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    config.pretrain.checkpoint_every_steps = config.pretrain.log_every_steps = every
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(pretrain.Pretraining, "learning_rate", lambda _, step: lr if step >= 8 else 0.01)
    with pytest.raises(TrainingStoppedError, match=rf"{what} not finite after step {step} ") as told:
        pretrain.run(TorchContext(config, run))
    message = str(told.value)
    assert f"learning rate {lr:g};" in message
    assert "Lower optimizer.peak_lr or lengthen optimizer.warmup_epochs" in message
    assert sum(key in message for key in ImageStore(digits_stores.train).keys) == 8
    last = read_rows(run.pretrain / "metrics.jsonl")[-1]
    assert last["step"] == step, "the row that explains the stop is in the file"
    assert (last["train/loss"] == "nan") == (what == "The loss is")
    saved = sorted(run.checkpoints.glob("*.pt"))
    assert len(saved) == min(2, (step + 1) // every - 1)
    for path in saved:
        assert finite(torch.load(path, weights_only=True)), path
    assert not is_done(run.pretrain)
