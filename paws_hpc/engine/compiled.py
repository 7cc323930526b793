"""``torch.compile`` of the network in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paws_hpc.distributed import failing_together
from paws_hpc.models.encoder import Encoder
from paws_hpc.whole_graph import COMPILER_ERRORS, or_eager, whole_graph


def compile_passes(encoder: Encoder, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have a pass over images of one size, backbone and heads, compiled as one graph at its first call.

    Where the compiler fails, a graph break included, the encoder runs as it is written, and the log says so. Sizes of
    batches and images are constants of the compiled code: a step with large and small crops has two graphs, and what
    comes with ever other sizes, scoring for instance, belongs under :func:`eager`. Names of parameters and buffers stay
    as they are. Ranks meet wherever they compile, and run compiled code on all of them or on none.

    Args:
        encoder: compiled in place.
        backend: of ``torch.compile``.
    """
    # With DistributedDataParallel it would cut the graph wherever a bucket of gradients is full, and not call that a
    # break. Whole graphs send their gradients at their end.
    torch._dynamo.config.optimize_ddp = False
    make, device = torch._dynamo.lookup_backend(backend), next(encoder.parameters()).device
    met = False

    def make_together(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Fail before anything has run if another rank does: the backward passes' collectives differ in their order."""
        nonlocal met
        met = True
        with failing_together(device):
            return make(graph, inputs)

    compiled = whole_graph(encoder._encode, backend=make_together)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal met
        met = False
        try:
            return compiled(images)
        except COMPILER_ERRORS:
            if not met:  # the others are where a graph is compiled, and this rank could not make one
                with failing_together(device):
                    raise
            raise

    encoder._encode = or_eager(encode, encoder._encode, name="the network")  # type: ignore[method-assign]


@contextmanager
def eager(encoder: Encoder) -> Iterator[None]:
    """Let the encoder run as it is written while the block runs, compiled or not.

    Of this encoder alone: a thread may be making views of the next steps meanwhile, which are to be the same bits.
    """
    compiled = vars(encoder).pop("_encode", None)
    try:
        yield
    finally:
        if compiled is not None:
            encoder._encode = compiled  # type: ignore[method-assign]
