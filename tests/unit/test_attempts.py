"""A job has one writer: later attempts fence earlier ones, live ones are waited for, and of two at once one leaves."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from paws_hpc.cluster import bootstrap
from paws_hpc.cluster.requeue import fruitless_crashes
from paws_hpc.stages.attempts import (
    Attempt,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    acquire,
    read_attempts,
    record_failure,
    stage_state,
)
from tests.attempts import write_attempt


def begin(folder: Path, *, alive: bool = False, job_id: str | None = "17") -> Lease:
    facts = {"job": "pretrain", "job_id": job_id, "restart": 0, "key": f"{job_id}-0", "ranks": 2, "progress": 0}
    return acquire(folder, facts, is_alive=lambda _: alive, wait_s=0.0)


def test_a_start_that_was_believed_dead_cannot_write_once_another_took_over(tmp_path: Path) -> None:
    zombie = begin(tmp_path)
    zombie.fence()
    successor = begin(tmp_path)
    with pytest.raises(LeaseLostError, match=r"Attempt 2 of .* has taken over from attempt 1"):
        zombie.fence()
    successor.fence()


def test_a_live_start_is_not_taken_over_and_its_holder_is_named(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(LeaseHeldError, match=r"in the hands of job 17 on .*launch again"):
        begin(tmp_path, alive=True, job_id="18")
    assert len(read_attempts(tmp_path)) == 1


def test_a_start_that_recorded_its_end_is_not_asked_about(tmp_path: Path) -> None:
    begin(tmp_path).end("requeued", step=12)
    begin(tmp_path, alive=True)
    first, second = read_attempts(tmp_path)
    assert first.end is not None
    assert (first.end["how"], first.end["step"], second.end) == ("requeued", 12, None)


def test_of_many_that_start_at_once_exactly_one_holds_the_job(tmp_path: Path) -> None:
    def attempt(_: int) -> bool:
        try:
            begin(tmp_path, alive=True)
        except LeaseHeldError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(64))) == 1
    assert len(read_attempts(tmp_path)) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_process_that_is_gone_is_dead_and_what_ran_under_the_own_job_id_too(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    begin(tmp_path, job_id=None)
    (attempt,) = read_attempts(tmp_path)
    assert not bootstrap.is_alive(replace(attempt, pid=process.pid), own_job_id=None)
    assert not bootstrap.is_alive(replace(attempt, job_id="17", host="n1", pid=1), own_job_id="17")


def test_where_nobody_can_be_asked_a_changing_heartbeat_is_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    monkeypatch.setattr("paws_hpc.stages.attempts.BEAT_EVERY_S", 0.2)
    with begin(tmp_path):
        attempt = replace(read_attempts(tmp_path)[0], host="another-node", pid=1)
        assert bootstrap.is_alive(attempt, own_job_id="18")
    assert not bootstrap.is_alive(attempt, own_job_id="18")


def test_crashes_count_only_as_long_as_nothing_new_is_saved(tmp_path: Path) -> None:
    def attempts(*told: tuple[str | None, int]) -> list[Attempt]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, (how, progress) in enumerate(told, 1):
            write_attempt(folder, "pretrain", how=how, number=number, job_id="17", progress=progress)
        return read_attempts(folder / "jobs/pretrain")

    assert fruitless_crashes(attempts(("crashed", 0), ("crashed", 0)), 0, restart=1) == 2
    assert fruitless_crashes(attempts(("crashed", 0), ("crashed", 0)), 5, restart=1) == 0, (
        "the last attempt saved step 5"
    )
    assert fruitless_crashes(attempts(("crashed", 0), ("crashed", 5), ("crashed", 5)), 5, restart=2) == 2
    assert fruitless_crashes(attempts(("crashed", 5), ("requeued", 5), ("failed", 5)), 5, restart=2) == 2, "no crash"
    assert fruitless_crashes(attempts(("crashed", 5), (None, 5), ("failed", 5)), 5, restart=2) == 2, (
        "a lost node is none"
    )
    assert fruitless_crashes([], 0, restart=2) == 3, "crashed before they could say that they began"
    assert fruitless_crashes(attempts(("requeued", 0), ("requeued", 4)), 9, restart=2) == 1, "the third one did"


def test_the_state_of_a_stage_is_the_worst_of_its_jobs_and_seconds_add_up(tmp_path: Path) -> None:
    assert stage_state(tmp_path / "jobs", "finetune") == ("pending", None)
    write_attempt(tmp_path, "finetune/lr=0.1,epochs=2", how="done", seconds=3)
    assert stage_state(tmp_path / "jobs", "finetune") == ("done", 3)
    folder = write_attempt(tmp_path, "finetune/lr=0.2,epochs=2", how="crashed", seconds=2, job_id="17")
    record_failure(folder, "17-0", 3, RuntimeError("the device is lost"), permanent=False)
    assert stage_state(tmp_path / "jobs", "finetune") == ("failed", 5)
    (attempt,) = read_attempts(folder)
    assert [(failure["rank"], failure["message"]) for failure in attempt.failures] == [(3, "the device is lost")]
    write_attempt(tmp_path, "finetune/lr=0.2,epochs=2", how="done", seconds=4, number=2)
    assert stage_state(tmp_path / "jobs", "finetune") == ("done", 9)
