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
from tests.test_layers import MODULES

FOLDERS_OF_DOCUMENTS = (".", "docs", "docs/decisions", "models", "training")
DOCUMENTS = sorted(path for folder in FOLDERS_OF_DOCUMENTS for path in (PROJECT / folder).glob("*.md"))
DECISIONS = sorted((PROJECT / "docs" / "decisions").glob("0*.md"))
# What somebody has to be told before the page can be understood; the changelog's form is given.
PAGES = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_begins_with_a_sentence_that_says_what_the_reader_gets(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text("utf-8"), flags=re.DOTALL)
    title, first, *_ = [block for block in text.split("\n\n") if block.strip()]
    assert re.fullmatch(r"# .+", title.strip())
    assert re.match(r"[A-Za-z]", first), "a heading, a table, a list or code comes before the first paragraph"


def test_the_decisions_are_numbered_without_a_gap_and_the_overview_has_each() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    assert [path.name for path in DECISIONS] == re.findall(r"\((\d.*?\.md)\)", text_of("docs/decisions/README.md"))


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda path: path.name[:4])
def test_a_decision_has_its_context_its_consequences_and_its_tests(decision: Path) -> None:
    text = decision.read_text("utf-8")
    assert text.startswith(f"# {int(decision.name[:4])}. ")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences", "How it is tested"]


def test_the_architectures_tree_has_every_module() -> None:
    tree = text_of("docs/architecture.md").partition("```text\n")[2].partition("```")[0]
    shipped = [module.rpartition("/")[2] for module in MODULES]
    assert sorted(re.findall(r"\w+\.py", tree)) == sorted(name for name in shipped if name != "__init__.py")
    assert {module.rpartition("/")[0] for module in MODULES} - {folder.rstrip("/") for folder in folders_in(tree)} == {
        ""
    }


def folders_in(tree: str) -> set[str]:
    """The folders that begin a line of the tree, with the folder around them."""
    found, outer = set(), ""
    for indent, name in re.findall(r"^( *)(\w+/)", tree, re.MULTILINE):
        outer = outer if indent else name
        found.add(outer + name if indent else name)
    return found


@pytest.mark.parametrize("document", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    named = re.findall(
        r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|csv|json|html|yaml|service|onnx))`", document.read_text("utf-8")
    )
    near = (PROJECT, document.parent)
    # By training, and by commands.
    made = {"DATA_DIR/evaluation/report.html", "DATA_DIR/import-report.csv"}
    assert [name for name in named if name not in made and not any((folder / name).is_file() for folder in near)] == []


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
