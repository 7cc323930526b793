"""Figures of training are those of training: counted right, taken without disturbing it, and absent where unknown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paws_hpc.bench import collectives
from paws_hpc.bench.__main__ import main
from paws_hpc.bench.images import write_photographs
from paws_hpc.bench.peers.data_loader import loaders, open_images, training_steps
from paws_hpc.bench.rounds import CandidateError, Rates, Round, Work
from paws_hpc.bench.speed import diagnostics_share, loss_share, part_figures, plain_figure, stopped_share
from paws_hpc.bench.step_parts import PARTS, Timeline, marked
from paws_hpc.bench.training import plain_resnet50, saving, steps_from_store, steps_on_device
from paws_hpc.bench.workloads import Workload, make_images, on_device, opened_stream, plain_images, rows_by_crop_group
from paws_hpc.config import Config
from paws_hpc.data.streams import PawsStream
from paws_hpc.engine.graphs import Metrics, StepGraphs
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.files import write_json
from paws_hpc.stages.pretrain import make_training

TINY = (
    "model.channels=[8,16]",
    "views.large.size=16",
    "views.small={size: 8, count: 2}",
    "pretrain.batch_size=16",
    "pretrain.support.images_per_class=2",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    made = Workload("digits", "cpu", tmp_path_factory.mktemp("bench") / "digits", TINY)
    make_images(made)
    return made


@pytest.fixture
def one_core() -> Iterator[None]:
    """Processes started meanwhile have one core: threads that wait for each other's turn would take minutes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def test_the_recipes_on_a_gpu_are_the_papers() -> None:
    config = Workload("imagenet", "cuda", Path("nowhere")).config()
    assert rows_by_crop_group(config) == [(105, 224), (128, 224), (384, 96)]
    assert plain_images(config) == pytest.approx(4.74, abs=0.01)
    config = Workload("cifar", "cuda", Path("nowhere")).config()
    assert rows_by_crop_group(config) == [(1280, 32), (512, 32), (1536, 18)]
    assert (config.model.name, config.model.depth, config.model.width) == ("wide_resnet", 28, 2)


def test_observing_a_step_changes_nothing_and_its_parts_make_the_whole(workload: Workload) -> None:
    config, weights, backward = workload.config(), [], torch.autograd.backward
    line = Timeline(CPU)
    with opened_stream(config) as stream:
        for observed in (False, True):
            training = make_training(config, stream)
            model = training.model
            for step in range(2):
                batch = on_device(stream.batch(step), CPU)
                assert torch.equal(
                    batch.micro_batches[0].large.images, stream.batch(step).micro_batches[0].large.images
                )
                if not observed:
                    training.step(batch)
                    continue
                with marked(training, line), line.step():
                    training.step(batch)
            assert training.model is model
            weights.append(training.encoder.state_dict())
    assert torch.autograd.backward is backward
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = line.read()
    assert len(steps) == 2
    least = {name: min(step[name] for step in steps) for name in PARTS}  # other programs delay one step, not all
    assert min(least.values()) > 0
    assert least["forward"] > least["metrics"]
    assert least["backward"] > least["loss, backward"]


@pytest.mark.parametrize("prepare", [steps_on_device, steps_from_store, training_steps])
def test_a_round_counts_the_images_of_its_steps(prepare: Callable[..., Work], workload: Workload) -> None:
    assert plain_resnet50("cpu", 1, steps=1)().done == 1
    done = prepare(workload, steps=2)()
    assert isinstance(done, Round)
    assert done.done == 2 * 16
    assert done.seconds > 0
    if prepare is steps_on_device:
        assert list(done.details["parts_s"]) == [*PARTS, "step"]
        assert done.details["parts_s"]["step"] <= done.seconds
    if prepare is steps_from_store:
        assert 0 <= done.details["data_wait"] <= 1


