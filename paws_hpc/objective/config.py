"""What pre-training minimises. Without torch, so that a run can be described and submitted before it is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class ObjectiveConfig:
    """What is minimised in pre-training.

    The defaults are the paper's. The support warm-up is **not** the paper's: it adds the supervised NCE loss over the
    supports with a weight that falls linearly to 0, so that small runs on few labels leave the neighbourhood of
    uniform predictions, where every gradient of PAWS vanishes. It is off unless ``support_warmup_fraction`` is set.
    Appendix D's two alternatives, which the paper describes and does not use, are off too.

    Attributes:
        temperature: tau of the similarity classifier.
        sharpening: T of the targets and of the mean entropy.
        target_floor: target entries below it are set to 0, without renormalising; 0 keeps all.
        me_max: whether the mean entropy is maximised.
        label_smoothing: s in [0, 1); labels of supports are 1 - s + s/K and s/K.
        true_label_targets: whether an image that is labelled itself has its class as the target of all its views, not
            its other view's prediction (D.1). It needs the labelled images to be among the unlabelled ones, and in a
            step it concerns those whose class is among the K drawn.
        open_set_weighting: whether an unlabelled image weighs the less, the less it resembles any support, for data in
            which some images are of no labelled class (paws_hpc/objective/open_set.py). Ours, not the paper's.
        entropy_weight: of the mean entropy of predictions, which is minimised (D.2).
        support_warmup_fraction: the share of all steps that the support warm-up lasts, in [0, 1]; 0 is off.
        support_warmup_weight: weight of the support loss at step 0.
    """

    temperature: float = 0.1
    sharpening: float = 0.25
    target_floor: float = 1e-4
    me_max: bool = True
    label_smoothing: float = 0.1
    true_label_targets: bool = False
    open_set_weighting: bool = False
    entropy_weight: float = 0.0
    support_warmup_fraction: float = 0.0
    support_warmup_weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that no run could use."""
        _require("temperature", self.temperature, self.temperature > 0, "above 0 (the paper's is 0.1)")
        _require("sharpening", self.sharpening, 0 < self.sharpening <= 1, "in (0, 1] (the paper's is 0.25)")
        _require("target_floor", self.target_floor, 0 <= self.target_floor < 1, "in [0, 1); 0 keeps every entry")
        _require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")
        entropy = self.entropy_weight
        _require("entropy_weight", entropy, 0 <= entropy < math.inf, "0 or more; 0 is off")
        fraction, weight = self.support_warmup_fraction, self.support_warmup_weight
        _require("support_warmup_fraction", fraction, 0 <= fraction <= 1, "a share of all steps in [0, 1]; 0 is off")
        _require("support_warmup_weight", weight, weight >= 0, "0 or more; support_warmup_fraction=0 turns it off")


def _require(field: str, value: float, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"objective.{field}={value} must be {wanted}.")
