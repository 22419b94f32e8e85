"""Who may call: keys and their scopes, limits, lock-outs, web origins, and what a service without keys serves."""

from __future__ import annotations

import io
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import app
from api.access import Access, parse_origins
from api.api_keys import ApiKeysError, editing, new_api_key, parse, read_file
from commands import cli as commands
from gallery.decisions import Gallery
from settings import Settings, SettingsError, load_settings
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_photo, a_template, jpeg

PROTECTED = ["/signUp", "/signup", "/verify", "/compare", "/analyze"]


@pytest.fixture(autouse=True)
def _within_one_minute() -> None:
    """The limits count by the minutes of the clock: no test begins in the last seconds of one."""
    left = 60 - time.time() % 60
    if left < 5:
        time.sleep(left)


class Caller:
    """A client of a service with its own store, key file and settings."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(data_dir=folder, **settings)
        self.store = SqliteStore(folder / "faces.sqlite3")
        self.store.prepare()
        self.engine = ScriptedEngine()
        gallery = Gallery(self.store, self.engine.name, self.engine.dimension)
        self.client = make_app(self.settings, self.engine, ScriptedAttributes(), self.store, gallery).test_client()

    def post(self, route: str, key: str | None = None, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        names = ["file1", "file2"] if route == "/compare" else ["file"]
        data = {**fields, **{name: (io.BytesIO(jpeg(a_photo())), "p.jpg") for name in names}}
        headers = {**(headers or {}), **({"Authorization": f"Bearer {key}"} if key else {})}
        return self.client.post(route, data=data, headers=headers)


def keys_command(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `python app.py keys ...` writes to its standard output."""
    assert app.main(["keys", *words, "--data-dir", str(folder)]) == 0
    return capsys.readouterr().out.strip()


@pytest.fixture
def app_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    return keys_command(tmp_path, capsys, "add", "phone")


@pytest.fixture
def caller(tmp_path: Path, app_key: str) -> Iterator[Caller]:
    caller = Caller(tmp_path)
    yield caller
    caller.store.close()


@pytest.mark.parametrize("route", PROTECTED)
def test_without_a_key_every_route_that_takes_a_photo_is_closed(caller: Caller, route: str) -> None:
    response = caller.post(route)
    assert (response.status_code, response.json["code"]) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert caller.post(route, "fk_" + "A" * 43).json["code"] == "unauthorized"
    assert caller.engine.detections == 0


@pytest.mark.parametrize("route", PROTECTED)
def test_a_key_opens_what_its_scope_names(caller: Caller, app_key: str, route: str) -> None:
    for response in (caller.post(route, app_key), caller.post(route, headers={"X-API-Key": app_key})):
        assert response.json.get("code") in (None, "no_match", "duplicate_face")


def test_a_key_of_another_scope_is_told_so(tmp_path: Path, caller: Caller, capsys: pytest.CaptureFixture[str]) -> None:
    ops_key = keys_command(tmp_path, capsys, "add", "ops", "--scope", "ops")
    response = caller.post("/signUp", ops_key)
    assert (response.status_code, response.json["code"]) == (403, "forbidden")


def test_the_probes_need_no_key(caller: Caller) -> None:
    assert [caller.client.get(route).status_code for route in ("/", "/health")] == [200, 200]


