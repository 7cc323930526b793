"""Pre-training of two ranks on two nodes goes on through faults, to the bits of a run that nobody disturbed."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from paws_hpc.engine.checkpoint import load_tensors
from tests.slurm.chain import Run, assert_same_results
from tests.slurm.settings import ClusterOptions

pytestmark = pytest.mark.timeout(900)  # of which they need a sixth on a machine of their own

STEPS, HALF = 60, 30


@pytest.fixture(scope="module")
def cluster_options() -> ClusterOptions:
    """Preemption as Slurm does it unless told otherwise: by SIGTERM alone."""
    return ClusterOptions(preempt_sends_user_signal=False)


def test_signals_to_one_rank_during_import_training_and_evaluation_and_a_killed_rank(
    run: Run, undisturbed: Run
) -> None:
    run.launch()
    run.wait_shielded("pretrain", rank=1)
    assert not list((run.path / "rendezvous").glob("*.json")), "torch is still being imported"
    run.signal_rank("pretrain", 1, signal.SIGUSR2)

    run.wait_start("pretrain", 2)
    assert run.ends("pretrain")[0] == "requeued"
    run.wait_rows("pretrain", 12)
    for number in (signal.SIGTERM, signal.SIGUSR2):  # one after the other, as preemption and a time limit may come
        run.signal_rank("pretrain", 1, number)

    run.wait_start("pretrain", 3)
    run.wait_rows("pretrain", HALF)  # the row of the last step before the scores; these follow
    run.signal_rank("pretrain", 0, signal.SIGUSR2)
    run.wait_start("pretrain", 4)
    assert newest(run)["step"] == HALF, "stopped within the evaluation, which is repeated"
    assert newest(run)["validated"] < HALF

    run.wait_rows("pretrain", HALF + 15)
    run.signal_rank("pretrain", 1, signal.SIGKILL)

    run.wait_done()
    *asked, killed, last = run.ends("pretrain")
    assert asked == ["requeued"] * 3
    assert killed in ("crashed", "failed"), "the other rank may have time to say that it lost its peer"
    assert last == "done"
    assert_same_results(run, undisturbed, ["pretrain"])


def test_preempted_by_sigterm_alone_and_both_nodes_lost_with_the_newest_checkpoint_damaged(
    run: Run, undisturbed: Run
) -> None:
    run.launch()
    job = run.wait_running("pretrain")
    run.wait_rows("pretrain", 10)
    run.cluster.preempt(job)
    assert run.ends("pretrain") == ["requeued"]
    reached = newest(run)["step"]
    assert reached >= 10, "saved when it was asked to leave"

    run.wait_rows("pretrain", reached + 8)  # and so past another periodic checkpoint
    run.cluster.node_down("n2")
    run.cluster.wait_for(job, "PENDING")
    damaged = max((run.path / "pretrain/checkpoints").glob("*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    run.cluster.node_up("n2")

    run.wait_start("pretrain", 3)
    assert run.attempts("pretrain")[2].progress > 0
    run.wait_rows("pretrain", reached + 16)
    run.cluster.node_down("n1")  # with the batch script and rank 0
    run.cluster.node_up("n1")

    run.wait_done()
    assert run.job_ids()["pretrain"] == job
    assert len(run.attempts("pretrain")) == 4
    assert damaged.name in run.log("pretrain"), "the damaged checkpoint is named"
    assert_same_results(run, undisturbed, ["pretrain"])


def newest(run: Run) -> dict[str, object]:
    """The newest checkpoint's ``step``, and of its state what tells when the network was last scored."""
    record = max((run.path / "pretrain/checkpoints").glob("*.json"))
    state = load_tensors(record.with_suffix(".pt"), torch.device("cpu"))
    return {"step": json.loads(record.read_text())["step"], "validated": state["validated"]}
