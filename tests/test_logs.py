"""Log lines: what a machine parses and a person reads, and what no line may hold."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

import logs


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines_of(log_format: str, message: str, *arguments: Any, level: str = "INFO", **options: Any) -> list[str]:
    stream = io.StringIO()
    logs.configure(log_format, level, stream)
    logging.getLogger("face_api").info(message, *arguments, **options)
    return stream.getvalue().splitlines()


def test_json_lines_parse_with_the_fields_as_keys() -> None:
    fields = {"request_id": "abc", "status": 200, "ms": 12.5, "figures": {"similarity": 0.94}}
    (line,) = lines_of("json", "%s %s", "POST", "/verify", extra={logs.FIELDS: fields})
    entry = json.loads(line)
    written = datetime.strptime(entry.pop("time"), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - written).total_seconds()) < 60
    assert entry == {"level": "INFO", "logger": "face_api", "message": "POST /verify", **fields}


@pytest.mark.parametrize("text", ["two\nlines", 'a "quote"', "naïve 顔", "\x00\x1b[31m"])
def test_whatever_a_message_holds_stays_one_json_line(text: str) -> None:
    (line,) = lines_of("json", "%s", text, extra={logs.FIELDS: {"sent": text, "path": object()}})
    entry = json.loads(line)
    assert (entry["message"], entry["sent"]) == (text, text)


def test_an_exception_becomes_one_json_key_and_not_more_lines() -> None:
    (line,) = lines_of("json", "failed", exc_info=ValueError("the cause"))
    assert "ValueError: the cause" in json.loads(line)["exception"]


def test_text_for_people_ends_in_key_value_pairs() -> None:
    fields = {"request_id": "abc", "ms": 12.34567, "stages_ms": {"decode": 3.0, "embed": 80.25}}
    (line,) = lines_of("text", "POST /verify", extra={logs.FIELDS: fields})
    assert line.endswith("INFO    POST /verify request_id=abc ms=12.35 stages_ms=decode:3,embed:80.25")


@pytest.mark.parametrize("odd", ["a\nb", "a\r\nb", "a\x1b[31mb", "a\u2028b", "a\x85b", "a\0b"])
def test_whatever_a_text_message_holds_cannot_look_like_a_line_of_its_own(odd: str) -> None:
    first, *others = lines_of("text", "%s", odd, extra={logs.FIELDS: {"sent": odd}})
    assert first[:4].isdigit()
    assert all(line.startswith("  ") for line in others)
    assert all(line.isprintable() for line in (first, *others))


def test_the_web_servers_remark_on_a_client_that_left_names_no_address() -> None:
    stream = io.StringIO()
    logs.configure("text", "INFO", stream)
    logging.getLogger("waitress").info("Client disconnected while serving /secret\nforged")
    assert stream.getvalue() == ""


def test_a_line_without_fields_is_just_its_message() -> None:
    (line,) = lines_of("text", "Ready")
    assert line.endswith("INFO    Ready")


def test_nothing_below_the_level_is_logged() -> None:
    assert lines_of("text", "Ready", level="WARNING") == []


@pytest.mark.parametrize(
    "driver", ["pymongo.command", "urllib3.connectionpool", "httpx", "huggingface_hub.file_download"]
)
def test_a_driver_s_debug_lines_which_can_carry_templates_and_addresses_are_never_logged(driver: str) -> None:
    stream = io.StringIO()
    logs.configure("text", "DEBUG", stream)
    logging.getLogger(driver).debug("embedding: ...")
    logging.getLogger(driver).warning("slow")
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["slow"]


def test_configuring_again_does_not_say_everything_twice() -> None:
    lines_of("text", "first")
    assert len(lines_of("text", "second")) == 1
