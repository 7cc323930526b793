"""What is submitted, with what resources, and what it waits for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paws_hpc.cluster.chain import check_begun, dependency, jobs_of, to_submit
from paws_hpc.cluster.compose import compose_run, parameters_of, runs_of
from paws_hpc.cluster.frozen import ConfigError, freeze, to_config
from paws_hpc.cluster.scheduler import QueuedJob
from paws_hpc.config import Config
from paws_hpc.engine.config import ClassifierConfig
from paws_hpc.files import write_record
from paws_hpc.packing import ArraySource, pack
from paws_hpc.renamed import RENAMED_KEYS
from paws_hpc.stage_table import STAGES
from paws_hpc.stages.run_folder import RunFolder, mark_done
from paws_hpc.store.format import read_manifest

TRIALS = ["finetune/lr=0.01,epochs=3", "finetune/lr=0.1,epochs=3"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config(
        name="run", runs=str(tmp_path), finetune=ClassifierConfig({"learning_rate": [0.01, 0.1], "epochs": [3]})
    )
    made.baseline = ClassifierConfig({"learning_rate": [0.1], "epochs": [3]})
    made.data.train, made.data.test = str(tmp_path / "train"), str(tmp_path / "test")
    return made


@pytest.fixture
def run(config: Config) -> RunFolder:
    return RunFolder(Path(config.runs) / config.name)


def finish(config: Config, run: RunFolder, *stages: str) -> None:
    for stage in stages:
        for job in jobs_of(config, stage):
            write_record(job.folder(run) / "DONE", {})
        if stage == "prepare":
            noise = ArraySource("noise", np.ones((2, 8, 8, 1), np.uint8), np.arange(2), ["a", "b"], ("a", "b"))
            stores = {"train": config.data.train, "test": config.data.test}
            digests = {name: read_manifest(pack(noise, Path(path)).path).digest for name, path in stores.items()}
            mark_done(run.prepare, digests=digests)
        if stage == "selection":
            write_record(run.result, {})
            write_record(run.selected, {"trials": [trial.name for trial in config.finetune.trials()]})
        if stage == "report":
            write_record(run.report, {})


def queued(**states: str) -> dict[str, QueuedJob]:
    return {
        name: QueuedJob(f"{number}", name, state, "", 0, "") for number, (name, state) in enumerate(states.items(), 1)
    }


def planned(config: Config, run: RunFolder, active: dict[str, QueuedJob]) -> dict[str, list[str]]:
    return {each.stage: [job.name for job in each.jobs] for each in to_submit(config, run, active)}


def test_a_new_chain_is_submitted_whole_and_nothing_of_a_finished_one(config: Config, run: RunFolder) -> None:
    assert list(planned(config, run, {})) == list(STAGES)
    assert planned(config, run, {})["finetune"] == TRIALS
    finish(config, run, *STAGES)
    assert planned(config, run, {}) == {}


def test_what_runs_or_waits_is_left_alone(config: Config, run: RunFolder) -> None:
    finish(config, run, "prepare")
    active = queued(pretrain="RUNNING", selection="PENDING", calibrate="PENDING", report="PENDING")
    active |= {name: QueuedJob("9", name, "PENDING", "Dependency", 0, "") for name in TRIALS}
    active["baseline/lr=0.1,epochs=3"] = QueuedJob("8", "b", "COMPLETING", "", 0, "")
    assert planned(config, run, active) == {}


def test_jobs_that_may_be_in_the_queue_bind_a_launch_which_says_how_to_end_them(config: Config, run: RunFolder) -> None:
    freeze(config, run.config)
    changed = replace(config, seed=1)
    check_begun(changed, run)
    with pytest.raises(ConfigError, match=r"seed was 0 and is now 1.*hydra/launcher=submitit_slurm cancel=true"):
        check_begun(changed, run, in_queue=True)


def test_a_failed_trial_is_submitted_alone_and_selection_waits_for_it(config: Config, run: RunFolder) -> None:
    finish(config, run, "prepare", "pretrain", "baseline")
    write_record(run.path / TRIALS[0] / "DONE", {})
    active = queued(selection="PENDING", calibrate="PENDING", report="PENDING")
    todo = to_submit(config, run, active)
    assert [(each.stage, [job.name for job in each.jobs], each.replaces) for each in todo] == [
        ("finetune", TRIALS[1:], []),
        ("selection", ["selection"], ["1"]),
        ("calibrate", ["calibrate"], ["2"]),
        ("report", ["report"], ["3"]),
    ], "those that wait for the wrong jobs are replaced"


def test_after_selection_no_trial_is_trained_again(config: Config, run: RunFolder) -> None:
    finish(config, run, "prepare", "pretrain", "baseline", "selection", "calibrate", "report")
    assert planned(config, run, {}) == {}, "its result could not be used: the test split is scored once"
    config.finetune.sweep["learning_rate"] = [0.01, 0.1, 1.0]
    with pytest.raises(ValueError, match="scored after selection among"):
        planned(config, run, {})
    config.stages = ["finetune"]
    assert planned(config, run, {}) == {"finetune": [*TRIALS, "finetune/lr=1,epochs=3"]}, "if they are asked for"


@pytest.mark.parametrize("stage", ["finetune", "selection"])
def test_a_stage_whose_needs_are_not_met_is_refused_by_name(config: Config, run: RunFolder, stage: str) -> None:
    config.stages = [stage]
    with pytest.raises(ConfigError, match=f"{stage} needs pretrain, which has not been done"):
        to_submit(config, run, {})
    assert list(planned(config, run, queued(pretrain="RUNNING"))) == [stage]


def test_the_baseline_alone_is_submitted_without_pretraining_unless_that_has_begun(
    config: Config, run: RunFolder
) -> None:
    config.stages = ["prepare", "baseline", "selection", "report"]
    assert list(planned(config, run, {})) == config.stages
    (run.path / "jobs" / "pretrain").mkdir(parents=True)
    with pytest.raises(ConfigError, match="selection needs pretrain, which has not been done"):
        planned(config, run, {})


def test_success_is_needed_of_parents_and_only_an_end_of_the_sweeps() -> None:
    ids = {"prepare": {"1"}, "pretrain": {"2"}, "finetune": {"3", "7"}, "baseline": {"4"}}
    assert dependency("prepare", {}) is None
    assert dependency("finetune", ids) == "afterok:2"
    assert dependency("baseline", ids) == "afterok:1"
    assert dependency("selection", ids) == "afterok:2,afterany:3:4:7"
    assert dependency("selection", {"finetune": {"3"}}) == "afterany:3", "what is done is not waited for"
    assert dependency("report", ids) == "afterany:1:2:3:4:7", "a broken chain is reported too"


SLURM = ("hydra/launcher=slurm_8gpu", "name=run", "experiment=imagenet_10pct")


def test_the_launchers_fields_are_defaults_and_resources_override_them_per_stage() -> None:
    _, parameters = parameters_of(
        [*SLURM, "hydra.launcher.account=vision", "resources.pretrain.nodes=8", "resources.finetune.partition=small",
         "resources.finetune.additional_parameters={nice: 100, qos: long, comment: null}",
         "resources.selection.timeout_min=30"]
    )  # fmt: skip
    pretrain, finetune, selection, report = (
        parameters[stage] for stage in ("pretrain", "finetune", "selection", "report")
    )
    assert (pretrain["nodes"], pretrain["tasks_per_node"], pretrain["gpus_per_node"]) == (8, 8, 8)
    assert (pretrain["partition"], finetune["partition"], report["partition"]) == ("gpu", "small", "gpu")
    assert {stage["account"] for stage in parameters.values()} == {"vision"}
    assert (finetune["qos"], "qos" in pretrain) == ("long", False)
    assert finetune["additional_parameters"] == {"requeue": True, "nice": 100, "qos": "long"}
    assert (selection["timeout_min"], pretrain["timeout_min"]) == (30, 2880)


def test_stages_of_one_task_do_not_take_the_shape_of_training() -> None:
    _, parameters = parameters_of(SLURM)
    for stage, gpus in (("prepare", None), ("selection", 1), ("report", None)):
        asked = parameters[stage]
        assert (asked["nodes"], asked["tasks_per_node"], asked.get("gpus_per_node")) == (1, 1, gpus)


def test_a_shape_that_does_not_divide_the_batch_is_refused_before_anything_is_submitted() -> None:
    with pytest.raises(ValueError, match=r"pretrain\.batch_size=4096 does not divide by 24 ranks.*4080 or 4104"):
        parameters_of([*SLURM, "hydra.launcher.nodes=3"])


def test_a_field_that_slurm_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match="partion"):
        compose_run(["hydra/launcher=submitit_slurm", "name=run", "hydra.launcher.partion=gpu"])


def test_a_line_break_in_a_launchers_field_makes_no_line_of_the_script() -> None:
    with pytest.raises(ValueError, match=r"hydra.launcher.comment='a\\n#SBATCH --qos=x' has a line break"):
        parameters_of([*SLURM, 'hydra.launcher.comment="a\n#SBATCH --qos=x"'])


@pytest.mark.parametrize("override", ["old.key=1", "+old.key.below=1", "old/key=group"])
def test_a_renamed_key_is_refused_with_its_new_name(monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setitem(RENAMED_KEYS, "old.key", "new.key")
    with pytest.raises(ConfigError, match=r"old\.key.* is no field of the config any more\. Instead: new\.key"):
        compose_run(["name=run", override])
    with pytest.raises(ConfigError, match=r"Instead: new\.key"):
        to_config({"old": {"key": 1}})


def test_a_flag_that_was_a_field_of_each_stage_is_refused_with_both_ways_to_give_it() -> None:
    with pytest.raises(
        ConfigError, match=r"hydra\.launcher\.qos for all jobs, resources\.STAGE\.additional_parameters={qos: …}"
    ):
        compose_run(["name=run", "resources.finetune.qos=long"])


@pytest.mark.parametrize("field", ["resources.pretran.nodes", "resources.pretrain.noeds"])
def test_a_stage_or_field_that_resources_do_not_have_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'resources\.pretrain(\.nodes)?'"):
        compose_run(["name=run", f"{field}=8"])


def test_sweeps_become_runs_in_order() -> None:
    assert runs_of(["seed=0,1", "name=${seed}", "data.threads=range(1,3)"]) == [
        ["seed=0", "name=${seed}", "data.threads=1"], ["seed=0", "name=${seed}", "data.threads=2"],
        ["seed=1", "name=${seed}", "data.threads=1"], ["seed=1", "name=${seed}", "data.threads=2"],
    ]  # fmt: skip
    assert runs_of(["stages=[prepare,pretrain]"]) == [["stages=[prepare,pretrain]"]]


def test_runs_of_a_sweep_are_named_after_what_differs() -> None:
    support = "pretrain.support={classes:10,images_per_class:4},{classes:5,images_per_class:2}"
    for swept, names in (
        (["seed=1,2"], ["digits-seed1", "digits-seed2"]),
        (["objective.me_max=true,false", "seed=1"], ["digits-seed1-me_max=True", "digits-seed1-me_max=False"]),
        ([support], [f"digits-seed3-support=classes-{k}-images_per_class-{c}" for k, c in ((10, 4), (5, 2))]),
        (["model.width=1,2", "name=wide"], ["wide", "wide"]),
    ):
        assert [compose_run(overrides)[0].name for overrides in runs_of(swept)] == names
