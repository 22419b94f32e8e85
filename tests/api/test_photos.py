"""The routes of a person's photos: what adds one, what removes one, and what each answers."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Template
from engines.face_attributes import FaceAttributes
from errors import FaceError
from face_checks import ONLY_FOR_ENROLMENT
from gallery.decisions import Gallery
from settings import Settings
from store.audit_log import AuditLog, lines_of
from store.records import RecordStore
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import DIMENSION, ScriptedAttributes, ScriptedEngine, a_photo, jpeg

Add = Callable[..., Any]


def a_template(angle: float, axis: int = 1) -> Template:
    """A template at this angle (degrees) to the first axis."""
    template = np.zeros(DIMENSION, np.float32)
    template[0], template[axis] = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return template


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    yield store
    store.close()


def client_of(settings: Settings, engine: ScriptedEngine, store: RecordStore, gallery: Gallery, audit: AuditLog) -> Any:
    """A client whose `reader` says what the next photo's face is like."""
    reader = ScriptedAttributes()
    client: Any = make_app(settings, engine, reader, store, gallery, audit=audit).test_client()
    client.reader = reader
    return client


@pytest.fixture
def client(engine: ScriptedEngine, store: SqliteStore, tmp_path: Path) -> Any:
    gallery = Gallery(store, engine.name, engine.dimension)
    settings, audit = Settings(max_photos=3), AuditLog(tmp_path / "audit", 365)
    return client_of(settings, engine, store, gallery, audit)


@pytest.fixture
def add(client: Any, engine: ScriptedEngine) -> Add:
    def add(route: str, template: Template, photo: bytes = b"", key: str | None = None, **fields: str) -> Any:
        engine.template = template
        headers = {} if key is None else {"Idempotency-Key": key}
        data = {"file": (io.BytesIO(jpeg(a_photo()) + photo), "photo.jpg"), **fields}
        return client.post(route, data=data, headers=headers)

    return add


@pytest.fixture
def user_id(add: Add) -> str:
    return str(add("/signUp", a_template(0)).json["user_id"])


def test_a_photo_is_added_and_the_person_is_found_by_it(client: Any, add: Add, user_id: str) -> None:
    probe = a_template(80)
    assert add("/verify", probe).status_code == 401
    added = add(f"/users/{user_id}/photos", a_template(50))
    assert (added.status_code, added.json) == (
        200,
        {"status": "success", "message": "The photo is added to this person.", "user_id": user_id, "photos": 2},
    )
    found = add("/verify", probe)
    expected = (np.cos(np.deg2rad(30)) + (np.cos(np.deg2rad(30)) + np.cos(np.deg2rad(80))) / 2) / 2
    assert (found.status_code, found.json["user_id"]) == (200, user_id)
    assert found.json["similarity"] == pytest.approx(expected, abs=1e-4)
    told = client.get(f"/users/{user_id}").json
    assert (told["photos"], [photo["number"] for photo in told["photo_list"]]) == (2, [1, 2])
    assert told["enrolled_at"] == told["photo_list"][0]["enrolled_at"]
    assert client.get("/health").json["gallery"]["photos"] == 2
    assert client.get("/health").json["gallery"]["enrolled"] == 1


def test_a_photo_of_another_person_is_no_match_in_the_words_of_verify(add: Add, user_id: str) -> None:
    answer = add(f"/users/{user_id}/photos", a_template(90))
    assert (answer.status_code, answer.json["code"], answer.json["verified"]) == (401, "no_match", False)
    assert answer.headers["WWW-Authenticate"] == "FaceMatch"


def test_a_photo_that_is_like_somebody_else_too_is_a_duplicate(add: Add, user_id: str) -> None:
    assert add("/signUp", a_template(80)).status_code == 200
    answer = add(f"/users/{user_id}/photos", a_template(40))
    assert (answer.status_code, answer.json["code"]) == (409, "duplicate_face")


