"""The whole chain on real digits, in seconds: stages, restarts, and two ranks against one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paws_hpc.cluster.chain import Chain
from paws_hpc.files import exclusive
from paws_hpc.report.run_record import read_run
from paws_hpc.stages.run_folder import RunFolder
from tests.integration.launching import launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    first = launch(folder, "stages=[prepare,pretrain]")
    assert first.returncode == 0, first.stderr
    states = {stage: state for stage, (state, _) in read_run(folder / "runs/run").stages.items()}
    assert states["pretrain"] == "done"
    assert states["finetune"] == "pending"
    rest = launch(folder)
    assert rest.returncode == 0, rest.stderr
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_one_command_leads_from_images_to_a_report(finished: Path) -> None:
    run = finished / "runs/run"
    assert {state for state, _ in read_run(run).stages.values()} == {"done"}
    assert len(list((run / "finetune").glob("lr=*/best.pt"))) == 4
    result = read(run / "result.json")
    assert result["labels"] == 40
    assert result["test"]["count"] == 400
    for method in ("paws_nn", "fine_tuned", "baseline"):
        confusion = np.array(result["test"][method]["confusion"])
        assert confusion.sum(1).tolist() == [40] * 10, "the test split is stratified and every image is scored"
        assert result["test"][method]["top1"] == pytest.approx(np.trace(confusion) / 400)
    assert "<html" in (run / "report/index.html").read_text()
    assert (run / "pretrain/crops.png").read_bytes().startswith(b"\x89PNG")


def test_running_it_again_changes_nothing_and_says_so(finished: Path) -> None:
    run = finished / "runs/run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = launch(finished)
    assert again.returncode == 0, again.stderr
    assert "All stages" in again.stdout
    assert "done already" in again.stdout
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before, "no attempt is added, so no stage takes longer than it did"


def test_other_settings_under_the_same_name_are_refused_by_name(finished: Path) -> None:
    refused = launch(finished, "optimizer.peak_lr=0.2", "seed=1")
    assert refused.returncode == 1
    assert "optimizer.peak_lr was 0.002 and is now 0.2" in refused.stderr
    assert "seed was 0 and is now 1" in refused.stderr
    assert "accept_changes=[optimizer.peak_lr,seed]" in refused.stderr


def test_the_same_images_may_move_and_other_images_are_refused(finished: Path) -> None:
    stores = finished / "shards"
    moved = shutil.copytree(stores / "train", finished / "moved")
    again = launch(finished, f"data.train={moved}")
    assert again.returncode == 0, again.stderr
    assert "done already" in again.stdout
    for changes, names in (
        ([f"data.train={stores / 'test'}"], "digest.train"),
        ([f"data.labelled={stores / 'test'}"], "digest.labelled_store"),
    ):
        swapped = launch(finished, *changes)
        assert swapped.returncode == 1
        assert f"begun with other images than are now in {stores / 'test'}." in swapped.stderr
        assert f"accept_changes=[{names}]" in swapped.stderr


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ("pretrain.batch_size=5000", "pretrain.batch_size=5000 is larger than the data set of 1397 images"),
        ("baseline.batch_size=1", "baseline.batch_size: a step has 1 of the 40 labelled images for 1 rank"),
        ("resources.finetune.tasks_per_node=21", "finetune.batch_size: a step has 40 of the 40 labelled images for 21"),
        ("labels.validation_per_class=500", "labels.validation_per_class=500 images of each class are to be drawn"),
        ("baseline.warmup_epochs=3", "baseline.warmup_epochs=3 does not fit into a trial of 2 epochs"),
    ],
)
def test_what_a_later_stage_could_not_do_is_refused_before_the_first_and_by_a_dry_run(
    finished: Path, tmp_path: Path, wrong: str, field: str
) -> None:
    stores = (f"data.train={finished}/shards/train", f"data.test={finished}/shards/test")
    for dry in (("dry_run=true",), ()):
        refused = launch(tmp_path, *stores, wrong, *dry)
        assert refused.returncode == 1
        assert field in refused.stderr
        assert not (tmp_path / "runs/run/config.yaml").exists()
        assert not (tmp_path / "runs/run/pretrain").exists()


def test_a_launch_that_trained_nothing_does_not_bind_the_corrected_one(finished: Path, tmp_path: Path) -> None:
    stores = (f"data.train={finished}/shards/train", f"data.test={finished}/shards/test")
    refused = launch(tmp_path, *stores, "pretrain.support.images_per_class=5", "data.support_order=paper",
                     "labels.per_class=null", f"labels.file={tmp_path}/list.txt")  # fmt: skip
    assert refused.returncode == 1, "there is no such list"
    first = launch(tmp_path, *stores, "stages=[prepare,pretrain]", "optimizer.peak_lr=1e30", "optimizer.start_lr=1e30")
    assert "The loss is" in first.stderr, "it was prepared, and diverged before its first checkpoint"
    done = launch(tmp_path, *stores, "stages=[prepare,pretrain]", "labels.per_class=5", "pretrain.epochs=1")
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path / "runs/run").settings["labels.per_class"] == 5
    bound = launch(tmp_path, *stores, "stages=[prepare,pretrain]", "pretrain.epochs=2")
    assert "begun with other settings" in bound.stderr, "now it has trained"


def test_a_wider_sweep_runs_only_its_new_trials(finished: Path) -> None:
    run = finished / "runs/run"
    before = {path.parent.name: path.stat().st_mtime_ns for path in (run / "finetune").glob("lr=*/best.pt")}
    wider = launch(
        finished, "finetune.sweep.learning_rate=[0.02,0.05,0.1]", "accept_changes=[finetune.sweep.learning_rate]",
        "stages=[finetune]",
    )  # fmt: skip
    assert wider.returncode == 0, wider.stderr
    after = {path.parent.name: path.stat().st_mtime_ns for path in (run / "finetune").glob("lr=*/best.pt")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"lr=0.05,epochs=1", "lr=0.05,epochs=2"}

    stale = launch(finished, "finetune.sweep.learning_rate=[0.02,0.05,0.1]", "stages=[selection]")
    assert stale.returncode == 1, "a result of the narrower sweep must not pass for one of the wider"
    assert "lr=0.05,epochs=1" in stale.stderr
    assert "result.json" in stale.stderr


def test_a_second_launch_of_a_running_chain_is_refused(finished: Path) -> None:
    with exclusive(finished / "runs/run/.lock"):  # as a launch holds it while it runs
        refused = launch(finished)
    assert refused.returncode == 1
    assert "Another launch of" in refused.stderr


def test_the_commit_is_unknown_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    Chain.begin(RunFolder(tmp_path), "run")
    assert read(tmp_path / "chain.json")["commit"] is None


def test_a_commit_with_files_that_are_not_in_it_is_dirty(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{ROOT}", str(tmp_path / "clone")], check=True)

    def said() -> str:
        code = "from paws_hpc.provenance import commit; print(commit())"
        told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "clone", capture_output=True, check=True)
        return told.stdout.decode().strip()

    clean = said()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "clone/conf/optimizer/mine.yaml").write_text("name: sgd\n")
    assert said() == clean, "what a recipe says is in the frozen config"
    (tmp_path / "clone/paws_hpc/mine.py").write_text("")
    assert said() == f"{clean}-dirty"
    (tmp_path / "clone/paws_hpc/mine.py").unlink()
    subprocess.run(["git", "-C", str(tmp_path / "clone"), "rm", "-q", "--cached", "-r", "paws_hpc"], check=True)
    assert said() == "None", "a package that is installed below another repository is in no commit of that"


def test_two_ranks_started_by_submitit_train_the_same_run_as_one(tmp_path: Path) -> None:
    losses = []
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2")
    for ranks, how in ((1, ()), (2, launcher)):
        run = (f"name=ranks-{ranks}", "pretrain.precision=fp64")  # ten steps of one and of two agree to the bar of 1e-8
        done = launch(tmp_path, "stages=[prepare,pretrain]", "pretrain.epochs=1", *run, *how)
        assert done.returncode == 0, done.stderr
        assert ("pretrain: 2 ranks" in done.stderr) == (ranks == 2)
        lines = (tmp_path / f"runs/ranks-{ranks}/pretrain/metrics.jsonl").read_text().splitlines()
        losses.append([row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row])
    assert len(losses[0]) == len(losses[1]) == 10
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-8)


def test_a_rank_that_fails_fails_the_launch_loudly(tmp_path: Path) -> None:
    failed = launch(
        tmp_path, "stages=[prepare,pretrain]", "resources.pretrain.tasks_per_node=2", "optimizer.peak_lr=1e30"
    )
    assert failed.returncode != 0
    assert "The loss is" in failed.stderr
    assert not (tmp_path / "runs/run/pretrain/DONE").exists()
