"""The frozen config: YAML in the run directory ↔ the plain dataclasses that stages see."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from paws_hpc.command import program
from paws_hpc.config import Config, flatten, identity
from paws_hpc.files import read_yaml, write_yaml_text
from paws_hpc.objective.config import objective_config
from paws_hpc.renamed import did_you_mean, renamed
from paws_hpc.stage_table import SWEEPS


class ConfigError(ValueError):
    """A config that no run can use; the message names field, value and remedy."""


def to_config(composed: Any) -> Config:
    """Turn a composed OmegaConf config, or a plain mapping, into dataclasses, which check their own values.

    Raises:
        ConfigError: an unknown field (the nearest known one is named), a wrong type, or a value out of range.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.create(composed))
    for key in flatten(plain):
        if (refusal := renamed(key)) is not None:
            raise ConfigError(refusal)
    try:
        composed = OmegaConf.create(composed)
        name = OmegaConf.select(composed, "objective.name", default=Config().objective.name)
        merged: Any = OmegaConf.merge(OmegaConf.structured(Config(objective=objective_config(name))), composed)
        for sweep in SWEEPS:
            given = (composed.get(sweep) or {}).get("sweep")
            if given is not None:
                merged[sweep].sweep = given  # as a whole: what it leaves out is not swept
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config), "the schema is Config"
    return config


def explain(error: BaseException) -> str:
    """An error of Hydra or OmegaConf as one sentence, with the nearest known field for an unknown one."""
    chain, text = error, str(error)
    while chain.__cause__ is not None:
        chain = chain.__cause__
        text = f"{text}\n{chain}"
    if isinstance(chain, ValueError) and not isinstance(chain, OmegaConfBaseException):
        return str(chain)  # raised by a dataclass about its own field; it says all there is to say
    field = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"[Kk]ey '([^']+)' (?:is not in struct|not in)", text)
    if unknown:
        name = field.group(1) if field else unknown.group(1)
        return renamed(name) or f"{name} is not a field of the config. {hint(name)}"
    if absent := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        known = [name for name in re.findall(r"^\t(\S+)$", text, re.MULTILINE) if not name.endswith("_schema")]
        meant = did_you_mean(absent.group(2), known)
        listed = f"Known: {', '.join(known)}." if known else "Leave it out, or name a file of conf/."
        return f"{absent.group(1)}={absent.group(2)} does not exist. {meant}{listed}"
    reason = str(chain).splitlines()[0].rstrip(".")
    if override := getattr(error, "override", None):
        return (
            f"{override!r} is no FIELD=VALUE, such as pretrain.epochs=3. Mind the shell: quote brackets and spaces, "
            "and other letters than English ones twice: \"name='größe'\"."
        )
    wanted = next((words for sign, words in _WANTED.items() if re.search(sign, reason)), None)
    if field and wanted:
        value = re.search(r"value: (.*)$", reason)
        given = value.group(1) if value else json.dumps(getattr(chain, "value", None), default=str)
        return f"{field.group(1)}={given} must be {wanted.format(field.group(1))}."
    return f"{field.group(1)}: {reason}." if field else f"{reason}."


_WANTED = {  # what OmegaConf says → what a field is
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "not a valid bool|converted to Bool": "true or false",
    "not Optional|Incompatible value 'None'": "given: it has no null",
    "is not a ListConfig": "a list, such as {0}=[…]",
    "Cannot assign|Cannot merge": "a mapping, such as '{0}={{…: …}}'",
    "is not a subclass": "a section; one of its fields can be given as {0}.FIELD=VALUE",
}


def hint(name: str) -> str:
    """What to do about the name of no field: the known dotted field that is spelled like it, or where all are."""
    known = _dotted(asdict(Config()), "")
    prefix, _, last = name.rpartition(".")
    siblings = [field for field in known if field.rpartition(".")[0] == prefix]
    if close := difflib.get_close_matches(last, [field.rpartition(".")[2] for field in siblings], n=1):
        return f"Did you mean {f'{prefix}.{close[0]}' if prefix else close[0]!r}?"
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
        return f"Did you mean {close[0]!r}?"
    if name.startswith("hydra.launcher."):
        return "Launchers on Slurm have such fields: add hydra/launcher=submitit_slurm."
    same = [field for field in known if field.rpartition(".")[2] == last]
    return f"Did you mean {same[0]!r}?" if len(same) == 1 else f"`{program('config')}` lists all fields."


def _dotted(value: dict[str, Any], prefix: str) -> list[str]:
    fields = []
    for key, item in value.items():
        fields.append(prefix + key)
        if isinstance(item, dict):
            fields += _dotted(item, f"{prefix}{key}.")
    return fields


def read_config(path: Path) -> Config:
    """Read a frozen config.

    Raises:
        ConfigError: it is damaged, does not fit this version's schema, or has an interpolation: it may be of somebody
            else, and must not read the environment of who looks at their run.
    """
    try:
        config = read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} has no fields: it is no config of a run. Restore it.")
    for field, value in flatten(config).items():
        if "${" in str(value):
            raise ConfigError(
                f"{path}: {field}={value} has an interpolation, and a frozen config has none. Write its value."
            )
    return to_config(config)


def freeze(config: Config, path: Path) -> None:
    """Check the config of a run with :func:`check_frozen`, then write it."""
    check_frozen(config, path)
    kept = dataclasses.replace(config, dry_run=False, cancel=False)  # orders to the launcher, not fields of the run
    write_yaml_text(path, OmegaConf.to_yaml(OmegaConf.structured(kept)))


def rename_frozen(path: Path, name: str) -> None:
    """Change the run's name in a frozen config; all else stays, whatever version wrote it."""
    write_yaml_text(path, OmegaConf.to_yaml(read_yaml(path) | {"name": name}))


def check_frozen(config: Config, path: Path) -> None:
    """Check a config against the one with which a run was begun, if it was.

    Fields that do not determine the result may differ, and so may those in ``accept_changes``.

    Raises:
        ConfigError: other fields differ; both values are named.
    """
    if not path.exists():
        return
    now, then = identity(config), identity(read_config(path))
    names = sorted((now.keys() | then.keys()) - set(config.accept_changes))
    differing = [name for name in names if now.get(name) != then.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {then.get(name)!r} and is now {now.get(name)!r}" for name in differing)
        raise ConfigError(
            f"{path.parent} was begun with other settings: {changes}. Give this run another name=…, or continue it "
            f"all the same with accept_changes=[{','.join(differing)}]."
        )
