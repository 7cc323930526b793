"""The launch command: what it composes, what it refuses, and what it does when it is run again."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from paws_hpc.cluster.compose import CONF
from paws_hpc.cluster.frozen import to_config
from paws_hpc.config import Config
from paws_hpc.stages.attempts import read_attempts
from tests.conftest import Stores
from tests.integration.launching import command, environment, launch

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def compose(*overrides: str) -> Config:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(OmegaConf.to_container(hydra.compose("config", overrides=["name=run", *overrides])))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_valid_run_and_its_file_and_job_state_command_cost_and_expected_result(
    experiment: str,
) -> None:
    config = compose(f"experiment={experiment}")
    config.labels.check_complete()
    size = config.views.large.size
    assert config.views.evaluation.size == config.finetune.crop.size == config.baseline.crop.size == size
    assert config.finetune.trials()
    assert config.baseline.trials()
    for path in (CONF / "experiment" / f"{experiment}.yaml", CONF.parent / "jobs" / f"{experiment}.sh"):
        assert all(heading in path.read_text() for heading in ("# Command:", "# Cost:", "# Expected:"))


def test_the_imagenet_recipe_is_the_papers() -> None:
    config = compose("experiment=imagenet_10pct")
    assert (config.pretrain.batch_size, config.pretrain.support.classes, config.pretrain.support.images_per_class) == (
        4096, 960, 7,
    )  # fmt: skip
    assert (config.optimizer.start_lr, config.optimizer.peak_lr, config.optimizer.final_lr) == (0.3, 6.4, 0.064)
    assert (config.views.small.count, config.views.small.size, config.views.small.scale) == (6, 96, [0.05, 0.14])
    assert config.finetune.sweep["learning_rate"] == [0.01, 0.02, 0.05, 0.1, 0.2]
    assert config.finetune.sweep["epochs"] == [30, 50]
    assert config.objective.support_warmup_fraction == 0, "the warm-up is ours and off in the paper's recipes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.epoch=3", "pretrain.epoch is not a field of the config. Did you mean 'pretrain.epochs'?"),
        ("optimzer.peak_lr=1", "optimzer is not a field of the config. Did you mean 'optimizer'?"),
        ("experiment=digit", "experiment=digit does not exist. Did you mean 'digits'?"),
        ("model.name=resnt50", "model.name='resnt50' is no model. Did you mean 'resnet50'?"),
        ("pretrain.epochs=many", 'pretrain.epochs="many" must be a whole number'),
        ("stages=[pretrian]", "stages=['pretrian']: 'pretrian' is not one of"),
        ("pretrain.batch_size=5000", "batch_size=5000 is larger than the data set of 1397 images"),
        ("pretrain.support.classes=11", "support.classes=11, but only 10 classes have labelled images"),
        ("labels.per_class=3", "images_per_class=4, but labels.per_class=3"),
        ("labels.file=nowhere.txt labels.per_class=null", "nowhere.txt does not exist"),
        ("resources.pretrain.tasks_per_node=3", "pretrain.batch_size=128 does not divide by 3 ranks"),
    ],
)
def test_a_wrong_input_is_one_clear_line_and_exit_code_1(tmp_path: Path, override: str, message: str) -> None:
    failed = launch(tmp_path, "stages=[prepare,pretrain]", *override.split())
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_misspelt_field_of_an_experiment_file_is_named_too(tmp_path: Path) -> None:
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "mine.yaml").write_text("# @package _global_\npretrain:\n  epcohs: 3\n")
    command = [sys.executable, "-m", "paws_hpc.launch", f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert failed.returncode == 1
    assert "pretrain.epcohs is not a field of the config. Did you mean 'pretrain.epochs'?" in failed.stderr


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which to import torch fails, and in which Slurm seems to be installed."""
    modules, programs = tmp_path / "modules", tmp_path / "programs"
    modules.mkdir()
    (modules / "torch.py").write_text("raise ImportError('torch was imported')\n")
    programs.mkdir()
    (programs / "srun").write_text("#!/bin/sh\nexit 1\n")
    (programs / "srun").chmod(0o755)
    return {**environment(), "PYTHONPATH": str(modules), "PATH": f"{programs}:{os.environ['PATH']}"}


def test_what_does_not_compute_never_imports_torch(tmp_path: Path, without_torch: dict[str, str]) -> None:
    def said(*arguments: str) -> str:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=without_torch, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "#SBATCH" in said(*command(tmp_path, "hydra/launcher=submitit_slurm", "dry_run=true"))
    said(*command(tmp_path, "stages=[prepare,report]"))
    assert (tmp_path / "runs/run/report/index.html").exists()
    assert "prepare" in said(sys.executable, "-m", "paws_hpc.status", str(tmp_path / "runs/run"))
    said(sys.executable, "-c", "import paws_hpc.cluster.requeue, paws_hpc.cluster.bootstrap")


def test_a_node_without_torch_fails_in_one_line_that_names_it_and_may_be_tried_again(
    tmp_path: Path, digits_stores: Stores, without_torch: dict[str, str]
) -> None:
    shutil.copytree(digits_stores.train.parent, tmp_path / "shards")
    several = ("-m", "optimizer.peak_lr=0.1,0.2", "stages=[prepare,pretrain]", "resources.pretrain.tasks_per_node=2")
    done = subprocess.run(
        command(tmp_path, *several), capture_output=True, text=True, check=False, env=without_torch, timeout=240
    )
    assert "2 of 2 runs failed" in done.stderr, "the first one's failure does not keep the second from being tried"
    assert done.returncode != 0
    found = read_attempts(tmp_path / "runs/run/jobs/pretrain")[0].failures
    assert f"torch cannot be imported on {socket.gethostname()}: torch was imported" in found[0]["message"]
    assert not found[0]["permanent"]
