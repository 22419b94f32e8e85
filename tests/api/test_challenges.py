"""Challenges over HTTP: issued to an API key, used once, in time, with frames beside the photo."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from werkzeug.datastructures import MultiDict

from bootstrap import load_engine
from challenge.steps import MAX_FRAME_BYTES, MAX_FRAME_PIXELS, MAX_FRAMES, ORDERS
from engines.base import Engine
from engines.face_attributes import FaceAttributesModel
from gallery.decisions import Gallery
from settings import PROJECT, Settings
from store.challenges import CHALLENGE_SECONDS, IN_USE_SECONDS, KEPT_SECONDS
from store.records import RecordStore
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.conforming import assert_described
from tests.support.fakes import jpeg
from tests.support.filming import astronaut, frames_of
from tests.support.running import ASTRONAUT

ROUTES = ("/signUp", "/verify", "/compare")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models")
    return load_engine("compact", models_dir=folder, hub_timeout_s=0, threads=1, may_fall_back=False)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    return store


@pytest.fixture
def client_with(engine: Engine, store: RecordStore, tmp_path: Path) -> Callable[..., Any]:
    def client(**settings: Any) -> Any:
        gallery, reader = Gallery(store, engine.name, engine.dimension), FaceAttributesModel(PROJECT / "models")
        return make_app(Settings(data_dir=tmp_path, **settings), engine, reader, store, gallery).test_client()

    return client


@pytest.fixture
def client(client_with: Callable[..., Any]) -> Any:
    return client_with()


def ask(client: Any, key: str = "") -> Any:
    answer = client.post("/challenges", headers={"X-API-Key": key} if key else {})
    assert answer.status_code == 200, answer.json
    return answer.json


def send(
    client: Any,
    route: str,
    challenge_id: str | None = None,
    frames: Sequence[bytes] = (),
    headers: dict[str, str] | None = None,
    photo: bytes = ASTRONAUT,
) -> Any:
    form: MultiDict[str, Any] = MultiDict()
    for field in ("file1", "file2") if route == "/compare" else ("file",):
        form.add(field, (io.BytesIO(photo), "me.png"))
    if challenge_id is not None:
        form.add("challenge_id", challenge_id)
    for frame in frames:
        form.add("frame", (io.BytesIO(frame), "frame.jpg"))
    return client.post(route, data=form, headers=headers)


def outcome(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json.get("code", "ok")


def test_a_challenge_says_what_to_do_until_when_and_with_how_many_frames(client: Any) -> None:
    challenge = ask(client)
    assert tuple(challenge["steps"]) in ORDERS
    assert challenge["expires_in"] == 60
    assert challenge["frames"] == {"min": len(challenge["steps"]), "max": 12}
    assert ask(client)["challenge_id"] != challenge["challenge_id"]


@pytest.mark.parametrize("route", ROUTES)
def test_the_steps_that_were_asked_for_are_accepted_with_the_photo(client: Any, route: str) -> None:
    if route == "/verify":
        send(client, "/signUp")
    challenge = ask(client)
    answer = send(client, route, challenge["challenge_id"], frames_of(challenge["steps"]))
    assert outcome(answer) == (200, "ok")


def test_a_photo_is_added_with_a_challenge_and_only_for_a_person_who_turns(client_with: Callable[..., Any]) -> None:
    client = client_with(challenge_sign_up="require", challenge="accept")
    challenge = ask(client)
    person = send(client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"])).json["user_id"]
    answers = []
    for what in ("flat", "head"):
        challenge = ask(client)
        frames = frames_of(challenge["steps"], what)
        answers.append(send(client, f"/users/{person}/photos", challenge["challenge_id"], frames))
    assert [answer.status_code for answer in answers] == [422, 200]
    assert answers[0].json["code"] in ("challenge_failed", "not_live")
    assert answers[1].json["photos"] == 2
    again = send(client, f"/users/{person}/photos", challenge["challenge_id"], frames)
    assert outcome(again) == (409, "challenge_used")


@pytest.mark.parametrize("route", ROUTES)
def test_a_turned_print_is_refused_with_the_photos_checks_and_the_frames_checks(client: Any, route: str) -> None:
    challenge = ask(client)
    answer = send(client, route, challenge["challenge_id"], frames_of(challenge["steps"], "flat"))
    assert answer.status_code == 422
    assert answer.json["code"] in ("challenge_failed", "not_live")
    codes = [check["code"] for check in answer.json["checks"]]
    assert codes[0] == "multiple_faces"
    assert "challenge_failed" in codes
    api = client.get("/openapi.json").json
    assert_described(api, "POST", route, answer.status_code, answer.headers, answer.data)


def test_a_refused_sign_up_stores_nobody(client: Any, store: RecordStore) -> None:
    challenge = ask(client)
    send(client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"], "flat"))
    assert store.last_place() == 0


def test_a_challenge_is_used_once_whatever_became_of_it(client: Any) -> None:
    challenge = ask(client)
    frames = frames_of(challenge["steps"])
    assert outcome(send(client, "/compare", challenge["challenge_id"], frames[::-1])) == (422, "challenge_failed")
    again = send(client, "/compare", challenge["challenge_id"], frames)
    assert outcome(again) == (409, "challenge_used")
    assert_described(client.get("/openapi.json").json, "POST", "/compare", 409, again.headers, again.data)


def test_the_frames_of_one_challenge_do_not_answer_another(client: Any) -> None:
    first = ask(client)
    while (second := ask(client))["steps"] == first["steps"]:
        pass
    answer = send(client, "/compare", second["challenge_id"], frames_of(first["steps"]))
    assert outcome(answer) == (422, "challenge_failed")


def test_a_challenge_that_races_itself_is_used_by_one_request_alone(client_with: Callable[..., Any]) -> None:
    clients = [client_with() for _ in range(2)]
    challenge = ask(clients[0])
    frames = frames_of(challenge["steps"])
    answers: list[tuple[int, str]] = []
    together = threading.Barrier(len(clients))

    def race(client: Any) -> None:
        together.wait()
        answers.append(outcome(send(client, "/compare", challenge["challenge_id"], frames)))

    threads = [threading.Thread(target=race, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(200, "ok"), (409, "challenge_used")]


@pytest.mark.parametrize("jump_s", [CHALLENGE_SECONDS + 1, -3600.0])
def test_a_challenge_ends_with_its_time(client: Any, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    challenge = ask(client)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    answer = send(client, "/compare", challenge["challenge_id"], frames_of(challenge["steps"]))
    assert outcome(answer) == (422, "challenge_expired")
    assert [check["code"] for check in answer.json["checks"]] == ["challenge_expired"]


@pytest.mark.parametrize("challenge_id", ["", "x", "a" * 32, "\0", "{$ne: 1}", "é" * 500])
def test_a_made_up_challenge_is_refused(client: Any, challenge_id: str) -> None:
    answer = send(client, "/compare", challenge_id, [b"x"])
    assert answer.status_code == 422
    assert answer.json["code"] == ("challenge_expired" if challenge_id else "challenge_required")


def test_a_challenge_belongs_to_the_api_key_that_asked_for_it(client_with: Callable[..., Any]) -> None:
    secrets = ("fk_one", "fk_other")
    lines = [f"{name}:app:{hashlib.sha256(name.encode()).hexdigest()}" for name in secrets]
    client = client_with(api_keys=",".join(lines))
    challenge = ask(client, "fk_one")
    frames = frames_of(challenge["steps"])
    stolen = send(client, "/compare", challenge["challenge_id"], frames, {"X-API-Key": "fk_other"})
    own = send(client, "/compare", challenge["challenge_id"], frames, {"X-API-Key": "fk_one"})
    assert (outcome(stolen), outcome(own)) == ((422, "challenge_expired"), (200, "ok"))
    assert client.post("/challenges").status_code == 401


@pytest.mark.parametrize(("sent", "expected"), [(0, 422), (3, 422), (MAX_FRAMES + 1, 422)])
def test_too_few_and_too_many_frames_are_refused(client: Any, sent: int, expected: int) -> None:
    challenge = ask(client)
    frames = (frames_of(challenge["steps"]) * 3)[:sent]
    answer = send(client, "/compare", challenge["challenge_id"], frames)
    assert outcome(answer) == (expected, "challenge_failed")
    assert answer.json["checks"][0]["measured"] == sent


def test_too_many_frames_are_told_from_too_few_and_counted_to_the_last(client: Any) -> None:
    challenge = ask(client)
    frames = frames_of(challenge["steps"])
    answer = send(client, "/compare", challenge["challenge_id"], (frames * 4)[:20], {"Accept-Language": "en"})
    (check,) = answer.json["checks"]
    assert (check["measured"], check["required"]) == (20, {"max": MAX_FRAMES})
    assert "too many" in check["hint"]
    none = send(client, "/compare", challenge["challenge_id"])
    assert none.json["checks"][0]["required"] == {"min": min(map(len, ORDERS))}
    assert "every step" in none.json["checks"][0]["hint"]
    # Neither has used the challenge up.
    assert outcome(send(client, "/compare", challenge["challenge_id"], frames)) == (200, "ok")


@pytest.mark.parametrize(
    ("frame", "code", "message"),
    [
        (b"", "empty_file", "Frame 2 is empty."),
        (b"no picture", "unsupported_format", "Frame 2 is not a JPG, PNG, WebP or HEIC file."),
        (b"\xff\xd8\xff\xe0", "unreadable_image", "Frame 2 is damaged and could not be read."),
        (bytes(MAX_FRAME_BYTES + 1), "file_too_large", "The file of frame 2 is larger than 256 KiB."),
        (
            jpeg(np.zeros((1001, MAX_FRAME_PIXELS // 1000, 3), np.uint8)),
            "image_too_large",
            "Frame 2 has too many pixels.",
        ),
    ],
    ids=["empty", "no picture", "damaged", "bytes", "pixels"],
)
def test_a_frame_that_cannot_be_read_is_named(client: Any, frame: bytes, code: str, message: str) -> None:
    challenge = ask(client)
    frames = frames_of(challenge["steps"])
    answer = send(client, "/compare", challenge["challenge_id"], [frames[0], frame, *frames[2:]])
    assert answer.json["code"] == code
    assert (answer.json["field"], answer.json["frame"]) == ("frame", 2)
    assert answer.json["message"] == message
    assert_described(
        client.get("/openapi.json").json, "POST", "/compare", answer.status_code, answer.headers, answer.data
    )


def test_a_request_is_no_larger_than_its_photo_and_all_frames(client_with: Callable[..., Any]) -> None:
    client = client_with(max_file_bytes=600_000)
    frames = [bytes(MAX_FRAME_BYTES)] * (MAX_FRAMES + 4)
    answer = send(client, "/verify", "x", frames)
    assert outcome(answer) == (413, "file_too_large")
    assert answer.json["message"] == "The request is larger than 3.63 MiB; a photo may have 0.572 MiB."
    alone = client_with(max_file_bytes=600_000, challenge="off")
    assert send(alone, "/verify", photo=bytes(700_000)).json["message"] == "The photo's file is larger than 0.572 MiB."


@pytest.mark.parametrize(
    ("settings", "requiring"),
    [
        ({}, ()),
        ({"challenge": "require"}, ROUTES),
        ({"challenge_sign_up": "require"}, ("/signUp",)),
        ({"challenge": "require", "challenge_sign_up": "accept"}, ("/verify", "/compare")),
        ({"challenge": "off", "challenge_verify": "require"}, ("/verify",)),
    ],
)
def test_a_photo_alone_is_enough_where_no_challenge_is_required(
    client_with: Callable[..., Any], settings: dict[str, str], requiring: tuple[str, ...]
) -> None:
    client = client_with(**settings)
    codes = {route: send(client, route).json.get("code") for route in ROUTES}
    assert tuple(route for route in ROUTES if codes[route] == "challenge_required") == requiring
    assert set(codes.values()) <= {None, "challenge_required", "no_match"}


def test_frames_without_a_challenge_are_refused_rather_than_ignored(client: Any) -> None:
    assert outcome(send(client, "/compare", frames=[b"x"])) == (422, "challenge_required")


@pytest.mark.parametrize("name", ["frames", "frame[]", "frame[0]", "frame1", "Frame"])
def test_frames_under_another_name_do_not_use_the_challenge_up(client: Any, name: str) -> None:
    challenge = ask(client)
    frames = frames_of(challenge["steps"])
    form = {
        "challenge_id": challenge["challenge_id"],
        "file1": (io.BytesIO(ASTRONAUT), "me.png"),
        "file2": (io.BytesIO(ASTRONAUT), "me.png"),
        name: [(io.BytesIO(frame), "frame.jpg") for frame in frames],
    }
    misnamed = client.post("/compare", data=form)
    assert outcome(misnamed) == (400, "unknown_field")
    assert "'frame'" in misnamed.json["message"]
    assert outcome(send(client, "/compare", challenge["challenge_id"], frames)) == (200, "ok")


def test_without_challenges_there_is_no_route_and_their_fields_are_refused(client_with: Callable[..., Any]) -> None:
    client = client_with(challenge="off")
    assert client.post("/challenges").status_code == 404
    answer = send(client, "/verify", "x")
    assert outcome(answer) == (400, "unknown_field")
    assert "takes no challenges" in answer.json["message"]
    assert "/challenges" not in client.get("/openapi.json").json["paths"]


def test_a_challenge_is_sent_again_after_its_photo_could_not_be_stored_for_others_who_sign_up(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    challenge = ask(client)
    sent = (client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"]))
    monkeypatch.setattr("gallery.decisions.MAX_LOST_RACES", 0)
    assert outcome(send(*sent)) == (503, "overloaded")
    monkeypatch.undo()
    assert [outcome(send(*sent)) for _ in range(2)] == [(200, "ok"), (409, "challenge_used")]


def test_where_storing_a_photo_requires_a_challenge_a_verification_with_one_adds_a_better_photo(
    client_with: Callable[..., Any],
) -> None:
    client = client_with(challenge_sign_up="require", update_template="on_verify")
    challenge = ask(client)
    blurred = jpeg(np.asarray(cv2.GaussianBlur(astronaut()[0], (0, 0), 1.5), np.uint8))
    signed_up = send(client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"]), photo=blurred)
    person = f"/users/{signed_up.json['user_id']}"
    challenge = ask(client)
    assert outcome(send(client, "/verify", challenge["challenge_id"], frames_of(challenge["steps"]))) == (200, "ok")
    assert client.get(person).json["photos"] == 2


def test_a_retry_of_a_sign_up_after_a_lost_answer_gets_the_first_answer(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    challenge = ask(client)
    sent = (client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"]), {"Idempotency-Key": "once"})
    first, second = send(*sent), send(*sent)
    assert first.status_code == second.status_code == 200
    assert first.json["user_id"] == second.json["user_id"]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + IN_USE_SECONDS + 1)
    assert outcome(send(*sent[:-1], {"Idempotency-Key": "another"})) == (409, "challenge_used")
    monkeypatch.setattr(time, "time", lambda: real() + KEPT_SECONDS + 1)
    ask(client)  # now the first challenge is forgotten
    assert send(*sent).json["user_id"] == first.json["user_id"]
    assert outcome(send(*sent[:-1], {"Idempotency-Key": "another"})) == (422, "challenge_expired")


def test_a_retry_gets_the_first_answer_also_with_a_new_challenge_which_it_does_not_use_up(client: Any) -> None:
    challenge, key = ask(client), {"Idempotency-Key": "once"}
    first = send(client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"]), key)
    new = ask(client)
    again = send(client, "/signUp", new["challenge_id"], frames_of(new["steps"], "flat"), key)
    assert again.json["user_id"] == first.json["user_id"]
    assert outcome(send(client, "/compare", new["challenge_id"], frames_of(new["steps"]))) == (200, "ok")


def test_a_retry_while_the_first_attempt_still_runs_is_told_to_come_again_and_then_gets_its_answer(
    client_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, client = client_with(), client_with()
    challenge = ask(client)
    sent = (client, "/signUp", challenge["challenge_id"], frames_of(challenge["steps"]), {"Idempotency-Key": "once"})
    judged, go_on, answers = threading.Event(), threading.Event(), list[Any]()
    enrol = Gallery.enrol

    def slow(*arguments: Any, **named: Any) -> str:
        judged.set()
        assert go_on.wait(60)
        return enrol(*arguments, **named)

    monkeypatch.setattr(Gallery, "enrol", slow)
    first = threading.Thread(target=lambda: answers.append(send(other, *sent[1:])))
    first.start()
    assert judged.wait(60)
    early = send(*sent)
    without_key = send(*sent[:-1])
    go_on.set()
    first.join()
    assert (outcome(early), int(early.headers["Retry-After"])) == ((503, "overloaded"), 4)
    assert outcome(without_key) == (409, "challenge_used")
    assert send(*sent).json["user_id"] == answers[0].json["user_id"]


def test_hints_for_the_steps_are_translated(client: Any) -> None:
    challenge = ask(client)
    answer = send(
        client, "/compare", challenge["challenge_id"], frames_of(challenge["steps"])[::-1], {"Accept-Language": "ar"}
    )
    hints = [check["hint"] for check in answer.json["checks"] if not check["passed"]]
    assert hints
    assert all(any("\u0600" <= letter <= "\u06ff" for letter in hint) for hint in hints)