@pytest.mark.parametrize("prepare", [steps_on_device, steps_from_store])
def test_graphs_are_captured_before_a_round(
    prepare: Callable[..., Work], workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = list[int]()

    def capture(work: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
        captured.append(1)
        return work(), lambda: None

    def graphed(config: Config, stream: PawsStream) -> Pretraining:
        made = make_training(config, stream)
        made.differentiate = StepGraphs(made._differentiate, made.encoder.parameters(), CPU, capture=capture)
        return made

    monkeypatch.setattr("paws_hpc.bench.training.make_training", graphed)
    work = prepare(workload, steps=12)  # of which at least one is diagnosed
    assert len(captured) == 2, "diagnosed and not"
    work()
    assert len(captured) == 2


def test_a_save_is_timed_and_weighed(workload: Workload) -> None:
    work = saving(workload, steps=1)
    work()
    save = work()
    written = max(workload.folder.rglob("step-*.pt"))  # the first save may not be swept up yet
    assert save.details["bytes"] == written.stat().st_size
    assert save.seconds > 0
    assert save.details["checkpoint_every_steps"] == 100
    details = {"slowed_s": 1.0, "checkpoint_every_steps": 100, "step_s": 0.5}
    assert stopped_share(Round(1, 2.0, details)) == pytest.approx(0.06)
    assert stopped_share(Round(1, 2.0, details | {"slowed_s": -1.0})) == pytest.approx(0.04)


@pytest.mark.usefixtures("one_core")
def test_collectives_of_two_ranks_are_timed_and_a_failing_rank_is_an_error(workload: Workload) -> None:
    seconds = collectives.measure(workload, ranks=2, repeats=1)
    assert list(seconds) == [
        *("batch normalisation: allgather_base, 14 calls", "supports and mean prediction: allgather_base, 1 calls"),
        *(
            "supports and mean prediction: allreduce, 1 calls",
            "supports and mean prediction: reduce_scatter_base, 1 calls",
        ),
        *("batch normalisation: allreduce, 14 calls", "gradients: allreduce, 1 calls"),
        *(collectives.SMALL, collectives.LARGE, "step, global statistics", "step, local statistics"),
    ]
    assert min(seconds.values()) > 0
    broken = replace(workload, overrides=(*TINY, "pretrain.support.classes=0"))
    with pytest.raises(CandidateError, match="collectives on 2 ranks failed"):
        collectives.measure(broken, ranks=2, repeats=1)


@pytest.mark.usefixtures("one_core")
def test_the_command_writes_what_it_prints_and_says_what_it_could_not_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["step", "--from-store", "--device", "cpu", "--rounds", "1", "--steps", "1"]
    assert main([*arguments, "--folder", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "digits-cpu-step.json").read_text())
    assert found["overrides"] == list(TINY)
    assert {"gpus", "versions", "commit", "processor"} <= set(found["machine"])
    assert found["sizes"]["unlabelled per step"] == 16
    group = found["groups"]["step"]
    assert [rates["failure"] for rates in group["rates"].values()] == [None] * 2
    figures = {figure["name"].strip(): figure for figure in group["figures"]}
    assert sum(figures[part]["share"] for part in PARTS) == pytest.approx(1, abs=0.1)
    targets = [figure for figure in group["figures"] if figure["target"] is not None]
    assert {figure["reached"] for figure in targets} == {None}  # they are of other recipes, on a GPU
    assert all(figure["value"] > 0 or figure["unit"] == "%" for figure in targets)
    assert "not measured here" in printed


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert main(["step", "--device", "cuda"]) == 1
        assert "there is no GPU" in capsys.readouterr().err
    assert main(["loss", "--device", "cpu", "model.nmae=x"]) == 1
    assert "nmae" in capsys.readouterr().err


def test_the_baseline_sees_the_recipes_views(workload: Workload) -> None:
    config = workload.config()
    unlabelled, supports = loaders(config, workload, batches=2)
    assert len(unlabelled) == len(supports) == 2
    views, _ = next(iter(unlabelled))
    rows, classes = next(iter(supports))
    assert [tuple(view.shape) for view in views] == [(16, 3, 16, 16)] * 2 + [(16, 3, 8, 8)] * 2
    assert [tuple(view.shape) for view in rows] == [(20, 3, 16, 16)] * 2
    assert torch.unique(classes, return_counts=True)[1].tolist() == [2] * 10


def test_the_baseline_reads_the_files_that_were_packed(tmp_path: Path) -> None:
    write_photographs(tmp_path / "images", 4)
    images, labels = open_images(Workload("imagenet", "cpu", tmp_path))
    assert labels == [0, 1, 2, 3] == [label for _, label in images]
    assert images[2][0].mode == "RGB"


def test_ratios_and_shares_are_taken_within_rounds() -> None:
    """The machine was half as fast in the second round."""

    def rates(*per_s: float) -> Rates:
        return Rates([Round(each, 1.0) for each in per_s])

    target = plain_figure(rates(400, 200, 380), rates(2000, 1000, 2000), 4.74, only_on=None)
    assert target.value == pytest.approx(0.948)
    assert target.reached
    assert plain_figure(Rates(failure=""), rates(1.0), 4.74, only_on=None).value is None

    def rounds(*part_s: float, loss: float = 1.0) -> list[Round]:
        parts = [dict.fromkeys(PARTS, each) | {"loss": loss * each, "step": each * len(PARTS)} for each in part_s]
        return [Round(1, 1.0, {"parts_s": each}) for each in parts]

    whole, *parts = part_figures(rounds(2.0, 1.0, 1.0))
    assert whole.value == pytest.approx(1000 * len(PARTS))
    assert [figure.share for figure in parts] == pytest.approx([1 / len(PARTS)] * len(PARTS))
    assert loss_share(rounds(2.0, 1.0)) == pytest.approx(100 * 3 / len(PARTS))
    assert diagnostics_share(rounds(2.0, 1.0), rounds(2.0, 1.0, loss=1.5), 10) == pytest.approx(5 / len(PARTS))
    assert diagnostics_share([], rounds(1.0), 10) is None


def test_the_bars_of_a_gpu_are_what_the_parts_of_the_check_left(tmp_path: Path) -> None:
    """Every row of the table is there, reached or missed, and one whose part did not end says so."""

    def bars(device: str = "cuda") -> dict[str, Any]:
        assert main(["bars", "--device", device, "--folder", str(tmp_path)]) == 0
        return {bar["name"]: bar for bar in json.loads((tmp_path / "bars.json").read_text())["bars"]}

    nothing = bars()
    assert len(nothing) == 10
    assert {bar["value"] for bar in nothing.values()} == {None}
    assert nothing["files of GPU tests passed"]["absent"] == "it did not end"
    figures = [
        {"name": "deterministic / default", "value": 0.7},
        {"name": "from the store / step alone", "value": 0.98},
    ]
    write_json(tmp_path / "imagenet-cuda-step.json", {"groups": {"step": {"figures": figures}}})
    rates = {"paws_hpc, data on the device, graphed": {"median": 12_172.5}}
    cifar = {"machine": {"gpus": ["NVIDIA H200"]}, "groups": {"step": {"rates": rates}}}
    write_json(tmp_path / "cifar-cuda-step.json", cifar)
    write_json(tmp_path / "start.json", {"eager": 10.0, "cold": 120.0, "warm": 25.0})
    write_json(tmp_path / "checks.json", {"equal": False})
    measured = bars()
    assert measured["ImageNet deterministic / default"]["reached"] is False
    assert measured["ImageNet from JPEG shards / step alone"]["reached"] is True
    reference = measured["CIFAR step / 4,869 images/s (an H200, eager, b96581b, with biases)"]
    assert (reference["value"], reference["reached"]) == (2.5, True)
    assert measured["second start, compiled - eager"]["value"] == 15.0
    assert measured["second start, compiled - eager"]["reached"] is True
    assert measured["killed and resumed = uninterrupted, to the bit"]["reached"] is False
    write_json(tmp_path / "cifar-cuda-step.json", cifar | {"machine": {"gpus": ["NVIDIA H100"]}})
    assert bars()[reference["name"]]["reached"] is None
    assert bars("cpu")["second start, compiled - eager"]["reached"] is None
