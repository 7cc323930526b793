"""The newest valid checkpoint of the same experiment is continued; nothing else is, and nothing is lost on the way."""

from __future__ import annotations

import copy
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from paws_hpc.distributed import OtherRankError
from paws_hpc.engine.checkpoint import CheckpointFolder, load_tensors, save_tensors
from paws_hpc.files import file_hash, read_record, write_json, write_record
from tests.ranks import results_of, run_on_ranks

CPU = torch.device("cpu")
IDENTITY = {"seed": 0, "optimizer.peak_lr": 6.4, "digest.train": "aa", "views.scale": [0.1, 1.0]}


def folder(path: Path, *, keep: int = 3, identity: dict[str, Any] = IDENTITY, accept: tuple[str, ...] = ()) -> Any:
    return CheckpointFolder(path, identity=identity, keep=keep, accept_changes=accept)


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((500,), float(step)), "best": [0.5, step], "collapsed": False}


def saved(path: Path, *steps: int, keep: int = 3) -> CheckpointFolder:
    checkpoints = folder(path, keep=keep)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.wait()
    return checkpoints


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_bit,
    "cut": truncate,
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "a cut record": lambda path: truncate(path.with_suffix(".json")),
    "an empty record": lambda path: path.with_suffix(".json").write_text("{}"),
}


def test_what_was_saved_is_read_to_the_bit(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    checkpoint = folder(tmp_path).newest(CPU)
    assert checkpoint.step == 7
    assert torch.equal(checkpoint.state["weights"], state(7)["weights"])
    assert checkpoint.state["best"] == [0.5, 7]
    record = read_record(tmp_path / "step-00000007.json")
    assert (record["step"], record["identity"]) == (7, IDENTITY)
    assert folder(tmp_path / "new").newest(CPU) is None


def test_what_is_read_lies_in_host_memory_wherever_training_runs(tmp_path: Path) -> None:
    """AdamW counts its steps there: on a GPU each of its steps would wait for the device, hundreds of times."""
    parameter = torch.nn.Parameter(torch.ones(3))
    saving = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    saving.step()
    checkpoints = folder(tmp_path)
    checkpoints.save(1, saving.state_dict())
    checkpoints.wait()
    there = torch.device("meta")
    training = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3, device=there))])
    training.load_state_dict(checkpoints.newest(there).state)
    [values] = training.state.values()
    assert {name: value.device for name, value in values.items()} == {
        "step": CPU,
        "exp_avg": there,
        "exp_avg_sq": there,
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_with_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    saved(tmp_path, 10, 20, 30)
    DAMAGES[damage](tmp_path / "step-00000030.pt")
    DAMAGES[damage](tmp_path / "step-00000020.pt")
    with caplog.at_level(logging.WARNING):
        checkpoint = folder(tmp_path).newest(CPU)
    assert checkpoint.step == 10
    assert checkpoint.state["weights"][0] == 10
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert str(tmp_path / "step-00000030.pt") in told[0]
    assert str(tmp_path / "step-00000020.pt") in told[1]


def reading_on_ranks(rank: int, world: int) -> list[str]:
    """What a rank hears where rank 0 cannot look for the newest, and where another rank cannot read it."""
    heard = []
    with TemporaryDirectory() as own:  # as on nodes that share no folder: only rank 0's has files
        unreadable, missing = saved(Path(own) / "unreadable", 10), saved(Path(own) / "missing", 10)
        if rank == 0:
            (unreadable.path / "step-00000010.json").unlink()
            (unreadable.path / "step-00000010.json").mkdir()
        for checkpoints in (unreadable, missing):
            with pytest.raises((OSError, OtherRankError)) as caught:
                checkpoints.newest(CPU)
            heard.append(f"{caught.type.__name__}: {caught.value}")
    return heard


def test_a_rank_that_cannot_look_or_read_ends_all_of_them_with_its_error(tmp_path: Path) -> None:
    run_on_ranks(tmp_path, {2: [reading_on_ranks]})
    first, second = results_of(reading_on_ranks, 2, tmp_path)
    assert first[0].startswith("IsADirectoryError")
    assert second[0].startswith("OtherRankError: rank 0 failed")
    assert first[0] in second[0]
    assert first[1].startswith("OtherRankError: rank 1 failed")
    assert second[1].startswith("FileNotFoundError")
    assert second[1] in first[1]


def test_as_many_are_kept_as_asked_and_never_the_damaged_ones_in_their_place(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, 40, keep=2)
    assert names(tmp_path) == [f"step-000000{step}.{end}" for step in (30, 40) for end in ("json", "pt")]
    # The newest is damaged, and the run goes on from 30 with checkpoints at other steps: 40 must not push out 35.
    flip_bit(tmp_path / "step-00000040.pt")
    checkpoints = folder(tmp_path, keep=1)
    assert checkpoints.newest(CPU).step == 30
    checkpoints.save(35, state(35))
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000035.json", "step-00000035.pt"]
    assert folder(tmp_path).newest(CPU).step == 35


def test_another_experiment_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    changed = {"seed": 1, "optimizer.peak_lr": 6.4, "digest.train": "bb", "model.width": 2, "views.scale": [0.1, 1.0]}
    with pytest.raises(ValueError, match="belongs to another experiment") as caught:
        folder(tmp_path, identity=changed).newest(CPU)
    message = str(caught.value)
    assert str(tmp_path / "step-00000005.pt") in message
    for told in ("seed: 0 there, 1 now", "digest.train: 'aa' there, 'bb' now", "model.width: None there, 2 now"):
        assert told in message
    assert "optimizer.peak_lr" not in message
    remedy = "accept_changes=[digest.train,model.width,seed]"
    assert remedy in message
    with pytest.raises(ValueError, match=r"\(seed: 0 there, 1 now\)"):
        folder(tmp_path, identity=changed, accept=("digest.train", "model.width")).newest(CPU)
    accepted = tuple(remedy.partition("[")[2].rstrip("]").split(","))
    assert folder(tmp_path, identity=changed, accept=accepted).newest(CPU).step == 5


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_checkpoint_that_would_execute_code_is_refused_not_executed(tmp_path: Path) -> None:
    proof, weights = tmp_path / "executed", tmp_path / "run" / "step-00000003.pt"
    saved(tmp_path / "run", 3)
    digest = save_tensors(weights, {"weights": Malicious(f"touch {proof}")})  # with checksums, as an intruder would
    record = read_record(weights.with_suffix(".json"))
    write_record(weights.with_suffix(".json"), record | {"xxh3_128": digest})
    with pytest.raises(ValueError, match=r"step-00000003\.pt holds more than tensors.*never loaded"):
        folder(tmp_path / "run").newest(CPU)
    assert not proof.exists()


def test_a_network_with_any_flipped_bit_or_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_tensors(path, {"weight": torch.randn(7, 5), "bias": torch.zeros(3)})
    assert torch.load(path, weights_only=True)["bias"].equal(torch.zeros(3)), "others read it as ever"
    whole, drawn = path.read_bytes(), np.random.default_rng(0)
    damaged = [whole[:size] for size in (0, 1, 23, *drawn.integers(len(whole), size=40), len(whole) - 1)]
    for bit in (*drawn.integers(8 * len(whole), size=400), 8 * len(whole) - 1):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"best\.pt is (damaged|cut off)"):
            load_tensors(path, CPU)


