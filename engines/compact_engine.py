"""Owns dlib's small model as an `Engine`; the only importer of `dlib`."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import cv2
import dlib
import numpy as np

from engines.base import Face, LandmarkLayout, Template, holds_no_face, normalised, widest_first
from engines.dlib_networks import Descriptor, Detector
from engines.model_files import ModelUnavailable
from photos.pixels import Pixels
from photos.resampling import to_side

DLIB_LAYOUT = LandmarkLayout(
    points=np.array([[0.7, 0, 0.1], [0.3, 0, 0], [-0.7, 0, 0.1], [-0.3, 0, 0], [0, 0.77, -0.35]]),
    left_eye=(2, 3),
    right_eye=(0, 1),
)


class CompactEngine:
    """dlib's detectors, 5-point landmarks and 128-d descriptor, all from wheels: to start with, not to go live with.

    The template is the mean of the descriptors of the aligned face and of its mirror image: on the 165 photos of
    30 people it misses no more at cosine 0.935 than the plain descriptor at 0.926, with a third of its false matches.
    """

    name = "compact-dlib-mirrored"
    dimension = 128
    # Measured on 165 photos of 30 people, 136 probes against a gallery of 30, 20 orders: at 0.926 (where the plain
    # descriptor has an FMR of 1e-3 on LFW) 9.5 probes took somebody else's name and 2.2 people could not enrol;
    # at 0.94, 2.1 and 0.5, for 15 % of misses. A gate that lets nobody in as somebody else is worth the misses.
    cosine_at_half = 0.94
    # The HOG detector looks for faces of 80 pixels and more: a twelfth of this longest side. A quick look at half of it
    # (0.3 of the cost), enough where it sees one large face and no trace of another down to a score of -0.6, loses 57
    # of 66 second faces that are 8 % of the picture wide, 38 of 66 at 10 %, none from 12.5 %: by default all count.
    HOG_SIDE = 960
    # Patterns on clothes and flowers score up to 0.3; a face that scores less is found by the second look.
    HOG_SCORE = 0.35
    # The second look costs 6 times the first per pixel, and needs faces of about 40 pixels.
    CNN_SIDE = 320

    def __init__(self, threads: int = 1) -> None:
        """Load and warm the model; `threads` of one run of a network, 0 takes all cores. Raises ModelUnavailable."""
        folder = weights_folder()
        self._hog = dlib.get_frontal_face_detector()
        self._cnn = Detector(folder, threads)
        self._predictor = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._descriptor = Descriptor(folder, threads)
        # dlib's HOG detector keeps scratch state: one caller at a time.
        self._lock = threading.Lock()
        blank = np.full((150, 150, 3), 127, np.uint8)
        self.detect(blank)
        self._descriptor.of(blank[None])

    def describe(self) -> str:
        return f"{self.name}, dlib's small model (to start with, not to go live with)"

    def detect(self, image: Pixels) -> list[Face]:
        if holds_no_face(image):
            return []
        shrunk, small = to_side(image, self.HOG_SIDE, enlarging=1.0)
        rgb = np.asarray(cv2.cvtColor(small, cv2.COLOR_BGR2RGB), np.uint8)
        scale, searched = to_side(rgb, self.HOG_SIDE, enlarging=4.0)
        with self._lock:
            rectangles, scores, _ = self._hog.run(searched, 0, self.HOG_SCORE)
        seen = [
            (np.array([box.left(), box.top(), box.right(), box.bottom()]), float(score))
            for box, score in zip(rectangles, scores, strict=True)
        ]
        if not seen:
            scale, searched = to_side(rgb, self.CNN_SIDE, enlarging=4.0)
            seen = self._cnn.faces(searched)
        found = []
        for box, score in seen:
            edges = box / scale
            shape = self._predictor(rgb, dlib.rectangle(*(round(edge) for edge in edges)))
            points = np.array([(part.x, part.y) for part in shape.parts()], np.float32)
            face = Face(edges.astype(np.float32), score, points, DLIB_LAYOUT)
            found.append(face.enlarged(1 / shrunk))
        return widest_first(found)

    def embed(self, image: Pixels, face: Face) -> Template:
        if np.ptp(face.landmarks, axis=0).max() < 1:
            raise ValueError("degenerate landmarks: all in one place")
        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        left, top, right, bottom = (round(float(edge)) for edge in face.box)
        parts = [dlib.point(int(x), int(y)) for x, y in face.landmarks]
        shape = dlib.full_object_detection(dlib.rectangle(left, top, right, bottom), parts)
        chip = dlib.get_face_chip(rgb, shape, 150, 0.25)
        return normalised(self._descriptor.of(np.stack([chip, chip[:, ::-1]])).sum(axis=0))


def weights_folder() -> Path:
    """Where the package of dlib's weights has them; ModelUnavailable where it is not installed."""
    # The package's own __init__ needs pkg_resources, which new setuptools lack: only its folder is used.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable("the package face-recognition-models is not installed: pip install -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations))) / "models"
