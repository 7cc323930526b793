"""The run directory: where every stage reads and writes, and how a stage says that it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paws_hpc.config import Config
from paws_hpc.files import read_json, write_json
from paws_hpc.stage_table import STAGES
from paws_hpc.trial import Trial


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; nothing here creates them."""

    path: Path

    @property
    def chain(self) -> Path:
        """State of the chain's stages."""
        return self.path / "chain.json"

    @property
    def config(self) -> Path:
        """The frozen config."""
        return self.path / "config.yaml"

    @property
    def prepare(self) -> Path:
        """Of the first stage, which leaves only its ``DONE`` here."""
        return self.path / "prepare"

    @property
    def pretrain(self) -> Path:
        """Folder of pre-training."""
        return self.path / "pretrain"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of pre-training; the last one is the pre-trained network."""
        return self.pretrain / "checkpoints"

    def checkpoint(self, steps: int) -> Path:
        """The checkpoint of pre-training after a number of steps."""
        return self.checkpoints / f"step-{steps:08d}.pt"

    @property
    def tuned(self) -> Path:
        """Weights of the encoder after SuNCEt fine-tuning, where there was any."""
        return self.path / "tuned.pt"

    @property
    def selected(self) -> Path:
        """The winner of the sweep."""
        return self.path / "selected.json"

    @property
    def selection(self) -> Path:
        """What selection leaves for the report, beside the two files named by other properties."""
        return self.path / "selection"

    @property
    def result(self) -> Path:
        """Test scores."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report" / "index.html"

    def marker(self, job: str) -> Path:
        """The file that says that a job, ``pretrain`` or ``finetune/lr=0.05,epochs=30``, is done."""
        stage = STAGES.get(job.partition("/")[0])
        return self.path / (stage.marker if stage is not None and stage.marker else f"{job}/DONE")

    def trial(self, sweep: str, trial: Trial) -> Path:
        """Folder of one trial; ``sweep`` is ``finetune`` or ``baseline``."""
        return self.path / sweep / trial.name

    def job(self, name: str) -> Path:
        """Folder of the attempts of a job, ``pretrain`` or ``finetune/lr=0.05,epochs=30``."""
        return self.path / "jobs" / name

    def logs(self, stage: str) -> Path:
        """Folder of what the ranks of a stage's jobs print."""
        return self.path / "logs" / stage

    def describe(self) -> dict[str, Any]:
        """``chain.json``; empty where the chain was not begun by the launcher."""
        return read_json(self.chain) if self.chain.exists() else {}


def is_done(folder: Path) -> bool:
    """Whether the stage of this folder has finished."""
    return (folder / "DONE").exists()


def mark_done(folder: Path, **facts: Any) -> None:
    """Say, as the last thing written and by rank 0 alone, that the stage of this folder has finished."""
    write_json(folder / "DONE", facts)


def without_pretraining(config: Config, run: RunFolder) -> bool:
    """Whether the supervised baseline is all that a run has to score: it has no pre-training, begun or to come."""
    wanted = {"pretrain", "finetune"} & set(config.stages)
    begun = run.pretrain.exists() or run.job("pretrain").exists()
    baseline = "baseline" in config.stages or (run.path / "baseline").exists()
    return baseline and not wanted and not begun


def fine_tuned_trials(config: Config, run: RunFolder) -> list[str]:
    """Names of the trials of fine-tuning among which selection chooses; none without pre-training."""
    return [] if without_pretraining(config, run) else [trial.name for trial in config.finetune.trials()]


def check_sweep_is_the_scored_one(config: Config, run: RunFolder) -> None:
    """Raise ValueError if ``result.json`` was scored after selection among other trials than the sweep now has."""
    scored, current = read_json(run.selected)["trials"], fine_tuned_trials(config, run)
    if scored != current:
        before = f"after selection among {scored}" if scored else "without pre-training"
        raise ValueError(
            f"{run.result} was scored {before}, but the sweep now has {current}. To select anew, which scores the test "
            f"split once more, remove {run.result} and {run.selected.name} beside it."
        )
