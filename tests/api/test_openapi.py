"""The API's description is sound and complete, says what the service answers, and needs no other machine."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import schemathesis

from api.access import PUBLIC
from api.description_pages import described_path, render_page, routes_of
from api.openapi import CHECK_CODES, describe, operations_of, resolved
from api.request_fields import SANE_IDEMPOTENCY_KEY, USER_ID
from api.request_log import SANE_REQUEST_ID
from engines.face_attributes import FaceAttributes
from errors import CODES, FaceError
from face_checks import HINTS
from gallery.decisions import Gallery
from settings import PROJECT, Settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.conforming import assert_described, validate
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_face, a_photo, jpeg

API = describe(Settings())
SCHEMAS = API["components"]["schemas"]
CODE_TABLE = SCHEMAS["Code"]["x-codes"]
OPERATIONS = [operation for item in API["paths"].values() for operation in operations_of(item).values()]


class Scene:
    """The application with scripted models, a store that can fail, and its description as it serves it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.engine, self.covering = ScriptedEngine(), ScriptedAttributes()
        self.settings = replace(settings, data_dir=folder)
        self.store = SqliteStore(folder / "faces.sqlite3")
        self.store.prepare()
        self.gallery = Gallery(self.store, self.engine.name, self.engine.dimension)
        self.app = make_app(self.settings, self.engine, self.covering, self.store, self.gallery)
        self.client: Any = self.app.test_client()
        self.api: Any = self.client.get("/openapi.json").json

    def send(self, method: str, route: str, described: str = "", **options: Any) -> Any:
        """Send one request; its answer must be as described."""
        answer = self.client.open(route, method=method, **options)
        described = described or route
        if described in self.api["paths"]:
            assert_described(self.api, method, described, answer.status_code, answer.headers, answer.data)
        return answer

    def post(self, route: str, *fields: str, headers: dict[str, str] | None = None, **values: Any) -> Any:
        data = {name: (io.BytesIO(jpeg(a_photo())), "photo.jpg") for name in fields or ("file",)}
        return self.send("POST", route, data={**data, **values}, headers=headers)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path, Settings())
    yield scene
    scene.store.close()


def test_the_description_is_sound_openapi() -> None:
    schemathesis.openapi.from_dict(API).validate()


def test_a_route_that_is_not_described_stops_the_start() -> None:
    with pytest.raises(ValueError, match="/surprise"):
        describe(Settings(), [("GET", "/surprise")])


def test_every_route_of_the_service_is_described_and_every_described_one_is_there(scene: Scene) -> None:
    described = {(method.upper(), path) for path, item in API["paths"].items() for method in operations_of(item)}
    there = set(routes_of(scene.app))
    assert there <= described
    assert described - there <= {("GET", "/try")}  # an operator may switch that page off
    assert scene.api == describe(scene.settings, there)


def test_every_route_asks_for_the_scope_that_is_described(scene: Scene) -> None:
    for rule in scene.app.url_map.iter_rules():
        view = scene.app.view_functions[rule.endpoint]
        for method, path in routes_of(scene.app):
            if path == described_path(rule.rule) and method in (rule.methods or ()):
                operation = API["paths"][path][method.lower()]
                assert operation.get("x-scope", PUBLIC) == getattr(view, "scope", "ops"), path
                assert ("security" in operation) == ("x-scope" in operation)


def test_every_code_is_described_with_its_status_and_its_hint() -> None:
    assert SCHEMAS["Code"]["enum"] == list(CODES)
    assert {code: (one["status"], one["message"]) for code, one in CODE_TABLE.items()} == dict(CODES)
    assert {code: one["hint"] for code, one in CODE_TABLE.items() if "hint" in one} == HINTS


def test_the_codes_of_refused_photos_stand_in_the_order_in_which_the_checks_decide(scene: Scene) -> None:
    judged = [check["code"] for check in scene.post("/analyze").json["checks"]]
    assert len(judged) > 15
    assert [code for code in CHECK_CODES if code in judged] == judged
    assert set(HINTS) <= set(CHECK_CODES)


