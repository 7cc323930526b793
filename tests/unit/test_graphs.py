"""A step that is captured and replayed is the step; on a CPU by a recorder that knows memory only, as a graph does."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paws_hpc.data.config import AugmentConfig
from paws_hpc.engine.compiled import eager
from paws_hpc.engine.errors import PreemptedError
from paws_hpc.engine.graphs import CudaCapture, Metrics, StepGraphs
from paws_hpc.engine.preemption import JobControl
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.objective.config import PawsConfig, RopawsConfig
from paws_hpc.stages import pretrain
from paws_hpc.stages.context import TorchContext
from paws_hpc.stages.run_folder import RunFolder
from tests.conftest import Stores
from tests.ranks import results_of, run_on_ranks
from tests.tiny import random_store, tiny_config, training_of

CPU, STEPS = torch.device("cpu"), 30


def tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments: tensors as they lie in memory, numbers as they are at the moment.

    Collectives are among them. They write to their arguments, and are over when their ``Work`` has been waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: list[Tensor] = []
        self.received = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs, given = tensors(result), {memory(each) for each in tensors((args, kwargs))}
        if func.namespace == "c10d":
            self.received = set(map(memory, outputs))
        elif func is torch.ops.aten.copy_.default and memory(args[0]) in self.received:
            return result
        self.operations.append((func, args, kwargs or {}, outputs))
        self.made += [each.detach() for each in outputs if memory(each) not in given]
        return result

    def replay(self) -> None:
        """Do the operations again on the same memory, and write the results to where they were."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self.operations:
                if func.is_view or func is torch.ops.aten.lift_fresh.default:
                    continue
                result = func(*args, **kwargs)
                for work in tree_leaves(result) if func.namespace == "c10d" else ():
                    if not isinstance(work, Tensor):
                        work.wait()
                for output, new in zip(outputs, tensors(result), strict=True):
                    if memory(new) != memory(output):
                        output.copy_(new)


