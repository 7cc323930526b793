"""Each augmentation equals torchvision's for the same parameters, and parameters belong to (seed, epoch, sample, view).

Tolerances are absolute, on pixels in [0, 1]: 1e-6 where both sides do the same few operations, 2e-6 for the hue, whose
divisions differ, and 5e-6 for whole pipelines. One of 255 levels is 4e-3.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from PIL import ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from paws_hpc.bench.peers import pil
from paws_hpc.data import augment as module
from paws_hpc.data.augment import (
    OPERATIONS,
    Change,
    CompiledAugmentation,
    Operation,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    draw_parameters,
    equalize,
    gaussian_blur,
    normalise,
    solarize,
)
from paws_hpc.data.config import AugmentConfig, CropConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS = AugmentConfig(saturation=0, hue=0, grayscale_probability=0, blur_probability=0)
DEVICES = [
    pytest.param(torch.device("cpu"), marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")),
    pytest.param(torch.device("cuda"), marks=pytest.mark.needs_gpu),
]
CONFIGS = {"imagenet": AugmentConfig(), "digits": DIGITS, "always": AugmentConfig(0.8, 0.8, 0.8, 0.2, 1, 0.5, 1)}
JITTER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, float], Tensor], list[float]]] = {
    "brightness": (adjust_brightness, TF.adjust_brightness, [0.0, 0.2, 1.0, 1.3, 1.8, 2.5]),
    "contrast": (adjust_contrast, TF.adjust_contrast, [0.0, 0.2, 1.0, 1.3, 1.8, 2.5]),
    "saturation": (adjust_saturation, TF.adjust_saturation, [0.0, 0.2, 1.0, 1.3, 1.8, 2.5]),
    "hue": (adjust_hue, TF.adjust_hue, [-0.5, -0.2, 0.0, 0.07, 0.2, 0.5]),
}


@cache
def photographs() -> list[Tensor]:
    """Two photographs, (3, 427, 640) uint8."""
    return [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]


def pictures(height: int = 96, width: int = 96) -> Tensor:
    """(6, 3, height, width) uint8: four pieces of photographs, noise, and few colours with greys, black and white."""
    flower, temple = photographs()
    places = [(flower, 100, 200), (flower, 200, 320), (temple, 200, 200), (temple, 203, 400)]
    pieces = [image[:, top : top + height, left : left + width] for image, top, left in places]
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
    few_colours = torch.randint(0, 3, (3, height, width), dtype=torch.uint8, generator=random) * 127
    return torch.stack((*pieces, noise, few_colours))


def distance(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return float((first - second).abs().max())


def by_torchvision(image: Tensor, parameters: Tensor, row: int) -> Tensor:
    """One image through torchvision's functions, one after the other, in [0, 1]."""
    pixels = TF.to_dtype(image, torch.float32, scale=True)
    for name, (wanted, amounts) in drawn(parameters).items():
        if wanted[row]:
            pixels = TORCHVISION[name](pixels, *amounts[:, row].tolist())
    return pixels


