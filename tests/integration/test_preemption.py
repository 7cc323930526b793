"""Pre-training that is asked to stop anywhere saves, and resumed it is the run that nobody interrupted, to the bit."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from paws_hpc.config import Config
from paws_hpc.engine.config import CollapseConfig
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import Row, read_rows
from paws_hpc.packing import pack
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder, is_done
from tests.pictures import array_source
from tests.ranks import results_of, run_on_ranks
from tests.tiny import WALL_CLOCK, tiny_config

CPU = torch.device("cpu")
STEPS = 6
EVALUATION_BATCH = 3  # so that a validation has several boundaries


def make_store(folder: Path, *, alike: bool, count: int = 36) -> Path:
    """Noise, or one picture many times over, on which predictions are uniform: images in 4 classes."""
    pictures = np.random.default_rng(0).integers(0, 256, (1 if alike else count, 16, 16, 1), np.uint8)
    return pack(array_source(np.repeat(pictures, count // len(pictures), axis=0)), folder).path


def tiny_run(store: Path, folder: Path) -> tuple[Config, RunFolder]:
    """Six steps in two epochs, each of which ends with a validation; checkpoints after steps 2, 4 and 6."""
    config = tiny_config(store, store, folder)
    config.labels.per_class, config.labels.validation_per_class = 1, 2
    config.model.channels = [4]
    config.pretrain.batch_size, config.pretrain.epochs = 12, 2
    config.pretrain.support.classes, config.pretrain.support.images_per_class = 4, 1
    config.pretrain.checkpoint_every_steps, config.pretrain.log_every_steps = 2, 4
    config.pretrain.collapse = CollapseConfig(patience_steps=3, action="warn")
    for crop in (config.views.large, config.views.small):
        crop.scale = [1.0, 1.0]
    return config, RunFolder(folder / "run")


def start(store: Path, folder: Path, *, asked_at: int | None = None, fence: Callable[[], None] = lambda: None) -> int:
    """Start or resume a run that is asked to stop at its check number ``asked_at``; returns how many there were."""
    calls = itertools.count()
    config, run = tiny_run(store, folder)
    control = JobControl(lambda: next(calls) >= (10**6 if asked_at is None else asked_at), fence)
    try:
        pretrain.run(TorchContext(config, run, control=control))
    finally:
        control.close()
    return next(calls)


def ended(folder: Path) -> tuple[dict[str, Any], list[Row], bool]:
    """Weights, momentum and monitor; the curve without how long things took; whether a collapse was told."""
    run = RunFolder(folder / "run")
    assert is_done(run.pretrain)
    state = torch.load(run.checkpoints / f"step-{STEPS:08d}.pt", weights_only=True)
    del state["validated"]  # the last checkpoint may be from before the validation of the last step
    return state, curve(run), json.loads((run.pretrain / "summary.json").read_text())["collapsed"]


def curve(run: RunFolder) -> list[Row]:
    rows = read_rows(run.pretrain / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in WALL_CLOCK} for row in rows]


def assert_same_run(found: Path, expected: Path) -> None:
    (state, rows, collapsed), (expected_state, expected_rows, expected_collapsed) = ended(found), ended(expected)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
    assert rows == expected_rows
    assert collapsed == expected_collapsed


def newest(folder: Path) -> int:
    return max((int(path.stem[5:]) for path in folder.glob("run/pretrain/checkpoints/*.json")), default=0)


@pytest.fixture(scope="module", autouse=True)
def small_evaluation_batches() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paws_hpc.data.streams._EVALUATION_BATCH", EVALUATION_BATCH)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["noise", "all alike"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A store, the folder of an uninterrupted run on it, and how many boundaries that has."""
    folder = tmp_path_factory.mktemp("whole")
    store = make_store(folder / "store", alike=request.param)
    checks = start(store, folder)
    _, rows, collapsed = ended(folder)
    assert collapsed == request.param
    assert [row["step"] for row in rows if "val/paws_nn_top1" in row] == [2, 5]
    return store, folder, checks


def test_interrupted_at_any_boundary_it_resumes_to_the_same_bits(whole: tuple[Path, Path, int], tmp_path: Path) -> None:
    store, uninterrupted, checks = whole
    assert checks == STEPS + 2 * 5, "two validations of 8 queries in 3 batches and 4 supports in 2"
    stops = []
    for call in range(checks):
        folder = tmp_path / str(call)
        with pytest.raises(PreemptedError) as told:
            start(store, folder, asked_at=call)
        stops.append(told.value.step)
        assert newest(folder) == told.value.step, "what was done is saved"
        assert not is_done(folder / "run" / "pretrain")
        start(store, folder)
        assert_same_run(folder, uninterrupted)
    assert stops == [0, 1, 2, *[3] * 6, 4, 5, *[6] * 5]


