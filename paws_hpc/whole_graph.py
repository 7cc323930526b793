"""``torch.compile`` of functions that threads call side by side: the step's, and those of batches made beside it."""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode

COMPILER_ERRORS = TorchDynamoException, FailOnRecompileLimitHit
_LOG = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


def whole_graph(function: Callable[_P, _T], *, backend: str | Callable[..., Any] = "inductor") -> Callable[_P, _T]:
    """The function, compiled as one graph for each size of its arguments, at the first call with it.

    A graph break is an error that says where; :func:`or_eager` falls back. To be called in a thread that lasts as long
    as the process; what it returns may run in any.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container that runs under any user's number; torch names a folder by the name
        os.environ["USER"] = f"uid{os.getuid()}"
    # While one thread compiles, torch 2.11 takes compiled functions that others call for a part of what it traces, and
    # refuses them. With this, which is for the whole process and for good, they run as they are compiled. It also
    # leaves out a check of custom operators' aliases, of which there are none here.
    torch._dynamo.config.force_compile_during_fx_trace = True
    # Compile the backward pass with the forward pass, not when it is first needed: an error there would end a step
    # whose running statistics have moved already.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    # Where there is no GPU, the first of these modes sets up something that ends with its thread, and without
    # which later compilations crash. The thread that makes batches ends before the process does.
    with FakeTensorMode():
        pass
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def or_eager(compiled: Callable[_P, _T], eager: Callable[_P, _T], *, name: str) -> Callable[_P, _T]:
    """``compiled``, a function of :func:`whole_graph`, until its compiler fails; from then on ``eager``.

    A compiler fails before anything of the call has run, so ``eager`` makes up for it with the same arguments. Errors
    of compiled code that runs, such as lack of memory, are raised.

    Args:
        compiled: called first.
        eager: computes the same.
        name: what they compute, for the log.
    """
    failed = False

    def call(*inputs: _P.args, **named: _P.kwargs) -> _T:
        nonlocal failed
        if not failed:
            try:
                return compiled(*inputs, **named)
            except COMPILER_ERRORS as error:
                failed = True
                cause = getattr(error, "inner_exception", error)
                what = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
                _LOG.warning("torch.compile fails for %s, which runs eagerly from here on (%s).", name, what)
        return eager(*inputs, **named)

    return call
