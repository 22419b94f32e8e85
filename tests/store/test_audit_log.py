"""The audit log: what it records, what it never records, and that every change to it is noticed."""

from __future__ import annotations

import io
import json
import os
import resource
import stat
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import app
from api.metrics import Metrics
from gallery.decisions import Gallery
from settings import Settings
from store.audit_log import MAX_DROPPED, MAX_REFUSALS_PER_MINUTE, AuditError, AuditLog, lines_of
from store.sqlite import SqliteStore
from tests.support.application import make_app
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_photo, jpeg


def client_of(folder: Path, **settings: Any) -> Any:
    store = SqliteStore(folder / "faces.sqlite3")
    store.prepare()
    engine = ScriptedEngine()
    gallery = Gallery(store, engine.name, engine.dimension)
    audit = AuditLog(folder / "audit", 365)
    wanted = Settings(data_dir=folder, **settings)
    return make_app(wanted, engine, ScriptedAttributes(), store, gallery, audit=audit).test_client()


@pytest.fixture
def app_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert app.main(["keys", "add", "phone", "--data-dir", str(tmp_path)]) == 0
    return capsys.readouterr().out.strip()


def post(client: Any, route: str, **fields: str) -> Any:
    names = ["file1", "file2"] if route == "/compare" else ["file"]
    return client.post(route, data={**fields, **{name: (io.BytesIO(jpeg(a_photo())), "me.jpg") for name in names}})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for _, line in lines_of(folder / "audit")]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "audit").glob("*.jsonl"))


def test_who_enrolled_verified_compared_and_erased_whom_is_told(tmp_path: Path) -> None:
    client = client_of(tmp_path)
    user_id = post(client, "/signUp").json["user_id"]
    post(client, "/signUp")
    post(client, "/verify")
    post(client, "/compare")
    client.get(f"/users/{user_id}")
    client.delete(f"/users/{user_id}")
    post(client, "/verify", user_id=user_id)
    told = [(line["event"], line["code"], line.get("user_id")) for line in lines(tmp_path)]
    assert told == [
        ("enrol", "ok", user_id),
        ("enrol", "duplicate_face", None),
        ("verify", "ok", user_id),
        ("compare", "ok", None),
        ("look up", "ok", user_id),
        ("erase", "ok", user_id),
        ("verify", "unknown_user", user_id),
    ]
    assert lines(tmp_path)[0]["address"] == "127.0.0.1"


def test_a_request_that_only_looks_at_the_service_leaves_no_line(tmp_path: Path) -> None:
    client = client_of(tmp_path)
    for route in ("/", "/health", "/metrics"):
        client.get(route)
    post(client, "/analyze")
    assert files(tmp_path) == []


