"""Batch normalisation over several ranks is batch normalisation of the whole batch, gradients included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paws_hpc.models.norm import GlobalBatchNorm1d, GlobalBatchNorm2d, set_statistics
from tests.ranks import results_of, run_on_ranks

CHANNELS = 5
Results = dict[str, Any]


def batch(shape: tuple[int, ...], *, constant: bool = False) -> tuple[Tensor, Tensor]:
    """Rows whose mean is 1e3 deviations away from zero, and that drift: where sums of squares would lose six digits."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    drift = torch.linspace(-1, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    rows = 1e3 + rows + 3 * drift
    if constant:  # as a convolution gives whose inputs are all dead
        rows[:, 0] = 1e3
    return rows, torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(dimensions: int) -> nn.Module:
    kind = GlobalBatchNorm1d if dimensions == 2 else GlobalBatchNorm2d
    norm = kind(CHANNELS, momentum=0.3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return norm


def train_twice(norm: nn.Module, rows: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Two steps, the loss being sum(upstream * y): the outputs, gradients and running statistics."""
    rows = rows.clone().requires_grad_()
    for _ in range(2):
        outputs = norm(rows)
        (outputs * upstream).sum().backward()
    state = {"outputs": outputs.detach(), "rows.grad": rows.grad}
    gradients = {f"{name}.grad": parameter.grad for name, parameter in norm.named_parameters()}
    return state | gradients | {name: value for name, value in norm.named_buffers() if value.is_floating_point()}


def rows_of(rank: int, world: int, total: int, *, even: bool) -> slice:
    """A rank's rows; if not even, the first rank holds a single one."""
    if even:
        return slice(rank * total // world, (rank + 1) * total // world)
    bounds = [0, 1, *[1 + (total - 1) * (r + 1) // (world - 1) for r in range(world - 1)]]
    return slice(bounds[rank], bounds[rank + 1])


CASES = {  # shape, rows shared evenly, memory format, first channel constant
    "rows": ((16, CHANNELS), True, torch.contiguous_format, False),
    "rows, one rank has one": ((17, CHANNELS), False, torch.contiguous_format, False),
    "rows, a constant channel": ((16, CHANNELS), True, torch.contiguous_format, True),
    "images": ((8, CHANNELS, 4, 3), True, torch.contiguous_format, False),
    "images, channels last": ((8, CHANNELS, 4, 3), True, torch.channels_last, False),
    "images, one rank has one": ((9, CHANNELS, 4, 3), False, torch.channels_last, False),
}


def all_cases(rank: int, world: int) -> Results:
    results = {}
    for name, (shape, even, memory_format, constant) in CASES.items():
        rows, upstream = batch(shape, constant=constant)
        own = rows_of(rank, world, shape[0], even=even)
        local = rows[own].contiguous(memory_format=memory_format)
        results[name] = train_twice(layer(len(shape)), local, upstream[own])
        if memory_format is torch.channels_last:
            assert results[name]["outputs"].is_contiguous(memory_format=torch.channels_last)
    return results


def on_gpu(rank: int, world: int) -> Results | None:
    """The cases on one GPU that all ranks share, in float32 and bfloat16; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (shape, even, memory_format, constant) in CASES.items():
            rows, upstream = gpu_batch(shape, dtype, constant)
            own = rows_of(rank, world, shape[0], even=even)
            local = rows[own].cuda().contiguous(memory_format=memory_format)
            state = train_twice(layer(len(shape)).float().cuda(), local, upstream[own].cuda())
            results[f"{name} {dtype}"] = {key: value.cpu().double() for key, value in state.items()}
    return results


def gpu_batch(shape: tuple[int, ...], dtype: torch.dtype, constant: bool) -> tuple[Tensor, Tensor]:
    rows, upstream = batch(shape, constant=constant)
    return (rows - 1e3).to(dtype), upstream.to(dtype)


def half_precision(rank: int, world: int) -> tuple[Tensor, Tensor]:
    rows, _ = batch((64, CHANNELS))
    norm = GlobalBatchNorm1d(CHANNELS)
    outputs = norm((rows - 1e3)[rank * 32 : rank * 32 + 32].bfloat16())
    assert outputs.dtype == torch.bfloat16
    return outputs, norm.running_mean


def other_statistics(rank: int, world: int) -> Results:
    norm = layer(2)
    rows = batch((16, CHANNELS))[0][rank * 8 : rank * 8 + 8]
    results = {}
    for statistics in ("local", "frozen"):
        set_statistics(norm, statistics)
        results[statistics] = norm(rows).detach()
        results[f"{statistics} running_mean"] = norm.running_mean.clone()
    return results


def compiled(rank: int, world: int) -> list[tuple[str, Tensor, Tensor]]:
    """Two training passes, eager and compiled as one graph each: names, eager values and compiled values."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, upstream = batch((8, CHANNELS, 4, 3))
        rows, upstream = (x.to(dtype).chunk(world)[rank] for x in (rows - 1e3, upstream))
        eager = nn.Sequential(layer(4).float(), nn.ReLU(), nn.Flatten(), GlobalBatchNorm1d(CHANNELS * 12))
        twin = copy.deepcopy(eager)
        torch._dynamo.reset()
        expected = train_twice(eager, rows, upstream.flatten(1))
        measured = train_twice(torch.compile(twin, backend="aot_eager", fullgraph=True), rows, upstream.flatten(1))
        for (name, value), other in zip(expected.items(), measured.values(), strict=True):
            found.append((f"{name} {dtype}", value, other))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every rank's results."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(folder, {2: [all_cases, on_gpu, half_precision, other_statistics, compiled], 4: [all_cases]})
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_one_process_on_the_whole_batch(world: int, finished: Path):
    every = results_of(all_cases, world, finished)
    for name, (shape, _, _, constant) in CASES.items():
        rows, upstream = batch(shape, constant=constant)
        norm = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        reference = norm(CHANNELS, momentum=0.3).double()
        reference.load_state_dict(layer(len(shape)).state_dict())
        truth = train_twice(reference, rows, upstream)
        compare([results[name] for results in every], truth, name, tolerance=1e-12)


@pytest.mark.needs_gpu
def test_ranks_together_equal_one_process_on_a_gpu(finished: Path):
    every = results_of(on_gpu, 2, finished)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for name, (shape, _, _, constant) in CASES.items():
            rows, upstream = (tensor.double() for tensor in gpu_batch(shape, dtype, constant))
            truth = train_twice(layer(len(shape)), rows, upstream)
            key = f"{name} {dtype}"
            compare([results[key] for results in every], truth, key, tolerance=tolerance)


def compare(ranks: list[dict[str, Tensor]], truth: dict[str, Tensor], name: str, *, tolerance: float) -> None:
    joined = {key: torch.cat([r[key] for r in ranks]) for key in ("outputs", "rows.grad")}
    # Each rank holds its own part of the weight gradients: the data-parallel wrapper reduces them.
    joined |= {key: sum(r[key] for r in ranks) for key in ("weight.grad", "bias.grad")}
    for key in ("running_mean", "running_var"):
        assert all(torch.equal(r[key], ranks[0][key]) for r in ranks), f"{name}: ranks disagree on {key}"
        joined[key] = ranks[0][key]
    for key, value in joined.items():
        scale = truth[key].abs().max().item()
        error = (value - truth[key]).abs().max().item() / scale
        assert error < tolerance, f"{name}: {key} differs by {error:.1e} of {scale:.1e}"


def test_bfloat16_rows_are_averaged_in_float32(finished: Path):
    """bfloat16 sums of 64 rows err by per cents; the running mean must show none of it."""
    ranks = results_of(half_precision, 2, finished)
    rows = (batch((64, CHANNELS))[0] - 1e3).bfloat16().float()
    reference = nn.BatchNorm1d(CHANNELS)
    truth = reference(rows)
    torch.testing.assert_close(ranks[0][1], reference.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]).float(), truth, rtol=1e-2, atol=1e-2)


def test_local_and_frozen_statistics_use_no_other_rank(finished: Path):
    ranks = results_of(other_statistics, 2, finished)
    for rank, results in enumerate(ranks):
        reference = nn.BatchNorm1d(CHANNELS, momentum=0.3).double()
        reference.load_state_dict(layer(2).state_dict())
        rows = batch((16, CHANNELS))[0][rank * 8 : rank * 8 + 8]
        torch.testing.assert_close(results["local"], reference(rows).detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(results["frozen"], reference.eval()(rows).detach(), rtol=0, atol=1e-11)
        assert torch.equal(results["frozen running_mean"], results["local running_mean"])
    assert not torch.equal(ranks[0]["local running_mean"], ranks[1]["local running_mean"])


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_as_one_graph_it_computes_the_same(world: int, finished: Path):
    """Gradients too: torch 2.11 has traced some forms of this code to gradients of zero.

    Over ranks the eager passes are torch's kernels, and traced ones plain operations, which round otherwise.
    """
    for found in [compiled(0, 1)] if world == 1 else results_of(compiled, 2, finished):
        assert len(found) == 2 * 10
        for name, expected, measured in found:
            assert expected.abs().max() > 0.05, name
            if world == 1:
                assert torch.equal(measured, expected), name
            else:
                error = (measured - expected).abs().max() / expected.abs().max()
                assert error < (1e-5 if expected.dtype == torch.float32 else 2e-2), f"{name}: {error:.1e}"
