"""The trackers of one stage, as its config asks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from paws_hpc import distributed
from paws_hpc.config import Config
from paws_hpc.engine.console import ProgressTracker
from paws_hpc.engine.event_file import TensorboardTracker
from paws_hpc.engine.tracking import MetricsFile, NullTracker, Tracker, Trackers, WandbTracker
from paws_hpc.stages.run_folder import RunFolder


def open_trackers(
    config: Config,
    run: RunFolder,
    folder: Path,
    *,
    job: str,
    start: int,
    total_steps: int,
    awaits_validation: bool,
) -> Tracker:
    """``metrics.jsonl`` and progress always, Weights & Biases unless disabled, TensorBoard where asked for.

    On ranks other than 0 nothing is written.

    Args:
        config: of the run.
        run: whose ``chain.json`` holds the id that makes W&B run ids stable across restarts.
        folder: of the stage.
        job: name of the stage or cell.
        start: steps done already.
        total_steps: of the stage.
        awaits_validation: whether those steps end with a validation that is still to be done.
    """
    if not distributed.is_main():
        return NullTracker()
    trackers: list[Tracker] = [
        MetricsFile(folder / "metrics.jsonl", resume_step=start, awaits_validation=awaits_validation),
        ProgressTracker(job, total_steps=total_steps, start=start),
    ]
    if config.tracking.tensorboard:
        trackers.append(TensorboardTracker(folder / "tensorboard", metrics=folder / "metrics.jsonl"))
    if config.tracking.wandb != "disabled":
        settings = asdict(config) | {"chain": run.describe().get("id")}
        identifier = f"{settings['chain']}-{job}".translate(str.maketrans("/=,.", "----"))
        trackers.append(
            WandbTracker(
                config.tracking,
                folder=folder,
                run_id=identifier,
                group=config.name,
                job_type=job.partition("/")[0],
                settings=settings,
            )
        )
    return Trackers(*trackers)
