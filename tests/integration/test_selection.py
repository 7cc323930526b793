"""The winner is chosen by validation alone, and nothing before that choice opens the test store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from paws_hpc.config import Config
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.config import SuncetConfig
from paws_hpc.engine.evaluate import forward_set
from paws_hpc.files import read_record, write_record
from paws_hpc.models.encoder import build_classifier, build_encoder
from paws_hpc.report.page import build_report
from paws_hpc.stages import finetune, prepare, pretrain, selection
from paws_hpc.stages.context import StageContext, TorchContext
from paws_hpc.stages.networks import load_pretrained
from paws_hpc.stages.probing import validation_accuracy
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder, mark_done
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.tiny import tiny_config, trial_at

CPU = torch.device("cpu")


def finished(run: RunFolder, accuracies: dict[str, float], *, sweep: str = "finetune", **others: Any) -> None:
    """Write by hand what finished trials leave."""
    for name, accuracy in accuracies.items():
        folder = run.path / sweep / name
        write_record(folder / "result.json", {"validation_accuracy": accuracy, **others.get(name, {})})
        mark_done(folder, steps=1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Four trials: learning rates 0.02 and 0.1, one and two epochs."""
    return tiny_config(tmp_path / "absent", tmp_path / "absent", tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_the_best_validation_accuracy_wins_whatever_else_a_result_says(config: Config, run: RunFolder) -> None:
    accuracies = {"lr=0.02,epochs=1": 0.7, "lr=0.02,epochs=2": 0.8, "lr=0.1,epochs=1": 0.9, "lr=0.1,epochs=2": 0.6}
    finished(run, accuracies, **{"lr=0.02,epochs=1": {"test_accuracy": 1.0, "seconds": 0.1}})
    trial, said = selection.choose(config, run, "finetune")
    assert (trial, said["validation_accuracy"], said["missing"]) == (trial_at(0.1, 1), 0.9, [])
    finished(run, dict.fromkeys(accuracies, 0.8) | {"lr=0.02,epochs=1": 0.7})
    assert selection.choose(config, run, "finetune")[0] == trial_at(0.02, 2), "of equals the first of the sweep"


def test_trials_without_a_finished_result_are_left_out_and_named(config: Config, run: RunFolder) -> None:
    finished(run, {"lr=0.02,epochs=1": 0.6, "lr=0.1,epochs=1": 0.5, "lr=0.1,epochs=2": 0.99})
    (run.path / "finetune" / "lr=0.1,epochs=2" / "DONE").unlink()  # still in training, however good it looks
    finished(run, {"lr=0.5,epochs=1": 1.0})  # of an earlier sweep
    trial, said = selection.choose(config, run, "finetune")
    assert trial == trial_at(0.02, 1)
    assert said["missing"] == ["lr=0.02,epochs=2", "lr=0.1,epochs=2"]


def test_too_few_finished_trials_are_an_error_that_names_the_others(config: Config, run: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"0 of the 4 trials under .*run/finetune have finished.* stage 'finetune'"):
        selection.choose(config, run, "finetune")
    finished(run, {"lr=0.02,epochs=2": 0.8, "lr=0.1,epochs=1": 0.9})
    config.finetune.min_trials = 2
    assert selection.choose(config, run, "finetune")[0] == trial_at(0.1, 1)
    config.finetune.min_trials = 3
    missing = r"finetune\.min_trials=3\. Missing: lr=0.02,epochs=1; lr=0.1,epochs=2\."
    with pytest.raises(ValueError, match=rf"2 of the 4 trials .*{missing}"):
        selection.choose(config, run, "finetune")


@pytest.fixture(scope="module")
def chain(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder]:
    """All stages up to selection, with the test store out of reach after prepare; one trial of the sweep is lost."""
    folder = tmp_path_factory.mktemp("chain")
    test = folder / "test"
    config = tiny_config(digits_stores.train, test, folder)
    run = RunFolder(folder / "run")
    test.symlink_to(digits_stores.test)
    prepare.run(StageContext(config, run))
    test.unlink()
    pretrain.run(TorchContext(config, run))
    for trial in config.finetune.trials()[1:]:
        finetune.run(TorchContext(config, run, "finetune", trial))
    finetune.run(TorchContext(config, run, "baseline", trial_at(0.1, 2)))
    return config, run


def test_selection_chooses_first_and_then_names_the_test_store_that_is_missing(
    chain: tuple[Config, RunFolder],
) -> None:
    config, run = chain
    with pytest.raises(ValueError, match=str(config.data.test)):
        selection.run(TorchContext(config, run))
    assert not run.result.exists()
    assert read_record(run.selected)["trial"] == selection.choose(config, run, "finetune")[1]["trial"]


def check_gallery(config: Config, run: RunFolder, result: dict[str, Any], test: EvaluationSet) -> None:
    """What the report shows of test images is what was scored."""
    told = json.loads((run.selection / "gallery.json").read_text())
    shown, paws_nn = told["map"], result["test"]["paws_nn"]["confusion"]
    assert (shown["images"], len(shown["shown"]), len(shown["labelled"])) == (400, 400, 40)
    assert np.array_equal(confusion_matrix(shown["true"], shown["predicted"], labels=range(10)), paws_nn)
    assert np.array(shown["shown"]).min() == 0.0
    assert np.array(shown["shown"]).max() == 1.0
    assert list(told["pairs"]) == ["paws_nn", "fine_tuned", "baseline"]
    for pair in told["pairs"]["paws_nn"]:
        assert pair["images"] == paws_nn[pair["true"]][pair["predicted"]]
        assert pair["probabilities"] == sorted(pair["probabilities"], reverse=True), "the surest first"
    with np.load(run.selection / "predictions.npz", allow_pickle=False) as file:
        for method in result["test"].keys() - {"count"}:
            confusion = confusion_matrix(file["labels"], file[method], labels=range(10))
            assert np.array_equal(confusion, result["test"][method]["confusion"]), method
        assert np.array_equal(file["labels"], test.labels)
    assert [(own["class"], own["images"], len(own["tiles"])) for own in told["labelled"]] == [
        (number, 4, 4) for number in range(10)
    ]
    with Image.open(run.selection / "gallery.png") as file:
        sheet, pixels = file.convert("RGB"), told["tile_pixels"]
    pictures = {test.crops(test.records[number : number + 1])[0].permute(1, 2, 0).numpy().tobytes(): number
                for number in range(len(test))}  # fmt: skip
    supports = open_data(config).labelled_images()
    for mistake in told["mistakes"]:
        y, x = divmod(mistake["tile"], told["columns"])
        tile = sheet.crop((x * pixels, y * pixels, (x + 1) * pixels, (y + 1) * pixels))
        number = pictures[np.asarray(tile).tobytes()]
        assert (shown["true"][number], shown["predicted"][number]) == (mistake["true"], mistake["predicted"])
        assert mistake["true"] != mistake["predicted"]
        assert {near["class"] for near in mistake["supports"]} <= set(supports.labels.tolist())
        similarities = [near["similarity"] for near in mistake["supports"]]
        assert similarities == sorted(similarities, reverse=True)
    probabilities = [mistake["probability"] for mistake in told["mistakes"]]
    assert probabilities == sorted(probabilities, reverse=True)


@pytest.fixture(scope="module")
def scored(
    chain: tuple[Config, RunFolder], digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, RunFolder]:
    """A copy of the chain after selection; the test store is out of reach again."""
    folder = tmp_path_factory.mktemp("scored")
    run = RunFolder(folder / "run")
    shutil.copytree(chain[1].path, run.path)
    config = tiny_config(digits_stores.train, folder / "test", folder)
    Path(config.data.test).symlink_to(digits_stores.test)
    selection.run(TorchContext(config, run))
    Path(config.data.test).unlink()
    return config, run


def test_the_winner_and_the_baseline_are_scored_on_the_test_store_once(
    scored: tuple[Config, RunFolder], digits_stores: Stores
) -> None:
    config, run = scored
    selection.run(TorchContext(config, run))  # done: the test store is not opened again
    selected, result = read_record(run.selected), read_record(run.result)
    assert selected["missing"] == ["lr=0.02,epochs=1"]
    chosen = {"trial": "lr=0.1,epochs=2", "learning_rate": 0.1, "epochs": 2, "missing": []}
    assert selected["baseline"].pop("validation_accuracy") > 0
    assert selected["baseline"] == chosen
    store = ImageStore(digits_stores.test)
    images = EvaluationSet(store, np.arange(len(store)), config.views.evaluation, ImageStore(digits_stores.train))
    for name, folder in (("fine_tuned", f"finetune/{selected['trial']}"), ("baseline", "baseline/lr=0.1,epochs=2")):
        classifier = build_classifier(build_encoder(config.model, seed=0), 10)
        classifier.load_state_dict(torch.load(run.path / folder / "best.pt", weights_only=True))
        predicted = forward_set(classifier, images, CPU).argmax(1)
        scores = result["test"][name]
        assert scores["top1"] == pytest.approx(accuracy_score(store.labels, predicted))
        assert np.array_equal(scores["confusion"], confusion_matrix(store.labels, predicted, labels=range(10)))
        assert f"lr={scores['learning_rate']:g},epochs={scores['epochs']}" == folder.partition("/")[2]
    assert result["test"]["count"] == len(store) == 400
    assert (result["labels"], result["seed"]) == (40, 0)
    assert result["digests"]["test"] == store.digest
    assert read_record(run.prepare / "DONE") == {"digests": result["digests"]}
    assert result["missing"] == {"finetune": ["lr=0.02,epochs=1"], "baseline": []}
    check_gallery(config, run, result, images)


def test_probes_are_chosen_by_validation_and_scored_beside_the_others(scored: tuple[Config, RunFolder]) -> None:
    config, run = scored
    data = open_data(config)
    selected, result = read_record(run.selected), read_record(run.result)["test"]
    encoder, _ = load_pretrained(run, data, CPU)

    def features(images: EvaluationSet) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([encoder.eval().backbone(batch) for batch in images.batches(CPU, torch.float32)]).numpy()

    labelled, validation = data.labelled_images(), data.validation_images()
    theirs = KNeighborsClassifier(
        selected["k_nn"]["k"], metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(features(labelled), labelled.labels)
    accuracy = theirs.score(features(validation), validation.labels)
    assert selected["k_nn"]["validation_accuracy"] == pytest.approx(accuracy)
    assert result["k_nn"]["k"] == selected["k_nn"]["k"]
    assert result["linear_probe"]["penalty"] == selected["linear_probe"]["penalty"]
    assert all(np.sum(result[name]["confusion"]) == 400 for name in ("k_nn", "linear_probe"))


@pytest.fixture
def unscored(
    scored: tuple[Config, RunFolder], digits_stores: Stores, tmp_path: Path
) -> tuple[Config, RunFolder, dict[str, Any]]:
    """The chain before selection, with the test store, and the result that it had."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(scored[1].path, run.path)
    expected = read_record(run.result)
    for path in (run.result, run.selected):
        path.unlink()
    return tiny_config(digits_stores.train, digits_stores.test, tmp_path), run, expected["test"]


def test_the_encoder_is_tuned_for_neighbours_before_their_score_if_that_is_asked_for(
    unscored: tuple[Config, RunFolder, dict[str, Any]],
) -> None:
    config, run, expected = unscored
    config.suncet = SuncetConfig(steps=10, learning_rate=0.03)
    selection.run(TorchContext(config, run))
    tuning, result = read_record(run.selected)["suncet"], read_record(run.result)["test"]
    assert tuning["steps"] == 10
    assert tuning["loss"][1] < tuning["loss"][0]
    assert result.pop("paws_nn")["confusion"] != expected.pop("paws_nn")["confusion"]
    assert result == expected, "all else is of the network as pre-trained"
    encoder = build_encoder(config.model, seed=0)
    encoder.load_state_dict(torch.load(run.tuned, weights_only=True))
    assert tuning["validation_accuracy"]["after"] == validation_accuracy(encoder, open_data(config), CPU)


def test_scores_are_kept_before_they_are_published_and_published_if_that_was_cut_short(
    unscored: tuple[Config, RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run, _ = unscored
    config.tracking.wandb = "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selection, "watch", killed)  # while it waits for a server
        with pytest.raises(KeyboardInterrupt):
            selection.run(TorchContext(config, run))
    scored = run.result.read_bytes()
    metrics = run.selection / "metrics.jsonl"
    assert not metrics.read_text()
    for _ in range(2):
        selection.run(TorchContext(config, run))
        (row,) = [json.loads(line) for line in metrics.read_text().splitlines()]
    test = json.loads(scored)["test"]
    assert {name: value for name, value in row.items() if name.startswith("test/")} == {
        f"test/{method}_top1": scores["top1"] for method, scores in test.items() if method != "count"
    }
    assert run.result.read_bytes() == scored


def test_without_a_baseline_the_winner_is_still_scored_if_that_is_allowed(
    unscored: tuple[Config, RunFolder, dict[str, Any]],
) -> None:
    config, run, expected = unscored
    shutil.rmtree(run.path / "baseline")
    with pytest.raises(
        ValueError, match=r"0 of the 1 trials under .*baseline have finished, but baseline.min_trials=1"
    ):
        selection.run(TorchContext(config, run))
    config.baseline.min_trials = 0
    selection.run(TorchContext(config, run))
    result = read_record(run.result)
    assert result["test"] == {name: value for name, value in expected.items() if name != "baseline"}
    assert result["missing"] == {"finetune": ["lr=0.02,epochs=1"], "baseline": ["lr=0.1,epochs=2"]}
    build_report(run.path)


def test_an_unfinished_trial_goes_on_in_a_larger_sweep_but_not_in_another_one(
    chain: tuple[Config, RunFolder], tmp_path: Path
) -> None:
    config, run = chain[0], RunFolder(tmp_path / "run")
    shutil.copytree(chain[1].path, run.path)
    folder = run.path / "finetune" / "lr=0.1,epochs=1"
    result = read_record(folder / "result.json")
    for name in ("DONE", "result.json"):
        (folder / name).unlink()
    wider = tiny_config(Path(config.data.train), Path(config.data.test), Path(config.runs))
    wider.finetune.sweep["learning_rate"] = [0.02, 0.1, 0.5]
    finetune.run(TorchContext(wider, run, "finetune", trial_at(0.1, 1)))
    again = read_record(folder / "result.json")
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    wider.finetune.min_trials = 2
    (folder / "DONE").unlink()
    finetune.run(TorchContext(wider, run, "finetune", trial_at(0.1, 1)))
    baseline = run.path / "baseline" / "lr=0.1,epochs=2"
    (baseline / "DONE").unlink()
    wider.baseline.momentum, wider.model.channels = 0.5, [8, 12]
    with pytest.raises(ValueError, match="belongs to another experiment") as told:
        finetune.run(TorchContext(wider, run, "baseline", trial_at(0.1, 2)))
    for field in ("baseline.momentum: 0.9 there, 0.5 now", "model.channels: [8, 16] there, [8, 12] now"):
        assert field in str(told.value)
