"""Command: every field of a run with its meaning, its default and, for an experiment, its value.

    paws config                                   all of them; docs/config.md is the same as Markdown
    paws config pretrain experiment=digits        those of pre-training, and what they are there

The meanings are those in the docstrings of the config's dataclasses.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from paws_hpc.cluster.compose import CONF, compose_run, own_configs
from paws_hpc.cluster.frozen import hint
from paws_hpc.command import Parser, exit_status, program
from paws_hpc.config import Config, StageResources
from paws_hpc.objective.config import OBJECTIVES
from paws_hpc.stage_table import STAGES

OFTEN_CHANGED = (
    "name", "seed", "stages", "data.train", "data.test", "labels.per_class", "pretrain.epochs", "pretrain.batch_size",
    "finetune.sweep", "tracking.wandb",
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of the config.

    Attributes:
        name: with the names of its sections, as overrides spell it.
        meaning: in words; empty for a section without any.
        value: of the config that was walked.
    """

    name: str
    meaning: str
    value: Any

    @property
    def text(self) -> str:
        """The value as an override spells it."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)


def fields_of(config: Any, prefix: str = "", *, stage: str = "STAGE") -> Iterator[Field]:
    """The fields of a config and its sections, in their order; ``resources`` for one stage, or as ``STAGE`` for any."""
    meanings = {name: text for cls in reversed(type(config).__mro__) for name, text in _meanings(cls).items()}
    for each in fields(config):
        value, name = getattr(config, each.name), prefix + each.name
        if name == "resources":
            value, name = value.get(stage, StageResources()), f"{name}.{stage}"
        if is_dataclass(value):
            yield from fields_of(value, f"{name}.")
        else:
            yield Field(name, meanings.get(each.name, ""), value)


def default_fields(*, stage: str = "STAGE") -> list[Field]:
    """All fields with their defaults; those that a single objective has follow the objective's others."""
    listed = list(fields_of(Config(), stage=stage))
    for name, objective in OBJECTIVES.items():
        known = [field.name for field in listed]
        own = [field for field in fields_of(objective(), "objective.") if field.name not in known]
        place = max(number for number, field in enumerate(known) if field.startswith("objective.")) + 1
        listed[place:place] = [replace(field, meaning=f"(objective={name}) {field.meaning}") for field in own]
    return listed


def _meanings(cls: type) -> dict[str, str]:
    """What the section ``Attributes`` of a docstring says, by name, in words of YAML."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}([\w, ]+): ?(.*(?:\n {8}.*)*)", section, re.MULTILINE):
        shown = re.sub(r":\w+:(?=`)", "", re.sub(r"\bNone\b", "null", text.replace("``", "`")))
        found |= dict.fromkeys(names.split(", "), " ".join(shown.split()))
    return found


def experiments() -> dict[str, str]:
    """The first line of every recipe's comment, by name; one's own in ``./conf`` come last."""
    files = [path for folder in (CONF, Path("conf")) for path in sorted(folder.glob("experiment/*.yaml"))]
    comments = {path.stem: re.findall(r"^# (?!@package)(.*)", path.read_text(), re.MULTILINE) for path in files}
    return {name: lines[0] if lines else "" for name, lines in comments.items()}


def launch_help() -> str:
    """What ``launch --help`` prints, on one screen."""
    known = {field.name: field for field in default_fields()}
    recipes, width = experiments(), 100
    lines = [
        f"usage: {program('launch')} [experiment=NAME] [FIELD=VALUE ...] [-m] [--config-dir FOLDER]",
        "Trains, scores and reports; the same command again goes on from where it was interrupted.",
        "  -m seed=0,1,2                  several runs and their comparison",
        "  hydra/launcher=submitit_slurm  as jobs of Slurm; dry_run=true shows them, cancel=true ends them",
        "  --config-dir FOLDER            recipes of your own, in FOLDER/experiment/NAME.yaml (conf)",
        "Experiments:",
        *(f"  {name:<23}{textwrap.shorten(does, width - 25, placeholder=' …')}" for name, does in recipes.items()),
        "Fields that are often changed:",
    ]
    for name in OFTEN_CHANGED:
        meaning = textwrap.shorten(known[name].meaning, width - 25, placeholder=" …")
        lines.append(f"  {name:<23}{meaning}")
    return "\n".join([*lines, f"All fields: {program('config')} [PREFIX] [experiment=NAME]; docs/config.md"])


def as_markdown() -> str:
    """The page docs/config.md."""
    lines = [
        "# Fields of a run",
        "",
        "Made by `paws config --markdown`. Each can be given to `paws launch` as `FIELD=VALUE`, or stand in a file of",
        "`conf/`. `paws config experiment=NAME` shows what they are in an experiment.",
    ]
    for section, members in groupby(default_fields(), key=lambda field: field.name.rpartition(".")[0]):
        lines += ["", f"## {section or 'The run'}", "", "| field | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{field.name}` | `{field.text}` | {field.meaning.replace('|', chr(92) + '|')} |" for field in members
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(prog=program("config"), description="Show the fields of a run.")
    parser.add_argument("words", nargs="*", metavar="PREFIX | FIELD=VALUE", help="of names; or a run, as for launch")
    parser.add_argument("--config-dir", metavar="FOLDER", help="of recipes of your own (conf)")
    parser.add_argument("--markdown", action="store_true", help="print docs/config.md")
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: _config(options), interrupted="nothing was written")


def _config(options: argparse.Namespace) -> None:
    if options.markdown:
        print(as_markdown(), end="")
        return
    overrides = [word for word in options.words if "=" in word]
    prefixes = [word for word in options.words if "=" not in word]
    stage = next((name for name in STAGES if f"resources.{name}" in ".".join(prefixes)), "STAGE")
    words = own_configs(overrides + ([] if options.config_dir is None else [f"--config-dir={options.config_dir}"]))
    values = {}
    if overrides:
        values = {field.name: field.text for field in fields_of(compose_run(words)[0], stage=stage)}
    shown = [field for field in default_fields(stage=stage) if field.name in values or not values]
    for prefix in prefixes:
        chosen = [field for field in shown if f"{field.name}.".startswith(f"{prefix.rstrip('.')}.")]
        shown = chosen or [field for field in shown if prefix in field.name]
        if not shown:
            raise ValueError(f"{prefix} is the name of no field. {hint(prefix)}")
    width = max(shutil.get_terminal_size().columns - 1, 40)
    for field in shown:
        value = values.get(field.name, field.text)
        print(f"{field.name}={value}" + (f"    (default: {field.text})" if value != field.text else ""))
        print(textwrap.fill(field.meaning, width, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    sys.exit(main())
