"""What people see of work that goes on: what happens, how far it is, how long it took and takes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from paws_hpc import progress
from paws_hpc.engine.console import ProgressTracker
from paws_hpc.progress import Progress
from tests.integration.launching import environment
from tests.terminal import Terminal


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def left_s(shown: Progress) -> int:
    (text,) = [each for each in shown._times() if each.startswith("left ")]
    hours, minutes, seconds = map(int, text.removeprefix("left ").split(":"))
    return 3600 * hours + 60 * minutes + seconds


def test_a_log_has_lines_from_the_first_image_on(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    """At most one every ten seconds; the first one may come before any image is done. And one at the end."""
    with Progress("packing photos", total=1000) as shown:
        for done in (0, 1, 1, 498):
            clock.now += 5
            shown.advance(done)
    assert capsys.readouterr().err.splitlines() == [
        "packing photos: 1 of 1,000 images, elapsed 0:00:10, left 1:23:15",
        "packing photos: 500 of 1,000 images, elapsed 0:00:20, left 0:00:15",
        "packing photos: 500 of 1,000 images in 0:00:20",
    ]


def test_what_happens_before_the_first_step_is_a_line_of_a_log_each(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pretrain", "train the encoder"):
        progress.doing("loading PyTorch")
        progress.doing("loading PyTorch")
        with Progress("hidden", show=False) as hidden:
            hidden.doing("nothing")
        with pytest.raises(ValueError, match="torn"), Progress("copying store", total=3):
            raise ValueError("torn")
    progress.doing("nothing is shown now")
    assert capsys.readouterr().err == "pretrain: loading PyTorch\n"


def test_the_time_left_counts_down_between_steps_and_up_while_one_is_late(clock: Clock) -> None:
    with Progress("pretrain", total=100, unit="steps") as shown:
        assert shown._times() == ["elapsed 0:00:00"], "nothing is known yet"
        clock.now = 500  # compiling
        for step in range(1, 11):
            clock.now += 60
            shown.reached(step)
        assert left_s(shown) == 90 * 60, "the first step is of no rate"
        clock.now += 45
        assert left_s(shown) == 90 * 60 - 45
        clock.now += 15 * 60
        assert left_s(shown) > 2 * 90 * 60


def test_the_time_left_follows_a_machine_that_becomes_slow(clock: Clock) -> None:
    """Within half a minute of slow steps, or five of them."""
    with Progress("pretrain", total=1010, unit="steps") as shown:
        for step in range(1, 1001):
            clock.now += 0.06
            shown.reached(step)
        assert left_s(shown) == 1
        clock.now += 11
        assert left_s(shown) == 11, "not less than the step has taken"
        for step in range(1001, 1007):
            shown.reached(step)
            clock.now += 11
        assert left_s(shown) == pytest.approx(3 * 11, abs=2)


def test_the_validation_score_comes_first(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    tracker = ProgressTracker("finetune/lr=0.1,epochs=30", total_steps=30, start=10)
    tracker.log(10, {"train/loss": 0.5, "train/images_per_s": 1234.0, "train/data_wait": 0.01})
    tracker.log(10, {"val/top1": 0.931})
    tracker.log(11, {"message": "Collapse: predictions are uniform.", "event": "collapse"})
    clock.now = 20
    tracker.reached(12)
    tracker.close(None)
    figures = "validation 93.1 %, loss 0.5, img/s 1,234, data wait 1.0 %"
    assert capsys.readouterr().err.splitlines() == [
        "finetune/lr=0.1,epochs=30: first step",
        "finetune/lr=0.1,epochs=30: Collapse: predictions are uniform.",
        f"finetune/lr=0.1,epochs=30: 12 of 30 steps, elapsed 0:00:20, {figures}",
        f"finetune/lr=0.1,epochs=30: 12 of 30 steps in 0:00:20, {figures}",
    ]


PROGRAM = """
import logging, sys, time
from paws_hpc.engine.console import ProgressTracker
from paws_hpc.progress import Progress
with Progress("finetune/lr=0.1,epochs=30", "fine-tune the encoder"):
    tracker = ProgressTracker("finetune/lr=0.1,epochs=30", total_steps=12345, start=0)
    time.sleep(0.5)
    for step in range(12000):
        tracker.reached(step + 1)
    row = {"train/loss": -0.4321, "train/images_per_s": 1234.0, "train/data_wait": 0.011, "val/top1": 0.931}
    tracker.log(step, row)
    print("a line of another", file=sys.stderr)
    time.sleep(0.5)
    tracker.close(KeyboardInterrupt() if "stop" in sys.argv else None)
"""


def test_a_terminal_without_the_bars_characters_has_others(tmp_path: Path) -> None:
    env = environment() | {"PYTHONIOENCODING": "latin-1"}
    with Terminal([sys.executable, "-c", PROGRAM], env=env, folder=Path(__file__).parents[2]) as terminal:
        terminal.end()
        assert any(
            line.startswith("###################- 12,000 of 12,345 steps  elapsed ") for line in terminal.frames()
        )


@pytest.mark.parametrize("stopped", [False, True])
def test_80_columns_show_the_score_and_both_times_and_keep_one_line(tmp_path: Path, stopped: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, *(["stop"] if stopped else [])]
    with Terminal(command, env=environment(), folder=Path(__file__).parents[2]) as terminal:
        left = terminal.end()
        frames = terminal.frames()
    assert "finetune/lr=0.1,epochs=30: first step" in frames
    assert any(line.startswith("finetune/lr=0.1,epochs=30: validation 93.1 %, loss -0.4321") for line in frames)
    assert any(re.search(r" 12,000 of 12,345 steps  elapsed 0:00:0\d  left 0:00:0\d$", line) for line in frames)
    assert max(map(len, frames)) <= 80
    done = "finetune/lr=0.1,epochs=30: 12,000 of 12,345 steps in 0:00:01, validation 93.1 %,"
    assert left[0] == "a line of another"
    assert [line for line in left[1:2] if not line.startswith(done)] == []
    assert (len(left) == 1) == stopped
