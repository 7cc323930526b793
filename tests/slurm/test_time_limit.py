"""Pre-training of two ranks on two nodes goes on after its time limit, to the bits of a run that nobody disturbed."""

from __future__ import annotations

import pytest

from tests.slurm.chain import Run, assert_same_results

pytestmark = pytest.mark.timeout(900)  # of which it needs a sixth on a machine of its own


def test_the_time_limit_twice(run: Run, undisturbed: Run) -> None:
    # The signal comes half a minute after the start; a machine that is busy with other tests may need the rest to stop.
    run.launch("resources.pretrain.timeout_min=2", "hydra.launcher.signal_delay_s=90")
    for start in (1, 2):
        run.wait_start("pretrain", start)
        # Slurm looks at limits every 30 s: training would have to last as long, were its nodes not slow now.
        run.wait_start_slowly("pretrain", start + 1)
    run.cluster.run("scontrol", "update", f"JobId={run.job_ids()['pretrain']}", "TimeLimit=20")
    run.wait_done()
    *limited, last = run.ends("pretrain")
    assert len(limited) >= 2, "a third time, if Slurm looked once more before the limit was raised"
    assert (set(limited), last) == ({"requeued"}, "done")
    assert_same_results(run, undisturbed, ["pretrain"])
