"""A dry run says what a real step allocates and communicates; both are observed here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from paws_hpc.bench import memory
from paws_hpc.bench.__main__ import main
from paws_hpc.bench.dry_run import GRADIENTS, Collective, Recorder, dry_run, one_share
from paws_hpc.bench.training import training_with_data
from paws_hpc.bench.workloads import Workload, make_images
from paws_hpc.cluster.compose import compose_run
from paws_hpc.config import Config
from paws_hpc.data.devices import PrefetchedViews
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.files import read_json
from paws_hpc.models.config import ModelConfig
from tests.ranks import results_of, run_on_ranks
from tests.tiny import random_store, small_vit, tiny_config, training_of

NETWORKS = {
    "small_resnet": ModelConfig("small_resnet", prediction_head=True, projection_hidden_dim=512),
    "wide_resnet": ModelConfig("wide_resnet", depth=10, width=1),  # has biases without a gradient
    "vit": ModelConfig("vit_s16"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "digits"


def allocated_by_a_step(training: Pretraining) -> int:
    """The most that torch has given out between a step's operations, beyond what was there before, in bytes.

    The views of a single micro-batch are there before: a thread that made them would allocate whenever it had time.
    What a convolution takes and gives back does not count: mkldnn's copies of its arguments in a layout of its own.
    """
    batch = training.stream.batch(1)
    if len(batch.micro_batches) == 1:
        views = training.stream.augment(batch.micro_batches[0], training.device, training.dtype)
        batch = replace(batch, prefetched=PrefetchedViews(lambda: views, None))
    training.optimizer.zero_grad(set_to_none=True)  # a profile does not see memory go that was there before it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training.step(batch)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = most = end_of_convolution = 0
    for event in events:
        if "convolution" in event.name() and event.name().startswith("aten::"):
            end_of_convolution = max(end_of_convolution, event.start_ns() + event.duration_ns())
        elif event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            if event.start_ns() > end_of_convolution:
                most = max(most, now)
            now += event.nbytes()
    return most


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer=adamw",),
        ("pretrain.accumulate_steps=4",),
        ("pretrain.precision=bf16", "pretrain.ema=0.9", "model.prediction_head=true"),
        ("model.checkpoint_activations=true",),
    ],
    ids=["plain", "adamw", "accumulated", "bf16", "recomputed"],
)
def test_the_estimated_peak_is_what_a_step_on_a_cpu_allocates(folder: Path, overrides: tuple[str, ...]) -> None:
    """To a hundredth: what augments a micro-batch is in one of them only, and sizes are rounded in the other."""
    workload = Workload("digits", "cpu", folder, ("pretrain.batch_size=64", *overrides))
    make_images(workload)
    training, _ = training_with_data(workload)
    training.step(training.stream.batch(0))
    memory, collectives = dry_run(workload.config(), ranks=1, cuda=False)
    assert not collectives
    before = memory.weights + memory.optimiser + memory.average
    others = 0 if "pretrain.accumulate_steps=4" in overrides else memory.views  # of this step and of later ones
    assert memory.peak - others == pytest.approx(before + allocated_by_a_step(training), rel=0.01)
    state = training.optimizer.state_dict()["state"].values()
    tensors = [value for each in state for value in each.values()]
    assert memory.optimiser == sum(tensor.nbytes for tensor in tensors)


def config_of(network: str, folder: Path) -> Config:
    config = tiny_config(folder, folder, folder)
    config.model, config.pretrain.batch_size = NETWORKS[network], 16
    config.pretrain.log_every_steps = 10
    return config


def step_of_small_resnet(rank: int, world: int) -> list[Collective]:
    return recorded("small_resnet")


def step_of_wide_resnet(rank: int, world: int) -> list[Collective]:
    return recorded("wide_resnet")


def step_of_vit(rank: int, world: int) -> list[Collective]:
    with small_vit():
        return recorded("vit")


def recorded(network: str) -> list[Collective]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        random_store(folder / "store", count=160, size=16, classes=10)
        training = training_of(config_of(network, folder), folder / "store")
        training.step(training.stream.batch(0))
        with Recorder() as recorder:
            training.step(training.stream.batch(1))
    parameters = len(list(training.encoder.parameters()))
    unused = Collective(GRADIENTS, "allreduce", 4 * parameters)  # on CPUs alone: which parameters a rank has not used
    recorder.collectives.remove(unused)
    return [vars(each) for each in recorder.collectives]


def test_two_ranks_communicate_what_the_dry_run_says(tmp_path: Path) -> None:
    """Every collective: who asked for it, which kind it is, and its bytes."""
    works = {"small_resnet": step_of_small_resnet, "wide_resnet": step_of_wide_resnet, "vit": step_of_vit}
    run_on_ranks(tmp_path, {2: list(works.values())})
    for network, work in works.items():
        with small_vit():
            _, expected = dry_run(config_of(network, tmp_path), ranks=2, cuda=False)
        for found in results_of(work, 2, tmp_path):
            assert Counter(Collective(**each) for each in found) == Counter(expected), network
    assert sum(each.part == GRADIENTS for each in expected) == 1


@pytest.mark.parametrize("ranks", [4, 16])
def test_one_share_alone_has_as_many_rows_as_each_rank(ranks: int) -> None:
    """Of supports too, where ranks do not divide classes: what is measured on one GPU is what a rank needs."""
    config, _ = compose_run(["experiment=cifar10_4000", "model=small_resnet"])
    alone, shared = dry_run(one_share(config, ranks=ranks), ranks=1)[0], dry_run(config, ranks=ranks)[0]
    assert alone.views == shared.views


def test_bench_memory_goes_on_after_a_run_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tuple(memory.Setting(f"run {number}", 1, ("experiment=digits",)) for number in (1, 2))
    peaks = iter([torch.OutOfMemoryError("CUDA out of memory"), 3_000_000_000])

    def measured(config: Config, *, ranks: int) -> int:
        if isinstance(peak := next(peaks), Exception):
            raise peak
        return peak

    monkeypatch.setattr(memory, "PUBLISHED", settings)
    monkeypatch.setattr(memory, "measured_peak", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "describe_machine", dict)
    assert main(["memory", "--folder", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()[2:4]
    assert first.startswith("| run 1, 1 |")
    assert "| does not fit |" in first
    assert second.startswith("| run 2, 1 |")
    assert "| 3 |" in second
    assert [each["measured_peak"] for each in read_json(tmp_path / "memory.json")["settings"]] == ["does not fit", 3e9]


def test_bench_memory_prints_what_it_writes_and_refuses_what_does_not_divide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memory", "--folder", str(tmp_path), "experiment=digits"]
    assert main([*arguments, "pretrain.ema=0.9"]) == 0
    assert "the run, 1, pretrain.ema=0.9" in capsys.readouterr().out
    assert main([*arguments, "--gpus", "3"]) == 1
    assert "pretrain.batch_size=64 does not divide by 3 ranks" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()
