"""What to write instead of a name that is not known: of keys of earlier versions, and of misspelt names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def renamed(key: str) -> str | None:
    """What to write instead of a dotted key that only earlier versions have, as a sentence; None for any other key."""
    for old, new in RENAMED_KEYS.items():
        if re.fullmatch(old.replace(".", r"\.").replace("*", "[^.]+") + r"(\..*)?", key):
            return f"{key} is no field of the config any more. Instead: {new}."
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'NAME'? `` with the known name that is spelled most like ``name``; empty if none is near."""
    return "".join(f"Did you mean {near!r}? " for near in difflib.get_close_matches(name, list(known), n=1))


_FLAG = "hydra.launcher.{0} for all jobs, resources.STAGE.additional_parameters={{{0}: …}} for those of one stage"
RENAMED_KEYS: dict[str, str] = {  # of 0.1.0; those that came and went between two versions are unknown ones
    "model.prediction_hidden_dim": "nothing: it is a quarter of model.projection_dim",
    "model.stem_stride": "nothing: it is 2",
    "model.blocks": "nothing: each entry of model.channels is one block",
    "views.*.ratio": "nothing: width/height is from 3/4 to 4/3",
    "*.crop.ratio": "nothing: width/height is from 3/4 to 4/3",
    "*.augment.blur_sigma": "nothing: it is from 0.1 to 2 pixels",
    "finetune.learning_rates": "finetune.sweep.learning_rate",
    "baseline.learning_rates": "baseline.sweep.learning_rate",
    "objective.support_warmup_weight": "nothing: it is 1",
    "objective.target_floor": "nothing: it is 1e-4",
    "optimizer.trust_coefficient": "nothing: it is 1e-3",
    "pretrain.keep_checkpoints": "nothing: it is 2",
    "pretrain.collapse.tolerance": "nothing: it is 0.02",
    "pretrain.diagnose_every_steps": "pretrain.log_every_steps",
    **{f"resources.*.{flag}": _FLAG.format(flag) for flag in ("account", "qos", "constraint", "exclude")},
}
