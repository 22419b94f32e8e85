"""Several service processes on one database: what is decided in one holds in all, at once."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.databases import MongoServer
from tests.support.fakes import NO_GATES, write_tiny_pack
from tests.support.running import Service

PROCESSES = 4


def a_person(number: int) -> bytes:
    """A picture in which the tiny pack finds one face, unlike every other number's."""
    shades = np.random.default_rng(number).integers(0, 200, (20, 20, 3), dtype=np.uint8)
    picture = np.kron(shades, np.ones((32, 32, 1), np.uint8))
    picture[320:352, 320:352] = 255
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=["SQLite", "MongoDB"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Service]]:
    write_tiny_pack(tmp_path / "pack")
    settings = {
        **NO_GATES,
        "DUPLICATE_THRESHOLD": "0.9",
        "VERIFY_THRESHOLD": "0.9",
        "FACE_MODEL": str(tmp_path / "pack"),
        "MODEL_THREADS": "1",
    }
    if request.param == "MongoDB":
        server: MongoServer = request.getfixturevalue("mongo_server")
        settings.update(MONGO_URI=server.uri, MONGO_COLLECTION=f"races_{tmp_path.name}")
    services = [
        Service(tmp_path, UPLOADS_DIR=str(tmp_path / f"uploads{number}"), **settings) for number in range(PROCESSES)
    ]
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(Service.start, services))
    yield services
    for service in services:
        service.kill()


@pytest.mark.slow
def test_of_64_simultaneous_sign_ups_of_a_face_in_four_processes_one_is_stored(services: list[Service]) -> None:
    pictures = [a_person(0), a_person(1)]

    def sign_up(number: int) -> tuple[int, int]:
        # Both people at every process, interleaved.
        return number % 2, services[number // 2 % PROCESSES].post("/signUp", pictures[number % 2]).status_code

    with ThreadPoolExecutor(64) as pool:
        answers = Counter(pool.map(sign_up, range(128)))
    assert answers == {(0, 200): 1, (0, 409): 63, (1, 200): 1, (1, 409): 63}


@pytest.mark.slow
def test_who_is_enrolled_in_one_process_is_found_in_every_other_at_its_next_request(services: list[Service]) -> None:
    for number in range(3 * PROCESSES):
        picture = a_person(number)
        user_id = services[number % PROCESSES].post("/signUp", picture).json()["user_id"]
        found = [service.post("/verify", picture).json().get("user_id") for service in services]
        assert found == [user_id] * PROCESSES
