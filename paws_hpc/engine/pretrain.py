"""Pre-training: the state of a run and its step. The loop is in loop.py.

Legend: n unlabelled images and S support rows per rank, m small crops, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import distributed
from paws_hpc.data.devices import to_device
from paws_hpc.data.streams import PawsBatch, PawsStream
from paws_hpc.engine.accumulation import accumulate, rows_of_micro_batches, spread_momentum
from paws_hpc.engine.averaging import WeightAverage
from paws_hpc.engine.compiled import compile_passes, eager
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig
from paws_hpc.engine.errors import TrainingStoppedError
from paws_hpc.engine.graphs import CudaCapture, Differentiate, StepGraphs
from paws_hpc.engine.loop import Training, Validate
from paws_hpc.engine.metrics import MetricsWindow, ThroughputMeter
from paws_hpc.engine.optimizer import build_optimizer, set_rates
from paws_hpc.engine.parallel import move, replicate, synchronise_buffers
from paws_hpc.engine.schedule import warmup_cosine
from paws_hpc.engine.tracking import Row, Tracker
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective.config import ObjectiveConfig


class Pretraining(Training):
    """An encoder in training.

    Attributes:
        collapsed_steps: consecutive steps, up to the last one read, at which the objective had collapsed.
        collapsed: whether a collapse was reported.
        differentiate: from the views of a step to its gradients, maybe by a CUDA graph.
    """

    EPOCHS = "pretrain.epochs"
    REMEDY = "Lower optimizer.peak_lr or lengthen optimizer.warmup_epochs."
    stream: PawsStream

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
        self.optimizer_config, self.config, self.stream = optimizer, config, stream
        super().__init__(
            device, epochs=config.epochs, batch_size=config.batch_size, log_every=config.log_every_steps,
            save_every=config.checkpoint_every_steps, validate_every_epochs=config.validate_every_epochs,
        )  # fmt: skip
        self.objective = objective.build(num_classes=config.support.classes, total_steps=self.total_steps)
        self.half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoder = move(encoder, device, self.dtype)
        self.average = None if config.ema is None else WeightAverage(self.encoder, config.ema)
        execution = config.execution_on(device.type)
        # The views of several micro-batches are not in memory together, as inputs of a graph would be.
        capture = CudaCapture(device) if execution == "graphed" and config.accumulate_steps == 1 else None
        self.model = replicate(self.encoder, device, stream=None if capture is None else capture.stream)
        spread_momentum(self.encoder, config.accumulate_steps)
        if execution != "eager":
            compile_passes(self.encoder)
        self.differentiate: Differentiate = self._differentiate
        if capture is not None:
            self.differentiate = StepGraphs(self._differentiate, self.encoder.parameters(), device, capture=capture)
        self.optimizer = build_optimizer(self.encoder, optimizer)
        self.collapsed_steps, self.collapsed = 0, False

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Training`."""
        return {
            "encoder": self.encoder.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "collapsed_steps": self.collapsed_steps,
            "collapsed": self.collapsed,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Training`."""
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

    def close(self) -> None:
        """Let CUDA graphs go, which ranks cannot part with."""
        if isinstance(self.differentiate, StepGraphs):
            self.differentiate.close()

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
        """See :class:`Training`."""
        weight_decay = self.optimizer_config.weight_decay_at(batch.step, total_steps=self.total_steps)
        set_rates(self.optimizer, lr=self.learning_rate(batch.step), weight_decay=weight_decay)
        inputs = {name: to_device(value, self.device) for name, value in self.objective.inputs(batch).items()}
        diagnosed = batch.step % self.config.log_every_steps == 0
        if len(batch.micro_batches) > 1:
            metrics = self._accumulate(batch, inputs, diagnosed=diagnosed)
        else:
            views = batch.prefetched.take() if batch.prefetched is not None else self._augment(batch, 0)
            metrics = self.differentiate(views, inputs, diagnosed=diagnosed)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.encoder, batch.step)
        return metrics

    def report(self, window: MetricsWindow, meter: ThroughputMeter, tracker: Tracker) -> None:
        """Log the steps since the last call; see :class:`Training`."""
        steps, collapse = window.read(self.encoder), self.config.collapse
        for step in steps:
            row: Row = {"epoch": (step.step + 1) / self.stream.steps_per_epoch, "train/lr": step.lr, **step.metrics}
            if step is steps[-1]:
                row |= meter.read(len(steps))
            tracker.log(step.step, row)
            step.require_finite()
            self.collapsed_steps = self.collapsed_steps + 1 if self.objective.collapsed(step.metrics) else 0
            if self.collapsed_steps >= collapse.patience_steps and not self.collapsed:
                self.collapsed = True
                message = f"Collapse: {self.objective.collapse_message(step.step, collapse.patience_steps)}"
                tracker.log(step.step, {"event": "collapse", "message": message})
                if collapse.action == "stop":
                    raise TrainingStoppedError(message)

    def score(self, done: int, validate: Validate, tracker: Tracker) -> None:
        """See :class:`Training`."""
        synchronise_buffers(self.result)
        with eager(self.encoder):
            scores = validate()
        tracker.log(done - 1, {"epoch": done / self.stream.steps_per_epoch, **scores})
        self.validated = done

    def _differentiate(self, views: list[Tensor], inputs: dict[str, Tensor], *, diagnosed: bool) -> dict[str, Tensor]:
        """Give the parameters the gradients of a step, and return its metrics.

        A CUDA graph of this is replayed: no number that differs from step to step may reach it but in its tensors.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total, metrics = self._losses(inputs, *self._encode(self.model, views), diagnosed=diagnosed)
        total.backward()
        return self._with_norm(total, metrics)

    def _accumulate(self, batch: PawsBatch, inputs: dict[str, Tensor], *, diagnosed: bool) -> dict[str, Tensor]:
        """:meth:`_differentiate` in micro-batches, whose views are made one after the other, to save memory."""
        self.optimizer.zero_grad(set_to_none=True)
        total, metrics = accumulate(
            self.model,
            encode=lambda network, number: self._encode(network, self._augment(batch, number)),
            losses=lambda h, z: self._losses(inputs, h, z, diagnosed=diagnosed),
            rows=to_device(self._rows_of_micro_batches(batch), self.device),
        )
        return self._with_norm(total, metrics)

    def _augment(self, batch: PawsBatch, number: int) -> list[Tensor]:
        """Views of one micro-batch."""
        return self.stream.augment(batch.micro_batches[number], self.device, self.dtype)

    def _encode(self, network: nn.Module, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            h, z = network(views)
        return h, z

    def _losses(
        self, inputs: dict[str, Tensor], h: Tensor, z: Tensor, *, diagnosed: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = self.config.batch_size // distributed.world_size()
        return self.objective(inputs, h, z, images=images, diagnosed=diagnosed)

    @torch.no_grad()
    def _with_norm(self, total: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """All metrics of a step, without their graph."""
        gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        metrics |= {"train/loss": total, "train/grad_norm": torch.nn.utils.get_total_norm(gradients)}
        return {name: value.detach() for name, value in metrics.items()}

    def _rows_of_micro_batches(self, batch: PawsBatch) -> Tensor:
        views, images = self.stream.views, len(batch.records)
        supports = batch.num_support_rows // views.support_views
        groups = [(views.support_views, supports), (2, images), (views.small.count, images)]
        return rows_of_micro_batches(groups, len(batch.micro_batches))
