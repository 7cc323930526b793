"""Files are classified as the run's own evaluation classifies packed images; what is no image stops nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from paws_hpc import predict
from paws_hpc.cluster.frozen import freeze
from paws_hpc.config import Config
from paws_hpc.data.config import CenterCropConfig
from paws_hpc.data.crops import center_crop
from paws_hpc.deploy.files import read_image
from paws_hpc.engine.evaluate import Representation, forward_set, paws_nn
from paws_hpc.models.encoder import build_encoder
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore
from tests.browser import CONTRAST, Page
from tests.conftest import Stores
from tests.finished import CPU, begin, refusal, trained_run
from tests.integration.launching import environment
from tests.tiny import tiny_config


@dataclass(frozen=True)
class Made:
    """A finished run, and its test images as files."""

    config: Config
    run: RunFolder
    files: list[Path]
    labels: np.ndarray

    def told(self, capsys: pytest.CaptureFixture[str], *options: str, status: int = 0) -> dict[str, Any]:
        assert predict.main([str(self.run.path), *options, "--device", "cpu", "--json", "-"]) == status
        value: dict[str, Any] = json.loads(capsys.readouterr().out)
        return value


def test_a_run_is_used_from_anywhere_and_finds_stores_that_were_moved(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = made.told(capsys, *map(str, made.files[:3]))["images"]
    launched, run = tmp_path / "launched", RunFolder(tmp_path / "launched" / "runs" / "run")
    shutil.copytree(made.run.path, run.path)
    data = replace(made.config.data, train="shards/train", test="shards/test")
    for name in ("train", "test"):
        shutil.copytree(getattr(made.config.data, name), launched / "shards" / name)
    run.config.unlink()
    freeze(replace(made.config, runs="runs", data=data), run.config)
    other = replace(made, run=run)
    monkeypatch.chdir(tmp_path)
    assert other.told(capsys, *map(str, made.files[:3]))["images"] == expected
    (launched / "shards").rename(tmp_path / "moved")
    (tmp_path / "moved" / "train").rename(tmp_path / "moved" / "elsewhere")
    message = refusal(predict.main, capsys, str(run.path), str(made.files[0]))
    assert all(word in message for word in ("data.train=shards/train", str(launched), "--stores"))
    assert other.told(capsys, *map(str, made.files[:3]), "--stores", "moved")["images"] == expected


@pytest.fixture(scope="module")
def made(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("run")
    config, run = trained_run(digits_stores, folder, tuning_steps=4)  # so that PAWS-NN has its own network
    store = ImageStore(digits_stores.test)
    files = [folder / "images" / f"{number:03d}.png" for number in range(len(store))]
    files[0].parent.mkdir()
    for file, pixels in zip(files, store.images(range(len(store))), strict=True):
        Image.fromarray(pixels[:, :, 0]).save(file)
    return Made(config, run, files, np.asarray(store.labels))


def test_files_score_exactly_what_selection_scored(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    scored = json.loads(made.run.result.read_text())["test"]
    for method, name in (("paws-nn", "paws_nn"), ("fine-tuned", "fine_tuned")):
        told = made.told(capsys, str(made.files[0].parent), "--method", method, "--top", "10")
        assert [image["path"] for image in told["images"]] == [str(file) for file in made.files]
        guesses = np.array([int(image["classes"][0]["name"]) for image in told["images"]])
        assert (guesses == made.labels).mean() == scored[name]["top1"]
        assert np.array_equal(confusion_matrix(made.labels, guesses, labels=range(10)), scored[name]["confusion"])
        assert told["commit"] == json.loads(made.run.chain.read_text())["commit"]


def test_probabilities_and_neighbours_are_those_of_the_evaluation(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_data(made.config)
    encoder = build_encoder(made.config.model, seed=0)
    encoder.load_state_dict(torch.load(made.run.tuned, weights_only=True))
    network, supports = Representation(encoder), data.labelled_images()
    store = ImageStore(made.config.data.test)
    test = data.images(store, np.arange(len(store)))
    h, h_supports = (forward_set(network, images, CPU) for images in (test, supports))
    expected = paws_nn(h, h_supports, supports.labels, num_classes=10, temperature=made.config.objective.temperature)
    cosines = torch.nn.functional.normalize(h.double()) @ torch.nn.functional.normalize(h_supports.double()).T
    told = made.told(capsys, str(made.files[0].parent), "--top", "10", "--nearest", "3")["images"]
    keys = [data.labelled_store.keys[int(record)] for record in data.labelled]
    for image, row, similar in zip(told, expected, cosines, strict=True):
        found = {int(entry["name"]): entry["probability"] for entry in image["classes"]}
        assert [found[number] for number in range(10)] == row.tolist(), "to the last bit"
        assert [entry["probability"] for entry in image["classes"]] == sorted(found.values(), reverse=True)
        assert [entry["similarity"] for entry in image["nearest"]] == pytest.approx(
            similar.topk(3).values.tolist(), abs=1e-6
        )
        for entry in image["nearest"]:
            place = keys.index(entry["key"])
            assert entry["class"] == str(int(supports.labels[place]))
            assert entry["similarity"] == pytest.approx(similar[place].item(), abs=1e-6)


def test_a_file_that_is_no_image_is_named_and_the_others_go_on(made: Made, tmp_path: Path) -> None:
    whole = made.files[0].read_bytes()
    damaged = {"a-cut.png": whole[: len(whole) // 2], "b-text.jpg": b"no image", "c-empty.png": b""}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "e-good.png").write_bytes(whole)
    (tmp_path / "f-\x1b[31m.png").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "paws_hpc.predict", str(made.run.path), str(tmp_path), "gone.png", "/dev/zero",
         "--json", str(tmp_path / "told.json"), "--html", str(tmp_path / "sheet.html")],
        capture_output=True, text=True, check=False, env=environment(), timeout=240,
    )  # fmt: skip
    assert done.returncode == predict.SOME_FAILED, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert [Path(image["path"]).name for image in told["images"]] == ["e-good.png"]
    failed = {Path(entry["path"]).name: entry["reason"] for entry in told["failed"]}
    assert failed.keys() == {*damaged, "f-\x1b[31m.png", "gone.png", "zero"}
    assert failed["gone.png"] == "No such file or directory"
    assert "not a file" in failed["zero"]
    assert all(name in done.stderr for name in [*damaged, "gone.png"])
    assert "\x1b" not in done.stderr
    uncalibrated, *lines = done.stderr.splitlines()
    assert "has no calibration" in uncalibrated
    assert len(lines) == len(failed), "one line each"
    assert "6 files could not be read" in (tmp_path / "sheet.html").read_text()
    assert done.stdout.startswith(f"{tmp_path}/e-good.png: ")


def test_a_small_file_that_would_fill_the_memory_when_it_is_resized_is_refused(made: Made, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((1, 30_000, 3), np.uint8)).save(tmp_path / "narrow.png")
    store = ImageStore(made.config.data.train)
    with pytest.raises(ValueError, match="30000 x 1 pixels, too narrow"):
        read_image(tmp_path / "narrow.png", store)
    with pytest.raises(ValueError, match="30000 x 1 pixels, too narrow"):
        center_crop(np.zeros((1, 30_000, 3), np.uint8), CenterCropConfig(resize=256, size=224))


def test_wrong_inputs_are_one_line(
    made: Made, digits_stores: Stores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        return refusal(predict.main, capsys, *arguments, "--device", "cpu")

    begin(tiny_config(digits_stores.train, digits_stores.test, tmp_path))
    image = str(made.files[0])
    assert "run the stage 'pretrain'" in refused("run", image, "--runs", str(tmp_path))
    assert "Run the stage 'selection'" in refused("run", image, "--runs", str(tmp_path), "--method", "fine-tuned")
    assert "There is no run" in refused("other", image, "--runs", str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused("run", str(tmp_path / "empty"), "--runs", str(tmp_path))
    for wrong in (["--method", "guess"], ["--top", "0"]):
        with pytest.raises(SystemExit, match="2"):
            predict.main(["run", image, *wrong])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_sheet_is_readable_and_asks_for_nothing(
    page: Page, made: Made, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "<img src=x onerror=alert(1)>.png"
    shutil.copy(made.files[0], tmp_path / hostile)
    (tmp_path / "torn <b>.png").write_bytes(made.files[1].read_bytes()[:50])
    sheet = tmp_path / "sheet.html"
    arguments = [str(made.run.path), str(tmp_path), *map(str, made.files[:7]), "--html", str(sheet), "--device", "cpu"]
    assert predict.main(arguments) == predict.SOME_FAILED
    capsys.readouterr()
    for width in (1280, 420):
        page.open(sheet, scheme=scheme, width=width)
        assert page.script("return document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        assert min(page.script(CONTRAST))[0] >= 4.5, "WCAG AA"
        requests = page.requests()
        assert requests[0] == sheet.as_uri()
        assert all(url.startswith("data:image/png;base64,") for url in requests[1:])
        assert page.complaints() == []
    assert page.script("return document.querySelectorAll('.sheet > li').length") == 8
    assert page.script("return [...document.images].every(image => image.complete && image.naturalWidth == 16)")
    texts = page.script("return [...document.images].map(image => image.alt)")
    assert len(texts) == 8 * 6
    assert texts[0] == f"{tmp_path}/{hostile}, cropped as the network sees it"
    assert all(" of class " in text and "similarity" in text for text in texts[1:6])
    assert "1 file could not be read" in page.text("#warnings")
    assert "torn <b>.png: " in page.text("#warnings")
