"""What help says of fields and experiments is what there is, and docs/config.md says the same."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from paws_hpc import __main__, __version__, fields, launch
from paws_hpc.cluster.compose import CONF, compose_run, own_configs
from tests.ranks import ROOT


def test_every_field_has_a_meaning_and_the_page_of_them_is_up_to_date() -> None:
    assert [field.name for field in fields.default_fields() if len(field.meaning) < 4] == []
    assert (ROOT / "docs/config.md").read_text() == fields.as_markdown(), "paws config --markdown > docs/config.md"


def test_the_help_of_launch_fits_a_screen_and_has_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    print(fields.launch_help())
    lines = capsys.readouterr().out.splitlines()
    assert 24 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for path in CONF.glob("experiment/*.yaml"):
        assert any(line.startswith(f"  {path.stem} ") and len(line) > 40 for line in lines)
    known = {field.name for field in fields.default_fields()}
    assert set(fields.OFTEN_CHANGED) <= known


def test_fields_show_the_value_in_an_experiment_beside_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert fields.main(["pretrain", "experiment=digits", "pretrain.ema=0.99"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "pretrain.batch_size=64    (default: 4096)" in lines
    assert "pretrain.ema=0.99    (default: null)" in lines
    assert "pretrain.accumulate_steps=1" in lines
    assert not any(line.startswith("optimizer") for line in lines)
    assert fields.main(["resources.pretrain", "resources.pretrain.nodes=2"]) == 0
    assert "resources.pretrain.nodes=2    (default: null)" in capsys.readouterr().out
    assert fields.main(["pretrain.epoch"]) == 0
    assert "pretrain.epochs=100" in capsys.readouterr().out, "part of a name finds it"
    assert fields.main(["quaternion"]) == 1
    assert (
        capsys.readouterr().err
        == "error: quaternion is the name of no field. `python -m paws_hpc config` lists all fields.\n"
    )


def test_tabs_complete_commands_experiments_fields_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/digits-seed3").mkdir(parents=True)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("")
    __main__.print_completion()
    script = capsys.readouterr().out + 'COMP_LINE="$1"; COMP_POINT=${#1}; _paws; printf "%s\\n" "${COMPREPLY[@]}"'

    def completed(line: str) -> list[str]:
        told = subprocess.run(
            ["bash", "-c", script, "-", line], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return told.stdout.split()

    assert completed("paws la") == ["launch"]
    assert completed("paws launch experiment=digits_") == ["digits_one_label", "digits_wrn"]
    assert completed("paws launch seed=1 experiment=mi") == ["mine"]
    assert completed("paws config pretrain.epo") == ["pretrain.epochs="]
    assert completed("paws report dig") == ["digits-seed3"]


def test_every_command_of_the_table_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in __main__.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["paws", name, "--help"])
        if name != "completion":
            with suppress(SystemExit):  # argparse's way to end
                __main__.main()
            assert f"usage: paws {'shards ' if name == 'pack' else ''}{name} " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["paws", "train"])
    assert __main__.main() == 2
    assert "paws train is no command. Known are launch" in capsys.readouterr().err


def test_the_source_tree_works_without_being_installed(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "plain = m.version\n"
        "def version(name):\n"
        "    if name == 'paws-hpc': raise m.PackageNotFoundError(name)\n"
        "    return plain(name)\n"
        "m.version = version\n"
        "from paws_hpc.cluster.chain import Chain; from paws_hpc.stages.run_folder import RunFolder\n"
        "Chain.begin(RunFolder(pathlib.Path('.')), 'run')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, check=True)
    assert f'"paws_hpc": "{__version__}"' in (tmp_path / "chain.json").read_text()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe in ``conf``; the recipe."""
    path = tmp_path / "conf/experiment/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n# Mine.\ndefaults:\n  - digits\npretrain: {epochs: 7}\n")
    monkeypatch.chdir(tmp_path)
    return path


def test_recipes_of_ones_own_are_found_in_conf_and_where_config_dir_says(own: Path) -> None:
    config, _ = compose_run(own_configs(["experiment=mine", "pretrain.batch_size=32"]))
    assert (config.name, config.pretrain.epochs, config.pretrain.batch_size) == ("mine-seed3", 7, 32)
    assert fields.experiments()["mine"] == "Mine."
    os.rename("conf", "elsewhere")
    for flag in (["--config-dir", "elsewhere"], ["--config-dir=elsewhere"]):
        assert compose_run(own_configs([*flag, "experiment=mine"]))[0].pretrain.epochs == 7
    assert own_configs(["experiment=digits"]) == ["experiment=digits"]


def test_a_recipe_cannot_silently_stand_for_a_shipped_one(own: Path) -> None:
    own.with_name("digits.yaml").write_bytes((CONF / "experiment/digits.yaml").read_bytes())
    own_configs([])  # the same is no danger
    own.with_name("digits.yaml").write_text("pretrain: {epochs: 9}\n")
    with pytest.raises(ValueError, match=r"conf/experiment/digits.yaml has the name of a file of paws_hpc.*rename it"):
        own_configs([])
    with pytest.raises(ValueError, match="--config-dir nowhere: there is no such folder"):
        own_configs(["--config-dir", "nowhere"])


def test_help_is_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["paws", "launch", "-h"])
    assert launch.main() == 0
    assert capsys.readouterr().out.startswith("usage: paws launch [experiment=NAME]")


@pytest.mark.parametrize("command", ["launch --help", "config"])
def test_a_reader_that_has_enough_ends_a_command_without_a_traceback(command: str) -> None:
    line = f"{sys.executable} -m paws_hpc {command} | head -c 0; exit ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (141, "")
