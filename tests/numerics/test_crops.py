"""Boxes follow torchvision's RandomResizedCrop; resized crops equal PIL's to one of 255 levels."""

from __future__ import annotations

import re
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop, transforms, v2
from torchvision.transforms.v2 import functional as TF

from paws_hpc.data.config import AugmentConfig, CenterCropConfig, CropConfig, ViewsConfig
from paws_hpc.data.crops import (
    RATIO,
    UNIFORMS_PER_BOX,
    center_crop,
    draw_boxes,
    equal_size_resized_crops,
    resized_crops,
    sample_boxes,
)
from paws_hpc.engine.config import ClassifierConfig

RECIPES = {
    "large": CropConfig(scale=[0.14, 1.0]),
    "small": CropConfig(scale=[0.05, 0.14]),
    "cifar": CropConfig(scale=[0.75, 1.0]),
}


@pytest.fixture(scope="module")
def photographs() -> list[Tensor]:
    """Two photographs, (3, 427, 640) uint8, stored as (H, W, C) like a decoder's output."""
    return [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]


def pil_crop(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """(C, size, size) by PIL: crop, then an antialiased bilinear resize."""
    top, left, height, width = box
    array = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    picture = picture.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.tensor(np.array(picture)).reshape(size, size, -1).permute(2, 0, 1)


def interleaved(image: Tensor) -> Tensor:
    """(…, C, H, W) laid out as (…, H, W, C) in memory."""
    return image.movedim(-3, -1).contiguous().movedim(-1, -3)


def levels_apart(first: Tensor, second: Tensor) -> int:
    return int((first.int() - second.int()).abs().max())


class FedTorch:
    """Stands for torch inside torchvision's get_params and hands it the given numbers, in float64."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.shape, self.place = iter(numbers[:-2]), iter(numbers[-2:])

    def tensor(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def empty(self, _size: int) -> SimpleNamespace:
        number = float(next(self.shape))
        return SimpleNamespace(
            uniform_=lambda least, greatest: torch.as_tensor(least + (greatest - least) * number, dtype=torch.float64)
        )

    def randint(self, least: int, bound: int, size: tuple[int]) -> Tensor:
        return torch.tensor(int(least + float(next(self.place)) * (bound - least)))

    log, exp = staticmethod(torch.log), staticmethod(torch.exp)


@pytest.mark.parametrize("recipe", RECIPES)
def test_boxes_equal_torchvision_fed_the_same_numbers(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes from 1 x 1 to 700 x 700 and thin strips, so that failed attempts and the central fallback occur too."""
    random = np.random.default_rng(0)
    heights, widths = random.integers(1, 700, size=(2, 400))
    heights[:50], widths[:50] = random.integers(1, 12, size=(2, 50))
    heights[50:100] = 1 + heights[50:100] // 100
    widths[100:150] = 1 + widths[100:150] // 100
    numbers = random.random((400, UNIFORMS_PER_BOX))
    crop = RECIPES[recipe]
    boxes = sample_boxes(heights, widths, crop, numbers)
    for box, height, width, row in zip(boxes.tolist(), heights.tolist(), widths.tolist(), numbers, strict=True):
        monkeypatch.setattr(transforms, "torch", FedTorch(row))
        image = Image.new("L", (width, height))
        assert tuple(box) == RandomResizedCrop.get_params(image, crop.scale, RATIO), (height, width)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.stack((heights, widths), axis=1)).all()


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 427, 640), 224),  # the whole image, shrunk
        ((31, 57, 211, 333), 224),  # odd sizes, shrunk along one side and nearly kept along the other
        ((200, 300, 40, 53), 96),  # enlarged
        ((426, 639, 1, 1), 32),  # a single pixel
        ((10, 500, 417, 3), 96),  # enlarged along one side, shrunk along the other
        ((100, 100, 96, 96), 96),  # kept
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_a_resized_crop_equals_pil_to_one_level(
    photographs: list[Tensor], box: tuple[int, int, int, int], size: int, channels: int
) -> None:
    noise = torch.randint(0, 256, (427, 640, 3), dtype=torch.uint8).permute(2, 0, 1)
    for image in (*photographs, noise):
        piece = image[:channels]
        expected = pil_crop(piece, box, size)
        out = interleaved(torch.empty(1, 1, channels, size, size, dtype=torch.uint8))
        alone = resized_crops([interleaved(piece)], np.array([[box]]), out)
        assert levels_apart(alone[0, 0], expected) <= 1
        batched = equal_size_resized_crops(piece[None], np.array([box]), size)
        assert levels_apart(batched[0], expected) <= 1


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (8, 8, 32), (32, 32, 18), (45, 33, 16)])
@pytest.mark.parametrize("channels", [3, 1])
def test_batched_crops_of_small_images_equal_pil_to_one_level(
    height: int, width: int, size: int, channels: int
) -> None:
    n = 200
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=random)
    sides = np.full(n, height), np.full(n, width)
    crop = CropConfig(scale=[0.05, 1.0])
    boxes = draw_boxes(crop, seed=0, epoch=0, samples=np.arange(n), view=0, heights=sides[0], widths=sides[1])
    result = equal_size_resized_crops(images, boxes, size)
    assert result.shape == (n, channels, size, size)
    for image, box, row in zip(images, boxes.tolist(), result, strict=True):
        assert levels_apart(row, pil_crop(image, box, size)) <= 1


