"""The whole schema of a run, composed from the dataclasses that live beside what they configure.

Defaults stand in those dataclasses once; ``conf/`` states differences. Below the commands a run is this plain value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from paws_hpc.data.config import DataConfig, LabelsConfig, ViewsConfig
from paws_hpc.engine.config import ClassifierConfig, OptimizerConfig, PretrainConfig, SuncetConfig, TrackingConfig
from paws_hpc.models.config import VIT_PATCH_SIZE, ModelConfig
from paws_hpc.objective.config import ObjectiveConfig, PawsConfig
from paws_hpc.renamed import did_you_mean
from paws_hpc.sizes import check_divides, check_ranges, check_texts
from paws_hpc.stage_table import DEFAULT_STAGES, STAGES, SWEEPS


@dataclass
class StageResources:
    """What one stage may use. On Slurm a field that is None is taken from ``hydra.launcher``.

    Attributes:
        nodes: machines; 1 if none.
        tasks_per_node: processes on each, one per GPU where there are GPUs; all of a stage train together, and sizes in
            the config stay global. 1 if none.
        threads_per_rank: CPU threads of each for tensor work; if none, the cores shared equally by the ranks of a node.
        gpus_per_node: GPUs (Slurm).
        cpus_per_task: cores (Slurm).
        mem_gb: memory per node, GB (Slurm).
        timeout_min: after which the job is ended, or saves and is queued again if it trains; minutes (Slurm).
        partition: (Slurm)
        additional_parameters: any other flags of sbatch, such as ``{account: vision, exclusive: true}``.
    """

    nodes: int | None = None
    tasks_per_node: int | None = None
    threads_per_rank: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    timeout_min: int | None = None
    partition: str | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)

    def check(self, section: str) -> None:
        """Raise ValueError, naming the field as one of ``section``, if a value is out of its range."""
        counts = ("nodes", "tasks_per_node", "threads_per_rank", "cpus_per_task", "timeout_min")
        ranges = dict.fromkeys(counts, "[1, inf)") | {"gpus_per_node": "[0, inf)", "mem_gb": "[0, inf)"}
        check_ranges(section, self, **ranges)

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return (self.nodes or 1) * (self.tasks_per_node or 1)


@dataclass
class Config:
    """A run.

    Attributes:
        name: of the run directory under ``runs``.
        runs: folder of all runs.
        seed: of label draw, initialisation, order and augmentation.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        deterministic: the same bits from two runs on GPUs of one kind, resumed or not, for some of the speed; an
            operation that cannot do so is an error that names it. On CPUs it is so anyway.
        stages: those to run, in the chain's order; what is done already is not done again.
        accept_changes: dotted fields in which a run may differ from how it was begun; none by default.
        optimizer: of pre-training.
        suncet: of the pre-trained network, before its nearest-neighbour score on the test split.
        finetune: sweep on the pre-trained network.
        baseline: sweep without pre-training on the same labels.
        resources: by stage.
        restarts_without_progress: a crashed job is queued again as long as the attempts that crashed without getting
            further are no more than this (Slurm).
        dry_run: print what would be submitted, and submit and write nothing (Slurm).
        cancel: end all jobs of this run instead of starting any (Slurm).
    """

    name: str = "run"
    runs: str = "runs"
    seed: int = 0
    device: str = "auto"
    deterministic: bool = False
    stages: list[str] = field(default_factory=lambda: list(DEFAULT_STAGES))
    accept_changes: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=PawsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    suncet: SuncetConfig = field(default_factory=SuncetConfig)
    finetune: ClassifierConfig = field(default_factory=ClassifierConfig)
    baseline: ClassifierConfig = field(default_factory=ClassifierConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resources: dict[str, StageResources] = field(default_factory=lambda: {name: StageResources() for name in STAGES})
    restarts_without_progress: int = 3
    dry_run: bool = False
    cancel: bool = False

    def __post_init__(self) -> None:
        check_texts(flatten(asdict(self)))
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r} must be auto, cpu or cuda.")
        self.pretrain.execution_on("cuda" if self.device == "auto" else self.device)
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ValueError(f"stages={self.stages}: {unknown[0]!r} is not one of {', '.join(STAGES)}.")
        if not self.stages:
            raise ValueError(f"stages=[] names no stage. Name some of {', '.join(STAGES)}, or leave it out for all.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32).")
        self._check_resources()
        if self.restarts_without_progress < 0:
            raise ValueError(f"restarts_without_progress={self.restarts_without_progress} must be 0 or more.")
        ranks, support = self.resources["pretrain"].ranks, self.pretrain.support
        for name, size in (
            ("pretrain.batch_size", self.pretrain.batch_size),
            ("pretrain.support.classes * images_per_class", support.classes * support.images_per_class),
        ):
            check_divides(size, ranks, name=name, accumulate_steps=self.pretrain.accumulate_steps)
        for name in SWEEPS:
            sweep_config(self, name).check(name)
            if name in self.stages:
                sweep_config(self, name).check_warmup(name)
        if "pretrain" in self.stages and self.optimizer.warmup_epochs > self.pretrain.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs={self.optimizer.warmup_epochs:g} does not fit into pretrain.epochs="
                f"{self.pretrain.epochs}. Shorten the warm-up, or train for at least as many epochs."
            )
        self._check_patches()
        drawn = self.labels.per_class
        scarce = drawn is not None and drawn < support.images_per_class
        if scarce and self.data.support_order == "paper" and "pretrain" in self.stages:
            raise ValueError(
                f"pretrain.support.images_per_class={support.images_per_class}, but labels.per_class={drawn}. Ask for "
                f"at most {drawn} images per class, or set data.support_order=balanced, which repeats images as other "
                "crops."
            )
        rows = self.views.support_views * self.pretrain.support.images_per_class
        self.objective.check_run(rows_per_class=rows, labelled=self.data.labelled)
        if not self.name or self.name.startswith(".") or "/" in self.name or "%" in self.name:
            raise ValueError(f"name={self.name!r} must be a folder name without slashes, % or a leading dot.")

    def _check_resources(self) -> None:
        if wrong := self.resources.keys() - STAGES.keys():
            name = min(wrong)
            raise ValueError(
                f"resources.{name} is of no stage. {did_you_mean(name, STAGES)}Known: {', '.join(STAGES)}."
            )
        self.resources = {name: self.resources.get(name, StageResources()) for name in STAGES}
        for name, resources in self.resources.items():
            resources.check(f"resources.{name}")
        alone = [name for name, stage in STAGES.items() if not stage.torch]
        if any(self.resources[name].ranks > 1 for name in alone):
            raise ValueError(
                f"{' and '.join(f'resources.{name}' for name in alone)} must have nodes=1 and tasks_per_node=1: one "
                "process does their work."
            )

    def _check_patches(self) -> None:
        if self.model.name != "vit_s16":
            return
        crops = {f"views.{name}.size": getattr(self.views, name).size for name in ("large", "small", "evaluation")}
        if not self.views.small.count:
            del crops["views.small.size"]
        for name in SWEEPS:
            sweep = sweep_config(self, name)
            crops |= {f"{name}.crop.size": sweep.of_trial(trial).crop.size for trial in sweep.trials()}
        if wrong := [f"{name}={size}" for name, size in crops.items() if size % VIT_PATCH_SIZE]:
            raise ValueError(f"{' and '.join(wrong)} must be multiples of {VIT_PATCH_SIZE}, the patches of vit_s16.")


def sweep_config(config: Config, sweep: str) -> ClassifierConfig:
    """The config of a sweep by its name."""
    section: ClassifierConfig = getattr(config, sweep)
    return section


_WITHOUT_EFFECT = (  # on the result: these may change between two launches of one run
    "name", "runs", "device", "deterministic", "stages", "accept_changes", "tracking", "resources",
    "restarts_without_progress", "dry_run", "cancel", "data.name", "data.classes", "data.train", "data.labelled",
    "data.test", "data.source", "data.source_path", "data.root", "data.unlabelled", "data.labels", "data.folders",
    "data.threads", "data.copy_to", "pretrain.log_every_steps", "pretrain.validate_every_epochs",
    "pretrain.checkpoint_every_steps", "pretrain.collapse", "finetune.min_trials", "baseline.min_trials",
)  # fmt: skip

Identity = dict[str, Any]


def identity(config: Config, *sections: str) -> Identity:
    """The fields that determine a result, flat: ``{"optimizer.peak_lr": 6.4, …}``; of all sections or of some."""
    flat = flatten(asdict(config))
    return {
        name: value for name, value in flat.items() if has_effect(name) and (not sections or _covered(name, sections))
    }


def has_effect(field: str) -> bool:
    """Whether a field, such as ``optimizer.peak_lr``, determines results; the others may change within a run."""
    return not _covered(field, _WITHOUT_EFFECT)


def _covered(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def flatten(value: dict[str, Any], prefix: str = "") -> Identity:
    """Nested mappings as one: ``{"optimizer": {"peak_lr": 6.4}}`` becomes ``{"optimizer.peak_lr": 6.4}``."""
    flat: Identity = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
