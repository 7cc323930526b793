"""Training a classifier: resumed at any step it ends with the same bits, and its best epoch is what it says."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paws_hpc.data.config import CenterCropConfig, CropConfig
from paws_hpc.data.streams import ClassifierStream, EvaluationSet
from paws_hpc.engine.checkpoint import CheckpointFolder, load_tensors, save_tensors
from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.engine.errors import PreemptedError, TrainingStoppedError
from paws_hpc.engine.evaluate import forward_set, score
from paws_hpc.engine.finetune import ClassifierTraining
from paws_hpc.engine.loop import train
from paws_hpc.engine.preemption import UNATTENDED, JobControl
from paws_hpc.engine.tracking import MetricsFile, Row, read_rows
from paws_hpc.files import read_json
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_classifier, build_encoder
from paws_hpc.models.norm import set_statistics
from paws_hpc.stages import finetune
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.ranks import results_of, run_on_ranks
from tests.tiny import WALL_CLOCK, random_store, tiny_config, trial_at

CPU = torch.device("cpu")
Best = tuple[float, int]
"""Accuracy and epoch."""
MODEL = ModelConfig("small_resnet", channels=[8, 16])


def config_of(learning_rate: float, epochs: int, **others: Any) -> ClassifierConfig:
    crop = CropConfig(size=16, scale=[0.5, 1.0])
    own = {"batch_size": 8} | others
    return ClassifierConfig({}, learning_rate, epochs, crop=crop, min_trials=0, **own)


def training_on(store: ImageStore, labelled: np.ndarray, config: ClassifierConfig) -> ClassifierTraining:
    stream = ClassifierStream(
        store,
        labelled,
        crop=config.crop,
        augment=config.augment,
        batch_size=config.batch_size,
        seed=0,
        threads=1,
    )
    classifier = build_classifier(build_encoder(MODEL, seed=0), len(store.classes))
    return ClassifierTraining(classifier, config, stream, CPU)


class Training:
    """A classifier trained on 20 digits and validated on 40 others, in a folder of its own."""

    def __init__(self, stores: Stores, folder: Path, config: ClassifierConfig) -> None:
        self.folder, self.store = folder, ImageStore(stores.train)
        members = [np.flatnonzero(self.store.labels == label) for label in range(10)]
        self.training = training_on(self.store, np.concatenate([rows[:2] for rows in members]), config)
        validation = np.concatenate([rows[2:6] for rows in members])
        self.validation = EvaluationSet(self.store, validation, CenterCropConfig(16, 16), self.store)

    def run(self, asked_at: int | None = None, fence: Callable[[], None] = lambda: None) -> Best:
        """Train from the newest checkpoint in the folder, as the stage does.

        Args:
            asked_at: the number of the check just before which the job is asked to stop.
            fence: called before writes.
        """
        self.checks = itertools.count()
        control = JobControl(lambda: next(self.checks) >= (10**6 if asked_at is None else asked_at), fence)
        checkpoints = CheckpointFolder(self.folder / "checkpoints", identity={}, keep=100, fence=control.fence)
        start = 0
        if (checkpoint := checkpoints.newest(CPU)) is not None:
            self.training.load_state_dict(checkpoint.state)
            start = checkpoint.step
        awaits = self.training.awaits_validation(start)
        with MetricsFile(self.folder / "metrics.jsonl", resume_step=start, awaits_validation=awaits) as metrics:
            train(
                self.training,
                checkpoints=checkpoints,
                tracker=metrics,
                start=start,
                validate=lambda: {"val/top1": self.accuracy(control)},
                describe=lambda records: [self.store.keys[int(record)] for record in records],
                control=control,
            )
        save_tensors(self.folder / "best.pt", self.training.best_weights, fence=control.fence)
        assert self.training.best is not None
        return self.training.best

    def accuracy(self, control: JobControl = UNATTENDED) -> float:
        logits = forward_set(self.training.classifier, self.validation, CPU, control)
        return score(logits, self.validation.labels).top1

    def weights(self) -> dict[str, Tensor]:
        return self.training.classifier.state_dict()


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def curve(folder: Path) -> list[Row]:
    """What was logged, without how long it took."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in WALL_CLOCK} for row in rows]