def test_crops_equal_interpolate_bit_for_bit_however_often(photographs: list[Tensor]) -> None:
    """More than once, because torch optimises a loop after it has run."""
    images = [photographs[0], interleaved(photographs[1][:, 7:400, 100:500]), photographs[1]]
    boxes = np.array([(3, 5, 200, 301), (0, 0, 300, 211), (120, 77, 33, 40)])
    for shift in range(5):
        batch = torch.zeros((3, 5, 96, 96, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)  # as the streams have it
        of_each = np.stack([np.roll(boxes, number, axis=0) + np.array((shift, 0, 0, -shift)) for number in range(3)])
        resized_crops(images, of_each, batch[:, 1:4])
        for image, of_one, crops in zip(images, of_each.tolist(), batch[:, 1:4].unbind(1), strict=True):
            for (top, left, height, width), row in zip(of_one, crops, strict=True):
                piece = image[None, :, top : top + height, left : left + width]
                assert torch.equal(row, F.interpolate(piece, size=(96, 96), mode="bilinear", antialias=True)[0])
        assert (batch[:, [0, 4]] == 0).all(), "nothing beside the rows is written"


@pytest.mark.parametrize(
    ("rows", "cropped"), [(30, (8, 20)), (30, (30, 20)), (30, (8, 45)), (30, (30, 45)), (30, (1, 1)), (1, (1, 1))]
)
def test_whole_images_fill_crops_and_nothing_beside(
    rows: int, cropped: tuple[int, int], photographs: list[Tensor]
) -> None:
    """Resized in one direction, in both and in none: torch's kernel takes another path for each."""
    image = interleaved(photographs[0][:, 100 : 100 + rows, 200:245])
    memory = torch.full((3, *cropped, 3), 7, dtype=torch.uint8)
    crop = memory[1].permute(2, 0, 1)
    resized_crops([image], np.array([[(0, 0, rows, 45)]]), crop[None, None])
    assert torch.equal(crop, F.interpolate(image[None], size=cropped, mode="bilinear", antialias=True)[0])
    assert (memory[[0, 2]] == 7).all()


def test_cropping_goes_on_while_another_thread_keeps_the_interpreter() -> None:
    """Threads would gain nothing if each crop had to wait for its turn."""
    image, boxes = torch.full((400, 500, 3), 7, dtype=torch.uint8), np.tile((0, 0, 400, 500), (1, 500, 1))
    image, out = image.permute(2, 0, 1), interleaved(torch.zeros((500, 1, 3, 96, 96), dtype=torch.uint8))
    pixels, interval = out.numpy(), sys.getswitchinterval()
    cropping = threading.Thread(target=resized_crops, args=([image], boxes, out))
    sys.setswitchinterval(1000)  # seconds: who has the interpreter now keeps it until it waits for something
    try:
        cropping.start()
        while not pixels[0, 0, -1, -1, -1]:
            time.sleep(1e-4)
        deadline = time.perf_counter() + 20
        while not pixels[-1, 0, -1, -1, -1] and time.perf_counter() < deadline:
            pass
        finished = bool(pixels[-1, 0, -1, -1, -1])
    finally:
        sys.setswitchinterval(interval)
    cropping.join()
    assert finished


@pytest.mark.parametrize(("height", "width"), [(427, 640), (427, 300), (224, 224), (61, 333), (33, 32)])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (224, 224), (255, 96), (32, 32)])
def test_center_crop_equals_torchvision_and_pil(
    photographs: list[Tensor], height: int, width: int, resize: int, size: int
) -> None:
    image = photographs[1][:, :height, :width]
    result = center_crop(image.permute(1, 2, 0).numpy(), CenterCropConfig(resize, size))
    expected = TF.center_crop(TF.resize(image, [resize], antialias=True), [size])
    assert torch.equal(result, expected)
    picture = v2.Compose([v2.Resize(resize), v2.CenterCrop(size)])(TF.to_pil_image(image))
    assert levels_apart(result, TF.pil_to_tensor(picture)) <= 1


