"""A launch in a terminal of 80 columns: what a person sees from the first second on, and what Ctrl-C leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.launching import command, environment, launch
from tests.terminal import Terminal

STAGES = "stages=[prepare,pretrain]"
STOPPED = (
    r"interrupted: pretrain stopped on request after step (\d+), which is saved; the same command goes on from there"
)


def test_it_says_what_it_does_before_the_first_step_and_shows_the_score(tmp_path: Path) -> None:
    with Terminal(command(tmp_path, STAGES), env=environment(), folder=tmp_path) as terminal:
        left = terminal.end()
        frames = terminal.frames()
    assert terminal.process.returncode == 0, left
    said = list(dict.fromkeys(line.partition(",")[0] for line in frames if ": " in line and "━" not in line))
    assert said.index("launch: reading the config and what it names") < said.index("pretrain: loading PyTorch")
    assert any(re.match(r"pretrain: PAWS-NN \d+\.\d %, loss ", line) for line in frames)
    assert any(re.search(r"steps  elapsed \d:\d\d:\d\d  left \d:\d\d:\d\d$", line) for line in frames)
    assert max(map(len, frames)) <= 80
    assert re.match(
        r"pretrain: 20 of 20 steps in \d:\d\d:\d\d, PAWS-NN ", next(line for line in left if "steps" in line)
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_on_all_ranks_and_leaves_one_line(tmp_path: Path, ranks: int) -> None:
    long = ("pretrain.epochs=200", "pretrain.checkpoint_every_steps=100000", "pretrain.validate_every_epochs=100")
    resources = f"resources.pretrain.tasks_per_node={ranks}"
    with Terminal(command(tmp_path, STAGES, resources, *long), env=environment(), folder=tmp_path) as terminal:
        terminal.wait_for("loss ")  # of the first steps
        terminal.press_ctrl_c()
        left = terminal.end()
    assert terminal.process.returncode == 130, left
    told = re.fullmatch(STOPPED, left[-1])
    assert told is not None, left
    assert [line for line in left[:-1] if not line.startswith(("packing ", "looking at "))] == [], "those take long"
    (saved,) = (tmp_path / "runs/run/pretrain/checkpoints").glob("*.pt")
    assert saved.name == f"step-{int(told[1]):08d}.pt"
    assert '"interrupted"' in (tmp_path / "runs/run/jobs/pretrain/end-0001.json").read_text()


def test_ctrl_c_while_ranks_start_is_not_lost(tmp_path: Path) -> None:
    resources = "resources.pretrain.tasks_per_node=2"
    with Terminal(command(tmp_path, STAGES, resources), env=environment(), folder=tmp_path) as terminal:
        terminal.wait_for("pretrain: 2 ranks, logs in")
        terminal.press_ctrl_c()
        left = terminal.end()
    assert terminal.process.returncode == 130, left
    assert len(left) == 1, left
    early = "interrupted: pretrain stopped on request before its first step; the same command goes on from there"
    assert left[0] == early or re.fullmatch(STOPPED, left[0]), left
    done = launch(tmp_path, STAGES, resources)
    assert done.returncode == 0, done.stderr
