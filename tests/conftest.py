"""What tests of several folders share."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch

from paws_hpc.engine.tracking import MetricsFile, Row
from paws_hpc.packing import ImageFolder, PackOptions, SourceConfig, open_source, pack
from paws_hpc.stages.catalogue import metric
from tests.pictures import write_tiles

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for tests of deterministic=true: cuBLAS reads it as it starts
torch.set_num_threads(1)  # tests run side by side, and one thread gives the same sums everywhere


def cannot_run(reason: str, *, without: str) -> NoReturn:
    """Skip the test; fail it where the environment's ``MUST_RUN`` has ``without``, which is ``gpu`` or ``slurm``."""
    if without in os.environ.get("MUST_RUN", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_gpu") and not torch.cuda.is_available():
        cannot_run("There is no GPU that torch can use.", without="gpu")


class Stores(NamedTuple):
    """Folders of two packed stores."""

    train: Path
    test: Path


@pytest.fixture(scope="session")
def digits_stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """The digits at 16 pixels, packed once. Splits accumulate beside the shards; nobody may damage them."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        pack(open_source(SourceConfig(kind="digits", split=split, size=16)), folder / split)
    return Stores(folder / "train", folder / "test")


Program = Callable[..., None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts a program on PATH, in place of all others, that runs a script, prints and exits."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, out: str = "", *, err: str = "", status: int = 0, before: str = "") -> None:
        (folder / f"{name}.out").write_text(out)
        (folder / f"{name}.err").write_text(err)
        script = f"#!/bin/sh\n{before}\n/bin/cat {folder}/{name}.out\n/bin/cat {folder}/{name}.err >&2\nexit {status}\n"
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)

    return make


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder ``source`` of 30 JPEGs of two classes and an unreadable file, and its ``store`` of several shards."""
    root = tmp_path_factory.mktemp("photographs")
    write_tiles(root / "source", 30, classes=("a", "b"))
    (root / "source" / "a" / "odd.jpg").write_bytes(b"no image")
    options = PackOptions(shard_bytes=7 << 10, on_error="skip", workers=1)
    pack(ImageFolder(root / "source"), root / "store", options=options)
    return root


@pytest.fixture
def jpeg_store(photo_folder: Path, tmp_path: Path) -> Path:
    """A copy of that store which the test may damage."""
    return Path(shutil.copytree(photo_folder / "store", tmp_path / "store"))


@pytest.fixture(autouse=True)
def check_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric that is logged in a test stands in the catalogue."""
    log = MetricsFile.log

    def checked(file: MetricsFile, step: int, row: Row) -> None:
        for name in row.keys() - {"epoch", "event", "message"}:
            metric(name)
        log(file, step, row)

    monkeypatch.setattr(MetricsFile, "log", checked)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that runs in a test's process leaves no handler, which would write to a closed stream."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile as if nothing had been compiled before, and as if nothing had been when the test is over."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    yield
    torch.compiler.reset()
    counters.clear()
