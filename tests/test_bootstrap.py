"""Putting the parts together: the folder of uploads, and what is said at the start."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bootstrap import UPLOAD_PREFIX, announce_risks, prepare_uploads
from settings import PROJECT, Settings


@pytest.fixture(autouse=True)
def usual_temporary_files() -> Iterator[None]:
    before = tempfile.tempdir, tempfile.template
    yield
    tempfile.tempdir, tempfile.template = before


def test_only_what_the_service_put_into_the_uploads_folder_is_deleted_at_the_start(tmp_path: Path) -> None:
    theirs = {
        tmp_path / "holiday.jpg",
        tmp_path / ".gitkeep",
        tmp_path / "tmpa1b2c3d4",
        tmp_path / f"{UPLOAD_PREFIX}link",
    }
    for file in theirs:
        file.write_text("mine")
    (tmp_path / f"{UPLOAD_PREFIX}link").unlink()
    (tmp_path / f"{UPLOAD_PREFIX}link").symlink_to(tmp_path / "holiday.jpg")
    (tmp_path / f"{UPLOAD_PREFIX}x7").write_text("left over")
    prepare_uploads(tmp_path)
    assert set(tmp_path.iterdir()) == theirs


def test_temporary_files_have_the_names_that_are_deleted_after_a_kill(tmp_path: Path) -> None:
    prepare_uploads(tmp_path / "new")
    with tempfile.NamedTemporaryFile(delete=False) as left_over:
        assert Path(left_over.name).parent == tmp_path / "new"
    prepare_uploads(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(("host", "level"), [("127.0.0.1", "INFO"), ("0.0.0.0", "WARNING")])
def test_what_is_open_is_said_in_a_line_each(host: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        announce_risks(Settings(host=host))
    assert [record.levelname for record in caplog.records] == [level] * 2
    assert "TEMPLATE_KEYS" in caplog.text
    assert "LIVENESS" in caplog.text


def test_what_is_closed_is_not_called_open(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        announce_risks(Settings(template_keys="A" * 43 + "=", liveness="enforce"))
    assert caplog.records == []


START = """
import sys
import app, bootstrap
bootstrap.prepare_libraries()
import numpy as np
from insightface.model_zoo import get_model
from insightface.utils.face_align import estimate_norm
estimate_norm(np.float32([[0, 0], [1, 0], [0.5, 1], [0, 2], [1, 2]]))
print(*(name for name in ("scipy.sparse", "scipy.linalg", "PIL", "pymongo") if name in sys.modules))
from scipy.spatial import Delaunay, distance
print(len(Delaunay([[0, 0], [1, 0], [0, 1]]).simplices), distance.euclidean([0], [3]), "scipy.sparse" in sys.modules)
"""


def test_a_start_runs_nothing_of_what_it_does_not_need_and_scipy_is_whole_for_who_uses_it() -> None:
    done = subprocess.run([sys.executable, "-c", START], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "1 3.0 True"]


@pytest.mark.parametrize("folder", ["uploads", "models"])
def test_a_fresh_clone_has_the_folder(folder: str) -> None:
    assert (PROJECT / folder).is_dir()


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, True), ({"challenge": "require"}, False), ({"challenge": "require", "challenge_verify": "accept"}, True)],
)
def test_the_start_says_whether_a_photograph_passes_for_a_person(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], passes: bool
) -> None:
    caplog.set_level("INFO")
    announce_risks(Settings(**settings))
    assert ("passes for the person" in caplog.text) == passes