def test_checkpoints_of_an_older_version_are_not_trained_over(tmp_path: Path) -> None:
    torch.save(state(7), tmp_path / "step-00000007.pt")
    record = {"step": 7, "identity": IDENTITY, "seconds": 1.0, "xxh3_128": file_hash(tmp_path / "step-00000007.pt")}
    write_json(tmp_path / "step-00000007.json", record)
    with pytest.raises(ValueError, match=r"step-00000007\.pt is cut off, or from an older version"):
        folder(tmp_path).newest(CPU)
    assert names(tmp_path) == ["step-00000007.json", "step-00000007.pt"]


def test_a_bit_that_flips_while_a_checkpoint_is_written_is_noticed_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 3)

    def flipping(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file() and ".pt" in path.name:
            flip_bit(path)

    monkeypatch.setattr(os, "fsync", flipping)
    checkpoints.save(4, state(4))
    with pytest.raises(OSError, match=r"step-00000004\.pt: it reads back otherwise"):
        checkpoints.wait()
    assert folder(tmp_path).newest(CPU).step == 3
    assert names(tmp_path) == ["step-00000003.json", "step-00000003.pt"]


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A full disk: a file system of 1 MiB where this user may mount one, else a limit on the size of files."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=False, capture_output=True
    )
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(path)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def at_the_next_save(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(3, state(3))


def at_a_step(checkpoints: CheckpointFolder) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.001)


