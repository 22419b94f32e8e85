"""The calls of docs/clients.md and of the API's description, run as they are written against the running service."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from requests.structures import CaseInsensitiveDict

from api.openapi import describe, operations_of
from settings import PROJECT, Settings
from tests.support.conforming import assert_described, shape
from tests.support.running import ASTRONAUT, GROUP, SOMEBODY, Service

pytestmark = pytest.mark.slow

API = describe(Settings())
EXAMPLE_ID = "0e6d5b0c-9d0e-4c64-9d3a-2f1f5f0f6a3e"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path, MODEL_THREADS="1")
    service.start()
    yield service
    service.kill()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with the photos that the calls name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "me.jpg").write_bytes(ASTRONAUT)
    for name in ("me-again.jpg", "me-today.jpg"):
        Image.open(io.BytesIO(ASTRONAUT)).convert("RGB").save(folder / name, quality=80)
    Image.open(io.BytesIO(SOMEBODY)).save(folder / "somebody-else.jpg", quality=95)
    return folder


class Troubled(http.server.BaseHTTPRequestHandler):
    """A line to the service that loses the first answer, and is busy at the second attempt."""

    service: Service
    attempts: list[str | None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.attempts.append(self.headers["Idempotency-Key"])
        if len(self.attempts) == 2:
            self.answer(503, {"Retry-After": "1"}, b'{"status": "error", "code": "overloaded", "message": "Busy."}')
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        answer = requests.post(self.service.url + self.path, data=body, headers=headers, timeout=60)
        if len(self.attempts) > 1:
            self.answer(answer.status_code, dict(answer.headers), answer.content)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """The test says what went wrong."""


@pytest.fixture
def troubled(service: Service) -> Iterator[tuple[str, list[str | None]]]:
    """The address of a troubled line to the service, and the idempotency keys of the attempts on it."""
    attempts: list[str | None] = []
    handler = type("Line", (Troubled,), {"service": service, "attempts": attempts})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as line:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{line.server_port}", attempts
        line.shutdown()


def block(language: str) -> str:
    """The one code block of docs/clients.md in a language."""
    text = (PROJECT / "docs" / "clients.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(found)


def words(message: str) -> str:
    """A message without its numbers and ids."""
    return re.sub(r"[0-9a-f-]{36}|\d+\.\d+", "#", message)


def output(command: list[str], folder: Path, address: str) -> str:
    environment = {**os.environ, "FACE_API": address, "API_KEY": "a-key"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def assert_one_sign_up_with_one_key(attempts: list[str | None]) -> None:
    """Lost, busy, answered: three attempts at the sign-up, and one key in them all."""
    assert len(set(attempts[:3])) == 1
    assert attempts[0]
    assert set(attempts[3:]) == {None}


def test_the_curl_calls_of_the_documentation_do_what_they_say(
    photos: Path, troubled: tuple[str, list[str | None]]
) -> None:
    address, attempts = troubled
    lines = output(["bash", "-euc", block("sh")], photos, address).splitlines()
    signed_up, verified, strictly, compared, analyzed = (json.loads(line) for line in lines if line)
    assert signed_up["user_id"] == verified["user_id"] == strictly["user_id"]
    assert strictly["threshold"] == 0.6
    assert compared["match"] is False
    assert analyzed["accepted"] is True
    assert_one_sign_up_with_one_key(attempts)


def test_the_python_calls_of_the_documentation_do_what_they_say(
    photos: Path, troubled: tuple[str, list[str | None]]
) -> None:
    address, attempts = troubled
    said = output([sys.executable, "-c", block("python")], photos, address)
    signed_up = re.search(r"Signed up: (\S+)\nRecognised: (\S+)\nThe same person: False\nGood enough.*: True", said)
    assert signed_up is not None, said
    assert signed_up[1] == signed_up[2]
    assert_one_sign_up_with_one_key(attempts)
    assert output([sys.executable, "-c", block("python")], photos, address).startswith("Signed up before.")
    (photos / "me.jpg").write_bytes(GROUP)
    refused = subprocess.run(
        [sys.executable, "-c", block("python")],
        cwd=photos,
        env={**os.environ, "FACE_API": address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Make sure that only your own face is in the picture." in refused.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_javascript_calls_of_the_documentation_do_what_they_say(
    photos: Path, troubled: tuple[str, list[str | None]]
) -> None:
    address, attempts = troubled
    use = """
        const photo = (name) => new Blob([require("fs").readFileSync(name)]);
        (async () => {
          const api = new FaceApi(process.env.FACE_API, process.env.API_KEY);
          const id = await api.signUp(photo("me.jpg"));
          const again = await api.signUp(photo("me.jpg")).catch((error) => error.code);
          const other = await api.verify(photo("somebody-else.jpg"));
          const found = await api.verify(photo("me-again.jpg"), { user_id: id, threshold: "0.6" });
          const { match } = await api.compare(photo("me.jpg"), photo("me-again.jpg"));
          const { accepted } = await api.analyze(photo("me.jpg"));
          console.log(JSON.stringify([id === found, again, other, match, accepted]));
        })();
    """
    said = output(["node", "-e", block("js") + use], photos, address)
    assert json.loads(said) == [True, "duplicate_face", None, True, True]
    assert len(set(attempts[:3])) == 1


def test_the_calls_of_the_description_are_answered_as_its_examples(service: Service, photos: Path) -> None:
    """In its own order, but for the erasures, a person's last; the alias finds everybody enrolled already."""
    user_id = ""
    operations = [
        (method, path, operation)
        for path, item in API["paths"].items()
        for method, operation in operations_of(item).items()
    ]
    for method, path, operation in sorted(
        operations, key=lambda one: (one[0] == "delete", one[1] == "/users/{user_id}")
    ):
        if path == "/try" and "/try" not in requests.get(service.url + "/openapi.json", timeout=30).json()["paths"]:
            continue
        call = operation["x-codeSamples"][0]["source"]
        call = call.replace("http://127.0.0.1:5000", service.url).replace(EXAMPLE_ID, user_id)
        ran = subprocess.run(
            ["bash", "-c", call.replace("curl", "curl -sSi", 1)],
            cwd=photos,
            env={**os.environ, "API_KEY": ""},
            capture_output=True,
            timeout=60,
            check=True,
        )
        head, _, body = ran.stdout.partition(b"\r\n\r\n")
        lines = head.decode().splitlines()
        status = int(lines[0].split()[1])
        headers = CaseInsensitiveDict({name: value for name, _, value in (line.partition(": ") for line in lines[1:])})
        assert_described(API, method, path, status, headers, body)
        assert status == (409 if path == "/signup" else 200), body
        content = operation["responses"]["200"]["content"].get("application/json", {})
        if status == 200 and "example" in content:
            answer, example = json.loads(body), content["example"]
            if path not in {"/health", "/analyze"}:
                assert shape(answer) == shape(example)
            if path != "/compare":  # its example shows one person twice, its call two people
                assert words(answer["message"]) == words(example["message"])
        if path == "/signUp":
            user_id = json.loads(body)["user_id"]
