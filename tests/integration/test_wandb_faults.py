"""Whatever becomes of Weights & Biases: training gives the same bits, waits no longer than told, and says so once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from paws_hpc import sync
from paws_hpc.engine import wandb_run
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import read_rows
from paws_hpc.engine.wandb_run import position
from paws_hpc.files import write_json
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from tests.integration.test_preemption import STEPS, ended, make_store, tiny_run
from tests.wandb_server import WandbServer

CPU = torch.device("cpu")
PATIENCE_S = 30.0


class Reference(NamedTuple):
    """A store, and the folder of a training on it without Weights & Biases."""

    store: Path
    unwatched: Path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("unwatched")
    store = make_store(folder / "store", alike=False)
    config, run = tiny_run(store, folder)
    pretrain.run(TorchContext(config, run))
    return Reference(store, folder)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience with a server; what tests change of it is as before afterwards."""
    monkeypatch.setattr(wandb_run, "_INIT_TIMEOUT_S", 4.0)
    monkeypatch.setattr(wandb_run, "_PATIENCE_S", PATIENCE_S)


def train(store: Path, folder: Path, *, in_between: Callable[[RunFolder], None] | None = None) -> RunFolder:
    """Pre-train under Weights & Biases; ``in_between`` happens after the third step."""
    config, run = tiny_run(store, folder)
    config.tracking.wandb = "auto"
    write_json(run.chain, {"id": "cafe0123"})
    checks = iter(range(10**6))

    def look() -> bool:
        if in_between is not None and next(checks) == 3:
            in_between(run)
        return False

    pretrain.run(TorchContext(config, run, control=JobControl(look)))
    return run


def segments(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.pretrain.glob("wandb/*run-*/*.wandb") if "latest-run" not in str(path))


def positions(run: RunFolder) -> list[int]:
    return [position(row) for row in read_rows(run.pretrain / "metrics.jsonl")]


def assert_sync_completes(run: RunFolder, server: WandbServer) -> None:
    server.released.set()
    server.behaviour = "ok"
    os.environ["WANDB_BASE_URL"] = server.url
    assert sync.main([str(run.path)]) == 0
    online = server.runs["cafe0123-pretrain"]
    assert [row["_step"] for row in online.history] == positions(run)
    assert online.exit_codes[-1] == 0


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def service_of(run: RunFolder) -> int:
    """Process id of the wandb-core that shows this run."""

    def find() -> list[int]:
        followers = {
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/stat")
            if (text := _read(path)) and f" {os.getpid()} " in text[text.rfind(b")") :].decode()
        }
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"wandb-core" in (command := _read(path))
            and any(f"--pid\0{follower}\0".encode() in command for follower in followers)
        ]

    wait_for(lambda: segments(run))
    return int(wait_for(find)[0])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # of a process that has just ended
        return b""


@pytest.mark.parametrize("behaviour", ["401", "429", "500", "hang", "unreachable"])
def test_a_server_that_cannot_be_used(
    behaviour: str,
    reference: Reference,
    server: WandbServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if behaviour == "unreachable":
        os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    else:
        server.behaviour = behaviour
    run = train(reference.store, tmp_path)
    assert_same(tmp_path, reference.unwatched)
    (told,) = messages(caplog)
    assert "cannot be reached" in told
    assert "paws_hpc sync" in told
    assert_sync_completes(run, server)


@pytest.mark.parametrize("behaviour", ["hang", "401", "429", "500"])
def test_a_server_that_fails_meanwhile_delays_neither_a_step_nor_the_end_beyond_its_time(
    behaviour: str, reference: Reference, server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    since: list[float] = []

    def fail(run: RunFolder) -> None:
        wait_for(lambda: "cafe0123-pretrain" in server.runs)
        server.behaviour = behaviour
        since.append(time.monotonic())

    run = train(reference.store, tmp_path, in_between=fail)
    assert_same(tmp_path, reference.unwatched)
    assert time.monotonic() - since[0] < PATIENCE_S + 10
    said = messages(caplog)
    assert said
    if behaviour == "hang":
        assert len(said) == 1
        assert "off from here on" in said[0]
    assert_sync_completes(run, server)


def test_a_server_that_refuses_the_network_alone_costs_one_message_and_the_run_is_whole(
    reference: Reference, server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.refused.add("CreateArtifact")
    wandb_run._INIT_TIMEOUT_S = 30.0  # as below
    run = train(reference.store, tmp_path)
    (message,) = messages(caplog)
    assert "does not show which network this run made" in message
    assert "told to refuse this" in message
    online = server.runs["cafe0123-pretrain"]
    assert online.exit_codes == [0]
    assert [row["_step"] for row in online.history] == positions(run)


@pytest.mark.parametrize("with_what", [signal.SIGKILL, signal.SIGTERM])
def test_a_service_process_that_dies_is_started_again_and_nothing_is_missing(
    with_what: signal.Signals,
    reference: Reference,
    server: WandbServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The server is well, so nobody waits so long; the fixture sets them back.
    wandb_run._INIT_TIMEOUT_S = 30.0

    def kill(run: RunFolder) -> None:
        wait_for(lambda: "cafe0123-pretrain" in server.runs and server.runs["cafe0123-pretrain"].history)
        os.kill(service_of(run), with_what)

    run = train(reference.store, tmp_path, in_between=kill)
    assert_same(tmp_path, reference.unwatched)
    told = messages(caplog)[0]
    assert "another is started" in told
    assert "python -m paws_hpc sync RUN" in told
    assert_sync_completes(run, server)


def test_a_service_process_that_stops_is_ended_in_time(
    reference: Reference,
    server: WandbServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb_run._PATIENCE_S = 3.0
    stopped: list[int] = []

    def stop(run: RunFolder) -> None:
        wait_for(lambda: "cafe0123-pretrain" in server.runs)
        stopped.append(service_of(run))
        os.kill(stopped[0], signal.SIGSTOP)

    began = time.monotonic()
    train(reference.store, tmp_path, in_between=stop)
    assert_same(tmp_path, reference.unwatched)
    assert time.monotonic() - began < 90
    assert len(messages(caplog)) == 1
    wait_for(lambda: not Path(f"/proc/{stopped[0]}/cmdline").exists() or not _read(Path(f"/proc/{stopped[0]}/cmdline")))


def test_a_folder_that_cannot_be_written(
    reference: Reference, server: WandbServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    (tmp_path / "run" / "pretrain" / "wandb").write_text("a file where W&B wants a folder")
    train(reference.store, tmp_path)
    assert_same(tmp_path, reference.unwatched)
    (told,) = messages(caplog)
    assert "off from here on" in told


def assert_same(found: Path, expected: Path) -> None:
    (state, rows, _), (expected_state, expected_rows, _) = ended(found), ended(expected)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
    assert rows == expected_rows
    assert rows[-1]["step"] == STEPS - 1


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("paws_hpc")]
