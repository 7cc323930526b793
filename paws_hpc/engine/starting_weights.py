"""Backbone weights from a file: torchvision's, timm's, or a checkpoint of our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from paws_hpc.engine.checkpoint import load_foreign
from paws_hpc.models.encoder import Encoder
from paws_hpc.models.names import from_torchvision

_CONTAINERS = ("average", "encoder", "classifier", "state_dict", "model")  # averaged weights before the last ones
_LISTED = 20


def load_backbone(encoder: Encoder, path: Path) -> None:
    """Put a file's backbone weights into ``encoder``, whose heads stay as they are.

    Names and shapes must be those of the backbone. A classification layer or heads in the file are left out, and
    counters of batches (``num_batches_tracked``), which nothing reads, may be absent.

    Args:
        encoder: on any device; values are cast to its dtype.
        path: of a ``.safetensors`` file, or of one that ``torch.save`` wrote, read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no weights or could execute code; or it does not fit, and then all that
            is missing, unexpected or of another shape is listed.
    """
    given = from_torchvision(read_weights(path))
    wanted = encoder.backbone.state_dict()
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    faults = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise ValueError(
            f"model.init={path} does not fit the backbone of this run ({type(encoder.backbone).__name__}): "
            f"{'; '.join(faults)}. Choose the model.name and model.width that the file was made with, or another file."
        )
    encoder.backbone.load_state_dict({**wanted, **given})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, by itself or inside a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no weights or could execute code.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"model.init={path}: there is no such file. It must stay where it is until the run is done; correct the "
            "path, or set model.init=null to begin with random weights."
        )
    content = _content(path)
    inner = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)), content)
    assert isinstance(inner, Mapping)
    weights = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not weights or len(weights) < len(inner):
        raise ValueError(
            f"model.init={path} has no weights: a state dict, by itself or as one of {', '.join(_CONTAINERS)}, is "
            f"needed, but there is {_listed([str(name) for name in content])}."
        )
    return weights


def _content(path: Path) -> Mapping[str, object]:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_foreign(path, torch.device("cpu"))
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"model.init={path} is damaged or no file of weights: {error}. Fetch it again.") from error
    return content if isinstance(content, Mapping) else {f"a {type(content).__name__}": type(content)}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
