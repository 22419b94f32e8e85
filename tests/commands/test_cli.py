"""The list of commands, the help, the version, and what a running service does not import."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import app
from commands import cli
from settings import PROJECT
from version import VERSION


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_where_the_list_says_and_takes_arguments(name: str) -> None:
    command = cli.command_of(name)
    assert command.name == name
    command.add_arguments(argparse.ArgumentParser())


def test_the_help_names_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["--help"])
    shown = capsys.readouterr().out.splitlines()
    for name in cli.COMMANDS:
        assert f"  {name:14} {cli.command_of(name).help}" in shown
    assert max(map(len, shown)) <= 80
    assert len(shown) <= 120


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["--version"])
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_a_python_without_the_packages_is_told_which_one_to_use() -> None:
    ended = subprocess.run([sys.executable, "-S", "app.py"], check=False, cwd=PROJECT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "'flask' is missing" in ended.stderr
    assert ".venv/bin/python app.py" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_running_service_imports_no_command() -> None:
    code = "import sys, app; print([one for one in sys.modules if one.startswith(('commands.', 'matplotlib'))])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, capture_output=True, text=True)
    assert ended.stdout == "['commands.command', 'commands.cli']\n"


def test_what_is_no_command_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["imprt"]) == 2
    assert "no command 'imprt'" in capsys.readouterr().err


def test_a_command_that_fails_says_which_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["import", str(tmp_path), "--data-dir", str(tmp_path)]) == 1
    assert "import ends: there is no photo in" in capsys.readouterr().err


def test_a_list_of_no_keys_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["keys", "list", "--data-dir", str(tmp_path)]) == 0
    assert "There is no API key" in capsys.readouterr().err
