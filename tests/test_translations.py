"""Messages and hints in the client's language: complete, and only where a person reads them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedCovering, ScriptedEngine, a_photo, jpeg

from app import create_app
from covering import Covering
from errors import CODES
from face_checks import HINTS
from gallery import Gallery
from settings import PROJECT, Settings
from store import SqliteStore

FILES = sorted((PROJECT / "translations").glob("*.json"))


@pytest.fixture
def client(tmp_path: Path) -> Any:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    engine, covering = ScriptedEngine(), ScriptedCovering()
    covering.seen = Covering(mask=0.9, sunglasses=0.0, other=0.0, hidden=0.0)
    gallery = Gallery(store, engine.name, engine.dimension)
    return create_app(Settings(data_dir=tmp_path), engine, covering, store, gallery).test_client()


def post(client: Any, route: str, language: str) -> Any:
    photo = {"file": (io.BytesIO(jpeg(a_photo())), "p.jpg")}
    return client.post(route, data=photo, headers={"Accept-Language": language})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_code_and_every_hint_is_translated(file: Path) -> None:
    texts = json.loads(file.read_text("utf-8"))
    assert set(texts["messages"]) == set(CODES)
    assert set(texts["hints"]) == set(HINTS)
    assert all(text.strip() for kind in texts.values() for text in kind.values())


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("ar", "ar"), ("ar-EG,ar;q=0.9,en;q=0.5", "ar"), ("en-GB", "en"), ("de,ar;q=0.2,en;q=0.1", "ar"), ("de", "en"),
     ("", "en"), ("*", "en"), ("ar;q=0", "en"), ("\u0661", "en")],
)  # fmt: skip
def test_the_language_is_the_one_that_the_client_likes_best(client: Any, sent: str, expected: str) -> None:
    answer = post(client, "/verify", sent)
    assert answer.headers["Content-Language"] == expected
    assert "Accept-Language" in answer.headers["Vary"]
    assert bool(re.search("[\u0600-\u06ff]", answer.json["message"])) is (expected == "ar")


@pytest.mark.parametrize("route", ["/verify", "/analyze"])
def test_hints_are_translated_with_the_message_and_codes_never(client: Any, route: str) -> None:
    answer = post(client, route, "ar").json
    (failed,) = [check for check in answer["checks"] if not check["passed"]]
    assert (answer["code"], failed["code"], failed["hint"]) == ("mask", "mask", "انزع الكمامة.")
    assert all(check["hint"] is None for check in answer["checks"] if check["passed"])
