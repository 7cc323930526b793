"""The baseline: the same recipe written straightforwardly, as a user of PyTorch would and the paper's code does.

PIL and torchvision augment image by image in the workers of two DataLoaders (as many as there are cores, persistent,
pinned on a GPU), one for unlabelled images and one for supports; the network is the recipe's with torch's own batch
normalisation; the loss is written out with the label matrix; LARS asks for the norms of one tensor after the other, in
front of torch's SGD; autocast to bf16 on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import default_loader

from paws_hpc.bench.photographs import jpegs
from paws_hpc.bench.pil import pil_view
from paws_hpc.bench.recipes import Scene, cores
from paws_hpc.bench.timeline import synchronise
from paws_hpc.bench.training import Work
from paws_hpc.config import Config
from paws_hpc.engine.optimizer import split_parameters
from paws_hpc.engine.parallel import move
from paws_hpc.models.encoder import build_encoder
from paws_hpc.objective.config import TARGET_FLOOR, PawsConfig
from paws_hpc.store import ImageStore

Views = list[Tensor]


@dataclass(frozen=True)
class Images:
    """What a user of PyTorch holds: paths of JPEG files, or pixels in memory; and a label of each."""

    load: Callable[[int], Image.Image]
    labels: Sequence[int]


def open_images(scene: Scene) -> Images:
    """The images of a scene, without the store's reader where they are files."""
    if scene.files is not None:
        paths = jpegs(str(scene.files))
        names = sorted({path.parent.name for path in paths})
        return Images(lambda number: default_loader(str(paths[number])), [names.index(p.parent.name) for p in paths])
    store = ImageStore.open(scene.store)
    pixels = store.read_raw(np.arange(len(store)))

    def load(number: int) -> Image.Image:
        image = pixels[number]
        return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).convert("RGB")

    return Images(load, store.labels.tolist())


class MultiCrop(Dataset[tuple[Views, int]]):
    """Several views of one image, and its label."""

    def __init__(self, images: Images, views: Sequence[tuple[int, Callable[[Image.Image], Tensor]]]) -> None:
        self._images, self._views = images, views

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, number: int) -> tuple[Views, int]:
        image = self._images.load(number)
        return [view(image) for count, view in self._views for _ in range(count)], self._images.labels[number]


class _Shuffled(Sampler[list[int]]):
    """A given number of batches of images, without replacement as long as there are enough."""

    def __init__(self, images: int, batch_size: int, batches: int) -> None:
        self._images, self._batch_size, self._batches = images, batch_size, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[int] = []
        for _ in range(self._batches):
            while len(waiting) < self._batch_size:
                waiting += torch.randperm(self._images).tolist()
            batch, waiting = waiting[: self._batch_size], waiting[self._batch_size :]
            yield batch


class _ByClass(Sampler[list[int]]):
    """Batches of equally many labelled images of some classes, drawn anew each time."""

    def __init__(self, by_class: Sequence[Sequence[int]], classes: int, each: int, batches: int) -> None:
        self._by_class, self._classes, self._each, self._batches = by_class, classes, each, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng()
        for _ in range(self._batches):
            chosen = draw.permutation(len(self._by_class))[: self._classes]
            yield [int(number) for label in chosen for number in draw.permutation(self._by_class[label])[: self._each]]


