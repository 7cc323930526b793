"""What pre-training can minimise: the config of each objective, by name.

Without torch, so that a run can be described, submitted and reported without it. The objects stand in a module each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paws_hpc.metrics import Metric
from paws_hpc.sizes import check_ranges

if TYPE_CHECKING:
    from paws_hpc.objective.base import Objective

TARGET_FLOOR = 1e-4
"""Target entries below it count as 0. The paper is silent about it; its code has this value."""


@dataclass
class ObjectiveConfig:
    """What all objectives have.

    Attributes:
        name: of the objective; a key of :data:`OBJECTIVES`. ``objective=NAME`` chooses it.
        temperature: tau of the similarity classifier, also where PAWS-NN scores.
    """

    METRICS: ClassVar[Sequence[Metric]] = ()
    """Those of this objective alone."""

    name: str = ""
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_ranges("objective", self, temperature="(0, inf)")

    def check_run(self, *, rows_per_class: int, labelled: str | None) -> None:
        """Raise ValueError if this objective cannot train so.

        Args:
            rows_per_class: support rows of each class in a step.
            labelled: ``data.labelled``.
        """

    def few_labels_warning(self, fewest: int) -> str | None:
        """What to warn of where a class has only ``fewest`` labelled images."""
        return None

    def build(self, *, num_classes: int, total_steps: int) -> Objective:
        """The objective of a run with ``num_classes`` classes in each support mini-batch."""
        raise NotImplementedError


_FEW = 4


@dataclass
class PawsConfig(ObjectiveConfig):
    """PAWS (arXiv:2104.13963). The defaults are the paper's.

    The support warm-up is **not** the paper's: it adds the supervised NCE loss over the supports with a weight that
    falls linearly from 1 to 0, so that small runs on few labels leave the neighbourhood of uniform predictions, where
    every gradient of PAWS vanishes. It is off unless ``support_warmup_fraction`` is set. Appendix D's two alternatives,
    which the paper describes and does not use, are off too.

    Attributes:
        sharpening: T of the targets and of the mean entropy.
        me_max: whether the mean entropy is maximised.
        label_smoothing: s in [0, 1); labels of supports are 1 - s + s/K and s/K.
        true_label_targets: the target of all views of a labelled image is its class (D.1), if that class is among the K
            of the step. Needs the labelled images to be among the unlabelled ones.
        entropy_weight: of the mean entropy of predictions, which is minimised (D.2).
        support_warmup_fraction: the share of all steps that the support warm-up lasts, in [0, 1]; 0 is off.
    """

    METRICS: ClassVar[Sequence[Metric]] = [
        Metric("train/loss_consistency", "Consistency", "nats", "Loss", higher_is_better=False, when_uniform=1,
               description="Consistency is the cross-entropy between targets and predictions of other views."),
        Metric("train/loss_me_max", "Mean-entropy maximisation", "nats", "Loss", "me-max", False, when_uniform=-1,
               description="Me-max is minus the entropy of the mean prediction: at -log K all classes are predicted "
               "equally often.", from_zero=False),
        Metric("train/loss_entropy", "Entropy of predictions", "nats", "Loss", "entropy", False, when_uniform=1,
               description="Entropy is the mean of single predictions (D.2), before its weight."),
        Metric("train/loss_support_nce", "Support warm-up loss", "nats", "Loss", "support NCE", False,
               "Support NCE is added with a weight that falls to 0; it keeps runs with few labels from collapsing and "
               "is not in the paper."),
        Metric("train/confidence", "Confidence of the targets", "fraction", "Confidence", "confidence",
               description="Mean probability of a target's most likely class (Fig. 4 of the paper)."),
        Metric("train/instance_discrimination", "Instance discrimination", "nats", "Diagnostics",
               "instance discrimination",
               description="NT-Xent on the unlabelled rows (instance discrimination), never trained on (Fig. 4 of the "
               "paper)."),
        Metric("train/support_classification", "Support classification", "nats", "Diagnostics",
               "support classification",
               description="Supervised NCE on the supports (support classification), a diagnostic."),
    ]  # fmt: skip

    name: str = "paws"
    sharpening: float = 0.25
    me_max: bool = True
    label_smoothing: float = 0.1
    true_label_targets: bool = False
    entropy_weight: float = 0.0
    support_warmup_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(
            "objective", self, sharpening="(0, 1]", label_smoothing="[0, 1)", entropy_weight="[0, inf)",
            support_warmup_fraction="[0, 1]",
        )  # fmt: skip

    def check_run(self, *, rows_per_class: int, labelled: str | None) -> None:
        """Refuse options that the run's data do not allow."""
        if self.support_warmup_fraction > 0 and rows_per_class < 2:
            raise ValueError(
                "objective.support_warmup_fraction classifies each support row by the others of its class, but "
                "views.support_views * pretrain.support.images_per_class is 1. Set views.support_views=2 or turn the "
                "warm-up off with objective.support_warmup_fraction=0."
            )
        if self.true_label_targets and labelled is not None:
            raise ValueError(
                "objective.true_label_targets=true needs the labelled images among those of data.train, but "
                f"data.labelled={labelled} is another store. Turn it off with objective.true_label_targets=false."
            )

    def few_labels_warning(self, fewest: int) -> str | None:
        """Collapse is likely without the support warm-up."""
        if fewest > _FEW or self.support_warmup_fraction > 0:
            return None
        return (
            f"A class has no more than {fewest} labelled image{'' if fewest == 1 else 's'}, and "
            "objective.support_warmup_fraction=0: runs with so few labels can collapse to uniform predictions. Set "
            "objective.support_warmup_fraction=0.33 and views.support_views=2."
        )

    def build(self, *, num_classes: int, total_steps: int) -> Objective:
        """:class:`paws_hpc.objective.paws.Paws`."""
        from paws_hpc.objective.paws import Paws  # noqa: PLC0415 - loads torch

        return Paws(self, num_classes=num_classes, total_steps=total_steps)


@dataclass
class RopawsConfig(PawsConfig):
    """RoPAWS (arXiv:2302.14483), for unlabelled images of no known class; docs/ropaws.md derives it.

    The defaults are those of its code. Labels are not smoothed there; ours are unless ``label_smoothing`` is 0.

    Attributes:
        prior_temperature: of the in-domain prior ``exp((cos - 1) / T)`` of the nearest support. Lower is stricter.
        label_ratio: weight of all supports together in the density, relative to all unlabelled images of a step.
        weight_power: images are weighted by this power of their in-domain probability; 0 weights all alike.
    """

    METRICS: ClassVar[Sequence[Metric]] = [
        Metric("train/in_domain", "In-domain probability", "fraction",
               description="Mean probability that an unlabelled image is of a known class."),
    ]  # fmt: skip

    name: str = "ropaws"
    prior_temperature: float = 3.0
    label_ratio: float = 5.0
    weight_power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"prior_temperature": "(0, inf)", "label_ratio": "(0, inf)", "weight_power": "[0, inf)"}
        check_ranges("objective", self, **ranges)

    def build(self, *, num_classes: int, total_steps: int) -> Objective:
        """:class:`paws_hpc.objective.ropaws.Ropaws`."""
        from paws_hpc.objective.ropaws import Ropaws  # noqa: PLC0415 - loads torch

        return Ropaws(self, num_classes=num_classes, total_steps=total_steps)


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.name: config for config in (PawsConfig, RopawsConfig)}
"""Each has a file ``conf/objective/NAME.yaml`` too."""


def objective_config(name: object) -> ObjectiveConfig:
    """The defaults of an objective.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r} is no objective. Choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[str(name)]()
