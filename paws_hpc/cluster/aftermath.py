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
from paws_hpc.cluster.requeue import own_job, patiently, queue_again
from paws_hpc.stages.attempts import Start, read_failures, read_starts, record_end
from paws_hpc.stages.run_folder import RunFolder

_LOG = logging.getLogger(__name__)


def main(path: Path, limit: int) -> None:
    """Decide for the job whose batch script calls this.

    Args:
        path: the run directory.
        limit: crashes in a row without progress after which the job fails.
    """
    job_id, restart = own_job()
    what, told = patiently(lambda: scheduler.fate(job_id, restart))
    if what != "runs":  # the usual case, after a preemption
        _LOG.info("Job %s is in the queue again already, or was ended by others: %s.", job_id, told)
        return
    run = RunFolder(path)
    name = Chain(run).job_name(job_id)
    folder, progress = run.job(name), job_called(name).progress(run)
    try:
        starts = _record_crash([start for start in read_starts(folder) if start.holder.job_id == job_id], restart)
    except OSError as error:  # a full disk: the next start could not write either
        _LOG.error("%s crashed, and nothing can be written: %s. Mend that, then launch again.", name, error)
        return
    definite = [failure for failure in read_failures(folder, f"{job_id}-{restart}") if failure["definite"]]
    fruitless = fruitless_crashes(starts, progress, restart)
    if definite:
        _LOG.error("%s failed and would fail again: %s", name, definite[0]["message"])
    elif fruitless > limit:
        _LOG.error("%s crashed %d times in a row without getting past step %d: it fails.", name, fruitless, progress)
    else:
        _LOG.warning("%s crashed, %d times in a row without getting past step %d.", name, fruitless, progress)
        queue_again(run.chain, job_id, restart, record=lambda how, message: None)


def _record_crash(starts: list[Start], restart: int) -> list[Start]:
    """Write down the end of the present start if it had no time to do so itself."""
    last = starts[-1] if starts else None
    if last is None or last.holder.restart != restart or last.end is not None:
        return starts
    told = last.failures[0]["message"] if last.failures else "A rank was killed: by the system for memory, say."
    record_end(last.folder, last.number, "crashed", seconds=last.seconds, message=told)
    return [start for start in read_starts(last.folder) if start.holder.job_id == last.holder.job_id]


def fruitless_crashes(starts: list[Start], progress: int, restart: int) -> int:
    """How many starts in a row crashed and left no newer checkpoint than they found.

    A start that was preempted does not count, nor one that just ended with its node, which nobody could write down.

    Args:
        starts: of one job id, oldest first.
        progress: training steps of the newest checkpoint now.
        restart: of the present start; it and those before it that do not appear in ``starts`` crashed too early to.
    """
    count = restart - (starts[-1].holder.restart if starts else -1)
    for start in reversed(starts):
        if start.holder.progress < progress:
            break
        count += start.end is not None and start.end["how"] in ("crashed", "failed")
    return count


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    main(Path(sys.argv[1]), int(sys.argv[2]))
