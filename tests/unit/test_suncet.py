"""Tuning for nearest neighbours: what moves and what must not, what it is for, and that ranks together tune as one."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from paws_hpc.data.config import CenterCropConfig
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine.config import SuncetConfig
from paws_hpc.engine.suncet import fine_tune_with_suncet
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import Encoder, build_encoder
from paws_hpc.packing import ArraySource, PackOptions, pack
from paws_hpc.store import ImageStore
from tests.ranks import results_of, run_on_ranks

CPU = torch.device("cpu")
MODEL = ModelConfig("small_resnet", channels=[8, 16], prediction_head=True)


def labelled_set(folder: Path, labels_of: list[int]) -> EvaluationSet:
    """Real digits, as many of each class as asked for."""
    data = load_digits()
    chosen = np.concatenate([np.flatnonzero(data.target == label)[:count] for label, count in enumerate(labels_of)])
    images = np.repeat(np.repeat((data.images[chosen] * 15.9).astype(np.uint8), 2, 1), 2, 2)
    source = ArraySource(
        "digits",
        np.stack([images] * 3, axis=-1),
        data.target[chosen],
        [f"{record:05d}" for record in chosen],
        tuple(map(str, range(len(labels_of)))),
    )
    pack(source, folder / "store", options=PackOptions())
    store = ImageStore(folder / "store")
    return EvaluationSet(store, np.arange(len(store)), CenterCropConfig(resize=16, size=16), store)


def tuned(labelled: EvaluationSet, **fields: Any) -> tuple[Encoder, Encoder, list[float]]:
    """An encoder before and after, and the losses, in float64."""
    before = build_encoder(MODEL, seed=0).double()
    images = torch.cat(list(labelled.batches(CPU, torch.float64)))
    for _ in range(30):  # so that the running statistics, which tuning keeps, are those of the images
        before([images])
    after = copy.deepcopy(before)
    config = SuncetConfig(**{"steps": 12, "images_per_class": 6, "learning_rate": 0.3} | fields)
    return before, after, fine_tune_with_suncet(after, labelled, config, temperature=0.1, seed=0, device=CPU)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    return labelled_set(tmp_path_factory.mktemp("labelled"), [8] * 10)


def test_statistics_and_prediction_head_stay_and_all_else_moves(labelled: EvaluationSet) -> None:
    before, after, losses = tuned(labelled)
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    trained = {name for name, _ in after.named_parameters() if not name.startswith("prediction.")}
    assert moved == trained
    assert any("bn1.weight" in name for name in moved)


def test_the_same_seed_tunes_to_the_same_bits(labelled: EvaluationSet) -> None:
    first, second = tuned(labelled)[1], tuned(labelled)[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_class_with_fewer_labels_sets_how_many_are_drawn(tmp_path: Path) -> None:
    few = labelled_set(tmp_path, [8, 3, 8])
    assert len(tuned(few, images_per_class=64)[2]) == 12
    scarce = labelled_set(tmp_path / "scarce", [8, 1, 8])
    with pytest.raises(ValueError, match=r"needs two labelled images of every class, and one class has 1"):
        tuned(scarce)


@pytest.mark.parametrize("fields", [{"steps": -1}, {"images_per_class": 1}, {"learning_rate": 0.0}])
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=f"suncet.{name}={fields[name]}"):
        SuncetConfig(**fields)


def tuned_by_ranks(rank: int, world: int) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:  # each rank packs the same images
        _, after, losses = tuned(labelled_set(Path(folder), [8] * 10), steps=4)
    return after.state_dict() | {"losses": torch.tensor(losses, dtype=torch.float64)}


def test_two_ranks_tune_as_one(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {1: [tuned_by_ranks], 2: [tuned_by_ranks]})
    (alone,) = results_of(tuned_by_ranks, 1, tmp_path)
    for together in results_of(tuned_by_ranks, 2, tmp_path):
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-10)