def test_keys_are_added_and_revoked_while_the_service_runs(
    tmp_path: Path, caller: Caller, app_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second = keys_command(tmp_path, capsys, "add", "tablet")
    assert [caller.post("/analyze", key).status_code for key in (app_key, second)] == [200, 200]
    keys_command(tmp_path, capsys, "revoke", "phone")
    assert [caller.post("/analyze", key).status_code for key in (app_key, second)] == [401, 200]


def test_the_first_key_closes_a_running_service_and_a_lost_file_does_not_open_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caller = Caller(tmp_path)
    assert caller.post("/analyze").status_code == 200
    key = keys_command(tmp_path, capsys, "add", "phone")
    assert [caller.post("/analyze").status_code, caller.post("/analyze", key).status_code] == [401, 200]
    (tmp_path / "keys").unlink()
    assert [caller.post("/analyze").status_code, caller.post("/analyze", key).status_code] == [401, 401]


def test_a_key_file_that_cannot_be_read_lets_nobody_in(tmp_path: Path, caller: Caller, app_key: str) -> None:
    (tmp_path / "keys").write_text("phone:app:rubbish\n")
    assert caller.post("/analyze", app_key).json["code"] == "not_ready"
    assert caller.client.get("/").status_code == 200
    with pytest.raises(SettingsError, match="line 1"):
        Access(Settings(data_dir=tmp_path))


def test_a_key_is_shown_once_and_only_its_hash_is_kept(
    tmp_path: Path, app_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    assert app_key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert app_key not in keys_command(tmp_path, capsys, "list")
    assert keys_command(tmp_path, capsys, "list").startswith("phone\tapp\t20")


def test_a_key_revoked_while_others_are_added_stays_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with editing(file) as api_keys:
        api_keys.append(new_api_key("lost", ["app"])[1])

    def add(number: int) -> None:
        with editing(file) as api_keys:
            api_keys.append(new_api_key(f"phone-{number}", ["app"])[1])

    def revoke() -> None:
        with editing(file) as api_keys:
            time.sleep(0.01)
            api_keys[:] = [api_key for api_key in api_keys if api_key.name != "lost"]

    with ThreadPoolExecutor(9) as pool:
        list(
            pool.map(
                lambda call: call(), [partial(add, 1), partial(add, 2), revoke, *(partial(add, n) for n in (3, 4))]
            )
        )
    assert {api_key.name for api_key in read_file(file)} == {f"phone-{number}" for number in (1, 2, 3, 4)}


def test_an_edit_that_fails_changes_nothing(tmp_path: Path, app_key: str) -> None:
    before = (tmp_path / "keys").read_text()
    with pytest.raises(ZeroDivisionError), editing(tmp_path / "keys") as api_keys:
        api_keys[:] = api_keys[: 1 // 0]
    assert (tmp_path / "keys").read_text() == before


def test_a_line_of_before_the_dates_is_still_an_api_key(tmp_path: Path) -> None:
    secret, api_key = new_api_key("phone", ["app"])
    (tmp_path / "keys").write_text(f"phone:app:{api_key.sha256}\n")
    assert Caller(tmp_path).post("/analyze", secret).status_code == 200
    assert (api_key.line(), parse(api_key.line())) == (f"phone:app:{api_key.sha256}:{api_key.added}", [api_key])


def test_keys_may_come_from_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret, key = new_api_key("phone", ["app"])
    assert Caller(tmp_path, api_keys=key.line()).post("/analyze", secret).status_code == 200


def test_two_keys_of_one_name_are_refused(tmp_path: Path, app_key: str) -> None:
    assert app.main(["keys", "add", "phone", "--data-dir", str(tmp_path)]) == 1


@pytest.mark.parametrize("line", ["phone", "phone:app", "phone:root:" + "0" * 64, "a b:app:" + "0" * 64, "p:app:xyz"])
def test_a_line_that_is_no_key_is_refused_without_being_shown(line: str) -> None:
    with pytest.raises(ApiKeysError, match="line 2") as refusal:
        parse(f"# keys\n{line}\n")
    assert line not in str(refusal.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_keys_only_this_machine_is_served(tmp_path: Path, host: str) -> None:
    with pytest.raises(SettingsError, match="keys add"):
        Access(Settings(data_dir=tmp_path, host=host))
    Access(Settings(data_dir=tmp_path, host=host, allow_no_keys=True))
    Access(Settings(data_dir=tmp_path, host=host, api_keys=new_api_key("phone", ["app"])[1].line()))


def test_without_keys_a_proxy_on_this_machine_opens_no_door(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="TRUSTED_PROXIES=1"):
        Access(Settings(data_dir=tmp_path, trusted_proxies=1))
    caller = Caller(tmp_path)
    for header in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
        answer = caller.post("/analyze", headers={header: "192.0.2.1"})
        assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    assert caller.client.get("/health", headers={"Via": "1.1 proxy"}).status_code == 200
    assert Caller(tmp_path, allow_no_keys=True).post("/analyze", headers={"Via": "1.1 proxy"}).status_code == 200


@pytest.mark.parametrize("wrong", ["/metrics", "/users/" + "0" * 8])
def test_no_method_and_no_spelling_of_an_address_passes_the_gate(caller: Caller, app_key: str, wrong: str) -> None:
    for headers, status in (({}, 401), ({"X-API-Key": app_key}, 403)):
        for method in ("GET", "HEAD"):
            assert caller.client.open(wrong, method=method, headers=headers).status_code == status
    for spelled in (wrong + "/", wrong.upper(), "/." + wrong, wrong + "%00", wrong.replace("e", "%2565")):
        assert caller.client.get(spelled).status_code in (401, 404)
    assert caller.client.options(wrong).status_code == 405


@pytest.mark.parametrize(("kind", "package"), [("mongodb", "pymongo"), ("redis", "redis")])
def test_a_storage_that_accepts_and_says_nothing_holds_no_request_for_long(
    tmp_path: Path, app_key: str, kind: str, package: str
) -> None:
    pytest.importorskip(package)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        caller = Caller(tmp_path, limits_storage=f"{kind}://me:hunter2@127.0.0.1:{silent.getsockname()[1]}")
        response = caller.post("/analyze", app_key)
    assert (response.status_code, response.json["code"]) == (503, "not_ready")


def test_an_address_is_limited_before_its_keys_are_looked_at(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, rate_limit_address="3/minute")
    assert [caller.post("/analyze", "fk_wrong").status_code for _ in range(3)] == [401, 401, 401]
    response = caller.post("/analyze", app_key)
    assert (response.status_code, response.json["code"]) == (429, "rate_limited")
    assert 1 <= int(response.headers["Retry-After"]) <= 61
    elsewhere = caller.client.post("/analyze", environ_base={"REMOTE_ADDR": "192.0.2.9"})
    assert elsewhere.status_code == 401


def test_every_address_of_one_ipv6_network_counts_as_one(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, rate_limit_address="1/minute")
    answers = [
        caller.client.post("/analyze", environ_base={"REMOTE_ADDR": address}).status_code
        for address in ("2001:db8::1", "2001:db8::2:1", "2001:db8:0:1::1")
    ]
    assert answers == [401, 429, 401]


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [("192.0.2.1", "192.0.2.1:4711", "192.0.2.2:4711"), ("2001:db8::1", "[2001:db8::2]:4711", "[2001:db8:1::1]:4711")],
)
def test_the_port_that_a_proxy_tells_is_no_part_of_an_address(
    tmp_path: Path, app_key: str, first: str, same: str, other: str
) -> None:
    caller = Caller(tmp_path, rate_limit_address="1/minute", trusted_proxies=1)
    answers = [
        caller.client.post("/analyze", headers={"X-Forwarded-For": one}).status_code for one in (first, same, other)
    ]
    assert answers == [401, 429, 401]


def test_a_key_is_limited_wherever_it_comes_from(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, rate_limit_key="2/minute", rate_limit_address="")
    headers = {"X-API-Key": app_key}
    answers = [
        caller.client.post("/analyze", headers=headers, environ_base={"REMOTE_ADDR": f"192.0.2.{n}"}).status_code
        for n in range(3)
    ]
    assert answers == [400, 400, 429]


def test_what_callers_claim_about_their_address_counts_only_from_a_trusted_proxy(tmp_path: Path, app_key: str) -> None:
    for proxies, third in ((0, 429), (1, 401)):
        caller = Caller(tmp_path, rate_limit_address="2/minute", trusted_proxies=proxies)
        answers = [
            caller.client.post("/analyze", headers={"X-Forwarded-For": f"192.0.2.{n}"}).status_code for n in range(3)
        ]
        assert answers == [401, 401, third]


def test_a_person_whose_identity_is_guessed_at_is_locked_out_for_everybody(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, lockout="2/15 minutes")
    caller.engine.template = a_template(1)
    somebody = caller.post("/signUp", app_key).json["user_id"]
    assert caller.post("/verify", app_key, user_id=somebody).status_code == 200
    caller.engine.template = -a_template(1)
    guesses = [caller.post("/verify", app_key, user_id=somebody).json["code"] for _ in range(3)]
    assert guesses == ["no_match", "no_match", "rate_limited"]
    caller.engine.template = a_template(1)
    locked = caller.post("/verify", app_key, user_id=somebody.upper())
    assert (locked.status_code, 1 <= int(locked.headers["Retry-After"]) <= 1800) == (429, True)
    assert caller.post("/verify", app_key).status_code == 200
    assert caller.post("/verify", app_key, user_id=str(uuid.uuid4())).json["code"] == "unknown_user"


def test_photos_of_others_that_are_added_to_a_person_count_for_the_lock_out_too(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, lockout="2/15 minutes")
    caller.engine.template = a_template(1)
    somebody = caller.post("/signUp", app_key).json["user_id"]
    caller.engine.template = -a_template(1)
    codes = [caller.post(f"/users/{somebody}/photos", app_key).json["code"] for _ in range(3)]
    assert codes == ["no_match", "no_match", "rate_limited"]
    caller.engine.template = a_template(1)
    assert caller.post(f"/users/{somebody}/photos", app_key).status_code == 429
    assert caller.post("/verify", app_key, user_id=somebody).status_code == 429


@pytest.mark.parametrize("route", ["/verify", "/users/{}/photos"])
def test_failed_challenges_for_a_person_count_for_the_lock_out_too(tmp_path: Path, app_key: str, route: str) -> None:
    caller = Caller(tmp_path, lockout="2/15 minutes")
    caller.engine.template = a_template(1)
    somebody = caller.post("/signUp", app_key).json["user_id"]
    claim = {"user_id": somebody} if route == "/verify" else {}

    def challenge() -> dict[str, str]:
        headers = {"Authorization": f"Bearer {app_key}"}
        return {"challenge_id": caller.client.post("/challenges", headers=headers).get_json()["challenge_id"]}

    def code(**fields: Any) -> str:
        return str(caller.post(route.format(somebody), app_key, **claim, **fields).json["code"])

    assert [code(**challenge()) for _ in range(3)] == ["challenge_failed"] * 3  # no frames are a client's mistake
    kept = challenge()
    codes = [code(frame=(io.BytesIO(jpeg(a_photo())), "f.jpg"), **challenge()) for _ in range(3)]
    assert codes == ["challenge_failed", "challenge_failed", "rate_limited"]
    assert caller.post("/verify", app_key, user_id=somebody).status_code == 429
    before = caller.engine.detections
    assert code(frame=(io.BytesIO(jpeg(a_photo())), "f.jpg"), **kept) == "rate_limited"
    assert caller.engine.detections == before
    elsewhere: dict[str, Any] = {"frame": (io.BytesIO(jpeg(a_photo())), "f.jpg"), **kept}
    assert caller.post("/compare", app_key, **elsewhere).json["code"] == "challenge_failed"  # not challenge_used


def test_a_key_for_apps_adds_photos_and_removes_none(caller: Caller, app_key: str) -> None:
    somebody = caller.post("/signUp", app_key).json["user_id"]
    assert caller.post(f"/users/{somebody}/photos").status_code == 401
    assert caller.post(f"/users/{somebody}/photos", app_key).json["photos"] == 2
    removed = caller.client.delete(f"/users/{somebody}/photos/1", headers={"Authorization": f"Bearer {app_key}"})
    assert (removed.status_code, removed.get_json()["code"]) == (403, "forbidden")


def test_a_success_forgets_the_failures_before_it(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, lockout="2/15 minutes")
    caller.engine.template = a_template(1)
    somebody = caller.post("/signUp", app_key).json["user_id"]
    for _ in range(3):
        caller.engine.template = -a_template(1)
        assert caller.post("/verify", app_key, user_id=somebody).status_code == 401
        caller.engine.template = a_template(1)
        assert caller.post("/verify", app_key, user_id=somebody).status_code == 200


def test_one_apps_idempotency_keys_say_nothing_to_another(
    tmp_path: Path, app_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other_key = keys_command(tmp_path, capsys, "add", "tablet")
    caller = Caller(tmp_path)
    again = {"Idempotency-Key": "1"}
    user_id = caller.post("/signUp", app_key, headers=again).json["user_id"]
    assert caller.post("/signUp", app_key, headers=again).json["user_id"] == user_id
    assert caller.post("/signUp", other_key, headers=again).json["code"] == "duplicate_face"


def test_a_key_of_the_same_name_as_a_revoked_one_has_its_own_idempotency_keys(
    tmp_path: Path, app_key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    caller = Caller(tmp_path)
    caller.post("/signUp", app_key, headers={"Idempotency-Key": "1"})
    keys_command(tmp_path, capsys, "revoke", "phone")
    successor = keys_command(tmp_path, capsys, "add", "phone")
    assert caller.post("/signUp", successor, headers={"Idempotency-Key": "1"}).json["code"] == "duplicate_face"


def test_a_limit_can_be_switched_off_where_an_empty_line_asks_for_the_default(tmp_path: Path, app_key: str) -> None:
    names = ("RATE_LIMIT_ADDRESS", "RATE_LIMIT_KEY", "LOCKOUT")
    empty = load_settings({}, dict.fromkeys(names, ""), None)
    assert empty.rate_limit_address == Settings().rate_limit_address
    off = load_settings({}, dict.fromkeys(names, "off"), None)
    caller = Caller(tmp_path, **{name.lower(): getattr(off, name.lower()) for name in names})
    assert {caller.client.post("/analyze").status_code for _ in range(700)} == {401}


@pytest.mark.parametrize("wrong", [{"lockout": "often"}, {"rate_limit_key": "x"}, {"limits_storage": "nowhere://"}])
def test_a_limit_that_is_none_is_refused_at_the_start(tmp_path: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong)).upper()):
        Access(Settings(data_dir=tmp_path, **wrong))  # type: ignore[arg-type]


def test_pages_of_other_origins_are_refused_unless_they_are_named(tmp_path: Path) -> None:
    caller = Caller(tmp_path, cors_origins="https://app.example.com")
    for origin in ("https://evil.example", "null"):
        assert caller.post("/analyze", headers={"Origin": origin}).json["code"] == "forbidden"
    response = caller.post("/analyze", headers={"Origin": "https://app.example.com"})
    assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example.com")
    assert caller.post("/analyze", headers={"Origin": "http://localhost"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["*", "app.example.com", "https://a.example/app", "https://a.example;https://b.example", "null", "https://"],
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(tmp_path: Path, origin: str) -> None:
    with pytest.raises(SettingsError, match="CORS_ORIGINS"):
        Access(Settings(data_dir=tmp_path, cors_origins=f"https://app.example.com, {origin}"))


def test_an_origin_is_read_as_browsers_write_it() -> None:
    written = "https://App.example.com:443/, capacitor://localhost,http://[::1]:3000"
    assert parse_origins(written) == {"https://app.example.com", "capacitor://localhost", "http://[::1]:3000"}


def test_a_page_of_the_same_host_by_another_scheme_is_foreign(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, trusted_proxies=1)
    for origin, forwarded, status in (
        ("http://localhost", "http", 200),
        ("https://localhost", "http", 403),
        ("https://localhost", "https", 200),
        ("ftp://localhost", "http", 403),
    ):
        headers = {"Origin": origin, "X-Forwarded-Proto": forwarded}
        assert caller.post("/analyze", app_key, headers=headers).status_code == status


def test_a_preflight_is_answered_for_named_origins_alone(tmp_path: Path, app_key: str) -> None:
    caller = Caller(tmp_path, cors_origins="https://app.example.com")
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    response = caller.client.options("/verify", headers=asked)
    assert (response.status_code, "Authorization" in response.headers["Access-Control-Allow-Headers"]) == (204, True)
    refused = caller.client.options("/verify", headers={**asked, "Origin": "https://evil.example"})
    assert (refused.status_code, "Access-Control-Allow-Origin" in refused.headers) == (403, False)


def test_a_web_site_whose_name_points_to_this_machine_is_no_page_of_the_service(tmp_path: Path) -> None:
    headers = {"Host": "evil.example:5000", "Origin": "http://evil.example:5000"}
    caller = Caller(tmp_path)
    assert caller.post("/analyze", headers=headers).json["code"] == "forbidden"
    for host, status in (("evil.example:5000", 403), ("localhost:5000", 200), ("[::1]:5000", 200), ("127.0.0.1", 200)):
        assert caller.client.get("/metrics", headers={"Host": host}).status_code == status


def test_every_answer_tells_browsers_not_to_keep_frame_or_guess(caller: Caller) -> None:
    for response in (caller.client.get("/"), caller.post("/verify"), caller.client.get("/nothing")):
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]


def test_the_log_names_the_key_by_its_name(caller: Caller, app_key: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        caller.post("/analyze", app_key)
    assert caplog.records[-1].fields["key"] == "phone"  # type: ignore[attr-defined]
    assert app_key not in caplog.text


def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in commands.COMMANDS:
        with pytest.raises(SystemExit):
            app.main([name, "--help"])
        assert "usage: python app.py" in capsys.readouterr().out
