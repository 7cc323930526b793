"""Wrong inputs of every command: each is answered by one line that says what, where, the value and the remedy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from paws_hpc import __main__, launch
from tests.pictures import write_tiles

LAUNCH = {  # arguments → parts of the answer
    "+foo=1": ["foo is not a field of the config", "`paws config` lists all fields"],
    "+pretrain.foo=1": ["pretrain.foo is not a field of the config"],
    "lr=0.1": ["lr is not a field of the config", "`paws config` lists all fields"],
    "pretrain.epoch=3": ["pretrain.epoch is not a field", "Did you mean 'pretrain.epochs'?"],
    "optimzer.peak_lr=1": ["optimzer is not a field", "Did you mean 'optimizer'?"],
    "peak_lr=1": ["peak_lr is not a field", "Did you mean 'optimizer.peak_lr'?"],
    "hydra.launcher.partition=gpu": ["hydra.launcher.partition is not a field", "hydra/launcher=submitit_slurm"],
    "pretrain.keep_checkpoints=3": ["pretrain.keep_checkpoints is no field of the config any more", "it is 2"],
    "pretrain=3": ["pretrain=3 must be a section", "pretrain.FIELD=VALUE"],
    "pretrain.epochs=": ['pretrain.epochs="" must be a whole number'],
    "pretrain.epochs=many": ['pretrain.epochs="many" must be a whole number'],
    "pretrain.epochs=1.5": ["pretrain.epochs=1.5 must be a whole number"],
    "pretrain.epochs=[8]": ["pretrain.epochs=[8] must be a whole number"],
    "baseline.epochs=[8]": ["baseline.epochs=[8] must be a whole number"],
    "pretrain.epochs=null": ["pretrain.epochs=null must be given"],
    "pretrain.epochs=0": ["pretrain.epochs=0 must be in [1, inf)"],
    "pretrain.epochs=-3": ["pretrain.epochs=-3 must be in [1, inf)"],
    "optimizer.peak_lr=fast": ['optimizer.peak_lr="fast" must be a number'],
    "optimizer.peak_lr=-1": ["optimizer.peak_lr=-1.0 must be in [0, inf)"],
    "optimizer.peak_lr=nan": ["optimizer.peak_lr=nan must be in [0, inf)"],
    "objective.me_max=maybe": ['objective.me_max="maybe" must be true or false'],
    "finetune.sweep=0.1": ["finetune.sweep=0.1 must be a mapping", "'finetune.sweep={"],
    "finetune.sweep=[0.1]": ["finetune.sweep", "must be a mapping"],
    "finetune.sweep=null": ["finetune.sweep=null must be given"],
    "finetune.sweep.learning_rate=0.1": ["finetune.sweep.learning_rate=0.1 must be a list of numbers"],
    "finetune.sweep.learning_rate=[]": ["finetune.sweep.learning_rate=[] must be a list of numbers, at least one"],
    "finetune.sweep.learning_rate=[a]": ["finetune.sweep.learning_rate=['a'] must be a list of numbers"],
    "finetune.sweep.rate=[1]": ["finetune.sweep.rate=[1]: there is no such number to sweep", "learning_rate"],
    "stages=prepare": ['stages="prepare" must be a list, such as stages=['],
    "stages=[]": ["stages=[] names no stage", "prepare, pretrain"],
    "stages=[pretrian]": ["stages=['pretrian']: 'pretrian' is not one of prepare, pretrain"],
    "views.large.scale=0.5": ["views.large.scale=0.5 must be a list, such as views.large.scale=["],
    "views.large.scale=[0.5]": ["views.large.scale=[0.5] must be [least, greatest] share"],
    "views.large.scale=[2,1]": ["views.large.scale=[2.0, 1.0] must be [least, greatest] share"],
    "views.large.size=0": ["views.large.size=0 must be in [1, inf)"],
    "views.large.size=big": ['views.large.size="big" must be a whole number'],
    "views.large.count=3": ["views.large.count=3 must be 2"],
    "views.small.count=2000": ["views.small.count=2000 must be at most 1022"],
    "views.evaluation.size=500": ["views.evaluation.size=500 must be", "at most views.evaluation.resize=32"],
    "views.augment.hue=0.7": ["views.augment.hue=0.7 must be in [0, 0.5]"],
    "model.channels=32": ["model.channels=32 must be a list, such as model.channels=["],
    "model.channels=[]": ["model.channels=[] needs one positive number per layer"],
    "model=resnet51": ["model=resnet51 does not exist", "Did you mean 'resnet50'?"],
    "model.name=resnt50": ["model.name='resnt50' is no model", "Did you mean 'resnet50'?"],
    "model.name=foo": ["model.name='foo' is no model. Known are resnet50, resnet18"],
    "optimizer=adam": ["optimizer=adam does not exist", "Did you mean 'adamw'?"],
    "data=cifar": ["data=cifar does not exist", "Did you mean 'cifar10'?"],
    "labels=five": ["labels=five does not exist. Known: all, four_hundred_per_class"],
    "experiment=digit": ["experiment=digit does not exist", "Did you mean 'digits'?"],
    "experiment=mine": ["experiment=mine does not exist. Known: ", "cifar10_4000"],
    "experiment=": ["experiment= does not exist"],
    "objective=pws": ["objective=pws does not exist", "Did you mean 'paws'?"],
    "objective.temperature=0": ["objective.temperature=0.0 must be in (0, inf)"],
    "hydra/launcher=slrum": ["hydra/launcher=slrum does not exist", "submitit_slurm"],
    "resources.pretrain.nodes=2": [
        "resources.pretrain.nodes=2, but this machine is one node", "hydra/launcher=submitit_slurm", "tasks_per_node=2",
    ],
    "resources.pretrain.nodes=0": ["resources.pretrain.nodes=0 must be in [1, inf)"],
    "resources.pretrain.nodez=2": ["resources.pretrain.nodez is not a field", "'resources.pretrain.nodes'"],
    "resources.pretrian.nodes=2": ["resources.pretrian", "Did you mean 'resources.pretrain'?"],
    "resources.pretrain.tasks_per_node=3": ["pretrain.batch_size=64 does not divide by 3 ranks", "63 or 66"],
    "seed=a": ['seed="a" must be a whole number'],
    "seed=-1": ["seed=-1 must be in [0, 2**32)"],
    "name=a/b": ["name='a/b' must be a folder name"],
    "name=": ["name='' must be a folder name"],
    "device=gpu": ["device='gpu' must be auto, cpu or cuda"],
    "data.source=foo": ["data.source='foo' must be null or one of cifar10"],
    "data.order=random": ["data.order='random' must be one of full, window"],
    "data.threads=0": ["data.threads=0 must be in [1, inf)"],
    "data.classes=ten": ['data.classes="ten" must be a whole number'],
    "data.train=shards/digts/train": ["data.train=shards/digts/train does not", "give data.source=digits as well"],
    "data.test=shards/digts/test": ["data.test=shards/digts/test does not exist", "Correct the path"],
    "data.train=photos": ["data.train=photos is a folder of other files", "folder --root photos --to shards/photos"],
    "data.source=null data.train=photos/": ["data.train=photos is a folder of other files", "--to shards/photos"],
    "labels.per_class=0": ["labels.per_class=0 must be in [1, inf)"],
    "labels.per_class=3": ["pretrain.support.images_per_class=4, but labels.per_class=3", "at most 3"],
    "model.init=nowhere dry_run=true": ["model.init=nowhere: there is no such file", "model.init=null"],
    "model=timm": ["model.name=timm and model.timm=None", "model.timm=resnet18d"],
    "model=timm model.timm=resnet18e dry_run=true": ["model.timm='resnet18e' is no network", "Did you mean"],
    "pretrain.precision=fp16": ["pretrain.precision='fp16' must be auto, bf16"],
    "pretrain.ema=2": ["pretrain.ema=2.0 must be in (0, 1), such as 0.999"],
    "pretrain.accumulate_steps=3": ["pretrain.batch_size=64 does not divide", "63 or 66 would fit"],
    "tracking.wandb=maybe": ["tracking.wandb='maybe' must be one of auto, online"],
    "accept_changes=3": ["accept_changes=3 must be a list, such as accept_changes=["],
    "optimizer.warmup_epochs=100": ["optimizer.warmup_epochs=100 does not fit into pretrain.epochs=25"],
    "optimizer.name=adm": ["optimizer.name='adm' is not known", "lars, sgd, adamw"],
    "restarts_without_progress=-1": ["restarts_without_progress=-1 must be 0 or more"],
    "cancel=true": ["cancel is for chains on Slurm", "hydra/launcher=submitit_slurm"],
    "seed=0,1": ["these arguments ask for 2 runs: add -m"],
    "pretrain.epochs": ["'pretrain.epochs' is no FIELD=VALUE", "pretrain.epochs=3"],
    "pretrain.epochs==3": ["'pretrain.epochs==3' is no FIELD=VALUE"],
    "pretrain:epochs=3": ["'pretrain:epochs=3' is no FIELD=VALUE"],
    "--epochs 3": ["--epochs is no option of launch", "FIELD=VALUE"],
    "--cfg job": ["--cfg is no option of launch", "paws config FIELD=VALUE shows"],
    "data.root=photos -c job": ["-c is no option of launch"],
    **{
        flag: [f"{flag} is no option of launch"]
        for flag in (
            "--hydra-help", "--version", "--resolve", "--package", "-p", "--run", "-r", "--info", "-i", "--config-path",
            "-cp", "--config-name", "-cn", "--shell-completion", "-sc", "--experimental-rerun",
        )
    },
    "--config-dir nowhere": ["--config-dir nowhere: there is no such folder"],
    "experiment=broken": ["conf/experiment/broken.yaml", "line 3", "Mend this YAML file"],
    "experiment=misspelt": ["pretrain.epcohs is not a field", "Did you mean 'pretrain.epochs'?"],
}  # fmt: skip

OTHERS = {
    "train": ["paws train is no command", "launch"],
    "config quaternion": ["quaternion is the name of no field", "`paws config` lists all fields"],
    "config pretrain.epochs=many": ['pretrain.epochs="many" must be a whole number'],
    "config --config-dir nowhere": ["--config-dir nowhere: there is no such folder"],
    "config --config-dir nowhere seed=1": ["--config-dir nowhere: there is no such folder"],
    "predict run photo.jpg --nearest 0": ["--nearest", "0 must be at least 1"],
    "predict run photo.jpg --top many": ["--top", "many must be at least 1, a whole number"],
    "predict run photo.jpg": ["There is no run run", "Known: none"],
    "report run": ["There is no run run", "Known: none"],
    "status run": ["run"],
    "export run --format torchvision": ["There is no run run"],
    "sync run": ["run"],
    "verify nowhere": ["nowhere", "manifest.json"],
    "shards info photos": ["photos is not a complete image store", "Check the path"],
    "pack folder --root nowhere --to store": ["nowhere is not a folder", "Name the folder"],
    "pack folder --root photos --to store": ["class folder photos/cats has no images", "Fill it or remove it"],
    "pack digits --split training --to store": ["--split", "'training'", "train"],
    "pack digits --split test --to store --part 3": ["'3' is not of the form I/N, such as 3/8"],
    "pack folder --root photos": ["required: --to", "`paws shards pack folder --help` says more"],
    "pack foldr --root photos --to store": ["invalid choice: 'foldr'", "folder"],
    "pack folder --root photos --to store --shard-mib 0": ["--shard-mib: 0 must be a number above 0"],
    "pack folder --root photos --to store --workers 0": ["--workers: 0 must be at least 1, a whole number"],
    "pack dataset builtins:hash --root photos --to store": ["builtins:hash is no data set: it gives int"],
    "pack cifar10 --root photos --split train --to store": ["photos/batches.meta is missing. Name the folder"],
    "pack idx --root photos --split train --to store": ["photos has no train-images-idx3-ubyte", "Name their folder"],
    "pack tar --root nowhere --to store": ["nowhere is neither a tar archive nor a folder"],
    "pack flat --root photos --labels nowhere --to store": ["photos has no images"],
    "shards verify photos --workers 0": ["--workers: 0 must be at least 1, a whole number"],
    "shards copy nowhere --to here": ["nowhere is not a complete image store", "Check the path"],
    "shards repair nowhere": ["nowhere is not a complete image store", "`paws pack`"],
    "shards stage photos": ["invalid choice: 'stage'", "copy"],
    "doctor data.train=shards/digts/train": ["data.train=shards/digts/train does not", "Correct the path"],
    "status --every 0": ["--every: 0 must be a number above 0"],
    "sync run --timeout-min soon": ["--timeout-min: soon must be a number above 0"],
    "sync": ["RUN --all is required", "`paws sync --help` says more"],
    "report": ["required: RUN"],
    "export run": ["required: --format"],
    "export run --format pickle": ["invalid choice: 'pickle'", "onnx"],
    "runs rename run": ["required: NAME"],
    "runs rename run other": ["There is no run run"],
    "bench": ["required: MEASURE"],
    "bench steps": ["invalid choice: 'steps'", "'step'"],
    "bench step --steps 0": ["--steps: 0 must be at least 1"],
    "bench bars --folder nowhere": ["nowhere is no folder", "jobs/gpu_check.sh"],
    "bench all pretrain.epoch=3": ["pretrain.epoch is not a field", "Did you mean 'pretrain.epochs'?"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with photographs that are no store, and recipes with faults."""
    (tmp_path / "photos/cats").mkdir(parents=True)
    experiments = tmp_path / "conf/experiment"
    experiments.mkdir(parents=True)
    (experiments / "broken.yaml").write_text("# @package _global_\npretrain: {epochs: 3\nseed: 1\n")
    (experiments / "misspelt.yaml").write_text("# @package _global_\npretrain:\n  epcohs: 3\n")
    monkeypatch.chdir(tmp_path)

    def started(*_: object) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(launch, "run_chain", started)
    return tmp_path


