"""Makes frames of a head that turns, and of a picture of one, out of a single photo.

A face landmark network gives 468 points in 3D. The photo is laid over them, turned, and projected by a pinhole camera
on a background. The same camera films a flat or a bent print. Nothing of this is shipped; it makes what
`benchmarks/challenges.py` measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime
from scipy.interpolate import LinearNDInterpolator

from engines.base import Face
from photos.pixels import Pixels

Floats = npt.NDArray[np.float64]

# Width and height of a frame in pixels, as a phone's preview in a small copy.
FRAME_SIZE = (360, 480)
# What a head turns about, in inter-eye distances from the point between the eyes (x right, y down, z away from the
# camera): about where the spine carries the skull. A print turns about its own middle.
NECK_PIVOT = (0.0, 0.6, 1.5)
FLAT_PIVOT = (0.0, 0.6, 0.0)
# Inter-eye distances between a phone and a face at arm's length: 45 cm over 6.3 cm.
ARM_LENGTH = 7.0


class FaceMesh:
    """MediaPipe's face landmark network (Apache-2.0) as an ONNX file: 468 points in 3D of one face."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0]

    def points(self, image: Pixels, face: Face) -> Floats:
        """float64[468, 3]: x and y in pixels of the photo, z in the same unit, away from the camera."""
        centre, side = (face.box[:2] + face.box[2:]) / 2, 1.5 * float((face.box[2:] - face.box[:2]).max())
        angle = float(np.degrees(np.arctan2(*(face.eyes[1] - face.eyes[0])[::-1])))
        matrix = cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), angle, 192 / side)
        matrix = np.asarray(matrix, np.float64) + np.array([[0, 0, 96 - centre[0]], [0, 0, 96 - centre[1]]])
        crop = cv2.warpAffine(image, matrix, (192, 192), borderMode=cv2.BORDER_REPLICATE)[:, :, ::-1] / np.float32(255)
        batch = crop[None] if self._input.shape[-1] == 3 else crop.transpose(2, 0, 1)[None]
        outputs = self._session.run(None, {self._input.name: batch.astype(np.float32)})
        mesh = max(outputs, key=lambda one: one.size).reshape(468, 3).astype(np.float64)
        flat = cv2.transform(mesh[None, :, :2], cv2.invertAffineTransform(matrix))[0]
        return np.column_stack([flat, mesh[:, 2] * side / 192])


@dataclass(frozen=True)
class Relief:
    """A photo's pixels as points in space.

    Attributes:
        points: float64[n, 3] in inter-eye distances; the origin lies between the eyes.
        colours: uint8[n, 3] BGR.
    """

    points: Floats
    colours: Pixels


def head_of(image: Pixels, face: Face, mesh: FaceMesh, *, density: float = 110.0) -> Relief:
    """The head of a photo in 3D: the face from the mesh, and around it hair and ears that fall back from its rim.

    Args:
        density: points for each inter-eye distance.
    """
    points = mesh.points(image, face)
    middle, unit = face.eyes.mean(axis=0), face.inter_eye
    scale = density / unit
    image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), np.uint8)
    flat, depth = (points[:, :2] - middle) / unit, points[:, 2] / unit
    depth = depth - depth[np.argsort(np.abs(flat).sum(axis=1))[:5]].mean()
    hull = cv2.convexHull(flat.astype(np.float32))[:, 0]
    reach = 0.55
    left, top = hull.min(axis=0) - reach
    right, bottom = hull.max(axis=0) + reach
    x, y = np.meshgrid(np.arange(left, right, 1 / density), np.arange(top, bottom, 1 / density))
    inside = np.asarray(LinearNDInterpolator(flat, depth)(x, y))
    outline = np.zeros(x.shape, np.uint8)
    cv2.fillConvexPoly(outline, np.round((hull - (left, top)) * density).astype(np.int32), 1)
    known = ~np.isnan(inside)
    away, nearest = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    away = away / density
    of_label = np.zeros(int(nearest.max()) + 1)
    of_label[nearest[known]] = inside[known]
    z = np.where(known, inside, of_label[nearest] + 1.4 * away)
    z = cv2.GaussianBlur(z, (0, 0), 0.05 * density)
    columns, rows = (x * unit + middle[0]) * scale, (y * unit + middle[1]) * scale
    within = (away < reach) & (columns >= 0) & (rows >= 0)
    within &= (columns < image.shape[1] - 1) & (rows < image.shape[0] - 1)
    colours = cv2.remap(image, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)
    return Relief(np.stack([x, y, z], axis=-1)[within], np.asarray(colours[within], np.uint8))


