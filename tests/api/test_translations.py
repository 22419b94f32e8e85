"""Messages and hints in the client's language: complete, and only where a person reads them."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from engines.face_attributes import FaceAttributes
from errors import CODES, SENTENCES, english
from face_checks import HINTS, NEARER_HINTS
from gallery.decisions import Gallery
from settings import PROJECT, Settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_photo, jpeg

FILES = sorted((PROJECT / "api" / "languages").glob("*.json"))


@pytest.fixture
def covering() -> ScriptedAttributes:
    """Sees a mask."""
    covering = ScriptedAttributes()
    covering.seen = FaceAttributes(mask=0.9, sunglasses=0.0, other=0.0, hidden=0.0)
    return covering


@pytest.fixture
def client(tmp_path: Path, covering: ScriptedAttributes) -> Any:
    store = SqliteStore(tmp_path / "faces.sqlite3")
    store.prepare()
    engine = ScriptedEngine()
    gallery = Gallery(store, engine.name, engine.dimension)
    return make_app(Settings(data_dir=tmp_path), engine, covering, store, gallery).test_client()


def post(client: Any, route: str, language: str) -> Any:
    photo = {"file": (io.BytesIO(jpeg(a_photo())), "p.jpg")}
    return client.post(route, data=photo, headers={"Accept-Language": language})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_sentence_and_every_hint_is_translated(file: Path) -> None:
    texts = json.loads(file.read_text("utf-8"))
    assert set(texts["messages"]) == {*CODES, *SENTENCES}
    assert set(texts["hints"]) == {*HINTS, *NEARER_HINTS}
    assert len({*HINTS.values(), *NEARER_HINTS.values()}) == len(HINTS) + len(NEARER_HINTS)
    assert all(text.strip() for kind in texts.values() for text in kind.values())


def test_every_sentence_that_an_error_is_raised_with_is_in_the_table() -> None:
    calls = [
        call
        for path in [*PROJECT.glob("*.py"), *(PROJECT / "api").glob("*.py"), *(PROJECT / "photos").glob("*.py")]
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "FaceError" and len(call.args) > 1
    ]
    raised = {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}
    assert len(raised) > 5
    assert raised <= set(SENTENCES)


def names_in(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_translated_sentence_names_what_the_english_one_names(file: Path) -> None:
    said = json.loads(file.read_text("utf-8"))["messages"]
    assert {key: names_in(said[key]) for key in SENTENCES} == {key: names_in(text) for key, text in SENTENCES.items()}
    assert all(names_in(said[code]) == names_in(english(code)) == set() for code in CODES)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("ar", "ar"), ("ar-EG,ar;q=0.9,en;q=0.5", "ar"), ("en-GB", "en"), ("de,ar;q=0.2,en;q=0.1", "ar"), ("de", "en"),
     ("", "en"), ("*", "en"), ("ar;q=0", "en"), ("\u0661", "en"),
     ("ar, en", "ar"), ("en, ar", "en"), ("AR_eg", "ar"), ("fr, ar, en", "ar")],
)  # fmt: skip
def test_the_language_is_the_one_that_the_client_likes_best(client: Any, sent: str, expected: str) -> None:
    answer = post(client, "/verify", sent)
    assert answer.headers["Content-Language"] == expected
    assert ("\\u" in answer.text) is False
    assert "Accept-Language" in answer.headers["Vary"]
    assert bool(re.search("[\u0600-\u06ff]", answer.json["message"])) is (expected == "ar")


@pytest.mark.parametrize("route", ["/verify", "/analyze"])
def test_hints_are_translated_with_the_message_and_codes_never(client: Any, route: str) -> None:
    answer = post(client, route, "ar").json
    (failed,) = [check for check in answer["checks"] if not check["passed"]]
    assert (answer["code"], failed["code"], failed["hint"]) == ("mask", "mask", "انزع الكمامة.")
    assert all(check["hint"] is None for check in answer["checks"] if check["passed"])


def test_a_message_keeps_its_numbers_in_every_language(client: Any) -> None:
    def answer(language: str) -> str:
        photo = {"file": (io.BytesIO(jpeg(a_photo())), "p.jpg"), "threshold": "0.1"}
        return str(client.post("/verify", data=photo, headers={"Accept-Language": language}).json["message"])

    assert answer("en") == "The threshold must be a number between 0.4 and 1."
    assert answer("ar") == "يجب أن تكون درجة التشابه المطلوبة عددًا بين 0.4 و1."


def test_an_accepted_photo_is_told_so_in_the_clients_language(client: Any, covering: ScriptedAttributes) -> None:
    covering.seen = FaceAttributes(mask=0.0, sunglasses=0.0, other=0.0, hidden=0.0)
    assert post(client, "/analyze", "en").json["message"] == "The photo passes every check."
    assert post(client, "/analyze", "ar").json["message"] == "اجتازت الصورة كل الفحوص."
