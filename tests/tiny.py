"""A run that takes seconds: the digits at 16 pixels, a network of two blocks, one or two epochs of everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paws_hpc.config import Config
from paws_hpc.data.config import AugmentConfig, CenterCropConfig, CropConfig, DataConfig, LabelsConfig, ViewsConfig
from paws_hpc.engine.config import (
    ClassifierConfig,
    OptimizerConfig,
    PretrainConfig,
    SupportConfig,
    TrackingConfig,
)
from paws_hpc.models import encoder
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.vit import VisionTransformer
from paws_hpc.trial import Trial

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


@contextmanager
def small_vit(image_size: int = 16, patch_size: int = 4) -> Iterator[None]:
    """Let ``model.name=vit_s16`` build a network of two narrow blocks."""
    sizes = {"image_size": image_size, "patch_size": patch_size, "dim": 16, "blocks": 2, "heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoder._BACKBONES, "vit_s16", lambda config: VisionTransformer(**sizes))
        patch.setattr("paws_hpc.config.VIT_PATCH_SIZE", patch_size)
        yield