def plain_head_of(image: Pixels, face: Face, *, density: float = 110.0) -> Relief:
    """The head of a photo in 3D without a landmark network: half an egg with a nose.

    Args:
        density: points for each inter-eye distance.
    """
    middle, unit = face.eyes.mean(axis=0), face.inter_eye
    x, y = np.meshgrid(np.arange(-1.3, 1.3, 1 / density), np.arange(-1.4, 2.1, 1 / density))
    from_rim = 1 - (x / 1.25) ** 2 - ((y - 0.4) / 1.75) ** 2
    egg = 1.1 - 1.2 * np.sqrt(np.clip(from_rim, 0, None))
    along = np.clip((y + 0.1) / 0.7, 0, 1) * np.clip((0.85 - y) / 0.2, 0, 1)
    z = egg - 0.62 * along * np.exp(-((x / 0.2) ** 2))
    z -= z[np.abs(y).argmin(axis=0)[0], np.abs(x - 0.5).argmin(axis=1)[0]]
    columns, rows = x * unit + middle[0], y * unit + middle[1]
    within = (from_rim > 0.02) & (columns >= 0) & (rows >= 0)
    within &= (columns < image.shape[1] - 1) & (rows < image.shape[0] - 1)
    colours = cv2.remap(image, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)
    return Relief(np.stack([x, y, z], axis=-1)[within], np.asarray(colours[within], np.uint8))


def print_of(
    image: Pixels, face: Face, *, radius: float = np.inf, holes: bool = False, density: float = 80.0, reach: float = 3.5
) -> Relief:
    """A print of a photo: flat, or bent round an upright cylinder.

    Args:
        radius: of the cylinder, in inter-eye distances of the printed face.
        holes: whether the eyes are cut out.
        reach: how far the print reaches from the point between the eyes, in inter-eye distances.
    """
    middle, unit = face.eyes.mean(axis=0), face.inter_eye
    scale = density / unit
    image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC), np.uint8)
    steps = np.arange(-reach, reach, 1 / density)
    x, y = np.meshgrid(steps, steps + 0.5)
    columns, rows = (x * unit + middle[0]) * scale, (y * unit + middle[1]) * scale
    within = (columns >= 0) & (rows >= 0) & (columns < image.shape[1] - 1) & (rows < image.shape[0] - 1)
    if holes:
        for eye in (face.eyes - middle) / unit:
            within &= ((x - eye[0]) / 0.22) ** 2 + ((y - eye[1]) / 0.12) ** 2 > 1
    z = np.zeros_like(x)
    if np.isfinite(radius):
        within &= np.abs(x) < 1.4 * radius
        x, z = radius * np.sin(x / radius), radius * (1 - np.cos(x / radius))
    colours = cv2.remap(image, columns.astype(np.float32), rows.astype(np.float32), cv2.INTER_LINEAR)
    return Relief(np.stack([x, y, z], axis=-1)[within], np.asarray(colours[within], np.uint8))


def folded_print_of(image: Pixels, face: Face, lean_deg: float, *, widened: bool = False) -> Relief:
    """A print that is folded upright between the eyes, so that its middle stands out.

    Args:
        lean_deg: by how much each half leans back.
        widened: whether it is printed so much wider that it looks as wide as the photo from the front.
    """
    flat, lean = print_of(image, face, reach=2.5), np.radians(lean_deg)
    x = flat.points[:, 0] * (1.0 if widened else np.cos(lean))
    z = (np.abs(x) - 0.5) * np.tan(lean)
    return Relief(np.column_stack([x, flat.points[:, 1], z]), flat.colours)