def drawn(parameters: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By operation, (n,) whether an image gets it and (amounts, n)."""
    return {operation.probability: tuple(values) for operation, *values in module._by_operation(parameters)}


def jittered(pixels: Tensor, *amounts: float) -> Tensor:
    factors, order = amounts[:4], amounts[4:]
    steps = [theirs for _, theirs, _ in JITTER.values()]
    for number in map(int, order):
        pixels = steps[number](pixels, factors[number])
    return pixels


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    return TF.gaussian_blur(pixels, [2 * int(np.ceil(np.float32(3) * np.float32(sigma))) + 1] * 2, [sigma] * 2)


TORCHVISION: dict[str, Callable[..., Tensor]] = {
    "flip_probability": TF.horizontal_flip,
    "jitter_probability": jittered,
    "grayscale_probability": lambda pixels: TF.rgb_to_grayscale(pixels, num_output_channels=3),
    "solarize_probability": lambda pixels, threshold: pixels if threshold > 1 else TF.solarize(pixels, threshold),
    "equalize_probability": TF.equalize,
    "blur_probability": blurred,
}


@pytest.mark.parametrize("name", JITTER)
@pytest.mark.parametrize("channels", [3, 1])
def test_a_jitter_operation_equals_torchvision_with_a_factor_per_image(name: str, channels: int) -> None:
    ours, theirs, factors = JITTER[name]
    images = pictures()[:, :channels].float() / 255
    result = ours(images, torch.tensor(factors))
    for image, factor, changed in zip(images, factors, result, strict=True):
        assert distance(changed, theirs(image, factor)) <= (2e-6 if name == "hue" else 1e-6)


def levels(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().to(torch.uint8)


@pytest.mark.parametrize("channels", [3, 1])
def test_equalize_and_solarize_equal_torchvision_s_to_the_bit_on_uint8(channels: int) -> None:
    flat = torch.full((1, channels, 32, 32), 77, dtype=torch.uint8)
    for images in (pictures()[:, :channels], pictures(18, 18)[:, :channels] // 3, flat):
        assert torch.equal(levels(equalize(images / 255)), TF.equalize(images))
        for threshold in (0, 1, 100, 128, 255):
            thresholds = torch.full((len(images),), threshold / 255)
            assert torch.equal(levels(solarize(images / 255, thresholds)), TF.solarize(images, threshold))


@pytest.mark.parametrize(("height", "width"), [(96, 96), (33, 60), (7, 7)])
def test_blur_equals_torchvision_with_a_kernel_of_three_sigmas_per_image(height: int, width: int) -> None:
    images = pictures(height, width).float() / 255
    sigmas = [0.1, 0.3, 0.9, 1.3, 1.9, 2.0]
    for image, sigma, blurred in zip(images, sigmas, gaussian_blur(images, torch.tensor(sigmas)), strict=True):
        size = 2 * int(np.ceil(np.float32(3) * np.float32(sigma))) + 1
        assert distance(blurred, TF.gaussian_blur(image, [size, size], [sigma, sigma])) <= 1e-6


@pytest.mark.parametrize("size", [32, 96, 224])
def test_blur_is_as_strong_as_pil_s_at_every_image_size(size: int) -> None:
    """PAWS blurs with PIL, which approximates the Gaussian, repeats the border and rounds.

    R.m.s., they differ by less than three quarters of a level and 15 % of what the blur removes. A kernel of a tenth of
    the image's side, the habit of others, would lose two thirds of the blur on 32 pixels.
    """
    images = pictures(size, size)[:5]
    for sigma in (0.7, 1.0, 2.0):
        for image, ours in zip(images, gaussian_blur(images.float(), torch.full((5,), sigma)), strict=True):
            pil = TF.pil_to_tensor(TF.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma)))
            removed = (image.float() - pil).square().mean().sqrt()
            assert (ours - pil).square().mean().sqrt() < 0.75 + 0.15 * removed


def test_an_image_smaller_than_its_kernel_is_blurred_by_a_shorter_one() -> None:
    images = torch.rand(2, 1, 3, 3)
    blurred = gaussian_blur(images, torch.tensor([2.0, 0.1]))
    assert distance(blurred[0], TF.gaussian_blur(images[0], [5, 5], [2.0, 2.0])) <= 1e-6
    assert distance(blurred[1], images[1]) <= 1e-6


@pytest.mark.parametrize(("config", "channels"), [*((config, 3) for config in CONFIGS), ("always", 1)])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 40)])
def test_the_pipeline_equals_torchvision_s_functions_one_by_one(
    config: str, channels: int, height: int, width: int
) -> None:
    """A grey store's images get what torchvision does to one channel, three times."""
    images = pictures(height, width)[:, :channels].repeat(12, 1, 1, 1)
    before = images.clone()
    parameters = draw_parameters(CONFIGS[config], seed=0, epoch=4, samples=np.arange(72), view=1)
    result = augment(images, parameters, mean=MEAN, std=STD)
    for index, (image, changed) in enumerate(zip(images, result, strict=True)):
        expected = TF.normalize(by_torchvision(image, parameters, index).expand(3, -1, -1), MEAN, STD)
        assert distance(changed, expected) * min(STD) <= 5e-6, parameters[index]
    assert torch.equal(images, before), "the input stays as it was"


def test_an_image_is_augmented_alike_in_any_batch_and_memory_layout() -> None:
    images = pictures().repeat(4, 1, 1, 1)
    parameters = draw_parameters(CONFIGS["always"], seed=1, epoch=0, samples=np.arange(24), view=0)
    whole = augment(images, parameters, mean=MEAN, std=STD)
    by_rows = images.contiguous(memory_format=torch.channels_last)
    last = augment(by_rows, parameters, mean=MEAN, std=STD)
    assert distance(last, whole) <= 1e-6
    alone = draw_parameters(CONFIGS["always"], seed=1, epoch=0, samples=np.array([17]), view=0)
    assert distance(augment(images[17:18], alone, mean=MEAN, std=STD), whole[17:18]) <= 1e-6


class Graphs:
    """A backend that counts graphs and runs them as they are traced."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.count += 1
        return graph


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("config", ["imagenet", "digits"])
@pytest.mark.parametrize("channels", [3, 1])
def test_one_graph_augments_whatever_is_drawn_as_the_steps_one_by_one_do(
    config: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Tensor] = []
    monkeypatch.setattr(module, "to_device", lambda values, _: copies.append(values) or values)
    backend, images = Graphs(), pictures(32, 32)[:, :channels].repeat(6, 1, 1, 1)
    compiled = CompiledAugmentation(CONFIGS[config], backend=backend)
    for epoch in range(4):
        parameters = draw_parameters(CONFIGS[config], seed=0, epoch=epoch, samples=np.arange(36), view=1)
        expected = augment(images, parameters, mean=MEAN, std=STD)
        copies.clear()
        groups = compiled([images, images[:5]], [parameters, parameters[:5]], mean=MEAN, std=STD)
        assert len(copies) == 1, "what is drawn for all groups goes to the device in one copy"
        for views, rows in zip(groups, (slice(36), slice(5)), strict=True):
            assert distance(views, expected[rows]) * min(STD) <= 5e-6
    assert backend.count == 2
    with pytest.raises(ValueError, match="5 images need as many parameters, not 36"):
        compiled([images[:5]], [parameters], mean=MEAN, std=STD)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("device", DEVICES)
@inductor.patch(compile_threads=1)  # processes of its own take longer to start
def test_the_compilers_kernels_augment_as_the_steps_one_by_one_do(device: torch.device) -> None:
    config = CONFIGS["imagenet" if device.type == "cuda" else "digits"]  # those kernels take a CPU's compiler a minute
    compiled, images = CompiledAugmentation(config), pictures(24, 24).repeat(6, 1, 1, 1)
    for epoch in range(2):
        parameters = draw_parameters(config, seed=0, epoch=epoch, samples=np.arange(36), view=1)
        expected = augment(images, parameters, mean=MEAN, std=STD)
        (result,) = compiled([images.to(device)], [parameters], mean=MEAN, std=STD)
        assert result.is_contiguous(memory_format=torch.channels_last) == (device.type == "cuda")
        assert distance(result.cpu(), expected) * min(STD) <= 5e-6


def only(operation: Operation, config: type[AugmentConfig] = AugmentConfig) -> AugmentConfig:
    """The operation on every image, and no other."""
    chances = {other.probability: float(other.probability == operation.probability) for other in module.OPERATIONS}
    return config(**chances)  # type: ignore[arg-type]


def by_each_path(config: AugmentConfig, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 3, H, W) in [0, 1]: eager, compiled, and by PIL, image by image."""
    parameters = draw_parameters(config, seed=0, epoch=0, samples=np.arange(len(images)), view=0)
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    (compiled,) = CompiledAugmentation(config, backend=Graphs())([images], [parameters], **plain)
    whole = CropConfig(images.shape[-1], scale=[1.0, 1.0])
    view = pil.pil_view(whole, config, **plain)
    by_pil = torch.stack([view(TF.to_pil_image(image)) for image in images])
    return augment(images, parameters, **plain), compiled, by_pil


def test_every_config_field_and_random_number_belongs_to_one_operation() -> None:
    fields = [name for operation in OPERATIONS for name in operation.fields]
    assert sorted(fields) == sorted(field.name for field in dataclasses.fields(AugmentConfig))
    columns = [column for operation in OPERATIONS for column in operation.columns]
    assert sorted(columns) == list(range(len(columns)))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.probability)
