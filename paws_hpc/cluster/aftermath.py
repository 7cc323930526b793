"""What the batch script of a job does when its ranks have failed: queue it again, or let it fail.

    python -m paws_hpc.cluster.aftermath RUN RESTARTS_WITHOUT_PROGRESS

A rank that was killed cannot say anything, and those beside it are ended by ``srun --kill-on-bad-exit``; the batch
script outlives them. Progress is what counts, not how often a job was started.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paws_hpc.cluster import scheduler
from paws_hpc.cluster.own_job import own_job

if TYPE_CHECKING:
    from paws_hpc.stages.attempts import Start

_LOG = logging.getLogger(__name__)


def main(path: Path, limit: int) -> None:
    """Decide for the job whose batch script calls this.

    Args:
        path: the run directory.
        limit: crashes in a row without progress after which the job fails.
    """
    job_id, restart = own_job()
    runs, told = scheduler.runs_since(job_id, restart)
    if not runs:  # the usual case, after a preemption; the node is wanted, so leave before torch is imported
        _LOG.info("Slurm says that job %s is %s: it is queued again already, or ended by others.", job_id, told)
        return
    from paws_hpc.cluster.chain import Chain, job_called  # noqa: PLC0415
    from paws_hpc.stages.attempts import read_starts, record_end  # noqa: PLC0415
    from paws_hpc.stages.run_folder import RunFolder  # noqa: PLC0415

    run = RunFolder(path)
    name = Chain(run, "").job_name(job_id)
    folder, progress = run.job(name), job_called(name).progress(run)
    starts = [start for start in read_starts(folder) if start.holder.job_id == job_id]
    last = starts[-1] if starts and starts[-1].holder.restart == restart else None
    if last is not None and last.end is None:
        try:
            record_end(folder, last.number, "crashed", seconds=last.seconds, message=_reason(last))
        except OSError as error:  # a full disk: the next start could not write either
            _LOG.error(
                "%s crashed, and nothing can be written: %s. It fails; launch again once that is mended.", name, error
            )
            return
    definite = [failure for failure in (last.failures if last else []) if failure["definite"]]
    fruitless = fruitless_crashes(starts, progress) if last is not None else restart + 1
    if definite:
        _LOG.error("%s failed and would fail again: %s", name, definite[0]["message"])
    elif fruitless > limit:
        _LOG.error("%s crashed %d times in a row without getting past step %d: it fails.", name, fruitless, progress)
    else:
        _LOG.warning("%s crashed, %d times in a row without getting past step %d.", name, fruitless, progress)
        scheduler.requeue(job_id)


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
    main(Path(sys.argv[1]), int(sys.argv[2]))