@dataclass(frozen=True)
class View:
    """How something stands before the camera.

    Attributes:
        yaw, pitch, roll: degrees; yaw > 0 turns to the right of the picture, pitch > 0 lowers the chin.
        distance: between the camera and the eyes, in inter-eye distances.
        shift: of the eyes from the middle of the picture, in inter-eye distances.
        pivot: the point that stays in its place.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    distance: float = ARM_LENGTH
    shift: tuple[float, float] = (0.0, 0.0)
    pivot: tuple[float, float, float] = NECK_PIVOT


def rotation(yaw: float, pitch: float, roll: float) -> Floats:
    """float64[3, 3]: yaw about the head's own axis, then pitch, then roll; degrees."""
    angles = np.radians([yaw, pitch, roll])
    (cy, cp, cr), (sy, sp, sr) = np.cos(angles), np.sin(angles)
    about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_x @ about_y)


def filmed(
    relief: Relief, view: View, background: Pixels, *, focal: float = 1.3, size: tuple[int, int] = FRAME_SIZE
) -> Pixels:
    """One frame: the relief before a background, by a pinhole camera of `focal` times the picture's height.

    Nearer points hide those behind them. Gaps between points are filled from beside them.
    """
    width, height = size
    turned = (relief.points - view.pivot) @ rotation(view.yaw, view.pitch, view.roll).T + view.pivot
    z = turned[:, 2] + view.distance
    u = focal * height * (turned[:, 0] + view.shift[0]) / z + width / 2
    v = focal * height * (turned[:, 1] + view.shift[1]) / z + 0.45 * height
    seen = (z > 0.5) & (u >= 0) & (v >= 0) & (u < width - 0.5) & (v < height - 0.5)
    order = np.argsort(-z[seen], kind="stable")
    columns, rows = np.round(u[seen][order]).astype(int), np.round(v[seen][order]).astype(int)
    layer, there = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    columns, rows = np.clip(columns, 0, width - 1), np.clip(rows, 0, height - 1)
    layer[rows, columns] = relief.colours[seen][order]
    there[rows, columns] = 1
    for _ in range(4):  # between the points of a surface that is seen from the side, or from close
        near = cv2.blur(there, (3, 3))
        filled = cv2.blur(layer, (3, 3)) / np.maximum(near, 1e-6)[..., None]
        gaps = (there == 0) & (near > 0.25)
        layer[gaps], there[gaps] = filled[gaps], 1
    cover = cv2.GaussianBlur(there, (3, 3), 0)[..., None]
    frame = background[:height, :width] * (1 - cover) + layer * cover
    return np.asarray(np.clip(frame, 0, 255), np.uint8)


def a_background(random: np.random.Generator, size: tuple[int, int] = FRAME_SIZE) -> Pixels:
    """A room that nobody is in: soft light, and some upright and lying rectangles."""
    width, height = size
    light = cv2.resize(random.uniform(60, 200, (4, 3, 3)).astype(np.float32), (width, height), interpolation=3)
    for _ in range(int(random.integers(3, 8))):
        x, y = int(random.integers(0, width)), int(random.integers(0, height))
        w, h = int(random.integers(20, width // 2)), int(random.integers(20, height // 2))
        light[y : y + h, x : x + w] = light[y : y + h, x : x + w] * 0.5 + random.uniform(20, 230, 3) * 0.5
    return np.asarray(np.clip(cv2.GaussianBlur(light, (0, 0), 1.5), 0, 255), np.uint8)


def as_sent(frame: Pixels, random: np.random.Generator, *, quality: int = 80, noise: float = 2.0) -> bytes:
    """The frame as a JPEG, with a sensor's noise."""
    noisy = np.clip(frame + random.normal(0, noise, frame.shape), 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
