"""Fixtures that several rooms of tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import MONGO_KINDS, Database, MongoServer, fresh_database

# `make quick` leaves these out: they load a face model, start processes, or take seconds of computing.
HEAVY = (
    "api/test_access.py",
    "api/test_challenges.py",
    "api/test_routes.py::test_probes_are_answered",
    "api/test_web_server.py",
    "challenge/test_judge.py",
    "commands/test_backup.py",
    "commands/test_biometrics.py::test_counts_and_rates",
    "commands/test_biometrics.py::test_the_intervals",
    "commands/test_bulk.py",
    "commands/test_evaluate.py",
    "commands/test_evaluate_checks.py",
    "commands/test_people.py",
    "engines/",
    "gallery/test_in_mongodb.py",
    "gallery/test_log_model.py",
    "gallery/test_photos.py",
    "gallery/test_snapshot.py",
    "gallery/test_templates.py::test_a_search",
    "gallery/test_templates.py::test_the_codes",
    "photos/test_decoder_pool.py",
    "service/",
    "store/test_audit_log.py::test_several_processes",
    "store/test_encryption.py::test_a_rotation_that_is_killed",
    "store/test_stores.py::test_a_dead_server",
    "test_pipeline.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `HEAVY`."""
    for item in items:
        # The same contract on SQLite and on mongomock stays in the quick loop.
        if item.nodeid.removeprefix("tests/").startswith(HEAVY) or "[mongodb" in item.nodeid:
            item.add_marker(pytest.mark.heavy)


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
