"""Names of a ResNet's weights here and elsewhere.

Our trunks bear torchvision's names, and so do timm's plain ResNets (resnet18, resnet50). What differs stands around
them: ``trunk.`` and the heads here, ``fc`` there, and what wrapped the module when it was saved (``module.`` from
DistributedDataParallel, ``_orig_mod.`` from torch.compile). A vision transformer's names are timm's in the same sense,
with ``head`` in the place of ``fc``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_OWN_PREFIX = "trunk."
_WRAPPERS = ("module.", "_orig_mod.")
_CLASSIFIERS = ("fc.", "head.")


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours to torchvision's: the trunk of an encoder or classifier, without ``trunk.`` and without any head.

    Args:
        state: ``state_dict()`` of an :class:`~paws_hpc.models.Encoder` or :class:`~paws_hpc.models.Classifier`.

    Returns:
        the same tensors; for a ResNet of width 1 they load with ``strict=True`` into torchvision's and timm's network
        whose ``fc`` is an identity.

    Raises:
        ValueError: ``state`` has no trunk.
    """
    trunk = {name.removeprefix(_OWN_PREFIX): value for name, value in state.items() if name.startswith(_OWN_PREFIX)}
    if not trunk:
        raise ValueError(
            f"no name of these weights begins with {_OWN_PREFIX!r} (there are {_some(state)}): they are not "
            "those of an encoder or classifier of this package."
        )
    return trunk


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's or timm's, or again ours, to the names of a trunk itself (without ``trunk.``).

    Classification layers (``fc``, ``head``) and, of our own files, both heads are left out; nothing else is, so that a
    strict load says what does not fit.

    Args:
        state: of a whole network, as its library saves it.

    Returns:
        the same tensors.
    """
    bare = {_unwrapped(name): value for name, value in state.items()}
    if any(name.startswith(_OWN_PREFIX) for name in bare):
        return to_torchvision(bare)
    return {name: value for name, value in bare.items() if not name.startswith(_CLASSIFIERS)}


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _some(state: Mapping[str, Tensor]) -> str:
    names = list(state)
    return ", ".join(names[:4]) + (f", … {len(names)} in all" if len(names) > 4 else "") if names else "none"
