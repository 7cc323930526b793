"""Names of a backbone's weights here and elsewhere.

Our backbones use torchvision's names, and so do timm's plain ResNets (resnet18, resnet50); our vision transformer uses
timm's. Around them stand ``backbone.`` and the heads here, ``fc`` or ``head`` there, and the prefix of what wrapped the
module when it was saved (``module.`` of DistributedDataParallel, ``_orig_mod.`` of torch.compile).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_OWN_PREFIXES = ("backbone.", "trunk.")  # the second in files of earlier versions


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors of an encoder's or classifier's state dict, under torchvision's or timm's names.

    For a ResNet of width 1 they load with ``strict=True`` into the other library's network whose ``fc`` is an identity.

    Raises:
        ValueError: ``state`` has no backbone.
    """
    backbone = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(_OWN_PREFIXES)}
    if not backbone:
        names = list(state)
        listed = ", ".join(names[:4]) + (f", … {len(names)} in all" if len(names) > 4 else "") if names else "none"
        raise ValueError(
            f"no name of these weights begins with {_OWN_PREFIXES[0]!r} (there are {listed}): they are not those of an "
            "encoder or classifier of this package."
        )
    return backbone


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a whole network, of torchvision, timm or this package, under the names of a backbone itself.

    Classification layers (``fc``, ``head``) and, of our own files, both heads are left out. Nothing else is, so that a
    strict load says what does not fit.
    """
    bare = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}
    if any(name.startswith(_OWN_PREFIXES) for name in bare):
        return to_torchvision(bare)
    return {name: value for name, value in bare.items() if not name.startswith(("fc.", "head."))}
