"""The linear probe is scikit-learn's logistic regression, k-NN its classifier with the same weights; both are chosen by
validation alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from paws_hpc.engine import probes
from paws_hpc.engine.probes import best, cross_validated, linear_probes, nearest_neighbours


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).double(), torch.from_numpy(labels)


def test_the_linear_probe_is_logistic_regression(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = digits
    monkeypatch.setattr(probes, "PENALTIES", (0.01,))
    train, held_out = slice(0, 200), slice(200, 600)
    probe = best(linear_probes(features[train], labels[train], num_classes=10), features[held_out], labels[held_out])
    assert probe.setting == {"penalty": 0.01}
    standard = (features - features[train].mean(0)) / features[train].std(0, unbiased=False).clamp(min=1e-12)
    standard[:, features[train].std(0) == 0] = (features - features[train].mean(0))[:, features[train].std(0) == 0]
    # scikit-learn minimises C * sum of losses + |W|^2 / 2, which is ours for C = 1 / (M * penalty).
    theirs = LogisticRegression(C=1 / (200 * 0.01), tol=1e-8, max_iter=5000).fit(standard[train], labels[train])
    ours = probe.predict(features[held_out]).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(standard[held_out]), atol=2e-3)
    assert probe.validation_accuracy == pytest.approx(np.mean(ours.argmax(1) == labels[held_out].numpy()))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_k_nearest_neighbours_vote_as_in_scikit_learn(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    features, labels = digits
    monkeypatch.setattr(probes, "NEIGHBOURS", (k,))
    ((_, predict),) = nearest_neighbours(features[:300], labels[:300], num_classes=10)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(features[:300], labels[:300])
    votes = predict(features[700:])
    np.testing.assert_allclose(
        (votes / votes.sum(1, keepdim=True)).numpy(), theirs.predict_proba(features[700:]), atol=1e-9
    )


def test_settings_are_chosen_by_validation_and_many_neighbours_need_many_labels(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    features, labels = digits
    few = slice(0, 40)
    scores = {}
    for fit in (linear_probes, nearest_neighbours):
        probe = best(fit(features[few], labels[few], num_classes=10), features[40:400], labels[40:400])
        accuracy = (probe.predict(features[40:400]).argmax(1) == labels[40:400]).double().mean().item()
        assert probe.validation_accuracy == accuracy
        assert probe.as_dict() == probe.setting | {"validation_accuracy": accuracy}
        scores[fit.__name__] = probe
    assert scores["nearest_neighbours"].setting["k"] <= 20  # 50 could not vote among 40
    # Other validation labels would have chosen otherwise or scored lower: the choice follows them.
    shifted = (labels[40:400] + 1) % 10
    misled = best(nearest_neighbours(features[few], labels[few], num_classes=10), features[40:400], shifted)
    assert misled.validation_accuracy < 0.2


def test_without_validation_images_the_labels_choose_each_while_its_fold_is_held_out(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = digits[0][:120], digits[1][:120]
    monkeypatch.setattr(probes, "NEIGHBOURS", (1, 90, 100))
    masks = [torch.arange(120) % 4 == fold for fold in range(4)]
    probe = cross_validated(nearest_neighbours, features, labels, masks, num_classes=10)
    theirs = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    right = sum(theirs.fit(features[~m], labels[~m]).score(features[m], labels[m]) * int(m.sum()) for m in masks)
    assert probe.setting == {"k": 1}
    assert probe.validation_accuracy == pytest.approx(right / 120)
    whole = {setting["k"]: predict for setting, predict in nearest_neighbours(features, labels, num_classes=10)}
    assert torch.equal(probe.predict(digits[0][120:200]), whole[1](digits[0][120:200])), "it is fitted to all of them"