@pytest.mark.parametrize("told", [CheckpointFolder.wait, at_the_next_save, at_a_step])
@pytest.mark.parametrize("tensors", [1, 300], ids=["in one tensor", "in many tensors"])
def test_a_full_disk_is_named_and_costs_neither_the_old_checkpoint_nor_space(
    tmp_path: Path, tensors: int, told: Callable[[CheckpointFolder], None]
) -> None:
    with small_disk(tmp_path / "disk"):
        checkpoints = saved(tmp_path / "disk" / "run", 1)
        before = names(checkpoints.path)
        large = {str(number): torch.zeros(600_000 // tensors) for number in range(tensors)}
        checkpoints.save(2, large)
        with pytest.raises(OSError, match=r"cannot write .*step-00000002\.pt: (No space left|File too large)"):
            told(checkpoints)
        assert names(checkpoints.path) == before
        assert folder(checkpoints.path).newest(CPU).step == 1
        checkpoints.save(2, state(2))
        checkpoints.wait()
        assert folder(checkpoints.path).newest(CPU).step == 2


def test_why_the_last_checkpoint_failed_is_told_though_another_error_ends_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(checkpoints: CheckpointFolder) -> None:
        with checkpoints:
            checkpoints.save(1, state(1))
            raise ArithmeticError("the loss is not finite")

    checkpoints = folder(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("no folder")
    with caplog.at_level(logging.ERROR), pytest.raises(ArithmeticError):
        train(checkpoints)
    assert str(tmp_path / "run") in caplog.text
    assert checkpoints.lost
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    checkpoints.save(1, state(1))  # as a job does that was asked to stop: what failed does not keep it from saving
    checkpoints.wait()
    assert folder(tmp_path / "run").newest(CPU).step == 1


class Held:
    """Holds writers just before what they wrote becomes visible."""

    def __init__(self) -> None:
        self.go, self.came = threading.Event(), threading.Semaphore(0)

    def __call__(self) -> None:
        self.came.release()
        assert self.go.wait(60)


def test_a_file_holds_the_moment_of_saving_whatever_training_does_while_it_is_written(tmp_path: Path) -> None:
    """Weights, momentum and lists move between snapshot and writing; two steps later they are saved again."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    history: list[list[float]] = []
    moved = [threading.Event() for _ in range(3)]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        network(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        history.append([0.5] * len(history))

    def all_of_it() -> dict[str, Any]:
        return {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "history": history}

    checkpoints = folder(tmp_path)
    take, expected = checkpoints._host_copy.take, {}

    def taken(value: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """The writer begins only when training has gone on."""
        read, go = take(value), moved[len(expected) - 1]
        return lambda: read() if go.wait(60) else {}

    checkpoints._host_copy.take = taken
    for number in range(1, 7):
        step()
        if number % 2:
            expected[number] = copy.deepcopy(all_of_it())
            checkpoints.save(number, all_of_it())
        else:
            moved[len(expected) - 1].set()
    checkpoints.wait()
    for number, value in expected.items():
        found = torch.load(tmp_path / f"step-{number:08d}.pt", weights_only=True)
        torch.testing.assert_close(found, value, rtol=0, atol=0)
        assert found["network"]._metadata == value["network"]._metadata
        assert found["network"]["0.weight"].stride() == network[0].weight.stride()


def test_saving_returns_before_anything_is_written_and_waits_for_the_one_before(tmp_path: Path) -> None:
    held = Held()
    checkpoints = CheckpointFolder(tmp_path, identity=IDENTITY, keep=3, fence=held)
    checkpoints.save(1, state(1))
    checkpoints.check()
    assert held.came.acquire(timeout=60)
    second = threading.Thread(target=checkpoints.save, args=(2, state(2)))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the first is still being written"
    assert not list(tmp_path.glob("*.pt"))
    assert len(list(tmp_path.glob("*.tmp"))) == 1, "one at most is being written"
    held.go.set()
    second.join(60)
    checkpoints.wait()
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == ["step-00000001.pt", "step-00000002.pt"]
    assert [folder(tmp_path).newest(CPU).state["weights"][0]] == [2]


def test_what_cannot_be_copied_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"\['best', 1\] is a Path|\['best', 1\] is a PosixPath"):
        folder(tmp_path).save(1, {"best": [0.5, tmp_path]})
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from paws_hpc.engine.checkpoint import CheckpointFolder

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is renamed yet
CheckpointFolder(Path(sys.argv[1]), identity={}).save(2, {"weights": torch.zeros(1000)})
while True:  # training
    torch.zeros(1000).add_(1)
"""


def test_what_a_killed_writer_left_vanishes_and_the_checkpoint_before_it_counts(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    whole = names(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == len(whole) + 1, "the writer left its temporary file"
    checkpoints = folder(tmp_path)
    assert names(tmp_path) == whole
    assert checkpoints.newest(CPU).step == 1


def test_a_process_that_ends_right_after_saving_has_saved(tmp_path: Path) -> None:
    program = KILLED.replace("os.fsync = ", "unused = ").partition("while True")[0]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
    assert folder(tmp_path, identity={}).newest(CPU).step == 2


def test_the_record_tells_how_long_saving_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, fsync = 0.3, os.fsync

    def slow(descriptor: int) -> None:
        if str(tmp_path) in os.readlink(f"/proc/self/fd/{descriptor}") and not written_once:
            written_once.append(time.sleep(written))
        fsync(descriptor)

    written_once: list[None] = []
    monkeypatch.setattr(os, "fsync", slow)
    saved(tmp_path, 4)
    seconds = read_record(tmp_path / "step-00000004.json")["seconds"]
    assert written <= seconds < written + 5


def test_who_was_taken_over_writes_and_removes_nothing(tmp_path: Path) -> None:
    """Before each of three places: the weights become visible, their record does, older checkpoints go."""
    for place in range(3):
        passed = []

        def fence(place: int = place, passed: list[None] = passed) -> None:
            if len(passed) == place:
                raise PermissionError
            passed.append(None)

        path = tmp_path / str(place)
        saved(path, 1, 2)
        before = names(path)
        checkpoints = CheckpointFolder(path, identity=IDENTITY, keep=1, fence=fence)
        checkpoints.save(3, state(3))
        with pytest.raises(PermissionError):
            checkpoints.wait()
        added = ["step-00000003.pt", "step-00000003.json"][:place]
        assert names(path) == sorted([*before, *added])
        assert folder(path).newest(CPU).step == (3 if place == 2 else 2)
