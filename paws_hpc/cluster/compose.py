"""From words on a command line to a run: Hydra's composition, with errors in one line."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

import paws_hpc
from paws_hpc.cluster.frozen import ConfigError, explain, to_config
from paws_hpc.cluster.resources import Launcher, resolve, stage_parameters
from paws_hpc.command import program
from paws_hpc.config import Config, flatten
from paws_hpc.files import yaml_fault
from paws_hpc.objective.config import OBJECTIVES
from paws_hpc.own_images import Derived, derived, is_own
from paws_hpc.renamed import renamed
from paws_hpc.sizes import check_no_secret
from paws_hpc.stage_table import import_torch
from paws_hpc.store.format import MANIFEST_NAME, UNDERWAY_NAME

_IN_EVERY_NAME = ("experiment", "seed")
_UNFIT = re.compile(r"[^\w.+-]+")
_OPEN = re.compile(r"^(\w+\.sweep\b|resources\.\w+\.additional_parameters\b)")  # may get new fields: ++
CONF = (Path(paws_hpc.__file__).parent / "conf").resolve()

Plugins.instance()  # so that they have registered their configs, and do not do so later
_STORE = ConfigStore.instance()
_STORE.store(name="schema", node=Config)
for _name, _objective in OBJECTIVES.items():
    _STORE.store(group="objective", name=f"{_name}_schema", node=_objective)
# conf/hydra/launcher/submitit_slurm.yaml takes the name of the plugin's own config and extends it under this one; of
# two of the same name Hydra would validate one by the other, with a warning at every launch.
_STORE.store(group="hydra/launcher", name="submitit_slurm_schema", node=SlurmQueueConf(), provider="submitit_launcher")
_STORE.repo["hydra"]["launcher"].pop("submitit_slurm.yaml")


def runs_of(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of each run that sweeps such as ``seed=0,1,2`` ask for, in their order.

    A run is named after what is swept, unless the arguments name it: conf/config.yaml's name has experiment and seed
    already, so ``objective.me_max=true,false`` adds ``-me_max=True`` and ``-me_max=False``.

    Raises:
        ConfigError: an argument is no override.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in overrides
    ]
    runs = [list(run) for run in itertools.product(*values)]
    swept = [number for number, override in enumerate(overrides) if override.is_sweep_override()]
    telling = [number for number in swept if overrides[number].key_or_group not in _IN_EVERY_NAME]
    if telling and not any(override.key_or_group == "name" for override in overrides):
        default = OmegaConf.to_container(cast(DictConfig, OmegaConf.load(CONF / "config.yaml")), resolve=False)
        assert isinstance(default, dict), "conf/config.yaml is a mapping"
        for run in runs:
            name = default["name"]
            for number in telling:  # objective.me_max=True adds -me_max=True
                key, _, value = run[number].partition("=")
                name += f"-{key.rpartition('.')[2]}={_UNFIT.sub('-', value).strip('-')}"
            run.append(f"name='{name}'")
    return runs


def own_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--config-dir FOLDER``, or ``conf`` in the working folder, as a place where Hydra searches.

    Shipped files come first, so that their names mean the same everywhere: one of one's own may not bear such a name.

    Raises:
        ConfigError: there is no such folder, or a file in it has a shipped one's name and says something else.
    """
    left, folder = list(arguments), "conf" if Path("conf").is_dir() else None
    for number, argument in enumerate(left):
        flag, equals, value = argument.partition("=")
        if flag in ("-cd", "--config-dir"):
            folder = value if equals else "".join(left[number + 1 : number + 2])
            del left[number : number + (1 if equals else 2)]
            if not folder or not Path(folder).is_dir():
                raise ConfigError(
                    f"--config-dir {folder}: there is no such folder. Name the one that has experiment/…."
                )
            break
    if folder is None or Path(folder).resolve() == CONF or any(word.startswith("hydra.searchpath=") for word in left):
        return left
    for path in sorted(Path(folder).glob("*/**/*.yaml")):
        shipped = CONF / path.relative_to(folder)
        if shipped.exists() and shipped.read_bytes() != path.read_bytes():
            raise ConfigError(f"{path} has the name of a file of paws_hpc, which would be read instead: rename it.")
    return [*left, f"hydra.searchpath=['file://{os.path.abspath(folder)}']"]


