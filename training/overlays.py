"""The synthetic coverings: draws or pastes them onto aligned face crops and says which regions they hide.

A crop is uint8 BGR [160, 160, 3] with the eyes' centres 44 px apart on the line y = 63.5. Every painter returns the
painted crop and, where it matters, its alpha float32 [160, 160] in 0..1, from which `hidden` derives the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Not typed by element: OpenCV's stubs answer every call with "integer or floating".
Image = NDArray[Any]
Alpha = NDArray[Any]
Rng = np.random.Generator

SIZE = 160
EYES = ((56, 64), (104, 64))
NOSE = (80, 89)
MOUTH = (80, 112)


def _ellipse(centre: tuple[int, int], axes: tuple[int, int]) -> NDArray[np.bool_]:
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    cv2.ellipse(canvas, centre, axes, 0, 0, 360, 1, -1)
    return canvas.astype(bool)


EYE_AREAS = [_ellipse(centre, (11, 6)) for centre in EYES]
NOSE_AREA = _ellipse(NOSE, (11, 11))
MOUTH_AREA = _ellipse(MOUTH, (19, 8))
INNER_FACE = _ellipse((80, 88), (40, 40))


def hidden(alpha: Alpha) -> tuple[float, float, float, float]:
    """The share, 0..1, of the worse eye, the nose, the mouth and the inner face that lies below `alpha`."""
    eyes = max(float(alpha[area].mean()) for area in EYE_AREAS)
    return eyes, float(alpha[NOSE_AREA].mean()), float(alpha[MOUTH_AREA].mean()), float(alpha[INNER_FACE].mean())


def blend(image: Image, paint: NDArray[Any], alpha: Alpha) -> Image:
    """`image` with `paint` (0..255, [160, 160, 3] or one colour) over it, as opaque as `alpha`."""
    a = alpha[:, :, None]
    return np.asarray(np.clip(image * (1 - a) + paint * a, 0, 255), np.uint8)


def polygon(points: Sequence[tuple[float, float]], softness: float = 0.8) -> Alpha:
    """The alpha of a filled polygon with soft edges."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    cv2.fillPoly(canvas, [np.round(np.array(points) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(canvas, (0, 0), softness).astype(np.float32) / 255


def curve(points: Sequence[tuple[float, float]], steps: int = 8) -> list[tuple[float, float]]:
    """A closed polygon rounded off (Chaikin's corner cutting)."""
    line = np.array(points, np.float32)
    for _ in range(2 if steps < 8 else 3):
        after = np.roll(line, -1, 0)
        line = np.stack([0.75 * line + 0.25 * after, 0.25 * line + 0.75 * after], 1).reshape(-1, 2)
    return [(float(x), float(y)) for x, y in line]


def any_colour(rng: Rng) -> NDArray[np.float64]:
    """A BGR colour: often black, white, grey or pale blue, else anything."""
    kind = rng.random()
    if kind < 0.22:
        return np.full(3, rng.uniform(5, 50)) + rng.uniform(-6, 6, 3)
    if kind < 0.4:
        return np.full(3, rng.uniform(190, 250)) + rng.uniform(-8, 8, 3)
    if kind < 0.5:
        return np.full(3, rng.uniform(60, 180)) + rng.uniform(-8, 8, 3)
    if kind < 0.6:
        return np.array([rng.uniform(190, 240), rng.uniform(170, 225), rng.uniform(110, 190)])
    hsv = np.array([[[rng.integers(180), rng.integers(60, 255), rng.integers(40, 255)]]], np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0], np.float64)


