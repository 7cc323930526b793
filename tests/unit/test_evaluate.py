"""Scores are what their names say, PAWS-NN is the reference's, and ranks together score as one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score
from torch import Tensor, nn

from paws_hpc.data.config import CenterCropConfig
from paws_hpc.data.streams import EvaluationSet
from paws_hpc.engine import evaluate
from paws_hpc.engine.evaluate import Representation, evaluation_mode, forward_set, paws_nn, score
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.models.norm import set_statistics
from tests.objective import load_golden
from tests.ranks import results_of, run_on_ranks
from tests.tiny import random_store

CPU = torch.device("cpu")


def test_scores_are_those_of_scikit_learn() -> None:
    random = torch.Generator().manual_seed(0)
    predictions = torch.randn(500, 12, generator=random)
    labels = torch.randint(11, (500,), generator=random)  # nobody is of the last class
    scores = score(predictions, labels)
    assert scores.top1 == pytest.approx(accuracy_score(labels, predictions.argmax(1)))
    assert scores.top5 == pytest.approx(top_k_accuracy_score(labels, predictions, k=5, labels=range(12)))
    assert score(predictions[:, :5], labels % 5).top5 is None, "five of five classes say nothing"
    expected = confusion_matrix(labels, predictions.argmax(1), labels=range(12))
    assert np.array_equal(scores.confusion, expected)


class Batches(list[Tensor]):
    """Images in place of an evaluation set."""

    def batches(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        return self

    def __len__(self) -> int:
        return sum(map(len, self))


def golden_classifier() -> tuple[dict[str, Tensor], dict[str, Any]]:
    golden = load_golden("snn_classifier")
    return golden, {"num_classes": golden["probs"].shape[1], "temperature": golden["temperature"].item()}


def test_nearest_neighbours_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, settings = golden_classifier()
    for at_once in (1024, 7):
        monkeypatch.setattr(evaluate, "_QUERIES_AT_ONCE", at_once)
        probabilities = paws_nn(golden["query"], golden["support"], golden["support_label"], **settings)
        torch.testing.assert_close(probabilities, golden["probs"], rtol=1e-10, atol=1e-12)
    scores = score(probabilities, golden["query_label"])
    assert 100 * scores.top1 == pytest.approx(golden["top1"].item())
    assert 100 * scores.top5 == pytest.approx(golden["top5"].item())


def test_evaluating_gives_every_submodule_its_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    forward_set(model, Batches([torch.randn(4, 3)]), CPU)
    assert torch.equal(model[0].running_mean, torch.zeros(3)), "an evaluation leaves statistics alone"


def test_representations_are_h_not_z() -> None:
    encoder = build_encoder(ModelConfig("small_resnet", channels=[4], prediction_head=True), seed=0)
    images = torch.randn(5, 3, 8, 8)
    with evaluation_mode(encoder):
        h, z = encoder([images])
    torch.testing.assert_close(forward_set(Representation(encoder), Batches([images[:2], images[2:]]), CPU), h)
    assert not torch.allclose(h, z)


def embeddings(rank: int, world: int) -> list[Tensor]:
    """Of 7 images, 4 at a time, and of 2, on networks whose ranks' statistics are their own."""
    encoder = build_encoder(ModelConfig("small_resnet", channels=[4, 6]), seed=0).double()
    set_statistics(encoder, "local")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("paws_hpc.data.streams._EVALUATION_BATCH", 4)
        store = random_store(Path(folder) / "store", count=7, size=8, classes=2)
        results = []
        for records in (np.array([5, 0, 3, 6, 1, 2, 4]), np.array([4, 1])):
            images = EvaluationSet(store, records, CenterCropConfig(8, 8), store)
            results.append(forward_set(Representation(encoder), images, CPU))
    return results


def test_ranks_with_uneven_shares_or_none_embed_what_one_embeds(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {2: [embeddings], 3: [embeddings]})
    alone = embeddings(0, 1)
    assert [len(rows) for rows in alone] == [7, 2]
    for world in (2, 3):
        for result in results_of(embeddings, world, tmp_path):
            torch.testing.assert_close(result, alone, rtol=1e-12, atol=1e-12)
