"""Networks as files of other libraries; a new format is a function here and an entry in :data:`FORMATS`."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paws_hpc.deploy.networks import HEADS, Network, head_layers, rebuild, weights_of
from paws_hpc.engine.checkpoint import save_tensors
from paws_hpc.files import atomic_write, file_hash, write_json
from paws_hpc.models.config import ModelConfig
from paws_hpc.models.encoder import build_encoder
from paws_hpc.models.names import to_torchvision

_PROTOBUF_BYTES = 2**31 - 2**20  # what one protobuf message holds, less what is not weights
_TEXTS = ("format", "head", "output")  # of a card; its other values become JSON where metadata are texts


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        help: what it is, for people.
        suffix: that the file has unless it is named.
        packages: that are needed beside the project's own.
        of_library: only networks that the library itself has; a ``<path>.json`` beside the file holds the card.
    """

    help: str
    suffix: str
    write: Callable[[Network, Path], None]
    packages: tuple[str, ...] = ()
    of_library: bool = False


def write_export(network: Network, format: str, path: Path) -> list[Path]:
    """Write a network, each file atomically; files that are there are replaced.

    Returns:
        the files.

    Raises:
        ValueError: the library of that format has no such network.
        OSError: the file cannot be written.
    """
    kind, model = FORMATS[format], network.card["model"]
    if kind.of_library and (model["name"] not in ("resnet50", "resnet18") or model["width"] != 1):
        fitting = " or ".join(name for name, other in FORMATS.items() if not other.of_library)
        raise ValueError(
            f"{format} has no {model['name']} of width {model['width']}, as this run trained: it has resnet50 and "
            f"resnet18 of width 1. Use --format {fitting}."
        )
    kind.write(network, path)
    return [path, _card_path(path)] if kind.of_library else [path]


def check_packages(format: str) -> None:
    """Raise ValueError if a package is missing that the format needs."""
    if missing := [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"--format {format} needs {' and '.join(missing)}, which this Python does not have: "
            f"pip install {' '.join(missing)}"
        )


def load_exported(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Read a safetensors file back.

    Returns:
        the module, normalised images (B, 3, S, S) float32 to (B, D), in evaluation mode; and its card.

    Raises:
        ValueError: the file is not an export of this project.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - of the extra "export"

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            texts = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}.") from error
    if not {"model", "head", "classes"} <= texts.keys() or texts["head"] not in HEADS:
        raise ValueError(f"{path} is not an export of paws_hpc: its metadata has no model, head and classes.")
    card = {name: value if name in _TEXTS else json.loads(value) for name, value in texts.items()}
    if other := card["model"].keys() - {field.name for field in fields(ModelConfig)}:
        raise ValueError(f"{path} has model.{min(other)}: another version of paws_hpc exported it. Export it again.")
    model = ModelConfig(**card["model"])
    module = rebuild(build_encoder(model, seed=0), card["head"], len(card["classes"]))
    module.load_state_dict(weights)
    return module, card


def _card_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write_torch(network: Network, path: Path, format: str, build: list[str], facts: dict[str, Any]) -> None:
    """Write weights under the names of torchvision and timm: ``fc.0``, ``fc.1``, … for what follows the backbone."""
    weights, layers = to_torchvision(weights_of(network.module)), []
    for number, layer in enumerate(head_layers(network.module).values()):
        weights |= {f"fc.{number}.{name}": value for name, value in weights_of(layer).items()}
        match layer:
            case nn.Linear():
                layers.append(f"torch.nn.Linear({layer.in_features}, {layer.out_features})")
            case nn.BatchNorm1d():
                layers.append(f"torch.nn.BatchNorm1d({layer.num_features})")
            case _:
                layers.append("torch.nn.ReLU()")
    save_tensors(path, weights)
    usage = [
        *build,
        f"model.fc = torch.nn.Sequential({', '.join(layers)})" if layers else "model.fc = torch.nn.Identity()",
        f"model.load_state_dict(torch.load({path.name!r}, weights_only=True), strict=True)",
        "model.eval()",
    ]
    card = {"format": format, **network.card, **facts, "usage": usage, "file_xxh3_128": file_hash(path)}
    write_json(_card_path(path), card)


def _write_torchvision(network: Network, path: Path) -> None:
    model = f"model = torchvision.models.{network.card['model']['name']}()"
    _write_torch(network, path, "torchvision", ["import torch, torchvision", model], {})


def _write_timm(network: Network, path: Path) -> None:
    name, image = network.card["model"]["name"], network.card["image"]
    logits = network.card["head"] == "classifier"
    facts = {
        "architecture": name,
        "num_classes": network.card["output_dim"] if logits else 0,
        "pretrained_cfg": {
            "input_size": [3, image["size"], image["size"]],
            "interpolation": "bilinear",
            "crop_mode": "center",
            "crop_pct": image["size"] / image["resize"],
            "mean": image["mean"],
            "std": image["std"],
            "label_names": network.card["classes"] if logits else None,
        },
    }
    build = ["import torch, timm", f"model = timm.create_model({name!r}, num_classes=0)"]
    _write_torch(network, path, "timm", build, facts)


def _write_safetensors(network: Network, path: Path) -> None:
    from safetensors.torch import save  # noqa: PLC0415 - of the extra "export"

    content = save(weights_of(network.module), _metadata(network, "safetensors"))
    with atomic_write(path) as file:
        file.write(content)


def _write_onnx(network: Network, path: Path) -> None:
    """Write a network for any number of images."""
    if (size := sum(value.nbytes for value in network.module.state_dict().values())) > _PROTOBUF_BYTES:
        raise ValueError(
            f"an ONNX file holds 2 GB, but these weights are {size / 1e9:.2f} GB: use --format safetensors, or "
            "--head none if that is what is wanted."
        )
    side = network.card["image"]["size"]
    with warnings.catch_warnings():  # about torch's own use of itself
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.onnx.export(
            network.module,
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=[network.card["output"]],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None, "with dynamo it is"
    model = program.model_proto
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param, "a backbone that takes the number of images for a constant, by len() say, needs mending"
    for node in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del node.metadata_props[:]  # of every node the lines of source that made it, with the paths of this machine
    for name, value in _metadata(network, "onnx").items():
        model.metadata_props.add(key=name, value=value)
    with atomic_write(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def _metadata(network: Network, format: str) -> dict[str, str]:
    """The card for libraries whose metadata are texts."""
    card = {"format": format, **network.card}
    return {name: value if name in _TEXTS else json.dumps(value) for name, value in card.items()}


FORMATS = {
    "torchvision": Format("torchvision's ResNet", ".torchvision.pt", _write_torchvision, of_library=True),
    "timm": Format("timm's ResNet", ".timm.pt", _write_timm, of_library=True),
    "safetensors": Format("any network, under its own names", ".safetensors", _write_safetensors, ("safetensors",)),
    "onnx": Format("any network, for runtimes without torch", ".onnx", _write_onnx, ("onnx", "onnxscript")),
}