def fabric(rng: Rng, donor: Image, colour: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """Paint [160, 160, 3], 0..255: plain, striped, checked, dotted, or a torn-out patch of another picture."""
    base = any_colour(rng) if colour is None else colour
    paint = np.empty((SIZE, SIZE, 3), np.float32)
    paint[:] = base
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(5, 26)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.random()
    if kind < 0.3:
        side = int(rng.integers(25, 110))
        top, left = rng.integers(0, SIZE - side, 2)
        patch = cv2.resize(donor[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
        tint = rng.uniform(0, 0.7)
        paint = patch.astype(np.float32) * (1 - tint) + paint * tint
        if rng.random() < 0.5:
            paint = paint[:, :, rng.permutation(3)]
    elif kind < 0.6:
        other = any_colour(rng).astype(np.float32)
        wave = np.sin(along * 2 * np.pi / pitch)
        if kind > 0.4:
            wave = wave * np.sin(across * 2 * np.pi / pitch)
        if kind > 0.5:
            wave = wave - rng.uniform(0.2, 0.7)
        share = (wave > rng.uniform(-0.5, 0.5)).astype(np.float32)[:, :, None]
        paint = paint * (1 - share) + other * share
    # Folds and weave: without them the net learns flatness instead of the covering.
    relief = cv2.resize(
        rng.normal(0, 1, (int(rng.integers(3, 12)),) * 2).astype(np.float32),
        (SIZE, SIZE),
        interpolation=cv2.INTER_CUBIC,
    )
    shade = (
        rng.uniform(2, 22) * relief
        + rng.uniform(0, 7) * rng.normal(0, 1, (SIZE, SIZE))
        + rng.uniform(-0.25, 0.25) * (x - 80)
    )
    return np.ascontiguousarray(paint + shade[:, :, None], np.float32)


def cast_shadow(image: Image, alpha: Alpha, rng: Rng) -> Image:
    """`image` darkened softly beside `alpha`, as by something held before it."""
    offset = np.array([[1, 0, rng.uniform(-5, 5)], [0, 1, rng.uniform(0, 6)]], np.float32)
    soft = cv2.GaussianBlur(cv2.warpAffine(alpha, offset, (SIZE, SIZE)), (0, 0), rng.uniform(1.5, 6))
    return np.asarray(image * (1 - rng.uniform(0.1, 0.55) * soft[:, :, None]), np.uint8)


def mask(image: Image, rng: Rng, donor: Image, wear: str = "full") -> tuple[Image, Alpha]:
    """A face mask, worn `full` (nose to chin), under the `nose`, or under the `chin`."""
    top = {"full": rng.uniform(72, 90), "nose": rng.uniform(96, 104), "chin": rng.uniform(130, 137)}[wear]
    side = top + rng.uniform(0, 16) * (wear != "chin") + rng.uniform(-8, 2) * (wear == "chin")
    low = rng.uniform(134, 152) if wear != "chin" else rng.uniform(150, 168)
    left, right = 80 - rng.uniform(36, 56), 80 + rng.uniform(36, 56)
    dx = rng.normal(0, 2)
    outline = [
        (80 + dx, top),
        (80 + dx + rng.uniform(12, 26), top + rng.uniform(1, 7)),
        (right, side),
        (right - rng.uniform(0, 5), side + 24),
        (80 + rng.uniform(20, 34), low - rng.uniform(0, 6)),
        (80 + dx, low + 3),
        (80 - rng.uniform(20, 34), low - rng.uniform(0, 6)),
        (left + rng.uniform(0, 5), side + 24),
        (left, side),
        (80 + dx - rng.uniform(12, 26), top + rng.uniform(1, 7)),
    ]
    if wear != "full":
        outline[0] = (80 + dx, top + rng.uniform(0, 3))
    alpha = polygon(curve(outline))
    paint = fabric(rng, donor)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    paint -= (((x - 80) / 48) ** 2 * rng.uniform(0, 40) + np.maximum(y - 112, 0) * rng.uniform(0, 1.0))[:, :, None]
    if rng.random() < 0.5:
        for pleat in np.linspace(top + 12, low - 10, int(rng.integers(2, 5))):
            cv2.line(
                paint,
                (int(left), int(pleat + 3)),
                (int(right), int(pleat + rng.uniform(-2, 5))),
                (paint.mean((0, 1)) * rng.uniform(0.75, 1.1)).tolist(),
                1,
                cv2.LINE_AA,
            )
    if rng.random() < 0.25:
        cv2.line(paint, (80, int(top)), (80, int(low)), (paint.mean((0, 1)) * 0.7).tolist(), 1, cv2.LINE_AA)
    light = cv2.blur(image, (31, 31)).mean(2, keepdims=True) / max(float(image.mean()), 1)
    out = cast_shadow(image, alpha, rng) if rng.random() < 0.6 else image.copy()
    if rng.random() < 0.7:
        loop = (any_colour(rng) if rng.random() < 0.5 else np.full(3, 235.0)).tolist()
        for ear, cheek in ((rng.uniform(16, 26), left), (rng.uniform(134, 144), right)):
            cv2.line(out, (int(ear), int(min(side, 90) - 14)), (int(cheek), int(side + 3)), loop, 1, cv2.LINE_AA)
    return blend(out, paint * np.clip(light, 0.5, 1.4), alpha), alpha


def lens_outline(rng: Rng) -> list[list[tuple[float, float]]]:
    """Two lens outlines of one style: round, square, aviator, cat-eye or narrow."""
    style = rng.integers(5)
    w, h = rng.uniform(15, 21), rng.uniform(11, 18)
    if style == 0:
        w = h = rng.uniform(12, 18)
    if style == 4:
        h = rng.uniform(8.5, 11)
    drop, lift = (rng.uniform(3, 9) if style == 2 else 0), (rng.uniform(2, 6) if style == 3 else 0)
    y = 65 + rng.uniform(-2, 4)
    shapes = []
    for sign, cx in ((-1, EYES[0][0]), (1, EYES[1][0])):
        box = [
            (-w, -h),
            (0, -h - 1),
            (w, -h - lift),
            (w + 1, 0),
            (w * (0.75 if style == 2 else 0.95), h + drop * 0.7),
            (0, h + drop),
            (-w * 0.8, h),
            (-w - 1, 0),
        ]
        points = [(cx + sign * x, y + dy) for x, dy in box]
        shapes.append(curve(points, 8 if style in (0, 2) else 4))
    return shapes


def spectacles(image: Image, rng: Rng, opacity: float, donor: Image) -> tuple[Image, Alpha]:
    """Drawn spectacles whose lenses hide `opacity` (0 clear … 1 opaque) of the eyes; returns the lens area."""
    shapes = lens_outline(rng)
    area = np.maximum(polygon(shapes[0]), polygon(shapes[1]))
    y = np.mgrid[:SIZE, :SIZE][0].astype(np.float32)
    out = image
    if opacity > 0:
        tint = np.full(3, rng.uniform(5, 45)) + rng.uniform(0, 25, 3) if rng.random() < 0.6 else any_colour(rng)
        lens = np.empty((SIZE, SIZE, 3), np.float32)
        lens[:] = tint
        if rng.random() < 0.55:
            lens += (rng.uniform(0.3, 3) * (y - 64) * rng.choice([-1, 1]))[:, :, None]
        if rng.random() < 0.4:  # mirrored: what stands before the face shows on the lens
            scene = cv2.GaussianBlur(cv2.resize(donor[20:140, ::-1], (SIZE, SIZE)), (0, 0), 2).astype(np.float32)
            share = rng.uniform(0.1, 0.6)
            lens = lens * (1 - share) + scene * share
        # Real tint multiplies; a mirror adds. Mixing both spans what is sold.
        graded = np.clip(opacity + rng.uniform(-0.1, 0.1) * (y - 64) / 12, 0, 1) * area
        through = 1 - area[:, :, None] * min(1.0, opacity * 1.5) * 0.65 * (1 - np.clip(tint, 60, 255) / 255)
        out = blend((out * through).astype(np.uint8), lens, graded.astype(np.float32))
    if opacity < 0.3 and rng.random() < 0.2:  # a clear lens under a bright sky
        out = blend(out, np.full(3, rng.uniform(180, 255)), (area * rng.uniform(0.05, 0.3)).astype(np.float32))
    if rng.random() < 0.4:  # glare
        gx, gy = rng.uniform(40, 120), rng.uniform(54, 74)
        streak = polygon(
            [(gx, gy - 14), (gx + rng.uniform(3, 12), gy - 14), (gx - 6, gy + 14), (gx - rng.uniform(8, 18), gy + 14)],
            1.5,
        )
        out = blend(out, np.full(3, 255.0), (streak * area * rng.uniform(0.15, 0.75)).astype(np.float32))
    if rng.random() < 0.9:
        frame = (any_colour(rng) if rng.random() < 0.5 else np.full(3, rng.uniform(5, 50))).tolist()
        thick = int(rng.integers(1, 7))
        out = out.copy()
        for shape in shapes:
            cv2.polylines(out, [np.round(np.array(shape) * 16).astype(np.int32)], True, frame, thick, cv2.LINE_AA, 4)
        cv2.line(out, (72, 62), (88, 62), frame, max(1, thick - 1), cv2.LINE_AA)
        for end, ear in ((37, 16), (123, 144)):
            cv2.line(out, (end, 62), (ear, int(60 + rng.uniform(-5, 6))), frame, max(1, thick - 2), cv2.LINE_AA)
    return out, area


def _paste(cutout: Image, centre: tuple[float, float], length: float, angle: float) -> tuple[Image, Alpha]:
    """A BGRA cut-out, its longer side `length` px, turned by `angle` degrees about `centre`: paint and alpha."""
    h, w = cutout.shape[:2]
    scale = length / max(h, w)
    if scale < 0.6:
        cutout = cv2.resize(cutout, None, fx=scale * 1.3, fy=scale * 1.3, interpolation=cv2.INTER_AREA)
        h, w = cutout.shape[:2]
        scale = length / max(h, w)
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), angle, scale)
    turn[:, 2] += np.array(centre) - (w / 2, h / 2)
    alpha = cutout[:, :, 3].astype(np.float32) / 255
    flat = np.dstack([cutout[:, :, :3].astype(np.float32) * alpha[:, :, None], alpha])
    warped = cv2.warpAffine(flat, turn, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    a = np.clip(warped[:, :, 3], 0, 1)
    return (warped[:, :, :3] / np.maximum(a, 1e-3)[:, :, None]), a


def _skin(image: Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of the cheeks' and forehead's colour in LAB."""
    patches = np.concatenate(
        [image[86:100, 42:60].reshape(-1, 3), image[86:100, 100:118].reshape(-1, 3), image[34:46, 66:94].reshape(-1, 3)]
    )
    lab = cv2.cvtColor(patches[None].astype(np.uint8), cv2.COLOR_BGR2LAB)[0].astype(np.float32)
    return np.median(lab, 0), lab.std(0)


def hand(image: Image, rng: Rng, cutout: Image, centre: tuple[float, float]) -> tuple[Image, Alpha]:
    """A real hand in the colour of the face's own skin, at `centre`."""
    if rng.random() < 0.5:
        cutout = cutout[:, ::-1]
    reach, length, h = cutout, rng.uniform(60, 135), cutout.shape[0]
    kind = rng.random()
    if kind < 0.25:  # only the fingers reach into the picture
        reach, length = cutout[: int(h * rng.uniform(0.3, 0.6))], rng.uniform(30, 75)
    elif kind < 0.4:  # a fist or palm
        reach, length = cutout[int(h * rng.uniform(0.2, 0.45)) :], rng.uniform(45, 100)
    paint, alpha = _paste(np.ascontiguousarray(reach), centre, length, rng.uniform(-150, 150))
    solid = alpha > 0.8
    if solid.sum() > 40:
        lab = cv2.cvtColor(np.clip(paint, 0, 255).astype(np.uint8), cv2.COLOR_BGR2LAB).astype(np.float32)
        median, _ = _skin(image)
        own = lab[solid].mean(0)
        shift = median + rng.normal(0, (14, 4, 4)) - own
        lab = (lab - own) * np.array([rng.uniform(0.6, 1.3), 1, 1]) + own + shift
        paint = cv2.cvtColor(np.clip(lab, 0, 255).astype(np.uint8), cv2.COLOR_LAB2BGR).astype(np.float32)
    out = cast_shadow(image, alpha, rng)
    return blend(out, cv2.GaussianBlur(paint, (0, 0), rng.uniform(0.3, 1.0)), alpha), alpha


def cutout(
    image: Image, rng: Rng, piece: Image, *, centre: tuple[float, float], length: float, angle: float
) -> tuple[Image, Alpha]:
    """A scarf, object, or pair of glasses pasted as it is, in any light."""
    if rng.random() < 0.5:
        piece = np.ascontiguousarray(piece[:, ::-1])
    paint, alpha = _paste(piece, centre, length, angle)
    return blend(cast_shadow(image, alpha, rng), paint * rng.uniform(0.5, 1.15), alpha), alpha


def held_object(image: Image, rng: Rng, donor: Image, centre: tuple[float, float]) -> tuple[Image, Alpha]:
    """A drawn phone, sheet of paper, cup, microphone or shapeless thing at `centre`."""
    cx, cy = centre
    kind = rng.integers(6)
    angle = rng.normal(0, 0.35) if kind != 3 else rng.uniform(-1.2, 1.2)
    c, s = np.cos(angle), np.sin(angle)

    def at(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(cx + c * x - s * y, cy + s * x + c * y) for x, y in points]

    paint = fabric(rng, donor)
    if kind in (0, 1):  # phone
        w, h = rng.uniform(17, 34), rng.uniform(34, 62)
        if rng.random() < 0.25:
            w, h = h, w
        alpha = polygon(
            curve([(x, y) for x, y in at([(-w, -h), (w, -h), (w, h), (-w, h)])], 4)
            if rng.random() < 0.3
            else at([(-w, -h), (w, -h), (w, h), (-w, h)])
        )
        if rng.random() < 0.7:
            paint = np.zeros((SIZE, SIZE, 3), np.float32) + (any_colour(rng) * rng.uniform(0.2, 1)).astype(np.float32)
            paint += np.linspace(-15, 15, SIZE, dtype=np.float32)[:, None, None] * rng.choice([-1, 1])
        for k in range(int(rng.integers(0, 4))):
            spot = at([(-w * 0.6 + (k % 2) * 9, -h * 0.75 + (k // 2) * 9)])[0]
            cv2.circle(paint, (int(spot[0]), int(spot[1])), int(rng.integers(2, 5)), (15, 15, 15), -1, cv2.LINE_AA)
    elif kind == 2:  # cup
        w, h, taper = rng.uniform(16, 28), rng.uniform(18, 34), rng.uniform(0.65, 1)
        alpha = polygon(at([(-w, -h), (w, -h), (w * taper, h), (-w * taper, h)]))
        paint -= (((np.mgrid[:SIZE, :SIZE][1] - cx) / 22.0) ** 2 * 25)[:, :, None].astype(np.float32)
    elif kind == 3:  # microphone
        r = rng.uniform(9, 19)
        ball = [(r * np.cos(t), r * np.sin(t) * 1.1) for t in np.linspace(0, 2 * np.pi, 24)]
        alpha = np.maximum(
            polygon(at(ball)), polygon(at([(-r * 0.6, r * 0.7), (r * 0.6, r * 0.7), (r * 0.4, 110), (-r * 0.4, 110)]))
        )
        paint = (
            np.zeros((SIZE, SIZE, 3), np.float32)
            + rng.uniform(10, 130)
            + rng.normal(0, rng.uniform(3, 25), (SIZE, SIZE, 1)).astype(np.float32)
        )
    elif kind == 4:  # paper
        w, h = rng.uniform(25, 70), rng.uniform(20, 50)
        alpha = polygon(at([(-w, -h), (w, -h + rng.uniform(-5, 5)), (w, h), (-w + rng.uniform(-5, 5), h)]))
        if rng.random() < 0.6:
            paint = np.full((SIZE, SIZE, 3), rng.uniform(190, 250), np.float32)
            for row in range(0, SIZE, int(rng.integers(5, 14))):
                cv2.line(paint, (0, row), (SIZE, row + int(60 * s)), (rng.uniform(40, 160),) * 3, 1, cv2.LINE_AA)
    else:
        n, r = int(rng.integers(4, 9)), rng.uniform(18, 45)
        alpha = polygon(
            curve(
                [
                    (cx + r * rng.uniform(0.5, 1.2) * np.cos(t), cy + r * rng.uniform(0.5, 1.2) * np.sin(t))
                    for t in np.linspace(0, 2 * np.pi, n, endpoint=False)
                ]
            )
        )
    return blend(cast_shadow(image, alpha, rng), paint, alpha), alpha


def scarf(image: Image, rng: Rng, donor: Image, top: float) -> tuple[Image, Alpha]:
    """Cloth drawn over everything below the line y ≈ `top`."""
    tilt, sag = rng.normal(0, 6), rng.uniform(-8, 8)
    edge = [
        (float(x), top + tilt * (x - 80) / 80 + sag * (((x - 80) / 60) ** 2 - 0.3) + rng.normal(0, 1.2))
        for x in range(-10, 171, 12)
    ]
    alpha = polygon([*edge, (175, 175), (-15, 175)], rng.uniform(0.6, 1.6))
    return blend(cast_shadow(image, alpha, rng), fabric(rng, donor), alpha), alpha


def headwear(image: Image, rng: Rng, donor: Image) -> Image:
    """A headscarf, hat or fringe that leaves eyebrows to chin free."""
    paint = fabric(rng, donor)
    if rng.random() < 0.5:
        face = polygon(
            curve(
                [
                    (80, rng.uniform(28, 44)),
                    (124, 42),
                    (132, 84),
                    (118, 126),
                    (80, rng.uniform(144, 154)),
                    (42, 126),
                    (28, 84),
                    (36, 42),
                ]
            ),
            1.2,
        )
        return blend(image, paint, (1 - face).astype(np.float32))
    brim = rng.uniform(22, 46)
    edge = [(float(x), brim + rng.normal(0, 1.5) + 5 * ((x - 80) / 80) ** 2) for x in range(-10, 171, 14)]
    return blend(
        cast_shadow(image, polygon([*edge, (175, -10), (-15, -10)]), rng),
        paint,
        polygon([*edge, (175, -10), (-15, -10)]),
    )


def _hair_colour(rng: Rng) -> NDArray[np.float64]:
    tones = (
        (20, 20, 22),
        (35, 45, 60),
        (70, 95, 130),
        (60, 90, 150),
        (130, 130, 130),
        (190, 195, 200),
        (235, 235, 235),
    )
    return np.clip(np.array(tones[int(rng.integers(len(tones)))]) + rng.normal(0, 10, 3), 5, 250)


def beard(image: Image, rng: Rng) -> Image:
    """A beard, moustache or both, from stubble to full, in any hair colour; the lips stay free."""
    cheek, chin = rng.uniform(84, 106), rng.uniform(140, 166)
    jaw = [(30, 78), (42, cheek), (60, cheek + 8), (66, 99), (94, 99), (100, cheek + 8), (118, cheek), (130, 78)]
    area = polygon(curve([*jaw, (128, 118), (108, chin - 8), (80, chin), (52, chin - 8), (32, 118)], 4), 2.5)
    kind = rng.random()
    if kind < 0.2:  # moustache alone
        area *= polygon([(50, 95), (110, 95), (114, 109), (46, 109)], 1.5)
    elif kind < 0.4:  # goatee
        area *= polygon(curve([(56, 96), (104, 96), (110, 120), (98, 170), (62, 170), (50, 120)], 4), 2)
    lips = np.zeros((SIZE, SIZE), np.float32)
    cv2.ellipse(lips, (80, 113), (int(rng.integers(12, 20)), int(rng.integers(3, 8))), 0, 0, 360, 1, -1)
    area *= 1 - cv2.GaussianBlur(lips, (0, 0), 1.2)
    colour = _hair_colour(rng)
    hairs = np.zeros((SIZE, SIZE, 3), np.float32) + (colour * rng.uniform(0.5, 1)).astype(np.float32)
    length = rng.uniform(2, 14)
    for x, y in zip(rng.uniform(25, 135, 450), rng.uniform(76, 166, 450), strict=True):
        end = (int(x + rng.normal(0.04 * (x - 80), 1.5)), int(y + length * rng.uniform(0.5, 1.5)))
        cv2.line(hairs, (int(x), int(y)), end, (colour * rng.uniform(0.5, 1.35)).clip(0, 255).tolist(), 1, cv2.LINE_AA)
    ragged = np.clip(area * rng.uniform(0.6, 1.4) + rng.normal(0, 0.12, (SIZE, SIZE)) * (area > 0.05), 0, 1)
    return blend(image, hairs, (ragged * rng.uniform(0.3, 1)).astype(np.float32))


def strands(image: Image, rng: Rng) -> Image:
    """Loose hair beside and over the cheeks, and a fringe down to the eyebrows."""
    colour, out = _hair_colour(rng), image.copy()
    for side in (-1, 1) if rng.random() < 0.5 else (int(rng.choice([-1, 1])),):
        inner = rng.uniform(26, 48)
        for _ in range(int(rng.integers(15, 90))):
            x = 80 + side * (inner + abs(rng.normal(0, 14)))
            top = rng.uniform(0, 40)
            bend = rng.normal(0, 5, 3) + side * np.array([0, 6, 0])
            points = np.array(
                [(x - side * rng.uniform(0, 30), top), (x + bend[0], 60), (x + bend[1], 105), (x + bend[2], 165)]
            )
            tone = (colour * rng.uniform(0.6, 1.3)).clip(0, 255).tolist()
            cv2.polylines(out, [np.round(points).astype(np.int32)], False, tone, int(rng.integers(1, 3)), cv2.LINE_AA)
    if rng.random() < 0.4:
        for x in rng.uniform(25, 135, 60):
            tone = (colour * rng.uniform(0.6, 1.3)).clip(0, 255).tolist()
            cv2.line(out, (int(x), 0), (int(x + rng.normal(0, 5)), int(rng.uniform(30, 54))), tone, 2, cv2.LINE_AA)
    return out


def watermark(image: Image, rng: Rng) -> Image:
    """A picture agency's half-transparent lettering."""
    text = "".join(chr(int(c)) for c in rng.integers(97, 123, int(rng.integers(4, 10))))
    letters = np.zeros((SIZE, SIZE), np.uint8)
    place = (int(rng.integers(-10, 50)), int(rng.integers(40, 150)))
    cv2.putText(
        letters, text, place, cv2.FONT_HERSHEY_SIMPLEX, rng.uniform(0.5, 1.2), 255, int(rng.integers(1, 4)), cv2.LINE_AA
    )
    turn = cv2.getRotationMatrix2D((80, 80), rng.uniform(-35, 35), 1)
    alpha = cv2.warpAffine(letters, turn, (SIZE, SIZE)) / 255 * rng.uniform(0.15, 0.6)
    return blend(image, np.full(3, float(rng.choice([40, 128, 230, 255]))), alpha)


def cannula(image: Image, rng: Rng) -> Image:
    """A clear nasal tube across both cheeks."""
    out, colour = image.copy(), (np.array([225.0, 230, 225]) * rng.uniform(0.7, 1.1)).clip(0, 255).tolist()
    y = 99 + rng.uniform(-2, 3)
    line = [(74, y - 3), (86, y - 3), (108, y + 3), (138, y - rng.uniform(10, 30))]
    for side in (1, -1):
        points = np.array([(80 + side * (x - 80), py) for x, py in line], np.float32)
        cv2.polylines(
            out, [np.round(points * 16).astype(np.int32)], False, colour, int(rng.integers(1, 3)), cv2.LINE_AA, 4
        )
    return out


def visor(image: Image, rng: Rng) -> Image:
    """A transparent face shield: a faint veil with reflections, its band across the forehead."""
    veil = polygon([(80 - rng.uniform(45, 70), 24), (80 + rng.uniform(45, 70), 24), (135, 158), (25, 158)], 1.2)
    out = blend(image, np.full(3, rng.uniform(170, 255)), (veil * rng.uniform(0.03, 0.18)).astype(np.float32))
    for _ in range(int(rng.integers(1, 4))):
        x = rng.uniform(20, 140)
        streak = polygon([(x, 28), (x + rng.uniform(2, 9), 28), (x - rng.uniform(-12, 12), 158), (x - 4, 158)], 1.5)
        out = blend(out, np.full(3, 255.0), (streak * rng.uniform(0.1, 0.45)).astype(np.float32))
    band = polygon([(0, rng.uniform(14, 24)), (160, rng.uniform(14, 24)), (160, 34), (0, 34)])
    return blend(out, any_colour(rng), band) if rng.random() < 0.5 else out


def look(image: Image, rng: Rng, width: int) -> Image:
    """What cameras, light and files do to the picture: colour, light, blur, size, noise, JPEG."""
    x: NDArray[Any] = image.astype(np.float32)
    if rng.random() < 0.25:  # side light or a shadow across the face
        angle = rng.uniform(0, 2 * np.pi)
        gy, gx = np.mgrid[: x.shape[0], : x.shape[1]].astype(np.float32) / x.shape[0] - 0.5
        ramp = 1 / (
            1 + np.exp(-(gx * np.cos(angle) + gy * np.sin(angle) + rng.uniform(-0.2, 0.2)) * rng.uniform(3, 25))
        )
        x *= (rng.uniform(0.25, 0.85) + (1 - rng.uniform(0.25, 0.85)) * ramp)[:, :, None]
    if rng.random() < 0.7:
        x = 255 * (np.clip(x, 0, 255) / 255) ** np.exp(rng.normal(-0.05, 0.28))
        x = (x - 128) * np.exp(rng.normal(0, 0.18)) + 128 + rng.normal(0, 15)
    if rng.random() < 0.1:
        x *= rng.uniform(0.3, 0.65)
    if rng.random() < 0.4:
        x *= np.exp(rng.normal(0, 0.12, 3))
    x = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.08:
        x = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    elif rng.random() < 0.25:
        hsv = cv2.cvtColor(x, cv2.COLOR_BGR2HSV).astype(np.float32)
        hsv[:, :, 1] *= rng.uniform(0.4, 1.5)
        x = cv2.cvtColor(np.clip(hsv, 0, 255).astype(np.uint8), cv2.COLOR_HSV2BGR)
    kind = rng.random()
    if kind < 0.15:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.8))
    elif kind < 0.22:
        n = int(rng.integers(3, 8))
        kernel = np.zeros((n, n), np.float32)
        cv2.line(kernel, (0, int(rng.integers(n))), (n - 1, int(rng.integers(n))), 1)
        x = cv2.filter2D(x, -1, kernel / kernel.sum())
    elif kind < 0.34:
        small = int(width * rng.uniform(0.35, 0.9))
        x = cv2.resize(
            cv2.resize(x, (small, small), interpolation=cv2.INTER_AREA), (width, width), interpolation=cv2.INTER_LINEAR
        )
    if rng.random() < 0.25:
        x = np.clip(x + rng.normal(0, rng.uniform(1, 10), x.shape), 0, 255).astype(np.uint8)
    if rng.random() < 0.35:
        file = cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 92))])[1]
        x = np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR))
    return x