def test_a_photo_that_the_checks_refuse_is_not_added(
    client: Any, add: Add, user_id: str, engine: ScriptedEngine
) -> None:
    engine.faces = []
    answer = add(f"/users/{user_id}/photos", a_template(0))
    assert (answer.status_code, answer.json["code"]) == (422, "no_face")
    assert client.get(f"/users/{user_id}").json["photos"] == 1


@pytest.mark.parametrize(
    ("somebody", "status", "code"),
    [(str(uuid.UUID(int=5)), 404, "unknown_user"), ("somebody", 400, "invalid_user_id")],
)
def test_who_is_not_enrolled_has_no_photos(client: Any, add: Add, somebody: str, status: int, code: str) -> None:
    for answer in (add(f"/users/{somebody}/photos", a_template(0)), client.delete(f"/users/{somebody}/photos/1")):
        assert (answer.status_code, answer.json["code"]) == (status, code)


def test_the_user_id_may_be_sent_in_capitals(client: Any, add: Add, user_id: str) -> None:
    assert add(f"/users/{user_id.upper()}/photos", a_template(10)).json["user_id"] == user_id
    assert client.delete(f"/users/{user_id.upper()}/photos/1").json["photos"] == 1


def test_a_retry_adds_nothing_and_another_photo_is_a_conflict(client: Any, add: Add, user_id: str) -> None:
    route = f"/users/{user_id}/photos"
    assert [add(route, a_template(10), key="a-key-of-mine").json["photos"] for _ in range(2)] == [2, 2]
    other = add(route, a_template(10), b"another file", key="a-key-of-mine")
    assert (other.status_code, other.json["code"]) == (409, "idempotency_conflict")
    assert client.get(f"/users/{user_id}").json["photos"] == 2
    # For a sign-up the same key is another one.
    assert add("/signUp", a_template(90), key="a-key-of-mine").json["user_id"] != user_id


def test_beyond_max_photos_the_oldest_goes(client: Any, add: Add, user_id: str) -> None:
    route = f"/users/{user_id}/photos"
    assert [add(route, a_template(angle)).json["photos"] for angle in (5, 10, 15)] == [2, 3, 3]
    assert [photo["number"] for photo in client.get(f"/users/{user_id}").json["photo_list"]] == [2, 3, 4]


def test_a_photo_is_removed_by_its_number_but_never_the_last(client: Any, add: Add, user_id: str) -> None:
    route = f"/users/{user_id}/photos"
    add(route, a_template(20))
    removed = client.delete(f"{route}/1")
    assert (removed.status_code, removed.json) == (
        200,
        {"status": "success", "message": "The photo is removed from this person.", "user_id": user_id, "photos": 1},
    )
    again, last = client.delete(f"{route}/1"), client.delete(f"{route}/2")
    assert [(one.status_code, one.json["code"]) for one in (again, last)] == [
        (404, "unknown_photo"),
        (409, "last_photo"),
    ]
    assert client.delete(f"{route}/first").status_code == 404
    assert add("/verify", a_template(20)).json["similarity"] == 1


def test_a_field_that_is_not_read_here_is_refused(client: Any, add: Add, user_id: str) -> None:
    answer = add(f"/users/{user_id}/photos", a_template(0), threshold="0.9")
    assert (answer.status_code, answer.json["code"]) == (400, "unknown_field")
    assert client.delete(f"/users/{user_id}/photos/1?user_id=x").json["code"] == "unknown_field"


def test_the_audit_log_tells_of_added_and_removed_photos(client: Any, add: Add, user_id: str, tmp_path: Path) -> None:
    add(f"/users/{user_id}/photos", a_template(20))
    add(f"/users/{user_id}/photos", a_template(90))
    client.delete(f"/users/{user_id}/photos/1")
    told = [(line["event"], line["code"], line["user_id"]) for _, line in lines_of(tmp_path / "audit")]
    assert told[1:] == [
        ("add photo", "ok", user_id),
        ("add photo", "no_match", user_id),
        ("remove photo", "ok", user_id),
    ]


