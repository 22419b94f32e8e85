"""The evidence for the checks: the intervals, what is counted as what, and a page that holds the numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from benchmarks import distorted_copies
from benchmarks.degradations import DEGRADATIONS, Degradation
from benchmarks.evaluate_checks import MEASURES, Gates, read_people, read_photos, write_page
from engines.base import Face
from engines.face_attributes import FaceAttributes
from face_checks import judge, measure
from photos.pixels import Pixels
from settings import Settings
from tests.support.fakes import ScriptedAttributes, ScriptedEngine, a_face, a_photo, jpeg

LIMITS = Settings()


class FindsTheFaceAgain(ScriptedEngine):
    """Finds the scripted face wherever the photo is as large as it was, and nothing in a smaller one."""

    def detect(self, image: Pixels) -> list[Face]:
        return [a_face()] if image.shape[:2] == (360, 320) else []


class SeesRedAsAMask(ScriptedAttributes):
    """Calls a face a mask where red prevails by much."""

    def read(self, aligned: Pixels) -> FaceAttributes:
        blue, _, red = aligned.reshape(-1, 3).mean(axis=0)
        return FaceAttributes(mask=float(red - blue > 100), sunglasses=0.0, other=0.0, hidden=0.0)


def write(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(image))


def test_sub_folders_named_by_the_label_do_where_there_is_no_labels_file(tmp_path: Path) -> None:
    write(tmp_path / "none" / "a.jpg", a_photo())
    write(tmp_path / "mask" / "b.JPEG", a_photo())
    write(tmp_path / "elsewhere" / "c.jpg", a_photo())
    assert [(photo.path.name, photo.label) for photo in read_photos(tmp_path)] == [
        ("a.jpg", "none"),
        ("b.JPEG", "mask"),
    ]


def test_a_folder_without_photos_or_with_an_unknown_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither"):
        read_photos(tmp_path)
    (tmp_path / "labels.csv").write_text("file,label\na.jpg,beard\n")
    with pytest.raises(ValueError, match="'beard'"):
        read_photos(tmp_path)


def test_what_the_classifier_learned_from_counts_only_for_quality_and_only_where_it_tells_of_a_subgroup(
    tmp_path: Path,
) -> None:
    (tmp_path / "labels.csv").write_text(
        "file,label,attributes,split\n"
        "a.jpg,none,elderly,train\n"
        "b.jpg,none,,train\n"
        "c.jpg,mask,,train\n"
        "d.jpg,none,synthetic,train\n"
        "e.jpg,mask,,val\n"
    )
    assert [(photo.path.name, photo.learned) for photo in read_photos(tmp_path)] == [("a.jpg", True), ("e.jpg", False)]


def test_the_measures_are_exactly_those_that_the_gates_judge() -> None:
    found = measure(a_photo(), a_face(), ScriptedAttributes())
    assert {one.code for one in MEASURES.values()} == {check.code for check in judge(found, LIMITS)}


@pytest.mark.parametrize("kind", DEGRADATIONS, ids=lambda kind: kind.name)
def test_every_degradation_changes_the_photo_at_every_step(kind: Degradation) -> None:
    image = np.asarray(cv2.GaussianBlur(a_photo(), (0, 0), 2), np.uint8)
    for strength in kind.strengths:
        damaged = kind.apply(image, a_face().eyes, strength)
        assert damaged.ndim == 3
        assert damaged.dtype == np.uint8
        assert damaged.shape != image.shape or (damaged != image).any()


def test_every_distorted_copy_is_another_photo_with_a_name_of_its_own() -> None:
    image = np.asarray(cv2.GaussianBlur(a_photo((95, 135, 160)), (0, 0), 2), np.uint8)
    image[:, :40] = 30  # a photo that is its own mirror image would prove nothing
    every = [steps for kind in distorted_copies.KINDS for steps in kind]
    copies = {distorted_copies.name_of(steps): steps for steps in every}
    files = {distorted_copies.copy_of(image, a_face().eyes, steps) for steps in copies.values()}
    assert len(files) == len(copies) == len(every)


def test_the_table_of_distorted_copies_counts_the_photo_itself_apart() -> None:
    table = distorted_copies.report(
        {
            "as it is": Counter({"duplicate_face": 2}),
            "JPEG 5": Counter({"enrolled": 1, "distorted": 1}),
            "mirrored": Counter({"duplicate_face": 2}),
            "WebP 5": Counter({"distorted": 2}),
            "eyes larger 0.4": Counter({"enrolled": 1}),
        }
    )
    rows = [[cell.strip() for cell in row.split("|")[1:7]] for row in table.splitlines()[-3:]]
    assert rows == [
        ["**all distorted**", "4", "25.0 (4.6-69.9)", "50.0", "25.0", "`distorted` 1"],
        ["**all filtered**", "2", "0.0 (0.0-65.8)", "0.0", "100.0", "`distorted` 2"],
        ["**all warped**", "1", "100.0 (20.7-100.0)", "0.0", "0.0", "-"],
    ]


def test_over_exposure_saturates_instead_of_wrapping_round() -> None:
    over_exposed = next(kind for kind in DEGRADATIONS if kind.name == "over-exposed")
    assert over_exposed.apply(np.full((4, 4, 3), 200, np.uint8), a_face().eyes, 2).min() == 255


def test_the_page_counts_refusals_acceptance_and_damage_and_shows_no_photo(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, image in {
        "clean.jpg": a_photo(),
        "blue.jpg": a_photo((200, 160, 130)),
        "masked.jpg": a_photo((95, 135, 215)),
        "small.jpg": a_photo(size=(100, 100)),
    }.items():
        write(tmp_path / "photos" / name, image)
    (tmp_path / "photos" / "labels.csv").write_text(
        "file,label,attributes,source,licence\n"
        "clean.jpg,none,beard,a lab,MIT\n"
        "blue.jpg,none,,a lab,MIT\n"
        "masked.jpg,mask,,a lab,MIT\n"
        "small.jpg,mask,,a lab,MIT\n"
    )
    for name in ("1.jpg", "2.jpg"):
        write(tmp_path / "people" / "somebody" / name, a_photo())
    out = tmp_path / "docs" / "checks.md"
    out.parent.mkdir()
    write_page(
        out,
        {"photos": read_photos(tmp_path / "photos")},
        read_people(tmp_path / "people"),
        [Gates(FindsTheFaceAgain(), SeesRedAsAMask(), LIMITS)],
        thresholds=[0.38, 0.5],
        sample=1,
    )
    page = out.read_text(encoding="utf-8")
    rows = {row.split(" | ")[0].strip("| "): row for row in page.splitlines() if row.startswith("|")}
    assert rows["a lab (MIT)"].split(" | ")[1].strip(" |") == "4"
    assert rows["mask"] == "| mask | 2 | 100.0 (34.2-100.0) | 50 | 50 | `no_face` 1 |"
    assert rows["all"] == "| all | 4 | 75.0 (30.1-95.4) | `unnatural_colour` 1 |"
    assert rows["beard"] == "| beard | 1 | 100.0 (20.7-100.0) | - |"
    assert "| cut left | share 0.5 | - | - | 0 | 0 | 100 | `no_face` 1 |" in page
    assert {path.suffix for path in (tmp_path / "docs" / "checks").iterdir()} == {".svg"}
    for figure in (tmp_path / "docs" / "checks").iterdir():
        drawn = {part.tag.rpartition("}")[2] for part in ElementTree.parse(figure).iter()}
        assert {"svg", "path"} <= drawn
        assert "image" not in drawn
