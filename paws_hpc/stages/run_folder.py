"""The run directory: where every stage reads and writes, how a stage says that it is done, and how a run is found."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from paws_hpc.config import Config
from paws_hpc.files import read_json, read_record, write_record
from paws_hpc.stage_table import STAGES
from paws_hpc.trial import Trial


class RunFolder:
    """Paths of one run; nothing here creates them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chain = path / "chain.json"  # state of the jobs
        self.config = path / "config.yaml"  # the frozen one
        self.prepare = path / "prepare"
        self.pretrain = path / "pretrain"
        self.checkpoints = self.pretrain / "checkpoints"  # the last one is the pre-trained network
        self.compiled = path / "compiled"  # what the compiler made, for the next start
        self.tuned = path / "tuned.pt"  # weights of the encoder after SuNCEt fine-tuning
        self.selected = path / "selected.json"  # the winners of the sweeps
        self.selection = path / "selection"  # folder of what selection leaves for the report
        self.result = path / "result.json"  # test scores
        self.report = path / "report" / "index.html"

    def checkpoint(self, steps: int) -> Path:
        """The checkpoint of pre-training after a number of steps."""
        return self.checkpoints / f"step-{steps:08d}.pt"

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
        """Folder of the ranks' output, of all jobs of a stage."""
        return self.path / "logs" / stage

    def describe(self) -> dict[str, Any]:
        """``chain.json``; empty where the chain was not begun by the launcher."""
        return read_json(self.chain) if self.chain.exists() else {}


def original_of(path: Path, chain: Mapping[str, Any]) -> Path | None:
    """The folder that ``path`` is a copy of, by its ``chain.json``: where the run was, and is; None if it moved."""
    place = Path(str(chain.get("folder") or path))
    with suppress(OSError, ValueError):  # no run is there any more
        there = RunFolder(place).describe()
        if isinstance(there, dict) and there.get("id") == chain.get("id") and not place.samefile(path):
            return place
    return None


def is_done(folder: Path) -> bool:
    """Whether the stage of this folder has finished."""
    return (folder / "DONE").exists()


def mark_done(folder: Path, **facts: Any) -> None:
    """Say, as the last thing written and by rank 0 alone, that the stage of this folder has finished."""
    write_record(folder / "DONE", facts)


def has_trained(run: RunFolder) -> bool:
    """Whether a run has trained anything that could go on or be used: a checkpoint, a finished network, or scores."""
    stages = (run.path / name for name, stage in STAGES.items() if stage.trains)
    kept = ("**/step-*.pt", "**/DONE")
    return run.result.exists() or any(True for stage in stages for pattern in kept for _ in stage.glob(pattern))


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
    scored, current = read_record(run.selected)["trials"], fine_tuned_trials(config, run)
    if scored != current:
        before = f"after selection among {scored}" if scored else "without pre-training"
        raise ValueError(
            f"{run.result} was scored {before}, but the sweep now has {current}. To select anew, which scores the test "
            f"split once more, remove {run.result} and {run.selected.name} beside it."
        )


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run; ``name`` is its path, or its name under ``runs``.

    Raises:
        FileNotFoundError: there is none; names that are spelled alike are in the message.
    """
    for path in (runs / name, Path(name)):
        if _is_run(path):
            return path
    known = [path.name for path in all_runs(runs)] if runs.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, known, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known[:10]) or 'none'}."
    raise FileNotFoundError(f"There is no run {name}, neither as a folder nor under {runs}. {hint}")


def all_runs(runs: Path) -> list[Path]:
    """The folders of all runs, the newest last.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"{runs} is no folder. Name the folder of all runs with --runs.")
    return sorted(filter(_is_run, runs.iterdir()), key=lambda path: path.stat().st_mtime)


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("chain.json", "config.yaml", "jobs"))