def test_the_person_is_erased_with_every_photo(client: Any, add: Add, user_id: str, store: SqliteStore) -> None:
    add(f"/users/{user_id}/photos", a_template(20))
    assert client.delete(f"/users/{user_id}").status_code == 200
    assert list(store.embeddings(0)) == []
    assert add("/verify", a_template(20)).status_code == 401


# --- UPDATE_TEMPLATE: a verified photo adds itself ---


def an_updating_client(engine: ScriptedEngine, store: RecordStore, folder: Path, **settings: Any) -> Any:
    gallery, audit = Gallery(store, engine.name, engine.dimension), AuditLog(folder / "audit", 365)
    chosen = Settings(**{"update_template": "on_verify", **settings})
    return client_of(chosen, engine, store, gallery, audit)


def send(client: Any, engine: ScriptedEngine, route: str, angle: float, yaw_deg: float = 0.0, **fields: str) -> Any:
    """Send a photo with a template at this angle, of a face that is turned aside so far."""
    return send_of(FaceAttributes(yaw=yaw_deg), client, engine, route, angle, **fields)


def send_of(seen: FaceAttributes, client: Any, engine: ScriptedEngine, route: str, angle: float, **fields: str) -> Any:
    engine.template = a_template(angle)
    client.reader.seen = seen
    return client.post(route, data={"file": (io.BytesIO(jpeg(a_photo())), "photo.jpg"), **fields})


def stored_photos(store: SqliteStore) -> int:
    return len(list(store.embeddings(0)))


def test_off_adds_nothing_and_is_the_default(engine: ScriptedEngine, store: SqliteStore, tmp_path: Path) -> None:
    client = an_updating_client(engine, store, tmp_path, update_template=Settings().update_template)
    send(client, engine, "/signUp", 0, yaw_deg=30)
    assert send(client, engine, "/verify", 20).status_code == 200
    assert stored_photos(store) == 1


@pytest.mark.parametrize("claimed", [False, True])
def test_a_better_photo_far_above_the_threshold_adds_itself_once(
    engine: ScriptedEngine, store: SqliteStore, tmp_path: Path, claimed: bool
) -> None:
    client = an_updating_client(engine, store, tmp_path)
    user_id = send(client, engine, "/signUp", 0, yaw_deg=30).json["user_id"]
    fields = {"user_id": user_id.upper()} if claimed else {}
    answer = send(client, engine, "/verify", 40, **fields)
    similarity = round(float(np.cos(np.deg2rad(40))), 4)
    assert answer.json == {
        "status": "success",
        "message": f"Face verified successfully with confidence: {similarity:.2f}",
        "verified": True,
        "user_id": user_id,
        "similarity": similarity,
        "threshold": 0.5,
    }
    assert stored_photos(store) == 2
    send(client, engine, "/verify", 40, **fields)
    assert stored_photos(store) == 2
    told = [(line["event"], line["code"], line["user_id"]) for _, line in lines_of(tmp_path / "audit")]
    assert told == [(event, "ok", user_id) for event in ("enrol", "update", "verify", "verify")]


@pytest.mark.parametrize(
    ("angle", "yaw_deg", "fields"),
    [(55, 0, {}), (40, 0, {"threshold": "0.7"}), (20, 40, {}), (20, 30, {})],
    ids=["barely matching", "barely above the threshold that was asked for", "worse", "as good"],
)
def test_a_photo_that_matches_barely_or_is_not_better_adds_nothing(
    engine: ScriptedEngine, store: SqliteStore, tmp_path: Path, angle: float, yaw_deg: float, fields: dict[str, str]
) -> None:
    client = an_updating_client(engine, store, tmp_path)
    send(client, engine, "/signUp", 0, yaw_deg=30)
    assert send(client, engine, "/verify", angle, yaw_deg, **fields).status_code == 200
    assert stored_photos(store) == 1
    assert "update" not in [line["event"] for _, line in lines_of(tmp_path / "audit")]


