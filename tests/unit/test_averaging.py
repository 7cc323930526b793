"""The average of the weights is what its equation says, resumes to the bit, and is what is scored and handed on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from paws_hpc.engine.averaging import WeightAverage
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.engine.tracking import read_rows
from paws_hpc.stages import prepare, pretrain
from paws_hpc.stages.context import StageContext, TorchContext
from paws_hpc.stages.networks import load_pretrained
from paws_hpc.stages.probing import validation_accuracy
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder
from tests.conftest import Stores
from tests.tiny import tiny_config
from tests.unit.test_step import prepared

CPU = torch.device("cpu")


def test_it_is_the_weighted_mean_of_the_weights_and_statistics_after_each_step() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average, decay, states = WeightAverage(network, 0.9), 0.9, []
    for step in range(7):
        network(torch.randn(5, 3, dtype=torch.float64))  # moves the running statistics
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(network, step)
        states.append({name: value.clone().numpy() for name, value in network.state_dict().items()})
    shares = decay ** np.arange(6, -1, -1.0)
    for name, value in average.module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            expected = sum(share * state[name] for share, state in zip(shares, states, strict=True)) / shares.sum()
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-13, atol=1e-14)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def whole_state(training: Pretraining) -> dict[str, Tensor]:
    average = {f"average.{name}": value for name, value in training.result.state_dict().items()}
    return training.encoder.state_dict() | average


def test_training_resumed_from_a_checkpoint_has_the_same_average_to_the_bit(
    digits_stores: Stores, tmp_path: Path
) -> None:
    whole, folder = prepared(digits_stores, ema=0.9), CheckpointFolder(tmp_path, identity={})
    for step in range(6):
        whole.step(whole.stream.batch(step))
        if step == 2:
            folder.save(3, whole.state_dict())
    resumed, checkpoint = prepared(digits_stores, ema=0.9), folder.newest(CPU)
    assert checkpoint is not None
    resumed.load_state_dict(checkpoint.state)
    for step in range(checkpoint.step, 6):
        resumed.step(resumed.stream.batch(step))
    expected, found = whole_state(whole), whole_state(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(expected["backbone.stem.weight"], expected["average.backbone.stem.weight"])


def test_an_average_changes_nothing_of_what_is_trained(digits_stores: Stores) -> None:
    ends = []
    for ema in (None, 0.9):
        training = prepared(digits_stores, ema=ema)
        for step in range(4):
            training.step(training.stream.batch(step))
        state = training.state_dict()
        assert (state["average"] is None) == (ema is None)
        ends.append(state["encoder"] | state["optimizer"]["state"])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_validation_and_all_stages_after_pre_training_use_the_average(digits_stores: Stores, tmp_path: Path) -> None:
    config, run = tiny_config(digits_stores.train, digits_stores.test, tmp_path), RunFolder(tmp_path / "run")
    config.pretrain.ema = 0.9
    prepare.run(StageContext(config, run))
    pretrain.run(TorchContext(config, run))
    data = open_data(config)
    encoder, _ = load_pretrained(run, data, CPU)
    newest = max(run.checkpoints.glob("*.pt"))
    state = torch.load(newest, weights_only=True)
    assert all(torch.equal(value, state["average"][name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(state["encoder"]["backbone.stem.weight"], state["average"]["backbone.stem.weight"])
    (logged,) = [row for row in read_rows(run.pretrain / "metrics.jsonl") if "val/paws_nn_top1" in row]
    assert logged["val/paws_nn_top1"] == validation_accuracy(encoder, data, CPU)
