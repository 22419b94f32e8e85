"""Labels crops with the help of openly licensed networks: the head's pose, the eyes' outline, what an embedding keeps.

A crop is uint8 BGR [160, 160, 3] as in `overlays.py`. None of these networks is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from overlays import SIZE, Image

Points = NDArray[np.float64]

# The mesh network sees 1.5 times the face box; the box of a mean face in the crop is 117 pixels high.
MESH_CENTRE, MESH_PART, MESH_INPUT = (80.0, 88.0), 176.0, 192
IRIS_INPUT = 64
# Both eyes' outlines in the mesh: the corners, the upper and the lower lid from the outer to the inner corner.
EYE_OUTLINES = (
    {"upper": (33, 246, 161, 160, 159, 158, 157, 173, 133), "lower": (33, 7, 163, 144, 145, 153, 154, 155, 133)},
    {"upper": (263, 466, 388, 387, 386, 385, 384, 398, 362), "lower": (263, 249, 390, 373, 374, 380, 381, 382, 362)},
)
# Points that mirror each other: both eyes' corners and the mouth's.
PAIRS = ((33, 263), (133, 362), (61, 291))
NOSE_TIP, MOUTH_CORNERS = 1, (61, 291)
# Where the recogniser expects the five landmarks in its 112-pixel crop.
RECOGNISER_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# Where the service aligns them to in the crop (`face_checks.py`).
CROP_POINTS = np.array([[57.5, 63.5], [101.5, 63.5], [79.5, 89.9], [59.7, 107.94], [99.3, 107.94]])


def session(model: Path | bytes) -> onnxruntime.InferenceSession:
    """One network on one thread, as each worker has its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # part of a network leaves weights unused, which it warns of one by one
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


def similarity(source: Points, target: Points) -> NDArray[np.float64]:
    """The similarity transform [2, 3] that brings `source` to `target` with the least squared error."""
    s, t = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    centred = s - s.mean()
    turn = (centred.conj() * (t - t.mean())).sum() / (abs(centred) ** 2).sum()
    shift = t.mean() - turn * s.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


class Mesh:
    """The 468-point face mesh."""

    def __init__(self, folder: Path) -> None:
        self._session = session(folder / "mediapipe_face_landmark_468.onnx")

    def points(self, crop: Image) -> Points:
        """float64 [468, 3] in the crop's pixels; depth grows away from the camera."""
        scale = MESH_INPUT / MESH_PART
        left, top = MESH_CENTRE[0] - MESH_PART / 2, MESH_CENTRE[1] - MESH_PART / 2
        matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
        seen = cv2.warpAffine(crop, matrix, (MESH_INPUT, MESH_INPUT), borderMode=cv2.BORDER_REPLICATE)
        image = cv2.cvtColor(seen, cv2.COLOR_BGR2RGB).astype(np.float32)[None] / 255
        found = self._session.run(None, {"image": image})[0].reshape(468, 3).astype(np.float64) / scale
        return np.asarray(found + np.array([left, top, 0.0]))


def five_points(mesh: Points) -> Points:
    """The recognisers' five landmarks [5, 2] of a mesh: eyes, nose, mouth corners."""
    eyes = [mesh[list({*outline["upper"], *outline["lower"]}), :2].mean(0) for outline in EYE_OUTLINES]
    return np.array([*eyes, mesh[NOSE_TIP, :2], mesh[MOUTH_CORNERS[0], :2], mesh[MOUTH_CORNERS[1], :2]])


def turn_between(canonical: Points, mesh: Points) -> NDArray[np.float64]:
    """The rotation [3, 3] that brings the canonical face nearest to the mesh (Kabsch)."""
    u, _, vt = np.linalg.svd((mesh - mesh.mean(0)).T @ (canonical - canonical.mean(0)))
    return np.asarray(u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt)


def canonical_face(meshes: Sequence[Points]) -> Points:
    """The mean face [468, 3] of many meshes, turned to each other and made symmetrical."""
    mean = meshes[0] - meshes[0].mean(0)
    for _ in range(6):
        turned = [(mesh - mesh.mean(0)) @ turn_between(mean, mesh) for mesh in meshes]
        mean = np.mean([mesh / np.linalg.norm(mesh) for mesh in turned], 0)
        across = sum(mean[right] - mean[left] for left, right in PAIRS)
        across = across / np.linalg.norm(across)
        axis = np.cross(across, (1, 0, 0))
        mean = mean @ cv2.Rodrigues(axis / np.linalg.norm(axis) * np.arccos(across[0]))[0].T
        mirrored = mean * (-1, 1, 1)
        partner = np.argmin(np.linalg.norm(mean[:, None] - mirrored[None], axis=2), 1)
        mean = (mean + mirrored[partner]) / 2
        mean -= mean.mean(0)
    return np.asarray(mean - mean.mean(0))


