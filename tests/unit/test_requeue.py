"""The way back into the queue, and who may take it, against a scontrol that answers as Slurm 22.05 does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from paws_hpc.cluster import requeue
from paws_hpc.cluster.bootstrap import is_permanent
from paws_hpc.engine.errors import TrainingStoppedError
from paws_hpc.files import read_json, write_json
from paws_hpc.stages.attempts import LeaseHeldError, read_attempts, record_failure
from paws_hpc.stages.run_folder import RunFolder
from tests.attempts import write_attempt
from tests.conftest import Program

Says = Callable[..., None]


@pytest.fixture
def says(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Sets what ``scontrol`` says of job 17; it notes what is requeued. ``away`` makes it refuse the next question."""
    monkeypatch.setattr(requeue, "_ASK_AGAIN_S", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def say(state: str, *, restarts: int = 0, away: bool = False) -> None:
        if away:
            (tmp_path / "away").touch()
        script = f"""
            if /bin/rm {tmp_path}/away 2>/dev/null; then echo "Unable to contact slurm controller" >&2; exit 1; fi
            if [ $1 = requeue ]; then echo $2 >> {tmp_path}/requeued; exit 0; fi"""
        program("scontrol", f"JobId=17 JobState={state} Reason=None Restarts={restarts} ExitCode=0:0", before=script)

    say("RUNNING")
    return say


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    jobs = [{"job": "pretrain", "job_id": "17"}]
    write_json(folder.chain, {"name": "run", "id": "cafe", "submissions": [{"jobs": jobs}]})
    return folder


def requeued(run: RunFolder) -> list[str]:
    path = run.path.parent / "requeued"
    return path.read_text().split() if path.exists() else []


def give_back(run: RunFolder) -> list[str]:
    ends: list[str] = []
    requeue.queue_again(run.chain, "17", 0, record=lambda how, message: ends.append(how))
    return ends


@pytest.mark.parametrize(
    ("state", "restarts", "ended"),
    [
        ("RUNNING", 0, "requeued"),
        ("RUNNING", 1, "requeued"),  # Slurm has started it on another node: its successor is left alone
        ("COMPLETING", 0, "cancelled"),  # cancelled, it would be brought back to life
        ("CANCELLED", 0, "cancelled"),
        ("TIMEOUT", 0, "cancelled"),
    ],
)
def test_only_a_job_that_runs_goes_back_and_a_controller_that_is_away_is_waited_for(
    run: RunFolder, says: Says, state: str, restarts: int, ended: str
) -> None:
    says(state, restarts=restarts, away=True)
    assert give_back(run) == [ended]
    assert requeued(run) == (["17"] if (state, restarts) == ("RUNNING", 0) else [])


def test_a_chain_that_a_person_cancels_does_not_queue_itself_again(run: RunFolder, says: Says) -> None:
    write_json(run.chain, read_json(run.chain) | {"cancelled": "2026-01-02T03:04:05+00:00"})
    assert give_back(run) == ["cancelled"]
    assert requeued(run) == []


def test_an_element_goes_back_under_the_array_and_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # of the last element it is the id of the whole array
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "18")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert requeue.own_job() == ("18_2", 4)


def test_a_killed_rank_is_retried_until_nothing_is_gained(
    run: RunFolder, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    for restart in range(4):
        write_attempt(run.path, "pretrain", how=None, number=restart + 1, job_id="17")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        says("RUNNING", restarts=restart, away=True)
        requeue.after_crash(run.path, 3)
        end = read_attempts(run.job("pretrain"))[-1].end
        assert end is not None
        assert end["how"] == "crashed"
    assert len(requeued(run)) == 3, "four crashes without a checkpoint are one more than three"


def test_what_must_fail_again_is_not_retried_and_a_job_that_was_refused_the_lease_does_not_blame_its_holder(
    run: RunFolder, says: Says, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_attempt(run.path, "pretrain", how=None, job_id="16")  # alive, of an earlier submission
    record_failure(folder, "17-0", 0, LeaseHeldError("in the hands of job 16"), permanent=True)
    requeue.after_crash(run.path, 3)
    assert requeued(run) == []
    assert "in the hands of job 16" in caplog.text
    (holder,) = read_attempts(folder)
    assert (holder.failures, holder.end) == ([], None)


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (ValueError("a setting"), True),
        (TrainingStoppedError("the loss is not finite"), True),
        (OSError(28, "No space left on device"), True),
        (FileNotFoundError(2, "no store"), True),
        (TypeError("a mistake of ours"), True),
        (OSError(5, "Input/output error"), False),
        (OSError(116, "Stale file handle"), False),
        (ConnectionResetError("a peer"), False),
        (TimeoutError("rank 0 did not publish its address"), False),
        (RuntimeError("NCCL: connection closed by peer"), False),
        (MemoryError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, permanent: bool) -> None:
    assert is_permanent(error) is permanent
