"""What noise, compression, filters and too few pixels do to a photo, and whether that counts as damage."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from overlays import Image

Rng = np.random.Generator

# Strengths count as they arrive in the aligned crop, where the eyes are this many pixels apart. What `overlays.look`
# does to real crops, as cameras do it, is none: noise up to 10, JPEG from 30 on.
EYES_APART = 44
# The label of a photo that is neither plainly damaged nor plainly undamaged. The network learns nothing from it.
UNKNOWN = -1.0


def _grade(strength: float, none: float, damage: float) -> float:
    """0 up to `none`, 1 from `damage` on, which may lie below it; UNKNOWN between."""
    if damage < none:
        strength, none, damage = -strength, -none, -damage
    return 1.0 if strength >= damage else 0.0 if strength <= none else UNKNOWN


def _between(rng: Rng, low: float, high: float) -> float:
    """A strength between two limits; doubling it is as likely everywhere."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _saved(photo: Image, ending: str, flag: int, value: int) -> Image:
    return np.asarray(cv2.imdecode(cv2.imencode(ending, photo, [flag, value])[1], cv2.IMREAD_COLOR), np.uint8)


def _noise(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    if rng.random() < 0.15:
        share = _between(rng, 0.004, 0.12)
        hit = rng.random(photo.shape[:2])
        photo = np.where((hit < share)[..., None], 0, np.where((hit > 1 - share)[..., None], 255, photo))
        return photo.astype(np.uint8), _grade(share, 0.0, 0.01)
    size = photo.shape if rng.random() < 0.7 else (*photo.shape[:2], 1)
    deviation = _between(rng, 3, 60)
    noisy = np.clip(photo + rng.normal(0, deviation, size), 0, 255).astype(np.uint8)
    return noisy, _grade(deviation * min(1.0, shown), 4, 10)


def _jpeg(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    quality = int(_between(rng, 2, 70))
    return _saved(photo, ".jpg", cv2.IMWRITE_JPEG_QUALITY, quality), _grade(quality / shown, 40, 15)


def _webp(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    quality = int(_between(rng, 1, 60))
    return _saved(photo, ".webp", cv2.IMWRITE_WEBP_QUALITY, quality), _grade(quality / shown, 35, 6)


def _jpeg2000(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    thousandths = int(_between(rng, 4, 60))
    grade = _grade(thousandths / shown, 40, 16)
    return _saved(photo, ".jp2", cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, thousandths), grade


def _blur(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    # The sharpness check measures it.
    return cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.02, 0.1) * EYES_APART / shown).astype(np.uint8), 0.0


def _small(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    factor = 14 * shown / EYES_APART
    small = cv2.resize(photo, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    large = cv2.resize(small, (photo.shape[1], photo.shape[0]), interpolation=int(rng.integers(3)))
    return np.asarray(large, np.uint8), UNKNOWN


def _sharpened(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    amount = _between(rng, 0.5, 10)
    smooth = cv2.GaussianBlur(photo.astype(np.float32), (0, 0), rng.uniform(0.8, 2.5) / shown)
    return np.clip(photo + amount * (photo - smooth), 0, 255).astype(np.uint8), _grade(amount, 2, 4)


def _painted(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    reach, colour = float(rng.uniform(10, 50) / shown), float(rng.uniform(0.1, 0.7))
    filtered = (
        cv2.stylization(photo, sigma_s=reach, sigma_r=colour)
        if rng.random() < 0.5
        else cv2.edgePreservingFilter(photo, flags=int(rng.integers(1, 3)), sigma_s=reach, sigma_r=colour)
    )
    return np.asarray(filtered, np.uint8), _grade(colour, 0.0, 0.35)


def _few_colours(rng: Rng, photo: Image, _: float) -> tuple[Image, float]:
    step = _between(rng, 8, 90)
    dither = rng.uniform(-step / 2, step / 2, photo.shape) if rng.random() < 0.4 else 0.0
    fewer = np.floor((photo + dither) / step) * step + step / 2
    return np.clip(fewer, 0, 255).astype(np.uint8), _grade(step, 16, 48)


def _halftone(rng: Rng, photo: Image, shown: float) -> tuple[Image, float]:
    y, x = np.mgrid[: photo.shape[0], : photo.shape[1]].astype(np.float64)
    angle, period, share = rng.uniform(0, np.pi), rng.uniform(2.5, 8) / shown, rng.uniform(0.1, 0.9)
    across, down = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    screen = 128 + 110 * np.sin(2 * np.pi * across / period) * np.sin(2 * np.pi * down / period)
    dots = np.where(photo > screen[..., None], 255.0, 0.0)
    return np.clip((1 - share) * photo + share * dots, 0, 255).astype(np.uint8), _grade(share, 0.0, 0.25)


_KINDS: dict[str, tuple[float, Callable[[Rng, Image, float], tuple[Image, float]]]] = {
    "noise": (0.3, _noise),
    "jpeg": (0.4, _jpeg),
    "webp": (0.06, _webp),
    "jpeg2000": (0.06, _jpeg2000),
    "blur": (0.12, _blur),
    "small": (0.1, _small),
    "sharpened": (0.06, _sharpened),
    "painted": (0.08, _painted),
    "few colours": (0.06, _few_colours),
    "halftone": (0.04, _halftone),
}


def chosen(rng: Rng) -> list[str]:
    """What is done to a photo: nothing, or one or several kinds."""
    return [name for name, (share, _) in _KINDS.items() if rng.random() < share]


def damaged(rng: Rng, photo: Image, kinds: list[str], inter_eye: float) -> tuple[Image, float]:
    """The photo after `kinds`, in any order, and its label: 1 is damage, 0 is none, UNKNOWN is neither for sure.

    Args:
        rng: the sample's own.
        photo: uint8 [h, w, 3] BGR.
        kinds: as `chosen` gives them.
        inter_eye: pixels between its eyes.
    """
    grades = [0.0]
    for name in rng.permutation(kinds):
        photo, grade = _KINDS[str(name)][1](rng, photo, EYES_APART / inter_eye)
        grades.append(grade)
    return photo, 1.0 if 1.0 in grades else UNKNOWN if UNKNOWN in grades else 0.0
