"""What was kept offline becomes one run online, whole and once, whatever happened to its files and to the upload."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paws_hpc import sync
from paws_hpc.engine import wandb_tracker
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.tracking import read_rows
from paws_hpc.engine.wandb_file import parse, read_contents, write_contents
from paws_hpc.engine.wandb_rows import position, shown
from paws_hpc.files import write_json
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.stages.wandb_segments import find_segments, upload_next
from tests.integration.test_preemption import make_store, tiny_run
from tests.integration.test_wandb import outside, own
from tests.wandb_server import WandbServer, serving

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was preempted after three steps, and whose file of that start is torn as by a kill."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        outside(patch, folder, server)
        patch.setattr(wandb_tracker, "_PREEMPTED_PATIENCE_S", 60.0)
        config, run = tiny_run(make_store(folder / "store", alike=False), folder)
        config.tracking.wandb = "offline"
        write_json(run.chain, {"id": "cafe0123"})
        asked = itertools.count()
        with pytest.raises(PreemptedError):
            pretrain.run(TorchContext(config, run, control=JobControl(lambda: next(asked) >= 4)))
        (first,) = find_segments(run.path)["pretrain"]
        whole = first.path.read_bytes()
        tear(first.path)
        assert len(first.path.read_bytes()) < len(whole)
        (run.pretrain / "wandb" / "sent.json").unlink()  # which a killed start leaves unwritten
        pretrain.run(TorchContext(config, run))
        assert server.operations == [], "offline is offline"
    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with serving() as double:
        outside(monkeypatch, tmp_path, double)
        yield double


@pytest.fixture
def run(offline: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(offline.path, tmp_path / "runs" / "run", symlinks=True)))


def tear(path: Path) -> None:
    """Cut the file in the middle of its third row."""
    contents, _ = read_contents(path)
    rows = [number for number, content in enumerate(contents) if parse(content).HasField("history")]
    write_contents(path, contents[: rows[2]])
    begin = path.stat().st_size
    write_contents(path, contents[: rows[2] + 1])
    with open(path, "r+b") as file:
        file.truncate((begin + path.stat().st_size) // 2)
    make_old(path)


def make_old(path: Path) -> None:
    """Let it be nothing that somebody may be writing still."""
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def flip(path: Path, *, row: int) -> None:
    """Damage one byte in the middle of a row."""
    content = [c for c in read_contents(path)[0] if parse(c).HasField("history")][row]
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)
    make_old(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows that a file of W&B's holds."""
    rows = []
    for record in map(parse, read_contents(path)[0]):
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def expected(run: RunFolder) -> list[dict[str, Any]]:
    return [shown(row) for row in read_rows(run.pretrain / "metrics.jsonl")]


def test_what_was_logged_offline_is_what_the_metrics_file_holds_row_by_row(offline: RunFolder) -> None:
    first, second = find_segments(offline.path)["pretrain"]
    assert read_contents(first.path)[1], "it is torn"
    assert [own(row) for row in rows_of(first.path)] == expected(offline)[:2]
    assert [own(row) for row in rows_of(second.path)] == expected(offline)


