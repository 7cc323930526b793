"""Exported networks compute in other libraries what they compute here, and say what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paws_hpc import export
from paws_hpc.config import Config
from paws_hpc.deploy import load_exported
from paws_hpc.files import file_hash
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_classifier, build_encoder
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.finished import begin, made_up_run, refusal, trained_run
from tests.tiny import small_vit, tiny_config

HEADS = {"none": "features", "projection": "representation", "classifier": "logits"}
Run = tuple[Config, RunFolder]


@pytest.fixture(scope="module")
def small(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained_run(digits_stores, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def resnet50(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = ModelConfig("resnet50", projection_hidden_dim=96, projection_dim=64)  # its head alone is small
    return made_up_run(digits_stores, tmp_path_factory.mktemp("resnet50"), model)


@pytest.fixture(scope="module")
def wide(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made_up_run(digits_stores, tmp_path_factory.mktemp("wide"), ModelConfig("wide_resnet", depth=10))


@pytest.fixture(scope="module")
def vit(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with small_vit(image_size=32, patch_size=8):
        yield made_up_run(digits_stores, tmp_path_factory.mktemp("vit"), ModelConfig("vit_s16"))


def images(config: Config, count: int) -> Tensor:
    side = config.views.evaluation.size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def weights_file(run: RunFolder, head: str) -> Path:
    if head == "classifier":
        return run.path / "finetune" / json.loads(run.selected.read_text())["trial"] / "best.pt"
    (checkpoint,) = run.checkpoints.glob(f"step-{json.loads((run.pretrain / 'DONE').read_text())['steps']:08d}.pt")
    return checkpoint


def expected(made: Run, head: str, inputs: Tensor) -> Tensor:
    """What the run's own network computes, straight from its weights."""
    config, run = made
    encoder = build_encoder(config.model, seed=0)
    state = torch.load(weights_file(run, head), weights_only=True)
    network: nn.Module = build_classifier(encoder, 10) if head == "classifier" else encoder
    network.load_state_dict(state if head == "classifier" else state["encoder"])
    network.eval()
    with torch.no_grad():
        if head == "classifier":
            return network(inputs)
        return encoder.backbone(inputs) if head == "none" else encoder([inputs])[0]


def exported(made: Run, capsys: pytest.CaptureFixture[str], *options: str) -> list[Path]:
    assert export.main([str(made[1].path), *options]) == 0, capsys.readouterr().err
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


def check_card(card: dict[str, Any], made: Run, format: str, head: str, outputs: Tensor) -> None:
    config, run = made
    train = ImageStore(config.data.train)
    assert (card["format"], card["head"], card["output"]) == (format, head, HEADS[head])
    assert card["output_dim"] == outputs.shape[1]
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert (card["image"]["mean"], card["image"]["std"]) == (list(train.mean), list(train.std))
    crop = config.views.evaluation
    assert (card["image"]["resize"], card["image"]["size"]) == (crop.resize, crop.size)
    assert card["model"] == asdict(config.model)
    told, weights = card["provenance"], weights_file(run, head)
    assert (told["run"], told["seed"]) == (config.name, config.seed)
    assert told["commit"] == json.loads(run.chain.read_text())["commit"]
    assert run.path / told["weights"] == weights
    assert told["xxh3_128"] == file_hash(weights)
    assert told["digests"]["train"] == train.digest


