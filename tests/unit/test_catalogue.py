"""A metric is declared once: reports and comparisons show it without another list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paws_hpc.files import write_json
from paws_hpc.metrics import COMMON, Metric
from paws_hpc.report import panels
from paws_hpc.report.comparison import compare
from paws_hpc.report.run_record import read_run
from paws_hpc.stages.catalogue import catalogue, metric

NEW = Metric("train/novelty", "Novelty of images", "fraction", "Novelty", description="How new images are.")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb-workspaces
def test_a_metric_that_is_declared_is_drawn_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paws_hpc.report import wandb_report

    monkeypatch.setattr(panels, "catalogue", lambda: catalogue() | {NEW.name: NEW})
    write_json(tmp_path / "chain.json", {"name": "run", "id": "cafe"})
    rows = [json.dumps({"step": step, "epoch": step / 2, NEW.name: 0.25 * step}) + "\n" for step in range(3)]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "metrics.jsonl").write_text("".join(rows))
    record = read_run(tmp_path)
    (own,) = [panel for panel in panels.pretrain_panels(record) if panel.name == "novelty"]
    assert own.caption == "How new images are. Novelty of images goes from 0.0 % to 50.0 % at step 2 (lowest 0.0 %, " \
        "highest 50.0 %)."  # fmt: skip
    (compared,) = [panel for panel in panels.curve_panels(compare([record])) if panel.title == NEW.title]
    assert compared.svg is not None
    assert NEW.title in [curve.title for curve in wandb_report._curves()]


def test_every_name_has_one_metric_and_an_unknown_one_is_an_error() -> None:
    assert set(catalogue()) >= {known.name for known in COMMON}
    assert metric("gpu/node12/memory_gb").unit == "GB"
    with pytest.raises(KeyError, match="not in the catalogue"):
        metric("train/los")