def assert_same_end(found: Training, expected: Training) -> None:
    """Weights, momentum, best weights and curve, to the bit."""
    assert_same(found.weights(), expected.weights())
    momentum, expected_momentum = (trial.training.optimizer.state_dict()["state"] for trial in (found, expected))
    torch.testing.assert_close(momentum, expected_momentum, rtol=0, atol=0)
    assert (found.folder / "best.pt").read_bytes() == (expected.folder / "best.pt").read_bytes()
    assert curve(found.folder) == curve(expected.folder)


UNEVEN = config_of(0.1, 4)
"""At this learning rate the best epoch is neither the first nor the last."""


@pytest.fixture
def uninterrupted(digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Training, Best]:
    monkeypatch.setattr("paws_hpc.data.streams._EVALUATION_BATCH", 15)  # a score has three batches
    trial = Training(digits_stores, tmp_path / "uninterrupted", UNEVEN)
    result = trial.run()
    assert 1 < result[1] < UNEVEN.epochs
    return trial, result


def test_interrupted_at_any_step_or_batch_it_ends_with_the_same_bits(
    digits_stores: Stores, tmp_path: Path, uninterrupted: tuple[Training, Best]
) -> None:
    whole, result = uninterrupted
    checks = next(whole.checks)
    assert checks == 4 * (2 + 3), "two steps and three batches of validation images in each epoch"
    for call in range(checks):
        folder = tmp_path / str(call)
        with pytest.raises(PreemptedError) as told:
            Training(digits_stores, folder, UNEVEN).run(asked_at=call)
        assert told.value.step == 2 * (call // 5) + min(call % 5, 2)
        assert not (folder / "best.pt").exists()
        resumed = Training(digits_stores, folder, UNEVEN)
        assert resumed.run() == result
        assert_same_end(resumed, whole)


def test_interrupted_again_and_again_it_ends_with_the_same_bits(
    digits_stores: Stores, tmp_path: Path, uninterrupted: tuple[Training, Best]
) -> None:
    """Four boundaries each time: in the middle of epochs, and inside the validation with which a start begins."""
    whole, result = uninterrupted
    for starts in range(1, 30):
        trial = Training(digits_stores, tmp_path / "often", UNEVEN)
        try:
            assert trial.run(asked_at=2 if starts % 2 else 4) == result
            break
        except PreemptedError:
            continue
    assert starts > 4
    assert_same_end(trial, whole)


def test_checkpoint_and_best_weights_agree_wherever_a_start_ends(
    digits_stores: Stores, tmp_path: Path, uninterrupted: tuple[Training, Best]
) -> None:
    """Taken over before any of its writes: three per checkpoint, and the best weights at the end."""
    whole, result = uninterrupted

    def refusing(write: int) -> Callable[[], None]:
        left = iter(range(write))

        def fence() -> None:
            if next(left, None) is None:
                raise PermissionError

        return fence

    for write in range(4 * 3 + 1):
        folder = tmp_path / str(write)
        with pytest.raises(PermissionError):
            Training(digits_stores, folder, UNEVEN).run(fence=refusing(write))
        assert not (folder / "best.pt").exists()
        assert not list(folder.rglob("*.tmp"))
        resumed = Training(digits_stores, folder, UNEVEN)
        assert resumed.run() == result
        assert_same_end(resumed, whole)


def test_the_best_weights_have_the_accuracy_that_is_reported(digits_stores: Stores, tmp_path: Path) -> None:
    trial = Training(digits_stores, tmp_path, config_of(0.1, 25))
    result = trial.run()
    rows = read_rows(tmp_path / "metrics.jsonl")
    accuracies = [row["val/top1"] for row in rows]
    assert result == (max(accuracies), 1 + int(np.argmax(accuracies)))
    assert result[0] > accuracies[0], "else this test would not tell best from first"
    trial.training.classifier.load_state_dict(load_tensors(tmp_path / "best.pt", CPU))
    assert trial.accuracy() == result[0]


def test_of_equally_good_epochs_the_first_is_kept(digits_stores: Stores, tmp_path: Path) -> None:
    """A learning rate that moves nothing: the linear layer is zero, so all logits stay equal."""
    result = Training(digits_stores, tmp_path, config_of(1e-30, 3)).run()
    assert result[1] == 1


def test_scores_come_every_so_many_epochs_and_at_the_end(digits_stores: Stores, tmp_path: Path) -> None:
    Training(digits_stores, tmp_path, config_of(0.05, 5, validate_every_epochs=2)).run()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [2, 4, 5]
    assert rows[-1]["train/lr"] < rows[0]["train/lr"]


def test_divergence_names_step_rate_and_images_and_keeps_nothing_of_it(digits_stores: Stores, tmp_path: Path) -> None:
    trial = Training(digits_stores, tmp_path, config_of(1e30, 3))
    with pytest.raises(TrainingStoppedError, match=r"not finite after step \d .*learning rate .*e\+[23]\d") as caught:
        trial.run()
    message = str(caught.value)
    assert sum(key in message for key in trial.store.keys) >= 8
    assert "Take this learning rate out of the sweep" in message
    assert not list(tmp_path.rglob("*.pt")), "the first epoch diverged, so there is nothing to keep"


def three_steps(rank: int, world: int) -> dict[str, Tensor]:
    """Steps of 10 images, which three ranks share as 4, 3 and 3, with batch statistics over all of them."""
    config = config_of(0.1, 2, batch_size=10)
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder) / "store", count=20, size=16, classes=4)
        training = training_on(store, np.arange(20), config)
        set_statistics(training.classifier, "global")
        losses = []
        for step in range(3):
            losses.append(training.step(training.stream.batch(step))["train/loss"])
    return {"losses": torch.stack(losses), **training.classifier.state_dict()}


