"""Empty databases of every kind that the service can run on, and the server that one of them needs."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mongomock
import mongomock.collection
import pymongo
import pytest

from bootstrap import make_store
from store.encryption import NO_KEYS, Keyring
from store.mongo import MongoStore
from store.records import RecordStore


class MongoServer:
    """A MongoDB-compatible server process on a free port, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.uri = f"mongodb://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as output:
            options = ["-p", str(self.port), "--db", str(self._folder / "db"), "--pid-file", str(self._folder / "pid")]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nx_27017.nx_27017", *options],
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise RuntimeError("the test's database server did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Database:
    """An empty database that any number of stores can open. `collection` is the raw one; SQLite has none."""

    def __init__(self, kind: str, folder: Path, mongo_uri: str | None = None) -> None:
        self.kind = kind
        self.folder = folder
        self._uri = mongo_uri
        # The stand-in server has one namespace for all databases, so the collection's name is fresh too.
        self._name = f"test_{uuid.uuid4().hex}"
        self._client: Any = None
        if kind == "mongomock":
            self._client = mongomock.MongoClient()
        elif mongo_uri is not None:
            self._client = pymongo.MongoClient(mongo_uri)
        self.collection: Any = self._client[self._name][self._name] if self._client is not None else None
        self._stores: list[RecordStore] = []

    def open(self, *, prepare: bool = True, keyring: Keyring = NO_KEYS) -> RecordStore:
        store: RecordStore
        if self.kind == "mongomock":
            store = MongoStore(self.collection, keyring=keyring)
        else:
            store = make_store(
                self._uri, mongo_db=self._name, mongo_collection=self._name, data_dir=self.folder, keyring=keyring
            )
        self._stores.append(store)
        if prepare:
            store.prepare()
        return store

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record as another program might. The database must be prepared."""
        if self.collection is not None:
            self.collection.insert_one(dict(record))
            return
        columns, marks = ", ".join(record), ", ".join("?" * len(record))
        with contextlib.closing(sqlite3.connect(self.folder / "faces.sqlite3")) as connection, connection:
            connection.execute(f"INSERT INTO faces ({columns}) VALUES ({marks})", tuple(record.values()))

    def discard(self) -> None:
        for store in self._stores:
            store.close()
        if self._client is not None:
            self._client.drop_database(self._name)
            self._client.close()


class BulkBuilder(mongomock.collection.BulkOperationBuilder):
    """mongomock 4.3 does not know the `sort` that PyMongo 4.11 and later pass on, always None here."""

    def add_update(self, *args: Any, **options: Any) -> Any:
        del options["sort"]
        return super().add_update(*args, **options)  # type: ignore[no-untyped-call]


TEST_MONGO_URI = os.environ.get("TEST_MONGO_URI")
MONGO_KINDS = ["mongomock", "mongodb"] + (["TEST_MONGO_URI"] if TEST_MONGO_URI else [])


def fresh_database(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    uri = None
    if kind == "mongodb":
        uri = request.getfixturevalue("mongo_server").uri
    elif kind == "TEST_MONGO_URI":
        uri = TEST_MONGO_URI
    elif kind == "mongomock":
        monkeypatch.setattr(mongomock.collection, "BulkOperationBuilder", BulkBuilder)
    database = Database(kind, tmp_path / "data", uri)
    yield database
    database.discard()
