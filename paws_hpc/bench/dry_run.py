"""A training step without data, arithmetic or memory: what it would keep on a GPU, and what it would communicate.

The step is the one of training: fake tensors (shapes, strides and dtypes without contents) pass through the network,
objective and optimiser, and the ranks are those of a process group that sends nothing. Neither the GPU nor the other
ranks need to be there. The tensors are called a CPU's, since torch's backward pass asks the driver about those of a
GPU; what a GPU changes is set: autocast to bfloat16, and the normalisation's kernels for CUDA.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from paws_hpc import distributed
from paws_hpc.config import Config
from paws_hpc.data.devices import PrefetchedViews
from paws_hpc.data.multicrop import CutCrops
from paws_hpc.data.streams import MicroBatch, PawsBatch, PawsStream, batches_ahead
from paws_hpc.engine import parallel
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models import norm
from paws_hpc.models.encoder import Encoder
from paws_hpc.objective import paws
from paws_hpc.objective.labels import ClassLabels, class_labels

BATCH_NORM, LOSS, GRADIENTS = "batch normalisation", "supports and mean prediction", "gradients"
_PARTS = {"paws_hpc.models.norm": BATCH_NORM, "paws_hpc.distributed": LOSS}
_BUCKETS = [1 << 20, 25 << 20]  # bytes: the first of DistributedDataParallel, and the others
_BLOCK = 512  # bytes, to multiples of which torch's allocator for CUDA rounds
_STEP = 1  # early: with the support warm-up, and without diagnostics
_MEASURED_STEPS = 10  # every other one with diagnostics: enough for both kinds of step to become CUDA graphs
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Collective:
    """One collective of a step on one rank.

    Attributes:
        part: what communicates: :data:`BATCH_NORM`, :data:`LOSS` or :data:`GRADIENTS`.
        kind: as torch's c10d library names it, such as ``allreduce``.
        bytes: of its longer side on this rank: what an all-gather returns, and a reduce-scatter takes.
    """

    part: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device. The peak is no sum: gradients come as activations go.

    Attributes:
        weights: parameters and buffers.
        gradients: of all parameters.
        optimiser: its state.
        average: the weights' moving average, with ``pretrain.ema``.
        views: augmented, float32: those of the step, and those made ahead.
        activations: of one pass through the network, kept for its backward pass; copies of weights in bfloat16 too.
        peak: the most at one time, with temporary results. Not in it: the CUDA context, workspaces of cuDNN and NCCL,
            temporary results of augmentation, and what the allocator cannot use.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    views: int
    activations: int
    peak: int


class Recorder(TorchDispatchMode):
    """Observes a step, whether its tensors are fake or real.

    Attributes:
        alive, peak: bytes of the CPU's tensors made since this was entered.
        collectives: in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.collectives: list[Collective] = []
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            sizes = [value.nbytes for value in tree_iter(args) if isinstance(value, Tensor)]
            self.collectives.append(Collective(_part(), function._opname.strip("_"), max(sizes)))
        for value in tree_iter(results):
            if isinstance(value, Tensor) and value.device == _CPU and value.untyped_storage() not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage)
                size = -(-storage.nbytes() // _BLOCK) * _BLOCK
                self._add(size)
                weakref.finalize(storage, self._add, -size).atexit = False
        return results

    def _add(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _part() -> str:
    """Which of our modules communicates; DistributedDataParallel does where it is none of these."""
    frame = sys._getframe(2)
    while frame.f_back and not frame.f_globals["__name__"].startswith("paws_hpc."):
        frame = frame.f_back
    return _PARTS.get(frame.f_globals["__name__"], GRADIENTS)


def dry_run(config: Config, *, ranks: int, cuda: bool = True) -> tuple[StepMemory, list[Collective]]:
    """What one of ``ranks`` processes keeps and communicates in a step of pre-training, its first one aside.

    Execution is eager: a compiled step keeps and communicates no more. ``cuda=False`` is the step on CPUs.

    Raises:
        ValueError: a size of the config does not divide by ranks and micro-batches.
    """
    precision = "bf16" if cuda and config.pretrain.precision == "auto" else config.pretrain.precision
    config = replace(config, pretrain=replace(config.pretrain, execution="eager", precision=precision))
    with ExitStack() as undo:
        if ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            undo.callback(dist.destroy_process_group)
        batch = _Sizes(config, _CPU).batch()
        undo.enter_context(_fake_tensors(cuda=cuda))
        recorder = undo.enter_context(Recorder())
        training, batch, views = _prepared(config, batch, _CPU)
        before, held = [], []
        training.encoder.register_forward_pre_hook(lambda *_: before.append(recorder.alive))
        training.encoder.register_forward_hook(lambda *_: held.append(recorder.alive - before.pop()))
        training.step(batch)  # makes the optimiser's state
        recorder.collectives.clear()
        recorder.peak = recorder.alive
        gradients = _bytes([each.grad for each in training.encoder.parameters()])
        if ranks > 1:  # buckets stay where they are, and each is a collective
            training.optimizer.zero_grad = lambda **_: None  # type: ignore[method-assign]
        training.step(batch)
        if ranks > 1:
            parameters: list[Tensor] = list(training.encoder.parameters())
            buckets, _ = dist._compute_bucket_assignment_by_size(parameters, _BUCKETS)
            sizes = [_bytes([parameters[at] for at in bucket]) for bucket in buckets]
            recorder.collectives += [Collective(GRADIENTS, "allreduce", size) for size in sizes]
        memory = StepMemory(
            weights=_bytes(training.encoder.state_dict()),
            gradients=gradients,
            optimiser=_bytes(training.optimizer.state_dict()["state"]),
            average=0 if training.average is None else _bytes(training.average.module.state_dict()),
            views=_bytes(views or training.stream.augment(batch.micro_batches[0], _CPU, training.dtype)),
            activations=max(held),
            peak=recorder.peak,
        )
    return memory, recorder.collectives


def measured_peak(config: Config, *, ranks: int) -> int:
    """Bytes that torch's allocator had taken from this GPU at the most, in steps on :func:`one_share` of ``ranks``.

    They run as they do in training, with CUDA graphs and their memory, some with diagnostics.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    config, device = one_share(config, ranks=ranks), torch.device("cuda", torch.cuda.current_device())
    torch.compiler.reset()  # of the same code it would not compile many networks
    gc.collect()  # what was measured before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training, batch, _ = _prepared(config, _Sizes(config, device).batch(), device)
    for step in range(_MEASURED_STEPS):
        training.step(replace(batch, step=step))
    return torch.cuda.max_memory_reserved()


def one_share(config: Config, *, ranks: int) -> Config:
    """A run by one rank alone, of as many images and supports as each of ``ranks`` has. Every support has its class."""
    pretrain = config.pretrain
    rows = pretrain.support.classes * pretrain.support.images_per_class // ranks
    support = replace(pretrain.support, classes=rows, images_per_class=1)
    alone = replace(pretrain, batch_size=pretrain.batch_size // ranks, support=support, log_every_steps=2)
    return replace(config, pretrain=alone)


def _prepared(
    config: Config, batch: PawsBatch, device: torch.device
) -> tuple[Pretraining, PawsBatch, list[list[Tensor]]]:
    """Training before its first step, that step's batch, and the views that are there before a step, if any are."""
    stream = _Sizes(config, device)
    training = Pretraining(
        Encoder(config.model), objective=config.objective, optimizer=config.optimizer, config=config.pretrain,
        stream=stream, device=device,
    )  # fmt: skip
    views = []
    if config.pretrain.accumulate_steps == 1:
        views = [stream.augment(batch.micro_batches[0], device, training.dtype)]
        batch = replace(batch, prefetched=PrefetchedViews(partial(list, views[0]), None))
        size = sum(view.nbytes + view.numel() for view in views[0])  # with the crops they are made of
        views += [stream.augment(batch.micro_batches[0], device, training.dtype) for _ in range(batches_ahead(size))]
    return training, batch, views


def _bytes(tensors: Any) -> int:
    return sum(value.nbytes for value in tree_iter(tensors) if isinstance(value, Tensor))


class _Sizes(PawsStream):
    """Batches that have sizes and no contents."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.views, self.device, self.steps_per_epoch = config.pretrain, config.views, device, 100

    def batch(self, step: int = _STEP) -> PawsBatch:
        """One rank's."""
        config, views, parts = self.config, self.views, self.config.accumulate_steps
        support, share = config.support, partial(distributed.per_rank, accumulate_steps=parts)
        n = share(config.batch_size, name="pretrain.batch_size")
        name = "pretrain.support.classes * pretrain.support.images_per_class"
        rows = views.support_views * share(support.classes * support.images_per_class, name=name)

        def crops(count: int, size: int) -> CutCrops:
            images = torch.empty(count // parts, 3, size, size, dtype=torch.uint8, device="meta")
            return CutCrops(images, torch.empty(len(images), 0))

        small = crops(views.small.count * n, views.small.size) if views.small.count else None
        micro_batch = MicroBatch(crops(rows, views.large.size), crops(2 * n, views.large.size), small)
        classes = torch.arange(rows * distributed.world_size()) % support.classes
        known = torch.zeros(n, dtype=torch.bool)
        return PawsBatch(step, np.arange(n), (micro_batch,) * parts, classes, known, known.long())

    def augment(self, micro_batch: MicroBatch, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Views, without the temporary results of augmentation."""
        return [torch.randn(crops.images.shape, dtype=dtype, device=device) for crops in micro_batch.crop_groups]


@contextmanager
def _fake_tensors(*, cuda: bool) -> Iterator[None]:
    """Make tensors fake while the block runs, and choose the kernels of the device.

    Class numbers stay real: the host sorts them.
    """

    def sorted_by_the_host(*inputs: Any, **named: Any) -> ClassLabels:
        with unset_fake_temporarily():
            return class_labels(*inputs, **named)

    def per_channel(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return tuple(input.new_empty(input.shape[1], dtype=torch.float32) for _ in range(2))

    with ExitStack() as undo:
        kernels = undo.enter_context(torch.library._scoped_library("aten", "IMPL", "Meta"))
        kernels.impl("batch_norm_stats", per_channel)
        kernels.impl("batch_norm_backward_reduce", lambda *inputs: (*per_channel(*inputs), *per_channel(*inputs)))
        kernels.impl("batch_norm_elemt", lambda input, *_: torch.empty_like(input))
        kernels.impl("batch_norm_backward_elemt", lambda gradient, *_: torch.empty_like(gradient))
        undo.enter_context(patch.object(norm, "_by_cuda_kernel", lambda _: cuda))
        undo.enter_context(patch.object(paws, "class_labels", sorted_by_the_host))
        undo.enter_context(patch.object(parallel, "DistributedDataParallel", lambda model, **_: model))
        undo.enter_context(patch.object(nn.Module, "_apply", _convert))
        undo.enter_context(patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """:meth:`torch.nn.Module._apply`, which cannot replace parameters that are fake."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = function(buffer)
    return module


def _copied(tensor: Tensor, memo: Any) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
