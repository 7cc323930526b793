"""A run that is killed at any moment and launched again ends with the same weights, to the bit."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.integration.launching import command, environment, launch
from tests.tiny import WALL_CLOCK

STAGES = "stages=[prepare,pretrain]"
LAST = "step-00000020.pt"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "runs/run/pretrain/checkpoints" / LAST, weights_only=True)
    momentum = {f"momentum.{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    return state["encoder"] | momentum


def curve(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "runs/run/pretrain/metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in WALL_CLOCK} for line in lines]


def assert_same(folder: Path, expected: Path) -> None:
    """The same weights and momentum to the bit, and one curve without gaps, repetitions or other values."""
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not torch.equal(theirs[name], ours[name])]
    assert curve(folder) == curve(expected)


def kill_after(folder: Path, steps: int, *overrides: str, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Launch, and signal the process as soon as it has logged that many steps; its status and what it said."""
    metrics = folder / "runs/run/pretrain/metrics.jsonl"
    heeding = ("env", "--default-signal=INT")  # as terminals start programs; what runs in the background ignores it
    process = subprocess.Popen(
        [*heeding, *command(folder, STAGES, *overrides)], env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > steps):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = launch(folder, STAGES)
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_twice_mid_epoch_and_launched_again_gives_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    kill_after(tmp_path, 4)  # past the checkpoint of step 3, inside the first epoch
    assert not (tmp_path / "runs/run/pretrain/DONE").exists()
    kill_after(tmp_path, 13)
    done = launch(tmp_path, STAGES)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, uninterrupted)


def test_with_two_threads_as_the_demo_has_it_gives_the_same_bits_too(tmp_path: Path) -> None:
    two = "resources.pretrain.threads_per_rank=2"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launch(whole, STAGES, two, SLURM_CPUS_PER_TASK="1")
    assert done.returncode == 0, done.stderr
    assert "resources.pretrain.threads_per_rank=2, and the cores for a rank are 1 here" in done.stderr
    kill_after(killed, 8, two)
    done = launch(killed, STAGES, two)
    assert done.returncode == 0, done.stderr
    assert_same(killed, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_person_who_stops_training_loses_no_step(number: int, uninterrupted: Path, tmp_path: Path) -> None:
    """By Ctrl-C or kill; and the chain launched again ends with the same bits."""
    rare = "pretrain.checkpoint_every_steps=1000"
    status, said = kill_after(tmp_path, 4, rare, number=number)
    assert status == 130
    told = re.search(r"interrupted: pretrain stopped on request after step (\d+), which is saved; the same", said)
    assert told is not None, said
    (saved,) = (tmp_path / "runs/run/pretrain/checkpoints").glob("*.pt")
    assert saved.name == f"step-{int(told[1]):08d}.pt"
    done = launch(tmp_path, STAGES, rare)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, uninterrupted)
