"""Which job of Slurm this process belongs to."""

from __future__ import annotations

import os


def own_job() -> tuple[str, int]:
    """The id, ``17`` or ``18_0``, and how often Slurm has started it before.

    Raises:
        KeyError: this process does not belong to a job.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job_id = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    return job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0"))
