"""A stage is a row of one table: no other module lists stages, and what derives from the table knows a new row."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

import paws_hpc
from paws_hpc import stage_table
from paws_hpc.config import Config
from paws_hpc.exhibits import read_exhibits
from paws_hpc.stage_table import STAGES, Stage
from paws_hpc.stages.context import StageContext, TorchContext
from paws_hpc.stages.run_folder import is_done
from paws_hpc.store import ImageStore
from tests.conftest import Stores
from tests.finished import trained_run


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_the_function_of_a_stage_takes_one_context(stage: Stage) -> None:
    (context,) = inspect.signature(stage.load).parameters
    hints = get_type_hints(stage.load)
    assert hints[context] is (TorchContext if stage.torch else StageContext)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_a_stage_waits_only_for_stages_before_it(stage: Stage) -> None:
    before = list(STAGES)[: list(STAGES).index(stage.name)]
    assert {*stage.needs, *stage.follows} <= set(before)
    assert stage.description
    assert not stage.gpu or stage.torch
    if stage.sweep:
        assert stage.name in Config.__dataclass_fields__, "the sweep's settings"


def test_the_report_waits_for_every_other_stage() -> None:
    report = STAGES["report"]
    assert {*report.needs, *report.follows} == STAGES.keys() - {"report"}


def test_no_other_module_lists_stages() -> None:
    """Three names of stages in one literal are a second list, which a new stage would be forgotten in."""
    package = Path(paws_hpc.__file__).parent
    lists = []
    for path in sorted({*package.rglob("*.py")} - {package / "stage_table.py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                parts = node.elts
            elif isinstance(node, ast.Dict):
                parts = [key for key in node.keys if key is not None]
            else:
                continue
            named = {part.value for part in parts if isinstance(part, ast.Constant)} & STAGES.keys()
            if len(named) > 2:
                lists.append(f"{path.relative_to(package)}:{node.lineno}: {sorted(named)}")
    assert not lists


def test_a_new_row_is_all_that_resources_need(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = replace(STAGES["selection"], name="extra", needs=("selection",), follows=(), marker="", by_default=False)
    monkeypatch.setitem(stage_table.STAGES, "extra", extra)
    config = Config()
    assert "extra" in config.resources
    assert "extra" not in config.stages


def test_the_stage_of_the_page_on_extending_runs(digits_stores: Stores, tmp_path: Path) -> None:
    page = (Path(paws_hpc.__file__).parents[1] / "docs" / "extending.md").read_text()
    (row,) = re.findall(r"^    (Stage\(.*\)),$", page, re.MULTILINE)
    (module,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    stage, names = eval(row), {}
    exec(module, names)
    config, run = trained_run(digits_stores, tmp_path)
    names["run"](TorchContext(config, run, stage.name))
    written = np.load(run.path / stage.name / "classes.npz")
    assert written["key"].tolist() == list(ImageStore(config.data.train).keys)
    assert set(written["classes"]) <= set(ImageStore(config.data.train).manifest.classes)
    assert read_exhibits(run.path / stage.name)
    assert is_done(run.path / stage.name)