@pytest.mark.parametrize("patience", [1, 6])
def test_a_job_that_is_never_left_in_peace_still_gets_there(
    whole: tuple[Path, Path, int], tmp_path: Path, patience: int
) -> None:
    """Every start is asked to stop after so many boundaries: the first steps of resumed runs and validations too."""
    store, uninterrupted, _ = whole
    for starts in range(1, 30):
        # A validation has five boundaries and begins anew, so one start in two must be allowed as many.
        try:
            start(store, tmp_path, asked_at=patience if starts % 2 else 6)
            break
        except PreemptedError as stopped:
            saved = stopped.step
        assert newest(tmp_path) == saved
    assert starts > 2
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_in_micro_batches_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_run

    def in_parts(store: Path, folder: Path) -> tuple[Config, RunFolder]:
        config, run = plain(store, folder)
        config.pretrain.accumulate_steps, config.model.prediction_head = 2, True
        config.objective.support_warmup_fraction = 0.8
        return config, run

    monkeypatch.setitem(globals(), "tiny_run", in_parts)
    store = make_store(tmp_path / "store", alike=False)
    start(store, tmp_path / "whole")
    for call in (1, 8):
        with pytest.raises(PreemptedError):
            start(store, tmp_path / str(call), asked_at=call)
        start(store, tmp_path / str(call))
        assert_same_run(tmp_path / str(call), tmp_path / "whole")


@pytest.mark.parametrize("whole", [False], ids=["noise"], indirect=True)
def test_what_is_scored_is_not_scored_again(whole: tuple[Path, Path, int], tmp_path: Path) -> None:
    """Launched again without DONE, a finished run is found complete; every boundary would be counted."""
    store, uninterrupted, _ = whole
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "pretrain" / "DONE").unlink()
    assert start(store, tmp_path) == 0
    assert_same_run(tmp_path, uninterrupted)


class TakenOverError(Exception):
    pass


def refusing(write: int) -> Callable[[], None]:
    """A fence that lets ``write`` writes pass."""
    writes = itertools.count()

    def fence() -> None:
        if next(writes) >= write:
            raise TakenOverError

    return fence


@pytest.mark.parametrize("whole", [False], ids=["noise"], indirect=True)
def test_a_start_that_was_taken_over_anywhere_spoils_nothing(whole: tuple[Path, Path, int], tmp_path: Path) -> None:
    """Also a start that had logged the validation for which the one before it had no time."""
    store, uninterrupted, _ = whole
    left = []
    for write in range(7):  # three per checkpoint, of which two are left, and one at the end
        folder = tmp_path / str(write)
        with pytest.raises(PreemptedError, match="after step 3"):
            start(store, folder, asked_at=5)
        with pytest.raises(TakenOverError):
            start(store, folder, fence=refusing(write))
        assert not list(folder.rglob("*.tmp"))
        scored = [row["step"] for row in curve(RunFolder(folder / "run")) if "val/paws_nn_top1" in row]
        # The checkpoint of step 4 is written while training goes on, so the fence may speak before or after the score.
        assert scored in ([[2], [2, 5]] if write < 3 else [[2, 5]])
        left.append(newest(folder))
        start(store, folder)
        assert_same_run(folder, uninterrupted)
    assert left == [3, 3, 4, 4, 4, 6, 6]


def on_several_ranks(rank: int, world: int) -> dict[str, Any]:
    """An uninterrupted run, and runs in which one rank alone is asked to stop, somewhere, and that are resumed."""
    from tempfile import TemporaryDirectory

    from paws_hpc.data import streams

    streams._EVALUATION_BATCH = EVALUATION_BATCH
    folder: list[Any] = [None]
    temporary = TemporaryDirectory() if rank == 0 else None
    if temporary is not None:
        folder = [temporary.name]
        make_store(Path(temporary.name) / "store", alike=False)
    dist.broadcast_object_list(folder)
    top = Path(folder[0])
    store, stops = top / "store", []
    checks = start(store, top / "whole")
    for call in range(0, checks - 1, 2) if world == 2 else (2, 5):
        asked = call if rank == call // 2 % world else None
        with pytest.raises(PreemptedError) as told:
            start(store, top / str(call), asked_at=asked)
        stops.append((told.value.step, newest(top / str(call))))
        dist.barrier()
        start(store, top / str(call))
        dist.barrier()
        assert_same_run(top / str(call), top / "whole")
    dist.barrier()
    if temporary is not None:
        temporary.cleanup()
    return {"checks": checks, "stops": stops}


def test_one_rank_that_is_asked_stops_both_at_the_same_step_and_the_run_is_the_same(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {2: [on_several_ranks]})
    first, second = results_of(on_several_ranks, 2, tmp_path)
    assert first == second
    assert first["checks"] == STEPS + 2 * 3, "8 queries in 2 batches and 4 supports in one per rank"
    # One boundary later than the request: a step further, or a batch further in the validation after steps 3 and 6.
    assert first["stops"] == [(step, step) for step in (1, 3, 3, 4, 6, 6)]


def test_four_ranks_sum_their_gradients_in_the_same_order_after_a_restart(tmp_path: Path) -> None:
    """Of two ranks a + b = b + a; from three on the order of the sum tells."""
    run_on_ranks(tmp_path, {4: [on_several_ranks]})
    for told in results_of(on_several_ranks, 4, tmp_path):
        assert len(told["stops"]) == 2
