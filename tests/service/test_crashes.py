"""kill -9, full disks, lost connections, step-downs: an acknowledged enrolment stays, once and completely."""

from __future__ import annotations

import os
import resource
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bootstrap import make_store
from errors import FaceError
from gallery.decisions import Gallery
from store.records import EnrolmentLog
from tests.service.test_races import a_person
from tests.support import crashing
from tests.support.crashing import ENROLLED, NO_ANSWER, NO_ROOM, UNAVAILABLE, Crowd, Disk, Line
from tests.support.databases import MongoServer

pytestmark = pytest.mark.slow

# Of each kind; `benchmarks/crashes.py` takes a hundred.
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "service"


# --- kill -9 ---


@pytest.mark.parametrize("database", ["SQLite", "MongoDB"])
def test_who_was_told_to_be_enrolled_is_recognised_after_a_kill_of_the_service(
    database: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    uri = request.getfixturevalue("mongo_server").uri if database == "MongoDB" else ""
    service = crashing.a_service(folder, uri)
    try:
        figures = crashing.kill_the_service(service, KILLS)
    finally:
        service.kill()
    assert set(figures.answers) <= {ENROLLED, NO_ANSWER}
    assert figures.enrolled >= KILLS


def test_a_kill_in_mid_write_leaves_every_acknowledged_step_and_no_half_of_one(folder: Path) -> None:
    assert crashing.kill_the_writer(folder, 2 * KILLS).enrolled >= 2 * KILLS


def test_a_kill_of_the_database_server_is_503_until_it_is_back_and_loses_nobody(
    mortal_mongo_server: MongoServer, folder: Path
) -> None:
    service = crashing.a_service(folder, mortal_mongo_server.uri)
    try:
        figures = crashing.kill_the_server(service, mortal_mongo_server, KILLS)
    finally:
        service.kill()
    assert set(figures.answers) == {ENROLLED, UNAVAILABLE}


# --- lost connections and step-downs ---


@dataclass
class OnTheLine:
    """A gallery that reaches its database through a line that can fail, and the records as they are behind it."""

    line: Line
    gallery: Gallery
    records: EnrolmentLog

    def enrol(self, request_key: str | None = "k") -> str:
        return self.gallery.enrol(crashing.a_template(1), duplicate_cosine=crashing.SAME, request_key=request_key)

    def enrolled(self) -> list[str | None]:
        return [entry.user_id for entry in crashing.assert_whole(self.records)]


@pytest.fixture
def on_the_line(request: pytest.FixtureRequest, mongo_server: MongoServer) -> Iterator[OnTheLine]:
    line = Line(mongo_server, replica_set=getattr(request, "param", False))
    name = f"line_{uuid.uuid4().hex}"
    through, beside = (
        make_store(uri, mongo_db=name, mongo_collection=name, data_dir=Path(), timeout=1.0)
        for uri in (line.uri, mongo_server.uri)
    )
    through.prepare()
    yield OnTheLine(line, Gallery(through, "m", 512), beside)
    through.close()
    beside.close()
    line.close()


@pytest.mark.parametrize(
    ("trouble", "stored"),
    [("cut", 0), ("answer lost", 1), ("not primary", 0), ("stepped down", 1), ("unconfirmed", 1)],
)
def test_an_enrolment_of_unknown_outcome_is_unavailable_and_asking_again_finds_it_or_enrols_once(
    on_the_line: OnTheLine, trouble: str, stored: int
) -> None:
    on_the_line.line.trouble = trouble
    with pytest.raises(FaceError, match="database_unavailable") as caught:
        on_the_line.enrol()
    assert caught.value.headers == {"Retry-After": "5"}
    first = on_the_line.enrolled()
    assert len(first) == stored
    on_the_line.line.recover()
    user_id = on_the_line.enrol()
    assert on_the_line.enrolled() == [user_id] == (first or [user_id])
    with pytest.raises(FaceError, match="duplicate_face"):
        on_the_line.enrol("another request")


@pytest.mark.parametrize("on_the_line", [True], indirect=True, ids=["replica set"])
@pytest.mark.parametrize("trouble", ["answer lost", "not primary", "stepped down", "unconfirmed"])
def test_a_replica_set_that_has_a_primary_again_in_time_is_not_noticed_and_enrols_once(
    on_the_line: OnTheLine, trouble: str
) -> None:
    on_the_line.line.trouble = trouble
    election = threading.Timer(0.1, on_the_line.line.recover)
    election.start()
    user_id = on_the_line.enrol()
    election.join()
    assert on_the_line.enrolled() == [user_id]


def test_a_line_that_fails_in_every_way_under_load_is_503_and_loses_and_doubles_nobody(
    mongo_server: MongoServer, folder: Path
) -> None:
    line = Line(mongo_server)
    service = crashing.a_service(folder, line.uri)
    outages = crashing.line_outages(line, len(crashing.LINE_TROUBLES))
    try:
        figures = crashing.trouble_the_service(service, outages, mongo_server.uri)
    finally:
        service.kill()
        line.close()
    assert set(figures.answers) == {ENROLLED, UNAVAILABLE}


# --- disks ---


@pytest.fixture
def disk(folder: Path) -> Iterator[Disk]:
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits what another process may write")
    disk = Disk.of_a_service(folder)
    yield disk
    disk.service.kill()


@pytest.mark.parametrize("trouble", ["full", "read_only"])
def test_a_disk_that_takes_no_write_is_503_for_who_signs_up_and_recognises_everybody_else(
    disk: Disk, trouble: str
) -> None:
    disk.service.start()
    crowd = Crowd(disk.service)
    assert crowd.sign_up(0)
    with getattr(disk, trouble)():
        refused = disk.service.post("/signUp", a_person(1))
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert refused.headers["Retry-After"]
        assert disk.service.post("/verify", a_person(0)).json()["user_id"] == crowd.user_ids[0]
    assert crowd.sign_up(1)
    with crashing.records_of(disk.service) as store:
        assert crowd.check(store) == 0


@pytest.mark.parametrize("size", [512_000, 600_000, 5_000_000])
def test_a_photo_that_finds_no_room_on_the_disk_is_503_and_welcome_once_there_is(disk: Disk, size: int) -> None:
    # The form's parser keeps photos from 500 KiB in a file, and the web server before it requests from 512 KiB.
    disk.service.start()
    photo = a_person(0) + bytes(size)
    assert disk.service.post("/signUp", a_person(1)).status_code == 200
    with disk.full():
        refused = disk.service.post("/verify", photo)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert refused.headers["Retry-After"]
    assert disk.service.post("/signUp", photo).status_code == 200


def test_a_disk_that_takes_no_writes_now_and_then_under_load_loses_and_doubles_nobody(disk: Disk) -> None:
    figures = crashing.trouble_the_service(disk.service, disk.outages(KILLS))
    assert {ENROLLED, UNAVAILABLE} <= set(figures.answers) <= {ENROLLED, UNAVAILABLE, NO_ROOM}
