"""Memory of batches on the host: used again when it is free and never before, as much as was in use at once."""

from __future__ import annotations

import gc
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paws_hpc.data.devices import BufferPool

CPU = torch.device("cpu")


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_an_epoch_takes_no_more_buffers_than_are_in_use_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of three kinds at a time and one in the making, each freed by its consumer."""
    made: list[int] = []
    new_memory = np.empty

    def noted(size: int, dtype: Any) -> np.ndarray:
        made.append(size)
        return new_memory(size, dtype)

    monkeypatch.setattr(np, "empty", noted)
    buffers, held = BufferPool(CPU), deque[list[Tensor]](maxlen=4)
    for _ in range(120):
        held.append([buffers.take(size, 1000) for size in (19, 10, 15)])
    assert sorted(made) == [10_000] * 5 + [15_000] * 5 + [19_000] * 5


def test_memory_is_not_used_again_while_anything_shares_it() -> None:
    buffers = BufferPool(CPU)
    view = buffers.take(4, 8, 3).fill_(5).permute(2, 0, 1)[1, 2:]
    array = buffers.take(96).fill_(6).numpy()[3:7]
    for _ in range(5):
        buffers.take(96).fill_(9)
    assert (view == 5).all()
    assert (array == 6).all()
    held = place(view)
    del view
    gc.collect()
    assert held in [place(taken) for taken in [buffers.take(96) for _ in range(2)]]


def test_free_memory_serves_smaller_batches_and_larger_ones_replace_it() -> None:
    buffers = BufferPool(CPU)
    large, small = buffers.take(1000), buffers.take(10)
    places = place(large), place(small)
    del large, small
    assert place(buffers.take(9)) == places[1], "the smallest that suffices"
    assert place(buffers.take(11)) == places[0]
    larger = buffers.take(2000)
    assert len(larger) == 2000
    del larger
    first, second = buffers.take(1500), buffers.take(7)
    assert place(second) == places[1], "two were in use at once, so there are two"
    assert len(first) == 1500


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2), (1,), (3, 5, 7)])
def test_a_buffer_of_any_shape_can_be_written_and_is_numpys_too(shape: tuple[int, ...]) -> None:
    buffers = BufferPool(CPU)
    for value in (7, 8):
        buffer = buffers.take(*shape)
        assert buffer.shape == shape
        assert buffer.dtype == torch.uint8
        buffer.fill_(value)
        np.testing.assert_array_equal(buffer.numpy(), np.full(shape, value, np.uint8))
