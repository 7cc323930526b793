"""Compiled functions, of which some make batches while others train."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx._symbolic_trace import is_fx_tracing

from paws_hpc.whole_graph import or_eager, whole_graph


@pytest.mark.usefixtures("fresh_compiler")
def test_what_is_compiled_runs_as_ever_while_another_thread_compiles() -> None:
    """Slow data: batches are still made when the first step compiles the network."""
    batch = torch.arange(24.0).view(3, 8)
    views = whole_graph(lambda images: images.flip(-1) / 3 + 1, backend="aot_eager")
    expected, ready, done = views(batch), threading.Event(), threading.Event()
    wrong, during = list[object](), 0

    def make_batches() -> None:
        nonlocal during
        while not done.is_set():
            during += is_fx_tracing()
            try:
                if not torch.equal(views(batch), expected):
                    wrong.append("other views")
            except RuntimeError as error:
                wrong.append(error)
            ready.set()  # a thread compiles at its own first call

    network = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(30)))
    beside = threading.Thread(target=make_batches)
    beside.start()
    ready.wait()
    try:
        loss: Tensor = whole_graph(network, backend="aot_eager")(batch).sum()
        loss.backward()
    finally:
        done.set()
        beside.join()
    assert during > 10, "the compiler was at work meanwhile"
    assert not wrong


def test_compiling_goes_on_after_the_thread_that_compiled_first_has_ended() -> None:
    """In a process of its own, which would crash."""
    program = """
import threading, torch
from paws_hpc.whole_graph import whole_graph
one, other = (whole_graph(function, backend="eager") for function in (torch.sin, lambda x: x * 3))
thread = threading.Thread(target=one, args=(torch.ones(3),))
thread.start()
thread.join()
print(other(torch.ones(3)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[3.0, 3.0, 3.0]\n"), done.stderr


def make_boxed(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    return make_boxed_func(graph.forward)


def no_compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    raise OSError("no such file: gcc\nand a page about it")


class Breaking(nn.BatchNorm1d):
    """A network that cannot be one graph."""

    def forward(self, rows: Tensor) -> Tensor:
        print(end="")
        return super().forward(rows)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("network", "backend", "reason"),
    [
        (nn.BatchNorm1d, no_compiler, "OSError: no such file: gcc)"),
        (nn.BatchNorm1d, aot_autograd(fw_compiler=make_boxed, bw_compiler=no_compiler), "OSError: no such file: gcc)"),
        (Breaking, "eager", "Unsupported: "),
    ],
    ids=["forward", "backward", "graph break"],
)
def test_where_the_compiler_fails_the_function_runs_as_it_is_written_and_the_log_says_so_once(
    network: type[nn.BatchNorm1d], backend: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    ends = []
    for compiled in (False, True):
        norm = network(8)
        call = or_eager(whole_graph(norm.forward, backend=backend), norm.forward, name="it") if compiled else norm
        for step in range(3):
            rows = torch.arange(24.0).view(3, 8) + step
            (call(rows) ** 2).sum().backward()
        ends.append([*norm.buffers(), norm.weight.grad, norm.bias.grad])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    (record,) = [record for record in caplog.records if record.name == "paws_hpc.whole_graph"]
    assert record.levelno == logging.WARNING
    assert record.message.startswith("torch.compile fails for it, which runs eagerly from here on (")
    assert reason in record.message
    assert "\n" not in record.message


def test_an_error_of_compiled_code_that_runs_is_raised() -> None:
    def compiled(rows: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        or_eager(compiled, torch.sin, name="it")(torch.ones(1))
