"""How a face moves through the frames of a challenge: which steps it does, and whether it moves as a head does.

docs/liveness.md has the measurements behind every limit here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

from challenge.steps import CLOSER, LEFT, RIGHT, STRAIGHT
from engines.base import MEAN_FACE, Face
from engines.face_attributes import FaceAttributes
from face_checks import FRAME_EYE_CENTRE_PX, FRAME_EYE_DISTANCE_PX
from photos.colour import mean_lab
from photos.pixels import Pixels
from photos.resampling import halved

# Degrees by which the head's yaw differs from its yaw in the frames that look straight. Between the two limits a frame
# is on its way, and is no step. The network reads a smaller yaw in a bent print than in a head: of 64 such prints 25
# did the steps at 16 degrees, 17 at 18, and 12 at 20; of 128 attempts of honest people 12, 14 and 17 did not.
MIN_TURN_DEG = 18.0
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
ARCHES = (0.0, 0.08, 0.16, 0.25, 0.33)
# The arch that fits best as it is goes on to the fit of the homography: on 200 attempts this parts heads from bent
# prints as well as fitting a homography to every arch does, in a quarter of the CPU.
_PRINT_MOTIONS = (cv2.MOTION_HOMOGRAPHY, cv2.MOTION_AFFINE)
_PRINT_ENDS = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 15, 1e-3)
# The fold of a folded print is where the nose's landmark is, or so many inter-eye distances beside it. What fits best
# as it is goes on to the homography: the two best would let as many folds pass, in 1.6 times the CPU.
FOLD_SHIFTS = (-0.12, -0.06, 0.0, 0.06, 0.12)
# The eyes and the corners of the mouth change sides in a mirror. A homography would lay heads over each other, too.
_MIRRORED_LANDMARKS = [1, 0, 2, 4, 3]
_MIRROR_MOTIONS = (cv2.MOTION_AFFINE,)
_MIRROR_ENDS = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-5)
# What is wider than this, in pixels of the crop, is light; so much of the detail's own contrast is a camera's noise.
_LIGHT_PX, _NOISE = 6.0, 4.0
# Together with the nose's depth: a rest of this share says nothing, and each doubling of it as much as a seventh of an
# inter-eye distance of depth; more than the largest says no more, since blur alone leaves a rest.
LEAST_REST, NEUTRAL_REST, LARGEST_REST, DEPTH_OF_A_REST = 0.001, 0.03, 0.1, 0.2

# Who has done something else in between does not come back to the same place: of 40 people who do the steps two such
# frames differ by at least 8.7. At three times the limit a contrast of 1.25, a gamma of 0.6 and 20 levels more or less
# are found in all of them, and a contrast of 1.5 in two thirds.
LARGER_ACROSS_ACTIONS = 3.0

# The face's middle in the aligned face: from the eyes to the mouth, and as wide as the mouth. A quarter of its pixels
# is enough for their mean.
_MIDDLE_ROWS, _MIDDLE_COLUMNS = slice(42, 130, 2), slice(53, 106, 2)
# The side of the pictures in which a frame that was sent twice is looked for.
_COMPARED_SIDE_PX = 48
_BRIGHTNESS = np.array([0.114, 0.587, 0.299])
_SIDE_PX, _EYES_PX = 64, 20.0
_ORIGIN_PX = np.array([32.0, 24.0])
# Mirrors a crop of that side.
_MIRROR = np.array([[-1.0, 0.0, _SIDE_PX - 1], [0.0, 1.0, 0.0]])

Floats = npt.NDArray[np.float64]
Grey = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Frame:
    """One frame of a challenge.

    Attributes:
        pixels: uint8[h, w, 3] BGR.
        faces: those in it, the widest first.
        aligned: the widest face, as `face_checks.aligned_face` cuts it out; None where there is none that can be.
        attributes: what the network reads in `aligned`.
    """

    pixels: Pixels
    faces: list[Face]
    aligned: Pixels | None
    attributes: FaceAttributes | None


class Track:
    """One face through all frames."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = frames
        self._landmarks = [frame.faces[0].landmarks.astype(np.float64) for frame in frames]
        attributes = [frame.attributes for frame in frames if frame.attributes is not None]
        self._yaws = np.array([one.yaw for one in attributes])
        self._likenesses = [one.likeness for one in attributes]
        self._sizes = np.array([size_of(frame.faces[0]) for frame in frames])
        first = self._yaws[0]
        # What looks straight is known better from several frames than from the first alone.
        self._straight = [number for number, yaw in enumerate(self._yaws) if abs(yaw - first) <= MAX_STRAIGHT_DEG]
        self._centre = float(np.median(self._yaws[self._straight]))
        self._small_faces: dict[int, tuple[Grey, Floats]] = {}

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
            # A face to the right of the picture looks to the person's own left; its yaw is negative.
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
        """The least difference of any two frames where the first one's face is: what no light explains of the other.

        A polynomial of one frame's colours that fits the other's brightness best takes contrast, gamma and tint out of
        it. What remains is compared in very small pictures, so that neither their size nor what saving once more does
        to them counts.

        Returns:
            the mean rest in levels (0...255), of a face whose brightness deviates by 40. Between two frames with
            another action between them, `LARGER_ACROSS_ACTIONS` times less.
        """
        pictures = [_very_small(frame.pixels) for frame in self._frames]
        greys = [picture @ _BRIGHTNESS for picture in pictures]
        actions = np.searchsorted([number for _, number in self._actions()], range(len(pictures)), side="right")
        least = np.inf
        for at, one in enumerate(pictures[:-1]):
            place = _place_of_face(self._frames[at])
            rests = _rests(one[place], greys[at][place], [other[place] for other in greys[at + 1 :]])
            across = actions[at + 1 :] != actions[at]
            least = min(least, float((rests / np.where(across, LARGER_ACROSS_ACTIONS, 1.0)).min()))
        return least

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
        crops = [frame.aligned for frame in self._frames if frame.aligned is not None]
        colours = [mean_lab(crop[_MIDDLE_ROWS, _MIDDLE_COLUMNS].reshape(-1, 3)) for crop in crops]
        return max(float(np.linalg.norm(one - other)) for one, other in pairwise(colours))

    def relief(self, sides: Sequence[Sequence[int]]) -> float:
        """How far the face stands out, in inter-eye distances: the nose's depth, and what no print explains."""
        rest = min(LARGEST_REST, max(LEAST_REST, self._unlike_a_print(sides)))
        return self._nose_depth() + DEPTH_OF_A_REST * math.log(rest / NEUTRAL_REST)

    def _nose_depth(self) -> float:
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

    def sides(self) -> tuple[list[int], list[int]] | None:
        """The frames that are turned to the person's left, and to the right; None if there is none of a side."""
        turns = self._yaws - self._centre
        left, right = (np.flatnonzero(sign * turns >= MIN_TURN_DEG).tolist() for sign in (-1, 1))
        return (left, right) if left and right else None

    def clearest(self, side: Sequence[int]) -> int:
        """The frame of a side by which the network expects the recogniser to know the person best."""
        return max(side, key=lambda number: self._likenesses[number])

    def _unlike_a_print(self, sides: Sequence[Sequence[int]]) -> float:
        """How much of the turned faces no picture explains, flat or bent: 1 - correlation, the lesser of the sides.

        A picture that turns stays the same picture, narrower, and arched if it is bent round an upright cylinder. A
        head shows another side of the nose and the cheeks.
        """
        return self._lesser(sides, self._unexplained)

    def unlike_a_fold(self, sides: Sequence[Sequence[int]]) -> float:
        """How much of the turned faces' nearer halves no flat picture explains: 1 - correlation, the lesser of the
        sides that can be measured; 0 where neither can.

        A print that is folded upright along the nose stands out as a nose does. But each half of it is flat.
        """
        return self._lesser(sides, self._unexplained_of_half)

    def _lesser(self, sides: Sequence[Sequence[int]], rest_of: Callable[[_Turn], float]) -> float:
        """The lesser rest of both sides, each by its most telling frame; 0 where neither can be measured."""
        turns = np.abs(self._yaws - self._centre)
        telling = [min(side, key=lambda number: abs(turns[number] - TELLING_TURN_DEG)) for side in sides]
        # A side that cannot be measured is left to the other one.
        return min(filter(None, (rest_of(self._turn(number)) for number in telling)), default=0.0)

    def uneven(self, sides: Sequence[Sequence[int]]) -> float:
        """How unlike the two sides are: 1 - the correlation of one with the other's mirror image, of the likest pair.

        One photo from the side shows the other side as well, if it is mirrored. No head is as even as that. An affine
        map and the light say nothing: a print is held askew, and lit from somewhere else.

        Returns:
            0...2; 0 where it cannot be measured.
        """
        pairs = [pair for one in sides[0] for pair in self._over_mirrored(one, sides[1])]
        alike = [cv2.computeECC(mirrored, other, _MIDDLE) for mirrored, other in pairs]
        if not np.isfinite(alike).all():  # faces without detail
            return 0.0
        likest = int(np.argmax(alike))
        return 1.0 - max(alike[likest], _correlation(*pairs[likest], _MIRROR_MOTIONS, _MIRROR_ENDS, _MIDDLE))

    def _over_mirrored(self, one: int, others: Sequence[int]) -> list[tuple[Grey, Grey]]:
        """Crops without light: a face mirrored, and each other face, laid over it by an affine map of landmarks."""
        face, landmarks = self._small_face(one)
        to_crop = _crop_matrix(landmarks)
        mirrored = _without_light(np.ascontiguousarray(_crop(face, to_crop)[:, ::-1]))
        landmarks = cv2.transform(landmarks[None], _joined(_MIRROR, to_crop))[0][_MIRRORED_LANDMARKS]
        pairs: list[tuple[Grey, Grey]] = []
        for other in others:
            face, seen = self._small_face(other)
            pairs.append((mirrored, _without_light(_crop(face, _inverse(np.column_stack(_affine(landmarks, seen)))))))
        return pairs

    def _small_face(self, number: int) -> tuple[Grey, Floats]:
        """A frame's aligned face, grey and half as large, and the landmarks in it, float64[5, 2]. Made once."""
        if number in self._small_faces:
            return self._small_faces[number]
        aligned = self._frames[number].aligned
        assert aligned is not None  # or it had no yaw
        half = cv2.resize(cv2.cvtColor(aligned, cv2.COLOR_BGR2GRAY), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        landmarks = self._landmarks[number]
        centre = (np.array(FRAME_EYE_CENTRE_PX) + 0.5) / 2 - 0.5
        to_half = _similar(landmarks, MEAN_FACE[:, :2] * FRAME_EYE_DISTANCE_PX / 2 + centre)
        made = np.asarray(half, np.uint8), np.asarray(cv2.transform(landmarks[None], to_half)[0])
        self._small_faces[number] = made
        return made

    @staticmethod
    def _unexplained(turn: _Turn) -> float:
        """1 - the correlation of a turned face with the straight one, after the best arch and homography."""
        arched = [_arched(turn.straight, turn.sign * arch) for arch in ARCHES]
        likest = max(arched, key=lambda one: cv2.computeECC(one, turn.turned, _MIDDLE))
        return _rest(likest, turn.turned, _MIDDLE)

    @staticmethod
    def _unexplained_of_half(turn: _Turn) -> float:
        """As `_unexplained`, of the half between the nose and the nearer cheek, and without an arch."""
        columns = np.arange(_SIDE_PX)
        nearer = np.where(turn.sign * (columns - turn.moved) < 0, _WHOLE, np.uint8(0))
        if not nearer.any():
            return 0.0
        # Eyes and mouth are laid over each other already. So the nearer eye stays where it is, and the nose moves.
        eye = float(_ORIGIN_PX[0]) - turn.sign * _EYES_PX / 2
        before = max(1.0, turn.sign * (turn.nose - eye))
        afters = [turn.sign * (turn.moved + shift * _EYES_PX - eye) for shift in FOLD_SHIFTS]
        halves = [_widened(turn.straight, min(2.5, max(0.4, after / before)), eye) for after in afters]
        likest = max(halves, key=lambda one: cv2.computeECC(one, turn.turned, nearer))
        return _rest(likest, turn.turned, nearer)

    def _turn(self, number: int) -> _Turn:
        (first, landmarks), (face, seen) = self._small_face(0), self._small_face(number)
        to_crop = _crop_matrix(landmarks)
        onto_straight = _joined(to_crop, _inverse(np.column_stack(_affine(landmarks, seen))))
        nose, moved = (
            float(matrix[0] @ [*points[2], 1.0]) for points, matrix in ((landmarks, to_crop), (seen, onto_straight))
        )
        sign = 1 if self._yaws[number] < self._centre else -1
        return _Turn(_crop(first, to_crop), _crop(face, onto_straight), sign, nose, moved)


@dataclass(frozen=True)
class _Turn:
    """A turned face beside the straight one.

    Attributes:
        straight: crop of the straight face.
        turned: crop of the turned one, with eyes and mouth laid over those of the straight one.
        sign: 1 if it has turned to the right of the picture, else -1.
        nose, moved: the column of the nose's landmark in each.
    """

    straight: Grey
    turned: Grey
    sign: int
    nose: float
    moved: float


def _without_light(crop: Grey) -> Grey:
    """The detail of a grey crop, of the same contrast everywhere."""
    grey = crop.astype(np.float32)
    detail = grey - cv2.GaussianBlur(grey, (0, 0), _LIGHT_PX)
    contrast = np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), _LIGHT_PX)) + _NOISE
    return np.asarray(np.clip(128 + 40 * detail / contrast, 0, 255), np.uint8)


