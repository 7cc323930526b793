"""The networks of a finished run, cut where somebody wants their output.

Legend: B images, S the side of the evaluation crop, D outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paws_hpc import __version__
from paws_hpc.config import Config
from paws_hpc.files import file_hash, read_json
from paws_hpc.models.encoder import Classifier, Encoder, build_classifier
from paws_hpc.models.heads import ProjectionHead
from paws_hpc.stages.pretrain import load_pretrained
from paws_hpc.stages.run_data import RunData
from paws_hpc.stages.run_folder import RunFolder
from paws_hpc.stages.selection import load_neighbours, load_winner

HEADS = {"none": "features", "projection": "representation", "classifier": "logits"}
"""What follows the backbone → what comes out: its features; h, which PAWS-NN compares; a score per class."""


@dataclass(frozen=True)
class Network:
    """A network on the CPU in evaluation mode, and what somebody must know who uses it.

    Attributes:
        module: normalised images (B, 3, S, S) float32 to (B, D); its state dict has the names of a run's checkpoints.
        head: one of :data:`HEADS`.
        card: plain values: network, classes, how images are prepared, where the weights come from.
    """

    module: nn.Module
    head: str
    card: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        side: int = self.card["image"]["size"]
        return 3, side, side

    @property
    def head_layers(self) -> dict[str, nn.Module]:
        """What follows the backbone, in order, by names in :attr:`module`; activations have made-up ones."""
        return head_layers(self.module)


def load_network(config: Config, run: RunFolder, data: RunData, head: str) -> Network:
    """A network of a finished run.

    With ``head="classifier"`` it is the fine-tuned one that selection chose, with ``head="projection"`` the one by
    which PAWS-NN is scored, else the pre-trained one.

    Raises:
        FileNotFoundError: the stage that makes it has not finished.
        ValueError: its weights are damaged or of another experiment, or there is no fine-tuned network.
    """
    cpu = torch.device("cpu")
    if head == "classifier":
        classifier, weights = load_winner(config, run, len(data.classes), cpu)
        module: nn.Module = classifier.eval()
    elif head == "projection":
        encoder, tuned = load_neighbours(config, run, data, cpu)
        module, weights = _cut(encoder, head), run.tuned if tuned else _pretrained_weights(run)
    else:
        module = _cut(load_pretrained(config, run, data, cpu)[0], head)
        weights = _pretrained_weights(run)
    return Network(module, head, _card(config, run, data, module, head=head, weights=weights))


def rebuild(encoder: Encoder, head: str, num_classes: int) -> nn.Module:
    """The module that :func:`load_network` gives for an encoder of that configuration, to take its weights."""
    return build_classifier(encoder, num_classes).eval() if head == "classifier" else _cut(encoder, head)


def head_layers(module: nn.Module) -> dict[str, nn.Module]:
    """As of :class:`Network`, of its module.

    Linear layers have biases, and what :class:`~paws_hpc.models.heads.ProjectionHead` and
    :class:`~paws_hpc.models.encoder.Classifier` do in their ``forward`` is these layers one after the other.
    """
    if isinstance(module, Classifier):
        return {"fc1": module.fc1, "bn1": module.bn1, "relu1": nn.ReLU(), "linear": module.linear}
    head = dict(module.named_children()).get("projection")
    if head is None:
        return {}
    assert isinstance(head, ProjectionHead)
    layers = {"fc1": head.fc1, "bn1": head.bn1, "relu1": nn.ReLU(), "fc2": head.fc2, "bn2": head.bn2}
    layers |= {"relu2": nn.ReLU(), "fc3": head.fc3}
    return {f"projection.{name}": layer for name, layer in layers.items()}


def _pretrained_weights(run: RunFolder) -> Path:
    """The checkpoint that :func:`~paws_hpc.stages.pretrain.load_pretrained` reads."""
    return run.checkpoints / f"step-{read_json(run.pretrain / 'DONE')['steps']:08d}.pt"


def _cut(encoder: Encoder, head: str) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict(backbone=encoder.backbone)
    if head == "projection":
        parts["projection"] = encoder.projection
    return nn.Sequential(parts).eval()


def _card(
    config: Config, run: RunFolder, data: RunData, module: nn.Module, *, head: str, weights: Path
) -> dict[str, Any]:
    chain, crop = run.describe(), config.views.evaluation
    result = read_json(run.result) if run.result.exists() else {}
    return {
        "model": asdict(config.model) | {"init": None},  # a path of this machine, and these weights replace it
        "head": head,
        "output": HEADS[head],
        "output_dim": _output_dim(module),
        "classes": list(data.classes),
        "image": {
            "resize": crop.resize,
            "size": crop.size,
            "interpolation": "bilinear, antialiased",
            "layout": "NCHW float32, RGB",
            "range": [0.0, 1.0],
            "mean": list(data.train.mean),
            "std": list(data.train.std),
        },
        "provenance": {
            "run": config.name,
            "commit": chain.get("commit"),
            "created": chain.get("created"),
            "seed": config.seed,
            "init": None if config.model.init is None else Path(config.model.init).name,
            "weights": weights.relative_to(run.path).as_posix(),
            "xxh3_128": file_hash(weights),
            "digests": data.digests,
            "test_top1": {
                name: scores["top1"] for name, scores in result.get("test", {}).items() if isinstance(scores, dict)
            },
            "paws_hpc": __version__,
        },
    }


def _output_dim(module: nn.Module) -> int:
    dims = [layer.out_features for layer in head_layers(module).values() if isinstance(layer, nn.Linear)]
    dim = dims[-1] if dims else module.get_submodule("backbone").feature_dim
    assert isinstance(dim, int)
    return dim


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state dict as contiguous copies on the CPU, floating-point values in float32."""
    return {
        name: (value.float() if value.is_floating_point() else value).detach().to("cpu", copy=True).contiguous()
        for name, value in module.state_dict().items()
    }
