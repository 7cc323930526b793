"""PAWS pre-training: the state of a run and its step; the loop is in pretrain_loop.py.

Legend: n unlabelled images and S support rows per rank, m small crops, K classes in the support, D features, W ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.engine.accumulation import accumulate, rows_of_parts, spread_momentum
from paws_hpc.engine.averaging import WeightAverage
from paws_hpc.engine.compiled import compile_passes
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig
from paws_hpc.engine.optimizer import build_optimizer, set_rates
from paws_hpc.engine.parallel import move, replicate
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective.config import ObjectiveConfig
from paws_hpc.objective.diagnostics import CollapseMonitor, diagnose
from paws_hpc.objective.labels import class_labels
from paws_hpc.objective.nce import supervised_nce
from paws_hpc.objective.open_set import support_similarity_weights
from paws_hpc.objective.paws import TrueClasses, paws_loss, support_warmup_weight


class Pretraining:
    """An encoder in training: the objects that a checkpoint must hold, and the step that moves them."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        config: PretrainConfig,
        stream: PawsStream,
        device: torch.device,
    ) -> None:
        self.objective, self.optimizer_config, self.config = objective, optimizer, config
        self.stream, self.device = stream, device
        self.total_steps = config.epochs * stream.steps_per_epoch
        self.half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoder = move(encoder, device, dtype)
        self.average = None if config.ema is None else WeightAverage(self.encoder, config.ema)
        self.model = replicate(self.encoder, device)
        spread_momentum(self.encoder, config.accumulate_steps)
        if config.compile:
            compile_passes(self.encoder)
        self.optimizer = build_optimizer(self.encoder, optimizer)
        collapse = config.collapse
        self.monitor = CollapseMonitor(
            config.support.classes, tolerance=collapse.tolerance, patience=collapse.patience_steps
        )
        self.collapsed = False
        self.validated = 0  # steps done when the encoder was last scored

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; the data's place is the step itself."""
        return {
            "encoder": self.encoder.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "monitor": self.monitor.state_dict(),
            "collapsed": self.collapsed,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.encoder.load_state_dict(state["encoder"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["monitor"])
        self.collapsed = state["collapsed"]
        self.validated = state["validated"]

    @property
    def result(self) -> Encoder:
        """The encoder that is scored and handed on: the average of the weights if there is one, or the weights."""
        return self.encoder if self.average is None else self.average.module

    def awaits_validation(self, done: int) -> bool:
        """Whether the encoder is to be scored after ``done`` steps, and was not yet."""
        every = self.config.validate_every_epochs * self.stream.steps_per_epoch
        return (done % every == 0 or done == self.total_steps) and self.validated != done

    def learning_rate(self, step: int) -> float:
        """Of a 0-based step."""
        schedule, per_epoch = self.optimizer_config, self.stream.steps_per_epoch
        return warmup_cosine(
            step,
            start=schedule.start_lr,
            peak=schedule.peak_lr,
            final=schedule.final_lr,
            warmup_steps=round(schedule.warmup_epochs * per_epoch),
            total_steps=self.total_steps,
        )

    def step(self, batch: PawsBatch) -> dict[str, Tensor]:
        """One optimisation step (paper, eq. 4); nothing is read back from the device.

        Returns:
            0-dimensional tensors named as in ``metrics.jsonl``, of this rank.
        """
        weight_decay = self.optimizer_config.weight_decay_at(batch.step, total_steps=self.total_steps)
        set_rates(self.optimizer, lr=self.learning_rate(batch.step), weight_decay=weight_decay)
        self.optimizer.zero_grad(set_to_none=True)
        if len(batch.micro_batches) == 1:
            h, z = self._encode(self.model, batch, 0)
            metrics = self._losses(batch, h, z)
            metrics["train/loss"].backward()
        else:
            metrics = self._accumulate(batch)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.encoder, batch.step)
        with torch.no_grad():
            metrics["train/grad_norm"] = torch.nn.utils.get_total_norm(
                [p.grad for p in self.encoder.parameters() if p.grad is not None]
            )
        return {name: value.detach() for name, value in metrics.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and images."""
        return next(self.encoder.parameters()).dtype

    def _encode(self, network: nn.Module, batch: PawsBatch, part: int) -> tuple[Tensor, Tensor]:
        if batch.prefetched is not None:
            views = batch.prefetched.take()
        else:
            views = self.stream.augment(batch.micro_batches[part], self.device, self.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            h, z = network(views)
        return h, z

    def _accumulate(self, batch: PawsBatch) -> dict[str, Tensor]:
        views, images, parts = self.stream.views, len(batch.records), len(batch.micro_batches)
        supports = batch.num_support_rows // views.support_views
        kinds = [(views.support_views, supports), (2, images), (views.small.count, images)]
        return accumulate(
            self.model,
            encode=lambda network, part: self._encode(network, batch, part),
            losses=lambda h, z: self._losses(batch, h, z),
            rows=to_device(rows_of_parts(kinds, parts), self.device),
        )

    def _losses(self, batch: PawsBatch, h: Tensor, z: Tensor) -> dict[str, Tensor]:
        rows, large = batch.num_support_rows, 2 * len(batch.records)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        supports, target_supports = distributed.gather_rows_and_constants(z[:rows], h[:rows], dtype=wide)
        labels = class_labels(
            batch.support_classes,
            self.config.support.classes,
            smoothing=self.objective.label_smoothing,
            device=self.device,
        )
        targets = h[rows : rows + large].detach().to(wide)
        weights = self._image_weights(batch, targets, target_supports, labels.classes)
        loss = paws_loss(
            z[rows:].to(wide),
            supports,
            targets,
            target_supports,
            labels,
            temperature=self.objective.temperature,
            sharpening=self.objective.sharpening,
            num_small_crops=self.stream.views.small.count,
            me_max=self.objective.me_max,
            target_floor=self.objective.target_floor,
            true_classes=self._true_classes(batch),
            entropy_weight=self.objective.entropy_weight,
            image_weights=weights,
        )
        metrics = {"train/loss": loss.total, "train/loss_consistency": loss.consistency}
        if self.objective.me_max:
            metrics["train/loss_me_max"] = loss.me_max
        if self.objective.entropy_weight > 0:
            metrics["train/loss_entropy"] = loss.entropy
        if weights is not None:
            metrics["train/image_weight"] = weights.mean()
        weight = support_warmup_weight(
            batch.step,
            total_steps=self.total_steps,
            fraction=self.objective.support_warmup_fraction,
            weight=self.objective.support_warmup_weight,
        )
        if weight > 0:  # ours, not the paper's: keeps few-label runs from collapsing in their first epochs
            hard = replace(labels, smoothing=0.0)
            metrics["train/loss_support_nce"] = supervised_nce(supports, hard, temperature=self.objective.temperature)
            metrics["train/loss"] = loss.total + weight * metrics["train/loss_support_nce"]
        if batch.step % self.config.diagnose_every_steps == 0:
            metrics |= diagnose(z[rows : rows + large].to(wide), supports, labels, loss, self.objective)
        return metrics

    def _image_weights(
        self, batch: PawsBatch, targets: Tensor, supports: Tensor, support_classes: Tensor
    ) -> Tensor | None:
        if not self.objective.open_set_weighting:
            return None
        images = to_device(batch.support_images, self.device)
        return support_similarity_weights(targets, supports, support_classes, images)

    def _true_classes(self, batch: PawsBatch) -> TrueClasses | None:
        if not self.objective.true_label_targets:
            return None
        return TrueClasses(to_device(batch.known, self.device), to_device(batch.known_classes, self.device))
