"""The routes with scripted models: what is decided, in which order, and how it is said."""

from __future__ import annotations

import io
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from werkzeug.datastructures import MultiDict

from bootstrap import wait_for_store
from engines.base import Face, Template
from engines.face_attributes import FaceAttributes
from errors import FaceError
from gallery.decisions import Gallery
from photos.pixels import Pixels
from settings import Settings
from store.records import Enrolment
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_face, a_photo, a_template, jpeg

BAD_THRESHOLDS = ["", "x", "nan", "inf", "-inf", "1e999", "0.39", "1.01", "\u0660\u066b\u0665", "0x1", "1_0", "0,5"]
# What the test client answers is read as JSON throughout, which its types do not promise.
Post = Callable[..., Any]


class FailingStore(SqliteStore):
    """A store that can be told to be out of reach."""

    down = False

    def entries(self, after: int, name: str | None = None) -> Iterator[Any]:
        if self.down:
            raise FaceError("database_unavailable", headers={"Retry-After": "5"})
        return super().entries(after, name)

    def ping(self) -> None:
        if self.down:
            raise FaceError("database_unavailable", headers={"Retry-After": "5"})
        super().ping()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def covering() -> ScriptedAttributes:
    return ScriptedAttributes()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FailingStore]:
    store = FailingStore(tmp_path / "faces.sqlite3")
    store.prepare()
    yield store
    store.close()


def client_of(engine: ScriptedEngine, covering: ScriptedAttributes, store: FailingStore, settings: Settings) -> Any:
    gallery = Gallery(store, engine.name, engine.dimension)
    return make_app(settings, engine, covering, store, gallery).test_client()


@pytest.fixture
def client(engine: ScriptedEngine, covering: ScriptedAttributes, store: FailingStore) -> Any:
    return client_of(engine, covering, store, Settings())


@pytest.fixture
def post(client: Any) -> Post:
    def post(route: str, photo: bytes | None = None, headers: dict[str, str] | None = None, **fields: str) -> Any:
        data: dict[str, Any] = dict(fields)
        data["file"] = (io.BytesIO(jpeg(a_photo()) if photo is None else photo), "photo.jpg")
        return client.post(route, data=data, headers=headers)

    return post


def photos_of(route: str) -> dict[str, Any]:
    """The photos that a route takes, as a form's files."""
    names = ["file1", "file2"] if route == "/compare" else ["file"]
    return {name: (io.BytesIO(jpeg(a_photo())), "photo.jpg") for name in names}