def angles(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Yaw, pitch and roll in degrees, as `face_checks.Pose` has them."""
    pitch = np.arcsin(np.clip(-turn[1, 2], -1, 1))
    return np.rad2deg([np.arctan2(turn[0, 2], turn[2, 2]), pitch, np.arctan2(turn[1, 0], turn[1, 1])])


def recogniser_input(crop: Image, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 [1, 3, 112, 112]: what a recogniser sees of uint8 BGR `crop`, which `matrix` maps to its pixels."""
    face = cv2.warpAffine(crop, matrix, (112, 112), borderMode=cv2.BORDER_REPLICATE)
    image = (cv2.cvtColor(face, cv2.COLOR_BGR2RGB).astype(np.float32) - 127.5) / 127.5
    return np.asarray(image.transpose(2, 0, 1)[None], np.float32)


class Recogniser:
    """SFace, as the compact model's pack has it: how alike the service will find two crops."""

    def __init__(self, path: Path) -> None:
        self._session = session(path)
        self._matrix = similarity(CROP_POINTS, RECOGNISER_POINTS)

    def embedding(self, crop: Image) -> NDArray[np.float32]:
        """float32 [128], of length 1."""
        image = recogniser_input(crop, self._matrix)
        found = self._session.run(None, {self._session.get_inputs()[0].name: image})[0][0]
        return np.asarray(found / np.linalg.norm(found), np.float32)


def close_eyes(crop: Image, mesh: Points, share: float) -> Image:
    """Draw both upper lids down by `share` (1: shut): the skin between brow and lid is stretched over the eye."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    source = y.copy()
    for outline in EYE_OUTLINES:
        upper, lower = (mesh[list(outline[name]), :2] for name in ("upper", "lower"))
        upper, lower = upper[np.argsort(upper[:, 0])], lower[np.argsort(lower[:, 0])]
        up = np.interp(x[0], upper[:, 0], upper[:, 1])
        low = np.interp(x[0], lower[:, 0], lower[:, 1]) + 0.5
        inside = (x[0] > upper[0, 0]) & (x[0] < upper[-1, 0])
        gap = np.where(inside, np.maximum(low - up, 0), 0) * share
        brow = up - 8.0
        # From the brow to the new edge of the lid the rows of the old lid are stretched; below the eye stays open.
        edge = up + gap
        down = np.where(y < edge, brow + (y - brow) * (up - brow) / np.maximum(edge - brow, 1e-3), y)
        source = np.where(inside[None] & (y > brow) & (y < low), np.minimum(source, down), source)
    return cv2.remap(crop, x, source.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


class EyeState:
    """Two networks that doubt open eyes for different reasons: of dark skin the one, of narrow eyes the other."""

    def __init__(self, folder: Path) -> None:
        self._state = session(folder / "open-closed-eye.onnx")
        self._iris = session(folder / "mediapipe_iris_landmark.onnx")

    def open(self, crop: Image, mesh: Points) -> float:
        """The probability (0..1) that the better of both eyes is open, by Open Model Zoo's network."""
        best = 0.0
        for outline in EYE_OUTLINES:
            eye = _eye(crop, mesh, outline, 0.75, 32)
            image = ((eye.astype(np.float32) - 127.0) / 255).transpose(2, 0, 1)[None]
            scores: Any = self._state.run(None, {"input.1": image})[0].reshape(2)
            best = max(best, float(scores[1]))
        return best

    def opening(self, crop: Image, mesh: Points) -> float:
        """Area over squared width of the lids' outline of the wider eye, by MediaPipe's iris network."""
        best = 0.0
        for side, outline in enumerate(EYE_OUTLINES):
            image = iris_input(_eye(crop, mesh, outline, 1.15, IRIS_INPUT), mirrored=side == 0)
            points = self._iris.run(None, {"image": image})[0].reshape(71, 3)[:16, :2].astype(np.float32)
            lids = np.concatenate([points[:9], points[:8:-1]])
            best = max(best, float(cv2.contourArea(lids)) / max(1.0, float(np.ptp(points[:, 0]))) ** 2)
        return best


def _eye(crop: Image, mesh: Points, outline: dict[str, tuple[int, ...]], reach: float, side: int) -> Image:
    """A square of `side` pixels about one eye, `reach` eye widths to each side."""
    upper = mesh[list(outline["upper"]), :2]
    return square(crop, upper.mean(0), float(reach * np.ptp(upper[:, 0])), side)


def iris_input(eye: Image, *, mirrored: bool) -> NDArray[np.float32]:
    """float32 [1, 64, 64, 3] of a square about an eye; the iris network knows left eyes, so a right one is mirrored."""
    seen = np.ascontiguousarray(eye[:, ::-1]) if mirrored else eye
    return np.asarray(cv2.cvtColor(seen, cv2.COLOR_BGR2RGB).astype(np.float32)[None] / 255, np.float32)


def square(crop: Image, centre: Sequence[float] | Points, half: float, side: int) -> Image:
    """A square of `side` pixels, cut out from `half` pixels to each side of `centre`."""
    scale = side / (2 * half)
    matrix = np.array([[scale, 0, side / 2 - centre[0] * scale], [0, scale, side / 2 - centre[1] * scale]])
    return cv2.warpAffine(crop, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)


class Detector:
    """The compact model's detector: where the service will find a face's landmarks."""

    def __init__(self, path: Path) -> None:
        self._session = session(path)
        self._outputs = [one.name for one in self._session.get_outputs()]

    def landmarks(self, photo: Image) -> Points | None:
        """The surest face's five landmarks [5, 2] in pixels of uint8 BGR `photo`, None below a score of 0.5."""
        height, width = photo.shape[:2]
        tall, wide = -(-height // 32) * 32, -(-width // 32) * 32
        padded = cv2.copyMakeBorder(photo, 0, tall - height, 0, wide - width, cv2.BORDER_CONSTANT)
        image = (cv2.cvtColor(padded, cv2.COLOR_BGR2RGB).astype(np.float32) - 127.5) / 128
        found = self._session.run(None, {self._session.get_inputs()[0].name: image.transpose(2, 0, 1)[None]})
        best, points = 0.5, None
        for level, stride in enumerate((8, 16, 32)):
            scores, offsets = found[level].reshape(-1), found[6 + level].reshape(-1, 5, 2)
            first = int(scores.argmax())
            if scores[first] > best:
                anchors = len(scores) // (tall // stride * (wide // stride))
                row, column = divmod(first // anchors, wide // stride)
                best, points = float(scores[first]), (np.array([column, row]) + offsets[first]) * stride
        return points
