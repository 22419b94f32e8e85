"""Decoding in processes of their own: what comes back, and what becomes of one that crashes, hangs or grows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import FaceError
from photos import decode, decoder_pool
from photos.decoder_pool import Decoders
from tests.support.heic import heic_of_many
from tests.support.running import ASTRONAUT

LINUX = Path("/proc/self/environ").exists()
LIMITS: dict[str, Any] = {"max_bytes": 8 * 2**20, "max_pixels": 10_000_000}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    monkeypatch.setenv("TEMPLATE_KEYS", "hunter2")
    pool = Decoders(1, LIMITS["max_pixels"])
    yield pool
    pool.close()


def process_of(pool: Decoders) -> int:
    return pool._idle.queue[0].pid


def refusal(pool: Decoders, data: bytes, **limits: Any) -> FaceError:
    with pytest.raises(FaceError) as caught:
        pool.decode(data, **{**LIMITS, **limits})
    return caught.value


@pytest.mark.parametrize("longest_side", [200, 100_000])
def test_a_photo_is_what_it_is_when_decoded_here(pool: Decoders, longest_side: int) -> None:
    here = decode.decode(ASTRONAUT, longest_side=longest_side, **LIMITS)
    there = pool.decode(ASTRONAUT, longest_side=longest_side, **LIMITS)
    assert (there.reduced_by, there.size) == (here.reduced_by, here.size)
    assert np.array_equal(there.pixels, here.pixels)


def test_a_refusal_comes_with_its_own_words(pool: Decoders) -> None:
    assert refusal(pool, b"").code == "empty_file"
    assert refusal(pool, b"Hello!").code == "unsupported_format"
    error = refusal(pool, ASTRONAUT, max_pixels=200_000)
    assert (error.code, "512x512" in error.message) == ("image_too_large", True)


def test_a_decoder_that_was_ended_while_idle_costs_no_photo(pool: Decoders) -> None:
    first = process_of(pool)
    os.kill(first, signal.SIGKILL)
    pool._idle.queue[0].wait()
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)
    assert process_of(pool) != first


@pytest.mark.skipif(not LINUX, reason="limits memory as Linux does")
def test_a_decoder_that_crashes_takes_its_photo_with_it_and_nothing_else(pool: Decoders) -> None:
    pool.decode(ASTRONAUT, **LIMITS)
    first = process_of(pool)
    assert refusal(pool, heic_of_many(photos=100, metadata=7_000_000, pieces=30)).code == "unreadable_image"
    assert process_of(pool) != first
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)


def test_where_no_decoder_works_nobody_is_told_that_a_photo_is_damaged(
    pool: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_pool, "_PROGRAM", ("/nowhere.py",))
    os.kill(process_of(pool), signal.SIGKILL)
    pool._idle.queue[0].wait()
    for _ in range(2):
        assert refusal(pool, ASTRONAUT).code == "overloaded"
    with pytest.raises(OSError, match="decoded"):
        pool.require_working()
    monkeypatch.undo()
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)


def test_a_decoder_that_hangs_is_ended(pool: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.decode(ASTRONAUT, **LIMITS)
    monkeypatch.setattr(decoder_pool, "MAX_DECODING_S", 0.2)
    os.kill(process_of(pool), signal.SIGSTOP)
    assert refusal(pool, ASTRONAUT).code == "unreadable_image"
    monkeypatch.undo()
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)


@pytest.mark.skipif(not LINUX, reason="limits memory and tells of processes as Linux does")
def test_a_photo_that_unfolds_to_gigabytes_ends_at_the_decoders_limit(pool: Decoders) -> None:
    bomb = heic_of_many(photos=900, metadata=7_000_000)
    assert len(bomb) < LIMITS["max_bytes"]
    assert refusal(pool, bomb).code == "unreadable_image"
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)


@pytest.mark.skipif(not LINUX, reason="tells of processes as Linux does")
def test_a_decoder_knows_no_secret_of_the_service(pool: Decoders) -> None:
    pool.decode(ASTRONAUT, **LIMITS)
    assert b"hunter2" not in Path(f"/proc/{process_of(pool)}/environ").read_bytes()


def test_who_stops_the_whole_group_of_processes_lets_the_requests_in_hand_finish(pool: Decoders) -> None:
    pool.decode(ASTRONAUT, **LIMITS)
    before = process_of(pool)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(before, number)
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)
    assert process_of(pool) == before


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"nonsense",
        b'"code"',
        b"[" * 4000,
        b'{"code": "no_such", "sentence": "no_such", "values": {}}',
        b'{"height": 9}',
        b'{"height": 1e999, "width": 9, "by": 1, "of_width": 9, "of_height": 9}',
        b'{"height": 99999999, "width": 99999999, "by": 1, "of_width": 9, "of_height": 9}',
        b'{"height": 9, "width": 9, "by": 1, "of_width": 9, "of_height": 9}\nshort',
    ],
    ids=range(9),
)
def test_what_a_decoder_that_was_taken_over_says_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lie: bytes
) -> None:
    liar = tmp_path / "liar.py"
    # It waits until it is asked: what ends before that is no photo's fault.
    liar.write_text(f"import sys\nsys.stdin.buffer.readline()\nsys.stdout.buffer.write({lie!r} + b'\\n')\n")
    with monkeypatch.context() as lying:
        lying.setattr(decoder_pool, "_PROGRAM", (str(liar),))
        pool = Decoders(1, LIMITS["max_pixels"])
    assert refusal(pool, ASTRONAUT).code == "unreadable_image"
    assert pool.decode(ASTRONAUT, **LIMITS).size == (512, 512)
    pool.close()


def test_an_end_leaves_no_process(pool: Decoders) -> None:
    process = pool._idle.queue[0]
    pool.close()
    assert process.poll() is not None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{process.pid}").exists():
        time.sleep(0.01)
    assert not Path(f"/proc/{process.pid}").exists()
