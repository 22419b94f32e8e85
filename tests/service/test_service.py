"""The whole service as a process of its own, used over its socket with real photos, and killed while at work."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from api.responses import SECURITY_HEADERS
from bootstrap import UPLOAD_PREFIX
from settings import PROJECT
from tests.support.fakes import packaged
from tests.support.running import ASTRONAUT, GROUP, SOMEBODY, SOMEBODY_ELSE, Service, read_answer

LINUX = Path("/proc/self/fd").is_dir()


def multipart(*parts: tuple[str, bytes], route: str = "/signUp", boundary: bytes = b"frontier") -> bytes:
    """A whole request, of parts given as the rest of their Content-Disposition and their content."""
    body = b"".join(
        b"--" + boundary + b"\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content
        + b"\r\n"
        for disposition, content in parts
    )  # fmt: skip
    body += b"--" + boundary + b"--\r\n"
    head = f"POST {route} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: multipart/form-data; boundary=" + boundary + b"\r\n\r\n" + body


def a_photo_of(megabytes: float) -> bytes:
    """A photo whose file is this large: what follows a PNG's end is not looked at."""
    return ASTRONAUT + bytes(int(megabytes * 2**20) - len(ASTRONAUT))


def assert_is_an_error(status: int, headers: Any, body: bytes, code: str) -> None:
    assert headers["content-type"] == "application/json"
    error = json.loads(body)
    assert error["status"] == "error"
    assert error["code"] == code
    assert error["message"]
    assert error["request_id"] == headers["x-request-id"]
    assert status < 500
    assert not re.search(r"Traceback|site-packages|\.py\b|PIL|werkzeug|waitress", body.decode())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    service = Service(folder, MODEL_SLOTS="1", MODEL_THREADS="1")
    service.uploads.mkdir()
    (service.uploads / f"{UPLOAD_PREFIX}0a1b2c3d").write_bytes(ASTRONAUT)
    service.start()
    yield service
    survived = service.process.poll() is None
    service.kill()
    assert survived, "".join(service.lines[-20:])


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Service]:
    """A service of the test's own, to be stopped."""
    service = Service(tmp_path)
    service.start()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def enrolled(service: Service) -> str:
    """The user_id of the astronaut, signed up."""
    response = service.post("/signUp")
    assert response.status_code == 200, response.text
    return str(response.json()["user_id"])


def test_what_a_killed_process_left_in_the_uploads_folder_is_gone_after_the_start(service: Service) -> None:
    assert list(service.uploads.iterdir()) == []


def test_the_start_says_in_plain_words_which_model_and_which_store_it_runs_on(service: Service) -> None:
    said = "".join(service.lines)
    assert "Model: sface-2021dec" in said
    assert "Store: " in said
    for open_door in ("No API keys", "Templates are not encrypted", "LIVENESS is off"):
        assert said.count(open_door) == 1


def test_the_start_ends_with_the_pages_for_people(service: Service) -> None:
    service.wait_for_line("The pages for people: ")
    (line,) = [line for line in service.lines if "The pages for people: " in line]
    for page in line.split("people: ")[1].split(", "):
        assert requests.get(page.strip(), timeout=30).status_code == 200


def test_a_python_without_the_packages_gets_one_sentence() -> None:
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "app.py"], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "make run" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.skipif(not LINUX, reason="reads Linux's /proc")
def test_no_core_dump_could_hold_keys_templates_or_photos(service: Service) -> None:
    process = Path(f"/proc/{service.process.pid}")
    assert re.search(r"Max core file size +0 +0 ", (process / "limits").read_text())
    assert int((process / "coredump_filter").read_text(), 16) == 0


def test_the_service_says_that_it_runs(service: Service) -> None:
    response = requests.get(service.url + "/", timeout=30)
    assert response.status_code == 200
    assert response.json() == {"status": "success", "message": "Face Recognition API is running"}
    assert response.headers["X-Request-ID"]


