"""Running the real command in its own process, on a run small enough to take seconds."""

import os
import subprocess
import sys
from pathlib import Path

TINY = (
    "experiment=digits",
    "seed=0",
    "data.source=digits",  # is packed where command() says
    "tracking.wandb=disabled",
    "model.channels=[8,16]",
    "views.large.size=16",
    "views.small.size=8",
    "views.small.count=2",
    "views.evaluation.resize=16",
    "views.evaluation.size=16",
    "pretrain.batch_size=128",
    "pretrain.epochs=2",
    "optimizer.start_lr=0.001",
    "optimizer.peak_lr=0.002",
    "optimizer.warmup_epochs=0.5",
    "pretrain.checkpoint_every_steps=3",
    "pretrain.log_every_steps=1",
    "pretrain.validate_every_epochs=1",
    "resources.pretrain.threads_per_rank=1",
    "finetune.sweep.learning_rate=[0.02,0.1]",
    "finetune.sweep.epochs=[1,2]",
    "finetune.crop.size=16",
    "baseline.sweep.learning_rate=[0.1]",
    "baseline.sweep.epochs=[2]",
    "baseline.warmup_epochs=0",
    "baseline.validate_every_epochs=1",
    "baseline.crop.size=16",
)


def command(folder: Path, *overrides: str) -> list[str]:
    """The launch command of a tiny run whose stores and run directory lie in ``folder``."""
    places = (f"runs={folder}/runs", f"data.train={folder}/shards/train", f"data.test={folder}/shards/test")
    return [sys.executable, "-m", "paws_hpc.launch", *TINY, "name=run", *places, *overrides]


def environment() -> dict[str, str]:
    """One thread per process, so that tests side by side do not crowd each other out; no GPU, which several ranks would
    not share and whose kernels promise no equal bits; nothing of a job of Slurm in which the tests may run; and
    compiled modules are kept, whatever the caller's shell says: every start would compile them anew, which costs as
    much as to import torch."""
    left_out = ("SLURM_", "SBATCH_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with more variables in its environment."""
    env = environment() | variables
    return subprocess.run(
        command(folder, *overrides), capture_output=True, text=True, check=False, env=env, timeout=240
    )
