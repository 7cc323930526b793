"""The way back into the queue, and who may take it, against a scontrol that answers as Slurm 22.05 does."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from paws_hpc.cluster import requeue
from paws_hpc.cluster.bootstrap import is_permanent
from paws_hpc.cluster.scheduler import SchedulerError
from paws_hpc.engine.errors import TrainingStoppedError
from paws_hpc.files import read_json, write_json
from paws_hpc.stages.attempts import LeaseHeldError, read_attempts, record_failure
from paws_hpc.stages.run_folder import RunFolder
from tests.attempts import write_attempt


class Controller:
    """A scontrol on PATH: shows the job in a state, after so many refusals to answer, and notes what was requeued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says("RUNNING", restarts=0)

    def says(self, state: str, *, restarts: int, silent: int = 0, refuses: bool = False) -> None:
        (self.folder / "silent").write_text("x" * silent)
        script = self.folder / "scontrol"
        script.write_text(
            f"""#!/bin/sh
if [ -s {self.folder}/silent ]; then
  dd if={self.folder}/silent of={self.folder}/rest bs=1 skip=1 2>/dev/null; mv {self.folder}/rest {self.folder}/silent
  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
fi
if [ "$1" = requeue ]; then
  {'echo "Requested operation is presently disabled for job $2" >&2; exit 1' if refuses else ""}
  echo "$2" >> {self.folder}/requeued; exit 0
fi
echo "JobId=17 JobName=run.pretrain.cafe JobState={state} Reason=None Requeue=1 Restarts={restarts} ExitCode=0:0"
"""
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(requeue, "_ASK_AGAIN_S", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return Controller(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    jobs = [{"job": "pretrain", "job_id": "17"}]
    write_json(folder.chain, {"name": "run", "id": "cafe", "submissions": [{"jobs": jobs}]})
    return folder


def give_back(run: RunFolder, *, restart: int = 0) -> list[str]:
    ends: list[str] = []
    requeue.queue_again(run.chain, "17", restart, record=lambda how, message: ends.append(how))
    return ends


def test_a_running_job_goes_back_and_a_controller_that_is_away_is_waited_for(
    run: RunFolder, controller: Controller
) -> None:
    controller.says("RUNNING", restarts=0, silent=3)
    assert give_back(run) == ["requeued"]
    assert controller.requeued == ["17"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT"])
def test_a_cancelled_job_is_not_brought_back_to_life(run: RunFolder, controller: Controller, state: str) -> None:
    controller.says(state, restarts=0)
    assert give_back(run) == ["cancelled"]
    assert controller.requeued == []


def test_a_chain_that_a_person_cancels_does_not_queue_itself_again(run: RunFolder, controller: Controller) -> None:
    write_json(run.chain, read_json(run.chain) | {"cancelled": "2026-01-02T03:04:05+00:00"})
    assert give_back(run) == ["cancelled"]
    assert controller.requeued == []


def test_a_start_that_slurm_has_replaced_leaves_its_successor_alone(run: RunFolder, controller: Controller) -> None:
    controller.says("RUNNING", restarts=1)  # on another node, after this one was lost
    assert give_back(run) == ["requeued"]
    assert controller.requeued == []


def test_a_refusal_is_an_error_in_slurms_words(run: RunFolder, controller: Controller) -> None:
    controller.says("RUNNING", restarts=0, refuses=True)
    with pytest.raises(SchedulerError, match="presently disabled"):
        give_back(run)


def test_an_element_goes_back_under_the_array_and_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # of the last element it is the id of the whole array
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "18")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert requeue.own_job() == ("18_2", 4)


def restarted(monkeypatch: pytest.MonkeyPatch, controller: Controller, restart: int) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    controller.says("RUNNING", restarts=restart, silent=1)


def test_a_killed_rank_is_retried_until_nothing_is_gained(
    run: RunFolder, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    for restart in range(4):
        write_attempt(run.path, "pretrain", how=None, number=restart + 1, job_id="17")
        restarted(monkeypatch, controller, restart)
        requeue.after_crash(run.path, 3)
        end = read_attempts(run.job("pretrain"))[-1].end
        assert end is not None
        assert end["how"] == "crashed"
    assert len(controller.requeued) == 3, "four crashes without a checkpoint are one more than three"


def test_preemptions_with_progress_are_not_held_against_a_crash_during_start_up(
    run: RunFolder, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 6):
        write_attempt(run.path, "pretrain", how="requeued", number=number, job_id="17", progress=10 * number)
    write_json(run.checkpoints / "step-00000060.json", {})
    restarted(monkeypatch, controller, 5)  # and this one came to an end before it held the lease
    requeue.after_crash(run.path, 0 + 1)
    assert controller.requeued == ["17"]


def test_what_must_fail_again_is_not_retried(
    run: RunFolder, controller: Controller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_attempt(run.path, "pretrain", how="failed", job_id="17")
    record_failure(folder, "17-0", 1, ValueError("data.train is not packed"), permanent=True)
    requeue.after_crash(run.path, 3)
    assert controller.requeued == []
    assert "data.train is not packed" in caplog.text


def test_a_job_that_was_refused_the_lease_fails_and_its_holder_is_not_blamed(
    run: RunFolder, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_attempt(run.path, "pretrain", how=None, job_id="16")  # alive, of an earlier submission
    record_failure(folder, "17-0", 0, LeaseHeldError("in the hands of job 16"), permanent=True)
    requeue.after_crash(run.path, 3)
    assert controller.requeued == []
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