@pytest.mark.parametrize(
    ("library", "head"),
    [("torchvision", "none"), ("torchvision", "projection"), ("timm", "none"), ("timm", "classifier")],
)
def test_a_resnet50_loads_strictly_into_the_library_and_computes_the_same(
    resnet50: Run, library: str, head: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, sidecar = exported(resnet50, capsys, "--format", library, "--head", head)
    card = json.loads(sidecar.read_text())
    assert any("strict=True" in line for line in card["usage"])
    monkeypatch.chdir(weights.parent)
    made: dict[str, Any] = {}
    exec("\n".join(card["usage"]), made)  # what the card tells its reader to do
    assert type(made["model"]).__module__.startswith(library)
    assert made["model"].layer1[0].bn1.running_var.std() > 0.01, "there is something to lose"
    inputs = images(resnet50[0], 3)
    outputs = expected(resnet50, head, inputs)
    with torch.no_grad():
        torch.testing.assert_close(made["model"](inputs), outputs, rtol=1e-5, atol=1e-5 * outputs.abs().max().item())
    assert outputs.std() > 1e-3
    check_card(card, resnet50, library, head, outputs)
    assert card["file_xxh3_128"] == file_hash(weights)
    if library == "timm":
        assert list(made["timm"].data.resolve_data_config(card["pretrained_cfg"])["mean"]) == card["image"]["mean"]
        assert card["num_classes"] == (10 if head == "classifier" else 0)


@pytest.mark.parametrize(("which", "head"), [("small", "none"), ("vit", "projection"), ("wide", "classifier")])
def test_onnx_computes_the_same_for_any_number_of_images(
    which: str, head: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made: Run = request.getfixturevalue(which)
    (path,) = exported(made, capsys, "--format", "onnx", "--head", head)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 5):
        inputs = images(made[0], count)
        outputs = expected(made, head, inputs)
        (found,) = session.run([HEADS[head]], {"images": inputs.numpy()})
        np.testing.assert_allclose(found, outputs, rtol=1e-4, atol=1e-5 * outputs.abs().max().item())
    texts = session.get_modelmeta().custom_metadata_map
    card = {name: value if name in ("format", "head", "output") else json.loads(value) for name, value in texts.items()}
    check_card(card, made, "onnx", head, outputs)
    content = path.read_bytes()
    for secret in (str(made[1].path), torch.__file__.rpartition("/")[0], export.__file__.rpartition("/")[0]):
        assert secret.encode() not in content, "nobody else's business"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("which", ["small", "wide", "vit"])
def test_safetensors_hold_the_runs_own_weights_and_load_back(
    which: str, head: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made: Run = request.getfixturevalue(which)
    (path,) = exported(made, capsys, "--format", "safetensors", "--head", head)
    state = torch.load(weights_file(made[1], head), weights_only=True)
    state = state if head == "classifier" else state["encoder"]
    for name, value in load_file(path).items():
        assert torch.equal(value, state[name]), name
    module, card = load_exported(path)
    inputs = images(made[0], 4)
    with torch.no_grad():
        assert torch.equal(module(inputs), expected(made, head, inputs))
    check_card(card, made, "safetensors", head, expected(made, head, inputs))
    if which == "small":
        scored = json.loads(made[1].result.read_text())["test"]
        for method in ("paws_nn", "fine_tuned", "baseline"):
            assert card["provenance"]["test_top1"][method] == scored[method]["top1"]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_network_that_the_library_does_not_have_names_the_formats_that_work(
    small: Run, library: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refusal(export.main, capsys, str(small[1].path), "--format", library, "--to", str(tmp_path / "w.pt"))
    assert "small_resnet" in message
    assert "--format safetensors or onnx" in message
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_yet_is_one_line(
    digits_stores: Stores, small: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refused(*arguments: str) -> str:
        return refusal(export.main, capsys, *arguments)

    begin(tiny_config(digits_stores.train, digits_stores.test, tmp_path))
    assert "run the stage 'pretrain'" in refused("run", "--runs", str(tmp_path), "--format", "onnx")
    unfinished = refused("run", "--runs", str(tmp_path), "--format", "onnx", "--head", "classifier")
    assert "Run the stage 'selection'" in unfinished
    assert "Did you mean run?" in refused("rum", "--runs", str(tmp_path), "--format", "onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install onnx onnxscript" in refused(str(small[1].path), "--format", "onnx")
    with pytest.raises(SystemExit, match="2"):
        export.main([str(small[1].path), "--format", "pickle"])
    assert "invalid choice: 'pickle'" in capsys.readouterr().err


def test_a_file_that_is_no_export_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not an export of paws_hpc"):
        load_exported(tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        load_exported(tmp_path / "damaged.safetensors")


def test_a_file_that_is_there_is_not_overwritten(
    small: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "thesis.safetensors"
    path.write_text("mine")
    message = refusal(export.main, capsys, str(small[1].path), "--format", "safetensors", "--to", str(path))
    assert f"{path} is there already" in message
    assert path.read_text() == "mine"
