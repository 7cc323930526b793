"""A second start compiles nothing; a file that cannot be trusted or used costs a line in the log and no more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

from paws_hpc.data.augment import augment_groups
from paws_hpc.engine.compiler_cache import compiler_cache
from paws_hpc.engine.loop import Training
from paws_hpc.files import read_record, write_record
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.whole_graph import whole_graph
from tests.conftest import Stores
from tests.finished import begin
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def start(folder: Path) -> bool:
    """A start whose compiler leaves one file, if it does not find it; returns whether it found it."""
    with compiler_cache(folder, CPU) as keep:
        graph = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "fxgraph" / "graph"
        found = graph.exists()
        if not found:
            graph.parent.mkdir()
            graph.write_bytes(bytes(range(256)) * 100)
        assert graph.read_bytes() == bytes(range(256)) * 100
        keep()
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.usefixtures("fresh_compiler")
def test_what_one_start_compiles_the_next_one_finds_though_its_user_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that run under any user's number, where torch would find no place for its own folder."""

    def nameless(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    for name in ("LOGNAME", "LNAME", "USERNAME", "USER"):
        monkeypatch.setenv(name, "")  # as absent; restored though it is set meanwhile
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    values = torch.arange(8.0)
    for number in range(2):
        torch.compiler.reset()
        counters.clear()
        # One process: others take long to start. No header made beforehand: it takes longer than this function.
        with (
            compiler_cache(tmp_path, CPU) as keep,
            inductor.patch(compile_threads=1, cpp_cache_precompile_headers=False),
        ):
            assert torch.equal(whole_graph(lambda x: (3 * x).relu() + 1)(values), (3 * values).relu() + 1)
            keep()
        found = counters["inductor"]
        assert (found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]) == ((0, 1) if number else (1, 0))


def test_what_is_kept_is_not_written_again(tmp_path: Path) -> None:
    outside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    assert not start(tmp_path)
    (kept,) = tmp_path.glob("*.tar")
    written = kept.stat()
    assert start(tmp_path)
    assert kept.stat().st_mtime_ns == written.st_mtime_ns
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == outside


def damage(kept: Path) -> None:
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)


DAMAGES = {
    "its checksum is another one": damage,
    "its checksum is another": lambda kept: os.truncate(kept, 100),
    "No such file or directory": lambda kept: kept.with_suffix(".json").unlink(),
    "is not valid JSON": lambda kept: kept.with_suffix(".json").write_text("{"),
    "has no checksum": lambda kept: kept.with_suffix(".json").write_text("{}"),
    f"it was made by torch 2.0, not {torch.__version__}": lambda kept: write_record(
        kept.with_suffix(".json"), read_record(kept.with_suffix(".json")) | {"torch": "2.0"}
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_or_one_of_another_version_is_left_alone_and_replaced(
    message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path)
    (kept,) = tmp_path.glob("*.tar")
    DAMAGES[message](kept)
    assert not start(tmp_path)
    (warning,) = caplog.messages
    assert str(kept) in warning
    assert message in warning
    assert start(tmp_path)


def test_a_file_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path)
    owner = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    assert not start(tmp_path)
    assert f"its owner is user {owner}, not {owner + 1}: start the run as its owner" in caplog.messages[-1]


@pytest.mark.parametrize("outside", [None, "/scratch/triton"])
def test_tritons_kernels_are_kept_too_and_its_folder_is_the_users_afterwards(
    outside: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch sets the variable by itself where it is not set, as it does here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", outside or "")
    if outside is None:
        monkeypatch.delenv("TRITON_CACHE_DIR")
    for number in range(2):
        with compiler_cache(tmp_path, CPU) as keep:
            os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(0))
            kernel = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
            assert kernel.exists() == (number == 1)
            kernel.parent.mkdir(exist_ok=True)
            kernel.touch()
            keep()
        assert os.environ.get("TRITON_CACHE_DIR") == outside


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "compiled").write_text("no folder")
    assert not start(tmp_path / "compiled")
    assert "is not kept for the next start" in caplog.messages[-1]


def test_pre_training_keeps_what_it_compiled_after_its_first_step(
    digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*arguments: Any) -> Any:
        (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "graph").touch()
        return augment_groups

    steps: list[int] = []
    config = tiny_config(digits_stores.train, digits_stores.test, tmp_path)
    config.pretrain.execution = "compiled"
    run = begin(config)
    monkeypatch.setattr("paws_hpc.engine.pretrain.compile_passes", compiled)
    monkeypatch.setattr("paws_hpc.data.streams.CompiledAugmentation", compiled)
    monkeypatch.setattr(Training, "is_due", lambda self, done, every: steps.append(done) or done == self.total_steps)
    monkeypatch.setattr("paws_hpc.engine.compiler_cache.write_record", lambda *_: steps.append(0))
    pretrain.run(TorchContext(config, run))
    assert steps.index(0) < steps.index(2)
    assert next(run.compiled.glob("*.tar")).stat().st_size > 0