def test_two_segments_and_a_torn_tail_become_one_run_and_a_second_sync_changes_nothing(
    run: RunFolder, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {segment.path: segment.path.read_bytes() for segment in find_segments(run.path)["pretrain"]}
    assert sync.main(["run", "--runs", str(run.path.parent), "--dry-run"]) == 1
    assert "2 of 2 files left" in capsys.readouterr().out
    assert sync.main([str(run.path)]) == 0
    assert "2 files uploaded, 0 left" in capsys.readouterr().out
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == expected(run)
    assert [row["_step"] for row in online.history] == [
        position(row) for row in read_rows(run.pretrain / "metrics.jsonl")
    ]
    assert online.exit_codes[-1] == 0
    assert [artifact.name for artifact in server.artifacts.values() if artifact.committed]
    assert server.unknown == []
    operations = list(server.operations)
    assert sync.main(["--all", "--runs", str(run.path.parent)]) == 0
    assert server.operations == operations
    assert {path: path.read_bytes() for path in before} == before, "mended is a copy"


@pytest.mark.parametrize("damage", ["0 bytes", "7 bytes", "opening"])
def test_a_start_that_was_killed_at_once_does_not_keep_later_ones_from_going_up(
    damage: str, run: RunFolder, server: WandbServer
) -> None:
    first, _ = find_segments(run.path)["pretrain"]
    whole = first.path.read_bytes()
    first.path.write_bytes({"0 bytes": b"", "7 bytes": whole[:7], "opening": b"\0\0\0" + whole[3:]}[damage])
    make_old(first.path)
    assert sync.main([str(run.path)]) == 0
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == expected(run)


def test_rows_that_files_have_lost_come_from_the_metrics_file_and_none_comes_twice(
    run: RunFolder, server: WandbServer
) -> None:
    """The last start was killed, so that its file is torn; a fault of the disk takes a row out of each file."""
    _, second = find_segments(run.path)["pretrain"]
    tear(second.path)
    assert len(rows_of(second.path)) == 2
    flip(second.path, row=0)
    lost = [run.pretrain / "metrics.jsonl", run.pretrain / "later.jsonl"]
    whole = lost[0].read_text()
    lost[0].write_text("".join(whole.splitlines(keepends=True)[:-2]))  # it goes on after this sync
    (run.pretrain / "DONE").unlink()
    assert sync.main([str(run.path)]) == 0
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == expected(run)
    assert online.summary["train/loss"]["last"] == expected(run)[-1]["train/loss"]
    assert online.exit_codes[-1] == 1, "nobody said that it ended well"

    lost[0].write_text(whole)
    shutil.copytree(second.path.parent, third := Path(f"{second.path.parent.parent}/offline-run-29991231_235959-x"))
    for marker in third.glob("*.synced"):
        marker.unlink()
    write_json(run.pretrain / "DONE", {})
    assert sync.main([str(run.path)]) == 0
    assert [own(row) for row in online.history] == expected(run)
    assert online.exit_codes[-1] == 0


def test_a_row_damaged_in_the_middle_of_a_whole_file_is_not_missing_online(run: RunFolder, server: WandbServer) -> None:
    _, second = find_segments(run.path)["pretrain"]
    flip(second.path, row=4)
    assert sync.main([str(run.path)]) == 0
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == expected(run)
    assert [row["_step"] for row in online.history] == sorted(row["_step"] for row in online.history)
    assert online.exit_codes[-1] == 0


def test_rows_that_no_file_can_bring_are_told(
    run: RunFolder, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for segment in find_segments(run.path)["pretrain"]:
        segment.path.write_bytes(segment.path.read_bytes()[:7])
        make_old(segment.path)
    for _ in range(2):
        assert sync.main([str(run.path)]) == 1
        assert f"{len(expected(run))} rows of" in (told := capsys.readouterr().out)
        assert "are not online" in told
    assert server.operations == []


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


def test_an_upload_that_hangs_is_given_up_said_and_made_good_later(run: RunFolder, server: WandbServer) -> None:
    segments = find_segments(run.path)["pretrain"]
    server.behaviour = "hang"
    fault = upload_next(segments, timeout_s=8.0)
    assert fault is not None
    assert str(segments[0].path) in fault
    assert f"no answer from {server.url} within 8 s; is there a connection?" in fault
    assert not any(segment.is_synced for segment in segments)
    server.released.set()
    server.behaviour = "ok"
    assert sync.main([str(run.path)]) == 0
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == expected(run)


def test_a_run_that_goes_on_is_left_alone(run: RunFolder, server: WandbServer) -> None:
    first, *_ = segments = find_segments(run.path)["pretrain"]
    os.utime(first.path)  # written just now, and without an end
    fault = upload_next(segments, timeout_s=60.0)
    assert fault is not None
    assert "still being written" in fault
    assert server.operations == []


@pytest.mark.parametrize(
    ("behaviour", "minutes", "told"),
    [
        ("no key", "1", "nobody is logged in: run `wandb login`"),
        ("401", "1", "401"),
        ("hang", "0.1", "no answer within 6 s; is there a connection?"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_once(
    behaviour: str,
    minutes: str,
    told: str,
    run: RunFolder,
    server: WandbServer,
    *,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And not once for every file of every run, after as long a wait."""
    shutil.copytree(run.pretrain, run.path / "finetune" / "lr=0.1")
    if behaviour == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    else:
        server.behaviour = behaviour
    assert sync.main([str(run.path), "--timeout-min", minutes]) == 1
    said = capsys.readouterr()
    (error,) = said.err.splitlines()
    assert error.startswith("error: nothing can be uploaded: ")
    assert told in error
    assert [line.partition(": ")[2] for line in said.out.splitlines()] == [
        "finetune/lr=0.1: 2 of 2 files left",
        "pretrain: 2 of 2 files left",
    ]
    assert not any(segment.is_synced for found in find_segments(run.path).values() for segment in found)


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
    (online,) = server.runs.values()
    assert [own(row) for row in online.history] == expected(run)


def test_an_unknown_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digits-seed0" / "jobs").mkdir(parents=True)
    assert sync.main(["digits-seed1", "--runs", str(tmp_path)]) == 1
    assert "Did you mean digits-seed0?" in capsys.readouterr().err
