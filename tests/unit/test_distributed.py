"""Collectives over three ranks equal one process that has all rows; alone, they change nothing."""

from __future__ import annotations

import os
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paws_hpc import distributed
from tests.ranks import results_of, run_on_ranks

WORLD, ROWS = 3, 2


def joined(rank: int, world: int) -> list[Tensor]:
    """Rows computed in uneven shares and put together."""
    return [
        distributed.concatenate_rows(torch.arange(2 * total).view(total, 2)[distributed.share(total)], total)
        for total in (2, 7, 9)
    ]


def rows() -> Tensor:
    return torch.linspace(-1, 2, WORLD * ROWS * 2, dtype=torch.float64).view(-1, 2)


def loss_of(gathered: Tensor, rank: int) -> Tensor:
    """Every rank's loss looks at all rows, each in its own way."""
    return ((rank + 1) * gathered.pow(3)).sum()


def gathered(rank: int, world: int) -> Any:
    own = rows()[rank * ROWS : (rank + 1) * ROWS].requires_grad_()
    together = distributed.gather_rows(own)
    loss_of(together, rank).backward()
    return together.detach(), own.grad


def gathered_beside_constants(rank: int, world: int) -> Any:
    """Like ``gathered``, in bfloat16 on the way, with the rows' squares beside them and in the same loss."""
    own = rows()[rank * ROWS : (rank + 1) * ROWS].bfloat16().requires_grad_()
    together, squares = distributed.gather_rows_and_constants(own, own.square(), dtype=torch.float64)
    loss_of(together, rank).add(squares.sum()).backward()
    assert not squares.requires_grad
    return together.detach(), squares, own.grad


def failing(rank: int, world: int) -> list[str]:
    """What each rank hears of blocks of which none, one and two fail; and they can still talk afterwards."""
    heard = []
    for bad in (set(), {1}, {1, 2}):
        try:
            with distributed.failing_together(torch.device("cpu")):
                if rank in bad:
                    os.stat(f"rank {rank}" + "é" * 3000)
            heard.append("all is well")
        except (OSError, distributed.OtherRankError) as error:
            heard.append(f"{type(error).__name__}: {error}"[:80])
    everyone = distributed.gather_rows(torch.tensor([rank]))
    return [*heard, str(everyone.tolist())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks returned."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {WORLD: [joined, gathered, gathered_beside_constants, failing]})
    return folder


def test_rows_of_uneven_shares_come_back_in_order_on_every_rank(folder: Path) -> None:
    for result in results_of(joined, WORLD, folder):
        for total, together in zip((2, 7, 9), result, strict=True):
            assert torch.equal(together, torch.arange(2 * total).view(total, 2))


def test_gathering_adds_the_gradients_of_every_ranks_loss(folder: Path) -> None:
    everything = rows().requires_grad_()
    sum(loss_of(everything, rank) for rank in range(WORLD)).backward()
    for rank, (together, gradient) in enumerate(results_of(gathered, WORLD, folder)):
        assert torch.equal(together, everything.detach())
        torch.testing.assert_close(gradient, everything.grad[rank * ROWS : (rank + 1) * ROWS])


def test_constants_travel_with_rows_and_take_no_part_in_gradients(folder: Path) -> None:
    """Gradients are summed in the result's dtype: what is left is one rounding to bfloat16."""
    narrow = rows().bfloat16()
    everything = narrow.double().requires_grad_()
    sum(loss_of(everything, rank) for rank in range(WORLD)).backward()
    for rank, (together, squares, gradient) in enumerate(results_of(gathered_beside_constants, WORLD, folder)):
        assert torch.equal(together, narrow.double())
        assert torch.equal(squares, narrow.square().double())
        assert torch.equal(gradient, everything.grad[rank * ROWS : (rank + 1) * ROWS].bfloat16())


def test_alone_nothing_is_changed_copied_or_waited_for() -> None:
    values = rows()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.share(7) == slice(0, 7)
    assert distributed.per_rank(7, name="size") == 7
    assert distributed.gather_rows(values) is values
    together, constants = distributed.gather_rows_and_constants(values, values, dtype=values.dtype)
    assert together is values
    assert constants.data_ptr() == values.data_ptr()
    assert distributed.mean_over_ranks(values) is values
    assert distributed.concatenate_rows(values, len(values)) is values
    distributed.barrier()


def test_a_block_that_fails_on_one_rank_fails_on_all_and_says_why(folder: Path) -> None:
    for rank, (none, one, two, everyone) in enumerate(results_of(failing, WORLD, folder)):
        assert none == "all is well"
        own, other = f"OSError: [Errno {ENAMETOOLONG}]", "OtherRankError: rank 1 failed, and no rank goes on without it"
        assert one.startswith(own if rank == 1 else other)
        assert two.startswith(own if rank in (1, 2) else other)
        assert everyone == "[0, 1, 2]"


def test_a_block_that_fails_alone_raises_what_it_raised() -> None:
    with distributed.failing_together(torch.device("cpu")):
        pass
    with pytest.raises(KeyError, match="here"), distributed.failing_together(torch.device("cpu")):
        raise KeyError("here")