def test_a_box_outside_its_image_is_an_error() -> None:
    images = [interleaved(torch.zeros(3, *sides, dtype=torch.uint8)) for sides in ((30, 30), (10, 20))]
    for box in ((0, 0, 11, 5), (0, 16, 5, 5), (-1, 0, 5, 5), (0, 0, 0, 5)):
        with pytest.raises(ValueError, match=re.escape(f"box {box} must lie in its image, which is 10 x 20")):
            resized_crops(images, np.array([[(0, 0, 30, 30)], [box]]), torch.empty(1, 2, 8, 8, 3).byte().movedim(4, 2))
        with pytest.raises(ValueError, match="box"):
            equal_size_resized_crops(images[1][None], np.array([box]), 8)


def test_pixels_that_are_not_uint8_and_lists_that_do_not_match_are_errors() -> None:
    image, box = interleaved(torch.zeros(3, 10, 20, dtype=torch.uint8)), np.array([[0, 0, 5, 5]])
    out = interleaved(torch.empty(1, 1, 3, 8, 8, dtype=torch.uint8))
    gaps = torch.empty(1, 1, 8, 16, 3, dtype=torch.uint8)[:, :, :, ::2].movedim(4, 2)
    for images, crops in (
        ([image.float()], out), ([image], out.float()), ([image], out[:, :, :1]), ([image], gaps),
        ([image.contiguous()], out), ([image], out.contiguous()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"need uint8 pixels of \d channels, laid out as \(H, W, C\)"):
            resized_crops(images, box[None], crops)
    with pytest.raises(ValueError, match="uint8"):
        equal_size_resized_crops(image.float()[None], box, 8)
    with pytest.raises(ValueError, match=r"\(1, 2, 4\) boxes of 1 images"):
        resized_crops([image], np.array([[box[0], box[0]]]), out)
    with pytest.raises(ValueError, match=r"\(1, 1, 4\) boxes of 2 images"):
        resized_crops([image, image], box[None], out)
    with pytest.raises(ValueError, match="uniform"):
        sample_boxes(np.array([10]), np.array([20]), RECIPES["large"], np.zeros((1, 5)))


def test_the_default_views_are_the_paper_s_imagenet_recipe() -> None:
    views = ViewsConfig()
    assert (views.large.size, views.large.count, views.large.scale) == (224, 2, [0.14, 1.0])
    assert (views.small.size, views.small.count, views.small.scale) == (96, 6, [0.05, 0.14])
    assert RATIO == (3 / 4, 4 / 3)
    assert views.augment == AugmentConfig(0.8, 0.8, 0.8, 0.2, 0.8, 0.2, 0.5, 0.5)
    assert views.evaluation == CenterCropConfig(resize=256, size=224)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: ViewsConfig(small=CropConfig(size=0)), "views.small.size=0"),
        (lambda: ViewsConfig(small=CropConfig(count=-1)), "views.small.count=-1"),
        (lambda: ViewsConfig(large=CropConfig(count=2, scale=[0.5, 0.1])), "views.large.scale"),
        (lambda: ClassifierConfig(crop=CropConfig(scale=[0.5, 1.1])).check("finetune"), "finetune.crop.scale"),
        (lambda: ClassifierConfig(augment=AugmentConfig(hue=0.6)).check("baseline"), "baseline.augment.hue=0.6"),
        (lambda: CenterCropConfig(resize=200, size=224), "views.evaluation.size=224"),
        (lambda: ViewsConfig(augment=AugmentConfig(contrast=-0.1)), "views.augment.contrast"),
        (lambda: ViewsConfig(augment=AugmentConfig(hue=0.6)), "views.augment.hue"),
        (lambda: ViewsConfig(augment=AugmentConfig(flip_probability=1.5)), "views.augment.flip_probability"),
        (lambda: ViewsConfig(large=CropConfig(count=3)), "views.large.count=3"),
        (lambda: ViewsConfig(small=CropConfig(count=2000)), "views.small.count=2000"),
        (lambda: ViewsConfig(support_views=0), "views.support_views=0"),
    ],
)
def test_an_impossible_view_is_an_error_that_names_the_field(build: object, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        build()  # type: ignore[operator]
