"""``paws verify RUN`` finds damage in everything that a result depends on, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paws_hpc import verify
from paws_hpc.cluster.snapshot import take_snapshot
from paws_hpc.engine.compiler_cache import compiler_cache
from paws_hpc.files import read_record, write_record
from paws_hpc.store.format import MANIFEST_NAME
from tests.conftest import Stores
from tests.finished import trained_run


@pytest.fixture(scope="module")
def run(digits_stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its own copies of the stores."""
    folder = tmp_path_factory.mktemp("verify")
    stores = Stores(*(Path(shutil.copytree(path, folder / path.name)) for path in digits_stores))
    _, run = trained_run(stores, folder / "runs", tuning_steps=2)
    take_snapshot(run.path)
    with compiler_cache(run.compiled, torch.device("cpu")) as keep:
        Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "graph").write_bytes(bytes(1000))
        keep()
    return run.path


@pytest.fixture
def verified(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    def verified(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify", str(run), *options])
        status = verify.main()
        return status, capsys.readouterr().out

    return verified


def test_a_whole_run_is_whole(run: Path, verified) -> None:
    status, out = verified("--deep")
    assert status == 0, out
    assert out.endswith(f"{run}: no faults\n")
    kinds = {check.kind for check in verify.CHECKS} - {"attempt"}  # without a launch
    assert all(f" {kind}" in out for kind in {*kinds, "store train", "store test", "splits"})


def test_a_run_without_suncet_fine_tuning_is_whole(
    digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, other = trained_run(digits_stores, tmp_path)
    monkeypatch.setattr(sys, "argv", ["verify", str(other.path)])
    assert verify.main() == 0, capsys.readouterr().out


def test_one_flipped_bit_in_any_file_of_a_run_or_its_stores_is_found_and_named(run: Path, verified) -> None:
    checks = [check for check in verify.CHECKS if check.kind != "rows"]  # whose numbers decide nothing
    names = [path for check in checks for path in run.glob(check.pattern) if path.is_file()]
    names += [next(run.glob("code/*")) / "paws_hpc" / "launch.py"]
    names += [*run.parents[1].glob("*/*.h5"), *run.parents[1].glob(f"*/{MANIFEST_NAME}")]
    names += [*run.parents[1].glob("*/splits/*.json")]
    unsealed = {path.name for path in names if path.suffix == ".json" and b'"checksum"' not in path.read_bytes()}
    assert unsealed <= {"exhibits.json"}, "the report shows them, and nothing is decided by them"
    names = [path for path in names if path.name not in unsealed]
    assert len(names) > 20
    for path in names:
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        path.write_bytes(changed)
        status, out = verified()
        path.write_bytes(whole)
        named = path.parents[1].name if "code" in path.parts else path.name
        assert status == 1, path
        faults = [line for line in out.splitlines() if line.startswith("FAULT")]
        assert any(named in line for line in faults), (path, out)
    assert verified()[0] == 0


MISSING = {
    "selected.json": "result.json is there",
    "tuned.pt": "selected.json has its score",
    "finetune/*/best.pt": "DONE is there",
    "finetune/*/result.json": "DONE is there",
    "pretrain/checkpoints/*.pt": "DONE is there",
    "config.yaml": "every run has it",
}


@pytest.mark.parametrize("pattern", MISSING)
def test_a_file_that_others_say_is_there_is_missed(run: Path, verified, pattern: str) -> None:
    path = sorted(run.glob(pattern))[-1]
    whole = path.read_bytes()
    path.unlink()
    status, out = verified()
    path.write_bytes(whole)
    assert status == 1
    assert f"FAULT missing: {path} is missing, though" in out
    assert MISSING[pattern] in out


def test_splits_and_stores_other_than_the_runs_are_found(run: Path, verified) -> None:
    done = run / "prepare" / "DONE"
    kept = done.read_bytes()
    for name, found in (("labelled", "labelled is not what the run was prepared with"), ("test", "data.test=")):
        digests = json.loads(kept)["digests"]
        write_record(done, {"digests": digests | {name: "0" * 64}})
        status, out = verified()
        done.write_bytes(kept)
        assert status == 1
        assert found in out


def test_a_run_is_whole_from_anywhere_and_with_what_another_version_compiled(
    run: Path, verified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (kept,) = run.glob("compiled/*.json")
    before = kept.read_bytes()
    write_record(kept, read_record(kept) | {"torch": "2.0"})
    status, out = verified()
    kept.write_bytes(before)
    assert status == 0, out