def _very_small(pixels: Pixels) -> Floats:
    """The picture as float64[48, 48, 3], -1...1, halved first: averaging alone takes three times as long."""
    _, near = halved(pixels, 3 * _COMPARED_SIDE_PX / min(pixels.shape[:2]))
    size = (_COMPARED_SIDE_PX, _COMPARED_SIDE_PX)
    return np.asarray(cv2.resize(near, size, interpolation=cv2.INTER_AREA), np.float64) / 128 - 1


def _place_of_face(frame: Frame) -> tuple[slice, slice]:
    """The rows and columns of the face's box in a picture of `_COMPARED_SIDE_PX`."""
    height, width = frame.pixels.shape[:2]
    left, top, right, bottom = frame.faces[0].box / np.array([width, height, width, height]) * _COMPARED_SIDE_PX
    last = _COMPARED_SIDE_PX - 1
    rows, columns = (
        slice(int(np.clip(np.floor(low), 0, last)), int(np.clip(np.ceil(high), 1, last + 1)))
        for low, high in ((top, bottom), (left, right))
    )
    return rows, columns


def _rests(picture: Floats, grey: Floats, others: Sequence[Floats]) -> Floats:
    """float64[n]: what a picture, float64[h, w, 3], with its brightness squared and cubed, leaves unexplained of the
    brightness of each other, float64[h, w]. The mean, for a deviation of 40 levels.
    """
    grey = grey.ravel()
    known = np.column_stack([np.ones_like(grey), picture.reshape(-1, 3), grey**2, grey**3])
    seen = np.column_stack([other.ravel() for other in others])
    # Of a grey picture the colours are one and the same, so the normal equations get a ridge.
    fitted = np.linalg.solve(known.T @ known + 1e-6 * len(known) * np.eye(known.shape[1]), known.T @ seen)
    return np.asarray(40 * np.abs(seen - known @ fitted).mean(axis=0) / np.maximum(1 / 128, seen.std(axis=0)))


