"""Command: ``paws NAME …`` runs any command of the package; the same as ``python -m paws_hpc.MODULE …``."""

from __future__ import annotations

import sys
from pkgutil import resolve_name

from paws_hpc import __version__

COMMANDS: dict[str, tuple[str, str]] = {  # name → what to run, with its first arguments; what it does
    "launch": ("launch:main", "train: run the chain here, or submit it to Slurm"),
    "pack": ("shards:main pack", "pack images into a store"),
    "verify": ("verify:main", "look for damage in a run and its stores, or in a store"),
    "shards": ("shards:main", "also describe, repair and copy stores"),
    "config": ("fields:main", "show the fields of a run: meaning, default, value in an experiment"),
    "doctor": ("doctor:main", "check a cluster before the first submission"),
    "status": ("status:main", "what runs do, or why they do not"),
    "runs": ("runs:main", "list, rename and remove runs"),
    "report": ("report.__main__:main", "write the report of a run, or one page that compares several"),
    "sync": ("sync:main", "upload what W&B has not got yet"),
    "export": ("export:main", "write a trained network for other programs"),
    "predict": ("predict:main", "classify image files by a finished run"),
    "bench": ("bench.__main__:main", "measure how fast training is on this machine"),
    "completion": ("__main__:print_completion", "print tab completion for bash and zsh"),
}


_COMPLETION = """\
# Tab completion of paws. bash: save it as ~/.local/share/bash-completion/completions/paws.
# zsh: autoload -U compinit bashcompinit && compinit && bashcompinit, then source it, in ~/.zshrc.
_paws() {{
  local line="${{COMP_LINE:0:$COMP_POINT}}" words own
  local word="${{line##* }}"
  case "$line" in
    *\\ *\\ *)
      case "$line" in
        *\\ launch\\ *|*\\ doctor\\ *|*\\ config\\ *)
          words="{fields} {experiments}"
          own="$(cd conf/experiment 2>/dev/null && compgen -f -P experiment= -- "${{word#experiment=}}")" ;;
        *) own="$(cd runs 2>/dev/null && compgen -d -- "$word")" ;;
      esac ;;
    *) words="{commands}" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word") ${{own//.yaml/}})
  # bash completes only what follows the last of its word breaks, of which = is one.
  [ -z "$BASH_VERSION" ] || COMPREPLY=("${{COMPREPLY[@]#"${{word%"${{word##*=}}"}}"}}")
}}
complete -o default -o nospace -F _paws paws
"""


def print_completion() -> None:
    """Print the script by which shells complete commands, experiments and fields."""
    from paws_hpc.fields import default_fields, experiments  # noqa: PLC0415 - Hydra, which takes a second

    names = [f"{field.name}=" for field in default_fields()]
    recipes = [f"experiment={name}" for name in experiments()]
    print(
        _COMPLETION.format(commands=" ".join(COMMANDS), fields=" ".join(names), experiments=" ".join(recipes)), end=""
    )


def main() -> int | None:
    """Run the command that the arguments name; returns its exit status."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print("usage: paws COMMAND …        paws COMMAND --help says more\n")
        print("\n".join(f"  {name:<11} {does}" for name, (_, does) in COMMANDS.items()))
        return 0
    if name == "--version":
        print(f"paws_hpc {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: paws {name} is no command. Known are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    function, *first = COMMANDS[name][0].split()
    sys.argv[1:] = [*first, *arguments]
    status: int | None = resolve_name(f"paws_hpc.{function}")()
    return status


if __name__ == "__main__":
    sys.exit(main())