def test_ranks_that_share_a_batch_unevenly_train_as_one(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {3: [three_steps]})
    alone, ranks = three_steps(0, 1), results_of(three_steps, 3, tmp_path)
    torch.testing.assert_close(sum(rank.pop("losses") for rank in ranks) / 3, alone.pop("losses"))
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(ranks[0][name], ranks[2][name])


def test_cross_validation_interrupted_anywhere_goes_on_within_its_fold_and_ends_with_the_same_bits(
    digits_stores: Stores, tmp_path: Path
) -> None:
    """The stage itself, without held-out labels: four folds of a trial, then the trial on all labels."""

    point = trial_at(0.1, 40)

    def trial(runs: Path, asked_at: int = 10**6) -> tuple[Path, int]:
        config = tiny_config(digits_stores.train, digits_stores.test, runs)
        config.labels.validation_per_class, config.baseline.validate_every_epochs = None, 20
        run, checks = RunFolder(runs / "run"), itertools.count()
        control = JobControl(lambda: next(checks) >= asked_at)
        finetune.run(TorchContext(config, run, "baseline", point, device=CPU, control=control))
        return run.trial("baseline", point), next(checks)

    whole, checks = trial(tmp_path / "whole")
    assert checks == 4 * (40 + 2) + 40 * 2, "steps and scores of four folds, steps of the trial"
    result = read_json(whole / "result.json")
    assert result["validation_accuracy"] > 0.15, "else this test would not tell one fold from another"
    rows = [[row["val/top1"] for row in curve(whole / f"fold-{fold}")] for fold in (1, 2, 3, 4)]
    means = [sum(epoch) / 4 for epoch in zip(*rows, strict=True)]  # of folds of ten images each
    assert [row["val/top1"] for row in curve(whole)] == pytest.approx(means)
    assert result["validation_accuracy"] == pytest.approx(max(means))
    assert not list(whole.glob("fold-*/checkpoints")), "they are large, and of no use any more"
    repeated = 0
    for asked_at in range(1, checks, 61):
        folder = tmp_path / str(asked_at)
        with pytest.raises(PreemptedError):
            trial(folder, asked_at)
        again, further = trial(folder)
        repeated = max(repeated, further - (checks - asked_at))
        assert (again / "best.pt").read_bytes() == (whole / "best.pt").read_bytes()
        assert read_json(again / "result.json") | {"seconds": 0} == result | {"seconds": 0}
        for fold in (".", "fold-1", "fold-2", "fold-3", "fold-4"):
            assert curve(again / fold) == curve(whole / fold)
    assert repeated <= 1, "no step is done again, and no more than the one score that was interrupted"
