"""Every recipe trains: two steps with its own network, widths, crops, losses and optimiser, on a few small images."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from paws_hpc.cluster.compose import CONF, compose_run
from paws_hpc.config import Config
from paws_hpc.data.config import AugmentConfig
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.packing import ImageFolder, pack
from paws_hpc.stages import prepare
from paws_hpc.stages.context import StageContext
from paws_hpc.stages.pretrain import make_training, open_stream
from paws_hpc.stages.run_data import open_data
from paws_hpc.stages.run_folder import RunFolder
from tests.conftest import Stores
from tests.pictures import array_source, write_noise

CPU = torch.device("cpu")
CLASSES, PER_CLASS = 3, 6
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OTHERS: dict[str, tuple[str, ...]] = {
    "imagenet_10pct": ("model=resnet50_2x", "model=resnet50_4x"),
    "cifar10_4000": ("data=cifar100", "data=fashion_mnist", "data=digits"),
}
RECIPES = [
    *((experiment,) for experiment in EXPERIMENTS),
    *((experiment, other) for experiment, others in OTHERS.items() for other in others),
]
SHAPES = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "fashion_mnist": (28, 28, 1), "digits": (32, 32, 1)}
SMALL = (
    *(f"data.classes={CLASSES}", "data.threads=1", "device=cpu", "tracking.wandb=disabled"),
    *("labels.file=null", "labels.all=false", "labels.validation_file=null", "labels.per_class=3"),
    "labels.validation_per_class=1",
    *("pretrain.batch_size=2", "pretrain.support.images_per_class=2"),
)
SMALL_PHOTOGRAPHS = (
    *("views.large.size=32", "views.small.size=16", "views.evaluation.resize=36", "views.evaluation.size=32"),
    *("finetune.crop.size=32", "baseline.crop.size=32", "pretrain.support.images_per_class=1"),
)


def pack_images(data: str, folder: Path) -> None:
    """Noise, as raw pixels, or as JPEG files of unlike sizes where the data set has those."""
    if data in SHAPES:
        shape = (CLASSES * PER_CLASS, *SHAPES[data])
        pack(array_source(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), "abc"), folder)
    else:
        pack(ImageFolder(write_noise(folder.parent / f"{data}-files", CLASSES * PER_CLASS, classes="abc")), folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store for each data set of the recipes."""
    folder = tmp_path_factory.mktemp("stores")
    for data in (*SHAPES, "imagenet", "own_images"):
        pack_images(data, folder / data)
    return folder


def small(recipe: tuple[str, ...], stores: Path, runs: Path) -> Config:
    """A recipe on the store of its data set, with few and small images of few classes."""
    named = [f"experiment={recipe[0]}", *recipe[1:]]
    data = compose_run(named)[0].data.name
    sizes = (*SMALL, *(SMALL_PHOTOGRAPHS if data == "imagenet" else ()))
    if recipe[0] != "cifar10_4000":  # whose number of classes follows that of the data set
        sizes += (f"pretrain.support.classes={CLASSES}",)
    places = (f"data.train={stores / data}", f"data.test={stores / data}", "data.allow_overlap=true")
    return compose_run([*named, *sizes, *places, f"runs={runs}", "name=run"])[0]