def test_the_limit_of_every_check_is_the_one_that_the_check_states(tmp_path: Path) -> None:
    limits = [one.name for one in fields(Settings) if one.name.startswith(("min_", "max_")) and one.type == "float"]
    changed: Any = {name: getattr(Settings(), name) + 0.001 for name in limits}
    scene = Scene(tmp_path, replace(Settings(), **changed))
    described = scene.api["components"]["schemas"]["Code"]["x-codes"]
    stated = {check["code"]: check["required"] for check in scene.post("/analyze").json["checks"]}
    scene.engine.faces = []
    stated |= {check["code"]: check["required"] for check in scene.post("/analyze").json["checks"]}
    scene.store.close()
    assert len(limits) > 15
    assert {code: one["limit"] for code, one in described.items() if "limit" in one and code != "not_live"} == stated
    assert described["not_live"]["limit"] == {"min": scene.settings.min_liveness}


def test_the_second_limits_are_put_in_words() -> None:
    page = render_page("docs.html", describe(Settings(max_under_exposure=0.123, max_over_exposure=0.456)))
    assert "share of pixels up to 25 of 255, \u2264 0.123" in page
    assert "share of pixels from 247 of 255, \u2264 0.456" in page


def test_every_field_of_an_answer_and_every_limit_is_put_in_words() -> None:
    page = render_page("docs.html", API)
    named = {name: schema["properties"] for name, schema in SCHEMAS.items() if "properties" in schema}
    assert len(named) > 12
    for schema_name, properties in named.items():
        silent = [name for name, one in properties.items() if not resolved(API, one).get("description")]
        assert silent in ([], ["status"]), schema_name
        assert all(f"<code>{name}</code>" in page for name in properties if name != "status")
    assert [code for code, one in CODE_TABLE.items() if ("limit" in one) != ("measured" in one)] == []


