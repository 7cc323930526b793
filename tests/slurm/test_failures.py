"""A chain of which a stage fails: what depends on it does not run, and the next launch goes on from what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.chain import Run
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(900)  # of which it needs a tenth on a machine of its own


def test_a_failed_pretraining_starts_no_sweep_and_is_mended_by_the_next_launch(
    cluster: Cluster, tmp_path: Path
) -> None:
    stages = "stages=[prepare,pretrain,finetune,selection,report]"
    run = Run(cluster, tmp_path, stages, "baseline.min_trials=0", "finetune.sweep.epochs=[2]", name="broken")
    run.launch("optimizer.peak_lr=1e30")
    states = run.wait_over()
    assert states["pretrain"] == "FAILED"
    assert len(run.attempts("pretrain")) == 1, "it would fail again"
    assert states["finetune/lr=0.1,epochs=2"] == states["selection"] == "CANCELLED"
    assert not (run.path / "finetune").exists()
    assert states["report"] == "COMPLETED", "when it is needed most"
    assert "The loss is" in run.log("pretrain")

    sweep = "finetune.sweep.learning_rate=[0.1,1e30]"  # the second cannot succeed
    again = "stages=[pretrain,finetune,selection]"
    run.launch(again, sweep, "accept_changes=[optimizer.peak_lr,finetune.sweep.learning_rate]")
    states = run.wait_over()
    assert {job for job, state in states.items() if state != "COMPLETED"} == {"finetune/lr=1e+30,epochs=2"}
    selected = json.loads((run.path / "selected.json").read_text())
    assert selected["trial"] == "lr=0.1,epochs=2"
    assert "lr=1e+30,epochs=2" in str(selected["missing"])
