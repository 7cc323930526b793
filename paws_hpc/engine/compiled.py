"""``torch.compile`` of the network in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from paws_hpc.models.encoder import Encoder


def compile_passes(encoder: Encoder, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have a pass over images of one size, trunk and heads, compiled as one graph at its first call.

    A graph break is an error that says where. Sizes of batches and images are constants of the compiled code: a step
    with large and small crops has two graphs, and what comes with ever other sizes, scoring for instance, belongs under
    :func:`as_written`. Names of parameters and buffers stay as they are.

    Args:
        encoder: compiled in place.
        backend: of ``torch.compile``.
    """
    # With DistributedDataParallel it would cut the graph wherever a bucket of gradients is full, and not call that a
    # break. Whole graphs send their gradients at their end.
    torch._dynamo.config.optimize_ddp = False
    compiled = torch.compile(encoder._encode, fullgraph=True, dynamic=False, backend=backend)
    encoder._encode = compiled  # type: ignore[method-assign]


def as_written() -> AbstractContextManager[None]:
    """A context in which what was compiled runs as it is written."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
