"""The map of test images: groups stay groups, and where there can be no map a reason stands in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from paws_hpc.stages.gallery import plane, representation_map
from paws_hpc.stages.probing import NearestNeighbours


def test_groups_of_unit_vectors_stay_groups_in_the_plane() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(4, 16))
    labels = np.repeat(np.arange(4), 15)
    vectors = centres[labels] + 0.3 * random.normal(size=(60, 16))
    points = plane(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert points.shape == (60, 2)
    assert KNeighborsClassifier(3).fit(points[::2], labels[::2]).score(points[1::2], labels[1::2]) == 1.0


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        (torch.ones(20, 8), "same representation"),
        (torch.eye(4), "too few"),
        (torch.full((20, 8), torch.nan), "not finite"),
    ],
)
def test_without_a_map_a_reason(vectors: torch.Tensor, reason: str) -> None:
    labels = torch.zeros(len(vectors), dtype=torch.int64)
    nearest = NearestNeighbours(torch.ones(len(vectors), 2), vectors, vectors[:2])
    assert reason in representation_map(nearest, labels, labels)["missing"]