@pytest.mark.parametrize("route", ["/signUp", "/signup"])
def test_a_person_signs_up_once(service: Service, enrolled: str, route: str) -> None:
    assert str(uuid.UUID(enrolled, version=4)) == enrolled
    again = service.post(route)
    assert again.status_code == 409
    assert again.json() == {
        "status": "error",
        "code": "duplicate_face",
        "message": "This face already exists in the database",
        "request_id": again.headers["X-Request-ID"],
    }


@pytest.mark.parametrize("claim", [False, True])
def test_an_enrolled_person_is_verified_by_another_picture(service: Service, enrolled: str, claim: bool) -> None:
    file = io.BytesIO()
    with Image.open(io.BytesIO(ASTRONAUT)) as astronaut:
        astronaut.convert("RGB").resize((400, 400)).save(file, "JPEG", quality=85)
    response = service.post(
        "/verify",
        files={"file": ("IMG 1.HEIC", file.getvalue(), "application/x-nonsense")},
        data={"threshold": "0.6", **({"user_id": enrolled} if claim else {})},
    )
    assert response.status_code == 200
    answer = response.json()
    assert answer == {
        "status": "success",
        "message": f"Face verified successfully with confidence: {answer['similarity']:.2f}",
        "verified": True,
        "user_id": enrolled,
        "similarity": answer["similarity"],
        "threshold": 0.6,
    }
    assert 0.9 < answer["similarity"] <= 1.0


def test_somebody_else_is_not_verified(service: Service, enrolled: str) -> None:
    response = service.post("/verify", SOMEBODY_ELSE)
    assert (response.status_code, response.json()["code"]) == (401, "no_match")
    assert response.json()["verified"] is False
    assert response.headers["WWW-Authenticate"] == "FaceMatch"


@pytest.mark.parametrize("route", ["/signUp", "/verify"])
def test_a_group_photo_is_refused_with_every_check_and_a_hint(service: Service, route: str) -> None:
    response = service.post(route, GROUP)
    assert (response.status_code, response.json()["code"]) == (422, "multiple_faces")
    for check in response.json()["checks"]:
        assert set(check) == {"code", "passed", "measured", "required", "hint"}


def test_a_retry_after_a_lost_answer_gets_the_first_attempts_answer(service: Service) -> None:
    headers = {"Idempotency-Key": "5f0c2a"}
    first = service.post("/signUp", SOMEBODY, headers=headers)
    assert first.status_code == 200, first.text
    again = service.post("/signUp", SOMEBODY, headers=headers)
    assert (again.status_code, again.json()) == (200, first.json())
    assert service.post("/signUp", SOMEBODY).json()["code"] == "duplicate_face"


def test_a_photo_sent_in_chunks_of_no_stated_length_is_taken(service: Service, enrolled: str) -> None:
    request = requests.Request("POST", service.url + "/verify", files={"file": ("a.png", ASTRONAUT)}).prepare()
    body = request.body
    assert isinstance(body, bytes)
    content_type = {"Content-Type": request.headers["Content-Type"]}
    response = requests.post(request.url or "", data=iter([body[:1000], body[1000:]]), headers=content_type, timeout=30)
    assert (response.status_code, response.json().get("user_id")) == (200, enrolled)


def test_a_large_photo_is_taken(service: Service, enrolled: str) -> None:
    assert service.post("/verify", a_photo_of(7.9)).json()["user_id"] == enrolled


def test_a_photo_that_is_full_of_what_looks_like_a_boundary_is_taken(service: Service, enrolled: str) -> None:
    # The form parser holds such bytes back, and once counted them against the limit of text fields.
    for filler in (b"\n", b"\r\n--", b"\r\n--fronti"):
        request = multipart(('name="file"; filename="a.png"', ASTRONAUT + filler * 30_000), route="/verify")
        status, _, body = service.raw(request)
        assert (status, json.loads(body).get("user_id")) == (200, enrolled)


def test_the_liveness_probe_is_answered_while_the_models_are_at_work(service: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(service.post, "/verify") for _ in range(8)]
        wait(posts, return_when=FIRST_COMPLETED)
        assert requests.get(service.url + "/", timeout=30).status_code == 200
        assert not all(post.done() for post in posts)


