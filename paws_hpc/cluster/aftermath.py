"""What the batch script of a job does when its ranks have failed: queue it again, or let it fail.

    python -m paws_hpc.cluster.aftermath RUN RESTARTS_WITHOUT_PROGRESS

A rank that was killed cannot say anything, and those beside it are ended by ``srun --kill-on-bad-exit``; the batch
script outlives them. Progress is what counts, not how often a job was started.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.chain import Chain, job_called
from paws_hpc.cluster.slurm_job import SlurmJob
from paws_hpc.stages.attempts import Start, read_starts, record_end
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)


def main(run: RunFolder, limit: int) -> None:
    """Decide for the job whose batch script calls this."""
    own = SlurmJob.this_process()
    name = Chain(run, "").job_name(own.job_id)
    state = scheduler.job_state(own.job_id)
    if state != "RUNNING":
        _LOG.info("Slurm says that job %s is %s: it is queued again already, or ended by others.", own.job_id, state)
        return
    folder, progress = run.job(name), job_called(name).progress(run)
    starts = [start for start in read_starts(folder) if start.holder.job_id == own.job_id]
    if starts and starts[-1].holder.restart == own.restart and starts[-1].end is None:
        record_end(folder, starts[-1].number, "crashed", seconds=starts[-1].seconds, message=_reason(starts[-1]))
        starts = [start for start in read_starts(folder) if start.holder.job_id == own.job_id]
    if definite := [failure for start in starts[-1:] for failure in start.failures if failure["definite"]]:
        _LOG.error("%s failed and would fail again: %s", name, definite[0]["message"])
        return
    fruitless = fruitless_crashes(starts, progress) if starts else own.restart + 1
    if fruitless > limit:
        _LOG.error(
            "%s crashed %d times in a row without getting past step %d; restarts_without_progress=%d, so it fails.",
            name, fruitless, progress, limit,
        )  # fmt: skip
        return
    _LOG.warning(
        "%s crashed at step %d or later (%d in a row without progress). Queued again.", name, progress, fruitless
    )
    scheduler.requeue(own.job_id)


def fruitless_crashes(starts: list[Start], progress: int) -> int:
    """How many of the last starts crashed and left no newer checkpoint than they found; preemptions do not count.

    Args:
        starts: of one job, oldest first.
        progress: training steps of the newest checkpoint now.
    """
    count = 0
    for start in reversed(starts):
        if start.holder.progress < progress:
            break
        count += start.end is None or start.end["how"] in ("crashed", "failed")
    return count


def _reason(start: Start) -> str:
    return start.failures[0]["message"] if start.failures else "A rank was killed: by the system for memory, say."


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    main(RunFolder(Path(sys.argv[1])), int(sys.argv[2]))