def freeze_the_widest(training: Pretraining) -> None:
    """Leave the last two stages and the heads of ResNet-50 (4x) as they are.

    All of it in training takes 11 GB, most of that copies that the optimiser makes of each weight. The passes still go
    through every layer at its own width, backward to the first.
    """
    for name, parameter in training.encoder.named_parameters():
        parameter.requires_grad_(
            name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1", "backbone.layer2"))
        )


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_every_recipe_trains_two_steps_with_its_own_network_crops_and_losses(
    recipe: tuple[str, ...], stores: Path, tmp_path: Path
) -> None:
    config = small(recipe, stores, tmp_path)
    prepare.run(StageContext(config, RunFolder(tmp_path / "run")))
    data = open_data(config)
    stream = open_stream(data, CPU)
    training = make_training(config, stream)
    if "model=resnet50_4x" in recipe:
        freeze_the_widest(training)
    first = next(p for p in training.encoder.parameters() if p.requires_grad)
    before = first.detach().clone()
    for step in range(2):
        batch = stream.batch(step)
        metrics = training.step(batch)
        kinds = [images.shape for images in stream.augment(batch.micro_batches[0], CPU, torch.float32)]
        assert len({shape[-1] for shape in kinds}) == 2, "large and small crops"
        assert all(torch.isfinite(value) for value in metrics.values()), metrics
        assert metrics["train/loss_me_max"] < 0
        assert metrics["train/grad_norm"] > 0
        assert ("train/loss_support_nce" in metrics) == (config.objective.support_warmup_fraction > 0)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, before)


def test_the_cifar_recipe_follows_the_data_set_or_names_what_does_not_fit(tmp_path: Path) -> None:
    """The number of classes follows; labels that a data set does not have are an error that names the field."""
    asked = [compose_run(["experiment=cifar10_4000", f"data={data}"])[0] for data in ("cifar10", "cifar100")]
    assert [config.pretrain.support.classes for config in asked] == [10, 100]
    grey = compose_run(["experiment=cifar10_4000", "views=grey_images"])[0]
    assert {grey.views.large.size, grey.finetune.crop.size, grey.baseline.crop.size} == {28}
    pack_images("digits", tmp_path / "digits")
    places = [f"data.train={tmp_path / 'digits'}", f"data.test={tmp_path / 'digits'}", f"runs={tmp_path}", "name=run"]
    digits = ["experiment=cifar10_4000", "data=digits", *places]
    for changes, message in (
        ([], "labels.per_class=400 images of each class"),
        (["labels.per_class=4"], "pretrain.support.images_per_class=64, but labels.per_class=4"),
        (["labels.per_class=2", "labels.validation_per_class=9", "pretrain.support.images_per_class=2"],
         "labels.validation_per_class=9 images of each class"),
        (["labels.per_class=2", "labels.validation_per_class=1", "pretrain.support.images_per_class=2"],
         f"data.classes=10, but .* has {CLASSES} classes. Set data.classes={CLASSES}"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prepare.run(StageContext(compose_run([*digits, *changes])[0], RunFolder(tmp_path / "run")))


def test_the_cifar_recipe_is_one_line_for_digits_too(digits_stores: Stores, tmp_path: Path) -> None:
    """On all of scikit-learn's digits labels suffice, and the rest is the recipe."""
    places = [f"data.train={digits_stores.train}", f"data.test={digits_stores.test}", f"runs={tmp_path}", "name=run"]
    config = compose_run(["experiment=digits_wrn", *places])[0]
    prepare.run(StageContext(config, RunFolder(tmp_path / "run")))
    recipe = compose_run(["experiment=cifar10_4000"])[0]
    assert config.pretrain.support == replace(recipe.pretrain.support, images_per_class=40)
    for part in ("views", "model", "optimizer", "objective", "finetune", "baseline", "suncet"):
        assert getattr(config, part) == getattr(recipe, part), part


@pytest.mark.parametrize("changes", [(), ("views=cifar_reference", "views.augment.blur_probability=0.25")])
@pytest.mark.parametrize("experiment", ["cifar10_4000", "digits_wrn", "fashion_mnist_4000"])
def test_the_cifar_baseline_has_the_colours_of_pre_training(experiment: str, changes: tuple[str, ...]) -> None:
    """All of them: OmegaConf cannot interpolate a whole dataclass, so the recipe lists the fields."""
    config, _ = compose_run([f"experiment={experiment}", *changes])
    assert config.baseline.augment == config.views.augment
    listed = OmegaConf.load(CONF / "experiment" / "cifar10_4000.yaml").baseline.augment
    assert set(listed) == {field.name for field in fields(AugmentConfig)}
