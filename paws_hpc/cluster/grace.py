"""Whether a job that is asked to leave has the time to save.

Slurm signals a preempted job and kills it GraceTime plus KillWait later; before its time limit it signals
``signal_delay_s`` ahead. A training job notices at the end of its step, finishes the checkpoint that it may just be
writing in the background, then writes one of that step.
"""

from __future__ import annotations

from collections.abc import Mapping

from paws_hpc.cluster.inventory import Partition, seconds


def grace_warnings(
    job: str,
    *,
    save_s: float | None,
    step_s: float | None,
    partition: Partition | None,
    settings: Mapping[str, str],
    signal_delay_s: float | None,
) -> list[str]:
    """What to tell a user whose job cannot save in time; empty if it can, or if nothing was measured yet.

    Args:
        job: its name.
        save_s: seconds that the last checkpoint took (:func:`paws_hpc.cluster.traces.read_progress` tells).
        step_s: seconds of a step.
        partition: where it runs; None if that is unknown.
        settings: of the cluster, as :func:`paws_hpc.cluster.inventory.settings` returns them.
        signal_delay_s: between Slurm's signal and the job's time limit; None if that is unknown.
    """
    if save_s is None:
        return []
    needed = 2 * save_s + (step_s or 0.0)
    needs = (
        f"{job} may need {needed:.1f} s to save (a step {step_s or 0.0:.1f} s, a checkpoint {save_s:.1f} s, and as "
        "long for the one before it)"
    )
    warnings = []
    if partition is not None and (notice := preemption_notice_s(partition, settings)) is not None and notice < needed:
        warnings.append(
            f"{needs}, but partition {partition.name} leaves a preempted job {notice:g} s (GraceTime "
            f"{partition.grace_s:g} s and KillWait): work since the last periodic checkpoint would be lost. Save more "
            "often with a lower pretrain.checkpoint_every_steps, or ask for a longer GraceTime."
        )
    if signal_delay_s is not None and signal_delay_s < needed:
        warnings.append(
            f"{needs}, but is told only {signal_delay_s:g} s before its time limit. Raise "
            "hydra.launcher.signal_delay_s."
        )
    return warnings


def preemption_notice_s(partition: Partition, settings: Mapping[str, str]) -> float | None:
    """Seconds between the first signal of a preemption and the kill; None where nothing is preempted by partition."""
    mode = partition.preempt_mode.upper()
    if settings.get("PreemptType") != "preempt/partition_prio" or not ("REQUEUE" in mode or "CANCEL" in mode):
        return None
    return partition.grace_s + (seconds(settings.get("KillWait", "")) or 0.0)
