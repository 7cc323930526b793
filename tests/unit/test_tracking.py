"""Metrics survive kills and restarts as one unbroken curve, and Weights & Biases can fail without being noticed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paws_hpc.engine.config import TrackingConfig
from paws_hpc.engine.event_file import TensorboardTracker
from paws_hpc.engine.tracking import MetricsFile, NullTracker, Trackers, read_rows
from tests.ranks import ROOT


def log_steps(path: Path, start: int, stop: int) -> None:
    with MetricsFile(path, resume_step=start) as metrics:
        for step in range(start, stop):
            metrics.log(step, {"loss": step / 7})
            if step % 3 == 2:
                metrics.log(step, {"validation": 0.1 * step})


def test_a_resumed_curve_is_the_curve_of_an_uninterrupted_run(tmp_path: Path) -> None:
    log_steps(tmp_path / "whole.jsonl", 0, 12)
    path = tmp_path / "metrics.jsonl"
    log_steps(path, 0, 9)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 9, "lo')  # the kill came in the middle of a line
    log_steps(path, 6, 12)  # the newest checkpoint is of step 6: rows of steps 6 to 8 are written again
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_validation_that_is_to_be_done_again_leaves_no_row(tmp_path: Path) -> None:
    """The checkpoint of step 6 is from before the validation after it, whose row may be there or not."""
    log_steps(tmp_path / "whole.jsonl", 0, 6)
    log_steps(tmp_path / "metrics.jsonl", 0, 7)
    whole = read_rows(tmp_path / "whole.jsonl")
    assert [row["step"] for row in whole if "validation" in row] == [2, 5]
    for _ in range(2):
        with MetricsFile(tmp_path / "metrics.jsonl", resume_step=6, awaits_validation=True):
            pass
        assert read_rows(tmp_path / "metrics.jsonl") == whole[:-1]


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.log(0, {"loss": 1.0})
        assert read_rows(path) == [{"step": 0, "loss": 1.0}]


def test_a_new_run_takes_nothing_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, 0, 5)
    log_steps(path, 0, 1)
    assert len(read_rows(path)) == 1


def test_a_torn_line_in_the_middle_is_named_and_the_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON .*Restore the file or remove it"):
        MetricsFile(path, resume_step=2)
    assert path.read_bytes() == before


def test_values_that_json_has_not_are_kept_as_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.log(3, {"loss": math.nan, "gradient": -math.inf, "fine": 0.5, "event": "collapse"})
    with MetricsFile(path, resume_step=10):
        pass
    parsed = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert parsed == {"step": 3, "loss": "nan", "gradient": "-inf", "fine": 0.5, "event": "collapse"}
    assert math.isnan(float(parsed["loss"]))


def test_several_trackers_get_every_row_and_are_all_closed(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files = [MetricsFile(path, resume_step=0) for path in paths]
    with Trackers(*files, NullTracker()) as trackers:
        trackers.log(0, {"loss": 1.0})
    assert [read_rows(path) for path in paths] == [[{"step": 0, "loss": 1.0}]] * 2
    for file in files:
        with pytest.raises(ValueError, match="closed file"):
            file.log(1, {})


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which W&B was used by a user who is not logged in, where nobody answers."""
    folder = tmp_path_factory.mktemp("wandb")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.wandb_session", str(folder)],
        cwd=ROOT,
        env=env,
        check=False,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return folder