def _arched(crop: Grey, arch: float) -> Grey:
    """The crop as its print looks from the side, bent round an upright cylinder: the middle moves against the rim."""
    if not arch:
        return crop
    moved = cv2.remap(crop, *_arch_of(arch), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.uint8)


def _widened(crop: Grey, times: float, column: float) -> Grey:
    """The crop, so many times as wide; a column stays where it is."""
    matrix = np.array([[times, 0.0, column * (1 - times)], [0.0, 1.0, 0.0]])
    return np.asarray(cv2.warpAffine(crop, matrix, (_SIDE_PX, _SIDE_PX), borderMode=cv2.BORDER_REPLICATE), np.uint8)


@cache
def _arch_of(arch: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """From where in a crop each pixel of the arched one comes: columns and rows, float32[64, 64] each."""
    rows, columns = np.mgrid[0:_SIDE_PX, 0:_SIDE_PX].astype(np.float32)
    across = (columns - _ORIGIN_PX[0]) / _EYES_PX
    return (columns - arch * _EYES_PX * (0.25 - across**2)).astype(np.float32), rows


def _rest(straight: Grey, turned: Grey, mask: Grey) -> float:
    """1 - the correlation of two faces where a mask says, after the best map of a print; 0 where no map is found."""
    correlation = _correlation(straight, turned, _PRINT_MOTIONS, _PRINT_ENDS, mask)
    return 1.0 - correlation if correlation > 0 else 0.0


def _correlation(one: Grey, other: Grey, motions: Sequence[int], ends: tuple[int, int, float], mask: Grey) -> float:
    """The correlation of two faces where a mask says, after the best map of the first of `motions` that converges; -1
    if none does."""
    around = _around(mask)
    for motion in motions:
        start = np.eye(3 if motion == cv2.MOTION_HOMOGRAPHY else 2, 3, dtype=np.float32)
        start[:2, 2] = around[1].start, around[0].start
        try:
            correlation, _ = cv2.findTransformECC(one[around], other, start, motion, ends, mask, 1)
        except cv2.error:  # no convergence
            continue
        return float(correlation)
    return -1.0


def size_of(face: Face) -> float:
    """The face's size in pixels, as a frontal face's inter-eye distance: a turn makes the eyes' distance smaller."""
    left, right, _, *mouth = face.landmarks.astype(np.float64)
    across = float(np.hypot(*(right - left)))
    down = float(np.hypot(*((mouth[0] + mouth[1]) / 2 - (left + right) / 2)))
    return max(across, down / float(MEAN_FACE[3, 1]))


def can_be_followed(face: Face) -> bool:
    """Whether the eyes lie apart, and eyes and mouth enclose an area: no map leads back from a line."""
    left, right, _, left_mouth, right_mouth = face.landmarks.astype(np.float64)
    (x, y), (to_x, to_y) = right_mouth - left, left_mouth - right
    return bool(face.inter_eye >= 1.0 and abs(x * to_y - y * to_x) >= 1.0)


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
    """The inverse of an affine map, float64[2, 3]; zeros where there is none, so that a crop by it shows nothing."""
    return np.asarray(cv2.invertAffineTransform(matrix), np.float64)


def _joined(after: Floats, before: Floats) -> Floats:
    """The affine map float64[2, 3] that applies `before`, then `after`."""
    return np.asarray((_square(after) @ _square(before))[:2])


def _crop(face: Grey, matrix: Floats) -> Grey:
    crop = cv2.warpAffine(face, matrix, (_SIDE_PX, _SIDE_PX), borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(cv2.GaussianBlur(crop, (0, 0), 0.8), np.uint8)


def _ellipse(wide: float, tall: float, low: float) -> Grey:
    """255 within an ellipse, else 0: its half axes, and how far it lies below the eyes, in inter-eye distances."""
    y, x = np.mgrid[0:_SIDE_PX, 0:_SIDE_PX]
    across = (x - _ORIGIN_PX[0]) / (wide * _EYES_PX)
    down = (y - _ORIGIN_PX[1] - low * _EYES_PX) / (tall * _EYES_PX)
    return np.asarray(255 * (across**2 + down**2 <= 1), np.uint8)


def _around(mask: Grey) -> tuple[slice, slice]:
    """The rows and columns of a mask and four pixels around: what a map may move into it. All costs twice as much."""
    left, top, width, height = cv2.boundingRect(mask)
    return slice(max(0, top - 4), top + height + 4), slice(max(0, left - 4), left + width + 4)


# The nose, the mouth and the inner half of the eyes. Further out a bent print turns away as a head does; here only a
# nose stands out.
_MIDDLE = _ellipse(0.6, 1.0, 0.5)
# The face from the forehead to the chin, and both cheeks: a half of it must be curved.
_WHOLE = _ellipse(1.4, 1.3, 0.45)
