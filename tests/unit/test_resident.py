"""A small raw store lives on the GPU, where its crops are those that threads would cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paws_hpc.data.config import CropConfig, ViewsConfig
from paws_hpc.data.multicrop import ResidentCrops, is_resident
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.store import ImageStore
from tests.conftest import Stores

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def digits(digits_stores: Stores) -> ImageStore:
    return ImageStore(digits_stores.train)


@pytest.fixture(params=["on a CPU as if it were a GPU", pytest.param("on a GPU", marks=pytest.mark.needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a raw store is resident."""
    if request.param == "on a GPU":
        return CUDA

    def rule(store: ImageStore, _: torch.device) -> bool:
        return store.shape is not None

    for user in ("multicrop", "streams"):
        monkeypatch.setattr(f"paws_hpc.data.{user}.is_resident", rule)
    return CPU


def batch(store: ImageStore, device: torch.device, step: int) -> PawsBatch:
    labelled = np.concatenate([np.flatnonzero(store.labels == label)[:5] for label in range(len(store.classes))])
    views = ViewsConfig(CropConfig(32, 2, [0.14, 1.0]), CropConfig(16, 3, [0.05, 0.14]), support_views=2)
    stream = PawsStream(
        store, labelled, views=views, batch_size=24, support_classes=len(store.classes), images_per_class=4, seed=3,
        threads=2, device=device,
    )  # fmt: skip
    return stream.batch(step)


@pytest.fixture
def cut(digits: ImageStore) -> list[PawsBatch]:
    """Batches of two steps whose crops threads cut, made before any store is resident."""
    return [batch(digits, CPU, step) for step in (0, 70)]


def test_a_resident_store_gives_the_crops_of_threads(
    cut: list[PawsBatch], digits: ImageStore, device: torch.device
) -> None:
    """To the bit on a CPU; a GPU sums in another order."""
    for expected, step in zip(cut, (0, 70), strict=True):
        resident = batch(digits, device, step)
        if device == CUDA:
            busy = torch.randn(4096, 4096, device=CUDA)
            for _ in range(20):  # the crops queue behind this
                busy = busy @ busy / 64
        groups = zip(expected.micro_batches[0].crop_groups, resident.micro_batches[0].crop_groups, strict=True)
        for here, there in groups:
            assert isinstance(there, ResidentCrops)
            assert torch.equal(here.parameters, there.parameters)
            difference = (here.images.int() - there.on(device).cpu().int()).abs().max()
            assert difference <= (1 if device == CUDA else 0)


def test_a_raw_store_is_resident_where_it_takes_an_eighth_of_a_gpu_s_memory(
    digits: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = len(digits) * 16 * 16
    for total, expected in ((8 * nbytes, True), (8 * nbytes - 1, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, total=total: (0, total))
        assert is_resident(digits, CUDA) == expected
    assert not is_resident(digits, CPU)