class CpuCapture:
    """Like a CUDA graph's, the capture does nothing: what the work moved is moved back, and its results are NaN."""

    def __init__(self, training: Pretraining, *, fails_at: tuple[int, ...] = ()) -> None:
        self.training, self.fails_at, self.captured = training, fails_at, 0
        self.recorders = list[weakref.ref[Recorder]]()

    def __call__(self, work: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
        self.captured += 1
        before = {name: value.clone() for name, value in self.training.encoder.state_dict().items()}
        with Recorder() as recorder:
            metrics = work()
        for made in recorder.made:
            if made.is_floating_point():
                made.fill_(torch.nan)
        self.training.encoder.load_state_dict(before)
        if self.captured in self.fails_at:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.recorders.append(weakref.ref(recorder))
        return metrics, recorder.replay


def training(
    stores: Stores, objective: PawsConfig, optimizer: str, *, device: str = "cpu", **changes: Any
) -> Pretraining:
    config = tiny_config(stores.train, stores.test, stores.train)
    config.views.augment, config.objective, config.optimizer.name = AugmentConfig(), objective, optimizer
    config.optimizer.peak_lr, config.optimizer.warmup_epochs = {"adamw": 1e-3, "lars": 1.0}[optimizer], 0.2
    config.pretrain.batch_size, config.pretrain.ema, config.pretrain.log_every_steps = 16, 0.9, 3
    config.model.prediction_head = True
    for name, value in changes.items():
        setattr(config.pretrain, name, value)
    return training_of(config, stores.train, device=device)


def graphed(made: Pretraining, *, fails_at: tuple[int, ...] = ()) -> CpuCapture:
    capture = CpuCapture(made, fails_at=fails_at)
    made.differentiate = StepGraphs(made._differentiate, made.encoder.parameters(), CPU, capture=capture)
    return capture


def steps(made: Pretraining, start: int, stop: int) -> list[dict[str, Tensor]]:
    return [made.step(made.stream.batch(step)) for step in range(start, stop)]


def assert_same(found: Any, expected: Any) -> None:
    """To the bit, in all that a checkpoint holds."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


OBJECTIVES = [
    PawsConfig(support_warmup_fraction=0.16, true_label_targets=True),  # ends after 14 of the epoch's 87 steps
    RopawsConfig(support_warmup_fraction=0.16),
]
CASES = pytest.mark.parametrize("optimizer", ["lars", "adamw"])
BOTH = pytest.mark.parametrize("objective", OBJECTIVES, ids=["paws", "ropaws"])


@BOTH
@CASES
def test_replayed_steps_are_the_eager_ones_to_the_bit(
    digits_stores: Stores, objective: PawsConfig, optimizer: str
) -> None:
    """Support warm-up ends on the way, diagnosed steps stand between others, rates and labels change at every step."""
    plain, replayed = (training(digits_stores, objective, optimizer) for _ in range(2))
    capture = graphed(replayed)
    expected, found = steps(plain, 0, STEPS), steps(replayed, 0, STEPS)
    assert capture.captured == 4, "with and without support warm-up, diagnosed and not"
    assert len({tuple(row) for row in expected}) == 4
    assert_same(found, expected)
    assert_same(replayed.state_dict(), plain.state_dict())


def test_an_interrupted_run_and_one_that_is_scored_on_the_way_are_the_same_to_the_bit(digits_stores: Stores) -> None:
    whole, first, second = (training(digits_stores, OBJECTIVES[0], "lars") for _ in range(3))
    captures = [graphed(each) for each in (whole, first, second)]
    steps(whole, 0, STEPS)
    steps(first, 0, 17)
    with eager(first.encoder), torch.no_grad():  # with other sizes, after graphs were captured
        first.encoder.eval()([torch.zeros(5, 3, 16, 16)])
    first.encoder.train()
    second.load_state_dict(first.state_dict())
    steps(second, 17, STEPS)
    assert_same(second.state_dict(), whole.state_dict())
    first.load_state_dict(training(digits_stores, OBJECTIVES[0], "lars").state_dict())
    steps(first, 0, STEPS)  # into a run whose graphs exist already: they know the parameters' memory
    assert_same(first.state_dict(), whole.state_dict())
    assert min(capture.captured for capture in captures) >= 2


def test_a_number_that_is_no_input_would_be_noticed(digits_stores: Stores) -> None:
    """The recorder's own test: a loss that reads its step otherwise does not train as eagerly."""
    ends = []
    for replayed in (False, True):
        made = training(digits_stores, PawsConfig(), "lars")
        losses, calls = made._losses, []

        def baked(*given: Any, losses: Any = losses, calls: list[None] = calls, **named: Any) -> Any:
            calls.append(None)
            total, metrics = losses(*given, **named)
            return total * (1 + len(calls)), metrics

        made._losses = baked  # type: ignore[method-assign]
        if replayed:
            graphed(made)
        steps(made, 0, 12)
        ends.append(made.encoder.projection.fc1.weight.detach())
    assert not torch.equal(*ends)


def test_where_a_capture_fails_training_goes_on_as_eagerly_and_the_log_says_why_once(
    digits_stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    plain, other = (training(digits_stores, PawsConfig(), "lars") for _ in range(2))
    capture = graphed(other, fails_at=(2,))  # of the diagnosed steps, which ran before
    assert_same(steps(other, 0, 12), steps(plain, 0, 12))
    assert_same(other.state_dict(), plain.state_dict())
    (record,) = [record for record in caplog.records if record.name == "paws_hpc.engine.graphs"]
    assert record.message.endswith("(RuntimeError: operation not permitted).")
    assert capture.captured == 2
    assert [recorder() for recorder in capture.recorders] == [None], "the others' memory is free again"


def test_a_kind_of_step_that_comes_late_is_captured_when_it_comes_or_the_next_time(
    digits_stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    """A second step's memory beside that of the graphs would not be there."""
    plain, at_once, later = (training(digits_stores, PawsConfig(), "lars", log_every_steps=5) for _ in range(3))
    expected = steps(plain, 1, 17)
    for made, fails_at, captures in ((at_once, (), 2), (later, (2,), 4)):  # steps 4, 5; 4, 5, 6, 10
        ran = list[int]()
        differentiate = made._differentiate

        def counted(*given: Any, differentiate: Any = differentiate, ran: list[int] = ran, **named: Any) -> Any:
            ran.append(1)
            return differentiate(*given, **named)

        made._differentiate = counted  # type: ignore[method-assign]
        capture = graphed(made, fails_at=fails_at)
        assert_same(steps(made, 1, 17), expected)
        assert_same(made.state_dict(), plain.state_dict())
        assert capture.captured == captures
        assert len(ran) == 3 + captures + len(fails_at)
    assert all(record.levelno < logging.WARNING for record in caplog.records)


def replayed_on_ranks(rank: int, world: int) -> dict[str, Any]:
    return beside_eager_steps()


def failing_on_rank_1(rank: int, world: int) -> dict[str, Any]:
    return beside_eager_steps(fails_at=(2,) if rank == 1 else ())


def beside_eager_steps(*, fails_at: tuple[int, ...] = ()) -> dict[str, Any]:
    """What this rank's steps give, eager and with graphs; support warm-up ends among the replayed ones."""
    warnings = list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("paws_hpc").addHandler(handler)
    with TemporaryDirectory() as name:
        store = random_store(Path(name) / "store", count=640, size=16, classes=10).path
        objective = PawsConfig(support_warmup_fraction=0.5)
        plain, replayed = (training(Stores(store, store), objective, "lars") for _ in range(2))
        capture = graphed(replayed, fails_at=fails_at)
        rows = [steps(made, 0, STEPS) for made in (plain, replayed)]
    logging.getLogger("paws_hpc").removeHandler(handler)
    states = [{**made.encoder.state_dict(), **made.result.state_dict(prefix="average.")} for made in (plain, replayed)]
    return {"rows": rows, "states": states, "captured": capture.captured, "warnings": warnings}


def test_on_two_ranks_steps_are_replayed_with_their_collectives_or_by_no_rank(tmp_path: Path) -> None:
    """To the bit the eager ones, over gloo, after a capture that fails on one rank too: each rank logs that once."""
    run_on_ranks(tmp_path, {2: [replayed_on_ranks, failing_on_rank_1]})
    for work, captured in ((replayed_on_ranks, 4), (failing_on_rank_1, 2)):
        results = results_of(work, 2, tmp_path)
        for rank, result in enumerate(results):
            assert_same(*result["rows"])
            assert_same(*result["states"])
            assert result["captured"] == captured
            causes = [text.partition("(")[2] for text in result["warnings"]]
            told = "" if rank == 1 else "OtherRankError: rank 1 failed, and no rank goes on without it: "
            assert causes == ([] if captured == 4 else [f"{told}RuntimeError: operation not permitted)."])
        first, second = (result["states"][1] for result in results)
        assert_same(first, second)
        assert not torch.equal(*(result["rows"][1][-1]["train/loss_consistency"] for result in results)), "other images"


@pytest.mark.parametrize("preempted", [False, True])
def test_no_graph_outlives_its_stage(
    digits_stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempted: bool
) -> None:
    """NCCL would wait for it when ranks part. After a preemption, the error that is on its way holds the training."""
    captures, make = list[CpuCapture](), pretrain.make_training

    def made_with_graphs(*given: Any) -> Pretraining:
        made = make(*given)
        captures.append(graphed(made))
        return made

    monkeypatch.setattr(pretrain, "make_training", made_with_graphs)
    config, run = tiny_config(digits_stores.train, digits_stores.test, tmp_path), RunFolder(tmp_path / "run")
    control = JobControl(lambda: preempted and bool(captures[0].recorders))
    try:
        pretrain.run(TorchContext(config, run, control=control))
        assert not preempted
    except PreemptedError:
        assert preempted
        assert {recorder() for recorder in captures[0].recorders} == {None}
    finally:
        control.close()
    assert {recorder() for recorder in captures[0].recorders} == {None}
    assert all(parameter.grad is None for parameter in captures[0].training.encoder.parameters())


@pytest.mark.needs_gpu
@pytest.mark.usefixtures("fresh_compiler")
@BOTH
def test_cuda_graphs_of_steps_are_the_steps(
    digits_stores: Stores, objective: PawsConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the bit with deterministic algorithms, captured as they are written and compiled."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for execution in ("eager", "compiled"):
        ends = []
        for replayed in (False, True):
            made = training(digits_stores, objective, "lars", device="cuda", execution=execution)
            if replayed:
                capture = CudaCapture(made.device)
                made.differentiate = StepGraphs(
                    made._differentiate, made.encoder.parameters(), made.device, capture=capture
                )
            torch.use_deterministic_algorithms(mode=True)
            try:
                metrics = steps(made, 0, STEPS)
            finally:
                torch.use_deterministic_algorithms(mode=False)
            ends.append((metrics, made.state_dict()))
        assert_same(*ends)
    assert not [record for record in caplog.records if record.name.startswith("paws_hpc")]
