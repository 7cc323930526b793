"""What status says of runs without Slurm: from markers, attempts and heartbeats, whole files and broken ones."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from paws_hpc import status
from paws_hpc.cluster.inventory import Partition
from paws_hpc.cluster.overview import RunOverview, grace_warnings, overviews, span
from paws_hpc.cluster.traces import JobProgress
from paws_hpc.files import write_json
from paws_hpc.stages.attempts import record_failure
from tests.attempts import write_attempt

CONFIG = """\
stages: [prepare, pretrain, finetune, selection, report]
pretrain: {epochs: 10, batch_size: 100}
finetune: {sweep: {learning_rate: [0.1, 1.0e-05], epochs: [2]}, batch_size: 20}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was begun; no Slurm can be asked."""
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "runs" / "first"
    write_json(folder / "chain.json", {"name": "first", "id": "0123abcd", "created": "2026-01-02", "submissions": []})
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def look(run: Path) -> RunOverview:
    return overviews([run], details=True)[0]


def states(run: Path) -> dict[str, str]:
    return {job.job: job.state for job in look(run).jobs}


def lines(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What the command prints of a run where there is no terminal."""
    capsys.readouterr()
    assert status.main([str(run), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def submit(run: Path, **ids: str) -> None:
    jobs = [{"job": job, "job_id": job_id, "notice_s": 60.0} for job, job_id in ids.items()]
    chain = json.loads((run / "chain.json").read_text())
    write_json(run / "chain.json", chain | {"submissions": [{"time": "2026-01-02T03:00:00+00:00", "jobs": jobs}]})


def beat(folder: Path, *, ago_s: float) -> None:
    when = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat()
    write_json(folder / "beat-0001.json", {"beat": 3, "time": when})


def train(folder: Path, *, steps: int, per_epoch: int, rate: float = 200.0) -> None:
    rows = [{"step": step, "epoch": (step + 1) / per_epoch, "train/images_per_s": rate} for step in range(steps)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_was_only_begun_has_all_its_jobs_before_it(run: Path) -> None:
    assert states(run) == dict.fromkeys(
        ["prepare", "pretrain", "finetune/lr=0.1,epochs=2", "finetune/lr=1e-05,epochs=2", "selection", "report"],
        "not started",
    )
    assert look(run).state == "not started"


def test_a_beating_heart_runs_and_a_stopped_one_is_silent(run: Path) -> None:
    folder = write_attempt(run, "pretrain", how=None)
    beat(folder, ago_s=12)
    assert look(run).state == "running"
    beat(folder, ago_s=300)
    job = look(run).jobs[1]
    assert (job.state, job.reason, job.source) == ("silent", "silent for 5 min", "attempts")


def test_progress_tells_total_rate_and_time_left_to_programs_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(write_attempt(run, "pretrain", how=None), ago_s=0)
    train(run / "pretrain", steps=30, per_epoch=12)
    write_json(run / "pretrain" / "checkpoints" / "step-00000024.json", {"step": 24, "seconds": 1.5})
    progress = look(run).jobs[1].progress
    assert progress is not None
    assert (progress.step, progress.saved_step, progress.total_steps, progress.save_s) == (30, 24, 120, 1.5)
    assert progress.seconds_left == pytest.approx(90 * 100 / 200)
    value = json.loads("\n".join(lines(run, capsys, "--json")))
    assert (value["format"], value["name"], value["jobs"][0]["job"]) == (1, "first", "prepare")
    assert value["jobs"][1]["progress"]["seconds_left"] == pytest.approx(45.0)


def test_a_trial_that_is_cross_validated_shows_how_far_its_fold_is(run: Path) -> None:
    for fold, steps in ((1, 4), (2, 3)):
        train(run / "finetune" / "lr=0.1,epochs=2" / f"fold-{fold}", steps=steps, per_epoch=2)
    progress = look(run).jobs[2].progress
    assert progress is not None
    assert (progress.step, progress.total_steps) == (3, 4)


def test_a_sweep_whose_labels_fit_in_one_batch_gives_no_false_time(run: Path) -> None:
    train(run / "finetune" / "lr=0.1,epochs=2", steps=1, per_epoch=1)
    progress = look(run).jobs[2].progress
    assert progress is not None
    assert (progress.total_steps, progress.seconds_left) == (2, None)


def test_a_failed_job_shows_the_rank_that_failed_first_and_its_log(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_attempt(run, "pretrain", how="failed", job_id="17")
    submit(run, pretrain="17")
    record_failure(folder, "17-0", 1, ValueError("the disk is full"), permanent=True)
    record_failure(folder, "17-0", 0, RuntimeError("connection closed by peer"), permanent=False)
    log = run / "logs" / "pretrain" / "17_1_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert (look(run).state, look(run).jobs[1].state) == ("failed", "failed")
    text = "\n".join(lines(run, capsys))
    assert "pretrain failed (rank 1" in text
    assert "ValueError: the disk is full" in text
    assert "line 99" in text


def test_without_slurm_a_submitted_chain_says_so(run: Path) -> None:
    submit(run, prepare="16", pretrain="17")
    overview = look(run)
    assert [job.state for job in overview.jobs[:2]] == ["submitted", "submitted"]
    assert overview.trouble is not None
    assert "squeue is not installed here" in overview.trouble
    beat(write_attempt(run, "pretrain", how=None, job_id="17"), ago_s=0)
    assert look(run).jobs[1].state == "running"


def test_a_start_of_an_earlier_submission_says_nothing_of_this_one(run: Path) -> None:
    write_attempt(run, "pretrain", how="failed", job_id="11")
    submit(run, pretrain="17")
    assert look(run).jobs[1].state == "submitted"


@pytest.mark.parametrize(
    ("file", "value"),
    [
        *(("result.json", {"test": test}) for test in (None, [], 3, "text", {"fine_tuned": []}, {"fine_tuned": None})),
        *(("result.json", {"test": {"fine_tuned": {"top1": top1}}}) for top1 in (None, "0.9", [1], {}, True)),
        *(("result.json", value) for value in ([], None, "text")),
        *(
            ("chain.json", {"name": "first", "id": "1", "submissions": made})
            for made in (None, 3, [None], [{"jobs": 7}])
        ),
        *(("chain.json", {"name": value, "folder": value, "created": value}) for value in ([], {}, 3)),
        (
            "chain.json",
            {"name": "first", "submissions": [{"jobs": [{"job": "pretrain", "job_id": [1], "partition": []}]}]},
        ),
        ("config.yaml", {"stages": 5}),
        ("config.yaml", {"stages": [[], {}], "finetune": {"sweep": 3}, "pretrain": [1]}),
        ("jobs/pretrain/start-0001.json", []),
        ("jobs/pretrain/start-0001.json", {"attempt": "x", "began": 3}),
        ("pretrain/checkpoints/step-00000001.json", []),
        ("pretrain/metrics.jsonl", 3),
    ],
)
def test_one_damaged_run_hides_no_other(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, value: object
) -> None:
    write_json(run.parent / "second" / "chain.json", {"name": "second", "id": "4567", "submissions": []})
    write_json(run / file, value)
    assert status.main(["--runs", str(run.parent)]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert len(listed) >= 2
    assert any(line.startswith("second") for line in listed)
    assert status.main([str(run)]) == 0
    assert status.main([str(run), "--json"]) == 0


def test_markers_say_done_whatever_else_is_there(run: Path) -> None:
    write_attempt(run, "pretrain", how="failed")
    for marker in ("prepare/DONE", "pretrain/DONE", "result.json", "report/index.html"):
        (run / marker).parent.mkdir(parents=True, exist_ok=True)
        (run / marker).write_text("{}")
    assert [job.job for job in look(run).jobs if job.state != "done"] == [
        "finetune/lr=0.1,epochs=2",
        "finetune/lr=1e-05,epochs=2",
    ]


def test_a_result_from_before_this_submission_is_not_its_result(run: Path) -> None:
    (run / "result.json").write_text("{}")
    submit(run, selection="19")
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    chain = json.loads((run / "chain.json").read_text())
    chain["submissions"][0]["time"] = tomorrow
    write_json(run / "chain.json", chain)
    assert next(job.state for job in look(run).jobs if job.job == "selection") == "submitted"


def test_attempts_that_get_no_further_make_a_note(run: Path) -> None:
    for number in (1, 2, 3):
        folder = write_attempt(run, "pretrain", how="crashed", number=number, progress=24)
    record_failure(folder, "local-2", 0, RuntimeError("NCCL"), permanent=False)
    assert "does not advance: the last 3 attempts all began at step 24" in look(run).jobs[1].notes
    write_attempt(run, "pretrain", how="crashed", number=4, progress=48)
    assert not any("advance" in note for note in look(run).jobs[1].notes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chain.json", "{"),
        ("chain.json", "[1, 2]"),
        ("config.yaml", "pretrain: [unclosed"),
        ("config.yaml", "- a list"),
        ("pretrain/metrics.jsonl", '{"step": 3, "epoch"'),
        ("pretrain/checkpoints/step-00000003.json", "torn"),
        ("pretrain/DONE", ""),
        ("jobs/pretrain/start-0001.json", '{"job": "pretrain"}'),
        ("jobs/pretrain/start-0001.json", "torn"),
    ],
)
def test_a_broken_file_makes_no_traceback(run: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(text)
    assert status.main([str(run)]) == 0
    assert "first" in capsys.readouterr().out


def test_an_empty_folder_is_no_run_and_near_names_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["frist", "--runs", str(run.parent)]) == 1
    assert "Did you mean first?" in capsys.readouterr().err


def test_every_run_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(write_attempt(run, "pretrain", how=None), ago_s=0)
    train(run / "pretrain", steps=30, per_epoch=12)
    assert status.main(["--runs", str(run.parent)]) == 0
    words = capsys.readouterr().out.splitlines()[1].split()
    assert words == ["first", "2026-01-02", "running", "pretrain", "30/120", "200", "45", "s"]


@pytest.mark.parametrize("width", [80, 140])
def test_on_a_terminal_a_run_is_a_table_that_fits_its_width(
    run: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beat(write_attempt(run, "pretrain", how=None), ago_s=0)
    train(run / "pretrain", steps=30, per_epoch=12)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines(run, capsys)]
    assert any("pretrain" in line and "30/120" in line for line in shown)
    assert max(map(len, shown)) <= width


def test_many_trials_alike_are_one_line_unless_all_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ", ".join(str(0.1 * number) for number in range(1, 9))
    (run / "config.yaml").write_text(CONFIG.replace("0.1, 1.0e-05", rates))
    assert any(line.startswith("finetune: 8 trials") for line in lines(run, capsys))
    assert sum(line.startswith("finetune/") for line in lines(run, capsys, "--all")) == 8


PARTITION = Partition("low", "UP", True, 10.0, "REQUEUE", None, None, None, None, ())
SETTINGS = {"PreemptType": "preempt/partition_prio", "KillWait": "5 sec"}


def test_too_little_time_to_save_makes_a_warning_with_the_measured_figures() -> None:
    def warn(save_s: float | None, signal_delay_s: float) -> list[str]:
        return grace_warnings("pretrain", JobProgress(save_s=save_s, step_s=2.0), PARTITION, SETTINGS, signal_delay_s)

    assert warn(6.0, 60.0) == []  # 14 s of the 15 s that GraceTime and KillWait leave
    assert warn(None, 1.0) == []
    (text,) = warn(20.0, 60.0)
    assert "may need 42.0 s to save" in text
    assert "leaves a preempted job 15 s" in text
    assert len(warn(20.0, 20.0)) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (89, "89 s"), (120, "2 min"), (3900, "1 h 05 min"), (190000, "2 d 04 h")],
)
def test_spans_read_as_people_say_them(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_what_files_of_a_run_say_cannot_steer_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(run / "chain.json", {"name": "first", "created": "\x1b]0;owned\x07", "submissions": []})
    (run / "config.yaml").write_text('stages: ["\\e[2Jgone"]\n')
    (run / "jobs" / "a\x1b[31m").mkdir(parents=True)
    write_json(run / "jobs" / "a\x1b[31m" / "start-0001.json", {"time": "2026-01-02T03:00:00+00:00"})
    for arguments in ([str(run)], ["--runs", str(run.parent)]):
        capsys.readouterr()
        assert status.main(arguments) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "first" in shown
