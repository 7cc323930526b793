"""Memory of batches on the host: the system has it back when a batch is freed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paws_hpc.data.devices import host_buffer

CPU = torch.device("cpu")
MB = 10**6


def resident() -> int:
    """Anonymous memory of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_freed_buffers_go_back_to_the_system_whatever_lives_between_them() -> None:
    host_buffer(20 * MB, device=CPU).fill_(1)  # the C library learns from sizes that were freed
    before, buffers, between = resident(), [], []
    for size in (20, 10, 15) * 4:
        buffers.append(host_buffer(size, MB, device=CPU).fill_(1))
        between.append(torch.ones(10_000))
    there = resident() - before
    assert there > 170 * MB
    view = buffers[0][3:5]
    del buffers
    assert resident() - before < 25 * MB, "all but the one that has a view"
    assert (view == 1).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2), (1,), (3, 5, 7)])
def test_a_buffer_of_any_shape_can_be_written_and_is_numpys_too(shape: tuple[int, ...]) -> None:
    buffer = host_buffer(*shape, device=CPU)
    assert buffer.shape == shape
    assert buffer.dtype == torch.uint8
    buffer.fill_(7)
    np.testing.assert_array_equal(buffer.numpy(), np.full(shape, 7, np.uint8))
