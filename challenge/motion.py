"""How a face moves through the frames of a challenge: which steps it does, and whether it moves as a head does.

docs/liveness.md has the measurements behind every limit here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

import face_checks
from challenge.steps import CLOSER, LEFT, RIGHT, STRAIGHT
from engines.base import MEAN_FACE, Face
from photos.colour import mean_lab
from photos.pixels import Pixels
from photos.resampling import cut_out

# Degrees by which the head's yaw differs from its yaw in the frames that look straight. Between the two limits a frame
# is on its way, and is no step.
MIN_TURN_DEG = 12.0
MAX_STRAIGHT_DEG = 10.0
# The first frame may be turned away from the camera by so many degrees: cameras stand beside the screen.
MAX_FIRST_YAW_DEG = 20.0
# The face is so many times as large as before when it has come closer, and as at first when it has gone back.
MIN_GROWTH = 1.15
MAX_GROWTH_WHEN_BACK = 1.09

# A turn by less than this counts as this much when the depth is worked out: a small angle says little.
LEAST_TANGENT = math.tan(math.radians(20))

# Of several turned frames of a side the one that is turned by about so much is looked at closely: less shows too little
# of a head's depth, more hides too much of the face.
TELLING_TURN_DEG = 26.0
# How far a bent print's middle may arch against its rim, in inter-eye distances at one inter-eye distance from the
# middle: 0.25 is a print round a cylinder of 10 cm radius, turned by 40 degrees.
ARCHES = (0.0, 0.12, 0.25)
_ECC_ENDS = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 25, 3e-4)

_SIDE_PX, _EYES_PX = 64, 20.0
_ORIGIN_PX = np.array([32.0, 24.0])

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """One frame: uint8[h, w, 3] BGR, and the faces in it, the widest first."""

    pixels: Pixels
    faces: list[Face]


class Track:
    """One face through all frames."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = frames
        self._landmarks = [frame.faces[0].landmarks.astype(np.float64) for frame in frames]
        self._yaws = np.array([face_checks.head_pose(frame.faces[0]).yaw for frame in frames])
        self._sizes = np.array([_size(points) for points in self._landmarks])
        first = self._yaws[0]
        # What looks straight is known better from several frames than from the first alone.
        self._straight = [number for number, yaw in enumerate(self._yaws) if abs(yaw - first) <= MAX_STRAIGHT_DEG]
        self._centre = float(np.median(self._yaws[self._straight]))

    def follow(self, steps: Sequence[str]) -> list[tuple[str, int]]:
        """The steps that are seen in order, each with the frame that shows it best, up to the first wrong one.

        A look straight may be seen between any two steps. A turn or a coming closer that was not asked for is wrong.
        """
        if abs(self._yaws[0]) > MAX_FIRST_YAW_DEG:
            return []
        done: list[tuple[str, int]] = []
        for action, number in self._actions():
            if len(done) < len(steps) and action == steps[len(done)]:
                done.append((action, number))
            elif action != STRAIGHT and not (done and action == done[-1][0]):
                return done if len(done) < len(steps) else done[:-1]
        return done

    def _actions(self) -> list[tuple[str, int]]:
        """What the face does, each once with its frame."""
        actions: list[tuple[str, int]] = []
        looking, near, reference = "", False, self._sizes[0]
        for number, yaw in enumerate(self._yaws - self._centre):
            # A face to the right of the picture looks to the person's own left; `head_pose` counts that as negative.
            side = LEFT if yaw <= -MIN_TURN_DEG else RIGHT if yaw >= MIN_TURN_DEG else STRAIGHT
            if side == STRAIGHT and abs(yaw) > MAX_STRAIGHT_DEG:
                continue
            if side == STRAIGHT:
                growth = self._sizes[number] / reference
                if not near and growth >= MIN_GROWTH:
                    near = True
                    actions.append((CLOSER, number))
                    looking = STRAIGHT
                    continue
                if near and growth <= MAX_GROWTH_WHEN_BACK:
                    near = False
                if not near:
                    reference = min(reference, self._sizes[number])
            if side != looking:
                actions.append((side, number))
                looking = side
        return actions

    def least_difference(self) -> float:
        """The least mean difference (0...255) of any two frames of one size."""
        # Every fourth pixel is enough: two frames of a camera differ in each by its noise.
        pictures = [np.ascontiguousarray(frame.pixels[::4, ::4]) for frame in self._frames]
        pairs = [
            float(np.mean(cv2.absdiff(one, other)))
            for at, one in enumerate(pictures)
            for other in pictures[at + 1 :]
            if one.shape == other.shape
        ]
        return min(pairs, default=255.0)

    def largest_shift(self) -> float:
        """How far the face moves between two frames at most, in inter-eye distances of the smaller one."""
        centres = [points.mean(axis=0) for points in self._landmarks]
        shifts = [float(np.hypot(*(one - other))) for one, other in pairwise(centres)]
        sizes = [float(min(one, other)) for one, other in pairwise(self._sizes)]
        return max(shift / size for shift, size in zip(shifts, sizes, strict=True))

    def largest_zoom(self) -> float:
        """By which factor the face grows or shrinks between two frames at most."""
        zooms = [float(one / other) for one, other in pairwise(self._sizes)]
        return max(*zooms, 1 / min(zooms))

    def largest_colour_shift(self) -> float:
        """By how much the mean colour of the face's middle changes between two frames at most (CIELAB)."""
        colours = []
        for frame in self._frames:
            crop = cut_out(frame.pixels, _crop_matrix(frame.faces[0].landmarks.astype(np.float64)), _SIDE_PX)
            colours.append(mean_lab(crop[_MIDDLE > 0]))
        return max(float(np.linalg.norm(one - other)) for one, other in pairwise(colours))

    def nose_depth(self) -> float:
        """How far the nose's tip stands before the plane of eyes and mouth, in inter-eye distances.

        An affine map of the other four landmarks carries a plane from the straight frame to the turned one. The nose's
        tip of a head is elsewhere by its depth times the tangent of the angle. How far the face has become narrower
        tells the angle. A flat print gives 0, a bent one a little, a head about 0.45.
        """
        parallax = tangents = 0.0
        straight = self._mean_straight()
        for number, yaw in enumerate(self._yaws - self._centre):
            if abs(yaw) < MIN_TURN_DEG:
                continue
            turned = self._landmarks[number]
            linear, shift = _affine(straight, turned)
            if abs(np.linalg.det(linear)) < 1e-6:
                return 0.0
            across = straight[1] - straight[0]
            inter_eye = float(np.hypot(*across))
            across /= inter_eye
            moved = np.linalg.solve(linear, turned[2] - shift) - straight[2]
            down = np.array([-across[1], across[0]])
            narrower = float(np.hypot(*(linear @ across)) / np.hypot(*(linear @ down)))
            narrower = min(1.0, max(0.5, narrower))
            parallax += float(moved @ across) / inter_eye * (1 if yaw < 0 else -1)
            tangents += max(LEAST_TANGENT, math.sqrt(1 / narrower**2 - 1))
        return parallax / tangents if tangents else 0.0

    def _mean_straight(self) -> Floats:
        """float64[5, 2]: the landmarks of the straight frames, laid over each other; in pixels of the first one."""
        first = self._landmarks[0]
        straight = [self._landmarks[number] for number in self._straight]
        laid = [cv2.transform(points[None], _similar(points, first))[0] for points in straight]
        return np.asarray(np.mean(laid, axis=0), np.float64)

    def turned_frames(self) -> tuple[int, int] | None:
        """Of each side, left first, the frame whose turn says most about the head; None if there is none of a side."""
        of_sides = []
        for sign in (-1, 1):
            turns = sign * (self._yaws - self._centre)
            turned = np.flatnonzero(turns >= MIN_TURN_DEG)
            if len(turned) == 0:
                return None
            of_sides.append(int(turned[np.argmin(np.abs(turns[turned] - TELLING_TURN_DEG))]))
        return of_sides[0], of_sides[1]

    def unlike_a_print(self, turned: Sequence[int]) -> float:
        """How much of the turned faces no picture explains, flat or bent: 1 - correlation, the least of the frames.

        A picture that turns stays the same picture, narrower, and arched if it is bent round an upright cylinder. A
        head shows another side of the nose and the cheeks.
        """
        # A side that cannot be measured is left to the other one.
        return min(filter(None, map(self._unexplained, turned)), default=0.0)

    def _unexplained(self, number: int) -> float:
        """1 - the correlation of a turned face with the straight one, after the best arch and homography."""
        to_crop = _crop_matrix(self._landmarks[0])
        straight = _grey_crop(self._frames[0].pixels, to_crop)
        linear, shift = _affine(self._landmarks[0], self._landmarks[number])
        turned = _grey_crop(self._frames[number].pixels, _joined(to_crop, _inverse(np.column_stack([linear, shift]))))
        sign = 1 if self._yaws[number] < self._centre else -1
        correlation = max(_correlation(_arched(straight, sign * arch), turned) for arch in ARCHES)
        # Where no map is found at all, nothing is measured.
        return 1.0 - correlation if correlation > 0 else 0.0


