"""Metrics survive kills and restarts as one unbroken curve."""

from __future__ import annotations

import json
import math
import os
from itertools import groupby
from pathlib import Path

import pytest

from paws_hpc.engine.config import TrackingConfig
from paws_hpc.engine.event_file import TensorboardTracker
from paws_hpc.engine.tracking import MetricsFile, Tracker, Trackers, read_rows
from paws_hpc.engine.wandb_run import position, summarise
from paws_hpc.metrics import COMMON
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.stages.trackers import settings
from tests.conftest import Stores
from tests.tiny import tiny_config

BEST = {metric.pattern: metric.best for metric in COMMON}


def log_steps(path: Path, start: int, stop: int) -> None:
    with MetricsFile(path, resume_step=start) as metrics:
        for step in range(start, stop):
            metrics.log(step, {"train/loss": step / 7})
            if step % 3 == 2:
                metrics.log(step, {"val/top1": 0.1 * step})


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
    assert [row["step"] for row in whole if "val/top1" in row] == [2, 5]
    for _ in range(2):
        with MetricsFile(tmp_path / "metrics.jsonl", resume_step=6, awaits_validation=True):
            pass
        assert read_rows(tmp_path / "metrics.jsonl") == whole[:-1]


def test_every_row_is_on_disk_at_once_and_a_new_run_takes_nothing_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, 0, 5)
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.log(0, {"train/loss": 1.0})
        assert read_rows(path) == [{"step": 0, "train/loss": 1.0}]


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
        metrics.log(3, {"train/loss": math.nan, "train/grad_norm": -math.inf, "train/lr": 0.5, "event": "collapse"})
    with MetricsFile(path, resume_step=10):
        pass
    parsed = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert parsed == {"step": 3, "train/loss": "nan", "train/grad_norm": "-inf", "train/lr": 0.5, "event": "collapse"}
    assert math.isnan(float(parsed["train/loss"]))


def test_several_trackers_get_every_row_and_are_all_closed(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files = [MetricsFile(path, resume_step=0) for path in paths]
    with Trackers(*files, Tracker()) as trackers:
        trackers.log(0, {"train/loss": 1.0})
    assert [read_rows(path) for path in paths] == [[{"step": 0, "train/loss": 1.0}]] * 2
    for file in files:
        with pytest.raises(ValueError, match="closed file"):
            file.log(1, {})


def test_every_row_of_a_step_has_a_step_of_its_own_in_weights_and_biases() -> None:
    rows = [{"step": 4, "train/loss": 1.0}, {"step": 4, "event": "collapse"}, {"step": 4, "val/paws_nn_top1": 0.5}]
    steps = [position(row) for row in [*rows, {"step": 5, "train/loss": 1.0}]]
    assert steps == sorted(set(steps))


def test_a_summary_is_of_all_rows_and_knows_what_is_not_a_number() -> None:
    rows = [{"step": n, "epoch": 1, "train/loss": loss} for n, loss in enumerate((3.0, "nan", 1.0, 2.0))]
    assert summarise(rows, BEST)["train/loss"] == {"last": 2.0, "min": 1.0, "mean": 2.0}
    assert math.isnan(summarise(rows[:2], BEST)["train/loss"]["last"])
    memory = [{"step": n, "gpu/node0/memory_gb": taken} for n, taken in enumerate((20.0, 40.0, 30.0))]
    assert summarise(memory, BEST)["gpu/node0/memory_gb"] == {"last": 30.0, "max": 40.0, "mean": 30.0}
    kept = summarise([{"step": 0, "val/top1": 0.5}, {"step": 1, "val/top1": 0.25}], BEST)["val/top1"]
    assert kept == {"last": 0.25, "max": 0.5, "mean": 0.375}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("{home}", "…/~"),
        ("{home}/x y/z", "…/z"),
        ("file://{home}/x/y", "file:…/y"),
        ("--opt={home}/y", "--opt=…/y"),
        ("runs/../../..{home}", "…/~"),
        ("a={home}/x:/scratch/ann/y,b=1", "a=…/x:…/y,b=1"),
        ("/cluster/home/bob", "…/~"),
        ("file:///Users/bob/x", "file:…/x"),
        ("$SCRATCH/ann/x", "…/x"),
        ("digits/train", "digits/train"),
        ("https://example.org/a/b?c=1", "https://example.org/a/b?c=1"),
    ],
)
def test_weights_and_biases_is_told_no_folder_that_a_path_leads_through(
    told: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "people of the lab" / "ann"
    monkeypatch.setenv("HOME", str(home))
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    config.data.copy_to = told.format(home=home)
    config.tracking.tags = [config.data.copy_to]
    assert settings(config)["data"]["copy_to"] == shown
    assert settings(config)["tracking"]["tags"] == [shown]


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
                tracker.log(step, {"train/loss": math.nan if step == 4 else step / 7, "event": "text"})
                if step % 3 == 2:
                    tracker.log(step, {"val/top1": 0.1 * step})
    return events


def test_tensorboard_shows_one_unbroken_curve_of_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    killed = [
        log_with_tensorboard(tmp_path, 0, 9),
        log_with_tensorboard(tmp_path, 6, 8, awaits_validation=True),
        log_with_tensorboard(tmp_path, 6, 12),
    ]
    rows = read_rows(tmp_path / "metrics.jsonl")
    for tag in ("train/loss", "val/top1"):
        shown = tensorboard_curve(tmp_path / "tensorboard", tag)
        assert [step for step, _ in shown] == [row["step"] for row in rows if tag in row]
        assert [value for _, value in shown] == pytest.approx(
            [float(row[tag]) for row in rows if tag in row], rel=1e-6, nan_ok=True
        )
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    for events in killed:
        events.close(None)


def test_tensorboard_that_cannot_write_is_told_once_and_never_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "file").touch()
    with TensorboardTracker(tmp_path / "file" / "below", metrics=tmp_path / "metrics.jsonl") as tracker:
        tracker.log(0, {"train/loss": 1.0})
    full = tmp_path / "full"
    with TensorboardTracker(full, metrics=tmp_path / "metrics.jsonl") as tracker:
        tracker._records._writer.close()  # as a disk that went away
        for step in range(3):
            tracker.log(step, {"train/loss": 1.0})
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


@pytest.mark.parametrize("row", ['{"stfp": 3}', '{"step": "3"}', '{"step": null}'])
def test_a_row_without_a_step_is_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{row}\n{{"step": 5}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 has no step"):
        read_rows(path)


def test_rows_are_on_disk_before_the_checkpoint_that_counts_on_them(
    digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a run goes on from its checkpoint, and rows before it are never made again."""
    synced, fsync = list[tuple[str, int]](), os.fsync
    run = RunFolder(tmp_path / "run")

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.stat().st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    config.pretrain.checkpoint_every_steps = 4
    pretrain.run(TorchContext(config, run))
    sizes = [size for name, size in synced if name == "metrics.jsonl"]
    order = [name for name, _ in synced if name == "metrics.jsonl" or ".pt." in name]
    written = [name for name, _ in groupby(order)]  # a checkpoint is synced twice, before and after its fence
    assert written[::2] == ["metrics.jsonl"] * len(sizes)
    assert len(written) == 2 * len(sizes) >= 6
    assert sorted(set(sizes)) == sizes, "each has rows that the one before had not"
    assert sizes[-1] == (run.pretrain / "metrics.jsonl").stat().st_size
