"""Writing down that a job was started, as its rank 0 does."""

from __future__ import annotations

from pathlib import Path

from paws_hpc.files import create_json
from paws_hpc.stages.attempts import record_end


def write_attempt(
    run: Path, job: str, *, how: str | None, seconds: float = 0.0, number: int = 1, job_id: str | None = None,
    progress: int = 0,
) -> Path:  # fmt: skip
    """Attempt ``number`` of a job of the run directory ``run``; ``how`` it ended is None for one that did not."""
    folder = run / "jobs" / job
    folder.mkdir(parents=True, exist_ok=True)
    holder = {
        "job": job, "job_id": job_id, "restart": number - 1, "key": f"{job_id or 'local'}-{number - 1}",
        "host": "n1", "pid": 1, "ranks": 1, "progress": progress,
    }  # fmt: skip
    create_json(folder / f"start-{number:04d}.json", holder | {"began": "2026-01-02T03:04:05.000+00:00"})
    if how is not None:
        record_end(folder, number, how, seconds=seconds)
    return folder