class SlowStore(FailingStore):
    """A store whose log is read as far as `released` allows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached, self.released = threading.Event(), threading.Event()

    def entries(self, after: int, name: str | None = None) -> Iterator[Any]:
        for entry in super().entries(after, name):
            if entry.seq == 4000:
                self.reached.set()
                assert self.released.wait(30)
            yield entry


def count(store: FailingStore) -> int:
    return sum(1 for entry in store.entries(0) if entry.template is not None)


def test_the_liveness_probe_answers_in_the_words_that_clients_know(client: Any) -> None:
    response = client.get("/")
    assert (response.status_code, response.json) == (
        200,
        {"status": "success", "message": "Face Recognition API is running"},
    )


@pytest.mark.parametrize("route", ["/signUp", "/signup"])
def test_a_sign_up_answers_the_user_id_in_the_words_that_clients_know(post: Post, route: str) -> None:
    response = post(route)
    assert response.status_code == 200
    user_id = response.json["user_id"]
    assert uuid.UUID(user_id).version == 4
    assert response.json == {
        "status": "success",
        "message": f"Face stored successfully with user_id: {user_id}",
        "user_id": user_id,
    }


def test_an_enrolled_face_is_refused_as_a_duplicate_without_naming_whose_it_is(post: Post, store: FailingStore) -> None:
    user_id = post("/signUp").json["user_id"]
    again = post("/signUp")
    assert (again.status_code, again.json["code"]) == (409, "duplicate_face")
    assert again.json["message"] == "This face already exists in the database"
    assert user_id not in again.text
    assert count(store) == 1


def test_a_stretched_photo_of_an_enrolled_person_is_a_duplicate(
    post: Post, engine: ScriptedEngine, covering: ScriptedAttributes, store: FailingStore
) -> None:
    post("/signUp")
    covering.seen = FaceAttributes(stretch=1.2)
    engine.templates = [a_template(3), a_template(1)]  # as it is, and unstretched
    assert post("/signUp").json["code"] == "duplicate_face"
    engine.templates = [a_template(3), a_template(5)]
    assert post("/signUp").status_code == 200
    assert count(store) == 2


def test_a_match_is_told_with_its_similarity(post: Post, engine: ScriptedEngine) -> None:
    user_id = post("/signUp").json["user_id"]
    other = a_template(2)
    engine.template = _at_cosine(engine.template, other, 0.9412)
    assert post("/verify").json == {
        "status": "success",
        "message": "Face verified successfully with confidence: 0.94",
        "verified": True,
        "user_id": user_id,
        "similarity": 0.9412,
        "threshold": 0.5,
    }


def test_a_stranger_is_not_verified(post: Post, engine: ScriptedEngine) -> None:
    post("/signUp")
    engine.template = _at_cosine(engine.template, a_template(2), 0.49)
    response = post("/verify")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "FaceMatch"
    assert response.json == {
        "status": "error",
        "code": "no_match",
        "message": "No matching face found",
        "request_id": response.headers["X-Request-ID"],
        "verified": False,
    }


def test_nobody_is_verified_against_an_empty_gallery(post: Post) -> None:
    assert post("/verify").json["code"] == "no_match"


def test_whoever_would_verify_cannot_enrol_again(post: Post, engine: ScriptedEngine, store: FailingStore) -> None:
    enrolled = engine.template
    post("/signUp")
    for cosine in (0.499, 0.501):
        engine.template = _at_cosine(enrolled, a_template(3), cosine)
        verified = post("/verify").status_code == 200
        refused = post("/signUp").json.get("code") == "duplicate_face"
        assert verified == refused == (cosine > 0.5)


def test_similarities_mean_the_same_on_a_model_with_another_scale(post: Post, engine: ScriptedEngine) -> None:
    engine.cosine_at_half = 0.9
    enrolled = engine.template
    post("/signUp")
    engine.template = _at_cosine(enrolled, a_template(2), 0.95)
    assert post("/verify").json["similarity"] == pytest.approx(0.75, abs=1e-3)
    engine.template = _at_cosine(enrolled, a_template(2), 0.89)
    assert post("/verify").json["code"] == "no_match"


@pytest.mark.parametrize("text", BAD_THRESHOLDS)
def test_a_threshold_that_is_no_number_in_range_is_refused(post: Post, text: str, engine: ScriptedEngine) -> None:
    response = post("/verify", threshold=text)
    assert (response.status_code, response.json["code"]) == (400, "invalid_threshold")
    assert engine.detections == 0


@pytest.mark.parametrize(("text", "status"), [("0.4", 200), ("0.6", 200), ("6e-1", 200), ("0.95", 401), ("1", 401)])
def test_a_caller_can_set_the_threshold_from_the_floor_up(
    post: Post, engine: ScriptedEngine, text: str, status: int
) -> None:
    post("/signUp")
    engine.template = _at_cosine(engine.template, a_template(2), 0.9)
    assert post("/verify", threshold=text).status_code == status


def test_a_claimed_user_id_is_compared_with_that_person_alone(post: Post, engine: ScriptedEngine) -> None:
    first, second = a_template(1), a_template(2)
    engine.template = first
    first_id = post("/signUp").json["user_id"]
    engine.template = _at_cosine(first, second, 0.1)
    second_id = post("/signUp").json["user_id"]
    assert post("/verify", user_id=second_id.upper()).json["user_id"] == second_id
    assert post("/verify", user_id=first_id).json["code"] == "no_match"
    assert post("/verify", user_id=str(uuid.uuid4())).json["code"] == "unknown_user"
    assert post("/verify", user_id="me").json["code"] == "invalid_user_id"


@pytest.mark.parametrize(
    ("faces", "code"),
    [
        ([], "no_face"),
        ([a_face(), a_face(20)], "multiple_faces"),
        ([a_face(inter_eye_distance=12)], "face_too_small"),
        ([a_face(centre=(10.0, 140.0))], "face_cut_off"),
        ([a_face(roll_deg=55)], "head_tilted"),
    ],
)
def test_a_refused_photo_answers_with_its_code_and_stores_nothing(
    post: Post, engine: ScriptedEngine, store: FailingStore, faces: list[Any], code: str
) -> None:
    engine.faces = faces
    response = post("/signUp")
    assert (response.status_code, response.json["code"]) == (422, code)
    failed = [check["code"] for check in response.json["checks"] if not check["passed"]]
    assert failed[0] == code
    assert count(store) == 0


def test_a_refused_photo_never_pays_for_recognition(
    post: Post, engine: ScriptedEngine, covering: ScriptedAttributes
) -> None:
    covering.seen = FaceAttributes(mask=0.99, sunglasses=0.0, other=0.0, hidden=0.99)
    assert post("/verify").json["code"] == "mask"
    assert (engine.detections, engine.embeddings) == (1, 0)


def test_shut_eyes_and_distortion_refuse_a_photo_to_be_stored_and_nobody_who_is_only_compared(
    client: Any, post: Post, covering: ScriptedAttributes
) -> None:
    post("/signUp")
    covering.seen = FaceAttributes(eyes_shut=0.99, likeness=0.0, damaged=0.99)
    assert post("/signUp").json["code"] == post("/analyze").json["code"] == "eyes_closed"
    assert post("/verify").status_code == client.post("/compare", data=photos_of("/compare")).status_code == 200


def test_each_model_runs_once_for_a_sign_up(post: Post, engine: ScriptedEngine) -> None:
    post("/signUp")
    assert (engine.detections, engine.embeddings) == (1, 1)


def test_a_photo_whose_alignment_degenerates_is_refused(post: Post, engine: ScriptedEngine) -> None:
    face = a_face()
    face.landmarks[:] = 100.0
    engine.faces = [face]
    response = post("/signUp")
    assert (response.status_code, response.json["code"]) == (422, "landmarks_hidden")


def test_a_retry_with_the_same_idempotency_key_answers_what_the_first_attempt_answered(
    post: Post, store: FailingStore
) -> None:
    headers = {"Idempotency-Key": "9b2f"}
    first = post("/signUp", headers=headers)
    assert first.json == post("/signUp", headers=headers).json
    assert post("/signUp", headers={"Idempotency-Key": "other"}).json["code"] == "duplicate_face"
    assert count(store) == 1


def test_an_idempotency_key_repeated_with_another_photo_is_a_conflict(
    post: Post, store: FailingStore, engine: ScriptedEngine
) -> None:
    headers = {"Idempotency-Key": "9b2f"}
    first = post("/signUp", headers=headers)
    engine.template = -a_template(1)
    response = post("/signUp", jpeg(a_photo(size=(362, 320))), headers=headers)
    assert (response.status_code, response.json["code"]) == (409, "idempotency_conflict")
    assert "user_id" not in response.json
    assert post("/signUp", headers=headers).json == first.json
    assert count(store) == 1


FORM_ROUTES = ["/signUp", "/verify", "/compare", "/analyze"]


@pytest.mark.parametrize("route", FORM_ROUTES)
@pytest.mark.parametrize(
    "name", ["userId", "User_Id", "user-id", "USER_ID", "Threshold", "File", "file_1", "user_id[]"]
)
def test_a_field_spelt_in_another_style_is_refused_by_its_name(client: Any, route: str, name: str) -> None:
    response = client.post(route, data={**photos_of(route), name: "0.5"})
    assert (response.status_code, response.json["code"], response.json["field"]) == (400, "unknown_field", name)
    assert name in response.json["message"]
    response = client.post(route, data={**photos_of(route), name: (io.BytesIO(b"0.5"), "blob")})
    assert (response.status_code, response.json["code"]) == (400, "unknown_field")


@pytest.mark.parametrize("route", FORM_ROUTES)
@pytest.mark.parametrize("name", ["user_id", "threshold", "file", "userId"])
def test_a_known_field_in_the_query_string_is_refused(client: Any, route: str, name: str) -> None:
    response = client.post(f"{route}?{name}=0.9", data=photos_of(route))
    assert (response.status_code, response.json["code"], response.json["field"]) == (400, "unknown_field", name)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", f"/users/{uuid.UUID(int=1)}"),
     ("DELETE", f"/users/{uuid.UUID(int=1)}")],
)  # fmt: skip
def test_a_route_without_a_form_refuses_the_fields_of_the_others(client: Any, method: str, path: str) -> None:
    assert client.open(f"{path}?user_id={uuid.uuid4()}", method=method).json["code"] == "unknown_field"
    if "users" in path:
        response = client.open(path, method=method, data={"user_id": str(uuid.uuid4())})
        assert response.json["code"] == "unknown_field"


@pytest.mark.parametrize(
    ("route", "name"), [("/signUp", "user_id"), ("/signUp", "threshold"), ("/analyze", "user_id"), ("/verify", "file1")]
)
def test_a_field_of_another_route_is_refused(client: Any, route: str, name: str) -> None:
    response = client.post(route, data={**photos_of(route), name: str(uuid.uuid4())})
    assert (response.status_code, response.json["code"]) == (400, "unknown_field")


@pytest.mark.parametrize("route", FORM_ROUTES)
def test_a_callers_own_fields_are_ignored(client: Any, route: str) -> None:
    data = {**photos_of(route), "name": "Anna", "id": "7", "user": "x", "avatar": (io.BytesIO(b"x"), "a.png")}
    assert client.post(f"{route}?utm_source=app", data=data).json.get("code") in (None, "no_match")


def test_a_claim_sent_as_a_blob_counts(client: Any, post: Post, engine: ScriptedEngine) -> None:
    somebody = post("/signUp").json["user_id"]
    engine.template = -a_template(1)
    somebody_else = post("/signUp").json["user_id"]

    def verify(**blobs: str) -> Any:
        data = {name: (io.BytesIO(value.encode()), "blob") for name, value in blobs.items()}
        return client.post("/verify", data={**photos_of("/verify"), **data}).json

    assert verify(user_id=somebody_else)["user_id"] == somebody_else
    assert verify(user_id=somebody)["code"] == "no_match"
    assert verify(user_id=somebody_else, threshold="0.9")["threshold"] == 0.9
    assert verify(threshold="2")["code"] == "invalid_threshold"


def test_a_claim_sent_both_as_text_and_as_a_blob_is_refused(client: Any) -> None:
    data = MultiDict([("user_id", str(uuid.uuid4())), ("user_id", (io.BytesIO(str(uuid.uuid4()).encode()), "blob"))])
    data.update(photos_of("/verify"))
    assert client.post("/verify", data=data).json["code"] == "invalid_user_id"


def test_a_photo_under_another_name_is_told_by_that_name(client: Any) -> None:
    files = {"image": (io.BytesIO(jpeg(a_photo())), "a.jpg"), "photo\u202e": (io.BytesIO(b"x"), "b.jpg")}
    response = client.post("/verify", data=files)
    assert response.json["code"] == "no_file"
    assert "'file'" in response.json["message"]
    assert "'image', 'photo?'" in response.json["message"]


def test_a_photo_is_read_whatever_its_files_name_is(client: Any) -> None:
    for disposition in (
        b'name="file"; filename="J\xfcrgen.jpg"',
        b'name="file"; filename="\xd5\xd5\xc6\xac.jpg"',
        b'name="file"; filename="\x8e\xca\x90^\x95\x5c"',
        b'name="file"',
        b"name=file; filename*=UTF-8''%e5%86%99.jpg",
    ):
        photo = jpeg(a_photo()) + bytes(2**18)
        body = b"--XYZ\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + photo + b"\r\n--XYZ--\r\n"
        response = client.post("/analyze", data=body, content_type="multipart/form-data; boundary=XYZ")
        assert response.status_code == 200, (disposition, response.json)


@pytest.mark.parametrize(
    ("form", "boundary"),
    [
        (b'--XYZ\r\nContent-Disposition: form-data; name="file"\r\n\r\n\xff\xd8\xff', "XYZ"),
        (b'--XYZ\r\nContent-Disposition: form-data; name="file"\r\n\r\nphoto\r\n--XYZ--\r\n', "other"),
        (b'--XYZ\r\nContent-Disposition: form-data; name="file"\r\n\r\nphoto\r\n--XYZ--\r\n', ""),
    ],
    ids=["cut off", "another boundary", "no boundary"],
)
def test_a_damaged_form_is_not_taken_for_one_without_a_photo(client: Any, form: bytes, boundary: str) -> None:
    response = client.post("/analyze", data=form, content_type=f"multipart/form-data; boundary={boundary}")
    assert (response.status_code, response.json["code"]) == (400, "bad_request")
    assert "damaged or cut off" in response.json["message"]


def test_a_form_that_is_announced_and_not_sent_is_empty(client: Any) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=XYZ"}
    assert client.post("/analyze", headers=headers).json["code"] == "no_file"
    assert client.get(f"/users/{uuid.uuid4()}", headers=headers).json["code"] == "unknown_user"


def test_a_text_is_bounded_even_if_it_comes_as_a_file(client: Any) -> None:
    data = {**photos_of("/verify"), "user_id": (io.BytesIO(bytes(2**18)), "blob")}
    assert client.post("/verify", data=data).json["code"] == "bad_request"


def test_a_search_that_failed_is_no_answer(post: Post, store: FailingStore, engine: ScriptedEngine) -> None:
    post("/signUp")
    store.down = True
    for route in ("/signUp", "/verify"):
        response = post(route)
        assert (response.status_code, response.json["code"]) == (503, "database_unavailable")
        assert int(response.headers["Retry-After"]) > 0
    store.down = False
    assert post("/verify").status_code == 200
    assert post("/signUp").json["code"] == "duplicate_face"


def test_readiness_follows_the_database_and_tells_what_the_gallery_holds(
    client: Any, post: Post, store: FailingStore
) -> None:
    post("/signUp")
    ready = client.get("/health")
    assert ready.status_code == 200
    assert ready.json["gallery"]["enrolled"] == 1
    assert (ready.json["model"], ready.json["store"]) == ("scripted-v1", "SQLite")
    store.down = True
    assert client.get("/health").status_code == 503
    assert client.get("/").status_code == 200


def test_an_unforeseen_error_tells_the_client_nothing_of_itself(post: Post, engine: ScriptedEngine) -> None:
    engine.faces = [object()]  # type: ignore[list-item]  # the fault under test
    response = post("/signUp")
    assert (response.status_code, response.json["code"]) == (500, "internal_error")
    assert "object" not in response.text
    assert set(response.json) == {"status", "code", "message", "request_id"}


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("<script>", False)]
)
def test_a_sane_request_id_is_kept_and_any_other_replaced(client: Any, sent: str, kept: bool) -> None:
    answered = client.get("/", headers={"X-Request-ID": sent}).headers["X-Request-ID"]
    assert (answered == sent) is kept
    assert answered


def test_who_would_wait_too_long_is_refused_at_once_while_accepted_ones_are_served(
    engine: ScriptedEngine, covering: ScriptedAttributes, store: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.model_slots.FIRST_MODEL_SECONDS", 100.0)
    settings = Settings(model_slots=1, queue_wait_s=150)
    client = client_of(engine, covering, store, settings)
    engine.released.clear()
    answers: list[Any] = []
    photo = jpeg(a_photo())

    def verify() -> None:
        answers.append(client.application.test_client().post("/verify", data={"file": (io.BytesIO(photo), "p.jpg")}))

    callers = [threading.Thread(target=verify) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(0.1)
    assert [answer.json["code"] for answer in answers] == ["overloaded"] * 2
    assert all(answer.headers["Retry-After"] for answer in answers)
    assert client.get("/").status_code == 200
    engine.released.set()
    for caller in callers:
        caller.join(20)
    assert [answer.json["code"] for answer in answers[2:]] == ["no_match"] * 2


@pytest.mark.parametrize("route", ["/signUp", "/verify", "/compare"])
def test_a_challenge_for_which_the_service_was_too_busy_is_sent_again_and_then_used_up(
    engine: ScriptedEngine,
    covering: ScriptedAttributes,
    store: FailingStore,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
) -> None:
    monkeypatch.setattr("engines.model_slots.FIRST_MODEL_SECONDS", 100.0)
    client = client_of(engine, covering, store, Settings(model_slots=1, queue_wait_s=50))
    challenge_id = client.post("/challenges").json["challenge_id"]

    def code() -> str:
        sent = {**photos_of(route), "challenge_id": challenge_id, "frame": (io.BytesIO(jpeg(a_photo())), "f.jpg")}
        return str(client.post(route, data=sent).json["code"])

    engine.released.clear()
    others = client.application.test_client()
    busy = threading.Thread(target=lambda: others.post("/analyze", data=photos_of("/analyze")))
    busy.start()
    while engine.detections == 0:
        time.sleep(0.01)
    assert code() == "overloaded"
    engine.released.set()
    busy.join(20)
    assert [code(), code()] == ["challenge_failed", "challenge_used"]


def test_probes_are_answered_while_the_database_hangs(
    engine: ScriptedEngine, covering: ScriptedAttributes, tmp_path: Path
) -> None:
    store = SlowStore(tmp_path / "faces.sqlite3")
    store.prepare()
    store.append(1, [Enrolment(str(n), a_template(n), engine.name, 1.0) for n in range(4000)])
    client = client_of(engine, covering, store, Settings())
    for _ in range(3):
        assert (client.get("/health").status_code, client.get("/").status_code) == (503, 200)
    store.released.set()
    deadline = time.monotonic() + 20
    while client.get("/health").status_code != 200:
        assert time.monotonic() < deadline
    store.close()


def test_a_database_that_comes_up_late_is_waited_for_and_one_that_never_does_is_reported(tmp_path: Path) -> None:
    class LateStore(SqliteStore):
        attempts = 0

        def prepare(self) -> None:
            self.attempts += 1
            if self.attempts < 2:
                raise FaceError("database_unavailable") from OSError()
            super().prepare()

    late = LateStore(tmp_path / "late.sqlite3")
    assert wait_for_store(lambda: late, 30) is late
    assert late.attempts == 2
    with pytest.raises(FaceError, match="database_unavailable"):
        wait_for_store(lambda: LateStore(tmp_path / "never.sqlite3"), 0)


def _at_cosine(template: Any, other: Any, cosine: float) -> Any:
    """A unit vector at this cosine to `template`, in the plane of the two."""
    aside = other - (other @ template) * template
    aside /= np.linalg.norm(aside)
    mixed = cosine * template + np.sqrt(1 - cosine**2) * aside
    return np.asarray(mixed / np.linalg.norm(mixed), np.float32)


def test_while_the_gallery_loads_its_progress_is_told_and_nothing_is_decided(
    engine: ScriptedEngine, covering: ScriptedAttributes, tmp_path: Path
) -> None:
    store = SlowStore(tmp_path / "faces.sqlite3")
    store.prepare()
    people = [Enrolment(f"user {number}", a_template(number), engine.name, 1.0) for number in range(4500)]
    store.append(1, people)
    gallery = Gallery(store, engine.name, engine.dimension)
    client: Any = make_app(Settings(), engine, covering, store, gallery).test_client()
    loading = threading.Thread(target=gallery.load)
    loading.start()
    assert store.reached.wait(30)
    health = client.get("/health")
    assert (health.status_code, health.json["code"], health.json["gallery"]) == (
        503,
        "not_ready",
        {"applied": 2000, "of": 4500},
    )
    for route in ("/signUp", "/verify"):
        answer = client.post(route, data={"file": (io.BytesIO(jpeg(a_photo())), "photo.jpg")})
        assert (answer.status_code, answer.json["code"], answer.headers["Retry-After"]) == (503, "not_ready", "5")
    assert client.get("/").status_code == 200
    store.released.set()
    loading.join(30)
    assert client.get("/health").json["gallery"]["enrolled"] == 4500
    store.close()


class ShrinkingEngine(ScriptedEngine):
    """Finds the face of a 360 x 320 photo at the place where it is in a copy of any size, and keeps the copies."""

    def __init__(self, inter_eye: float) -> None:
        super().__init__()
        self.inter_eye = inter_eye
        self.seen: list[tuple[int, ...]] = []
        self.embedded: list[tuple[tuple[int, ...], float]] = []

    def detect(self, image: Pixels) -> list[Face]:
        self.seen.append(image.shape[:2])
        whole = max(image.shape) / 3600
        return [a_face(self.inter_eye * whole, (1600 * whole, 1400 * whole))]

    def embed(self, image: Pixels, face: Face) -> Template:
        self.embedded.append((image.shape[:2], face.inter_eye))
        return super().embed(image, face)


@pytest.mark.parametrize(("inter_eye", "decoded"), [(600.0, 1800), (176.0, 1800), (100.0, 3600)])
def test_a_large_photo_is_measured_in_a_copy_that_keeps_enough_of_the_face_and_in_its_own_pixels(
    covering: ScriptedAttributes, store: FailingStore, inter_eye: float, decoded: int
) -> None:
    engine = ShrinkingEngine(inter_eye)
    client = client_of(engine, covering, store, Settings(max_head_size=10, min_face_in_frame=0))
    large = cv2.resize(a_photo(), (3200, 3600), interpolation=cv2.INTER_CUBIC)
    answer = client.post("/signUp", data={"file": (io.BytesIO(jpeg(np.asarray(large, np.uint8))), "photo.jpg")})
    ((shape, embedded_inter_eye),) = engine.embedded or [((0, 0), 0.0)]
    checks = {check["code"]: check["measured"] for check in (answer.json.get("checks") or [])}
    if answer.status_code == 200:
        assert shape[0] == decoded
        assert embedded_inter_eye == pytest.approx(inter_eye * decoded / 3600, abs=1)
    else:
        assert checks["face_too_small"] == pytest.approx(inter_eye, abs=2)
    assert engine.seen == [(1800, 1600)]


def test_an_analysis_says_what_every_check_found_and_where_the_face_is(engine: ScriptedEngine, client: Any) -> None:
    answer = client.post("/analyze", data={"file": (io.BytesIO(jpeg(a_photo())), "p.jpg")}).json
    assert (answer["status"], answer["accepted"], answer["code"]) == ("success", True, None)
    assert answer["image"] == {"width": 320, "height": 360}
    assert answer["faces"][0]["landmarks"] == np.round(engine.faces[0].landmarks.astype(float), 1).tolist()
    assert {check["code"] for check in answer["checks"]} >= {"blurred", "mask", "head_turned"}
    assert engine.embeddings == 0


def test_an_analysis_of_a_photo_that_would_be_refused_is_an_answer_with_hints(
    engine: ScriptedEngine, covering: ScriptedAttributes, post: Post
) -> None:
    covering.seen = FaceAttributes(mask=0.9, sunglasses=0.0, other=0.0, hidden=0.0)
    answer = post("/analyze")
    assert (answer.status_code, answer.json["accepted"], answer.json["code"]) == (200, False, "mask")
    assert next(check["hint"] for check in answer.json["checks"] if check["code"] == "mask") == "Take off your mask."
    engine.faces = []
    assert (post("/analyze").json["code"], post("/analyze").json["faces"]) == ("no_face", [])


def test_an_analysis_of_what_is_no_photo_is_refused(post: Post) -> None:
    assert post("/analyze", b"text").json["code"] == "unsupported_format"


def test_the_places_in_an_analysis_are_those_of_the_photo_as_it_was_sent(engine: ScriptedEngine, client: Any) -> None:
    large = np.asarray(cv2.resize(a_photo(), None, fx=12, fy=12), np.uint8)
    answer = client.post("/analyze", data={"file": (io.BytesIO(jpeg(large)), "p.jpg")}).json
    assert answer["image"] == {"width": 3840, "height": 4320}
    assert answer["faces"][0]["box"][2] == pytest.approx(2 * float(engine.faces[0].box[2]), rel=0.02)


def both(one: bytes, other: bytes) -> dict[str, Any]:
    return {"file1": (io.BytesIO(one), "1.jpg"), "file2": (io.BytesIO(other), "2.jpg")}


def test_two_photos_are_compared_and_nothing_is_stored(
    engine: ScriptedEngine, client: Any, store: FailingStore
) -> None:
    answer = client.post("/compare", data=both(jpeg(a_photo()), jpeg(a_photo())))
    assert (answer.status_code, answer.json["match"], answer.json["similarity"]) == (200, True, 1.0)
    assert (engine.embeddings, count(store)) == (2, 0)


def test_two_different_people_do_not_match_and_that_is_no_error(engine: ScriptedEngine, client: Any) -> None:
    engine.templates = [a_template(1), -a_template(1)]
    answer = client.post("/compare", data=both(jpeg(a_photo()), jpeg(a_photo())))
    assert (answer.status_code, answer.json["match"], answer.json["similarity"]) == (200, False, -1.0)


@pytest.mark.parametrize(
    ("cosine", "threshold", "told"),
    [
        (0.49996, "0.5", (0.4999, False)),
        (0.50004, "0.5", (0.5, True)),
        (0.60004, "0.60003", (0.6001, True)),
        (0.60002, "0.60003", (0.6, False)),
        (0.8, "0.8001", (0.8, False)),
    ],
)
def test_no_similarity_is_told_from_the_other_side_of_the_threshold(
    post: Post, engine: ScriptedEngine, client: Any, cosine: float, threshold: str, told: tuple[float, bool]
) -> None:
    one, other = a_template(1), _at_cosine(a_template(1), a_template(2), cosine)
    post("/signUp")
    engine.templates = [one, other, other]
    compared = client.post("/compare", data=both(jpeg(a_photo()), jpeg(a_photo())) | {"threshold": threshold}).json
    assert (compared["similarity"], compared["match"]) == told
    assert compared["message"] == ("The faces match." if told[1] else "The faces do not match.")
    verified = post("/verify", threshold=threshold).json
    assert (verified.get("similarity", told[0]), verified["verified"]) == told


def test_a_comparison_says_which_of_the_photos_was_refused(client: Any) -> None:
    answer = client.post("/compare", data=both(jpeg(a_photo()), b"text"))
    assert (answer.status_code, answer.json["code"], answer.json["field"]) == (415, "unsupported_format", "file2")
    answer = client.post("/compare", data={"file1": (io.BytesIO(jpeg(a_photo())), "1.jpg")})
    assert (answer.status_code, answer.json["code"], answer.json["field"]) == (400, "no_file", "file2")
    assert answer.json["message"] == "No photo was sent. Post it as the form-data field 'file2'."


def test_a_comparison_without_its_second_photo_uses_no_challenge_up(client: Any) -> None:
    asked = {"challenge_id": client.post("/challenges").json["challenge_id"]}
    alone = {"file1": photos_of("/compare")["file1"]}
    assert client.post("/compare", data=asked | alone).json["code"] == "no_file"
    frame = {"frame": (io.BytesIO(jpeg(a_photo())), "f.jpg")}
    assert client.post("/compare", data=asked | photos_of("/compare") | frame).json["code"] == "challenge_failed"


def test_two_photos_of_the_largest_size_each_fit_into_one_comparison(
    engine: ScriptedEngine, covering: ScriptedAttributes, store: FailingStore
) -> None:
    limit = len(jpeg(a_photo())) + 10
    client = client_of(engine, covering, store, Settings(max_file_bytes=limit))
    padded = jpeg(a_photo()) + b"\0" * 10
    assert client.post("/compare", data=both(padded, padded)).status_code == 200
    assert client.post("/compare", data=both(padded, padded + b"\0")).json["code"] == "file_too_large"


@pytest.mark.parametrize("over", [1, 2**20])  # found by the decoder, and by the form's parser before it
def test_a_file_that_is_too_large_is_told_the_limit(
    engine: ScriptedEngine, covering: ScriptedAttributes, store: FailingStore, over: int
) -> None:
    client = client_of(engine, covering, store, Settings(max_file_bytes=2**21))
    answer = client.post("/signUp", data={"file": (io.BytesIO(bytes(2**21 + over)), "me.jpg")})
    assert (answer.status_code, answer.json["code"]) == (413, "file_too_large")
    assert answer.json["message"] == "The photo's file is larger than 2 MiB."


def test_an_enrolled_person_can_be_asked_for_and_erased(post: Post, client: Any) -> None:
    user_id = post("/signUp").json["user_id"]
    found = client.get(f"/users/{user_id.upper()}").json
    assert (found["user_id"], found["model"], found["enrolled_at"][:2]) == (user_id, "scripted-v1", "20")
    erased = client.delete(f"/users/{user_id}")
    assert (erased.status_code, erased.json["user_id"]) == (200, user_id)
    assert [client.get(f"/users/{user_id}").status_code, client.delete(f"/users/{user_id}").status_code] == [404, 404]
    assert post("/verify").status_code == 401
    assert post("/signUp").status_code == 200


@pytest.mark.parametrize("method", ["get", "delete"])
def test_what_is_no_user_id_is_told_so(client: Any, method: str) -> None:
    answer = getattr(client, method)("/users/somebody")
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_user_id")
