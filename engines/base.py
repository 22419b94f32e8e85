"""Defines a face, the `Engine` that finds and embeds it, and what similarity means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from photos.pixels import Pixels

# In a copy of this longest side detection finds what it finds in a larger photo. The detectors look at 960 and 640
# pixels; the rest keeps the landmarks where they were: of 148 faces in 12-megapixel photos 7 % come out less similar
# than 0.995 when halved to 2000 pixels and 16 % when quartered to 1000 (saving the photo at JPEG quality 80 instead
# of 90 does it to 16 % as well).
ENOUGH_SIDE = 1600
# The longest side of a challenge's frame when faces are looked for in it: a quarter of a full search's pixels. The face
# of somebody who holds a phone is a third of the frame and more.
FRAME_SIDE = 320

Template = npt.NDArray[np.float32]


# The five landmarks of a mean frontal face in inter-eye distances, float64[5, 3]: the eyes at the left and the right of
# the picture, the nose's tip, the mouth's corners in the same order. x right, y down, z away from the camera; the
# origin lies between the eyes. x and y are the medians of 165 near-frontal photos of 30 people; z follows from
# anthropometry (the nose's tip stands about half an inter-eye distance in front of the eyes, the mouth a tenth).
MEAN_FACE = np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.6, -0.5], [-0.45, 1.01, -0.1], [0.45, 1.01, -0.1]])


# A face that leans by up to so much from a quarter turn stands in a picture that was turned; between them it is a head
# that is tilted, which the checks refuse.
QUARTER_TURN_WITHIN_DEG = 30.0


@dataclass(frozen=True)
class Face:
    """One detected face.

    Attributes:
        box: float32[4], left, top, right, bottom in pixels; may reach outside the photo.
        score: the detector's confidence; comparable within one engine only.
        landmarks: float32[5, 2], x and y in pixels, in the order of `MEAN_FACE`.
    """

    box: npt.NDArray[np.float32]
    score: float
    landmarks: npt.NDArray[np.float32]

    @property
    def eyes(self) -> npt.NDArray[np.float64]:
        """float64[2, 2]: the centres of the eyes at the left and the right of the picture, in pixels."""
        return self.landmarks[:2].astype(np.float64)

    @property
    def inter_eye(self) -> float:
        """The inter-eye distance in pixels of the picture that the face was found in."""
        left, right = self.eyes
        return float(np.hypot(*(right - left)))

    def enlarged(self, times: float | npt.NDArray[np.float64]) -> Face:
        """The same face in a copy of the picture that is `times` as large, or float64[2] as wide and as high."""
        # Pixels have their coordinates at their centres.
        box, landmarks = ((one + 0.5) * times - 0.5 for one in (self.box.reshape(2, 2), self.landmarks))
        return replace(self, box=box.ravel().astype(np.float32), landmarks=landmarks.astype(np.float32))

    @property
    def roll_deg(self) -> float:
        """The slope of the line through the eyes in degrees: 0 for a face that stands, 90 for one turned clockwise."""
        left, right = self.eyes
        return float(np.degrees(np.arctan2(right[1] - left[1], right[0] - left[0])))

    @property
    def quarter_turns(self) -> int:
        """How many counter-clockwise quarter turns of the picture make the face stand; 0 where none comes near."""
        turns = round(self.roll_deg / 90)
        return turns % 4 if abs(self.roll_deg - 90 * turns) <= QUARTER_TURN_WITHIN_DEG else 0

    def turned(self, quarter_turns: int, size: tuple[int, int]) -> Face:
        """The same face after so many counter-clockwise quarter turns of the picture of this width and height."""
        points, (width, height) = np.concatenate([self.landmarks, self.box.reshape(2, 2)]), size
        for _ in range(quarter_turns % 4):
            points = np.stack([points[:, 1], width - 1 - points[:, 0]], axis=1)
            width, height = height, width
        box = np.concatenate([points[5:].min(axis=0), points[5:].max(axis=0)])
        return replace(self, box=box.astype(np.float32), landmarks=points[:5].astype(np.float32))


@dataclass(frozen=True)
class ModelIdentity:
    """A model as the records know it.

    Attributes:
        name: what records of its templates carry; templates of different names are never compared.
        cosine_at_half: the cosine that reads as similarity 0.5.
    """

    name: str
    cosine_at_half: float


class Engine(Protocol):
    """A face model.

    Attributes:
        name: what records of its templates carry; templates of different names are never compared.
        dimension: components of a template.
        cosine_at_half: the cosine that reads as similarity 0.5.
    """

    name: str
    dimension: int
    cosine_at_half: float

    def describe(self) -> str:
        """Plain words for the operator: which model, from where."""

    def detect(self, image: Pixels) -> list[Face]:
        """Find every face in uint8[h, w, 3] BGR, the widest first. Thread-safe."""

    def detect_in_frame(self, image: Pixels) -> list[Face]:
        """Find the faces in uint8[h, w, 3] BGR that are large in it, in one small look, the widest first. Thread-safe.

        For a challenge's frames: many of them, each with a person close to the camera.
        """

    def embed(self, image: Pixels, face: Face) -> Template:
        """Embed one detected face as float32[dimension] of norm 1. Thread-safe.

        Raises:
            ValueError: the landmarks are degenerate, so that there is nothing to embed.
        """


def similarity_of(cosine: float, cosine_at_half: float) -> float:
    """Translate a cosine into the API's similarity: 1 - (1 - cosine) / (2 (1 - cosine_at_half)), at most 1."""
    return min(1.0, 1.0 - (1.0 - cosine) / (2.0 * (1.0 - cosine_at_half)))


def cosine_of(similarity: float, cosine_at_half: float) -> float:
    """Translate a similarity back into the cosine that reads as it."""
    return 1.0 - (1.0 - similarity) * 2.0 * (1.0 - cosine_at_half)


def holds_no_face(image: Pixels) -> bool:
    """Whether the picture is a speck or a strip, on which the detectors' resizing fails; no face fits either."""
    short, long = sorted(image.shape[:2])
    return bool(short < 16 or short * 32 < long)


def widest_first(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: float(face.box[0] - face.box[2]))


def normalised(raw: npt.NDArray[Any]) -> Template:
    vector = np.asarray(raw, dtype=np.float32).ravel()
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm < 1e-6:
        raise ValueError("the model returned no usable embedding")
    return vector / np.float32(norm)
