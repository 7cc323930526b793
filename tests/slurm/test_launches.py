"""Launching: all jobs or none, once, of the code and config of that moment; and how chains are cancelled."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.chain import ROOT, Run
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(900)  # of which it needs a tenth on a machine of its own

PRETRAINING = ("stages=[prepare,pretrain]", "pretrain.epochs=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launches")


@contextmanager
def occupied(cluster: Cluster) -> Iterator[None]:
    """Both nodes belong to somebody else for as long as the block lasts, so that jobs wait."""
    other = cluster.submit("-p", "high", "--exclusive", "-N2", "-o", "/dev/null", "--wrap", "exec sleep 600")
    cluster.wait_for(other, "RUNNING")
    try:
        yield
    finally:
        cluster.run("scancel", other)


def queued(cluster: Cluster, name: str) -> list[str]:
    """The jobs of a run that wait or run, as ``state reason``."""
    lines = cluster.run("squeue", "-h", "-r", "-o", "%j|%T %r").splitlines()
    return [state for job, state in (line.split("|") for line in lines) if job.startswith(f"{name}.")]


def test_two_launches_at_once_make_one_chain_of_the_code_and_config_of_that_moment(
    cluster: Cluster, folder: Path
) -> None:
    checkout = folder / "checkout"
    for part in ("paws_hpc", "conf"):
        shutil.copytree(ROOT / part, checkout / part)
    run = Run(cluster, folder, *PRETRAINING, name="edited", checkout=checkout)
    with occupied(cluster):
        printed: list[str] = []
        launches = [threading.Thread(target=lambda: printed.append(run.launch())) for _ in range(2)]
        for thread in launches:
            thread.start()
        for thread in launches:
            thread.join()
        assert sorted("Nothing to submit" in text for text in printed) == [False, True]
        assert len(queued(cluster, "edited")) == 2

        recipe = checkout / "conf/optimizer/sgd_small.yaml"
        assert "final_lr: 0.001" in recipe.read_text()
        recipe.write_text(recipe.read_text().replace("final_lr: 0.001", "final_lr: 0.002"))
        for module in (checkout / "paws_hpc").rglob("*.py"):
            module.write_text("raise SystemExit('this was edited while the job waited')\n")
    run.wait_done()
    rates = [row["train/lr"] for row in run.rows("pretrain") if "train/lr" in row]
    assert rates[-1] < 0.0015, "the schedule ends at 0.001, as it was when it was launched"


def test_a_launcher_killed_half_way_leaves_nothing_that_can_run_and_a_cancelled_chain_stays_cancelled(
    cluster: Cluster, folder: Path
) -> None:
    run = Run(cluster, folder, "pretrain.epochs=3000", name="killed")  # far from done when it is cancelled
    programs = killing_at_the_third_job(folder / "programs")
    killed = subprocess.run(
        run.command(),
        env={**run.environment(), "PATH": f"{programs}:{cluster.environment['PATH']}"},
        cwd=ROOT,
        check=False,
        capture_output=True,
        timeout=240,
    )
    assert killed.returncode == -signal.SIGKILL
    assert queued(cluster, "killed") == ["PENDING JobHeldUser"] * 4, "two jobs and an array of two"

    run.launch()
    assert len(queued(cluster, "killed")) == 8, "each job once: what was left over is gone"
    run.wait_rows("pretrain", 5)
    assert "cancelled" in run.launch("cancel=true")
    run.wait_over()
    assert queued(cluster, "killed") == []
    assert run.states()["pretrain"] == "CANCELLED", "asked to stop, it did not put itself back into the queue"
    assert len(run.attempts("pretrain")) == 1
    assert "no job of it was in the queue" in run.launch("cancel=true")


def killing_at_the_third_job(folder: Path) -> Path:
    """A folder with an ``sbatch`` that submits, and kills who called it when Slurm has taken the third job."""
    folder.mkdir()
    script = folder / "sbatch"
    script.write_text(
        "#!/bin/sh\n"
        f'{shutil.which("sbatch")} "$@"\n'
        f"echo >> {folder}/calls\n"
        f"[ $(wc -l < {folder}/calls) -lt 3 ] || kill -9 $PPID\n"
    )
    script.chmod(0o755)
    return folder


def test_another_number_of_tasks_than_the_config_has_fails_loudly(cluster: Cluster, folder: Path) -> None:
    several = "hydra.launcher.setup=['export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_OVERCOMMIT=1']"
    run = Run(cluster, folder, "stages=[prepare]", several, name="crowd")
    run.launch()
    assert run.wait_over() == {"prepare": "FAILED"}
    assert "resources.prepare asks for 1 ranks, but job" in run.log("prepare")
    assert "2 tasks" in run.log("prepare")
    assert "would fail again" in run.log("prepare")


def test_m_submits_a_chain_per_seed_and_a_dry_run_none(cluster: Cluster, folder: Path) -> None:
    run = Run(cluster, folder, name="dry")
    shown = run.launch("dry_run=true")
    assert "#SBATCH --dependency='afterok:<prepare>'" in shown
    assert "--kill-on-bad-exit=1" in shown
    assert not run.path.exists()
    with occupied(cluster):
        seeds = Run(cluster, folder, "stages=[prepare]", name="several-${seed}")
        seeds.launch("-m", "seed=0,1,2")
        for seed in range(3):
            assert len(queued(cluster, f"several-{seed}")) == 1
            cluster.run("scancel", *Run(cluster, folder, name=f"several-{seed}").job_ids().values())
