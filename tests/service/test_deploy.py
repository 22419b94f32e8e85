"""What is in deploy/, held against the service that it deploys."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands.cli import COMMANDS
from settings import PROJECT


def licences_of(lock: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "some.lock").write_text(lock)
    # Packages of the test's own, whose metadata say what the lock's might one day.
    script = [sys.executable, str(PROJECT / "deploy" / "licences.py"), str(folder / "some.lock")]
    return subprocess.run(
        script, check=False, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60
    )


def a_package(folder: Path, *metadata: str) -> None:
    (folder / "thing-1.dist-info").mkdir()
    (folder / "thing-1.dist-info" / "METADATA").write_text("\n".join(["Name: thing", "Version: 1", *metadata]) + "\n")


@pytest.mark.parametrize(
    ("metadata", "status"),
    [
        (["License-Expression: (MIT OR Apache-2.0) AND BSD-3-Clause"], 0),
        (["License-Expression: MIT AND GPL-3.0-only"], 1),
        (["Classifier: License :: OSI Approved :: MIT License"], 0),
        (["Classifier: License :: OSI Approved :: MIT License", "Classifier: License :: Other/Proprietary License"], 1),
        (["License: MIT"], 0),
        ([], 1),
    ],
)
def test_a_package_passes_if_each_of_its_licences_is_allowed(tmp_path: Path, metadata: list[str], status: int) -> None:
    a_package(tmp_path, *metadata)
    assert licences_of("thing==1 \\\n    --hash=sha256:00\n", tmp_path).returncode == status


def test_a_package_whose_licence_cannot_be_looked_at_does_not_pass(tmp_path: Path) -> None:
    found = licences_of("no-such-thing==1\n", tmp_path)
    assert found.returncode == 1
    assert "not installed" in found.stdout


def test_what_a_lock_has_for_other_pythons_is_not_looked_for(tmp_path: Path) -> None:
    assert licences_of("no-such-thing==1 ; python_version < '3'\n", tmp_path).returncode == 0


def copied_into_the_image() -> list[str]:
    """What the Dockerfile copies out of the project."""
    lines = (PROJECT / "Dockerfile").read_text("utf-8").splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    return [source for sources in copies for source in sources]


def test_the_image_holds_every_module_that_the_service_and_its_commands_import(tmp_path: Path) -> None:
    for source in copied_into_the_image():
        for path in PROJECT.glob(source.rstrip("/")):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    modules = [path for path in tmp_path.rglob("*.py") if path.name != "__init__.py"]
    names = [".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in modules]
    assert {"app", *(place.partition(":")[0] for place in COMMANDS.values())} <= set(names)
    imported = subprocess.run(
        [sys.executable, "-c", f"import importlib; [importlib.import_module(one) for one in {names}]"],
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert imported.stderr == ""


def test_the_build_context_has_what_the_image_copies_and_nothing_else() -> None:
    admitted = [line[1:] for line in (PROJECT / ".dockerignore").read_text("utf-8").splitlines() if line[0] == "!"]
    assert sorted(admitted) == sorted(copied_into_the_image())


def test_the_unit_sets_nothing_that_the_operators_commands_would_have_to_know() -> None:
    lines = (PROJECT / "deploy" / "face-api.service").read_text("utf-8").splitlines()
    given = [line.partition("=")[2] for line in lines if line.startswith(("Environment=", "EnvironmentFile="))]
    # A key made by a command that has another DATA_DIR than the service would lock nobody out.
    assert {one.partition("=")[0] for one in " ".join(given).split()} == {"UPLOADS_DIR", "PYTHONDONTWRITEBYTECODE"}
