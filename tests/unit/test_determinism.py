"""``deterministic=true``: every kind of operation that recipes use runs under it, and results hang on no old memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paws_hpc.config import Config
from paws_hpc.data.config import AugmentConfig
from paws_hpc.data.devices import BufferPool
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.determinism import set_determinism
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.engine.probes import best, linear_probes, nearest_neighbours
from paws_hpc.models.config import ModelConfig
from paws_hpc.objective.config import RopawsConfig
from tests.conftest import Stores
from tests.finished import trained_run
from tests.tiny import small_vit, tiny_config, training_of

EVERYTHING = AugmentConfig(
    jitter_probability=0.8, grayscale_probability=0.3, blur_probability=0.5, flip_probability=0.5,
    solarize_probability=0.3, equalize_probability=0.3,
)  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_gpu)]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    set_determinism(True)
    yield
    set_determinism(False)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """New memory is NaN, and the memory of a batch is overwritten when it comes back to be used again."""
    take = BufferPool.take

    def overwritten(pool: BufferPool, *shape: int) -> Tensor:
        return take(pool, *shape).fill_(0xAA)

    def switch(on: bool) -> None:
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", on)
        monkeypatch.setattr(BufferPool, "take", overwritten if on else take)

    return switch


def steps(stores: Stores, device: str, change: Callable[[Config], None]) -> dict[str, Tensor]:
    """Weights after four steps with views that are made ahead."""
    config = tiny_config(stores.train, stores.test, stores.train)
    config.views.augment, config.pretrain.batch_size = EVERYTHING, 32
    config.model.prediction_head, config.objective.support_warmup_fraction = True, 0.5
    change(config)
    training = training_of(config, stores.train, device=device)
    with training.stream.prefetch(0, 4, training.dtype) as batches:
        for batch in batches:
            training.step(batch)
    return {name: value.cpu() for name, value in training.encoder.state_dict().items()}


def resnet(config: Config) -> None:
    config.model = ModelConfig("resnet18", projection_dim=16)


def wide(config: Config) -> None:
    config.model = ModelConfig("wide_resnet", width=1, depth=10, projection_dim=16)
    config.pretrain.batch_size, config.pretrain.ema = 8, 0.9


def vit(config: Config) -> None:
    config.model = ModelConfig("vit_s16", projection_dim=16)


def ropaws(config: Config) -> None:
    config.objective = RopawsConfig()


def micro_batches(config: Config) -> None:
    config.pretrain.accumulate_steps = 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [resnet, wide, vit, ropaws, micro_batches], ids=lambda kind: kind.__name__)
def test_steps_have_deterministic_kernels_and_read_no_memory_that_they_did_not_write(
    kind: Callable[[Config], None], device: str, digits_stores: Stores, poison: Callable[[bool], None]
) -> None:
    ends = []
    with small_vit():
        for poisoned in (False, True):
            poison(poisoned)
            ends.append(steps(digits_stores, device, kind))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_probes_have_deterministic_kernels(device: str) -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(40, device=device) % 4
    for probes in (linear_probes, nearest_neighbours):
        best(probes(features, labels, num_classes=4), features, labels)


def test_the_whole_chain_with_suncet_and_classifiers_runs(digits_stores: Stores, tmp_path: Path) -> None:
    _, run = trained_run(digits_stores, tmp_path, tuning_steps=2)
    assert run.result.exists()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    device: str, execution: str, digits_stores: Stores, tmp_path: Path
) -> None:
    """In bf16, with views made ahead; ``auto`` is compiled and a CUDA graph on a GPU."""
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    config.views.augment, config.pretrain.execution, config.pretrain.precision = EVERYTHING, execution, "bf16"

    def go_on(training: Pretraining, start: int, stop: int) -> Pretraining:
        with training.stream.prefetch(start, stop, training.dtype) as batches:
            for batch in batches:
                training.step(batch)
        return training

    def begun() -> Pretraining:
        return training_of(config, digits_stores.train, device=device)

    whole = go_on(begun(), 0, 10)
    with CheckpointFolder(tmp_path / "checkpoints", identity={}) as folder:
        folder.save(5, go_on(begun(), 0, 5).state_dict())
        folder.wait()
        resumed = begun()
        assert folder.resume(resumed.load_state_dict, resumed.device) == 5
    go_on(resumed, 5, 10)
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(value, resumed.encoder.state_dict()[name]), name


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    values = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"put_.*deterministic"):
        values.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
