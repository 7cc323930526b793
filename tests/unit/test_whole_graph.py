"""Compiled functions, of which some make batches while others train."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_tracing

from paws_hpc.whole_graph import whole_graph


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