def bomb() -> bytes:
    """A PNG of few bytes whose header claims 60000 x 60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, pixels, b"IEND")
    )


PHOTO = {"file": ("photo.png", ASTRONAUT)}


def photo(content: bytes) -> dict[str, Any]:
    return {"files": {"file": ("photo.jpg", content)}}


def field(name: str, *values: str) -> dict[str, Any]:
    return {"files": PHOTO, "data": [(name, value) for value in values]}


BAD_REQUESTS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "nothing at all": ("/signUp", {"files": None}, 400, "no_file"),
    "no file among the fields": ("/verify", {"files": None, "data": {"threshold": "0.5"}}, 400, "no_file"),
    "another field's file": ("/signUp", {"files": {"photo": ("a.png", ASTRONAUT)}}, 400, "no_file"),
    "a form sent without choosing a file": ("/signUp", {"files": {"file": ("", b"")}}, 400, "no_file"),
    "an empty file": ("/signUp", photo(b""), 400, "empty_file"),
    "a text as a photo without a file name": (
        "/signUp",
        {"files": {"file": (None, b"photo")}},
        415,
        "unsupported_format",
    ),
    "an empty text as a photo": ("/signUp", {"files": {"file": (None, b"")}}, 400, "no_file"),
    "a JSON body": ("/signUp", {"files": None, "json": {"file": "photo"}}, 400, "no_file"),
    "two files": ("/signUp", {"files": [("file", ("a.png", ASTRONAUT))] * 2}, 400, "bad_request"),
    "a text": ("/signUp", photo(b"Hello!"), 415, "unsupported_format"),
    "a PDF": ("/signUp", photo(b"%PDF-1.7\n1 0 obj"), 415, "unsupported_format"),
    "a GIF": ("/signUp", photo(b"GIF89a\1\0\1\0\0\0\0;"), 415, "unsupported_format"),
    "a script named as a photo": ("/signUp", photo(b"<?php system($_GET[0]); ?>"), 415, "unsupported_format"),
    "a JPEG that breaks off": ("/signUp", photo(GROUP[: len(GROUP) // 2]), 400, "unreadable_image"),
    "a PNG that breaks off": ("/signUp", photo(ASTRONAUT[:5000]), 400, "unreadable_image"),
    "a header and nothing else": ("/signUp", photo(b"\xff\xd8\xff\xe0"), 400, "unreadable_image"),
    "9 MiB": ("/signUp", photo(a_photo_of(9)), 413, "file_too_large"),
    "a byte more than the limit": ("/signUp", photo(a_photo_of(8) + b"."), 413, "file_too_large"),
    "60 MiB": ("/signUp", photo(a_photo_of(60)), 413, "file_too_large"),
    "a decompression bomb": ("/signUp", photo(bomb()), 413, "image_too_large"),
    "no face": ("/signUp", photo(packaged("skimage", "data", "coffee.png")), 422, "no_face"),
    **{
        f"threshold {text!r}": ("/verify", field("threshold", text), 400, "invalid_threshold")
        for text in ("nan", "inf", "-inf", "1e999", "\u0660\u066b\u0665", "", " ", "0.5x", "0.1", "-1", "1.001", "1_0")
    },
    "two thresholds": ("/verify", field("threshold", "0.5", "0.9"), 400, "invalid_threshold"),
    "a user_id that is none": ("/verify", field("user_id", "me"), 400, "invalid_user_id"),
    "an injected user_id": ("/verify", field("user_id", '{"$ne": null}'), 400, "invalid_user_id"),
    "two user_ids": ("/verify", field("user_id", str(uuid.uuid4()), str(uuid.uuid4())), 400, "invalid_user_id"),
    "a user_id of nobody": ("/verify", field("user_id", str(uuid.uuid4())), 404, "unknown_user"),
    "thousands of fields": ("/signUp", {"files": PHOTO, "data": [("a", "1")] * 5000}, 400, "bad_request"),
    "a field of a megabyte": ("/verify", field("threshold", "1" * 2**20), 400, "bad_request"),
    "an unknown address": ("/signOut", {}, 404, "not_found"),
    "an address with a line break": ("/sign%0AUp", {}, 404, "not_found"),
    "a multipart body without a boundary": (
        "/signUp",
        {"files": None, "data": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "bad_request",
    ),
    "a multipart body that breaks off": (
        "/signUp",
        {"files": None, "data": b"--x\r\nCont", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "bad_request",
    ),
    "an Idempotency-Key of a kilobyte": (
        "/signUp",
        {"files": PHOTO, "headers": {"Idempotency-Key": "k" * 1024}},
        400,
        "bad_request",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_input_gets_its_code_and_leaves_no_file(service: Service, case: str) -> None:
    route, options, status, code = BAD_REQUESTS[case]
    response = service.post(route, **options)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert_is_an_error(response.status_code, response.headers, response.content, code)
    assert list(service.uploads.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "route", "allowed"),
    [
        ("GET", "/signUp", "POST"),
        ("PUT", "/verify", "POST"),
        ("DELETE", "/", "GET, HEAD"),
        ("OPTIONS", "/", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(service: Service, method: str, route: str, allowed: str) -> None:
    response = requests.request(method, service.url + route, timeout=30)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    assert_is_an_error(response.status_code, response.headers, response.content, "method_not_allowed")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("../../../etc/passwd", b"Hello!", (415, "unsupported_format")),
        ("a\0.jpg", b"Hello!", (415, "unsupported_format")),
        ("CON.jpg", b"Hello!", (415, "unsupported_format")),
        ("a\nContent-Type: image/png", b"Hello!", (415, "unsupported_format")),
        ("n" * 1_000_000, b"Hello!", (400, "bad_request")),
    ],
    ids=["a path", "NUL", "a device", "a newline", "a million characters"],
)
def test_a_files_name_is_never_used(service: Service, name: str, content: bytes, expected: tuple[int, str]) -> None:
    status, headers, body = service.raw(multipart((f'name="file"; filename="{name}"', content)))
    assert (status, json.loads(body)["code"]) == expected
    assert_is_an_error(status, headers, body, expected[1])
    assert list(service.uploads.iterdir()) == []


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: here\r\nno colon\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"x" * 300_000 + b"\r\n\r\n", 431, "bad_request"),
        (b"POST /signUp HTTP/1.1\r\nHost: here\r\nContent-Length: -5\r\n\r\n", 400, "bad_request"),
        (b"POST /signUp HTTP/1.1\r\nHost: here\r\nContent-Length: 73400320\r\n\r\n", 413, "file_too_large"),
        (b"POST /signUp HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "bad_request"),
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: here\r\n\r\n", 400, "bad_request"),
    ],
    ids=[
        "no request line",
        "no header",
        "a huge header",
        "negative length",
        "70 MiB",
        "no chunk",
        "no UTF-8",
    ],
)
def test_what_is_no_sound_request_is_refused_in_json_too(service: Service, sent: bytes, status: int, code: str) -> None:
    answered, headers, body = service.raw(sent)
    assert answered == status
    assert_is_an_error(answered, headers, body, code)
    assert {name: headers.get(name.lower()) for name in SECURITY_HEADERS} == SECURITY_HEADERS


def test_a_client_that_sends_70_mib_before_it_listens_still_reads_why_it_was_refused(service: Service) -> None:
    response = service.post("/signUp", a_photo_of(70))
    assert_is_an_error(response.status_code, response.headers, response.content, "file_too_large")


def half_of_a_large_upload(service: Service, route: str = "/verify") -> tuple[socket.socket, bytes]:
    """Send half of a request of 1.5 MiB, too much to stay in memory; returns the connection and the other half."""
    request = multipart(('name="file"; filename="a.png"', a_photo_of(1.5)), route=route)
    half = len(request) // 2
    connection = service.connect(request[:half])
    deadline = time.monotonic() + 30
    while LINUX and not nameless_uploads(service):
        assert time.monotonic() < deadline, "what had been sent never reached the uploads folder"
        time.sleep(0.01)
    return connection, request[half:]


def nameless_uploads(service: Service) -> list[str]:
    """What the service's process has open in its uploads folder, with or without a name."""
    opened = []
    for descriptor in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.append(str(descriptor.readlink()))
    return [path for path in opened if path.startswith(str(service.uploads))]


