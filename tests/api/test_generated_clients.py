"""A Python client, generated from the description of a running service, calls that service.

The document that the generator reads is what `GET /openapi.json` answers, so this is what a user of the API does.
"""

from __future__ import annotations

import datetime
import importlib
import io
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from PIL import Image

from tests.support.running import ASTRONAUT, Service

pytestmark = pytest.mark.slow
pytest.importorskip("openapi_python_client", reason="the generator needs Python 3.11 or newer")

WITHOUT_A_FACE = io.BytesIO()
Image.new("RGB", (320, 240), "grey").save(WITHOUT_A_FACE, "PNG")


class Client:
    """The generated package, and a client of it that is connected to the service."""

    def __init__(self, package: str, folder: Path, service: Service) -> None:
        self._package = package
        description = folder / "openapi.json"
        description.write_bytes(requests.get(service.url + "/openapi.json", timeout=30).content)
        settings = folder / "settings.json"
        settings.write_text(json.dumps({"post_hooks": []}))  # the hooks only lint and format the result
        self.said = subprocess.run(
            [
                *(sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"),
                *("--path", description, "--config", settings, "--output-path", folder / package),
            ],
            env={**os.environ, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        sys.path.insert(0, str(folder))
        self.models: Any = self.module("models")
        self._types: Any = self.module("types")
        self._connection = self.module("client").AuthenticatedClient(base_url=service.url, token="a-key")

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self._package}.{name}")

    def photo(self, content: bytes = ASTRONAUT) -> Any:
        return self._types.File(payload=io.BytesIO(content), file_name="me.png")

    def call(self, function: str, *arguments: Any, **options: Any) -> Any:
        """Call an operation, such as `people.sign_up`; returns what its answer was read as."""
        operation: Any = self.module(f"api.{function}")
        return operation.sync(*arguments, client=self._connection, **options)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("generated")
    service = Service(folder, MODEL_THREADS="1")
    service.start()
    path = sys.path[:]
    yield Client("generated_face_client", folder, service)
    sys.path[:] = path
    service.kill()


def test_the_generator_reads_all_of_the_description(client: Client) -> None:
    assert "Warning" not in client.said
    assert "Skipping" not in client.said


def test_a_generated_client_signs_up_verifies_looks_up_and_erases(client: Client) -> None:
    models = client.models
    signed_up = client.call("people.sign_up", body=models.SignUpBody(file=client.photo()), idempotency_key="once")
    assert isinstance(signed_up, models.SignedUp)
    assert uuid.UUID(signed_up.user_id)

    form = models.VerifyBody(file=client.photo(), threshold=0.6, user_id=signed_up.user_id)
    verified = client.call("people.verify", body=form)
    assert isinstance(verified, models.Verified)
    assert (verified.verified, verified.user_id, verified.threshold) == (True, signed_up.user_id, 0.6)

    person = client.call("people.get_person", signed_up.user_id)
    assert isinstance(person, models.Person)
    assert isinstance(person.enrolled_at, datetime.datetime)
    assert client.call("operation.get_health").gallery.enrolled == 1

    duplicate = client.call("people.sign_up", body=models.SignUpBody(file=client.photo()))
    assert isinstance(duplicate, models.ErrorBody)
    assert duplicate.code == models.Code.DUPLICATE_FACE

    assert isinstance(client.call("people.erase_person", signed_up.user_id), models.Erased)
    gone = client.call("people.get_person", signed_up.user_id)
    assert isinstance(gone, models.ErrorBody)
    assert gone.code == models.Code.UNKNOWN_USER


def test_a_generated_client_tells_the_person_what_was_wrong_with_the_photo(client: Client) -> None:
    models = client.models
    photo = client.photo(WITHOUT_A_FACE.getvalue())
    form = models.SignUpBody(file=photo)
    refused = client.call("people.sign_up", body=form, accept_language="ar")
    assert isinstance(refused, models.ErrorBody)
    assert refused.code == models.Code.NO_FACE
    (check,) = refused.checks
    assert isinstance(check, models.Check)
    assert (check.code, check.passed, check.measured, check.required.min_) == ("no_face", False, 0, 1)
    assert any("\u0600" <= letter <= "\u06ff" for letter in check.hint), "not in Arabic"


def test_a_generated_client_compares_and_analyses(client: Client) -> None:
    models = client.models
    form = models.CompareBody(file1=client.photo(), file2=client.photo())
    compared = client.call("photos.compare", body=form)
    assert isinstance(compared, models.Compared)
    assert (compared.match, compared.similarity) == (True, 1)
    analyzed = client.call("photos.analyze", body=models.AnalyzeBody(file=client.photo()))
    assert isinstance(analyzed, models.Analyzed)
    assert (analyzed.accepted, analyzed.code) == (True, None)
    assert all(isinstance(check, models.Check) for check in analyzed.checks)
    (face,) = analyzed.faces
    assert len(face.landmarks) == 5


def test_a_client_that_was_generated_earlier_reads_a_code_and_a_key_that_came_later(client: Client) -> None:
    error = client.models.ErrorBody.from_dict(
        {"status": "error", "code": "added_tomorrow", "message": "New.", "request_id": "1", "detail": [1]}
    )
    assert (error.code, error["detail"]) == ("added_tomorrow", [1])
