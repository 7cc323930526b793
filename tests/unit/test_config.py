"""Values that no run could use name their field; the identity of a run has what determines its result, and no more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paws_hpc.cluster.compose import compose_run
from paws_hpc.cluster.frozen import ConfigError, freeze, read_config, rename_frozen
from paws_hpc.cluster.resources import resolve
from paws_hpc.config import Config, StageResources, identity
from paws_hpc.data.config import CropConfig, DataConfig, LabelsConfig, ViewsConfig
from paws_hpc.engine.config import (
    ClassifierConfig,
    CollapseConfig,
    OptimizerConfig,
    PretrainConfig,
    SupportConfig,
    TrackingConfig,
)
from paws_hpc.objective.config import PawsConfig


def test_the_identity_has_every_field_but_those_that_cannot_change_the_result() -> None:
    config = Config()
    before = identity(config)
    assert before["finetune.sweep.learning_rate"] == config.finetune.sweep["learning_rate"]
    config.runs, config.stages, config.resources["pretrain"].nodes = "elsewhere", ["report"], 8
    config.tracking.tags, config.pretrain.collapse.action, config.data.threads = ["night"], "warn", 3
    assert identity(config) == before
    config.optimizer.peak_lr, config.views.small.count = 3.5, 9
    changed = {name for name, value in identity(config).items() if before[name] != value}
    assert changed == {"optimizer.peak_lr", "views.small.count"}


def test_a_part_of_the_identity_is_chosen_by_section() -> None:
    chosen = identity(Config(seed=3), "seed", "views.evaluation", "objective")
    assert chosen["seed"] == 3
    assert {name.partition(".")[0] for name in chosen} == {"seed", "views", "objective"}
    assert {name for name in chosen if name.startswith("views")} == {"views.evaluation.resize", "views.evaluation.size"}
    assert "baseline.batch_size" in identity(Config(), "baseline")
    assert identity(Config(), "base") == {}


def swept(sweep: dict[str, Any], **others: Any) -> Config:
    return Config(finetune=ClassifierConfig(sweep, **others))


BAD: dict[str, Callable[[], Any]] = {
    r"device='gpu'.*auto, cpu or cuda": lambda: Config(device="gpu"),
    r"stages.*'finetun' is not one of prepare, pretrain": lambda: Config(stages=["finetun"]),
    r"seed=-1": lambda: Config(seed=-1),
    r"name='a/b'": lambda: Config(name="a/b"),
    r"name='.hidden'": lambda: Config(name=".hidden"),
    r"objective.support_warmup_fraction.*Set views.support_views=2": lambda: Config(
        objective=PawsConfig(support_warmup_fraction=0.3),
        pretrain=PretrainConfig(support=SupportConfig(images_per_class=1)),
    ),
    r"objective.true_label_targets=true .*data.labelled=elsewhere": lambda: Config(
        objective=PawsConfig(true_label_targets=True), data=DataConfig(labelled="elsewhere")
    ),
    r"objective.entropy_weight=-1": lambda: PawsConfig(entropy_weight=-1),
    r"data.threads=0": lambda: DataConfig(threads=0),
    r"resources.pretrain.nodes=0": lambda: Config(resources={"pretrain": StageResources(nodes=0)}),
    r"stages=\[\] names no stage": lambda: Config(stages=[]),
    r"labels.per_class=0": lambda: LabelsConfig(per_class=0),
    r"labels.per_class=4, labels.file=list.txt, labels.all=False: give exactly one": lambda: LabelsConfig(
        per_class=4, file="list.txt", validation_per_class=1
    ).check_complete(),
    r"labels.per_class=4, labels.file=None, labels.all=True: give exactly one": lambda: LabelsConfig(
        per_class=4, all=True, validation_per_class=1
    ).check_complete(),
    r"labels.validation_per_class=4 and labels.validation_file=list.txt": lambda: LabelsConfig(
        per_class=4, validation_per_class=4, validation_file="list.txt"
    ).check_complete(),
    r"views.support_views=0": lambda: ViewsConfig(support_views=0),
    r"pretrain.support.classes=1": lambda: SupportConfig(classes=1),
    r"pretrain.support.images_per_class=0": lambda: SupportConfig(images_per_class=0),
    r"pretrain.collapse.action='ignore'": lambda: CollapseConfig(action="ignore"),
    r"pretrain.collapse.patience_steps=0": lambda: CollapseConfig(patience_steps=0),
    r"pretrain.ema=1.0.*null to turn it off": lambda: PretrainConfig(ema=1.0),
    r"pretrain.precision='fp16'.*bf16": lambda: PretrainConfig(precision="fp16"),
    r"pretrain.checkpoint_every_steps=0": lambda: PretrainConfig(checkpoint_every_steps=0),
    r"finetune.sweep.learning_rate=\[\] must be a list of numbers": lambda: swept({"learning_rate": []}),
    r"baseline.sweep.learning_rate=\[0.1, 0.0\]: baseline.learning_rate=0.0 must be in": lambda: Config(
        baseline=ClassifierConfig({"learning_rate": [0.1, 0.0]})
    ),
    r"finetune.sweep.epochs=\[30, 30\] repeats a value": lambda: swept({"epochs": [30, 30]}),
    r"finetune.sweep.epochs=\[1.5\] must be a list of whole numbers": lambda: swept({"epochs": [1.5]}),
    r"finetune.sweep.momentum=\[True\] must be a list of numbers": lambda: swept({"momentum": [True]}),
    r"finetune.sweep.crop.size=\[0\]: finetune.crop.size=0": lambda: swept({"crop.size": [0]}),
    r"finetune.sweep.rate=\[1\]: there is no such number.*learning_rate, epochs": lambda: swept({"rate": [1]}),
    r"finetune.sweep.min_trials=\[1\]: there is no such number": lambda: swept({"min_trials": [1]}),
    r"finetune.epochs=7 has no effect, as finetune.sweep.epochs=\[3\].*\[7\]": lambda: swept({"epochs": [3]}, epochs=7),
    r"finetune.sweep=\{\} has no field": lambda: swept({"epochs": None}, min_trials=0),
    r"finetune.min_trials=3 must be between 0 and .* 2": lambda: swept({"epochs": [1, 2]}, min_trials=3),
    r"finetune.validate_every_epochs=0": lambda: swept({"epochs": [1]}, validate_every_epochs=0),
    r"finetune.warmup_epochs=10 does not fit into a trial of 3 epochs.*finetune.sweep.epochs": lambda: swept(
        {"epochs": [3, 30]}, warmup_epochs=10
    ),
    r"finetune.crop.count=2 must be in \[1, 1\]": lambda: swept({"epochs": [1]}, crop=CropConfig(count=2)),
    r"optimizer.nesterov=true needs optimizer.momentum above 0": lambda: OptimizerConfig(nesterov=True, momentum=0),
    r"optimizer.warmup_epochs=10 does not fit into pretrain.epochs=9": lambda: Config(
        pretrain=PretrainConfig(epochs=9)
    ),
    r"finetune.momentum=1.0": lambda: swept({"epochs": [1]}, momentum=1.0),
    r"tracking.wandb='on'.*online": lambda: TrackingConfig(wandb="on"),
    r"tracking.project='my/proj' must have": lambda: TrackingConfig(project="my/proj"),
    r"tracking.tags: 'a{65}' must have 1 to 64": lambda: TrackingConfig(tags=["digits", "a" * 65]),
    r"name='a%u' must be a folder name": lambda: Config(name="a%u"),
    r"runs=~/runs: ~ is not your home": lambda: Config(runs="~/runs"),
    r"data.copy_to=\$\{TMPDIR\}/x has braces": lambda: Config(data=DataConfig(copy_to="${TMPDIR}/x")),
    r"name='a\\n#SBATCH --qos=x' has a line break": lambda: Config(name="a\n#SBATCH --qos=x"),
    r"resources.pretrain.additional_parameters.comment='a\\n.* has a line break": lambda: Config(
        resources={"pretrain": StageResources(additional_parameters={"comment": "a\ntouch x"})}
    ),
    r"resources.pretrain.partition='gpu\\r' has a line break": lambda: Config(
        resources={"pretrain": StageResources(partition="gpu\r")}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_value_that_no_run_could_use_names_its_field(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_each_stage_has_resources_and_every_default_is_valid() -> None:
    config = Config()
    assert asdict(config)["pretrain"]["support"] == {"classes": 960, "images_per_class": 7}
    names = [trial.name for trial in config.finetune.trials()]
    assert len(names) == 10
    assert names[:2] == ["lr=0.01,epochs=30", "lr=0.01,epochs=50"]


HOSTILE = {  # what somebody else's frozen config could hold → what is said of it
    "name: ${oc.env:WANDB_API_KEY}": "name=.*has an interpolation",
    "data: {copy_to: '${oc.env:HOME}'}": "data.copy_to=.*has an interpolation",
    "name: &a b\nruns: *a": "line 2 has an alias",
    "a: " + "[" * 2_000 + "]" * 2_000: "nested too deeply",
    "name: !!python/object/apply:os.system [exit]": "could not determine a constructor",
    "- 1": "has no fields",
    "name: [": "damaged or was edited",
    "#" * (1 << 21): "2,097,152 bytes",
    "seed: 1\nepcohs: 3": "epcohs is not a field",
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_the_config_of_somebody_elses_run_discloses_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=HOSTILE[text]) as caught:
        read_config(path)
    assert "0123456789abcdef" not in str(caught.value)
    assert str(path) in str(caught.value) or "epcohs" in text


def test_a_frozen_config_with_a_flipped_bit_is_refused_or_the_same(tmp_path: Path) -> None:
    path, config = tmp_path / "config.yaml", Config(name="run")
    freeze(config, path)
    whole, draws = path.read_bytes(), np.random.default_rng(0)
    for bit in draws.integers(8 * len(whole), size=60):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        with suppress(ConfigError):
            assert read_config(path) == config
            continue
        with pytest.raises(ConfigError, match=str(path)):
            read_config(path)


@pytest.mark.parametrize(
    "override",
    [
        "data.name=${oc.env:WANDB_API_KEY}",
        "hydra.launcher.setup=['export X=${oc.env:HF_TOKEN}']",
        "tracking.tags=['${oc.env:DB_PASSWORD,none}']",
    ],
)
def test_a_launch_takes_no_secret_from_the_environment_into_its_config(
    monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD"):
        monkeypatch.setenv(name, "0123456789abcdef")
    with pytest.raises(ValueError, match="would write a secret into the run's files") as caught:
        compose_run(["hydra/launcher=submitit_slurm", override])
    assert "0123456789abcdef" not in str(caught.value)


def test_texts_that_people_use_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of folders in any script, with the blanks that systems put in, and lines of shell."""
    monkeypatch.setenv("SCRATCH", "/scratch")
    setup = "hydra.launcher.setup=['~/bin/x.sh', \"if true; then\\n\\tmodule load cuda\\nfi\"]"
    config, launcher = compose_run([
        "hydra/launcher=submitit_slurm", "name='größe'", "data.train='写真　2024/Bildschirmfoto\u202fx'", setup,
        "runs=${oc.env:SCRATCH}/runs", "data.copy_to=$TMPDIR", "tracking.tags=['~new']",
    ])  # fmt: skip
    resolve(config, launcher)
    assert config.runs == "/scratch/runs"


def test_renaming_keeps_every_value(tmp_path: Path) -> None:
    path, config = tmp_path / "config.yaml", Config(name="a " * 60 + "z")
    freeze(config, path)
    rename_frozen(path, "b " * 60 + "z")
    assert read_config(path) == replace(config, name="b " * 60 + "z")
