"""What a pre-training step may not do: wait for the device, or be another step when it is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from paws_hpc.data.config import AugmentConfig
from paws_hpc.engine.checkpoint import CheckpointFolder
from paws_hpc.engine.compiled import compile_passes, eager
from paws_hpc.engine.determinism import set_determinism
from paws_hpc.engine.pretrain import Pretraining
from tests.conftest import Stores
from tests.tiny import tiny_config, training_of


def prepared(
    stores: Stores, device: str = "cpu", *, augment: AugmentConfig | None = None, **changes: Any
) -> Pretraining:
    config = tiny_config(stores.train, stores.test, stores.train)
    config.views.augment = augment or config.views.augment
    config.model.prediction_head, config.pretrain.log_every_steps = True, 3
    config.pretrain.batch_size, config.objective.support_warmup_fraction = 16, 0.5
    for name, value in changes.items():
        setattr(config.pretrain, name, value)
    return training_of(config, stores.train, device=device)


@pytest.mark.needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype
@pytest.mark.parametrize(
    ("accumulate_steps", "execution"), [(1, "eager"), (4, "eager"), (1, "compiled"), (1, "graphed")]
)
def test_a_step_and_the_views_made_beside_it_never_wait_for_the_gpu(
    digits_stores: Stores, accumulate_steps: int, execution: str
) -> None:
    all_of_it = AugmentConfig(jitter_probability=0.5, grayscale_probability=0.5, blur_probability=0.5)
    training = prepared(
        digits_stores, "cuda", augment=all_of_it, accumulate_steps=accumulate_steps, execution=execution
    )
    settled = 13 if execution == "graphed" else 3  # the first steps allocate memory, and capture graphs until then
    with training.stream.prefetch(1, settled + 6, training.dtype) as batches:
        try:
            for batch in batches:
                training.step(batch)
                if batch.step == settled:
                    torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_gpu
def test_a_checkpoint_holds_the_state_of_its_moment_though_steps_follow_at_once(
    digits_stores: Stores, tmp_path: Path
) -> None:
    training, folder = prepared(digits_stores, "cuda"), CheckpointFolder(tmp_path, identity={})
    for step in range(6):
        before = {name: value.clone() for name, value in training.encoder.state_dict().items()}
        folder.save(step, training.state_dict())
        training.step(training.stream.batch(step))
        saved = folder.newest(training.device)
        assert saved is not None
        assert all(torch.equal(saved.state["encoder"][name], value.cpu()) for name, value in before.items())


def train_twenty_steps(training: Pretraining, *, ahead: bool) -> torch.Tensor:
    """A weight after 20 steps whose views were made ahead of them, beside the steps, or in them."""
    with training.stream.prefetch(0, 20, training.dtype if ahead else None) as batches:
        for batch in batches:
            training.step(batch)
    return training.encoder.projection.fc1.weight.detach().cpu()


@pytest.mark.needs_gpu
@pytest.mark.parametrize("poisoned", [False, True])
def test_views_made_beside_the_step_are_those_made_in_it(
    digits_stores: Stores, poisoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits, since rounding alone drives two runs apart as far as one wrong pixel would (the test below).

    ``poisoned`` fills memory with NaN when it is allocated, so that a view whose memory is given away too early is NaN.
    If both pass, the views are right, and runs without deterministic kernels differ by their order of sums. If only
    ``poisoned`` fails, memory is used again too early. If both fail and steps without views ahead equal each other, it
    is that, or a wait between the streams that is missing. If these differ too, as the message says, a kernel of the
    step has no fixed order in spite of the setting, and nothing is known about the views.
    """
    set_determinism(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", poisoned)
    try:
        beside, within, again = (
            train_twenty_steps(prepared(digits_stores, "cuda", precision="fp32", execution="eager"), ahead=ahead)
            for ahead in (True, False, False)
        )
    finally:
        set_determinism(False)
    spread = f"{(within - again).abs().max():.1e}, and beside it {(beside - within).abs().max():.1e}"
    assert torch.equal(within, again), f"steps without views ahead differ from each other by {spread}"
    assert torch.equal(beside, within), f"steps without views ahead are equal, and those with them differ by {spread}"


def test_rounding_alone_drives_runs_apart_so_that_only_bits_can_be_compared(digits_stores: Stores) -> None:
    """1e-6 of each weight in each step, as another order of sums on a GPU gives, becomes 0.1 in 20 steps."""
    ends = []
    for rounding in (0.0, 0.0, 1e-6):
        training, noise = prepared(digits_stores), torch.Generator().manual_seed(0)
        for step in range(20):
            training.step(training.stream.batch(step))
            for parameter in training.encoder.parameters():
                parameter.data.mul_(1 + rounding * torch.randn(parameter.shape, generator=noise))
        ends.append(training.encoder.projection.fc1.weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert (ends[0] - ends[2]).abs().max() > 0.02


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_compiled_without_a_break_the_steps_are_the_same(digits_stores: Stores, accumulate_steps: int) -> None:
    """Graphs as they are traced, without a backend's kernels; scoring in between, with any size, compiles nothing."""
    ends = []
    for compiled in (False, True):
        training = prepared(digits_stores, precision="fp64", accumulate_steps=accumulate_steps)
        graphs = 0

        def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            nonlocal graphs
            graphs += 1
            return graph

        if compiled:
            compile_passes(training.encoder, backend=counted)
        for step in range(4):
            training.step(training.stream.batch(step))
            if step == 1:
                traced = graphs
                with eager(training.encoder), torch.no_grad():
                    for rows in (1, 3, 7):
                        training.encoder.eval()([torch.zeros(rows, 3, 16, 16, dtype=torch.float64)])
                training.encoder.train()
        assert graphs == traced
        assert (graphs > 0) == compiled
        ends.append(training.encoder.state_dict())
    assert ends[0].keys() == ends[1].keys()
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@inductor.patch({"cpp.cxx": ("/no/such/compiler",), "compile_threads": 1})  # processes of its own take longer to start
def test_on_a_machine_without_a_compiler_compiled_training_is_eager_training(
    digits_stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    all_of_it, ends = AugmentConfig(jitter_probability=0.5, grayscale_probability=0.5, blur_probability=0.5), []
    for execution in ("eager", "compiled"):
        training = prepared(digits_stores, augment=all_of_it, execution=execution)
        for step in range(3):
            training.step(training.stream.batch(step))
        ends.append(training.encoder.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    said = [record.message for record in caplog.records if record.name == "paws_hpc.whole_graph"]
    assert [line.split(",")[0] for line in said] == [
        "torch.compile fails for the augmentation", "torch.compile fails for the network"
    ]  # fmt: skip
    assert [line for line in said if "Compiler" not in line] == []
