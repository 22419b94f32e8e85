"""The list of commands, the help, the version, and what a running service does not import."""

from __future__ import annotations

import argparse
import subprocess
import sys

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


def test_a_running_service_imports_no_command() -> None:
    code = "import sys, app; print([one for one in sys.modules if one.startswith(('commands.', 'matplotlib'))])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, capture_output=True, text=True)
    assert ended.stdout == "['commands.command', 'commands.cli']\n"
