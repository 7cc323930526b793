"""A step in micro-batches has the gradient of the whole batch's loss, at the memory of one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paws_hpc.data.streams import PawsBatch
from paws_hpc.engine.config import OptimizerConfig, PretrainConfig, SupportConfig
from paws_hpc.engine.pretrain import Pretraining
from paws_hpc.models.norm import set_statistics
from tests.conftest import Stores
from tests.tiny import tiny_config, training_of

PARTS, BATCH, CLASSES, PER_CLASS, SMALL, VIEWS = 4, 24, 8, 4, 3, 2
CPU, STEP = torch.device("cpu"), 5
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-12}  # relative, in the Euclidean norm


def prepared(stores: Stores, *, parts: int, precision: str = "fp64", **changes: Any) -> Pretraining:
    """A training with everything on that couples rows: me-max, several small crops, the support warm-up, weights."""
    config = tiny_config(stores.train, stores.test, stores.train)
    config.seed, config.model.prediction_head, config.objective.support_warmup_fraction = 3, True, 0.5
    config.views.large.scale, config.views.small.count = [0.5, 1.0], SMALL
    config.optimizer = OptimizerConfig(name="sgd", peak_lr=0.01, warmup_epochs=0.0)
    config.pretrain = PretrainConfig(
        batch_size=BATCH, accumulate_steps=parts, epochs=1, support=SupportConfig(CLASSES, PER_CLASS),
        precision=precision, **changes,
    )  # fmt: skip
    return training_of(config, stores.train, labels_per_class=PER_CLASS)


def gradients(training: Pretraining) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in training.encoder.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], precision: str) -> None:
    """All entries together; in fp64, where rounding does not hide a fault in a small one, each by itself too."""
    assert found.keys() == expected.keys()
    together = [torch.cat([values[name].flatten() for name in expected]) for values in (found, expected)]
    pairs = {"all": together, **{name: [found[name], value] for name, value in expected.items()}}
    for name, (value, wanted) in pairs.items():
        assert wanted.norm() > 0, name
        if name == "all" or precision == "fp64":
            assert (value - wanted).norm() <= TOLERANCE[precision] * wanted.norm(), name


@pytest.mark.parametrize("precision", TOLERANCE)
def test_where_nothing_else_couples_rows_it_is_the_gradient_of_one_big_batch(
    digits_stores: Stores, precision: str
) -> None:
    steps = {parts: prepared(digits_stores, parts=parts, precision=precision) for parts in (1, PARTS)}
    losses = {}
    for parts, training in steps.items():
        set_statistics(training.encoder, "frozen")
        losses[parts] = training.step(training.stream.batch(STEP))
    assert losses[1]["train/loss_support_nce"] > 0
    assert losses[1].keys() == losses[PARTS].keys()
    assert_close(losses[PARTS], losses[1], precision)
    assert_close(gradients(steps[PARTS]), gradients(steps[1]), precision)


def in_one_graph(training: Pretraining, batch: PawsBatch) -> None:
    """All micro-batches forward, one loss, one backward pass."""
    counts = [VIEWS, 2, SMALL]
    kinds: list[list[tuple[Tensor, Tensor]]] = [[] for _ in counts]
    for part in batch.micro_batches:
        views = training.stream.augment(part, CPU, training.dtype)
        sizes = [len(view) for view in views]
        for kind, rows in zip(
            kinds, zip(*(out.split(sizes) for out in training.encoder(views)), strict=True), strict=True
        ):
            kind.append(rows)
    h, z = (
        torch.cat([
            torch.stack([rows[which].unflatten(0, (count, -1)) for rows in kind], dim=2).flatten(0, 2)
            for kind, count in zip(kinds, counts, strict=True)
        ])
        for which in (0, 1)
    )  # fmt: skip
    inputs = training.objective.inputs(batch)
    training._losses(inputs, h, z, diagnosed=False)[0].backward()


@pytest.mark.parametrize("precision", TOLERANCE)
def test_with_normalisation_it_is_the_gradient_of_one_graph_of_all_micro_batches(
    digits_stores: Stores, precision: str
) -> None:
    """And the running statistics move as in the one graph, once per micro-batch."""
    found, expected = (prepared(digits_stores, parts=PARTS, precision=precision) for _ in range(2))
    found.step(found.stream.batch(STEP))
    in_one_graph(expected, expected.stream.batch(STEP))
    assert_close(gradients(found), gradients(expected), precision)
    for name, value in expected.encoder.named_buffers():
        assert torch.equal(dict(found.encoder.named_buffers())[name], value), name


def test_a_micro_batch_has_the_mixture_of_the_whole_and_all_crops_of_its_images(digits_stores: Stores) -> None:
    whole, divided = (prepared(digits_stores, parts=parts).stream for parts in (1, PARTS))
    together, batch = whole.batch(STEP), divided.batch(STEP)
    assert np.array_equal(batch.records, together.records)
    assert torch.equal(batch.support_classes, together.support_classes)
    for kind, count in (("supports", VIEWS), ("large", 2), ("small", SMALL)):
        rows = getattr(together.micro_batches[0], kind).images.unflatten(0, (count, -1))
        for place, part in enumerate(batch.micro_batches):
            found = getattr(part, kind).images.unflatten(0, (count, -1))
            assert torch.equal(found, rows[:, place::PARTS]), kind
    classes = together.support_classes[: CLASSES * PER_CLASS]
    for place in range(PARTS):
        assert torch.equal(classes[place::PARTS].unique(), classes.unique()), "each has images of every class"


def test_running_statistics_remember_as_long_as_without_micro_batches(digits_stores: Stores) -> None:
    """Of what they were before a step, the same share is left after it."""
    left = []
    for parts in (1, PARTS):
        encoder = prepared(digits_stores, parts=parts).encoder
        share = torch.tensor(1.0, dtype=torch.float64)
        for _ in range(parts):
            share.lerp_(torch.zeros_like(share), encoder.projection.bn1.momentum)
        left.append(share)
    torch.testing.assert_close(*left)


def peak_saved_bytes(work: Callable[[], object]) -> int:
    """The most that autograd keeps at one time for backward passes, each storage once; weights are not counted."""
    alive: dict[int, list[int]] = {}
    peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            entry = alive.setdefault(self.key, [0, tensor.untyped_storage().nbytes()])
            entry[0] += 1
            peak = max(peak, sum(size for _, size in alive.values()))

        def __del__(self) -> None:
            alive[self.key][0] -= 1
            if alive[self.key][0] == 0:
                del alive[self.key]

    def pack(tensor: Tensor) -> Kept | Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else Kept(tensor)

    def unpack(kept: Kept | Tensor) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        work()
    return peak


def test_only_one_micro_batch_is_in_memory_at_a_time(digits_stores: Stores) -> None:
    peaks = {}
    for parts in (1, PARTS):
        training = prepared(digits_stores, parts=parts)
        batch = training.stream.batch(STEP)
        peaks[parts] = peak_saved_bytes(lambda training=training, batch=batch: training.step(batch))
    assert peaks[PARTS] < 1.05 * peaks[1] / PARTS


def test_sizes_that_do_not_divide_name_those_that_would(digits_stores: Stores) -> None:
    with pytest.raises(
        ValueError, match=r"pretrain\.batch_size=24 .*accumulate_steps=5 each.*batch_size=20 or 25 would"
    ):
        prepared(digits_stores, parts=5)
    with pytest.raises(
        ValueError, match=r"images_per_class=32 .*accumulate_steps=6 each.*images_per_class=30 or 36 would"
    ):
        prepared(digits_stores, parts=6)
