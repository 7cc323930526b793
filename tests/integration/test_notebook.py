"""The package in a notebook: a run by its name, a store as a data set of torch, the loss of plain tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import paws_hpc
from paws_hpc.engine.evaluate import paws_nn, score
from paws_hpc.finished_run import FinishedRun
from paws_hpc.stages.run_folder import RunFolder
from tests.conftest import Stores
from tests.finished import begin, trained_run
from tests.objective import load_golden
from tests.tiny import tiny_config

NOTEBOOK = Path(__file__).parents[2] / "docs/notebook.ipynb"


@pytest.fixture(scope="module")
def runs(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, of which one, ``digits-seed3``, has trained."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    trained_run(digits_stores, folder)
    (folder / "run").rename(folder / "digits-seed3")
    return folder


@pytest.fixture
def run(runs: Path) -> FinishedRun:
    return paws_hpc.load_run("digits-seed3", runs)


def test_every_cell_of_the_notebook_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs.parent)
    mpl.use("Agg")
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "40 labels: " in capsys.readouterr().out
    assert names["accuracy"] > 0.2  # after one epoch; chance is 0.1


def test_importing_the_package_loads_none_of_it() -> None:
    heavy = "[name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'omegaconf', 'PIL')]"
    ask = f"import sys, paws_hpc; assert 'load_run' in dir(paws_hpc); print({heavy})"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'lod_run'"):
        _ = paws_hpc.lod_run


def test_encoder_and_embeddings_are_those_of_the_scores(run: FinishedRun) -> None:
    embeddings, store = run.embeddings("test"), paws_hpc.ImageStore(run.config.data.test)
    assert embeddings.keys == store.keys[:]
    assert embeddings.labels.tolist() == store.labels.tolist()
    loader = DataLoader(paws_hpc.StoreDataset(store.path, transform=run.transform), batch_size=256)
    with torch.no_grad():
        by_loader = torch.cat([run.encoder(images) for images, _ in loader])
    assert torch.equal(by_loader, embeddings.features)
    scores = json.loads((run.folder.path / "result.json").read_text())["test"]
    supports = run.embeddings("labelled")
    predictions = paws_nn(
        embeddings.features, supports.features, supports.labels, num_classes=len(run.classes),
        temperature=run.config.objective.temperature,
    )  # fmt: skip
    assert score(predictions, embeddings.labels).top1 == scores["paws_nn"]["top1"]
    assert len(run.embeddings("validation").labels) == 40
    with pytest.raises(ValueError, match=r"no 'tset' images. Choose train, labelled"):
        run.embeddings("tset")


def turned(image: Image.Image, folder: Path) -> Path:
    """A file that holds an image upside down, and says so."""
    exif = Image.Exif()
    exif[0x0112] = 3
    image.transpose(Image.Transpose.ROTATE_180).save(folder / "turned.png", exif=exif)
    return folder / "turned.png"


def test_a_transform_takes_pictures_and_pixels(run: FinishedRun, tmp_path: Path) -> None:
    image, label = paws_hpc.StoreDataset(run.config.data.test)[3]
    store = paws_hpc.ImageStore(run.config.data.test)
    assert label == store.labels[3]
    assert np.array_equal(np.asarray(image), store[3])
    assert torch.equal(run.transform(image), run.transform(store[3]))
    assert torch.equal(run.transform(image.convert("L")), run.transform(store[3]))  # digits are grey
    deep = Image.fromarray(store[3][..., 0].astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert torch.equal(run.transform(deep), run.transform(store[3]))
    assert torch.equal(run.transform(Image.open(turned(image, tmp_path))), run.transform(image))


def test_metrics_are_flat_rows_of_every_stage(run: FinishedRun) -> None:
    rows = run.metrics
    assert {row["stage"] for row in rows} == {"pretrain", "finetune", "baseline"}
    assert len({row["trial"] for row in rows if row["stage"] == "finetune"}) == 4
    assert all(isinstance(value, str | int | float) for row in rows for value in row.values())
    assert any(row["stage"] == "pretrain" and "train/loss" in row for row in rows)


def test_a_data_set_is_read_by_the_workers_of_a_loader(run: FinishedRun) -> None:
    dataset = paws_hpc.StoreDataset(run.config.data.test, transform=run.transform)
    assert torch.equal(dataset[5][0], dataset[-395][0])
    (images, labels), *_ = DataLoader(dataset, batch_size=400, num_workers=2)
    assert torch.equal(images[7], dataset[7][0])
    assert labels.tolist() == dataset.store.labels.tolist()


def test_what_a_run_has_not_is_said(digits_stores: Stores, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no run digits-sed3.* Did you mean digits-seed3"):
        paws_hpc.load_run("digits-sed3", runs)
    (tmp_path / "bare/jobs").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"bare has no config.yaml: nothing of it was started"):
        paws_hpc.load_run("bare", tmp_path)
    begin(tiny_config(digits_stores.train, digits_stores.test, tmp_path))
    begun = paws_hpc.load_run("run", tmp_path)
    assert begun.metrics == []
    with pytest.raises(FileNotFoundError, match="run the stage 'pretrain' of this run first"):
        _ = begun.encoder
    with pytest.raises(FileNotFoundError, match="Run the stage 'selection' of this run first"):
        begun.network("classifier")


def test_a_checkpoint_that_is_gone_is_named(digits_stores: Stores, tmp_path: Path) -> None:
    _, folder = trained_run(digits_stores, tmp_path)
    for file in RunFolder(folder.path).checkpoints.glob("*.pt"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="checkpoints holds no valid checkpoint of step"):
        _ = paws_hpc.load_run("run", tmp_path).encoder


@pytest.mark.parametrize("name", ["mc6_predhead", "mc6_nohead", "mc0_twoview", "mc2_nomemax", "mc0_eq1_nosmooth"])
def test_the_loss_of_plain_tensors_has_the_reference_numbers(name: str) -> None:
    golden = load_golden(f"paws_{name}")
    images, rows = int(golden["n"]), len(golden["support_class"])
    z = golden["z"].requires_grad_()
    views, h = (value[rows:].unflatten(0, (-1, images)) for value in (z, golden["h"]))
    head = {"target_views": h[:2], "target_supports": golden["h"][:rows]} if name != "mc6_nohead" else {}
    rates = {"temperature": "tau", "sharpening": "T", "label_smoothing": "smoothing"}
    options = {option: float(golden[key]) for option, key in rates.items()} | {"me_max": bool(golden["me_max"])}
    terms = paws_hpc.loss(views, z[:rows], 3 * golden["support_class"] + 7, **options, **head)
    terms.total.backward()
    torch.testing.assert_close(terms.total, golden["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(z.grad, golden["grad_z_loss"], rtol=1e-9, atol=1e-14)


def test_tensors_that_do_not_go_together_are_refused() -> None:
    views, supports, classes = torch.randn(4, 6, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    paws_hpc.loss(views, supports, classes)
    for wrong in (
        {"views": views[:1]}, {"views": views.flatten(0, 1)}, {"supports": supports[:, :7]}, {"classes": classes[:4]},
        {"classes": classes.float()}, {"target_views": views}, {"target_supports": supports[:, :3]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"have the shapes .*: give \(2 \+ m, n, D\), \(S, D\), integers"):
            paws_hpc.loss(**{"views": views, "supports": supports, "classes": classes} | wrong)
    with pytest.raises(ValueError, match=r"temperature=0 must be in"):
        paws_hpc.loss(views, supports, classes, temperature=0)
