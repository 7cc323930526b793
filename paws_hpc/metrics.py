"""The catalogue of metrics: what each name in ``metrics.jsonl`` means and how it is shown.

The console, TensorBoard, Weights & Biases, the reports and comparisons all read it. An objective's config declares its
own as ``METRICS``, the others stand here; :func:`paws_hpc.stages.catalogue.catalogue` joins them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["", "nats", "fraction", "images/s", "GB"]


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f} %"


_FORMATS: dict[Unit, Callable[[float], str]] = {
    "": "{:.4g}".format,
    "nats": "{:.4g}".format,
    "fraction": percent,
    "images/s": "{:,.0f}".format,
    "GB": "{:.1f}".format,
}


@dataclass(frozen=True)
class Metric:
    """A number that a stage logs.

    Attributes:
        name: in ``metrics.jsonl``, TensorBoard and W&B; ``*`` stands for a number, as in ``gpu/node*/utilisation``.
        title: of its curve.
        unit: ``fraction`` is in [0, 1] and shown in per cent; metrics of one panel and unit share their axes.
        panel: title of the figure that shows it with others in reports; None: no figure.
        label: in legends and on the console; the title in lower case if none.
        higher_is_better: whether the best value is the highest, the lowest, or (None) neither.
        description: one sentence or more for captions.
        when_uniform: its value in multiples of log K while all predictions are uniform over K classes, which is where
            a collapsed run stays; None if it has no such level.
        log_scale: whether its axis is logarithmic.
        from_zero: whether its axis begins at 0.
        on_console: whether the progress line shows it.
    """

    name: str
    title: str
    unit: Unit = ""
    panel: str | None = None
    label: str = ""
    higher_is_better: bool | None = None
    description: str = ""
    when_uniform: int | None = None
    log_scale: bool = False
    from_zero: bool = True
    on_console: bool = False

    @property
    def short(self) -> str:
        """Its name in a legend."""
        return self.label or self.title.lower()

    @property
    def axis(self) -> Literal["step", "epoch"]:
        """The field of ``metrics.jsonl`` against which a run's report draws it."""
        return "epoch" if self.name.startswith("val/") else "step"

    @property
    def best(self) -> Literal["min", "max"]:
        """Which of its values a summary keeps beside the last one."""
        return "min" if self.higher_is_better is False else "max"

    @property
    def pattern(self) -> str:
        """A regular expression of its names."""
        return re.escape(self.name).replace(r"\*", r"[0-9]+")

    def show(self, value: float) -> str:
        """A value for people."""
        return _FORMATS[self.unit](value)


COMMON = [
    Metric("train/loss", "Loss", "nats", "Loss", "loss", False,
           "What training minimises, the weighted sum of the terms.", on_console=True),
    Metric("val/paws_nn_top1", "PAWS-NN on the local validation split", "fraction", "Validation accuracy", "PAWS-NN",
           True, "Soft nearest neighbours with all labelled images as support; nothing is trained for it.",
           from_zero=False, on_console=True),
    Metric("val/top1", "Accuracy on the local validation split", "fraction", None, "validation", True,
           from_zero=False, on_console=True),
    Metric("train/lr", "Learning rate", "", "Learning rate",
           description="Linear warm-up, then a cosine, per step."),
    Metric("train/grad_norm", "Gradient norm", "", "Gradient norm",
           description="Over all parameters, before the optimiser; nothing is clipped.", log_scale=True),
    Metric("train/images_per_s", "Throughput", "images/s", "Throughput", "img/s", True,
           "Images that are trained on per second, over all ranks.", on_console=True),
    Metric("train/data_wait", "Waiting for data", "fraction", "Throughput", "data wait", False,
           "The share of time spent waiting for data.", on_console=True),
    Metric("gpu/node*/utilisation", "GPU utilisation by node", "fraction", "GPUs by node", "utilisation", True,
           "Utilisation is the share of a moment in which a GPU worked, the mean over a node's GPUs. A node that stays "
           "below the others keeps them waiting."),
    Metric("gpu/node*/memory_gb", "Memory of each node's fullest GPU", "GB", "GPUs by node", "memory (GB)",
           description="Memory is that of the node's fullest GPU, in units of 10⁹ bytes."),
    *(Metric(f"test/{method}_top1", f"{name} on the test split", "fraction", label=name, higher_is_better=True)
      for method, name in {
          "paws_nn": "PAWS-NN", "linear_probe": "Linear probe", "k_nn": "k nearest neighbours",
          "fine_tuned": "Fine-tuned", "baseline": "Baseline",
      }.items()),
]  # fmt: skip
"""Metrics of stages; those of one objective stand in its config's ``METRICS``."""


def is_validation(name: str) -> bool:
    """Whether a metric is of the local validation split; a validation that is repeated logs all of these again."""
    return name.startswith("val/")