def test_no_photo_no_template_and_no_similarity_is_in_the_log(tmp_path: Path) -> None:
    client = client_of(tmp_path)
    post(client, "/signUp")
    post(client, "/verify")
    known = {"time", "event", "code", "user_id", "address", "request_id", "begins", "previous"}
    assert all(set(line) <= known for line in lines(tmp_path))
    (file,) = files(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_erasure_answers_with_a_receipt_that_finds_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_of(tmp_path)
    user_id = post(client, "/signUp").json["user_id"]
    receipt = client.delete(f"/users/{user_id}").json["receipt"]
    assert app.main(["audit", "--receipt", receipt, "--data-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["event"] == "erase"
    assert app.main(["audit", "--receipt", "0" * 64, "--data-dir", str(tmp_path)]) == 1


def test_a_line_that_was_changed_taken_out_or_put_in_is_noticed(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", 365)
    for number in range(5):
        log.record("verify", user_id=str(number))
    (file,) = files(tmp_path)
    whole = file.read_bytes().splitlines(keepends=True)
    assert len(lines(tmp_path)) == 5
    for forged in (
        [*whole[:2], whole[2].replace(b'"2"', b'"9"'), *whole[3:]],
        whole[:2] + whole[3:],
        [*whole[:2], whole[0], *whole[2:]],
        [whole[1], whole[0], *whole[2:]],
        [*whole[:2], b"rubbish\n", *whole[2:]],
        [*whole[:2], b"[" * 100_000 + b"\n", *whole[2:]],
        whole[2:],
    ):
        file.write_bytes(b"".join(forged))
        with pytest.raises(AuditError, match="line"):
            lines(tmp_path)
    assert app.main(["audit", "--data-dir", str(tmp_path)]) == 1


def write_some(folder: Path, whose: str) -> None:
    log = AuditLog(folder, 365)
    for number in range(50):
        log.record("verify", user_id=f"{whose}-{number}")


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    context = get_context("spawn")
    writers = [context.Process(target=write_some, args=(tmp_path / "audit", str(number))) for number in range(3)]
    for writer in writers:
        writer.start()
    write_some(tmp_path / "audit", "here")
    for writer in writers:
        writer.join()
    assert len(lines(tmp_path)) == 200


def test_threads_write_one_chain(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", 365)
    threads = [threading.Thread(target=lambda: [log.record("verify") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(tmp_path)) == 200


def test_the_chain_goes_on_over_midnight_and_old_days_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for day in range(5):
        monkeypatch.setattr(time, "time", lambda day=day: now + 86400 * day)
        AuditLog(tmp_path / "audit", 2).record("verify", user_id=str(day))
    assert [line["user_id"] for line in lines(tmp_path)] == ["2", "3", "4"]


def at(monkeypatch: pytest.MonkeyPatch, folder: Path, *days: float) -> None:
    """Write a line on each of these days, counted from today, by a process of its own."""
    now = time.time()
    for day in days:
        with monkeypatch.context() as clock:
            clock.setattr(time, "time", lambda day=day: now + 86400 * day)
            AuditLog(folder / "audit", 365).record("verify", user_id=str(day))


def test_a_clock_that_jumps_ahead_and_back_breaks_no_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = (0, 200, 200.1, 0.1, 0.2, 1, 300, 1.1, 2, 0.3, 2)
    at(monkeypatch, tmp_path, *days)
    assert [line["user_id"] for line in lines(tmp_path)] == [str(day) for day in days]


def test_a_clock_that_jumps_ahead_takes_only_a_few_of_the_oldest_days(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, tmp_path, *range(-30, 0), 5000)
    assert [line["user_id"] for line in lines(tmp_path)] == [*map(str, range(-30, 0)), "5000"]
    # It stays ahead: as far as this machine knows, a day has passed.
    at(monkeypatch, tmp_path, 5001)
    assert [line["user_id"] for line in lines(tmp_path)] == [*map(str, range(-30 + MAX_DROPPED, 0)), "5000", "5001"]


def test_a_clock_that_jumps_ahead_and_back_again_and_again_takes_no_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [*range(-30, 0), 5000, 0, 5001, 1, 6000, 2]
    at(monkeypatch, tmp_path, *days)
    assert [line["user_id"] for line in lines(tmp_path)] == [str(day) for day in days]


def test_days_written_ahead_of_their_time_are_dropped_with_those_that_follow_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, tmp_path, 0, 5000, 1, 2, 2 + 366, 2 + 367)
    assert [line["user_id"] for line in lines(tmp_path)] == ["1", "2", "368", "369"]
    at(monkeypatch, tmp_path, 2 + 368)
    assert [line["user_id"] for line in lines(tmp_path)] == ["368", "369", "370"]


@pytest.mark.parametrize("torn", [b'{"time": "20', b"\0" * 100_000])
def test_a_line_that_a_power_cut_tore_is_taken_out_and_the_chain_goes_on(tmp_path: Path, torn: bytes) -> None:
    for _ in range(2):
        AuditLog(tmp_path / "audit", 365).record("verify")
        (file,) = files(tmp_path)
        with file.open("ab") as end:
            end.write(torn)
    assert len(lines(tmp_path)) == 2
    AuditLog(tmp_path / "audit", 365).record("verify")
    assert len(lines(tmp_path)) == 3


def test_a_day_whose_first_line_found_no_room_breaks_no_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, tmp_path, -1)
    (tmp_path / "audit" / f"{time.strftime('%Y-%m-%d', time.gmtime())}.jsonl").touch()
    at(monkeypatch, tmp_path, 0, 0)
    assert len(lines(tmp_path)) == 3


def test_a_refused_key_leaves_a_line_with_its_name_wherever_it_was_tried(tmp_path: Path, app_key: str) -> None:
    client = client_of(tmp_path)
    client.get("/metrics")
    client.get("/metrics", headers={"X-API-Key": "wrong"})
    client.get("/metrics", headers={"X-API-Key": app_key})
    post(client, "/verify")
    told = [(line["event"], line["code"], line.get("key")) for line in lines(tmp_path)]
    assert told == [
        ("call", "unauthorized", None),
        ("call", "unauthorized", None),
        ("call", "forbidden", "phone"),
        ("verify", "unauthorized", None),
    ]


@pytest.mark.usefixtures("app_key")
def test_refused_keys_fill_the_log_only_so_fast_and_it_tells_how_many_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(tmp_path, rate_limit_address="off")
    begun = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: begun)
    for _ in range(MAX_REFUSALS_PER_MINUTE + 7):
        client.get("/metrics", headers={"X-API-Key": "wrong"})
    assert len(lines(tmp_path)) == MAX_REFUSALS_PER_MINUTE
    monkeypatch.setattr(time, "monotonic", lambda: begun + 60)
    client.get("/metrics", headers={"X-API-Key": "wrong"})
    assert [line.get("left_out") for line in lines(tmp_path)][-2:] == [None, "7"]


@pytest.mark.usefixtures("app_key")
def test_whom_limits_or_origins_turn_away_cannot_fill_the_log(tmp_path: Path) -> None:
    client = client_of(tmp_path, rate_limit_address="2/hour")
    codes = [client.post("/verify").json["code"] for _ in range(20)]
    codes += [client.post("/verify", headers={"Origin": "https://elsewhere.example"}).json["code"] for _ in range(20)]
    assert codes == ["unauthorized"] * 2 + ["rate_limited"] * 18 + ["forbidden"] * 20
    assert len(lines(tmp_path)) == 2


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_full_disk_stops_no_request_and_breaks_no_chain(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", 365)
    log.record("verify")
    (file,) = files(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, before[1]))
    try:
        assert log.record("verify") is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.lost == 1
    text, _ = Metrics("m", lambda: (0, 0), lambda: {"enrolled": 0, "last_seq": 0}, lambda: log.lost).text()
    assert b"face_audit_lost_total 1.0" in text
    log.record("verify")
    assert len(lines(tmp_path)) == 2
