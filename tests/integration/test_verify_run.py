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
from paws_hpc.files import write_record
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
    kinds = {check.kind for check in verify.CHECKS} - {"references"}  # without a stage calibrate
    assert all(f" {kind}" in out for kind in {*kinds, "store train", "store test", "splits"})


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


def test_a_hole_in_the_curves_and_images_of_another_store_are_found(run: Path, verified) -> None:
    path = run / "pretrain" / "metrics.jsonl"
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    steps = sorted({row["step"] for row in rows})
    middle = steps[len(steps) // 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] != middle))
    status, out = verified()
    path.write_text(whole)
    assert (status, out.count("FAULT")) == (1, 1)
    assert "has no rows between the steps" in out
    done = run / "prepare" / "DONE"
    kept = done.read_bytes()
    digests = json.loads(kept)["digests"]
    write_record(done, {"digests": digests | {"test": "0" * 64}})
    status, out = verified()
    done.write_bytes(kept)
    assert status == 1
    assert "holds other images than the run was made from (digest.test)" in out
