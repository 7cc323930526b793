"""The settings of training. Without torch, so that a run can be described and submitted before it is loaded."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from paws_hpc.data.config import AugmentConfig, CropConfig
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.sizes import check_ranges
from paws_hpc.trial import Trial, number_fields, trials

OPTIMIZERS = ("lars", "sgd", "adamw")
EXECUTIONS = ("auto", "eager", "compiled", "graphed")


@dataclass
class OptimizerConfig:
    """How weights follow gradients. The defaults are the paper's for ImageNet at a batch of 4096.

    Attributes:
        name: ``lars``, ``sgd`` for the same momentum without layer-wise adaptation, or ``adamw`` (arXiv:1711.05101).
        momentum: in [0, 1); AdamW's beta 1.
        weight_decay: at step 0, of weights of two dimensions and more; biases and normalisation parameters have none.
        final_weight_decay: at the end, reached on half a cosine; None: it stays as it is.
        nesterov: whether momentum looks ahead; not of AdamW.
        start_lr: learning rate at step 0 of the warm-up.
        peak_lr: learning rate after the warm-up.
        final_lr: learning rate at the end.
        warmup_epochs: length of the warm-up; parts of an epoch are allowed.
    """

    name: str = "lars"
    momentum: float = 0.9
    weight_decay: float = 1e-6
    final_weight_decay: float | None = None
    nesterov: bool = False
    start_lr: float = 0.3
    peak_lr: float = 6.4
    final_lr: float = 0.064
    warmup_epochs: float = 10.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name={self.name!r} is not known. Choose one of: {', '.join(OPTIMIZERS)}.")
        if self.name == "adamw" and self.nesterov:
            raise ValueError("optimizer.nesterov=true does not go with optimizer.name=adamw: set it to false.")
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov=true needs optimizer.momentum above 0: set it to false.")
        names = ("weight_decay", "final_weight_decay", "start_lr", "peak_lr", "final_lr", "warmup_epochs")
        check_ranges("optimizer", self, momentum="[0, 1)", **dict.fromkeys(names, "[0, inf)"))

    def weight_decay_at(self, step: int, *, total_steps: int) -> float:
        """Of a 0-based step, for the weights that have any."""
        final = self.weight_decay if self.final_weight_decay is None else self.final_weight_decay
        return warmup_cosine(step, peak=self.weight_decay, final=final, total_steps=total_steps)


@dataclass
class SupportConfig:
    """The support mini-batch of a step, over all ranks.

    Attributes:
        classes: drawn per step, K.
        images_per_class: drawn from each.
    """

    classes: int = 960
    images_per_class: int = 7

    def __post_init__(self) -> None:
        check_ranges("pretrain.support", self, classes="[2, inf)", images_per_class="[1, inf)")


@dataclass
class CollapseConfig:
    """When a run counts as collapsed.

    Attributes:
        patience_steps: consecutive steps, collapsed in the objective's sense, after which it is reported.
        action: ``warn`` once, or ``stop`` the run.
    """

    patience_steps: int = 1000
    action: str = "stop"

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop"):
            raise ValueError(f"pretrain.collapse.action={self.action!r} must be 'warn' or 'stop'.")
        check_ranges("pretrain.collapse", self, patience_steps="[1, inf)")


@dataclass
class PretrainConfig:
    """The pre-training loop; sizes are global, whatever the number of ranks.

    Attributes:
        batch_size: unlabelled images per step.
        accumulate_steps: micro-batches per step. They go through the network one after the other, twice, so that only
            one's activations are in memory. The gradient is that of the whole batch's loss
            (paws_hpc/engine/accumulation.py); but batch normalisation takes the statistics of a micro-batch, over all
            ranks. So a run with 8 is the same on 1, 8 and 64 GPUs, and is not the run with 1.
        epochs: passes over all training images.
        support: labelled images per step.
        collapse: of representations; detection.
        ema: decay d in (0, 1) of an average of the weights that takes their place wherever they are scored, fine-tuned
            or handed on: the weights of s steps ago count d^s (paws_hpc/engine/averaging.py). None: the weights
            themselves.
        precision: ``auto`` (bf16 autocast on CUDA, fp32 elsewhere), ``bf16``, ``fp32`` or ``fp64``. The loss is fp32
            or wider in every case.
        execution: of a step. ``eager``: operation by operation. ``compiled``: network and augmentation go through
            ``torch.compile`` (paws_hpc/engine/compiled.py), which takes a while at the first start of a run; the run
            folder keeps what it makes. ``graphed``: compiled, and what lies between views and gradients is one CUDA
            graph, so that the GPU waits for no launch (paws_hpc/engine/graphs.py). ``auto``: graphed on CUDA, eager
            elsewhere. Steps of several micro-batches are compiled, and no graph. Where compiling or capturing fails,
            training goes on without; the log says why.
        log_every_steps: between readings of metrics from the device, and between the diagnostics of Fig. 4.
        validate_every_epochs: between PAWS-NN scores on the local validation split.
        checkpoint_every_steps: between checkpoints.
    """

    batch_size: int = 4096
    accumulate_steps: int = 1
    epochs: int = 100
    support: SupportConfig = field(default_factory=SupportConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    ema: float | None = None
    precision: str = "auto"
    execution: str = "auto"
    log_every_steps: int = 10
    validate_every_epochs: int = 10
    checkpoint_every_steps: int = 200

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "bf16", "fp32", "fp64"):
            raise ValueError(f"pretrain.precision={self.precision!r} must be auto, bf16, fp32 or fp64.")
        if self.execution not in EXECUTIONS:
            raise ValueError(f"pretrain.execution={self.execution!r} must be one of {', '.join(EXECUTIONS)}.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"pretrain.ema={self.ema} must be in (0, 1), such as 0.999, or null to turn it off.")
        counts = [name for name, value in vars(self).items() if type(value) is int]
        check_ranges("pretrain", self, **dict.fromkeys(counts, "[1, inf)"))

    def execution_on(self, device: str) -> str:
        """How a step runs on ``cpu`` or ``cuda``: ``eager``, ``compiled`` or ``graphed``.

        Raises:
            ValueError: ``graphed`` is asked for on a CPU.
        """
        if self.execution == "graphed" and device != "cuda":
            raise ValueError(
                f"pretrain.execution=graphed needs a GPU, not device={device}: set it to auto or compiled."
            )
        if self.execution != "auto":
            return self.execution
        return "graphed" if device == "cuda" else "eager"


def _flip_only() -> AugmentConfig:
    return AugmentConfig(
        brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0,
        jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0,
    )  # fmt: skip


@dataclass
class ClassifierConfig:
    """A sweep of a classifier (Appendix A: SGD, Nesterov momentum, no decay, cosine to 0, no warm-up).

    Batch normalisation takes each rank's own statistics, as the reference does, so that here, and here alone, the
    number of ranks is part of the result.

    Attributes:
        sweep: values of other fields by name, nested ones as ``crop.size``; every combination is a trial.
        learning_rate: at the start of the cosine.
        epochs: passes over the labelled images.
        batch_size: labelled images per step over all ranks; a smaller labelled set is one batch.
        momentum: Nesterov.
        weight_decay: of all parameters.
        warmup_epochs: linear from 0.
        crop: of training.
        augment: of training crops; flip alone in the paper.
        validate_every_epochs: between scores on the local validation split; the best is kept.
        min_trials: finished trials that selection needs; with 0 it goes on without this sweep if no trial has finished,
            and the test split is then scored without it.
    """

    sweep: dict[str, Any] = field(
        default_factory=lambda: {"learning_rate": [0.01, 0.02, 0.05, 0.1, 0.2], "epochs": [30, 50]}
    )
    learning_rate: float = 0.05
    epochs: int = 30
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    crop: CropConfig = field(default_factory=lambda: CropConfig(size=224, count=1, scale=[0.08, 1.0]))
    augment: AugmentConfig = field(default_factory=_flip_only)
    validate_every_epochs: int = 1
    min_trials: int = 1

    def check(self, section: str) -> None:
        """Check all values; bring the sweep's fields into the config's order and drop those that are null.

        Args:
            section: name of this sweep, ``finetune`` or ``baseline``.

        Raises:
            ValueError: a value that no run could use.
        """
        self._check_ranges(section)
        known, own = number_fields(replace(self, sweep={})), {each.name: each.default for each in fields(self)}
        del known["min_trials"]
        for name, values in self.sweep.items():
            where = f"{section}.sweep.{name}={values}"
            if name not in known:
                raise ValueError(f"{where}: there is no such number to sweep. Choose from {', '.join(known)}.")
            if values is None:
                continue
            if name in own and own[name] != getattr(self, name):
                raise ValueError(
                    f"{section}.{name}={getattr(self, name)} has no effect, as {where} takes its place. Write "
                    f"{section}.sweep.{name}=[{getattr(self, name)}], or null there to sweep it no more."
                )
            allowed = (int,) if known[name] is int else (int, float)
            if not isinstance(values, list) or not values or any(type(value) not in allowed for value in values):
                kind = "whole numbers" if known[name] is int else "numbers"
                raise ValueError(
                    f"{where} must be a list of {kind}, at least one. null takes the field out of the sweep."
                )
            if len(set(values)) < len(values):
                raise ValueError(f"{where} repeats a value. Remove the repetition.")
            for value in values:
                try:
                    self.of_trial(Trial({name: value}))._check_ranges(section)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
        self.sweep = {name: self.sweep[name] for name in known if self.sweep.get(name) is not None}
        if not self.sweep:
            raise ValueError(
                f"{section}.sweep={{}} has no field to sweep. Give one at least, such as "
                f"{section}.sweep.learning_rate=[0.05]."
            )
        if not 0 <= self.min_trials <= len(self.trials()):
            raise ValueError(
                f"{section}.min_trials={self.min_trials} must be between 0 and the number of trials in the sweep, "
                f"{len(self.trials())}."
            )

    def check_warmup(self, section: str) -> None:
        """Raise ValueError unless the warm-up of every trial fits into its epochs."""
        for trial in map(self.of_trial, self.trials()):
            if trial.warmup_epochs > trial.epochs:
                raise ValueError(
                    f"{section}.warmup_epochs={trial.warmup_epochs:g} does not fit into a trial of {trial.epochs} "
                    f"epochs. Shorten it, or give {section}.sweep.epochs of at least as many."
                )

    def _check_ranges(self, section: str) -> None:
        counts, rates = ("epochs", "batch_size", "validate_every_epochs"), ("weight_decay", "warmup_epochs")
        check_ranges(section, self, **dict.fromkeys(counts, "[1, inf)"), **dict.fromkeys(rates, "[0, inf)"))
        check_ranges(section, self, learning_rate="(0, inf)", momentum="[0, 1)")
        self.crop.check(f"{section}.crop")
        check_ranges(f"{section}.crop", self.crop, count="[1, 1]")
        self.augment.check(f"{section}.augment")

    def trials(self) -> list[Trial]:
        """All combinations, in a fixed order."""
        return trials(self.sweep)

    def of_trial(self, trial: Trial) -> ClassifierConfig:
        """The settings of one trial, without a sweep."""
        return trial.applied(replace(self, sweep={}, min_trials=0))


@dataclass
class SuncetConfig:
    """SuNCEt fine-tuning before the nearest-neighbour score; off unless ``steps`` is positive.

    Attributes:
        steps: of SGD with momentum 0.9, without weight decay; 180 in the paper's CIFAR10 recipe.
        images_per_class: drawn per step from every class, as centre crops; fewer if the smallest class has fewer. Those
            of all classes go through the encoder at once: for a thousand classes choose a few each.
        learning_rate: of the first step; a cosine takes it to 0.
    """

    steps: int = 0
    images_per_class: int = 64
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        # Each image is classified by the others of its class.
        check_ranges("suncet", self, steps="[0, inf)", images_per_class="[2, inf)", learning_rate="(0, inf)")


@dataclass
class TrackingConfig:
    """Weights & Biases; the local files are written whatever stands here.

    Attributes:
        wandb: ``auto`` (what the environment variable WANDB_MODE says; without it online for a user who is logged
            in, and offline otherwise), ``online``, ``offline`` or ``disabled``. Where W&B cannot be reached, online
            is offline too; ``python -m paws_hpc.sync`` uploads it later.
        project: W&B project.
        entity: W&B user or team; the account's default if none.
        tags: for the runs of this chain.
        tensorboard: whether stages that train write ``tensorboard/`` too; needs the package of that name.
    """

    wandb: str = "auto"
    project: str = "paws"
    entity: str | None = None
    tags: list[str] | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        modes = ("auto", "online", "offline", "disabled")
        if self.wandb not in modes:
            raise ValueError(f"tracking.wandb={self.wandb!r} must be one of {', '.join(modes)}.")
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", self.project):
            raise ValueError(
                f"tracking.project={self.project!r} must have 1 to 128 characters, none of / \\ # ? % : (W&B)."
            )
        if wrong := [tag for tag in self.tags or () if not 1 <= len(tag) <= 64]:
            raise ValueError(f"tracking.tags: {wrong[0]!r} must have 1 to 64 characters (W&B).")

    def check_installed(self) -> None:
        """Raise ValueError if TensorBoard is wanted and not installed."""
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "tracking.tensorboard=true needs the package tensorboard, which is not installed. Install it with pip "
                "install 'paws-hpc[tensorboard]', or launch with tracking.tensorboard=false."
            )
