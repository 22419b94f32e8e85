"""What is undone to a changed photo before the duplicate search, and when."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from engines.base import Face
from engines.face_attributes import FaceAttributes
from engines.restoration import restored
from face_checks import FACE_REGION, aligned_face
from photos.pixels import Pixels
from tests.support.fakes import PORTRAIT_FACE, a_portrait


@pytest.fixture(scope="module")
def portrait() -> Pixels:
    return a_portrait()


def apart(one: Pixels, other: Pixels) -> float:
    """By how much two aligned faces differ, of 255."""
    return float(np.abs(one.astype(float) - other)[FACE_REGION].mean())


@pytest.mark.parametrize("stretch", [1.4, 0.7])
@pytest.mark.parametrize("left", [0, 200], ids=["inside", "at the edge"])
def test_a_stretched_face_has_its_proportions_again(portrait: Pixels, stretch: float, left: int) -> None:
    def moved(face: Face, factor: float) -> Face:
        points = (np.concatenate([face.landmarks, face.box.reshape(2, 2)]) - (left, 0) + 0.5) * (factor, 1) - 0.5
        return Face(points[5:].ravel().astype(np.float32), face.score, points[:5].astype(np.float32))

    straight = np.ascontiguousarray(portrait[:, left:])
    wide = np.asarray(cv2.resize(straight, None, fx=stretch, fy=1), np.uint8)
    ((part, found),) = restored(wide, moved(PORTRAIT_FACE, stretch), FaceAttributes(stretch=stretch))
    assert part.size < wide.size / 2
    before = aligned_face(straight, moved(PORTRAIT_FACE, 1))
    assert (
        apart(before, aligned_face(part, found)) < 3 < apart(before, aligned_face(wide, moved(PORTRAIT_FACE, stretch)))
    )


def test_a_noisy_face_is_smoothed_and_lies_where_it_lay(portrait: Pixels) -> None:
    noise = np.random.default_rng(5).normal(0, 30, portrait.shape)
    noisy = np.clip(portrait + noise, 0, 255).astype(np.uint8)
    ((part, found),) = restored(noisy, PORTRAIT_FACE, FaceAttributes(likeness=0.7))
    assert found.landmarks.dtype == found.box.dtype == np.float32
    before = aligned_face(portrait, PORTRAIT_FACE)
    assert apart(before, aligned_face(part, found)) < 0.6 * apart(before, aligned_face(noisy, PORTRAIT_FACE))


def test_a_face_that_is_stretched_and_damaged_is_looked_for_in_both_ways(portrait: Pixels) -> None:
    straight, smoothed = restored(portrait, PORTRAIT_FACE, FaceAttributes(stretch=1.3, likeness=0.7))
    assert straight[0].shape == smoothed[0].shape
    assert np.array_equal(straight[1].landmarks, smoothed[1].landmarks)
    assert cv2.Laplacian(smoothed[0], cv2.CV_64F).std() < 0.7 * cv2.Laplacian(straight[0], cv2.CV_64F).std()


def test_a_large_face_is_looked_for_in_a_reduced_copy(portrait: Pixels) -> None:
    large = np.asarray(cv2.resize(portrait, None, fx=6, fy=6), np.uint8)
    ((part, found),) = restored(large, PORTRAIT_FACE.enlarged(6), FaceAttributes(stretch=1.01, likeness=0.7))
    ((small, in_small),) = restored(portrait, PORTRAIT_FACE, FaceAttributes(likeness=0.7))
    assert 70 <= found.inter_eye < 140
    assert part.size < large.size / 16
    assert apart(aligned_face(part, found), aligned_face(small, in_small)) < 3


def test_nothing_is_undone_to_a_face_that_nobody_changed(portrait: Pixels) -> None:
    assert restored(portrait, PORTRAIT_FACE, FaceAttributes(stretch=1.05, likeness=0.9)) == []
