"""Jobs that crash or cannot write: what cannot succeed is not tried again, says why, and loses nothing."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import cannot_run
from tests.slurm.chain import Run
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(900)  # of which they need a tenth on a machine of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crashes")


def test_a_rank_that_is_killed_again_and_again_without_progress_ends_the_job(cluster: Cluster, folder: Path) -> None:
    endless = ("stages=[prepare,baseline]", "baseline.sweep.epochs=[5000]", "restarts_without_progress=1")
    run = Run(cluster, folder, *endless, "baseline.validate_every_epochs=5000", name="killed-again")
    run.launch()
    baseline = "baseline/lr=0.1,epochs=5000"
    for start in (1, 2):
        run.wait_start(baseline, start)
        run.signal_rank(baseline, 0, signal.SIGKILL)
    assert run.wait_over()[baseline] == "FAILED"
    assert run.ends(baseline) == ["crashed", "crashed"]
    assert "2 times in a row without getting past step 0" in run.log(baseline)


def test_a_full_disk_fails_clearly_and_loses_nothing(cluster: Cluster, folder: Path) -> None:
    forty_steps = ("stages=[prepare,pretrain]", "pretrain.epochs=4")
    run = Run(cluster, folder, *forty_steps, "pretrain.checkpoint_every_steps=10", name="full")
    run.path.mkdir(parents=True)
    with mounted(run.path, megabytes=8):
        run.launch()
        run.wait_rows("pretrain", 12)
        fill(run.path)
        states = run.wait_over()
        assert states["pretrain"] == "FAILED"
        assert "No space left on device" in run.log("pretrain")
        assert len(run.attempts("pretrain")) == 1

        (run.path / "filler").unlink()
        run.launch()
        run.wait_done()
        assert [row["step"] for row in run.rows("pretrain") if "train/loss" in row] == list(range(40))
        assert run.attempts("pretrain")[1].progress == 10


def fill(folder: Path) -> None:
    """Write until the disk is full."""
    with open(folder / "filler", "wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))


@contextmanager
def mounted(path: Path, *, megabytes: int) -> Iterator[None]:
    """A small file system of its own at ``path``."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        cannot_run(f"No file system can be mounted here: {done.stderr.strip()}", without="slurm")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
