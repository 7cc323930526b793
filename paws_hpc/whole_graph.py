"""``torch.compile`` of functions that threads call side by side: the step's, and those of batches made beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_P = ParamSpec("_P")
_T = TypeVar("_T")


def whole_graph(function: Callable[_P, _T], *, backend: str | Callable[..., Any] = "inductor") -> Callable[_P, _T]:
    """The function, compiled as one graph for each size of its arguments, at the first call with it.

    A graph break is an error that says where. To be called in a thread that lasts as long as the process; what it
    returns may run in any.
    """
    # While one thread compiles, torch 2.11 takes compiled functions that others call for a part of what it traces, and
    # refuses them. With this, which is for the whole process and for good, they run as they are compiled. It also
    # leaves out a check of custom operators' aliases, of which there are none here.
    torch._dynamo.config.force_compile_during_fx_trace = True
    # Where there is no GPU, the first of these modes sets up something that ends with its thread, and without
    # which later compilations crash. The thread that makes batches ends before the process does.
    with FakeTensorMode():
        pass
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