def test_limits_are_those_of_the_settings() -> None:
    tight = describe(
        Settings(max_file_bytes=3 * 2**20, max_image_pixels=5_000_000, threshold_floor=0.45, max_roll_deg=9)
    )
    form = tight["paths"]["/verify"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert "3 MiB and 5 megapixels" in form["file"]["description"]
    assert form["threshold"]["minimum"] == 0.45
    assert tight["components"]["schemas"]["Code"]["x-codes"]["head_tilted"]["limit"] == {"max": 9}
    assert "≤\u00a09 " in render_page("api.md", tight)


def test_the_fields_of_a_challenge_are_described_as_the_routes_read_them() -> None:
    api = describe(Settings(challenge="off", challenge_verify="require", challenge_sign_up="accept"))
    described = {}
    for path in ("/compare", "/verify", "/signUp", "/users/{user_id}/photos"):
        operation = api["paths"][path]["post"]
        form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        used = "challenge_used" in operation["responses"].get("409", {}).get("x-codes", ())
        described[path] = [{"challenge_id", "frame"} <= set(form[key]) for key in ("properties", "required")] + [used]
    assert described == {
        "/compare": [False, False, False],
        "/verify": [True, True, True],
        "/signUp": [True, False, True],
        "/users/{user_id}/photos": [True, False, True],
    }


def test_the_example_of_every_answer_is_an_answer_as_described() -> None:
    examples = 0
    for operation in OPERATIONS:
        for content in operation["responses"]["200"]["content"].values():
            if "example" in content:
                validate(API, content["schema"], content["example"])
                examples += 1
    assert examples > 8


def test_the_patterns_are_those_that_the_service_holds_requests_against() -> None:
    components = API["components"]
    key = components["parameters"]["IdempotencyKey"]["schema"]["pattern"]
    user_id = components["schemas"]["SignedUp"]["properties"]["user_id"]["pattern"]
    assert user_id == f"^{USER_ID.pattern}$"
    assert key == f"^{SANE_IDEMPOTENCY_KEY.pattern}$"
    assert components["headers"]["X-Request-ID"]["schema"]["pattern"] == f"^{SANE_REQUEST_ID.pattern}$"


def objects_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value, all the way down."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects_in(inner)


def test_nothing_is_written_in_a_way_that_client_generators_misread() -> None:
    """The head of openapi.yaml gives the reasons."""
    for one in objects_in(API):
        assert not {"oneOf", "anyOf", "allOf", "encoding"} & set(one)
        assert one.get("format") != "uuid"
        assert isinstance(one.get("const", ""), str)
        assert set(one) == {"$ref"} or "$ref" not in one
    for operation in OPERATIONS:
        form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data", {}).get("schema", {})
        for field in form.get("properties", {}).values():
            assert "default" not in field
            assert ("contentMediaType" in field) == (field.get("format") == "binary")
        for status, response in operation["responses"].items():
            for content in resolved(API, response).get("content", {}).values():
                assert "properties" not in content["schema"], "an object without a name"
                if status != "200":
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_every_operation_has_a_name_for_a_function() -> None:
    names = [operation["operationId"] for operation in OPERATIONS]
    assert {"signUp", "verify", "compare", "analyze", "getPerson", "erasePerson", "getHealth"} <= set(names)
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", name)] == []


def test_successes_are_answered_as_described(scene: Scene) -> None:
    assert scene.send("GET", "/").status_code == 200
    user_id = scene.post("/signUp", headers={"Idempotency-Key": "k", "X-Request-ID": "mine"}).json["user_id"]
    assert scene.post("/verify", threshold="0.6", user_id=user_id).json["verified"] is True
    assert scene.post("/compare", "file1", "file2").json["match"] is True
    assert scene.post("/analyze").json["accepted"] is True
    assert scene.send("GET", "/health").json["gallery"]["enrolled"] == 1
    for method in ("GET", "DELETE"):
        assert scene.send(method, f"/users/{user_id}", "/users/{user_id}").status_code == 200
    for page in ("/metrics", "/docs", "/openapi.json"):
        assert scene.send("GET", page).status_code == 200


@pytest.mark.parametrize(
    ("method", "route", "fields", "code"),
    [
        ("POST", "/signUp", {}, "no_file"),
        ("POST", "/verify", {"file": b""}, "empty_file"),
        ("POST", "/analyze", {"file": b"\xff\xd8\xff\xe0"}, "unreadable_image"),
        ("POST", "/compare", {"file1": b"Hello!", "file2": b"Hello!"}, "unsupported_format"),
        ("POST", "/compare", {"file1": jpeg(a_photo()), "file2": b"Hello!"}, "unsupported_format"),
        ("POST", "/verify", {"file": b"x", "threshold": "nan"}, "invalid_threshold"),
        ("POST", "/verify", {"file": b"x", "user_id": "me"}, "invalid_user_id"),
        ("POST", "/verify", {"file": jpeg(a_photo()), "user_id": str(uuid.UUID(int=1))}, "unknown_user"),
        ("POST", "/verify", {"file": jpeg(a_photo())}, "no_match"),
        ("POST", "/signup", {"file": bytes(8 * 2**20 + 1)}, "file_too_large"),
        ("PUT", "/signUp", {}, "method_not_allowed"),
        ("GET", "/nowhere", {}, "not_found"),
        ("GET", "/users/me", {}, "invalid_user_id"),
        ("GET", f"/users/{uuid.UUID(int=1)}", {}, "unknown_user"),
        ("DELETE", f"/users/{uuid.UUID(int=2)}", {}, "unknown_user"),
    ],
)
def test_refusals_are_answered_as_described(
    scene: Scene, method: str, route: str, fields: dict[str, Any], code: str
) -> None:
    data = {name: (io.BytesIO(value), "p") if isinstance(value, bytes) else value for name, value in fields.items()}
    described = "/users/{user_id}" if route.startswith("/users/") else route
    if (method, route) == ("PUT", "/signUp"):
        described = "/nowhere"  # a method that is not there has no description
    answer = scene.send(method, route, described, data=data)
    assert (answer.status_code, answer.json["code"]) == (CODES[code][0], code)


@pytest.mark.parametrize("route", ["/signUp", "/verify", "/analyze", "/compare"])
def test_refused_photos_are_answered_as_described(scene: Scene, route: str) -> None:
    fields = ("file1", "file2") if route == "/compare" else ("file",)
    for faces in ([], [a_face(), a_face()], [a_face(12)]):
        scene.engine.faces = faces
        answer = scene.post(route, *fields)
        assert answer.status_code == (200 if route == "/analyze" else 422)
        assert answer.json["code"] in CHECK_CODES
    scene.engine.faces = [a_face()]
    scene.covering.seen = FaceAttributes(mask=1.0, sunglasses=1.0, other=1.0, hidden=1.0)
    assert scene.post(route, *fields).json["code"] == "mask"


def test_outages_are_answered_as_described(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> Iterator[Any]:
        raise FaceError("database_unavailable", headers={"Retry-After": "5"})

    scene.engine.faces = [object()]  # type: ignore[list-item]  # the fault under test
    assert scene.post("/verify").json["code"] == "internal_error"
    scene.engine.faces = [a_face()]
    monkeypatch.setattr(scene.store, "entries", away)
    for answer in (scene.post("/verify"), scene.post("/signUp"), scene.send("GET", "/health")):
        assert answer.json["code"] == "database_unavailable"


def test_overload_is_answered_as_described(tmp_path: Path) -> None:
    scene = Scene(tmp_path, Settings(model_slots=1, queue_wait_s=0))
    scene.engine.released.clear()
    first = threading.Thread(target=scene.post, args=("/analyze",))
    first.start()
    while not scene.engine.detections:
        time.sleep(0.01)
    answer = scene.post("/verify")
    scene.engine.released.set()
    first.join()
    scene.store.close()
    assert answer.json["code"] == "overloaded"


def test_an_unchanged_description_is_not_sent_again(scene: Scene) -> None:
    for route in ("/openapi.json", "/docs"):
        first = scene.send("GET", route)
        again = scene.send("GET", route, headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")
        assert scene.send("GET", route, headers={"If-None-Match": '"other"'}).status_code == 200


class Page(HTMLParser):
    """What a page loads, where it can be jumped to, and where its links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "srcset", "data", "action"} or tag == "link":
                self.loads.append(f"{tag} {name}={value}")
            if name == "id":
                self.anchors.add(value or "")
            if name == "href":
                self.links.append(value or "")


def test_the_page_needs_no_other_resource_and_its_policy_admits_its_own_alone(scene: Scene) -> None:
    answer = scene.send("GET", "/docs")
    page = Page(answer.text)
    assert page.loads == []
    assert not re.search(r"@import|url\(|fetch\(|import\(", answer.text)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert not re.search(r"<[^>]*\s(style|on\w+)=", answer.text), (
        "the policy keeps inline styles and handlers from working"
    )


def test_the_page_shows_every_route_and_code_and_its_links_lead_somewhere(scene: Scene) -> None:
    page = Page(scene.send("GET", "/docs").text)
    paths = scene.api["paths"].values()
    operations = {operation["operationId"] for item in paths for operation in operations_of(item).values()}
    assert operations | set(CODES) <= page.anchors
    elsewhere = {"/" + link for link in page.links if link.removeprefix("#") not in page.anchors}
    assert "/openapi.json" in elsewhere <= set(scene.api["paths"])


def test_what_a_description_says_cannot_become_markup() -> None:
    api = describe(Settings())
    api["info"]["description"] = "<script>alert(1)</script> `<b>`"
    assert "<script>alert" not in render_page("docs.html", api)
    assert "<b>" not in render_page("docs.html", api)


def test_the_written_page_is_what_the_command_makes() -> None:
    written = (PROJECT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == render_page("api.md", API), "run: python app.py openapi --markdown > docs/api.md"
