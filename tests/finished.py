"""Finished runs: a tiny one that was trained, and the folder of one with any network, which was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from paws_hpc.cluster.chain import Chain
from paws_hpc.cluster.frozen import freeze
from paws_hpc.config import Config, sweep_config
from paws_hpc.engine.checkpoint import save_tensors
from paws_hpc.files import write_record
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_classifier, build_encoder
from paws_hpc.stages import finetune, prepare, pretrain, selection
from paws_hpc.stages.context import StageContext, TorchContext
from paws_hpc.stages.networks import checkpoint_folder
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder, mark_done
from tests.conftest import Stores
from tests.tiny import tiny_config, trial_at

CPU = torch.device("cpu")


def begin(config: Config) -> RunFolder:
    """What the launcher does first."""
    run = RunFolder(Path(config.runs) / config.name)
    Chain.begin(run, config.name)
    freeze(config, run.config)
    prepare.run(StageContext(config, run))
    return run


def trained_run(stores: Stores, runs: Path, *, tuning_steps: int = 0) -> tuple[Config, RunFolder]:
    """The whole chain but its report, in seconds."""
    config = tiny_config(stores.train, stores.test, runs)
    config.suncet.steps = tuning_steps
    run = begin(config)
    pretrain.run(TorchContext(config, run))
    for sweep in ("finetune", "baseline"):
        for trial in sweep_config(config, sweep).trials():
            finetune.run(TorchContext(config, run, sweep, trial))
    selection.run(TorchContext(config, run))
    return config, run


def made_up_run(stores: Stores, runs: Path, model: ModelConfig) -> tuple[Config, RunFolder]:
    """A run's folder with networks that nobody trained: no value is the same twice, running statistics included."""
    config = tiny_config(stores.train, stores.test, runs)
    config.model, config.views.evaluation.resize, config.views.evaluation.size = model, 40, 32
    run, data = begin(config), open_data(config)
    encoder = build_encoder(model, seed=1)
    disturb(encoder, seed=2)
    with checkpoint_folder(run, data) as checkpoints:
        checkpoints.save(7, {"encoder": encoder.state_dict()})
        checkpoints.wait()
    mark_done(run.pretrain, steps=7)
    classifier = build_classifier(encoder, len(data.classes))
    disturb(classifier, seed=3)
    trial = trial_at(0.1, 2)
    save_tensors(run.trial("finetune", trial) / "best.pt", classifier.state_dict())
    write_record(run.selected, {"trial": trial.name, **trial.values})
    return config, run


def refusal(main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command refuses its arguments."""
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1, message
    return message


def disturb(network: nn.Module, *, seed: int) -> None:
    """Move everything a little, so that nothing that is lost or swapped goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.add_(0.3 * noise if value.ndim == 1 else 0.02 * (noise - 0.5))
