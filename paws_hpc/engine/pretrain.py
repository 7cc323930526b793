"""Pre-training: the state of a run and its step. The loop is in pretrain_loop.py.

Legend: n unlabelled images and S support rows per rank, m small crops, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.engine.accumulation import accumulate, rows_of_micro_batches, spread_momentum
from paws_hpc.engine.averaging import WeightAverage
from paws_hpc.engine.compiled import compile_passes
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig
from paws_hpc.engine.optimizer import build_optimizer, set_rates
from paws_hpc.engine.parallel import move, replicate
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective.config import ObjectiveConfig


class Pretraining:
    """An encoder in training: the objects that a checkpoint must hold, and the step that moves them.

    Attributes:
        encoder: being trained.
        collapsed_steps: consecutive steps, up to the last one read, at which the objective had collapsed.
        collapsed: whether a collapse was reported.
        validated: steps done when the encoder was last scored.
    """

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
        self.optimizer_config, self.config, self.stream, self.device = optimizer, config, stream, device
        self.total_steps = config.epochs * stream.steps_per_epoch
        self.objective = objective.build(num_classes=config.support.classes, total_steps=self.total_steps)
        self.half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoder = move(encoder, device, self.dtype)
        self.average = None if config.ema is None else WeightAverage(self.encoder, config.ema)
        self.model = replicate(self.encoder, device)
        spread_momentum(self.encoder, config.accumulate_steps)
        if config.compile:
            compile_passes(self.encoder)
        self.optimizer = build_optimizer(self.encoder, optimizer)
        self.collapsed_steps, self.collapsed, self.validated = 0, False, 0

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on; the data's position is the step itself."""
        return {
            "encoder": self.encoder.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "collapsed_steps": self.collapsed_steps,
            "collapsed": self.collapsed,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.encoder.load_state_dict(state["encoder"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.collapsed_steps, self.collapsed = state["collapsed_steps"], state["collapsed"]
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
        schedule = self.optimizer_config
        return warmup_cosine(
            step,
            start=schedule.start_lr,
            peak=schedule.peak_lr,
            final=schedule.final_lr,
            warmup_steps=round(schedule.warmup_epochs * self.stream.steps_per_epoch),
            total_steps=self.total_steps,
        )

    def step(self, batch: PawsBatch) -> dict[str, Tensor]:
        """One optimisation step; nothing is read back from the device.

        Returns:
            This rank's metrics, 0-dimensional.
        """
        weight_decay = self.optimizer_config.weight_decay_at(batch.step, total_steps=self.total_steps)
        set_rates(self.optimizer, lr=self.learning_rate(batch.step), weight_decay=weight_decay)
        self.optimizer.zero_grad(set_to_none=True)
        if len(batch.micro_batches) == 1:
            total, metrics = self._losses(batch, *self._encode(self.model, batch, 0))
            total.backward()
        else:
            total, metrics = accumulate(
                self.model,
                encode=lambda network, number: self._encode(network, batch, number),
                losses=lambda h, z: self._losses(batch, h, z),
                rows=to_device(self._rows_of_micro_batches(batch), self.device),
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.encoder, batch.step)
        with torch.no_grad():
            gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
            metrics |= {"train/loss": total, "train/grad_norm": torch.nn.utils.get_total_norm(gradients)}
        return {name: value.detach() for name, value in metrics.items()}

    def _encode(self, network: nn.Module, batch: PawsBatch, number: int) -> tuple[Tensor, Tensor]:
        """(h, z) of one micro-batch."""
        if batch.prefetched is not None:
            views = batch.prefetched.take()
        else:
            views = self.stream.augment(batch.micro_batches[number], self.device, self.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            h, z = network(views)
        return h, z

    def _losses(self, batch: PawsBatch, h: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(batch, h, z, diagnosed=batch.step % self.config.log_every_steps == 0)

    def _rows_of_micro_batches(self, batch: PawsBatch) -> Tensor:
        views, images = self.stream.views, len(batch.records)
        supports = batch.num_support_rows // views.support_views
        groups = [(views.support_views, supports), (2, images), (views.small.count, images)]
        return rows_of_micro_batches(groups, len(batch.micro_batches))
