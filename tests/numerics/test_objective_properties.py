"""What holds of the objective whatever the data: exactness, symmetries, bounds, precision, unstable collapse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from paws_hpc.objective.labels import ClassLabels, smooth_labels
from paws_hpc.objective.nce import nt_xent, supervised_nce
from paws_hpc.objective.neighbours import log_soft_nearest_neighbours, sharpen, soft_nearest_neighbours
from paws_hpc.objective.paws import PawsLoss
from tests.objective import labels_for, step_loss

K, PER_CLASS, IMAGES, D = 4, 3, 5, 6
S = K * PER_CLASS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLASSES = torch.arange(K).repeat(PER_CLASS)


def labels_of(smoothing: float) -> ClassLabels:
    return labels_for(CLASSES, K, smoothing)


def loss_of(z: Tensor, h: Tensor, labels: ClassLabels, small: int = 2, **options: float) -> PawsLoss:
    """The loss of rows [supports; large 1; large 2; small ...] as one matrix."""
    large = 2 * (len(z) - S) // (2 + small)
    return step_loss(z[S:], z[:S], h[S : S + large], h[:S], labels, **options)


def written_out(queries: Tensor, supports: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """log p by its definition: one logarithm of a sum over supports for each query and class, (Q, S, K) in memory."""
    cosines = torch.cosine_similarity(queries[:, None], supports[None], dim=-1)
    weighted = (cosines / temperature)[:, :, None] + labels.log()[None]
    return weighted.logsumexp(1) - (cosines / temperature).logsumexp(1, keepdim=True)


# --- the classifier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.005, 0.002])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [5, 2, 4, 1], [6, 0, 3, 3]], ids=["equal", "unequal", "one empty"])
def test_classifier_is_its_definition_with_its_gradients(
    temperature: float, smoothing: float, counts: list[int]
) -> None:
    """In whatever order the supports come. A class without supports has probability 0 and no gradient."""
    classes = torch.arange(K).repeat_interleave(torch.tensor(counts))
    classes = classes[torch.randperm(S, generator=torch.Generator().manual_seed(5))]
    queries, supports = draw(IMAGES, D).requires_grad_(), draw(S, D, seed=1)
    supports[0] = -queries[0].detach()  # the widest gap there is: cosine -1
    supports.requires_grad_()
    matrix = smooth_labels(classes, K, smoothing=smoothing, dtype=torch.float64)
    actual = log_soft_nearest_neighbours(queries, supports, labels_for(classes, K, smoothing), temperature=temperature)
    expected = written_out(queries, supports, matrix, temperature)
    assert (actual == -math.inf).any() == (smoothing == 0 and 0 in counts)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    probabilities = soft_nearest_neighbours(queries, supports, matrix, temperature=temperature)
    torch.testing.assert_close(probabilities, expected.exp(), rtol=1e-10, atol=1e-10)
    weights = draw(IMAGES, K, seed=4)
    borne = matrix.any(0)
    expected = written_out(queries, supports, matrix[:, borne], temperature)
    gradients = [
        torch.autograd.grad((weights[:, columns] * logs).masked_fill(logs == -math.inf, 0).sum(), [queries, supports])
        for columns, logs in ((slice(None), actual), (borne, expected))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_the_backward_pass_keeps_one_matrix_of_each_size() -> None:
    """Sizes are distinct, so that each names its tensor: logits (Q, S), directions (S, D), and no labels (S, K)."""
    features, queries = 17, 4 * IMAGES
    z, h = draw(S + queries, features).requires_grad_(), draw(S + queries, features, seed=1)
    places: dict[tuple[int, ...], set[int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        places.setdefault(tuple(sorted(tensor.shape)), set()).add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(z, h, labels_of(0.1))
    assert loss.total.requires_grad
    assert (len(places[S, queries]), len(places[S, features])) == (1, 1)  # S is the smaller number
    assert (K, S) not in places


@pytest.mark.parametrize("temperature", [1.0, 0.25, 0.01])
def test_sharpening_is_its_formula_and_never_underflows(temperature: float) -> None:
    probabilities = draw(3, 1000).softmax(1)
    expected = (probabilities.log() / temperature).softmax(1)
    torch.testing.assert_close(sharpen(probabilities, temperature=temperature), expected)
    torch.testing.assert_close(
        sharpen(probabilities.float(), temperature=temperature), expected.float(), rtol=1e-3, atol=1e-6
    )
    uniform = torch.full((1000,), 1e-3)
    torch.testing.assert_close(sharpen(uniform, temperature=temperature), uniform)


# --- symmetries -----------------------------------------------------------------------------------------------------


RANDOM, SUPPORTS = torch.Generator().manual_seed(7), torch.arange(S)
VIEWS = torch.arange(S, S + 4 * IMAGES).view(4, IMAGES)
ORDERS = {
    "supports": torch.cat([torch.randperm(S, generator=RANDOM), VIEWS.flatten()]),
    "images": torch.cat([SUPPORTS, VIEWS[:, torch.randperm(IMAGES, generator=RANDOM)].flatten()]),
    "large views": torch.cat([SUPPORTS, VIEWS[[1, 0, 2, 3]].flatten()]),
    "nothing": torch.arange(S + 4 * IMAGES),
}


@pytest.mark.parametrize("reordered", ORDERS)
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=["classes kept", "classes renumbered"])
@pytest.mark.parametrize("spread", [0, 1], ids=["lengths kept", "other lengths"])
def test_the_loss_does_not_depend_on_orders_class_numbers_and_lengths(
    reordered: str, numbers: list[int], spread: int
) -> None:
    rows, z, h = ORDERS[reordered], draw(S + 4 * IMAGES, D), draw(S + 4 * IMAGES, D, seed=1)
    lengths = 10.0 ** (spread * draw(len(z), 1, seed=2))
    labels = labels_for(torch.tensor(numbers)[CLASSES[rows[:S]]], K, 0.1)
    before, after = loss_of(z, h, labels_of(0.1)), loss_of((z * lengths)[rows], (h * lengths.flip(0))[rows], labels)
    for term in PawsLoss._fields:
        torch.testing.assert_close(getattr(after, term), getattr(before, term), rtol=1e-12, atol=1e-12)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.005])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("opposed", [False, True])
def test_float32_is_close_to_float64(temperature: float, smoothing: float, opposed: bool) -> None:
    """Also where exp(-2 / 0.005) = exp(-400) is far below what float32 can hold, and with labels that are exactly 0."""
    z, h = draw(S + 8 * IMAGES, 16).float(), draw(S + 8 * IMAGES, 16, seed=1).float()
    if opposed:  # every row is along one axis, with cosines of +1 and -1 only, up to a little noise
        z[:, 0] += torch.where(torch.arange(len(z)) % 3 == 0, -1e3, 1e3)
    labels = labels_of(smoothing)
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        rows = z.to(dtype).requires_grad_()
        loss = loss_of(rows, h.to(dtype), labels, small=6, temperature=temperature)
        assert loss.total.dtype == dtype
        gradients.append(torch.autograd.grad(loss.total, rows)[0].double())
        values.append(torch.stack(loss).detach().double())
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(values[0], values[1], rtol=2e-4, atol=2e-4)
    assert (gradients[0] - gradients[1]).norm() <= 2e-3 * gradients[1].norm()


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_float32_contrastive_losses_are_close_to_float64(temperature: float) -> None:
    z, labels = draw(S, D), labels_of(0.0)
    for loss in (lambda rows: supervised_nce(rows, labels, temperature=temperature), nt_xent_at(temperature)):
        narrow, wide = z.float().requires_grad_(), z.float().double().requires_grad_()
        torch.testing.assert_close(loss(narrow).double(), loss(wide), rtol=1e-4, atol=1e-4)
        (gradient,), (expected,) = torch.autograd.grad(loss(narrow), narrow), torch.autograd.grad(loss(wide), wide)
        assert (gradient - expected).norm() <= 1e-3 * expected.norm()


def nt_xent_at(temperature: float):
    return lambda rows: nt_xent(rows, temperature=temperature)


def test_autocast_does_not_reach_the_objective() -> None:
    z, h, labels = draw(S + 4 * IMAGES, D).float(), draw(S + 4 * IMAGES, D, seed=1).float(), labels_of(0.1)

    def everything() -> Tensor:
        losses = [supervised_nce(z[:S], labels, temperature=0.1), nt_xent(z, temperature=0.1)]
        return torch.stack([*loss_of(z, h, labels), *losses])

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(everything(), plain)
    assert plain.dtype == torch.float32
    assert loss_of(z.bfloat16(), h.bfloat16(), labels).total.dtype == torch.float32


@pytest.mark.parametrize("allow", ["set_float32_matmul_precision", "fp32_precision"])  # torch's old and new interface
def test_reduced_precision_products_do_not_reach_the_forward_pass(allow: str) -> None:
    """A run that lets float32 products use TF32 elsewhere keeps that setting, and the objective ignores it."""
    seen, products = [], torch.backends.cuda.matmul

    class Watch(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                seen.append(products.fp32_precision)
            return super().__torch_function__(function, types, args, kwargs or {})

    before = products.fp32_precision
    try:
        if allow == "fp32_precision":
            products.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        supervised_nce(draw(S, D).float().as_subclass(Watch), labels_of(0.1), temperature=0.1)
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee"]


def test_losses_read_nothing_back_from_the_device() -> None:
    """Fake tensors have no values: whatever asks for one, and would make the host wait for a GPU, raises."""
    with FakeTensorMode():
        z = torch.randn(S + 4 * IMAGES, D, requires_grad=True)
        classes = torch.arange(K).repeat(PER_CLASS)
        labels = ClassLabels(classes, torch.arange(S).view(PER_CLASS, K), 0.1)
        for temperature in (0.1, 0.005):
            total = loss_of(z, z.detach(), labels, temperature=temperature).total
            total = total + supervised_nce(z[:S], labels, temperature=temperature) + nt_xent(z, temperature=temperature)
            total.backward()
        with pytest.raises(DataDependentOutputException):
            total.item()


# --- collapse -------------------------------------------------------------------------------------------------------


def descend_from_near_collapse(sharpening: float, seed: int) -> tuple[Tensor, Tensor]:
    """Distances of all predictions from uniform before and after 100 steps on nearly equal rows whose views agree."""
    images = draw(8, D, seed=seed)
    views = [images + 0.5 * draw(8, D, seed=seed + offset) for offset in (100, 200)]
    common = torch.nn.functional.normalize(draw(1, D, seed=seed + 300))
    z = (common + 0.05 * torch.cat([draw(S, D, seed=seed + 400), *views])).requires_grad_()
    labels = labels_of(0.1)

    def distance() -> Tensor:
        return (log_soft_nearest_neighbours(z[S:], z[:S], labels, temperature=0.1).exp() - 1 / K).detach().norm()

    before = distance()
    for _ in range(100):
        loss = loss_of(z, z.detach(), labels, small=0, sharpening=sharpening)
        with torch.no_grad():
            z -= torch.autograd.grad(loss.total, z)[0]
    return before, distance()


@pytest.mark.parametrize("seed", range(3))
def test_near_collapse_is_unstable_because_targets_are_sharpened(seed: int) -> None:
    """Proposition 1, in the form that holds: training leaves nearly uniform predictions, and sharpening is why."""
    before, after = descend_from_near_collapse(0.25, seed)
    assert after > 20 * before
    before, after = descend_from_near_collapse(1.0, seed)
    assert after < before
