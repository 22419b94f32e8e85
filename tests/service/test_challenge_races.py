"""Challenges between real processes: killed between the issue and the use, and used twice at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.filming import frames_of
from tests.support.running import ASTRONAUT, Service


@pytest.fixture
def services(tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    """Two processes on one database."""
    both = [Service(tmp_path, MODEL_THREADS="1", UPLOADS_DIR=str(tmp_path / f"uploads-{one}")) for one in (1, 2)]
    for service in both:
        service.start()
    yield both[0], both[1]
    for service in both:
        service.kill()


def ask(service: Service) -> Any:
    return requests.post(f"{service.url}/challenges", timeout=60).json()


def sign_up(service: Service, challenge: Any, frames: list[bytes]) -> tuple[int, str]:
    sent = [("file", ("me.png", ASTRONAUT)), *[("frame", ("frame.jpg", frame)) for frame in frames]]
    data = {"challenge_id": challenge["challenge_id"]}
    answer = requests.post(f"{service.url}/signUp", files=sent, data=data, timeout=60)
    return answer.status_code, answer.json().get("code", "ok")


def test_of_two_processes_one_uses_a_challenge(services: tuple[Service, Service]) -> None:
    challenge = ask(services[0])
    frames = frames_of(challenge["steps"])
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda service: sign_up(service, challenge, frames), services))
    assert sorted(answers) == [(200, "ok"), (409, "challenge_used")]


def test_a_challenge_outlives_a_kill_before_its_use_and_is_used_after_one(services: tuple[Service, Service]) -> None:
    service, other = services
    challenge = ask(service)
    frames = frames_of(challenge["steps"])
    service.kill()
    service.start()
    assert sign_up(service, challenge, frames) == (200, "ok")
    service.kill()
    service.start()
    assert sign_up(service, challenge, frames) == (409, "challenge_used")
    assert sign_up(other, challenge, frames) == (409, "challenge_used")