def test_a_large_upload_is_under_no_name_in_the_uploads_folder_while_it_arrives(
    service: Service, enrolled: str
) -> None:
    connection, rest = half_of_a_large_upload(service)
    with connection:
        assert list(service.uploads.iterdir()) == []
        connection.sendall(rest)
        status, _, body = read_answer(connection)
    assert (status, json.loads(body)["user_id"]) == (200, enrolled)
    assert list(service.uploads.iterdir()) == []


@pytest.mark.slow
def test_after_a_kill_no_upload_is_left_and_an_acknowledged_sign_up_verifies(mortal: Service) -> None:
    user_id = mortal.post("/signUp").json()["user_id"]
    connection, _ = half_of_a_large_upload(mortal)
    with connection:
        mortal.kill()
        assert list(mortal.uploads.iterdir()) == []
    mortal.start()
    response = mortal.post("/verify")
    assert (response.status_code, response.json().get("user_id")) == (200, user_id)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_the_requests_in_hand_and_takes_no_more(mortal: Service, signal_number: int) -> None:
    user_id = mortal.post("/signUp").json()["user_id"]
    arriving, rest = half_of_a_large_upload(mortal)
    whole = multipart(('name="file"; filename="a.png"', ASTRONAUT), route="/verify")
    working = [mortal.connect(whole) for _ in range(3)]
    assert requests.get(mortal.url + "/", timeout=30).status_code == 200
    mortal.process.send_signal(signal_number)
    mortal.wait_for_line("Stopping")
    with pytest.raises(requests.ConnectionError):
        requests.get(mortal.url + "/", timeout=30)
    arriving.sendall(rest)
    for connection in (arriving, *working):
        with connection:
            status, _, body = read_answer(connection)
            assert (status, json.loads(body)["user_id"]) == (200, user_id)
    assert mortal.process.wait(30) == 0
    assert "Stopped" in mortal.wait_for_line("Stopped")
    assert list(mortal.uploads.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_waits_for_its_database_can_be_stopped(tmp_path: Path, signal_number: int) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        service = Service(tmp_path, MONGO_URI=f"mongodb://127.0.0.1:{nobody.getsockname()[1]}", STORE_WAIT_S="300")
        service.begin()
        service.wait_for_line("trying again")
        service.process.send_signal(signal_number)
        # Its own doing, where by default the signal ends a process, but for the first of a container.
        assert service.process.wait(60) == 130
    service.wait_for_line("Stopped before it was ready")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PORT": "http"}, "PORT is 'http'"),
        ({"FACE_MODEL": "no/such/folder"}, "The face model is not available"),
        ({"MONGO_URI": "mongodb://me:hunter2@", "FACE_MODEL": "compact"}, "MONGO_URI has a character"),
    ],
)
@pytest.mark.slow
def test_a_start_that_cannot_succeed_ends_with_one_clear_sentence(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    service = Service(tmp_path, STORE_WAIT_S="0", **settings)
    ended = subprocess.run(
        [sys.executable, "app.py"],
        cwd=PROJECT,
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode in (1, 2)
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hunter2" not in ended.stderr


def test_no_log_line_holds_what_a_client_named_its_file_or_address(service: Service) -> None:
    service.post("/no/such/secret-address")
    service.post("/verify", files={"file": ("secret-name.png", ASTRONAUT)})
    assert requests.get(service.url + "/", headers={"X-Request-ID": "last-one"}, timeout=30).status_code == 200
    service.wait_for_line("last-one")
    assert "secret" not in "".join(service.lines)