def _arched(crop: npt.NDArray[np.uint8], arch: float) -> npt.NDArray[np.uint8]:
    """The crop as its print looks from the side, bent round an upright cylinder: the middle moves against the rim."""
    if not arch:
        return crop
    y, x = np.mgrid[0:_SIDE_PX, 0:_SIDE_PX].astype(np.float32)
    across = (x - _ORIGIN_PX[0]) / _EYES_PX
    source = (x - arch * _EYES_PX * (0.25 - across**2)).astype(np.float32)
    moved = cv2.remap(crop, source, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.uint8)


def _correlation(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """The correlation of two faces' middles after the best homography, or affine map; 0 if none is found."""
    for motion, start in ((cv2.MOTION_HOMOGRAPHY, np.eye(3)), (cv2.MOTION_AFFINE, np.eye(2, 3))):
        try:
            correlation, _ = cv2.findTransformECC(one, other, start.astype(np.float32), motion, _ECC_ENDS, _MIDDLE, 1)
        except cv2.error:  # no convergence
            continue
        return float(correlation)
    return 0.0


def _size(landmarks: Floats) -> float:
    """The face's size in pixels, in inter-eye distances of a frontal face: a turn makes the eyes' distance smaller."""
    across = float(np.hypot(*(landmarks[1] - landmarks[0])))
    down = float(np.hypot(*((landmarks[3] + landmarks[4]) / 2 - (landmarks[0] + landmarks[1]) / 2)))
    return max(across, down / float(MEAN_FACE[3, 1]))


def _affine(source: Floats, target: Floats) -> tuple[Floats, Floats]:
    """The affine map that fits eyes and mouth best: float64[2, 2] and float64[2]."""
    plane = [0, 1, 3, 4]
    fitted, *_ = np.linalg.lstsq(np.column_stack([source[plane], np.ones(4)]), target[plane], rcond=None)
    return np.asarray(fitted[:2].T), np.asarray(fitted[2])


def _similar(source: Floats, target: Floats) -> Floats:
    """The similarity transform that fits all landmarks best, float64[2, 3]; the identity for degenerate ones."""
    one, other = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    centred = one - one.mean()
    spread = float((abs(centred) ** 2).sum())
    turn = (centred.conj() * (other - other.mean())).sum() / spread if spread else 1.0
    shift = other.mean() - turn * one.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def _crop_matrix(landmarks: Floats) -> Floats:
    return _similar(landmarks, MEAN_FACE[:, :2] * _EYES_PX + _ORIGIN_PX)


def _square(matrix: Floats) -> Floats:
    return np.vstack([matrix, [0, 0, 1]])


def _inverse(matrix: Floats) -> Floats:
    return np.asarray(np.linalg.inv(_square(matrix)), np.float64)


def _joined(after: Floats, before: Floats) -> Floats:
    """The affine map float64[2, 3] that applies `before`, then `after`."""
    return np.asarray((_square(after) @ (before if len(before) == 3 else _square(before)))[:2])


def _grey_crop(image: Pixels, matrix: Floats) -> npt.NDArray[np.uint8]:
    crop = cv2.cvtColor(cut_out(image, matrix, _SIDE_PX), cv2.COLOR_BGR2GRAY)
    return np.asarray(cv2.GaussianBlur(crop, (0, 0), 0.8), np.uint8)


def _middle() -> npt.NDArray[np.uint8]:
    """255 within the ellipse over the nose, the mouth and the inner half of the eyes, else 0.

    Further out a bent print turns away as a head does; here only a nose stands out.
    """
    y, x = np.mgrid[0:_SIDE_PX, 0:_SIDE_PX]
    across = (x - _ORIGIN_PX[0]) / (0.6 * _EYES_PX)
    down = (y - _ORIGIN_PX[1] - 0.5 * _EYES_PX) / _EYES_PX
    return np.asarray(255 * (across**2 + down**2 <= 1), np.uint8)


_MIDDLE = _middle()
