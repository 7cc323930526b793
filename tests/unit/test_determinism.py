"""``deterministic=true``: every kind of operation that recipes use runs under it, and no result hangs on chance."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paws_hpc.config import Config
from paws_hpc.data.config import AugmentConfig
from paws_hpc.engine import probes
from paws_hpc.engine.config import OptimizerConfig, SuncetConfig
from paws_hpc.engine.determinism import set_determinism
from paws_hpc.engine.evaluate import paws_nn
from paws_hpc.models.config import ModelConfig
from paws_hpc.objective.config import RopawsConfig
from paws_hpc.stages.pretrain import run as pretrain
from tests.conftest import Stores
from tests.tiny import small_vit, tiny_config, training_of

EVERYTHING = AugmentConfig(
    jitter_probability=0.8, grayscale_probability=0.3, blur_probability=0.5, flip_probability=0.5,
    solarize_probability=0.3, equalize_probability=0.3,
)  # fmt: skip