def answer(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a command answers with; it fails, without a traceback."""
    monkeypatch.setattr(sys, "argv", ["paws", *shlex.split(words)])
    try:
        status = __main__.main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int | None) else print(stop.code, file=sys.stderr) or 1
    said = capsys.readouterr()
    assert status, said.out
    return (said.err or said.out).strip().splitlines()


@pytest.mark.parametrize("words", LAUNCH)
def test_a_wrong_launch_is_answered_by_one_line_and_leaves_nothing(
    words: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = answer(f"launch {words}", monkeypatch, capsys)
    assert line.startswith("error: ")
    assert all(part in line for part in LAUNCH[words]), line
    assert sorted(path.name for path in here.iterdir()) == ["conf", "photos"]


@pytest.mark.parametrize("words", OTHERS)
def test_a_wrong_command_is_answered_by_a_line_of_its_own(
    words: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = answer(words, monkeypatch, capsys)
    assert len(lines) == 1 or lines[0].startswith(("FAULT", "problem")), lines
    assert all(part in "\n".join(lines) for part in OTHERS[words]), lines


def test_a_class_without_images_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tiles(here / "pets", 8, classes=("cats", "dogs"))
    for file in (root / "dogs").iterdir():
        file.write_bytes(b"no image")
    monkeypatch.setattr(
        sys, "argv", ["paws", "pack", "folder", "--root", "pets", "--to", "store", "--on-error", "skip"]
    )
    assert __main__.main() == 0
    launched = "launch data.source=null data.train=store data.test=null data.classes=null pretrain.support.classes=2 "
    everything = "labels.per_class=null labels.all=true labels.validation_per_class=null dry_run=true"
    (line,) = answer(launched + everything, monkeypatch, capsys)
    assert "store has no image of class 'dogs'. Pack the others alone, by `paws pack … --classes NAME …`." in line
    (line,) = answer(f"{launched} labels.per_class=4 dry_run=true", monkeypatch, capsys)
    assert "class 'dogs' of store has only 0" in line
    assert "Label more of it, or pack the others by --classes" in line


@pytest.mark.usefixtures("here")
def test_null_names_no_store(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["paws", "launch", "data.test=null", "data.labelled=null", "dry_run=true"])
    assert not __main__.main()
    assert "would run prepare, pretrain" in capsys.readouterr().out