def test_every_operation_has_an_eager_a_compiled_and_a_pil_form(operation: Operation) -> None:
    images = pictures(32, 32)[:4]
    eager, compiled, by_pil = by_each_path(only(operation), images)
    before = images.float() / 255
    for changed in (eager, by_pil):
        assert distance(changed, before) > 0.02
    assert distance(compiled, eager) <= 5e-6


@dataclasses.dataclass
class WithInversion(AugmentConfig):
    invert_probability: float = 0.0


@pytest.mark.usefixtures("fresh_compiler")
def test_a_row_of_the_table_is_all_that_an_operation_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(wanted: Tensor, amounts: Tensor) -> list[list[Change]]:
        return [[Change(lambda images, _: 1 - images, wanted, wanted, "invert_probability")]]

    free = 1 + max(column for operation in OPERATIONS for column in operation.columns)
    invert = Operation(fields=("invert_probability",), columns=(free,), turns=turns, pil=lambda _: ImageOps.invert)
    for user in (module, pil):
        monkeypatch.setattr(user, "OPERATIONS", (*OPERATIONS, invert))
    images = pictures(32, 32)
    for inverted in by_each_path(only(invert, WithInversion), images):
        assert distance(inverted, 1 - images.float() / 255) <= 1e-6


def test_parameters_are_distributed_as_configured() -> None:
    """Shares within 4.5 standard errors; factors uniform on torchvision's ranges; 24 orders by chi-square."""
    n = 40_000
    config = AugmentConfig(0.4, 1.5, 0.8, 0.2, 0.8, 0.2, 0.5, 0.3)
    values = drawn(draw_parameters(config, seed=0, epoch=0, samples=np.arange(n), view=0))
    whether = {name: wanted for name, (wanted, _) in values.items()}
    for name, wanted in whether.items():
        probability = getattr(config, name)
        assert abs(wanted.double().mean() - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / n)
    jitter, (sigma,) = values["jitter_probability"][1], values["blur_probability"][1]
    for sample, (least, greatest) in (
        *zip(jitter[:4], ((0.6, 1.4), (0.0, 2.5), (0.2, 1.8), (-0.2, 0.2)), strict=True),
        (sigma, (0.1, 2.0)),
    ):
        assert least <= sample.min() + 1e-6
        assert sample.max() <= greatest + 1e-6
        standard = (sample.double() - least) / (greatest - least)
        assert abs(standard.mean() - 1 / 2) < 4.5 * np.sqrt(1 / 12 / n)
        assert abs(standard.square().mean() - 1 / 3) < 4.5 * np.sqrt(4 / 45 / n)
    observed = np.unique(jitter[4:].T.numpy(), axis=0, return_counts=True)[1]
    assert len(observed) == 24
    assert ((observed - n / 24) ** 2 / (n / 24)).sum() < 53  # 23 degrees of freedom: 99.96 % lie below
    numbers = np.stack(
        [row.double().numpy() for row in (*whether.values(), *jitter[:5], sigma) if row.unique().numel() > 1]
    )
    assert (np.abs(np.corrcoef(numbers) - np.eye(len(numbers))) < 4.5 / np.sqrt(n)).all()


@pytest.mark.parametrize("channels", [3, 1])
def test_with_operations_switched_off_an_image_is_only_normalised_and_a_grey_one_repeated(channels: int) -> None:
    off, images = AugmentConfig(0, 0, 0, 0, 1, 0, 0, 0), pictures()[:, :channels]
    parameters = draw_parameters(off, seed=0, epoch=0, samples=np.arange(6), view=0)
    result = augment(images, parameters, mean=MEAN, std=STD)
    assert torch.equal(result, normalise(images, mean=MEAN, std=STD))
    assert distance(result, TF.normalize(images.float().expand(-1, 3, -1, -1) / 255, MEAN, STD)) <= 2e-6


def test_input_that_cannot_be_augmented_is_a_clear_error() -> None:
    parameters = draw_parameters(AugmentConfig(), seed=0, epoch=0, samples=np.arange(6), view=0)
    with pytest.raises(ValueError, match="uint8"):
        augment(pictures().float(), parameters, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="3 or 1"):
        normalise(pictures()[:, :2], mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="5 images need as many parameters, not 6"):
        augment(pictures()[:5], parameters, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="std"):
        normalise(pictures(), mean=MEAN, std=(0.2, 0.2, 0.0))