@pytest.fixture
def report(session: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((session / "report.json").read_text())
    return value


def by_step(rows: list[dict[str, Any]]) -> dict[int, dict[str, str]]:
    """Rows of one step as one, values as text (NaN is not equal to itself), without W&B's own fields."""
    joined: dict[int, dict[str, str]] = {}
    for row in rows:
        values = {name: str(float(value)) for name, value in row.items() if name != "step" and name[0] != "_"}
        joined.setdefault(row.get("step", row.get("_step")), {}).update(values)
    return joined


def test_an_offline_run_holds_what_the_metrics_file_holds(session: Path, report: dict[str, Any]) -> None:
    first, second = report["runs"]["segments"]
    assert first["id"] == second["id"] == "chain-pretrain"
    assert first["group"] == "chain"
    assert first["config"]["optimizer"] == {"peak_lr": 6.4}
    assert {row["_step"] for row in first["rows"]} == set(range(6))
    assert {row["_step"] for row in second["rows"]} == set(range(4, 8))
    watched = by_step(first["rows"] + second["rows"])
    for step, row in watched.items():
        assert row.pop("trainer/step") == str(float(step))
    assert watched == by_step(read_rows(session / "segments" / "metrics.jsonl"))
    assert len(watched) == 8


def test_a_preempted_run_is_left_as_one_that_goes_on(report: dict[str, Any]) -> None:
    (run,) = report["runs"]["preempted"]
    assert (run["id"], run["preempting"], len(run["rows"])) == ("preempted", True, 1)
    assert run["exit_code"] != 0, "else it would count as finished"
    assert report["messages"]["preempted"] == []
    for segment in report["runs"]["segments"]:
        assert "preempting" not in segment
        assert segment["exit_code"] == 0


def test_a_service_that_does_not_answer_does_not_hold_up_a_job_that_must_leave(report: dict[str, Any]) -> None:
    assert 1.0 <= report["seconds"] < 3.0


@pytest.mark.parametrize("what", ["online without a key", "unwritable", "killed", "silent"])
def test_a_failure_is_told_once_and_never_raised(report: dict[str, Any], what: str) -> None:
    """That the session ended without a traceback says that none of them was raised."""
    assert len(report["messages"][what]) == 1
    assert "Weights & Biases is off from here on: it could not" in report["messages"][what][0]


def test_after_its_service_was_killed_the_next_stage_has_weights_and_biases_again(report: dict[str, Any]) -> None:
    assert [(run["id"], len(run["rows"])) for run in report["runs"]["killed"] if "id" in run][-1] == ("next", 1)


def test_who_is_not_logged_in_gets_an_offline_run_without_a_word(report: dict[str, Any]) -> None:
    assert report["messages"]["auto, not logged in"] == report["messages"]["fine"] == []
    assert [run["id"] for run in report["runs"]["auto"]] == ["auto"]


def test_who_is_logged_in_where_nobody_answers_waits_once_and_loses_nothing(report: dict[str, Any]) -> None:
    (told,) = report["messages"]["unreachable"]
    assert "cannot be reached, so runs are kept offline" in told
    # An attempt to go online that was given up may leave a file that holds nothing.
    kept = [(run["id"], len(run["rows"])) for run in report["runs"]["unreachable"] if run["rows"]]
    assert kept == [("first", 1), ("second", 1)]


def test_training_is_the_same_with_and_without_it(report: dict[str, Any]) -> None:
    without, with_it = report["weights"]
    assert without == with_it
    assert len(without) > 500


def tensorboard_curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log_with_tensorboard(folder: Path, start: int, stop: int, *, awaits_validation: bool = False) -> TensorboardTracker:
    """As ``log_steps``, and left without closing the event file, as a kill leaves it."""
    path = folder / "metrics.jsonl"
    with MetricsFile(path, resume_step=start, awaits_validation=awaits_validation) as metrics:
        events = TensorboardTracker(folder / "tensorboard", metrics=path)
        for tracker in (metrics, events):
            for step in range(start, stop):
                tracker.log(step, {"loss": math.nan if step == 4 else step / 7, "event": "text"})
                if step % 3 == 2:
                    tracker.log(step, {"validation": 0.1 * step})
    return events


def test_tensorboard_shows_one_unbroken_curve_of_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    killed = [
        log_with_tensorboard(tmp_path, 0, 9),
        log_with_tensorboard(tmp_path, 6, 8, awaits_validation=True),
        log_with_tensorboard(tmp_path, 6, 12),
    ]
    rows = read_rows(tmp_path / "metrics.jsonl")
    for tag in ("loss", "validation"):
        shown = tensorboard_curve(tmp_path / "tensorboard", tag)
        assert [step for step, _ in shown] == [row["step"] for row in rows if tag in row]
        assert [value for _, value in shown] == pytest.approx(
            [float(row[tag]) for row in rows if tag in row], rel=1e-6, nan_ok=True
        )
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    for events in killed:
        events.__exit__(None, None, None)


def test_tensorboard_that_cannot_write_is_told_once_and_never_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "file").touch()
    with TensorboardTracker(tmp_path / "file" / "below", metrics=tmp_path / "metrics.jsonl") as tracker:
        tracker.log(0, {"loss": 1.0})
    full = tmp_path / "full"
    with TensorboardTracker(full, metrics=tmp_path / "metrics.jsonl") as tracker:
        tracker._records._writer.close()  # as a disk that went away
        for step in range(3):
            tracker.log(step, {"loss": 1.0})
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        "TensorBoard is off from here on: it could not start",
        "TensorBoard is off from here on: it could not log",
    ]


def test_tensorboard_that_is_not_installed_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    TrackingConfig(tensorboard=True).check_installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    TrackingConfig().check_installed()
    with pytest.raises(ValueError, match=r"tracking\.tensorboard=true needs .* pip install 'paws-hpc\[tensorboard\]'"):
        TrackingConfig(tensorboard=True).check_installed()
