"""Figures of training are those of training: counted right, taken without disturbing it, and absent where unknown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from paws_hpc.bench.__main__ import main
from paws_hpc.bench.augmenting import augmentation, per_image
from paws_hpc.bench.collectives import measure
from paws_hpc.bench.counting import forward_flops, host_waits, plain_images, rows_of, training_flops
from paws_hpc.bench.figures import Bar, Figure
from paws_hpc.bench.photographs import write_photographs
from paws_hpc.bench.plain_loader import (
    PlainLARS,
    data_loader_steps,
    loaders,
    open_images,
    use_torch_norm,
    written_out_loss,
)
from paws_hpc.bench.recipes import Scene, make_images, on_device, opened_stream
from paws_hpc.bench.rounds import Rates
from paws_hpc.bench.saving import saving
from paws_hpc.bench.speed import compiled_figures, part_figures, plain_bar, stopped_share
from paws_hpc.bench.timeline import LOSS_PARTS, PARTS, Timeline, marked
from paws_hpc.bench.training import (
    diagnostics_alone,
    loss_alone,
    matmul,
    on_device_steps,
    plain_resnet50,
    steps_from_store,
)
from paws_hpc.engine.optimizer import build_optimizer
from paws_hpc.models.encoder import build_encoder
from paws_hpc.models.norm import GlobalBatchNorm2d
from paws_hpc.objective.config import PawsConfig
from paws_hpc.objective.labels import smooth_labels
from paws_hpc.objective.paws import paws_loss
from paws_hpc.stages.pretrain import make_training

TINY = (
    "model.channels=[8,16]",
    "model.blocks=[1,1]",
    "views.large.size=16",
    "views.small={size: 8, count: 2}",
    "pretrain.batch_size=16",
    "pretrain.support.images_per_class=2",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    made = Scene("digits", "cpu", str(tmp_path_factory.mktemp("bench") / "digits"), TINY)
    make_images(made)
    return made


@pytest.fixture
def one_core() -> Iterator[None]:
    """Processes started meanwhile have one core: threads that wait for each other's turn would take minutes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def test_resnet50_costs_what_it_is_known_to_cost() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50().eval()
    assert forward_flops(model, 224) / 2 == pytest.approx(4.087e9, rel=1e-3)
    assert forward_flops(model, 96) / 2 == pytest.approx(0.751e9, rel=3e-3)  # 2 MMAC are the classifier's


def test_the_imagenet_recipe_on_a_gpu_is_the_papers() -> None:
    config = Scene("imagenet", "cuda", "nowhere").config()
    assert rows_of(config) == [(105, 224), (128, 224), (384, 96)]
    assert plain_images(config) == pytest.approx(4.74, abs=0.01)
    # Forward, and two products in backward; the heads come on top, and the first layer's images need no gradient.
    assert training_flops(config) == pytest.approx(3 * 2 * 64 * 19.4e9, rel=0.02)


def test_the_cifar_recipe_on_a_gpu_is_the_papers() -> None:
    config = Scene("cifar", "cuda", "nowhere").config()
    assert rows_of(config) == [(1280, 32), (512, 32), (1536, 18)]
    assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 28, 2)


def test_observing_a_step_changes_nothing_and_its_parts_make_the_whole(scene: Scene) -> None:
    config, weights, backward = scene.config(), [], torch.autograd.backward
    line = Timeline(CPU)
    with opened_stream(config) as stream:
        for observed in (False, True):
            training = make_training(config, stream)
            model = training.model
            for step in range(2):
                batch = on_device(stream.batch(step), CPU)
                assert torch.equal(
                    batch.micro_batches[0].large.images, stream.batch(step).micro_batches[0].large.images
                )
                if not observed:
                    training.step(batch)
                    continue
                with marked(training, line):
                    line.begin()
                    training.step(batch)
                    line.close()
            assert training.model is model
            weights.append(training.encoder.state_dict())
    assert torch.autograd.backward is backward
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for parts in line.read():
        assert set(parts) == set(PARTS)
        assert min(parts.values()) > 0
        assert parts["forward"] > parts["metrics"]
        assert parts["backward"] > parts["loss, backward"]


