"""A run that is killed at any moment and launched again ends with the same weights, to the bit."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.integration.launching import command, environment, launch

STAGES = "stages=[prepare,pretrain]"
LAST = "step-00000020.pt"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "runs/run/pretrain/checkpoints" / LAST, weights_only=True)
    momentum = {f"momentum.{i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    return state["encoder"] | momentum


def curve(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "runs/run/pretrain/metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("throughput/")}
        for line in lines
    ]


def kill_after(folder: Path, steps: int) -> None:
    """Launch, and SIGKILL the process as soon as it has logged that many steps."""
    metrics = folder / "runs/run/pretrain/metrics.jsonl"
    process = subprocess.Popen(
        command(folder, STAGES), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > steps):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


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

    expected, found = weights(uninterrupted), weights(tmp_path)
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not differing
    assert curve(tmp_path) == curve(uninterrupted), "the curve is one, without gaps, repetitions or other values"


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(uninterrupted: Path, tmp_path: Path) -> None:
    kill_after(tmp_path, 8)
    newest = max((tmp_path / "runs/run/pretrain/checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = launch(tmp_path, STAGES)
    assert done.returncode == 0, done.stderr
    assert newest.name in done.stderr, "the damaged file is named"
    assert all(
        torch.equal(a, b) for a, b in zip(weights(uninterrupted).values(), weights(tmp_path).values(), strict=True)
    )
