"""Calibrated probabilities, and images that are unlike the training images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from paws_hpc import predict
from paws_hpc.config import Config
from paws_hpc.data.config import LabelsConfig
from paws_hpc.report.page import build_report
from paws_hpc.stages import calibrate, finetune, pretrain, selection
from paws_hpc.stages.calibrate import calibration_error, fit_temperature, read_calibration, reliability
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.finished import CPU, begin
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def finished(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder]:
    """A chain on the digits with enough training to tell most of them apart."""
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path_factory.mktemp("run"))
    config.labels = LabelsConfig(per_class=20, validation_per_class=20)
    config.pretrain.epochs = 4
    config.finetune.sweep = {"learning_rate": [0.1], "epochs": [10]}
    config.baseline.min_trials = 0
    run = begin(config)
    pretrain.run(TorchContext(config, run))
    finetune.run(TorchContext(config, run, "finetune", config.finetune.trials()[0]))
    selection.run(TorchContext(config, run))
    calibrate.run(TorchContext(config, run, "calibrate"))
    return config, run


def test_a_temperature_that_was_put_in_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    for temperature in (0.4, 1.0, 3.0):
        assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)
    assert calibration_error(logits, labels) < 0.01
    assert calibration_error(3 * logits, labels) > 0.1
    assert sum(count for _, _, count in reliability(logits, labels)) == 20_000
    logits, labels = torch.tensor([[0.9, 0.1]] * 2 + [[0.6, 0.4]] * 2).double().log(), torch.tensor([0, 1, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx((abs(0.9 - 0.5) + abs(0.6 - 1)) / 2)


def test_it_is_chosen_on_validation_and_reported_on_test(finished: tuple[Config, RunFolder]) -> None:
    _, run = finished
    found = json.loads((run.path / "calibrate" / "calibration.json").read_text())
    errors = found["calibration_error"]["validation"]
    assert errors["after"] <= errors["before"] + 0.02
    assert found["test_unlike"] <= 0.05
    assert len(found["distances"]) == 200
    assert "Reliability on the test split" in build_report(run.path).read_text()


def test_photographs_are_unlike_digits_and_digits_are_not(
    finished: tuple[Config, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = finished
    for number, photograph in enumerate(load_sample_images().images):
        for quarter, (top, left) in enumerate([(0, 0), (0, 320), (200, 0), (200, 320)]):
            pixels = photograph[top : top + 220, left : left + 320]
            Image.fromarray(pixels).save(tmp_path / f"photo-{number}-{quarter}.png")
    store = ImageStore(config.data.test)
    for number, pixels in enumerate(store.images(range(len(store)))):
        Image.fromarray(pixels[:, :, 0]).save(tmp_path / f"{number:03d}.png")
    for method in ("paws-nn", "fine-tuned"):
        assert predict.main([str(run.path), str(tmp_path), "--method", method, "--device", "cpu", "--json", "-"]) == 0
        images = json.loads(capsys.readouterr().out)["images"]
        doubts = {Path(image["path"]).name: image["doubt"] for image in images}
        photographs = {name: doubt for name, doubt in doubts.items() if name.startswith("photo")}
        assert len(photographs) == 8
        assert all(photographs.values()), photographs
        assert np.mean([doubt is None for name, doubt in doubts.items() if name not in photographs]) >= 0.95
    assert predict.main([str(run.path), str(tmp_path / "photo-0-0.png"), "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith("photo-0-0.png: unlike the training images: 100.0 % of validation images are nearer")


def test_probabilities_of_the_fine_tuned_network_are_calibrated(
    finished: tuple[Config, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = finished
    store = ImageStore(config.data.test)
    Image.fromarray(store.images([0])[0][:, :, 0]).save(tmp_path / "0.png")
    command = [str(run.path), str(tmp_path), "--method", "fine-tuned", "--top", "10", "--device", "cpu", "--json", "-"]

    def probabilities() -> dict[str, float]:
        assert predict.main(command) == 0
        classes = json.loads(capsys.readouterr().out)["images"][0]["classes"]
        return {entry["name"]: entry["probability"] for entry in classes}

    calibration = read_calibration(run, CPU)
    assert calibration is not None
    after = probabilities()
    (run.path / "calibrate").rename(run.path / "calibrate-away")
    try:
        before = probabilities()
    finally:
        (run.path / "calibrate-away").rename(run.path / "calibrate")
    logits = torch.tensor([before[name] for name in sorted(before)], dtype=torch.float64).log()
    expected = (logits / calibration.temperature).softmax(dim=0)
    torch.testing.assert_close(
        torch.tensor([after[name] for name in sorted(after)]).double(), expected, rtol=1e-3, atol=1e-5
    )