@pytest.mark.parametrize("begin", [on_device_steps, steps_from_store, data_loader_steps])
def test_training_says_what_it_did(begin: Callable[..., Any], scene: Scene) -> None:
    said = begin(asdict(scene), steps=2)()
    assert said["done"] == 2 * 16
    assert said["seconds"] > 0
    if begin is on_device_steps:
        assert list(said["parts_s"]) == [*PARTS, "step"]
        assert said["parts_s"]["step"] <= said["seconds"]
        assert said["host_waits"] is None
        assert said["graph_breaks"] is None
        assert 0.01 < said["peak_memory_gb"] < 100
    if begin is steps_from_store:
        assert 0 <= said["data_wait"] <= 1


def test_other_contenders_do_what_they_are_counted_for(scene: Scene) -> None:
    plain = asdict(scene)
    assert augmentation(plain, steps=2)()["done"] == 32
    assert per_image(plain, least_s=0.01)()["done"] >= 1
    assert loss_alone(plain, published=True, steps=3)()["done"] == 3
    assert diagnostics_alone(plain, steps=3)()["done"] == 3
    assert matmul("cpu", 100, steps=5)()["done"] == pytest.approx(5 * 2e-6)
    assert plain_resnet50("cpu", 1, steps=1, compiled=False)()["done"] == 1


def test_a_save_is_timed_and_weighed(scene: Scene, tmp_path: Path) -> None:
    work = saving(asdict(scene), str(tmp_path), steps=1)
    work()
    said = work()
    written = max(tmp_path.rglob("step-*.pt"))  # the first save may not be swept up yet: that happens after the second
    assert said["bytes"] == written.stat().st_size
    assert 0 < said["stall_s"] == said["seconds"]
    assert said["checkpoint_every_steps"] == 100
    found = {"stall_s": 2.0, "slowed_s": 1.0, "checkpoint_every_steps": 100, "step_s": 0.5}
    assert stopped_share(found) == pytest.approx(0.06)
    assert stopped_share(found | {"slowed_s": -1.0}) == pytest.approx(0.04)


@pytest.mark.usefixtures("one_core")
def test_collectives_of_two_ranks_move_the_bytes_that_they_must(scene: Scene) -> None:
    found = measure(scene, ranks=2, repeats=1)
    encoder, config = build_encoder(scene.config().model, seed=0), scene.config()
    assert (found["ranks"], found["backend"]) == (2, "gloo")
    kinds = {name.partition(",")[0]: kind for name, kind in found["kinds"].items()}
    assert all(kind["seconds"] > 0 and kind["calls"] > 0 for kind in kinds.values())
    supports = 10 * config.pretrain.support.images_per_class * config.views.support_views
    gathered = 2 * supports * encoder.output_dim * 4  # z and h; then the gradients of all ranks with respect to z
    assert kinds["gather of supports and their targets"]["bytes"] == gathered + gathered // 2
    assert kinds["gradients"]["bytes"] == 4 * sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.usefixtures("one_core")
def test_the_command_writes_what_it_prints_and_says_what_it_could_not_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["step", "--from-store", "--device", "cpu", "--rounds", "1", "--steps", "1"]
    assert main([*arguments, "--folder", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "digits-cpu-step.json").read_text())
    assert found["overrides"] == list(TINY)
    assert {"gpus", "versions", "commit", "processor"} <= set(found["machine"])
    assert found["sizes"]["unlabelled per step"] == 16
    group = found["groups"]["step"]
    assert [rates["failure"] for rates in group["rates"].values()] == [None] * 3
    assert {rates["unit"] for rates in group["rates"].values()} == {"images/s", "TFLOP/s"}
    figures = {figure["work"].strip(): figure for figure in group["figures"]}
    assert sum(figures[part]["share"] for part in PARTS) == pytest.approx(1, abs=0.1)
    assert figures["waits of the host per step"]["value"] is None
    assert figures["waits of the host per step"]["absent"] == "no GPU"
    assert figures["graph breaks"]["absent"] == "nothing was compiled"
    assert "not measured: no GPU" in printed
    assert {bar["reached"] for bar in group["bars"]} == {None}  # they are of other recipes, on a GPU
    assert all(bar["value"] > 0 or bar["unit"] == "%" for bar in group["bars"])
    assert "not measured here" in printed


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert main(["step", "--device", "cuda"]) == 1
        assert "there is no GPU" in capsys.readouterr().err
    assert main(["loss", "--device", "cpu", "model.nmae=x"]) == 1
    assert "nmae" in capsys.readouterr().err
    assert host_waits(lambda: None, CPU) is None


