"""Runs as things: listed, renamed, removed; never one at work, never through a link, and a copy is a copy."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from paws_hpc import runs, status
from paws_hpc.cluster.chain import Chain, check_begun
from paws_hpc.cluster.frozen import ConfigError, read_config
from paws_hpc.config import Config
from paws_hpc.files import exclusive, read_json, write_json
from paws_hpc.report.page import build_report
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.stages.trackers import run_id
from tests.attempts import write_attempt
from tests.conftest import Stores
from tests.finished import begin, refusal
from tests.tiny import tiny_config


@pytest.fixture
def begun(digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, RunFolder]:
    """A run ``run`` in the working folder's ``runs`` whose images are prepared; no Slurm can be asked."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path / "runs")
    run = begin(config)
    monkeypatch.setenv("PATH", str(tmp_path))
    return config, run


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Sit at a terminal and type."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)


def test_runs_are_listed_as_status_lists_them_with_their_accuracy(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(begun[1].result, {"test": {"count": 10, "baseline": {"top1": 0.5}, "fine_tuned": {"top1": 0.967}}})
    assert runs.main([]) == 0
    listed = capsys.readouterr().out
    assert "96.7 %" in listed
    assert listed.splitlines()[1].startswith("run ")
    assert status.main([]) == 0
    assert capsys.readouterr().out == listed


def test_a_renamed_run_goes_on_as_the_run_it_was(begun: tuple[Config, RunFolder]) -> None:
    config, run = begun
    build_report(run.path)
    shutil.copytree(run.config.parent / "prepare", run.path / "kept")  # anything else moves along
    (run.path / "submissions/0001").mkdir(parents=True)
    shutil.copy(run.config, run.path / "submissions/0001/config.yaml")
    identity, frozen = run_id(run, "pretrain"), read_config(run.config)
    assert runs.main(["rename", "run", "first-try"]) == 0
    assert not run.path.exists()
    new = RunFolder(run.path.with_name("first-try"))
    assert (new.path / "kept" / "DONE").exists()
    assert read_config(new.config) == replace(frozen, name="first-try")
    assert read_config(new.path / "submissions/0001/config.yaml").name == "first-try"
    assert run_id(new, "pretrain") == identity, "W&B goes on with the same run"
    assert "<h1>first-try</h1>" in new.report.read_text()
    check_begun(replace(config, name="first-try"), new)


def test_a_name_that_is_taken_or_no_name_is_refused(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    (begun[1].path.with_name("taken")).symlink_to("nowhere")
    assert "is there already" in refusal(runs.main, capsys, "rename", "run", "taken")
    assert "must be a folder name" in refusal(runs.main, capsys, "rename", "run", "../elsewhere")
    assert "Did you mean run?" in refusal(runs.main, capsys, "rename", "runn", "x")
    assert begun[1].config.exists()


def test_removing_asks_on_a_terminal_and_nowhere_else(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begun[1].path
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "Give --yes" in refusal(runs.main, capsys, "remove", "run")
    for text in ("\n", "no\n"):
        answer(monkeypatch, text)
        assert runs.main(["remove", "run"]) == 0
        assert "Nothing was removed" in capsys.readouterr().out
        assert begun[1].chain.exists()
    answer(monkeypatch, "y\n")
    assert runs.main(["remove", "run"]) == 0
    assert not path.exists()


def test_a_removal_closes_its_lock_before_it_removes_it_and_goes_on_after_an_interruption(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that is open, and its folder with it."""
    path, unlink = begun[1].path, Path.unlink

    def interrupted(file: Path, missing_ok: bool = False) -> None:
        if file.name == ".lock":
            with exclusive(file, busy="it is still open"):
                raise OSError(errno.EBUSY, "Device or resource busy", str(file))
        unlink(file, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        assert "Device or resource busy" in refusal(runs.main, capsys, "remove", "--yes", "run")
    assert [file.name for file in path.iterdir()] == [".lock"]
    (path / "thesis.txt").write_text("mine")
    assert "There is no run" in refusal(runs.main, capsys, "remove", "--yes", "run")
    (path / "thesis.txt").unlink()
    assert runs.main(["remove", "--yes", "run"]) == 0
    assert not path.exists()


def test_links_are_not_followed_and_what_is_no_run_is_left_alone(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, precious = begun[1].path, tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (path / "to_folder").symlink_to(precious)
    (path / "prepare" / "to_file").symlink_to(precious / "file")
    (tmp_path / "runs" / "link").symlink_to(path)
    (tmp_path / "project" / "jobs").mkdir(parents=True)
    (tmp_path / "project" / "config.yaml").write_text("name: mine")
    assert "is a link" in refusal(runs.main, capsys, "remove", "--yes", "link")
    assert "may be no run" in refusal(runs.main, capsys, "remove", "--yes", "project")
    assert "may be no run" in refusal(runs.main, capsys, "remove", "run", "project", "--yes")
    assert begun[1].chain.exists(), "all or none"
    assert runs.main(["remove", "--yes", "run"]) == 0
    assert not path.exists()
    assert (precious / "file").read_text() == "mine"


def test_a_run_at_work_is_left_alone_and_a_killed_one_is_not(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun[1]
    with exclusive(run.path / ".lock"):
        assert "A launch of" in refusal(runs.main, capsys, "remove", "--yes", "run")
    folder = write_attempt(run.path, "pretrain", how=None)
    start = read_json(folder / "start-0001.json") | {"host": socket.gethostname(), "pid": os.getpid()}
    write_json(folder / "start-0001.json", start)
    monkeypatch.setattr("paws_hpc.cluster.bootstrap.beats", lambda attempt: True)
    for command in (["remove", "--yes", "run"], ["rename", "run", "other"]):
        assert "pretrain of" in refusal(runs.main, capsys, *command)
    (folder / "start-0001.json").unlink()
    chain = Chain(run)
    chain.add_submission({"time": "2026-01-02T03:00:00+00:00", "jobs": [{"job": "pretrain", "job_id": "17"}]})
    assert "Slurm cannot say" in refusal(runs.main, capsys, "remove", "--yes", "run")
    write_json(run.chain, read_json(run.chain) | {"submissions": []})
    write_json(folder / "start-0001.json", start | {"pid": 2**22 + 1})  # beyond what Linux gives: it was killed
    assert runs.main(["remove", "--yes", "run"]) == 0
    assert not run.path.exists()


def test_a_copy_of_the_same_name_in_another_folder_is_a_copy_and_a_moved_run_is_not(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, run = begun
    elsewhere = replace(config, runs=str(tmp_path / "elsewhere"))
    copy = RunFolder(Path(shutil.copytree(run.path, tmp_path / "elsewhere" / "run")))
    assert status.main(["--runs", "elsewhere", "run"]) == 0
    assert f"this is a copy of {run.path.resolve()}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"is a copy of the run {run.path.resolve()}, .* rename .*elsewhere/run run"):
        check_begun(elsewhere, copy)
    check_begun(config, run)
    assert runs.main(["rename", "--runs", "elsewhere", "run", "run"]) == 0
    check_begun(elsewhere, copy)
    assert Chain.begin(copy, "run").id != Chain(run).id
    shutil.rmtree(copy.path)
    identity = Chain(run).id
    (tmp_path / "linked").symlink_to(tmp_path / "runs")
    check_begun(config, RunFolder(tmp_path / "linked" / "run"))
    shutil.move(run.path, copy.path)
    check_begun(elsewhere, copy)
    assert Chain.begin(copy, "run").id == identity, "moved, it goes on as the run it was"
    shutil.copytree(copy.path, run.path)
    with pytest.raises(ConfigError, match="is a copy of the run"):  # also where it came from
        check_begun(config, run)
    check_begun(elsewhere, copy)


def test_a_copy_shows_no_jobs_of_the_original_and_becomes_a_run_of_its_own(
    begun: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = begun
    Chain(run).add_submission({"time": "2026-01-02T03:00:00+00:00", "jobs": [{"job": "pretrain", "job_id": "17"}]})
    write_attempt(run.path, "pretrain", how=None, job_id="17")
    (run.path / "pretrain" / "wandb").mkdir(parents=True)
    copy = RunFolder(Path(shutil.copytree(run.path, run.path.with_name("copy"))))
    assert status.main(["copy"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("copy: ")
    assert "interrupted: copied while it ran" in shown
    assert "Slurm cannot be reached" not in shown
    assert "this is a copy of run" in shown
    own = replace(config, name="copy")
    with pytest.raises(ConfigError, match=r"is a copy of the run run, .* rename .*copy copy"):
        check_begun(own, copy)
    assert runs.main(["rename", "copy", "copy"]) == 0
    check_begun(own, copy)
    chain = Chain(copy)
    assert chain.id != Chain(run).id
    assert not chain.is_submitted
    assert not (copy.pretrain / "wandb").exists()
    assert Chain(run).is_submitted, "the original is as it was"
    assert (run.pretrain / "wandb").exists()