def loaders(config: Config, scene: Scene, batches: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of unlabelled images and of supports; both give per view a tensor (B, 3, s, s), and labels (B,)."""
    images, views, support = open_images(scene), config.views, config.pretrain.support
    statistics = ImageStore.open(scene.store)
    labelled = [np.flatnonzero(np.array(images.labels) == label).tolist() for label in sorted(set(images.labels))]
    assert config.labels.per_class is not None, "the scenes draw their labels"
    of_class = [numbers[: config.labels.per_class] for numbers in labelled]
    large, small = (
        pil_view(crop, views.augment, mean=statistics.mean, std=statistics.std) for crop in (views.large, views.small)
    )
    how: dict[str, Any] = {
        "persistent_workers": True,
        "pin_memory": config.device == "cuda",
        "worker_init_fn": _one_thread,
    }
    # As many workers as cores, shared by the work that each loader has.
    unlabelled_views = config.pretrain.batch_size * (views.large.count + views.small.count)
    support_views = support.classes * support.images_per_class * views.support_views
    for_supports = max(1, round(cores() * support_views / (unlabelled_views + support_views)))
    unlabelled = DataLoader(
        MultiCrop(images, [(views.large.count, large), (views.small.count, small)]),
        batch_sampler=_Shuffled(len(images.labels), config.pretrain.batch_size, batches),
        num_workers=max(1, cores() - for_supports),
        **how,
    )
    supports = DataLoader(
        MultiCrop(images, [(views.support_views, large)]),
        batch_sampler=_ByClass(of_class, support.classes, support.images_per_class, batches),
        num_workers=for_supports,
        **how,
    )
    return unlabelled, supports


def _one_thread(worker: int) -> None:
    del worker
    torch.set_num_threads(1)


def written_out_loss(h: Tensor, z: Tensor, labels: Tensor, *, supports: int, images: int, how: PawsConfig) -> Tensor:
    """The paper's loss (eq. 1 and 4) as its formulas stand, in float32.

    Args:
        h, z: (S + V n, D) targets' and anchors' representations: supports, then views of n images, large ones first.
        labels: (S, K) of the supports.
        supports: S.
        images: n.
        how: temperatures and the like.
    """
    h, z = torch.nn.functional.normalize(h.float()), torch.nn.functional.normalize(z.float())
    predictions = torch.softmax(z[supports:] @ z[:supports].T / how.temperature, dim=1) @ labels
    with torch.no_grad():
        large = h[supports : supports + 2 * images]
        targets = _sharpen(torch.softmax(large @ h[:supports].T / how.temperature, dim=1) @ labels, how.sharpening)
        first, second = targets.chunk(2)
        others = len(predictions) // images - 2
        targets = torch.cat([second, first] + [(first + second) / 2] * others)
        targets[targets < TARGET_FLOOR] = 0
    consistency = -(targets * torch.log(predictions)).sum(dim=1).mean()
    mean = _sharpen(predictions, how.sharpening).mean(dim=0)
    return consistency + (mean * torch.log(mean)).sum()


def _sharpen(predictions: Tensor, temperature: float) -> Tensor:
    powers = predictions ** (1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)


class PlainLARS:
    """LARS tensor by tensor in front of torch's SGD, as much code has it: two norms, read by the host, for each."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        weights, others = split_parameters(model)
        how = config.optimizer
        self._weights, self._adapt = weights, how.name == "lars"
        self._decay, self._trust = how.weight_decay, 1e-3
        self._sgd = torch.optim.SGD(weights + others, lr=how.start_lr, momentum=how.momentum, nesterov=how.nesterov)

    def step(self) -> None:
        """One update."""
        for weight in self._weights:
            assert weight.grad is not None, "every weight takes part"
            norm, gradient_norm = weight.detach().norm(), weight.grad.norm()
            weight.grad.add_(weight.detach(), alpha=self._decay)
            if self._adapt and norm != 0 and gradient_norm != 0:
                weight.grad.mul_(self._trust * norm / (gradient_norm + self._decay * norm + 1e-8))
        self._sgd.step()

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._sgd.zero_grad()


def use_torch_norm(model: nn.Module) -> None:
    """Put torch's batch normalisation in the place of ours, weights and all."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            kind = next((k for k in (nn.BatchNorm1d, nn.BatchNorm2d) if isinstance(layer, k)), None)
            if kind is None:
                continue
            assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
            plain = kind(layer.num_features, eps=layer.eps, momentum=layer.momentum)
            plain.load_state_dict(layer.state_dict())
            setattr(parent, name, plain)


def data_loader_steps(scene: dict[str, Any], steps: int) -> Work:
    """Training end to end; as many steps as fill the loaders come first and do not count."""
    place = Scene(**scene)
    config = place.config()
    torch.set_num_threads(config.resources["pretrain"].threads_per_rank or cores())
    device = torch.device(config.device)
    model = build_encoder(config.model, seed=config.seed)
    use_torch_norm(model)
    model = move(model, device, torch.float32)
    optimizer = PlainLARS(model, config)
    warm = 2 * cores()  # of each loader: two batches per worker are made ahead
    unlabelled, supports = loaders(config, place, warm + steps)

    def work() -> dict[str, Any]:
        began = 0.0
        for number, (images, labelled) in enumerate(zip(unlabelled, supports, strict=True)):
            if number == warm:
                synchronise(device.type == "cuda")
                began = time.perf_counter()
            train_step(model, optimizer, images[0], labelled, config)
        synchronise(device.type == "cuda")
        return {"done": steps * config.pretrain.batch_size, "seconds": time.perf_counter() - began}

    return work


def train_step(
    model: nn.Module, optimizer: PlainLARS, views: Views, labelled: tuple[Views, Tensor], config: Config
) -> Tensor:
    """One step of the baseline; returns its loss."""
    device = next(model.parameters()).device
    rows, classes = labelled
    n, support = len(views[0]), config.pretrain.support
    inputs = [view.to(device, non_blocking=True) for view in (*rows, *views)]
    places = torch.unique(classes, return_inverse=True)[1].repeat(len(rows)).to(device)
    assert isinstance(config.objective, PawsConfig)
    smoothing = config.objective.label_smoothing
    labels = torch.full((len(places), support.classes), smoothing / support.classes, device=device)
    labels[torch.arange(len(places), device=device), places] += 1 - smoothing
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        h, z = model(inputs)
    loss = written_out_loss(h, z, labels, supports=len(places), images=n, how=config.objective)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