def test_the_baseline_sees_the_recipes_views(scene: Scene) -> None:
    config = scene.config()
    unlabelled, supports = loaders(config, scene, batches=2)
    assert len(unlabelled) == len(supports) == 2
    views, _ = next(iter(unlabelled))
    rows, classes = next(iter(supports))
    assert [tuple(view.shape) for view in views] == [(16, 3, 16, 16)] * 2 + [(16, 3, 8, 8)] * 2
    assert [tuple(view.shape) for view in rows] == [(20, 3, 16, 16)] * 2
    assert torch.unique(classes, return_counts=True)[1].tolist() == [2] * 10


def test_the_baseline_reads_the_files_that_were_packed(tmp_path: Path) -> None:
    write_photographs(tmp_path / "images", 4)
    images = open_images(Scene("imagenet", "cpu", str(tmp_path)))
    assert images.labels == [0, 1, 2, 3]
    assert images.load(2).mode == "RGB"


@pytest.mark.parametrize("small", [0, 2])
def test_the_baselines_loss_is_ours(small: int) -> None:
    torch.manual_seed(0)
    supports, n, classes = 12, 5, 3
    h, z = (torch.randn(supports + (2 + small) * n, 8) for _ in range(2))
    labels = smooth_labels(torch.arange(supports) % classes, classes, smoothing=0.1)
    how = PawsConfig()
    written = written_out_loss(h, z, labels, supports=supports, images=n, how=how)
    ours = paws_loss(
        z[supports:], z[:supports], h[supports : supports + 2 * n], h[:supports], labels, num_small_crops=small
    )
    torch.testing.assert_close(written, ours.total, rtol=1e-5, atol=1e-6)


def test_the_baseline_takes_our_first_step(scene: Scene) -> None:
    """With one learning rate its momentum is ours; only a changing one takes another path."""
    config = Scene("cifar", "cpu", "nowhere", ("model.depth=10",)).config()
    config.optimizer.weight_decay = 1e-2
    stepped = []
    for plain in (True, False):
        model = build_encoder(config.model, seed=0)
        if plain:
            use_torch_norm(model)
            kinds = {type(layer) for layer in model.modules()}
            assert nn.BatchNorm2d in kinds
            assert GlobalBatchNorm2d not in kinds
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32)
        model([images])[1].square().sum().backward()
        (PlainLARS(model, config) if plain else build_optimizer(model, config.optimizer)).step()
        stepped.append(model.state_dict())
    torch.testing.assert_close(stepped[0], stepped[1] | {k: v for k, v in stepped[0].items() if "tracked" in k})


def test_ratios_and_shares_are_taken_within_rounds() -> None:
    """The machine was half as fast in the second round."""
    bar = plain_bar(Rates("", [400.0, 200.0, 380.0]), Rates("", [2000.0, 1000.0, 2000.0]), 4.74, elsewhere=None)
    assert bar.value == pytest.approx(0.948)
    assert bar.reached
    assert plain_bar(Rates("", []), Rates("", [1.0]), 4.74, elsewhere=None).value is None
    slow = dict.fromkeys(PARTS, 2.0) | {"step": 2.0 * len(PARTS)}
    fast = dict.fromkeys(PARTS, 1.0) | {"step": 1.0 * len(PARTS)}
    whole, *parts = part_figures([{"parts_s": slow}, {"parts_s": fast}, {"parts_s": fast}])
    assert whole.value == pytest.approx(1000 * len(PARTS))
    assert [figure.share for figure in parts] == pytest.approx([1 / len(PARTS)] * len(PARTS))
    assert set(LOSS_PARTS) < set(PARTS)


def test_compiling_is_compared_within_rounds_and_says_how_often_it_left_the_graph() -> None:
    written = Rates("written", [100.0, 50.0, 100.0])
    compiled = Rates("compiled", [150.0, 75.0, 160.0], seen=[{"graph_breaks": {"a call": 2, "a branch": 1}}])
    gain, breaks = compiled_figures(compiled, written)
    assert gain.value == pytest.approx(1.5)
    assert breaks.value == 3
    (failed,) = compiled_figures(Rates("compiled", []), written)
    assert failed.absent == "one of them failed"


def test_a_bar_of_another_machine_is_neither_reached_nor_missed() -> None:
    assert Bar("", 0.95, "x", 0.9, elsewhere="one H100").reached is None
    with pytest.raises(AssertionError):
        Figure("waits", None, "")
