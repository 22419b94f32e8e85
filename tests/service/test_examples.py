"""The programs of examples/, run against the running service."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from settings import PROJECT
from tests.support.running import ASTRONAUT, SOMEBODY, Service

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("examples"))
    service.start()
    yield service
    service.kill()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos of one person, one of somebody else, and a file that is no photo."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "me.png").write_bytes(ASTRONAUT)
    Image.open(io.BytesIO(ASTRONAUT)).convert("RGB").save(folder / "me-again.jpg", quality=80)
    Image.open(io.BytesIO(SOMEBODY)).save(folder / "other.jpg", quality=95)
    (folder / "no-photo.jpg").write_bytes(b"no photo")
    return folder


def run(service: Service, photos: Path, program: str, *names: str) -> tuple[int, str]:
    """The exit status and the output of one example."""
    interpreter = "sh" if program.endswith(".sh") else sys.executable
    ended = subprocess.run(
        [interpreter, str(PROJECT / "examples" / program), *names],
        check=False,
        cwd=photos,
        env={**os.environ, "FACE_API": service.url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_person_is_signed_up_and_recognised(service: Service, photos: Path) -> None:
    status, said = run(service, photos, "sign_up_and_verify.py", "me.png", "me-again.jpg")
    assert status == 0
    assert "Face stored successfully" in said
    assert "Face verified successfully" in said


def test_a_camera_is_guided(service: Service, photos: Path) -> None:
    status, said = run(service, photos, "guide_a_camera.py", "me.png")
    assert (status, "The photo passes every check." in said) == (0, True)


def test_a_file_that_is_no_photo_is_explained(service: Service, photos: Path) -> None:
    status, said = run(service, photos, "guide_a_camera.py", "no-photo.jpg")
    assert (status, "Traceback" in said) == (1, False)


@pytest.mark.parametrize(("card", "status"), [("me-again.jpg", 0), ("other.jpg", 1)])
def test_a_card_is_compared_with_a_selfie(service: Service, photos: Path, card: str, status: int) -> None:
    found, said = run(service, photos, "check_a_card.py", "me.png", card)
    assert found == status
    assert "Similarity" in said


def test_a_monitor_sees_a_service_that_can_decide_and_one_that_is_gone(service: Service, photos: Path) -> None:
    assert run(service, photos, "watch_health.sh")[0] == 0
    away = Service(photos)
    away.url = "http://127.0.0.1:9"
    assert run(away, photos, "watch_health.sh")[0] == 1


def test_every_example_is_listed_and_run_here() -> None:
    programs = {path.name for path in (PROJECT / "examples").iterdir() if path.suffix in (".py", ".sh")}
    listed = (PROJECT / "examples" / "README.md").read_text("utf-8")
    assert {name for name in programs if f"examples/{name}" not in listed} == set()
    here = Path(__file__).read_text("utf-8")
    assert {name for name in programs if f'"{name}"' not in here} == set()
