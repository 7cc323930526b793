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
from paws_hpc.files import file_hash, read_record
from paws_hpc.models.encoder import Classifier, Encoder, build_classifier
from paws_hpc.models.heads import ProjectionHead
from paws_hpc.stages.networks import load_neighbours, load_pretrained, load_winner
from paws_hpc.stages.run_data import RunData
from paws_hpc.stages.run_folder import RunFolder

HEADS = {"none": "features", "projection": "representation", "classifier": "logits"}
"""What follows the backbone → what comes out: its features; h, which PAWS-NN compares; a score per class."""


@dataclass(frozen=True)
class Network:
    """A network on the CPU in evaluation mode, and what somebody must know who uses it.

    Attributes:
        module: normalised images (B, 3, S, S) float32 to (B, D); its state dict has the names of a run's checkpoints.
        card: plain values: network, head, classes, how images are prepared, where the weights come from.
    """

    module: nn.Module
    card: dict[str, Any]


def load_network(run: RunFolder, data: RunData, head: str) -> Network:
    """A network of a finished run.

    With ``head="classifier"`` it is the fine-tuned one that selection chose, with ``head="projection"`` the one by
    which PAWS-NN is scored, else the pre-trained one.

    Raises:
        FileNotFoundError: the stage that makes it has not finished.
        ValueError: its weights are damaged or of another experiment, or there is no fine-tuned network.
    """
    cpu = torch.device("cpu")
    if head == "classifier":
        classifier, weights = load_winner(run, data, cpu)
        module: nn.Module = classifier.eval()
    else:
        encoder, weights = (load_neighbours if head == "projection" else load_pretrained)(run, data, cpu)
        module = _cut(encoder, head)
    return Network(module, _card(run, data, module, head=head, weights=weights))


def rebuild(encoder: Encoder, head: str, num_classes: int) -> nn.Module:
    """The module that :func:`load_network` gives for an encoder of that configuration, to take its weights."""
    return build_classifier(encoder, num_classes).eval() if head == "classifier" else _cut(encoder, head)


def head_layers(module: nn.Module) -> dict[str, nn.Module]:
    """What follows the backbone in the module of a :class:`Network`, in order; activations have made-up names.

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


def _cut(encoder: Encoder, head: str) -> nn.Module:
    children: OrderedDict[str, nn.Module] = OrderedDict(backbone=encoder.backbone)
    if head == "projection":
        children["projection"] = encoder.projection
    return nn.Sequential(children).eval()


def _card(run: RunFolder, data: RunData, module: nn.Module, *, head: str, weights: Path) -> dict[str, Any]:
    config, chain, crop = data.config, run.describe(), data.config.views.evaluation
    scores = read_record(run.result)["test"] if run.result.exists() else {}
    dims = [layer.out_features for layer in head_layers(module).values() if isinstance(layer, nn.Linear)]
    return {
        "model": asdict(config.model) | {"init": None},  # a path of this machine, and these weights replace it
        "head": head,
        "output": HEADS[head],
        "output_dim": dims[-1] if dims else module.get_submodule("backbone").feature_dim,
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
            "test_top1": {method: value["top1"] for method, value in scores.items() if method != "count"},
            "paws_hpc": __version__,
        },
    }


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its state dict as contiguous copies on the CPU, floating-point values in float32."""
    return {
        name: (value.float() if value.is_floating_point() else value).detach().to("cpu", copy=True).contiguous()
        for name, value in module.state_dict().items()
    }
