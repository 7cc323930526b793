"""``metrics.jsonl`` becomes one run online, whole and once, whatever happened to training and to the upload."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paws_hpc import sync
from paws_hpc.engine import wandb_run
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import read_rows
from paws_hpc.engine.wandb_run import logged, position
from paws_hpc.files import write_json
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from tests.integration.test_preemption import make_store, tiny_run
from tests.integration.test_wandb import own
from tests.wandb_server import WandbServer, outside, serving


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was preempted after three steps and resumed, both without a connection."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        outside(patch, folder, server)
        patch.setattr(wandb_run, "_PREEMPTED_PATIENCE_S", 60.0)
        config, run = tiny_run(make_store(folder / "store", alike=False), folder)
        config.tracking.wandb = "offline"
        write_json(run.chain, {"id": "cafe0123"})
        checks = itertools.count()
        with pytest.raises(PreemptedError):
            pretrain.run(TorchContext(config, run, control=JobControl(lambda: next(checks) >= 4)))
        pretrain.run(TorchContext(config, run))
        assert server.operations == [], "offline is offline"
    return run


@pytest.fixture
def run(offline: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(offline.path, tmp_path / "runs" / "run", symlinks=True)))


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    return read_rows(run.pretrain / "metrics.jsonl")


def assert_whole(run: RunFolder, server: WandbServer) -> None:
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == [logged(row) for row in rows_of(run)]
    assert [row["_step"] for row in online.history] == [position(row) for row in rows_of(run)]
    assert online.exit_codes[-1] == 0
    assert server.unknown == []


def test_an_offline_run_is_replayed_once(
    run: RunFolder, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(rows_of(run))
    assert sync.main(["run", "--runs", str(run.path.parent), "--dry-run"]) == 1
    assert f"{count} of {count} rows left" in capsys.readouterr().out
    assert server.operations == []
    assert sync.main([str(run.path)]) == 0
    assert f"run: pretrain: all of {count} rows are online" in capsys.readouterr().out
    assert_whole(run, server)
    assert server.runs["cafe0123-pretrain"].summary["train/loss"]["last"] == rows_of(run)[-2]["train/loss"]
    assert [artifact["state"] for artifact in server.artifacts.values()] == ["COMMITTED"]
    operations = list(server.operations)
    assert sync.main(["--all", "--runs", str(run.path.parent)]) == 0
    assert server.operations == operations, "a second sync uploads nothing"
    (run.pretrain / "wandb" / "sent.json").unlink()
    assert sync.main([str(run.path)]) == 0
    assert_whole(run, server)


def test_rows_that_the_server_has_are_left_out(run: RunFolder, server: WandbServer) -> None:
    """The first sync saw a run that had not ended; the second brings what was written since."""
    metrics = run.pretrain / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    (run.pretrain / "DONE").unlink()
    long_ago = time.time() - 3600
    os.utime(metrics, (long_ago, long_ago))
    assert sync.main([str(run.path)]) == 0
    assert server.runs["cafe0123-pretrain"].exit_codes == [1], "nobody said that it ended well"
    metrics.write_text(whole)
    write_json(run.pretrain / "DONE", {})
    assert sync.main([str(run.path)]) == 0
    assert_whole(run, server)


def test_wandb_sync_uploads_what_was_kept_offline_and_nothing_that_was_replayed(
    run: RunFolder, server: WandbServer
) -> None:
    def wandb_sync() -> None:
        folders = sorted(map(str, run.pretrain.glob("wandb/offline-run-*")))
        subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], cwd=run.path, check=True, capture_output=True)

    wandb_sync()
    assert_whole(run, server)
    assert sync.main([str(run.path)]) == 0
    assert_whole(run, server)
    wandb_sync()
    assert_whole(run, server)


def test_where_there_is_nothing_to_upload_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main(["--all", "--runs", str(tmp_path)]) == 0
    assert "nothing kept by Weights & Biases here" in capsys.readouterr().out
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    assert sync.main(["run", "--runs", str(tmp_path)]) == 0
    assert "run: nothing kept by Weights & Biases here" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["-1", "0", "nan", "inf", "soon"])
def test_a_time_to_wait_that_is_none_is_refused(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sync.main(["--all", "--timeout-min", minutes])
    assert minutes in capsys.readouterr().err


def test_a_run_that_goes_on_is_left_alone(
    run: RunFolder, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.pretrain / "DONE").unlink()
    os.utime(run.pretrain / "metrics.jsonl")
    assert sync.main([str(run.path)]) == 1
    assert "still being written; run this again later" in capsys.readouterr().out
    assert server.operations == []


@pytest.mark.parametrize(
    ("behaviour", "message"), [("no key", "API key"), ("401", "401|API key"), ("hang", "deadline exceeded|no answer")]
)
def test_a_server_that_cannot_be_used_is_reported_once_and_marks_nothing(
    behaviour: str,
    message: str,
    run: RunFolder,
    server: WandbServer,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run.pretrain, run.path / "finetune" / "lr=0.1")
    if behaviour == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    else:
        server.behaviour = behaviour
    assert sync.main([str(run.path), "--timeout-min", "0.4"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: nothing can be uploaded: ")
    assert re.search(message, error), error
    assert not list(run.path.glob("**/*.synced"))
    assert json.loads((run.pretrain / "wandb" / "sent.json").read_text())["online"] == -1
    monkeypatch.setenv("WANDB_API_KEY", server.environment["WANDB_API_KEY"])
    server.released.set()
    server.behaviour = "ok"
    shutil.rmtree(run.path / "finetune")
    assert sync.main([str(run.path)]) == 0
    assert_whole(run, server)


@pytest.mark.parametrize("where", ["environment", "settings file"])
def test_who_keeps_runs_offline_can_upload_them(
    where: str, run: RunFolder, server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if where == "environment":
        monkeypatch.setenv("WANDB_MODE", "offline")
    else:  # as `wandb offline` leaves it
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
        (tmp_path / "settings").mkdir()
        (tmp_path / "settings" / "settings").write_text("[default]\nmode = offline\n")
    assert sync.main([str(run.path)]) == 0
    assert_whole(run, server)


def test_an_unknown_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digits-seed0" / "jobs").mkdir(parents=True)
    assert sync.main(["digits-seed1", "--runs", str(tmp_path)]) == 1
    assert "Did you mean digits-seed0?" in capsys.readouterr().err
