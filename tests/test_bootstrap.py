"""Starting the application: what it does to the folders of a clone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bootstrap import prepare_uploads
from settings import PROJECT


@pytest.fixture(autouse=True)
def temporary_files_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())


def test_the_uploads_folder_is_emptied_but_for_the_file_that_keeps_it_in_a_clone(tmp_path: Path) -> None:
    keeper = tmp_path / ".gitkeep"
    keeper.touch()
    (tmp_path / "left-over.jpg").write_bytes(b"a killed process left this")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    prepare_uploads(tmp_path)
    assert list(tmp_path.iterdir()) == [keeper]


@pytest.mark.parametrize("folder", ["uploads", "models"])
def test_a_fresh_clone_has_the_folder(folder: str) -> None:
    assert (PROJECT / folder).is_dir()
