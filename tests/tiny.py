"""A run that takes seconds: the digits at 16 pixels, a network of two blocks, one or two epochs of everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from paws_hpc.config import Config
from paws_hpc.data.config import AugmentConfig, CenterCropConfig, CropConfig, DataConfig, LabelsConfig, ViewsConfig
from paws_hpc.data.streams import PawsStream
from paws_hpc.engine.config import (
    ClassifierConfig,
    OptimizerConfig,
    PretrainConfig,
    SupportConfig,
    TrackingConfig,
)
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models import encoder
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.vit import VisionTransformer
from paws_hpc.packing import pack
from paws_hpc.stages.pretrain import make_training
from paws_hpc.store import ImageStore
from paws_hpc.trial import Trial
from tests.pictures import array_source

WALL_CLOCK = ("train/images_per_s", "train/data_wait")
"""Metrics that two equal runs do not share."""

STILL = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0, flip_probability=0.0)


def tiny_config(train: Path, test: Path, runs: Path) -> Config:
    """A run's config; tests change its fields."""
    crop = CropConfig(size=16, scale=[0.5, 1.0])
    return Config(
        name="run",
        runs=str(runs),
        device="cpu",
        data=DataConfig(train=str(train), test=str(test)),
        labels=LabelsConfig(per_class=4, validation_per_class=4),
        views=ViewsConfig(
            large=CropConfig(size=16, count=2, scale=[0.4, 1.0]),
            small=CropConfig(size=8, count=2, scale=[0.2, 0.5]),
            support_views=2,
            augment=STILL,
            evaluation=CenterCropConfig(resize=16, size=16),
        ),
        model=ModelConfig("small_resnet", channels=[8, 16]),
        optimizer=OptimizerConfig(name="sgd", start_lr=0.1, peak_lr=0.1, final_lr=0.01, warmup_epochs=0.0),
        pretrain=PretrainConfig(
            batch_size=128,
            execution="eager",
            epochs=1,
            support=SupportConfig(classes=10, images_per_class=4),
            log_every_steps=1,
            validate_every_epochs=1,
            checkpoint_every_steps=5,
        ),
        finetune=ClassifierConfig(sweep={"learning_rate": [0.02, 0.1], "epochs": [1, 2]}, batch_size=20, crop=crop),
        baseline=ClassifierConfig(sweep={"learning_rate": [0.1], "epochs": [2]}, batch_size=20, crop=crop),
        tracking=TrackingConfig(wandb="disabled"),
    )


def trial_at(learning_rate: float, epochs: int) -> Trial:
    """A point of the sweeps above."""
    return Trial({"learning_rate": learning_rate, "epochs": epochs})


def training_of(config: Config, folder: Path, *, labels_per_class: int = 4, device: str = "cpu") -> Pretraining:
    """Pre-training before its first step, on a store of ten classes and some of its labels."""
    store, support = ImageStore(folder), config.pretrain.support
    labelled = np.concatenate([np.flatnonzero(store.labels == label)[:labels_per_class] for label in range(10)])
    stream = PawsStream(
        store, labelled, views=config.views, batch_size=config.pretrain.batch_size, support_classes=support.classes,
        images_per_class=support.images_per_class, seed=config.seed, threads=1,
        accumulate_steps=config.pretrain.accumulate_steps, device=torch.device(device),
        compile_augmentation=config.pretrain.execution_on(device) != "eager",
    )  # fmt: skip
    return make_training(config, stream)


def random_store(folder: Path, *, count: int, size: int, classes: int) -> ImageStore:
    """Noise, packed; the same for the same arguments."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 1), np.uint8)
    return ImageStore(pack(array_source(images, "abcdefghij"[:classes]), folder).path)


@contextmanager
def small_vit(image_size: int = 16, patch_size: int = 4) -> Iterator[None]:
    """Let ``model.name=vit_s16`` build a network of two narrow blocks."""
    sizes = {"image_size": image_size, "patch_size": patch_size, "dim": 16, "blocks": 2, "heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoder._BACKBONES, "vit_s16", lambda config: VisionTransformer(**sizes))
        patch.setattr("paws_hpc.config.VIT_PATCH_SIZE", patch_size)
        yield
