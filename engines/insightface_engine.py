"""Finds faces and embeds them with the models of an InsightFace pack, AuraFace and the compact model among them."""

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
from engines.base import FRAME_SIDE, Face, ModelIdentity, Template, holds_no_face, normalised, widest_first
from engines.insightface_pack import load_pack, providers_for, refusing
from engines.model_files import HashedFile, ModelUnavailable
from engines.onnx_files import session_without_prelu
from photos.pixels import Pixels
from photos.resampling import cut_out, to_side

AURAFACE_NAME = "auraface-v1"
AURAFACE_RECOGNISER = next(file.sha256 for file in model_files.AURAFACE if file.task == "recognition")

# A recogniser that runs without PRelu must give the same embeddings of so many faces. Rounding alone moves a cosine by
# less than 1e-6; a wrong slope by more than 1e-3.
CHECKED_FACES, SAME_COSINE = 3, 0.99999

logger = logging.getLogger(__name__)


class InsightFaceEngine:
    """A detector and a recogniser of an InsightFace pack, called part by part; nothing else of it is loaded."""

    # The longest sides of the detector's input, pixels. The small look finds faces that fill more than about 40 % of
    # the frame, which SCRFD misses at 640: 96 to 106 of 386 faces of the shared photos.
    SMALL_LOOK_SIDE, QUICK_LOOK_SIDE, FULL_LOOK_SIDE = 128, 320, 640
    MIN_FACE_SCORE = 0.5
    # A selfie needs no look at 640: where the small look shows one large face, and the quick look shows no trace of
    # another, they are enough. That costs 0.31 of a look at 640 with YuNet, 0.32 with SCRFD-2.5G; docs/figures.md has
    # how many selfies end so, and what all of them cost.
    LARGE_FACE_SHARE = 0.3
    # What scores less is no trace of a face. SCRFD scores 0.04 on a grey picture and up to 0.1 in most photos, YuNet 0:
    # a trace is at least so many times what the detector gives a grey picture.
    MIN_TRACE_SCORE, TRACE_TO_BLANK = 0.02, 3.0
    # What scores less in the small look is left to the quick one, which sees it better: of 298 shared photos, 251 in
    # place of 245 then end so with YuNet and 227 in place of 201 with SCRFD-500M, and 75 in place of 70 of 100 with
    # SCRFD-2.5G. No detector misses more faces than without this, or loses more of those that were pasted in.
    SMALL_LOOK_TRACE = 0.2
    # One face seen in several looks gives several boxes, whose overlap (intersection over union) is higher. A box that
    # lies mostly inside a surer one is the same face too: a face within a face is no second person.
    MAX_OVERLAP, MAX_SHARE_INSIDE = 0.4, 0.7

    # A head tilted by more is looked at again in an upright crop of this side. On 165 photos of 30 people, turned by 0
    # to 45 degrees, genuine pairs are nearest at 10; at 6 the photos as they are lose 0.4 points of FNMR at FMR 10⁻³,
    # at 15 those turned by 15 and 20 degrees lose 0.5 points of similarity.
    UPRIGHT_WITHIN_DEG = 10.0
    UPRIGHT_SIDE = 256
    # A face that the detector is less sure of is looked at turned to either side as well, small and side by side, for a
    # fifth of two looks at `UPRIGHT_SIDE`. Of 596 photos no answer differs from those, and 137, turned by 20 to 60
    # degrees, come out as similar to themselves upright; at 64, two of 1,096 such are lost.
    CONFIDENT_SCORE = 0.8
    TRIAL_ROTATIONS_DEG, TRIAL_SIDE = (0.0, -35.0, 35.0, -90.0, 90.0, 180.0), 96
    # A challenge's frame with no surer face gets the small look, too. The quick look alone misplaced the landmarks of
    # large faces that are turned away, by which the yaw was read up to 64 degrees too small. Of 77 honest attempts
    # before an app 9 were refused then, and 1 of 79 is now (2 with a limit of 0.7 or 0.8). Of their frames 23 % get it.
    SURE_IN_FRAME = 0.75
    # A picture that shows no face is looked at in the small look's size after each quarter turn. One turn must show a
    # face that scores so much more than the others: of a face that stands the others score 0.1 to 0.4 less. Where a
    # face scores less clearly so, the quick look's size decides: of 234 turned photos 11 were `no_face` before. A trace
    # is enough for that: small portraits on 14 cards that lie on their side score 0.21 to 0.63 in the small look, 24
    # photos without a face up to 0.13 (YuNet; with SCRFD-500M three reach 0.26 to 0.41, and pay for it).
    QUARTER_TURN_MARGIN, QUARTER_TURN_TRACE = 0.1, 0.2

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        files: Mapping[str, HashedFile] | None = None,
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
        quickly = precision == "fp32" and chosen == ["CPUExecutionProvider"]
        # A model of a given identity is this project's own: a test compares its embeddings with OpenCV's.
        tested = quickly and identity is not None
        pack = load_pack(
            folder, files, threads=threads, providers=chosen, meanwhile=self._take_detector, without_prelu=tested
        )
        self._recogniser = pack.recogniser
        # Not by the folder: where it cannot be written to, both files of the compact model lie in a temporary one.
        self._found_by = pack.detector_file if pack.detector_file.parent != pack.recogniser_file.parent else None
        identity = identity or _identity_of(pack.digest)
        self.name, self.cosine_at_half = identity.name, identity.cosine_at_half
        self._provider = str(self._recogniser.session.get_providers()[0])
        if self._provider != chosen[0]:
            # onnxruntime only warns of that, and goes on with the next.
            if providers == "cuda":
                raise ModelUnavailable("ORT_PROVIDERS=cuda, but onnxruntime could not use the GPU: see its warnings.")
            logger.warning("onnxruntime has CUDA and could not use it: the models run on the CPU")
        if quickly and not tested:
            self._take_quicker_session(pack.recogniser_file, threads)
        if precision != "fp32":
            self._recogniser.session = reduced_precision.session(
                precision,
                pack.recogniser_file,
                pack.digest,
                folder / "int8",
                threads=threads,
                crops=lambda: self._some_crops(reduced_precision.photos()),
                embed=self._embedded,
            )
            self._provider = f"CPU in {precision}"
        if precision == "int8":
            # Close to the original's embeddings, but not the same: a gallery must not mix the two. What bf16 changes
            # of them is far less than saving the photo once more does: with people enrolled in the one and verified in
            # the other, FNMR at FMR 1e-4 moves by 0.02 points (-0.02 to 0.07).
            self.name += "-int8"
        with refusing(pack.recogniser_file, "recognition"):
            self.dimension = int(self._recogniser.get_feat([np.full((112, 112, 3), 127, np.uint8)]).size)
        pack.require_unchanged()  # only now has everything been read that is read of its files

    def _take_detector(self, detector: Any) -> None:
        """Prepare and warm it, which the recogniser's loading leaves time for; ModelUnavailable if it is of no use."""
        if not detector.use_kps:
            raise ModelUnavailable(
                f"the detector in {self._folder} gives no landmarks: a variant with key points is needed"
            )
        detector.prepare(0, det_thresh=self.MIN_FACE_SCORE)
        warm = np.full((64, 64, 3), 127, np.uint8)
        for side in (self.SMALL_LOOK_SIDE, self.UPRIGHT_SIDE, FRAME_SIDE, self.QUICK_LOOK_SIDE, self.FULL_LOOK_SIDE):
            detector.detect(warm, input_size=(side, side))
        blank, _ = detector.detect(warm, input_size=(self.SMALL_LOOK_SIDE, self.SMALL_LOOK_SIDE), det_thresh=0.001)
        self._trace_score = max(self.MIN_TRACE_SCORE, self.TRACE_TO_BLANK * float(blank[:, 4].max(initial=0.0)))
        self._detector = detector

    def describe(self) -> str:
        return (
            f"{self.name}, an InsightFace pack in {self._folder}, on {self._provider.removesuffix('ExecutionProvider')}"
            + (f", faces found by {self._found_by}" if self._found_by else "")
        )

    def _take_quicker_session(self, file: Path, threads: int) -> None:
        """Have the recogniser run without PRelu, if a few faces come out as they did before."""
        try:
            with refusing(file, "recognition"):
                quicker = session_without_prelu(file, threads)
                crops = self._some_crops(reduced_precision.photos()[-1:])[:CHECKED_FACES] if quicker else []
                if not crops:
                    return
                before, after = (self._embedded(session, crops) for session in (None, quicker))
        except ModelUnavailable as error:  # the file itself runs
            logger.warning("Without PRelu it does not run, so it runs as it is. %s", error)
            return
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        worst = float((np.vecdot(before, after) / norms).min())
        if worst >= SAME_COSINE:
            self._recogniser.session = quicker
        else:
            logger.warning("Without PRelu %s gives other embeddings (cosine %.6f): it runs as it is", file, worst)

    def _some_crops(self, photos: Sequence[Pixels]) -> list[Pixels]:
        """Aligned faces to check another way of running the recogniser with."""
        return [self._aligned(photo, face) for photo in photos for face in self.detect(photo)]

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
        faces = self._detect_as_it_lies(image)
        quarter_turns = faces[0].quarter_turns if faces else self._quarter_turns(image)
        if not quarter_turns:
            return faces
        # A face that was found lying has other landmarks than the same one found in the picture upright.
        turned = np.ascontiguousarray(np.rot90(image, quarter_turns))
        size = turned.shape[1], turned.shape[0]
        return [face.turned(-quarter_turns, size) for face in self._detect_as_it_lies(turned)] or faces

    def _detect_as_it_lies(self, image: Pixels) -> list[Face]:
        """Find every face of a picture that stands, and a surely seen one that does not, the widest first."""
        scale, small = to_side(image, self.FULL_LOOK_SIDE, enlarging=1.0)
        faces = widest_first([face for face in self._search(small) if face.score >= self.MIN_FACE_SCORE])
        turn = self._surest_turn(small, faces[0]) if faces and faces[0].score < self.CONFIDENT_SCORE else 0.0
        faces = [face.enlarged(1 / scale) for face in faces]
        return [self._looked_at_upright(image, face, turn) for face in faces[:1]] + faces[1:]

    def detect_in_frame(self, image: Pixels) -> list[Face]:
        if holds_no_face(image):
            return []
        scale, small = to_side(image, FRAME_SIDE, enlarging=1.0)
        seen = self._look(small, _input_size(small, FRAME_SIDE))
        if max((face.score for face in seen), default=0.0) < self.SURE_IN_FRAME:
            seen = self._merged([*seen, *self._look(small, _input_size(small, self.SMALL_LOOK_SIDE))])
        return [face.enlarged(1 / scale) for face in widest_first(seen) if face.score >= self.MIN_FACE_SCORE]

    def _quarter_turns(self, image: Pixels) -> int:
        """After how many quarter turns, counter-clockwise, the picture shows a face that stands; 0 where none does."""
        looks = (self.SMALL_LOOK_SIDE, self.QUARTER_TURN_TRACE), (self.QUICK_LOOK_SIDE, self.MIN_FACE_SCORE)
        for side, least in looks:
            _, small = to_side(image, side, enlarging=1.0)
            scores = [0.0]
            for turns in (1, 2, 3):
                seen = self._look(np.ascontiguousarray(np.rot90(small, turns)), (side, side))
                scores.append(max((face.score for face in seen), default=0.0))
            surest, next_best = np.argsort(scores)[::-1][:2]
            if scores[surest] < least:
                break
            if scores[surest] >= max(self.MIN_FACE_SCORE, scores[next_best] + self.QUARTER_TURN_MARGIN):
                return int(surest)
        return 0

    def _search(self, image: Pixels) -> list[Face]:
        """Look for faces and traces of faces in as few looks as are needed to find all faces."""
        seen = self._look(image, (self.SMALL_LOOK_SIDE, self.SMALL_LOOK_SIDE))
        seen = [face for face in seen if face.score >= self.SMALL_LOOK_TRACE]
        if self._is_one_large_face(seen, image):
            seen = self._merged([*seen, *self._look(image, _input_size(image, self.QUICK_LOOK_SIDE))])
            if self._is_one_large_face(seen, image):
                return seen
        return self._merged([*seen, *self._look(image, _input_size(image, self.FULL_LOOK_SIDE))])

    def _look(self, image: Pixels, input_size: tuple[int, int]) -> list[Face]:
        """The detector's boxes that score at least as a trace of a face, with an input of this width and height."""
        boxes, landmarks = self._detector.detect(image, input_size=input_size, det_thresh=self._trace_score)
        faces = [
            Face(box[:4], float(box[4]), points)
            for box, points in zip(boxes, landmarks, strict=True)
            if np.isfinite(box).all() and np.isfinite(points).all() and (box[2:4] - box[:2]).min() >= 1
        ]
        return self._merged(faces)

    def _merged(self, faces: list[Face]) -> list[Face]:
        """Drop each box that shows the same face as a surer one."""
        if len(faces) < 2:
            return faces
        kept: list[Face] = []
        for face in sorted(faces, key=lambda one: -one.score):
            overlaps, inside = _overlaps(face.box, np.array([one.box for one in kept]).reshape(-1, 4))
            if (overlaps <= self.MAX_OVERLAP).all() and (inside < self.MAX_SHARE_INSIDE).all():
                kept.append(face)
        return kept

    def _is_one_large_face(self, seen: list[Face], image: Pixels) -> bool:
        """Whether there is one large face, and no trace of another."""
        return (
            len(seen) == 1
            and seen[0].score >= self.MIN_FACE_SCORE
            and float(seen[0].box[2] - seen[0].box[0]) >= self.LARGE_FACE_SHARE * max(image.shape[:2])
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
            roll = face.roll_deg
            if abs(roll - turn) < self.UPRIGHT_WITHIN_DEG:
                break
            seen = self._seen_turned(image, face, roll)
            if seen is None:
                break
            face, turn = seen, roll
        return face

    def _surest_turn(self, image: Pixels, face: Face) -> float:
        """Which turn (degrees) the detector is surest of the face in, of either side and none, in one small look."""
        turns, side = self.TRIAL_ROTATIONS_DEG, self.TRIAL_SIDE
        row = np.concatenate([_turned_crop(image, face, turn, side)[0] for turn in turns], axis=1)
        boxes, _ = self._detector.detect(row, input_size=(len(turns) * side, side), det_thresh=self._trace_score)
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


def _overlaps(
    box: npt.NDArray[np.float32], others: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """How a box lies to each of float32[n, 4]: intersection over union, and its share that lies inside (float32[n])."""
    area, areas = (np.clip(one[..., 2:] - one[..., :2], 1e-6, None).prod(axis=-1) for one in (box, others))
    common = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None).prod(axis=1)
    return common / (area + areas - common), common / area