@functools.cache
def derivation(overrides: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any], tuple[Derived, ...]]:
    """What follows from a folder of own images that overrides name: all overrides, fields of ``data``, and a table.

    Raises:
        ValueError: the folder has no shape that is understood, or the overrides cannot be parsed.
        FileNotFoundError: there is no such folder.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {each.key_or_group.replace("/", "."): each.value() for each in parsed if not each.is_delete()}
    if not is_own(given):
        return overrides, {}, ()
    asked = [str(each.input_line) for each in parsed if each.key_or_group.startswith(("hydra", "resources."))]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", [_OPEN.sub(r"++\1", each) for each in asked], return_hydra_config=True)
    place = {**cast(dict[str, Any], OmegaConf.to_container(composed.hydra.launcher, resolve=False))}
    place |= {name: value for name, value in composed.resources.pretrain.items() if value is not None}
    gpu = given.get("device") != "cpu"
    if str(place["_target_"]).endswith("SlurmLauncher"):
        gpu = gpu and bool(place["gpus_per_node"])
    elif gpu:
        import_torch()
        import torch  # noqa: PLC0415 - takes seconds

        gpu = torch.cuda.is_available()
    ranks = (place.get("nodes") or 1) * (place.get("tasks_per_node") or 1)
    before, data, table = derived(given, gpu=gpu, ranks=ranks)
    named = (override.replace("${hydra:runtime.choices.experiment}", "${data.name}") for override in overrides)
    return (*before, *named), data, table


def compose_run(overrides: Sequence[str]) -> tuple[Config, Launcher]:
    """The run that overrides describe, and the fields of its launcher.

    Raises:
        ValueError: they do not compose, or to a run that cannot be.
    """
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            if (refusal := renamed(override.key_or_group.replace("/", "."))) is not None:
                raise ConfigError(refusal)
        everything, data, _ = derivation(tuple(overrides))
        overrides = [_OPEN.sub(r"++\1", override) for override in everything]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", overrides, return_hydra_config=True)
        written = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
        check_no_secret(flatten(written | {"hydra": {"launcher": written["hydra"]["launcher"]}}))
        HydraConfig.instance().set_config(composed)  # ${hydra:…} in conf/ asks there
        with open_dict(composed):
            del composed["hydra"]
            composed.merge_with({"data": data})
        launcher = cast(dict[str, Any], OmegaConf.to_container(HydraConfig.get().launcher))
        config = to_config(OmegaConf.to_container(composed, resolve=True))
        config.tracking.check_installed()
        config.labels.check_complete()
    except YAMLError as error:
        raise ConfigError(yaml_fault(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return config, launcher


def check_named_stores(config: Config, overrides: Sequence[str]) -> None:
    """Raise ConfigError if a store that an override names is not there, and nothing says that it is to be packed."""
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    for field in ("train", "labelled", "test"):
        if f"data.{field}" not in given or (named := getattr(config.data, field)) is None:
            continue
        if ((path := Path(named)) / MANIFEST_NAME).exists() or (path / UNDERWAY_NAME).exists():
            continue
        if path.is_dir() and any(path.iterdir()):
            raise ConfigError(
                f"data.{field}={path} is a folder of other files and no store. Pack them into another folder, "
                f"`{program('pack')} folder --root {path} --to shards/{path.resolve().name}`, and name that."
            )
        if config.data.source is not None and not {"data", "data.source"} & given and field != "labelled":
            raise ConfigError(
                f"data.{field}={path} does not exist. Correct the path; or give data.source={config.data.source} as "
                "well, to pack that data set into it."
            )


def parameters_of(overrides: Sequence[str]) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The run that overrides describe as it would be submitted, and submitit's parameters for each of its stages.

    Errors as of :func:`compose_run` and :func:`check_named_stores`.
    """
    config, launcher = compose_run(overrides)
    check_named_stores(config, overrides)
    config = resolve(config, launcher)
    return config, stage_parameters(config, launcher)
