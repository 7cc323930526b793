"""A report of several chains in Weights & Biases: its panels, saved, saved again; and what fails."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paws_hpc.files import write_json, write_text
from paws_hpc.report import __main__ as report
from tests.ranks import ROOT
from tests.wandb_server import WandbServer

COMMAND = "paws launch data.root=/home/me/images hydra.launcher.account=ab1234"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two settings of two seeds each, as chains of two trials."""
    made = []
    for number, (seed, me_max) in enumerate(itertools.product((0, 1), ("true", "false"))):
        run = tmp_path / f"digits-seed{seed}-me_max={me_max}"
        write_json(
            run / "chain.json",
            {"name": run.name, "id": f"cafe000{number}", "versions": {"torch": "2.11"}, "command": COMMAND},
        )
        config = f"seed: {seed}\ntracking:\n  project: paws\n  entity: null\nobjective:\n  me_max: {me_max}\n"
        write_text(run / "config.yaml", config)
        for rate, accuracy in ((0.02, 0.5), (0.1, 0.75)):
            write_json(run / "finetune" / f"lr={rate:g},epochs=2" / "result.json", {"validation_accuracy": accuracy})
        write_json(run / "baseline" / "lr=0.1,epochs=2" / "result.json", {"validation_accuracy": 0.25})
        probe = {"top1": 0.5, "penalty": (0.01, 1.0)[seed]}
        write_json(run / "result.json", {"test": {"count": 100, "linear_probe": probe}})
        made.append(run)
    return made


def command(runs: list[Path], *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "paws_hpc.report", *map(str, runs), "--wandb", *options]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def test_offline_the_spec_is_kept_and_the_same_command_saves_it_later_as_one_report(
    server: WandbServer, runs: list[Path]
) -> None:
    os.environ["WANDB_MODE"] = "offline"
    done = command(runs)
    assert done.returncode == 0, done.stderr
    assert "not saved in Weights & Biases (WANDB_MODE=offline)" in done.stdout
    spec = json.loads((runs[0].parent / "comparisons" / "digits-me_max" / "wandb.json").read_text())
    assert "Parallel Coordinates Plot" in json.dumps(spec["spec"])
    assert server.operations == []

    del os.environ["WANDB_MODE"]
    done = command(runs)
    assert done.returncode == 0, done.stderr
    assert "Report: http" in done.stdout, done.stdout
    (saved,) = server.reports.values()
    blocks = json.loads(saved["spec"])["blocks"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    panels = [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    assert saved["displayName"] == f"PAWS: {', '.join(run.name for run in runs)}"[:128]
    assert {"Parallel Coordinates Plot", "Run Comparer"} <= {panel["viewType"] for panel in panels}
    curves = {name for panel in panels for name in panel["config"].get("metrics") or ()}
    wanted = ("train/loss", "train/loss_consistency", "train/loss_me_max", "val/paws_nn_top1", "train/confidence")
    assert set(wanted) <= curves
    assert {"train/loss_entropy", "train/instance_discrimination", "train/support_classification"} <= curves
    assert "gpu/node[0-9]+/utilisation" in [panel["config"].get("metricRegex") for panel in panels]
    shown = [grid["runSets"][0] for grid in grids]
    chosen = [[each["value"] for each in runs_of["filters"]["filters"]] for runs_of in shown]
    chains = [f"cafe000{number}" for number in range(4)]
    assert chosen == [[chains, stage] for stage in ("selection", "pretrain", "finetune", "baseline", "pretrain")]
    grouped = [[key["name"] for key in runs_of["grouping"]] for runs_of in shown]
    assert grouped == [[], ["objective.value.me_max"], [], [], []], "a curve is the mean of a setting's seeds"
    results, provenance = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert "| true | 2 | 50.0 ± 0.0 % |" in results, "a row of means over seeds"
    assert "PAWS-NN" in provenance
    assert "torch" in provenance
    assert not any(word in saved["spec"] for word in ("/home/me", "ab1234")), "no folders and accounts"

    assert command(runs).returncode == 0
    assert len(server.reports) == 1, "saved again it is the same report"
    assert command(runs[:1]).returncode == 0
    assert len(server.reports) == 2, "that of its first run is another one"
    assert server.unknown == []


@pytest.mark.parametrize(
    ("behaviour", "fault"),
    [
        ("hang", "no answer within 6 s"),
        ("429", "no answer within 6 s"),
        ("500", "no answer within 6 s"),
        ("401", "AuthenticationError"),
    ],
)
def test_a_server_that_fails_costs_a_limited_time_and_nothing_of_the_report(
    behaviour: str, fault: str, server: WandbServer, runs: list[Path]
) -> None:
    server.behaviour = behaviour
    done = command(runs[:1], "--timeout-min", "3" if behaviour == "401" else "0.1")
    assert done.returncode == 1
    assert f"Report not saved in Weights & Biases ({fault}" in done.stderr
    assert "the same command saves it" in done.stderr
    assert json.loads((runs[0] / "report" / "wandb.json").read_text())["spec"]
    server.behaviour = "ok"
    server.released.set()
    assert "Report: http" in command(runs[:1]).stdout
    assert len(server.reports) == 1


def test_without_the_package_the_error_says_how_to_get_it(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    monkeypatch.delitem(sys.modules, "paws_hpc.report.wandb_report", raising=False)
    assert report.main([str(runs[0]), "--wandb"]) == 1
    assert "pip install wandb-workspaces" in capsys.readouterr().err
