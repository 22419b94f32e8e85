"""Fixtures that several rooms of tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import MONGO_KINDS, Database, MongoServer, fresh_database

# Here a face model is loaded, or a process of the service's is started: `make quick` leaves these files and rooms out.
WITH_A_MODEL = (
    "engines/",
    "service/",
    "commands/test_bulk.py",
    "commands/test_evaluate.py",
    "commands/test_evaluate_checks.py",
    "photos/test_decoder_pool.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `WITH_A_MODEL`."""
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(WITH_A_MODEL):
            item.add_marker(pytest.mark.model)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A command sets the log up for its process, which here is the other tests' as well."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture(scope="session")
def mongo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    server = MongoServer(tmp_path_factory.mktemp("mongo"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def mortal_mongo_server(tmp_path: Path) -> Iterator[MongoServer]:
    """A server of the test's own, to be killed."""
    server = MongoServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", *MONGO_KINDS])
def database(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """An empty database of each kind in turn."""
    yield from fresh_database(request.param, request, tmp_path, monkeypatch)


@pytest.fixture(params=MONGO_KINDS)
def mongo_database(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    """An empty MongoDB database of each kind in turn, for documents that SQLite cannot hold."""
    yield from fresh_database(request.param, request, tmp_path, monkeypatch)
