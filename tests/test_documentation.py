"""The documents, held against the code: nothing that can be used is left out, and nothing named that is not there."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from api.openapi import CHECK_CODES, describe
from commands import cli
from errors import CODES
from settings import PROJECT, Settings

DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "models").glob("*.md")])


@cache
def text_of(document: str) -> str:
    return (PROJECT / document).read_text("utf-8")


def missing(names: list[str], document: str) -> list[str]:
    """Those that stand nowhere in the document as a word of their own: AUDIT does not stand in AUDIT_DAYS."""
    return [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text_of(document))]


@pytest.mark.parametrize("document", ["README.md", ".env.example"])
def test_every_setting_is_documented(document: str) -> None:
    assert missing([setting.name.upper() for setting in fields(Settings)], document) == []


def test_every_limit_in_the_readme_is_the_default() -> None:
    rows = re.findall(r"^\|.*\| ([≤≥].*) \|$", text_of("README.md"), re.MULTILINE)
    told = [
        (name, float(limit))
        for row in rows
        for name, limit in zip(re.findall(r"`([A-Z_]+)`", row), re.findall(r"[\d.]+", row), strict=True)
    ]
    assert len(told) > 15
    assert told == [(name, getattr(Settings(), name.lower())) for name, _ in told]


@pytest.mark.parametrize("document", ["README.md", "docs/operating.md"])
def test_every_command_is_explained_to_operators(document: str) -> None:
    named = set(re.findall(r"`(?:python app\.py )?([a-z-]+)", text_of(document)))
    assert set(cli.COMMANDS) - named == set()


def test_every_route_is_documented() -> None:
    paths = list(describe(Settings())["paths"])
    assert missing(paths, "docs/api.md") == []
    assert missing([path.replace("{", "<").replace("}", ">") for path in paths], "README.md") == []


def test_every_code_is_documented() -> None:
    assert missing([f"`{code}`" for code in CODES], "docs/api.md") == []
    assert missing([f"`{code}`" for code in CHECK_CODES], "README.md") == []


def anchors(document: str) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [
    (path.relative_to(PROJECT).as_posix(), target)
    for path in DOCUMENTS
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text("utf-8"))
]


@pytest.mark.parametrize(("document", "target"), LINKS)
def test_every_link_leads_somewhere(document: str, target: str) -> None:
    file, _, anchor = target.partition("#")
    found = (PROJECT / document).parent / file if file else PROJECT / document
    assert found.exists()
    if anchor:
        assert anchor in anchors(found.resolve().relative_to(PROJECT).as_posix())


@pytest.mark.parametrize("path", [*DOCUMENTS, PROJECT / ".env.example"], ids=lambda path: path.name)
def test_every_command_that_a_document_names_is_there(path: Path) -> None:
    text = path.read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert set(re.findall(r"python app\.py ([a-z][a-z-]*)", text)) <= set(cli.COMMANDS)
    scripts = [*re.findall(r"python ([\w/]+\.py)", text), *re.findall(r"benchmarks/\w+\.py", text)]
    modules = [f"benchmarks/{name}.py" for name in re.findall(r"python -m benchmarks\.(\w+)", text)]
    assert [file for file in [*scripts, *modules] if not (PROJECT / file).is_file()] == []


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    shown = text_of("README.md").partition("## Figures\n")[2].partition("\n## ")[0]
    rows = "".join(re.findall(r"^\|.*", shown, re.MULTILINE))
    numbers = r"\d[\d.,]*"
    assert set(re.findall(numbers, rows)) - set(re.findall(numbers, text_of("docs/figures.md"))) == set()
