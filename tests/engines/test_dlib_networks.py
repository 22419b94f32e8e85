"""dlib's networks in onnxruntime: held against dlib itself, with its own weights, on real photos."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import dlib
import numpy as np
import pytest

from engines.base import Template
from engines.compact_engine import CompactEngine, weights_folder
from engines.dlib_networks import DESCRIPTOR, DETECTOR, Descriptor, Detector
from engines.model_files import ModelUnavailable
from photos.pixels import Pixels
from tests.support.fakes import packaged_photo

FOLDER = weights_folder()


@pytest.fixture(scope="module")
def photos() -> list[Pixels]:
    """One face and a group of six, RGB."""
    paths = [("skimage", "data", "astronaut.png"), ("insightface", "data", "images", "t1.jpg")]
    return [np.asarray(cv2.cvtColor(packaged_photo(*path), cv2.COLOR_BGR2RGB), np.uint8) for path in paths]


def test_descriptors_are_dlibs_own(photos: list[Pixels]) -> None:
    hog, reference = dlib.get_frontal_face_detector(), dlib.face_recognition_model_v1(str(FOLDER / DESCRIPTOR.name))
    predictor = dlib.shape_predictor(str(FOLDER / "shape_predictor_5_face_landmarks.dat"))
    chips = np.stack(
        [dlib.get_face_chip(photo, predictor(photo, box), 150, 0.25) for photo in photos for box in hog(photo, 0)]
    )
    expected = np.array(reference.compute_face_descriptor(list(chips)))
    assert len(chips) >= 6
    assert Descriptor(FOLDER, threads=1).of(chips) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("side", "stretched"), [(480, 1.0), (601, 0.6), (450, 1.4)])
def test_the_detector_finds_the_faces_that_dlib_finds_where_dlib_finds_them(
    photos: list[Pixels], side: int, stretched: float
) -> None:
    reference, detector = dlib.cnn_face_detection_model_v1(str(FOLDER / DETECTOR.name)), Detector(FOLDER, threads=1)
    count = 0
    for photo in photos:
        scale = side / max(photo.shape[:2])
        copy = np.asarray(cv2.resize(photo, None, fx=scale, fy=scale * stretched), np.uint8)
        expected = reference(copy, 0)
        found = detector.faces(copy)
        boxes = [[one.rect.left(), one.rect.top(), one.rect.right(), one.rect.bottom()] for one in expected]
        assert [box.tolist() for box, _ in found] == boxes
        assert [score for _, score in found] == pytest.approx([one.confidence for one in expected], abs=1e-4)
        count += len(found)
    assert count >= 1


def test_a_face_that_fills_the_picture_is_found_where_the_small_copies_lie(photos: list[Pixels]) -> None:
    reference, detector = dlib.cnn_face_detection_model_v1(str(FOLDER / DETECTOR.name)), Detector(FOLDER, threads=1)
    close = np.ascontiguousarray(photos[0][70:220, 160:290])
    copy = np.asarray(cv2.resize(close, None, fx=2.6, fy=2.6), np.uint8)
    expected = [one.rect for one in reference(copy, 0)]
    assert [(box.left(), box.top(), box.right(), box.bottom()) for box in expected] == [
        tuple(box.tolist()) for box, _ in detector.faces(copy)
    ]
    assert expected


def test_a_box_that_reaches_over_the_edge_is_rounded_away_from_the_picture_as_dlib_does() -> None:
    detector = Detector(FOLDER, threads=1)
    box = detector._box([(11, 11, 320, 240)], 22, 30)
    assert box.tolist() == [-29, -21, 51, 59]


@pytest.mark.parametrize("shape", [(10, 320), (320, 10), (64, 64), (16, 16)])
def test_the_detector_takes_specks_and_strips(shape: tuple[int, int]) -> None:
    assert Detector(FOLDER, threads=1).faces(np.full((*shape, 3), 127, np.uint8)) == []


@pytest.mark.parametrize(
    ("network", "name"), [(Descriptor, DESCRIPTOR.name), (Detector, DETECTOR.name)], ids=["descriptor", "detector"]
)
def test_a_file_that_is_missing_or_not_the_packages_own_is_not_read(
    tmp_path: Path, network: Callable[[Path, int], object], name: str
) -> None:
    with pytest.raises(ModelUnavailable, match="face-recognition-models"):
        network(tmp_path, 1)
    shutil.copy(FOLDER / name, tmp_path / name)
    with (tmp_path / name).open("r+b") as damaged:
        damaged.seek(-1000, 2)
        damaged.write(b"\x00" * 8)
    with pytest.raises(ModelUnavailable, match="face-recognition-models"):
        network(tmp_path, 1)


def test_a_mirrored_face_has_the_template_of_the_face(photos: list[Pixels]) -> None:
    engine = CompactEngine(threads=1)
    bgr = np.asarray(cv2.cvtColor(photos[0], cv2.COLOR_RGB2BGR), np.uint8)
    mirrored = np.ascontiguousarray(bgr[:, ::-1])
    one, other = (engine.embed(image, engine.detect(image)[0]) for image in (bgr, mirrored))
    assert float(one @ other) > 0.99


def test_threads_that_share_an_engine_get_what_one_alone_gets(photos: list[Pixels]) -> None:
    engine = CompactEngine(threads=1)
    images = [np.asarray(cv2.cvtColor(photo, cv2.COLOR_RGB2BGR), np.uint8) for photo in photos]
    images.append(np.asarray(cv2.resize(images[0][:200, 120:320], (90, 90)), np.uint8))

    def templates(image: Pixels) -> list[Template]:
        return [engine.embed(image, face) for face in engine.detect(image)]

    alone = [templates(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        for index, together in enumerate(threads.map(templates, images * 4)):
            assert np.allclose(together, alone[index % len(images)], atol=1e-6)
