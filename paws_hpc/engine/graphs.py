"""CUDA graphs of what lies between a step's views and its gradients, so that the GPU does not wait for the host.

A step has some two thousand kernels, and the host takes longer to launch them than the GPU to run them. Captured once,
they are launched by one call. Optimiser and weight average stay outside: they are few launches, for which the host has
all the time of the graph, and their rates remain numbers of Python.

On several ranks the graph holds NCCL's collectives: those of batch normalisation, of the objective and of
DistributedDataParallel. What that asks for is done here and in ``parallel.py``, and **has not run on several GPUs**:

- A collective is captured on all ranks or on none, so ranks agree on whether a capture succeeded.
- DistributedDataParallel keeps nodes of autograd that belong to the stream on which it was made: that of the capture.
  It arranges its buckets and measures itself in its first ten steps, so eleven come before a capture.
- NCCL's watchdog asks for events from its own thread, which a thread-local capture allows. It does not watch what is
  replayed: a rank that is gone shows at the next collective outside a graph, when metrics are read. So torch's handling
  of asynchronous errors (``TORCH_NCCL_ASYNC_ERROR_HANDLING``), which old versions had to turn off, stays on.
- NCCL ends a communicator when the last graph that holds its collectives is gone, and waits for that. So graphs are let
  go (:meth:`StepGraphs.close`) before ranks part, also where an error's traceback keeps the training.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from paws_hpc import distributed
from paws_hpc.data.devices import side_stream

_LOG = logging.getLogger(__name__)

Metrics = dict[str, Tensor]
Capture = Callable[[Callable[[], Metrics]], tuple[Metrics, Callable[[], None]]]
"""Records the work of a function without doing it; returns the tensors that it returned, and what does the work."""


class Differentiate(Protocol):
    """Leaves the gradients of a step in its parameters and returns its metrics; a function of its tensors alone."""

    def __call__(self, views: list[Tensor], inputs: dict[str, Tensor], *, diagnosed: bool) -> Metrics:
        """Views by group of crops, an objective's inputs, and whether it measures what is only watched."""


class CudaCapture:
    """A :data:`Capture` with CUDA graphs. They share one memory pool, since only one is replayed at a time.

    Attributes:
        stream: of every capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self.stream = side_stream(device)

    def __call__(self, work: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
        """See :data:`Capture`; raises RuntimeError where the work cannot be captured."""
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # another thread makes views meanwhile
        current = torch.cuda.current_stream(self._device)
        try:
            with (
                torch.cuda.stream(current),  # a capture that fails does not go back to it
                torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode=mode),
            ):
                metrics = work()
        except RuntimeError:
            # Nor does torch 2.11 tell its allocators. That of the GPU would keep the pool's memory, and what several
            # streams have used, for good. That of pinned memory goes on asking the graph whether it captures.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
            self._failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()  # one that is released cannot be used again
            raise
        return metrics, graph.replay


class StepGraphs:
    """A :class:`Differentiate` that captures another, for each set of inputs, and replays it.

    The first steps of a run are run as they are: what is compiled, chosen or allocated at first use comes before a
    capture, and no step is done twice. A set that comes later is captured when it comes, as running it would take the
    memory of a step beside that of the graphs. If that fails, it is run as it is once, and captured the next time; if a
    set fails that has run, the log says so, and steps go on without graphs.

    Attributes:
        first_steps: that are run as they are.
    """

    def __init__(
        self, differentiate: Differentiate, parameters: Iterable[Tensor], device: torch.device, *, capture: Capture
    ) -> None:
        """Wrap ``differentiate``, which gives ``parameters`` new gradients, on ``device``."""
        self._differentiate, self._parameters, self._device = differentiate, list(parameters), device
        self._capture: Capture | None = capture
        self.first_steps = 3 if distributed.world_size() == 1 else 11
        self._ran: Counter[Hashable] = Counter()  # steps without a graph
        self._graphs: dict[Hashable, tuple[Metrics, Callable[[], None]]] = {}
        self._buffers: dict[Hashable, Tensor] = {}
        self._gradients: list[Tensor | None] = []

    def __call__(self, views: list[Tensor], inputs: dict[str, Tensor], *, diagnosed: bool) -> Metrics:
        """As :class:`Differentiate`; the metrics are the caller's own."""
        given: list[tuple[str | int, Tensor]] = [*enumerate(views), *inputs.items()]
        key = (diagnosed, *((name, value.shape) for name, value in given))
        if self._capture is not None and self._ran.total() >= self.first_steps:
            buffers = [self._buffer(name, value) for name, value in given]
            torch._foreach_copy_(buffers, [value for _, value in given])
            ours, fixed = buffers[: len(views)], dict(zip(inputs, buffers[len(views) :], strict=True))
            if key in self._graphs or self._record(
                key, lambda: self._differentiate(ours, fixed, diagnosed=diagnosed), self._capture
            ):
                metrics, replay = self._graphs[key]
                replay()
                for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                    parameter.grad = gradient
                return {name: value.clone() for name, value in metrics.items()}
        self._ran[key] += 1
        return self._differentiate(views, inputs, diagnosed=diagnosed)

    def close(self) -> None:
        """Let all graphs go, with their memory and the gradients in it; later steps run as they are."""
        self._capture = None
        self._drop()

    def _drop(self) -> None:
        for kept in (self._graphs, self._buffers, self._gradients):
            kept.clear()
        for parameter in self._parameters:
            parameter.grad = None

    def _buffer(self, name: str | int, value: Tensor) -> Tensor:
        """Memory of an input, the same for all graphs."""
        if (name, value.shape) not in self._buffers:
            self._buffers[name, value.shape] = torch.empty_like(value)
        return self._buffers[name, value.shape]

    def _record(self, key: Hashable, work: Callable[[], Metrics], capture: Capture) -> bool:
        """Capture ``work``, on all ranks or on none; whether that succeeded."""

        def with_gradients() -> Metrics:
            """Gradients of all graphs go to the memory of the first one's, where several ranks have them anyway."""
            metrics = work()
            gradients = [parameter.grad for parameter in self._parameters]  # None where a parameter takes none
            self._gradients = self._gradients or gradients
            pairs = zip(self._gradients, gradients, strict=True)
            moved = [
                (to, of) for to, of in pairs if to is not None and of is not None and to.data_ptr() != of.data_ptr()
            ]
            if moved:
                torch._foreach_copy_([to for to, _ in moved], [of for _, of in moved])
            return metrics

        try:
            with distributed.failing_together(self._device):
                captured = capture(with_gradients)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # what ends a broken capture says that it is broken, not why
                cause = cause.__context__
            what = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
            self._drop()  # the step that comes now needs the memory
            if self._ran[key]:
                self._capture = None
                _LOG.warning("A CUDA graph of the step fails: steps go on without, and are slower (%s).", what)
            else:
                _LOG.info("A CUDA graph of the step fails at its first step, and is tried again (%s).", what)
            return False
        self._graphs[key] = captured
        return True
