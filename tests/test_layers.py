"""The order of the rooms: imports run downwards, and each outside technology has its place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from settings import PROJECT

# From top to bottom. A file imports from its own room and from the layers below it; rooms of one line know nothing of
# each other.
LAYERS: list[tuple[str, ...]] = [
    ("app",),
    ("commands",),
    ("bootstrap",),
    ("api",),
    ("pipeline",),
    ("challenge",),
    ("face_checks",),
    ("settings",),
    ("env_file",),
    ("gallery",),
    ("store",),
    ("engines",),
    ("photos",),
    ("errors", "logs", "version"),
]
# What each outside technology is imported by, and nothing else.
PLACES = {
    "flask": ("api/", "app.py"),
    "werkzeug": ("api/", "app.py"),
    "pymongo": ("store/mongo.py", "store/mongo_vectors.py"),
    "bson": ("store/mongo.py", "store/mongo_vectors.py", "commands/backup/backup_file.py"),
    "sqlite3": ("store/sqlite.py",),
    "insightface": ("engines/",),
    "onnxruntime": ("engines/",),
    "huggingface_hub": ("engines/model_files.py",),
    "openvino": ("engines/reduced_precision.py",),
    "PIL": ("photos/decode.py",),
    "pickle": ("store/template_bytes.py",),
    "matplotlib": ("commands/",),
    "prometheus_client": ("api/metrics.py",),
    "waitress": ("api/web_server.py",),
    "limits": ("api/access.py",),
    "yaml": ("api/openapi.py",),
}
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ROOMS = sorted({room for room in LEVEL if (PROJECT / room).is_dir()})
MODULES = sorted(
    path.relative_to(PROJECT).as_posix()
    for path in [*PROJECT.glob("*.py"), *(path for room in ROOMS for path in (PROJECT / room).rglob("*.py"))]
)


@cache
def imports_of(module: str) -> list[str]:
    """The dotted names that a module imports, wherever in the file it does; what only types name does not count."""
    return list(_imports_in(module))


def _imports_in(module: str) -> Iterator[str]:
    tree = ast.parse((PROJECT / module).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    return module.partition("/")[0].removesuffix(".py")


def test_every_module_has_its_place_among_the_layers() -> None:
    assert {room_of(module) for module in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_room_and_from_below(module: str) -> None:
    own = room_of(module)
    rooms = {name.partition(".")[0] for name in imports_of(module)} & set(LEVEL)
    assert {room for room in rooms - {own} if LEVEL[room] <= LEVEL[own]} == set()


@pytest.mark.parametrize("technology", PLACES)
def test_an_outside_technology_is_imported_in_its_place_alone(technology: str) -> None:
    importers = [module for module in MODULES if technology in {name.partition(".")[0] for name in imports_of(module)}]
    assert [module for module in importers if not module.startswith(PLACES[technology])] == []


def test_modules_of_one_room_import_each_other_in_no_circle() -> None:
    names = {module.removesuffix(".py").replace("/", "."): module for module in MODULES}
    graph = {
        module: {
            names[part] for name in imports_of(module) for part in (name, name.rpartition(".")[0]) if part in names
        }
        for module in MODULES
    }
    assert list(TopologicalSorter(graph).static_order())


def test_the_root_is_small_enough_to_tell_the_story() -> None:
    assert len([module for module in MODULES if "/" not in module]) <= 9


def folders() -> list[Path]:
    return [PROJECT / room for room in ROOMS] + [path.parent for path in (PROJECT / "commands").glob("*/__init__.py")]


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_folder_is_small_and_says_what_it_is_for(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= 18
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert 2 <= len(re.findall(r"\.(?:\s|$)", told)) <= 4
