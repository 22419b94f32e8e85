"""Owns InsightFace's packs, AuraFace among them, as an `Engine`: finding faces in few passes, and embedding them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

from engines import model_files, reduced_precision
from engines.base import Face, ModelIdentity, Template, holds_no_face, normalised, widest_first
from engines.insightface_pack import load_pack, providers_for
from engines.model_files import Digested, ModelUnavailable
from photos.pixels import Pixels
from photos.resampling import cut_out, to_side

AURAFACE_NAME = "auraface-v1"
AURAFACE_RECOGNISER = next(file.sha256 for file in model_files.AURAFACE if file.task == "recognition")

logger = logging.getLogger(__name__)


class InsightFaceEngine:
    """A detector and a recogniser of an InsightFace pack, called part by part; nothing else of it is loaded."""

    # Both sides are needed: SCRFD misses faces that fill more than about 40 % of the frame at 640 alone.
    SMALL_SIDE, FULL_SIDE = 128, 640
    FACE = 0.5
    # A selfie needs no full search: where a quick look (0.41 of its cost) sees one face that is 30 % of the picture
    # wide, and no trace of another, it ends. Of 596 shared photos 503 end so, and no face is missed; all together
    # cost 0.56. A second face pasted beside such a one, which the full search finds, is lost in 0 of 420 photos when
    # it is 15 % of the picture wide, 1 % at 10 %, 6 % at 6 %, 13 % at 5 %, 25 % at 4 % (benchmarks/detection.py; an
    # input of 320 loses twice as many; to ask for a score of 0.7 loses as many).
    LARGE_FACE_SIDE, LARGE, TRACE = 384, 0.3, 0.02
    # One face seen at both sides gives two boxes, which the detector's own suppression merges from an overlap of
    # 0.4; what lies mostly inside a surer face is the same face too (a face within a face is no second person).
    MOSTLY_INSIDE = 0.7

    # A head tilted by more is looked at again in an upright crop of this side. On 165 photos of 30 people, turned by 0
    # to 45 degrees, genuine pairs are nearest at 10; at 6 the photos as they are lose 0.4 points of FNMR at FMR 10⁻³,
    # at 15 those turned by 15 and 20 degrees lose 0.5 points of similarity.
    UPRIGHT_WITHIN_DEG = 10.0
    UPRIGHT_SIDE = 256
    # A face that the detector is less sure of is looked at turned to either side as well, small and side by side, for a
    # fifth of two looks at `UPRIGHT_SIDE`. Of 596 photos no answer differs from those, and 137, turned by 20 to 60
    # degrees, come out as similar to themselves upright; at 64, two of 1,096 such are lost.
    SURE = 0.8
    TRIED_DEG, TRIED_SIDE = 35.0, 96

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        files: Mapping[str, Digested] | None = None,
        identity: ModelIdentity | None = None,
        precision: str = "fp32",
        providers: str = "cpu",
    ) -> None:
        """Load and warm the pack in `folder`.

        Args:
            folder: holds a manifest.json (version 2) or just the weights.
            threads: threads of one model run; 0 takes all cores.
            files: task -> file, where they are known (and verified) already; found in the folder otherwise.
            identity: the model's, where it does not follow from the recogniser's digest.
            precision: of the recogniser, `fp32`, `bf16` or `int8`; for the last a copy is made in the folder's `int8/`.
            providers: `cpu`, `cuda`, or `auto`: CUDA where onnxruntime has it.

        Raises:
            ModelUnavailable: the folder is no such pack, a file of it is damaged or was changed meanwhile, the copy is
                not good enough, or there is no CUDA where it was demanded.
        """
        self._folder = folder
        chosen = providers_for(providers, onnxruntime.get_available_providers(), precision)
        pack = load_pack(folder, files, threads=threads, providers=chosen, meanwhile=self._take_detector)
        self._recogniser = pack.recogniser
        identity = identity or _identity_of(pack.digest)
        self.name, self.cosine_at_half = identity.name, identity.cosine_at_half
        self._provider = str(self._recogniser.session.get_providers()[0])
        if self._provider != chosen[0]:
            # onnxruntime only warns of that, and goes on with the next.
            if providers == "cuda":
                raise ModelUnavailable("ORT_PROVIDERS=cuda, but onnxruntime could not use the GPU: see its warnings.")
            logger.warning("onnxruntime has CUDA and could not use it: the models run on the CPU")
        if precision != "fp32":
            self._recogniser.session = reduced_precision.session(
                precision,
                pack.recogniser_file,
                pack.digest,
                folder / "int8",
                threads=threads,
                crops=self._some_crops,
                embed=self._embedded,
            )
            self._provider = f"CPU in {precision}"
        if precision == "int8":
            # Close to the original's embeddings, but not the same: a gallery must not mix the two. What bf16 changes
            # of them is far less than saving the photo once more does: with people enrolled in the one and verified in
            # the other, FNMR at FMR 1e-4 moves by 0.02 points (-0.02 to 0.07).
            self.name += "-int8"
        self.dimension = int(self._recogniser.get_feat([np.full((112, 112, 3), 127, np.uint8)]).size)
        pack.require_unchanged()  # only now has everything been read that is read of its files

    def _take_detector(self, detector: Any) -> None:
        """Prepare and warm it, which the recogniser's loading leaves time for; ModelUnavailable if it is of no use."""
        if not detector.use_kps:
            raise ModelUnavailable(
                f"the detector in {self._folder} gives no landmarks: a variant with key points is needed"
            )
        detector.prepare(0, det_thresh=self.FACE)
        warm = np.full((64, 64, 3), 127, np.uint8)
        for side in (self.SMALL_SIDE, self.UPRIGHT_SIDE, self.LARGE_FACE_SIDE, self.FULL_SIDE):
            detector.detect(warm, input_size=(side, side))
        self._detector = detector

    def describe(self) -> str:
        return (
            f"{self.name}, an InsightFace pack in {self._folder}, on {self._provider.removesuffix('ExecutionProvider')}"
        )

    def _some_crops(self) -> list[Pixels]:
        """Aligned faces to check other precisions with."""
        return [self._aligned(photo, face) for photo in reduced_precision.photos() for face in self.detect(photo)]

    def _embedded(self, session: Any, crops: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """What a session (None: the original's) makes of aligned faces, as float32[n, d]."""
        original = self._recogniser.session
        self._recogniser.session = session or original
        try:
            return np.concatenate([self._recogniser.get_feat([crop]) for crop in crops])
        finally:
            self._recogniser.session = original

    def detect(self, image: Pixels) -> list[Face]:
        if holds_no_face(image):
            return []
        scale, small = to_side(image, self.FULL_SIDE, enlarging=1.0)
        traces = self._found(small, self.LARGE_FACE_SIDE, self.TRACE)
        found = traces if self._is_all(traces, small) else self._found(small, self.FULL_SIDE, self.FACE)
        faces = widest_first(_without_nested(found, self.MOSTLY_INSIDE))
        turn = self._surest_turn(small, faces[0]) if faces and faces[0].score < self.SURE else 0.0
        faces = [face.enlarged(1 / scale) for face in faces]
        return [self._looked_at_upright(image, face, turn) for face in faces[:1]] + faces[1:]

    def _found(self, image: Pixels, side: int, least: float) -> list[Face]:
        """The detector's boxes of a score of at least `least`, with an input of this longest side and a small one."""
        sizes = [(self.SMALL_SIDE, self.SMALL_SIDE), _input_size(image, side)]
        boxes, landmarks = self._detector.detect(image, input_size=sizes, det_thresh=least)
        return [
            Face(box[:4], float(box[4]), points)
            for box, points in zip(boxes, landmarks, strict=True)
            if np.isfinite(box).all() and np.isfinite(points).all() and (box[2:4] - box[:2]).min() >= 1
        ]

    def _is_all(self, traces: list[Face], image: Pixels) -> bool:
        """Whether a quick look has seen enough: one large face, and no trace of another."""
        apart = _without_nested(traces, self.MOSTLY_INSIDE)
        return (
            len(apart) == 1
            and apart[0].score >= self.FACE
            and float(apart[0].box[2] - apart[0].box[0]) >= self.LARGE * max(image.shape[:2])
        )

    def _looked_at_upright(self, image: Pixels, face: Face, tried_deg: float) -> Face:
        """Find the landmarks of a tilted head again in an upright crop, first by the turn to be tried.

        Detectors that learned upright heads place the landmarks of a tilted one half-way to upright, or as if it were
        upright and then less surely; either spoils the measured roll and the embedding.
        """
        turn = 0.0
        if tried_deg:
            seen = self._seen_turned(image, face, tried_deg)
            if seen is not None and seen.score > face.score:
                face, turn = seen, tried_deg
        for _ in range(2):
            roll = _roll_deg(face)
            if abs(roll - turn) < self.UPRIGHT_WITHIN_DEG:
                break
            seen = self._seen_turned(image, face, roll)
            if seen is None:
                break
            face, turn = seen, roll
        return face

    def _surest_turn(self, image: Pixels, face: Face) -> float:
        """Which turn (degrees) the detector is surest of the face in, of either side and none, in one small look."""
        turns, side = (0.0, -self.TRIED_DEG, self.TRIED_DEG), self.TRIED_SIDE
        row = np.concatenate([_turned_crop(image, face, turn, side)[0] for turn in turns], axis=1)
        boxes, _ = self._detector.detect(row, input_size=(len(turns) * side, side), det_thresh=self.TRACE)
        boxes = boxes[np.isfinite(boxes).all(axis=1)]
        places = (boxes[:, 0] + boxes[:, 2]) / 2 // side
        scores = [float(boxes[places == place, 4].max(initial=0.0)) for place in range(len(turns))]
        return turns[int(np.argmax(scores))]

    def _seen_turned(self, image: Pixels, face: Face, turn_deg: float) -> Face | None:
        """Detect in a crop around the face's box, turned back by `turn_deg`; None where nothing is found."""
        crop, matrix = _turned_crop(image, face, turn_deg, self.UPRIGHT_SIDE)
        boxes, landmarks = self._detector.detect(crop, input_size=(self.UPRIGHT_SIDE, self.UPRIGHT_SIDE))
        if len(boxes) == 0:
            return None
        surest = int(np.argmax(boxes[:, 4]))
        if not np.isfinite(landmarks[surest]).all():
            return None
        points = cv2.transform(landmarks[surest][None].astype(np.float64), cv2.invertAffineTransform(matrix))[0]
        return Face(face.box, float(boxes[surest, 4]), points.astype(np.float32))

    def embed(self, image: Pixels, face: Face) -> Template:
        crop = self._aligned(image, face)
        if not crop.any():
            raise ValueError("degenerate landmarks: the aligned crop is empty")
        return normalised(self._recogniser.get_feat([crop]))

    def _aligned(self, image: Pixels, face: Face) -> Pixels:
        from insightface.utils.face_align import estimate_norm  # noqa: PLC0415 - as in insightface_pack.py

        side = self._recogniser.input_size[0]
        matrix = estimate_norm(face.landmarks, side)
        if not np.isfinite(matrix).all():
            raise ValueError("degenerate landmarks: there is no alignment")
        return cut_out(image, matrix, side, border=cv2.BORDER_CONSTANT)


def _identity_of(digest: str) -> ModelIdentity:
    """The identity of a recogniser by its digest: its own bytes decide what compares with what, not its folder."""
    return ModelIdentity(AURAFACE_NAME if digest == AURAFACE_RECOGNISER else f"insightface-{digest[:12]}", 0.5)


def _input_size(image: Pixels, side: int) -> tuple[int, int]:
    """Width and height of the detector's input, the longest `side`: multiples of 32, and no wider than the picture."""
    height, width = (32 * math.ceil(side * one / max(image.shape[:2]) / 32) for one in image.shape[:2])
    return width, height


def _turned_crop(image: Pixels, face: Face, turn_deg: float, side: int) -> tuple[Pixels, npt.NDArray[np.float64]]:
    """Cut out uint8[side, side, 3] around the face's box, twice as wide, turned back; and the matrix that led there."""
    centre = (face.box[:2] + face.box[2:]) / 2
    scale = 0.5 * side / float((face.box[2:] - face.box[:2]).max())
    matrix = np.asarray(cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), turn_deg, scale), np.float64)
    matrix[:, 2] += side / 2 - centre
    return cut_out(image, matrix, side), matrix


def _roll_deg(face: Face) -> float:
    """The slope of the line through the eyes, degrees."""
    left, right = face.eyes
    return float(np.degrees(np.arctan2(right[1] - left[1], right[0] - left[0])))


def _without_nested(faces: list[Face], mostly: float) -> list[Face]:
    """Drop each face most of whose box lies inside the box of a surer one."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda one: -one.score):
        if not kept or bool((_shares_inside(face.box, np.stack([one.box for one in kept])) < mostly).all()):
            kept.append(face)
    return kept


def _shares_inside(box: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Which share of a box lies inside each of float32[n, 4]: float32[n]."""
    size = np.clip(box[2:] - box[:2], 1e-6, None)
    common = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None)
    return np.asarray(common.prod(axis=1) / size.prod(), np.float32)
