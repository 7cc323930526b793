"""One command on a folder of own images, to the report; and how labels are counted where nothing is held out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launching import environment
from tests.pictures import write_tiles

SHORT = (
    "tracking.wandb=disabled", "views.large.size=16", "model.channels=[8,16]", "pretrain.epochs=2",
    "pretrain.validate_every_epochs=1", "finetune.sweep.epochs=[2]", "finetune.validate_every_epochs=1",
    "baseline.sweep.epochs=[3]", "baseline.validate_every_epochs=2", "baseline.warmup_epochs=0",
)  # fmt: skip


def launch(here: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paws_hpc.launch", *SHORT, *overrides]
    return subprocess.run(
        command, cwd=here, capture_output=True, text=True, check=False, env=environment(), timeout=240
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("own")
    write_tiles(folder / "photos", 40, classes=("cat", "dog"))
    done = launch(folder, "data.root=photos", "labels.per_class=5")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_one_command_packs_derives_trains_and_reports(finished: tuple[Path, str]) -> None:
    folder, said = finished
    assert re.search(r"pretrain.batch_size=10 +of 40 images\n", said)
    assert re.search(r"labels.validation_per_class=null +5 labels a class: cross-validation chooses\n", said)
    (store,) = (folder / "shards").glob("photos-????????/train")
    assert (store / "manifest.json").exists()
    assert (folder / "runs/photos-seed0/report/index.html").exists()
    again = launch(folder, "data.root=photos", "labels.per_class=5")
    assert "done already" in again.stdout, again.stderr


def test_no_test_images_no_score_and_the_labels_that_chose_are_counted(finished: tuple[Path, str]) -> None:
    folder, said = finished
    run = folder / "runs/photos-seed0"
    result, selected = (json.loads((run / name).read_text()) for name in ("result.json", "selected.json"))
    assert (result["labels"], result["validation_labels"], result["folds"]) == (10, 0, 4)
    assert result["test"] == {"count": 0}
    shown = " ".join(said.replace("│", " ").split())
    assert "none: nothing is scored on images that chose nothing" in shown
    assert "cross-validation of the labels, 4 folds, chose" in shown
    assert "in validation, which chose it" in shown
    report = (run / "report/index.html").read_text()
    assert "Scored on no test images, for the run has none; 10 labels, which chose too." in report
    assert "Nothing is calibrated: the run has no validation images." in report
    # The choice is the mean over the folds of what was right while it was held out, of all 10 labels.
    for trial in (run / "finetune").iterdir():
        folds = [(trial / f"fold-{number}/metrics.jsonl").read_text().splitlines() for number in (1, 2, 3, 4)]
        sizes = [4, 2, 2, 2]
        right = [[size * json.loads(row)["val/top1"] for row in rows] for size, rows in zip(sizes, folds, strict=True)]
        accuracies = [sum(epoch) / 10 for epoch in zip(*right, strict=True)]
        assert len(accuracies) == 2
        best = json.loads((trial / "result.json").read_text())["validation_accuracy"]
        assert best == pytest.approx(max(accuracies))
    assert selected["linear_probe"]["validation_accuracy"] * 10 == pytest.approx(
        round(selected["linear_probe"]["validation_accuracy"] * 10)
    )
    rows = (run / "pretrain/metrics.jsonl").read_text()
    assert "val/" not in rows, "the encoder was trained to classify the labelled images, which say nothing of it"


def test_test_images_are_scored_and_a_flat_folder_with_a_list_works(tmp_path: Path) -> None:
    write_tiles(tmp_path / "in/photos", 40, classes=("x",))
    write_tiles(tmp_path / "in/test", 12, classes=("cat", "dog"), step=11, png=(0,))  # no pixels of the others
    lines = [f"{number:03d}.jpg,{'cat' if number % 2 else 'dog'}" for number in range(12)]
    (tmp_path / "in/labels.csv").write_text("file,label\n" + "\n".join(lines))
    done = launch(
        tmp_path, "data.unlabelled=in/photos", "data.labels=in/labels.csv", "data.test=in/test", "seed=1",
        "stages=[prepare,baseline,selection,report]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/photos-seed1/result.json").read_text())
    assert (result["labels"], result["test"]["count"], result["classes"]) == (12, 12, ["cat", "dog"])
