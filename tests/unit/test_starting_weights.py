"""Training starts from the weights in a file, whoever wrote it, or says what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from paws_hpc.config import Config
from paws_hpc.engine.starting_weights import load_backbone
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import Encoder, build_classifier, build_encoder
from paws_hpc.stages import finetune, prepare, pretrain
from paws_hpc.stages.context import StageContext, TorchContext
from paws_hpc.stages.networks import load_pretrained, start_identity, starting_encoder
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder
from tests.conftest import Stores
from tests.tiny import tiny_config, trial_at

CPU = torch.device("cpu")
RESNET = ModelConfig(name="resnet18", prediction_head=True)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    """torchvision's weights with statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = torchvision.models.resnet18(weights=None)
        network(torch.randn(4, 3, 32, 32))
    return dict(network.state_dict())


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files were before batches were counted."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    """As training scripts save: the distributed module beside other things."""
    return {"epoch": 90, "arch": "resnet18", "state_dict": {f"module.{name}": value for name, value in state.items()}}


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "plain.pth": torch.save,
    "older.pth": lambda state, path: torch.save(older(state), path, _use_new_zipfile_serialization=False),
    "checkpoint.pt": lambda state, path: torch.save(wrapped(state), path),
    "model.safetensors": save_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_theirs_gives_the_backbone_its_weights_and_leaves_the_heads_random(
    theirs: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    WRITERS[name](theirs, tmp_path / name)
    encoder = build_encoder(RESNET, seed=3)
    heads = {key: value.clone() for key, value in encoder.state_dict().items() if not key.startswith("backbone.")}
    load_backbone(encoder, tmp_path / name)
    for key, value in encoder.backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, theirs[key]), key
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in heads.items())


@pytest.mark.parametrize("kind", ["checkpoint", "averaged checkpoint", "fine-tuned"])
def test_files_of_our_own_are_read(tmp_path: Path, kind: str) -> None:
    source, last = build_encoder(RESNET, seed=1), build_encoder(RESNET, seed=9)
    content = {
        "checkpoint": {"encoder": source.state_dict(), "average": None, "validated": 3},
        "averaged checkpoint": {"encoder": last.state_dict(), "average": source.state_dict(), "validated": 3},
        "fine-tuned": build_classifier(source, 4).state_dict(),
    }[kind]
    torch.save(content, tmp_path / "own.pt")
    encoder = build_encoder(RESNET, seed=2)
    load_backbone(encoder, tmp_path / "own.pt")
    expected = source.backbone.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.backbone.state_dict().items())


def test_all_that_does_not_fit_is_listed_and_nothing_is_loaded(theirs: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = dict(theirs) | {"layer5.conv.weight": torch.zeros(2), "bn1.weight": torch.zeros(3)}
    del wrong["layer1.0.conv1.weight"]
    torch.save(wrong, tmp_path / "wrong.pth")
    encoder = build_encoder(RESNET, seed=3)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 missing: layer1\.0\.conv1\.weight") as caught:
        load_backbone(encoder, tmp_path / "wrong.pth")
    assert "1 unexpected: layer5.conv.weight" in str(caught.value)
    assert r"bn1.weight (3,) instead of (64,)" in str(caught.value)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "evil.pt": (lambda path: torch.save({"conv1.weight": Evil()}, path), "could execute code"),
    "text.pt": (lambda path: path.write_text("not weights"), "text.pt"),
    "cut.safetensors": (lambda path: path.write_bytes(b"\xff" * 20), "damaged or no file of weights"),
    "other.pt": (lambda path: torch.save({"optimizer": {}, "step": 3}, path), "there is optimizer, step"),
    "tensor.pt": (lambda path: torch.save(torch.zeros(1), path), "there is a Tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_without_weights_is_an_error_that_names_it(tmp_path: Path, name: str, capsys: Any) -> None:
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_backbone(build_encoder(RESNET, seed=0), tmp_path / name)
    assert "executed" not in capsys.readouterr().out


@pytest.fixture
def config(digits_stores: Stores, tmp_path: Path) -> Config:
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    torch.save(build_encoder(config.model, seed=77).state_dict(), tmp_path / "start.pt")
    config.model.init = str(tmp_path / "start.pt")
    return config


def test_a_run_starts_there_and_its_baseline_too(config: Config, tmp_path: Path) -> None:
    run, trial = RunFolder(tmp_path / "run"), trial_at(1e-9, 2)
    config.optimizer.start_lr = config.optimizer.peak_lr = config.optimizer.final_lr = 1e-9  # nothing moves
    config.baseline.sweep["learning_rate"] = [1e-9]
    prepare.run(StageContext(config, run))
    pretrain.run(TorchContext(config, run))
    finetune.run(TorchContext(config, run, "baseline", trial))
    data = open_data(config)
    encoder, _ = load_pretrained(run, data, CPU)
    expected = build_encoder(config.model, seed=77).backbone.get_parameter("stem.weight")
    torch.testing.assert_close(encoder.backbone.get_parameter("stem.weight"), expected, rtol=1e-4, atol=1e-6)
    best = torch.load(run.trial("baseline", trial) / "best.pt", weights_only=True)
    torch.testing.assert_close(best["backbone.stem.weight"], expected.detach(), rtol=1e-4, atol=1e-6)
    torch.save(build_encoder(config.model, seed=78).state_dict(), tmp_path / "start.pt")
    with pytest.raises(ValueError, match=r"model\.init\.xxh3_128"):  # another file of the same name is another run
        load_pretrained(run, open_data(config), CPU)


def test_a_file_that_is_missing_or_does_not_fit_ends_the_chain_at_its_first_stage(
    config: Config, tmp_path: Path
) -> None:
    config.model.channels = [8, 12]
    with pytest.raises(ValueError, match=r"start.pt does not fit .*SmallResNet.* of another shape: "):
        prepare.run(StageContext(config, RunFolder(tmp_path / "run")))
    (tmp_path / "start.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.init=.*start.pt: there is no such file"):
        prepare.run(StageContext(config, RunFolder(tmp_path / "run")))


def test_without_a_file_nothing_is_added_to_the_identity() -> None:
    config = Config()
    config.model.name = "small_resnet"
    assert start_identity(config) == {}
    encoder: Encoder = starting_encoder(config)
    same = build_encoder(config.model, seed=config.seed)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in encoder.state_dict().items())