@pytest.mark.parametrize(
    "seen", [FaceAttributes(eyes_shut=1.0), FaceAttributes(likeness=0.0), FaceAttributes(damaged=1.0)]
)
def test_shut_eyes_and_a_distorted_photo_verify_but_are_never_stored(
    engine: ScriptedEngine, store: SqliteStore, tmp_path: Path, seen: FaceAttributes
) -> None:
    client = an_updating_client(engine, store, tmp_path)
    user_id = send(client, engine, "/signUp", 0, yaw_deg=30).json["user_id"]
    assert send_of(seen, client, engine, "/verify", 0).status_code == 200
    (code,) = {
        send_of(seen, client, engine, route, 0).json["code"] for route in ("/signUp", f"/users/{user_id}/photos")
    }
    assert code in ONLY_FOR_ENROLMENT
    assert stored_photos(store) == 1


def test_a_photo_that_is_like_somebody_else_verifies_and_adds_nothing(
    engine: ScriptedEngine, store: SqliteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = an_updating_client(engine, store, tmp_path)
    user_id = send(client, engine, "/signUp", 0, yaw_deg=30).json["user_id"]
    send(client, engine, "/signUp", 80, yaw_deg=30)
    answer = send(client, engine, "/verify", 30)
    assert (answer.status_code, answer.json["user_id"]) == (200, user_id)
    assert stored_photos(store) == 2
    assert "The photo of a verified person is not added to them: duplicate_face" in caplog.text


def test_a_database_that_fails_while_a_photo_is_added_fails_no_verification(
    engine: ScriptedEngine,
    store: SqliteStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = an_updating_client(engine, store, tmp_path)
    send(client, engine, "/signUp", 0, yaw_deg=30)

    def fail(*_: object) -> int:
        raise FaceError("database_unavailable")

    monkeypatch.setattr(store, "append", fail)
    assert send(client, engine, "/verify", 20).status_code == 200
    assert "not added to them: database_unavailable" in caplog.text
    monkeypatch.undo()
    assert send(client, engine, "/verify", 20).status_code == 200
    assert stored_photos(store) == 2


def test_where_storing_a_photo_requires_a_challenge_a_verification_without_one_stores_none(
    engine: ScriptedEngine, store: SqliteStore, tmp_path: Path
) -> None:
    send(an_updating_client(engine, store, tmp_path), engine, "/signUp", 0, yaw_deg=30)
    client = an_updating_client(engine, store, tmp_path, challenge_sign_up="require")
    assert send(client, engine, "/verify", 20).status_code == 200
    assert stored_photos(store) == 1


def test_at_max_photos_the_better_photo_takes_the_oldest_ones_place(
    engine: ScriptedEngine, store: SqliteStore, tmp_path: Path
) -> None:
    client = an_updating_client(engine, store, tmp_path, max_photos=2)
    user_id = send(client, engine, "/signUp", 0, yaw_deg=40).json["user_id"]
    for yaw_deg in (30, 15, 0):
        assert send(client, engine, "/verify", 10, yaw_deg).status_code == 200
    assert [photo["number"] for photo in client.get(f"/users/{user_id}").json["photo_list"]] == [3, 4]


def test_a_photo_is_not_added_without_the_challenge_that_sign_ups_require(
    tmp_path: Path, engine: ScriptedEngine, store: RecordStore
) -> None:
    gallery = Gallery(store, engine.name, engine.dimension)
    person = gallery.enrol(engine.template, duplicate_cosine=0.9)
    settings = Settings(data_dir=tmp_path, challenge_sign_up="require")
    client: Any = make_app(settings, engine, ScriptedAttributes(), store, gallery).test_client()
    photo = {"file": (io.BytesIO(jpeg(a_photo())), "photo.jpg")}
    answer = client.post(f"/users/{person}/photos", data=photo)
    assert (answer.status_code, answer.json["code"]) == (422, "challenge_required")
    gallery.refresh()
    assert gallery.status()["photos"] == 1
