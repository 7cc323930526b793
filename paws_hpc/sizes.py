"""Checks of values in the config. Sizes there are global: what a rank holds must come out even."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(r"key|token|secret|password|passwd|credential", re.IGNORECASE)
"""In the names of what nobody else should read."""

_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:([^},]*)")
_PATHS = ("runs", "data", "labels", "model")  # sections with folders and files


def check_texts(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a text that Slurm, W&B or a shell would take for something else.

    A line break would end a line of an sbatch script and begin another; a tilde would be the name of a folder.
    """
    for field, value in fields.items():
        for text in (field, *(value if isinstance(value, list | tuple) else (value,))):
            if not isinstance(text, str):
                continue
            if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
                raise ValueError(f"{field}={text!r} has a line break or another control character: remove it.")
            if text.startswith("~") and field.partition(".")[0] in _PATHS:
                raise ValueError(f"{field}={text}: ~ is not your home here. Write the folder's whole path, or $HOME.")
            if "${" in text and not field.startswith("hydra."):  # Hydra's own stand for its folders
                raise ValueError(f"{field}={text} has braces that stand for a value here. Write $NAME without them.")


def check_no_secret(fields: Mapping[str, Any]) -> None:
    """Raise ValueError if a field, as it is written, takes a secret from the environment: it would be kept and sent."""
    for field, value in fields.items():
        if (found := _FROM_ENVIRONMENT.search(str(value))) and SECRET.search(found.group(1)):
            raise ValueError(f"{field}={value} would write a secret into the run's files. Leave it in the environment.")


def check_divides(total: int, ranks: int, *, name: str, accumulate_steps: int = 1) -> None:
    """Raise ValueError, naming the nearest sizes that would fit, unless all micro-batches of all ranks are equal."""
    pieces = ranks * accumulate_steps
    if total % pieces:
        below = total - total % pieces
        fits = f"{below} or {below + pieces}" if below else f"{pieces}"
        micro_batches = f" with pretrain.accumulate_steps={accumulate_steps} each" if accumulate_steps > 1 else ""
        raise ValueError(
            f"{name}={total} does not divide by {ranks} ranks{micro_batches}. Sizes are global: {name}={fits} would "
            "fit."
        )


def check_ranges(section: str, config: object, **ranges: str) -> None:
    """Raise ValueError, naming field, value and range, unless every number is in its range; None always is.

    Args:
        section: of the config, for messages.
        config: has the fields.
        ranges: of fields by name, as intervals such as ``[0, 1)`` and ``[1, inf)``.
    """
    for name, interval in ranges.items():
        value = getattr(config, name)
        if value is None:
            continue
        least, greatest = map(float, interval[1:-1].split(","))
        above = value >= least if interval[0] == "[" else value > least
        below = value <= greatest if interval[-1] == "]" else value < greatest
        if not (above and below):
            raise ValueError(f"{section}.{name}={value} must be in {interval}.")
