"""Runs `tests/support/crashing.py` for long: a hundred kills and failures of each kind under load, with a table.

    python benchmarks/crashes.py [KILLS [KIND ...]]

Prints a row for each kind; a kill that loses, doubles or halves anybody ends the run with what it found. Needs the
packages that the tests need, and some minutes for each kind.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from tests.support import crashing
from tests.support.crashing import NO_ANSWER, NO_ROOM, UNAVAILABLE, Disk, Figures, Line
from tests.support.databases import MongoServer
from tests.support.running import Service


def on_a_service(service: Service, run: Callable[[Service], Figures]) -> Figures:
    """Return what `run` found on a service that starts it, and end that."""
    try:
        return run(service)
    finally:
        service.kill()


def on_a_server(folder: Path, run: Callable[[MongoServer], Figures]) -> Figures:
    """Return what `run` found with a MongoDB stand-in of its own."""
    server = MongoServer(folder)
    server.start()
    try:
        return run(server)
    finally:
        server.kill()


def service_on_sqlite(folder: Path, kills: int) -> Figures:
    """kill -9 of the service on SQLite."""
    return on_a_service(crashing.a_service(folder), lambda service: crashing.kill_the_service(service, kills))


def service_on_mongodb(folder: Path, kills: int) -> Figures:
    """kill -9 of the service on MongoDB."""

    def run(server: MongoServer) -> Figures:
        service = crashing.a_service(folder / "service", server.uri)
        return on_a_service(service, lambda service: crashing.kill_the_service(service, kills))

    return on_a_server(folder, run)


def writer(folder: Path, kills: int) -> Figures:
    """kill -9 of a process that writes the SQLite file without a pause."""
    return crashing.kill_the_writer(folder, kills)


def database_server(folder: Path, kills: int) -> Figures:
    """kill -9 of the database server."""

    def run(server: MongoServer) -> Figures:
        service = crashing.a_service(folder / "service", server.uri)
        return on_a_service(service, lambda service: crashing.kill_the_server(service, server, kills))

    return on_a_server(folder, run)


def _line(folder: Path, kills: int, *, replica_set: bool) -> Figures:
    def run(server: MongoServer) -> Figures:
        line = Line(server, replica_set=replica_set)
        service = crashing.a_service(folder / "service", line.uri)
        outages = crashing.line_outages(line, kills)
        return on_a_service(service, lambda service: crashing.trouble_the_service(service, outages, server.uri))

    return on_a_server(folder, run)


def line_to_one_server(folder: Path, kills: int) -> Figures:
    """Lost connections and step-downs of a single server."""
    return _line(folder, kills, replica_set=False)


def line_to_a_replica_set(folder: Path, kills: int) -> Figures:
    """The same of a replica set."""
    return _line(folder, kills, replica_set=True)


def disk(folder: Path, kills: int) -> Figures:
    """A full disk and a read-only file."""
    disk = Disk.of_a_service(folder)
    return on_a_service(disk.service, lambda service: crashing.trouble_the_service(service, disk.outages(kills)))


KINDS = [
    service_on_sqlite,
    service_on_mongodb,
    writer,
    database_server,
    line_to_one_server,
    line_to_a_replica_set,
    disk,
]


def main(kills: int, kinds: list[str]) -> None:
    """Print the table, a row as soon as it is known."""
    row = "{:24}{:>7}{:>10}{:>11}{:>10}{:>9}{:>16}".format
    heads = ("kind", "times", "enrolled", "no answer", "503 db", "503 disk", "stored, untold")
    print(row(*heads), flush=True)
    for kind in KINDS:
        if kinds and kind.__name__ not in kinds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = kind(Path(folder), kills)
        counts = (found.answers[answer] for answer in (NO_ANSWER, UNAVAILABLE, NO_ROOM))
        print(row(kind.__name__, found.kills, found.enrolled, *counts, found.untold), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, sys.argv[2:])
