"""A chain in Weights & Biases, against a double of its server: one group of runs, each unbroken, with its lineage."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from paws_hpc.config import Config
from paws_hpc.engine import wandb_run
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import read_rows
from paws_hpc.engine.wandb_run import logged, position
from paws_hpc.files import file_hash, write_json
from paws_hpc.stages import finetune, pretrain, selection
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from tests.integration.test_preemption import make_store, tiny_run
from tests.wandb_server import WandbServer, outside, serving

CPU = torch.device("cpu")
SECRET = "hunter2-of-the-test"


class Watched(NamedTuple):
    """A chain that ran, and what the server has of it."""

    server: WandbServer
    run: RunFolder
    config: Config
    curve_after_preemption: list[dict[str, Any]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Pre-training that is preempted after three steps and resumed, one trial, and selection."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        outside(patch, folder, server)
        patch.setattr(wandb_run, "_PREEMPTED_PATIENCE_S", 60.0)  # W&B takes longer to start than these steps
        config, run = tiny_run(make_store(folder / "store", alike=False), folder)
        config.tracking.wandb, config.tracking.tags = "auto", ["trial"]
        config.finetune.sweep = {"learning_rate": [0.02], "epochs": [1]}
        config.baseline.min_trials = 0
        config.data.copy_to = str(folder / "local")
        flags = {"export": f"WANDB_API_KEY={SECRET}", "account": SECRET}
        config.resources["pretrain"].additional_parameters = flags
        write_json(run.chain, {"id": "cafe0123"})
        asked = itertools.count()
        with pytest.raises(PreemptedError):
            pretrain.run(TorchContext(config, run, control=JobControl(lambda: next(asked) >= 8)))
        curve = list(server.runs["cafe0123-pretrain"].history)
        pretrain.run(TorchContext(config, run))
        finetune.run(TorchContext(config, run, "finetune", config.finetune.trials()[0]))
        selection.run(TorchContext(config, run))
        yield Watched(server, run, config, curve)


def own(row: dict[str, Any]) -> dict[str, Any]:
    """What was logged of a row of W&B's, without what W&B adds."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_stages_are_runs_of_one_group_with_stable_ids_and_job_types(watched: Watched) -> None:
    told = {name: (run.fields["groupName"], run.fields["jobType"]) for name, run in watched.server.runs.items()}
    assert told == {
        "cafe0123-pretrain": ("run", "pretrain"),
        "cafe0123-finetune-lr-0-02-epochs-1": ("run", "finetune"),
        "cafe0123-selection": ("run", "selection"),
    }
    for run in watched.server.runs.values():
        assert run.fields["tags"] == ["digits", "trial"]
        assert run.exit_codes[-1] == 0
    assert watched.server.unknown == []


def test_a_preempted_and_requeued_run_is_one_run_with_one_unbroken_curve(watched: Watched) -> None:
    run = watched.server.runs["cafe0123-pretrain"]
    rows = read_rows(watched.run.pretrain / "metrics.jsonl")
    assert 0 < len(watched.curve_after_preemption) < len(run.history), "it was there before the run went on"
    assert [own(row) for row in run.history] == [logged(row) for row in rows]
    assert [row["_step"] for row in run.history] == [position(row) for row in rows]
    assert run.preempting
    assert run.exit_codes == [1, 0], "what can be continued has not ended well"


def test_the_axes_are_steps_and_epochs_and_summaries_are_of_the_whole_run(watched: Watched) -> None:
    run = watched.server.runs["cafe0123-pretrain"]
    rows = read_rows(watched.run.pretrain / "metrics.jsonl")
    assert {"trainer/global_step", "trainer/epoch"} <= set(run.history[0])
    scores = [row["val/paws_nn_top1"] for row in rows if "val/paws_nn_top1" in row]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert run.summary["val/paws_nn_top1"] == {
        "last": scores[-1],
        "max": max(scores),
        "mean": sum(scores) / len(scores),
    }
    assert run.summary["train/loss"] == {"last": losses[-1], "min": min(losses), "mean": sum(losses) / len(losses)}
    assert {"train/images_per_s", "train/data_wait", "train/lr", "train/grad_norm"} <= set(run.summary)
    metrics = run.config["_wandb"]["value"]["m"]
    assert any(metric.get("2") == "*" for metric in metrics), "every metric has trainer/global_step as its axis"


def test_lineage_leads_from_the_checkpoint_to_the_trial_to_selection(watched: Watched) -> None:
    runs, name, checksum = watched.server.runs, "network-cafe0123-pretrain", file_hash(watched.run.checkpoint(6))
    tuned = "network-cafe0123-finetune-lr-0-02-epochs-1"
    artifacts = {sent["artifactCollectionName"]: sent for sent in watched.server.artifacts.values()}
    assert artifacts.keys() == {name, tuned}
    network, lineage = artifacts[name], {"name": name, "file": "step-00000006.pt", "checksum": checksum}
    assert (network["runName"], network["state"]) == ("cafe0123-pretrain", "COMMITTED")
    assert json.loads(network["metadata"]) == lineage
    assert checksum in [alias["alias"] for alias in network["aliases"]]
    assert [run.uses for run in runs.values()] == [[], [name], [tuned]]
    trial = runs["cafe0123-finetune-lr-0-02-epochs-1"].config
    assert trial["lineage"]["value"] == lineage
    assert trial["trial"]["value"] == {"learning_rate": 0.02, "epochs": 1}
    assert runs["cafe0123-selection"].config["lineage"]["value"]["name"] == tuned


def test_selection_shows_the_test_scores(watched: Watched) -> None:
    (row,) = watched.server.runs["cafe0123-selection"].history
    test = json.loads(watched.run.result.read_text())["test"]
    assert row["test/paws_nn_top1"] == test["paws_nn"]["top1"]
    assert row["test/fine_tuned_top1"] == test["fine_tuned"]["top1"]


def test_nothing_that_was_sent_holds_a_secret_or_a_path_of_the_users_folders(watched: Watched) -> None:
    sent = b"\n".join(watched.server.received)
    assert b"min_trials" in sent, "the config was sent"
    home = str(watched.run.path.parent)
    for text in (SECRET, home, Path(home).name, "WANDB_API_KEY", "/home/", str(Path.cwd())):
        assert text.encode() not in sent, text
    assert watched.server.runs["cafe0123-pretrain"].config["data"]["value"]["copy_to"] == "…/local"
