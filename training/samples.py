"""Composes the samples: real crops, things drawn or pasted onto them, distorted faces, with labels."""

from __future__ import annotations

import csv
import logging
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import damage
import numpy as np
import overlays
import teachers
from damage import UNKNOWN
from labels import DAMAGED, INPUT, LEFT, LIKENESS, OUTPUTS, PROBABILITIES, QUANTITIES, ROLL, STRETCH, TOP, YAW
from numpy.typing import NDArray
from overlays import Image

Rng = np.random.Generator

# free: licences that allow any use; no-nc: also sources that state no terms; all: also those for research only.
_FREE = ("chandrikadeb7", "SlinkoIgor", "muxspace", "marait123")
RESEARCH_ONLY = ("utk", "celeba", "lfw", "interfacegan")
SOURCES = ("free", "no-nc", "all")
FREE_CUTOUTS = ("hand",)

log = logging.getLogger(__name__)


@dataclass
class Face:
    """A crop, what it is called in the figures, and what the teachers say of it.

    Attributes:
        pose: yaw, pitch, roll in degrees; None where something hides the face.
        mesh: 468 points in the crop's pixels, None as the pose.
        doubtful: the teachers do not agree that the eyes are open.
        embedding: the recogniser's, once it was asked.
    """

    image: Image
    group: str
    attributes: frozenset[str]
    pose: NDArray[np.float64] | None = None
    mesh: NDArray[np.float64] | None = None
    doubtful: bool = False
    embedding: NDArray[np.float32] | None = None


@dataclass
class Pictures:
    """The crops of one split by label, and the cut-outs by kind that may be pasted onto them."""

    crops: dict[str, list[Face]] = field(default_factory=dict)
    cutouts: dict[str, list[Image]] = field(default_factory=dict)

    def part(self, number: int, count: int) -> Pictures:
        """Every `count`-th crop of each label that has so many, from `number` on, and all cut-outs."""
        enough = {key: faces for key, faces in self.crops.items() if len(faces) >= count}
        return Pictures({key: faces[number::count] for key, faces in enough.items()}, self.cutouts)


def _read(path: Path, flag: int = cv2.IMREAD_COLOR) -> Image:
    picture = cv2.imread(str(path), flag)
    if picture is None:
        raise FileNotFoundError(path)
    return picture


def is_allowed(source: str, sources: str) -> bool:
    """Whether crops of `source` may be learned from."""
    source = source.removesuffix("+overlay")
    return sources == "all" or (source in _FREE if sources == "free" else source not in RESEARCH_ONLY)


def load(data: Path, use: str, sources: str) -> Pictures:
    """Read one split of the `sources` named in SOURCES. A fifth of the cut-outs serves validation alone."""
    pictures = Pictures()
    with (Path(__file__).parent / "data.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["use"] != use or not is_allowed(row["source"], sources):
                continue
            folder, attributes = row["file"].split("/")[0], frozenset(filter(None, row["attributes"].split(";")))
            key = row["label"] + ("+overlay" if row["source"].endswith("+overlay") else "")
            if folder == "covering_more":
                key += "+more"
            face = Face(_read(data / row["file"]), " ".join([key, *sorted(attributes)]), attributes)
            pictures.crops.setdefault(key, []).append(face)
    with (data / "occluders" / "occluders.csv").open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            kind = row["kind"].split(":")[0]
            if (number % 5 == 0) != (use == "val") or (sources == "free" and kind not in FREE_CUTOUTS):
                continue
            # Furniture, cars and the like teach nothing about faces, but are opaque things of odd outline.
            pictures.cutouts.setdefault(kind, []).append(_read(data / "occluders" / row["file"], cv2.IMREAD_UNCHANGED))
    return pictures


# Eyes of ordinary clean faces count as open, unless both eye networks doubt it, or one does very much. Of the crops in
# `eyes/` labelled shut the wider eye opens by less than NARROW in 80 %, by less than SHUT in half; of 200 ordinary
# clean crops in 1 % and none.
NARROW, SHUT, CLOSED = 0.15, 0.11, 0.3
# Labels of crops that nothing hides, so that the teachers can be asked.
BARE = ("none", "none+more", "none+overlay", "open", "shut", "half")


_teachers: tuple[teachers.Mesh, teachers.EyeState]


def _load_teachers(folder: Path) -> None:
    global _teachers  # noqa: PLW0603 - each worker's own
    _teachers = teachers.Mesh(folder), teachers.EyeState(folder)


def _ask(image: Image) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    mesh = _teachers[0].points(image)
    mirror = _teachers[0].points(np.ascontiguousarray(image[:, ::-1]))
    opening = _teachers[1].opening(image, mesh)
    doubtful = opening < NARROW and (opening < SHUT or _teachers[1].open(image, mesh) < CLOSED)
    return mesh, mirror, doubtful


def ask_teachers(pictures: Pictures, folder: Path, workers: int) -> None:
    """Add the mesh, the pose and the eyes' state to every bare face.

    The pose is the mean of the crop's and its mirror image's. Zero pitch is the median of all: the mesh's own mean
    face looks down a little.
    """
    faces = [face for key in BARE for face in pictures.crops.get(key, [])]
    mirrored = []
    # In processes of their own: a process that has run onnxruntime itself cannot fork workers that do.
    with multiprocessing.get_context("fork").Pool(workers, _load_teachers, (folder,)) as pool:
        for face, (mesh, mirror, doubtful) in zip(faces, pool.imap(_ask, [f.image for f in faces], 50), strict=True):
            face.mesh, face.doubtful = mesh, doubtful
            mirrored.append(mirror)
    canonical = teachers.canonical_face([face.mesh for face in faces[:: max(1, len(faces) // 400)]])
    for face, mirror in zip(faces, mirrored, strict=True):
        seen = [teachers.angles(teachers.turn_between(canonical, mesh)) for mesh in (face.mesh, mirror)]
        face.pose = (seen[0] + seen[1] * (-1, 1, -1)) / 2
    middle = np.median([face.pose[1] for face in faces])
    for face in faces:
        face.pose[1] -= middle


def _labels(**known: float) -> NDArray[np.float32]:
    given = {"eyes": 0.0, **known}
    hidden_eyes = "shut" not in given and (given["eyes"] != 0 or given.get("sunglasses", 0) != 0)
    values = [given.get(name, 0.0) for name in PROBABILITIES] + [np.nan] * len(QUANTITIES)
    labels = np.array([*values, 0.0], np.float32)
    labels[STRETCH] = 0
    if hidden_eyes:
        labels[PROBABILITIES.index("shut")] = UNKNOWN
    return labels


def _of_alpha(alpha: overlays.Alpha) -> NDArray[np.float32]:
    """The labels of something nameless over the face: hidden from a third on (the mouth: a fifth), free below about a
    fifteenth, unknown between."""
    eyes, nose, mouth, inner = overlays.hidden(alpha)

    def grade(share: float, low: float, high: float) -> float:
        return 1.0 if share >= high else 0.0 if share <= low else UNKNOWN

    regions = [grade(eyes, 0.08, 0.35), grade(nose, 0.08, 0.3), grade(mouth, 0.05, 0.2)]
    other = max(*regions, grade(inner, 0.08, 0.25))
    if other == 0.0 and (UNKNOWN in regions or inner > 0.08):
        other = UNKNOWN
    return _labels(other=other, eyes=regions[0], nose=regions[1], mouth=regions[2])


def _choose(rng: Rng, images: list[Any]) -> Any:
    return images[int(rng.integers(len(images)))]


def _place(rng: Rng, covering: bool) -> tuple[float, float]:
    """Where a hand or thing is held: at an eye, the nose or the mouth, or else beside the face."""
    if covering:
        spot = [*overlays.EYES, overlays.NOSE, overlays.MOUTH, overlays.MOUTH, (80, 124)][int(rng.integers(6))]
        return spot[0] + rng.normal(0, 14), spot[1] + rng.normal(0, 14)
    angle = rng.uniform(0, 2 * np.pi)
    return 80 + rng.uniform(70, 95) * np.cos(angle), 92 + rng.uniform(70, 95) * np.sin(angle)


def _nameless(
    face: Image, rng: Rng, pictures: Pictures, donor: Image, covering: bool
) -> tuple[Image, NDArray[np.float32]]:
    """A hand, scarf or thing over the face (`covering`) or beside it; tried anew until the labels say so."""
    image, labels, is_hand = face, _labels(), False
    for _ in range(8):
        spot, kind = _place(rng, covering), rng.random()
        if kind < 0.55:
            image, alpha = overlays.hand(face, rng, _choose(rng, pictures.cutouts["hand"]), spot)
            if rng.random() < 0.12:
                image, second = overlays.hand(image, rng, _choose(rng, pictures.cutouts["hand"]), _place(rng, covering))
                alpha = np.maximum(alpha, second)
        elif kind < 0.65:
            top = rng.uniform(74, 106) if covering else rng.uniform(134, 150)
            image, alpha = overlays.scarf(face, rng, donor, top)
        elif kind < 0.8 and "scarf" in pictures.cutouts:
            piece = _choose(rng, pictures.cutouts["scarf" if rng.random() < 0.5 else "object"])
            image, alpha = overlays.cutout(
                face, rng, piece, centre=spot, length=rng.uniform(60, 150), angle=rng.uniform(-180, 180)
            )
        else:
            image, alpha = overlays.held_object(face, rng, donor, spot)
        labels, is_hand = _of_alpha(alpha), kind < 0.55
        labels[PROBABILITIES.index("hand")] = float(is_hand and covering)
        if labels[2] == float(covering):
            return image, labels
    return image, labels


def _glasses(face: Image, rng: Rng, pictures: Pictures, donor: Image, dark: bool) -> tuple[Image, NDArray[np.float32]]:
    """Spectacles or sunglasses, drawn or pasted."""
    kind = "sunglasses" if dark else "eyeglasses"
    if kind in pictures.cutouts and rng.random() < 0.5:
        # The lens's own opacity is unknown for see-through cut-outs; over the pupils it must be dense to be a covering.
        image, alpha = overlays.cutout(
            face,
            rng,
            _choose(rng, pictures.cutouts[kind]),
            centre=(80 + rng.normal(0, 2), 67 + rng.normal(0, 3)),
            length=rng.uniform(92, 122),
            angle=rng.normal(0, 3),
        )
        if dark:
            eyes = min(float(alpha[area].mean()) for area in overlays.EYE_AREAS)
            return image, _labels(sunglasses=1, eyes=1) if eyes > 0.7 else _labels(sunglasses=UNKNOWN, eyes=UNKNOWN)
        return image, _labels(spectacles=1)
    opacity = rng.uniform(0.7, 1.0) if dark else rng.choice([0.0, 0.0, rng.uniform(0.05, 0.27)])
    return overlays.spectacles(face, rng, float(opacity), donor)[0], _labels(
        sunglasses=float(dark), eyes=float(dark), spectacles=float(not dark)
    )


def _clean_variant(face: Image, rng: Rng, pictures: Pictures, donor: Image) -> tuple[Image, NDArray[np.float32]]:
    """Something worn or held that is no covering."""
    kind = rng.random()
    if kind < 0.26:
        return _glasses(face, rng, pictures, donor, dark=False)
    if kind < 0.36:
        return overlays.mask(face, rng, donor, "chin")[0], _labels()
    if kind < 0.6:
        return _nameless(face, rng, pictures, donor, covering=False)
    if kind < 0.7:
        return overlays.headwear(face, rng, donor), _labels()
    if kind < 0.97:
        paint = (overlays.beard, overlays.beard, overlays.strands, overlays.visor, overlays.watermark)[
            int(rng.integers(5))
        ]
        return paint(face, rng), _labels()
    return overlays.cannula(face, rng), _labels()


RECIPE = {
    "none": 0.14, "none+more": 0.15, "clean variant": 0.13, "none+overlay": 0.02, "mask": 0.06, "mask+overlay": 0.01,
    "drawn mask": 0.05, "sunglasses": 0.035, "sunglasses+more": 0.06, "sunglasses+overlay": 0.01,
    "drawn sunglasses": 0.05, "other": 0.01, "other+more": 0.075, "other+overlay": 0.02, "nameless": 0.12,
    "mask and sunglasses": 0.005, "shut": 0.035, "drawn shut": 0.03, "drawn half": 0.015, "half": 0.01, "open": 0.03,
    "distorted": 0.24,
}  # fmt: skip
# What the last round learns from: distorted faces, and real crops beside them, the old and the bearded among them.
RECIPE_OF_DISTORTED = {"distorted": 0.6, "none": 0.15, "none+more": 0.2, "clean variant": 0.05}
KNOWN = {
    "mask": _labels(mask=1, nose=1, mouth=1, other=UNKNOWN, eyes=UNKNOWN, hand=UNKNOWN, spectacles=UNKNOWN),
    "sunglasses": _labels(sunglasses=1, eyes=1, hand=UNKNOWN, spectacles=UNKNOWN),
    "other": _labels(other=1, eyes=UNKNOWN, nose=UNKNOWN, mouth=UNKNOWN, hand=UNKNOWN, spectacles=UNKNOWN),
    "none": _labels(),
    "open": _labels(shut=0, sunglasses=UNKNOWN, other=UNKNOWN, hand=UNKNOWN, spectacles=UNKNOWN),
    "half": _labels(shut=0.5, sunglasses=UNKNOWN, other=UNKNOWN, hand=UNKNOWN, spectacles=UNKNOWN),
    "shut": _labels(shut=1, sunglasses=UNKNOWN, other=UNKNOWN, hand=UNKNOWN, spectacles=UNKNOWN),
}
# Only the chin, cheek or forehead is touched, or by something thin: rather free than hidden.
MILD = 0.3


def known_of(key: str, face: Face) -> NDArray[np.float32]:
    """The labels of a real crop as it is."""
    label = key.split("+", maxsplit=1)[0]
    labels = KNOWN[label].copy()
    _, sunglasses, other, _, _, _, shut, hand, spectacles = range(len(PROBABILITIES))
    if label == "none" and face.doubtful:
        labels[shut] = UNKNOWN
    if "mild" in face.attributes:
        labels[other] = MILD
    if face.attributes & {"hand", "hand_too"} and label != "none":
        labels[hand] = 1
    elif label == "other" and "+more" in key:
        labels[hand] = 0
    if face.attributes & {"hand_too", "mic_too"} and label == "sunglasses":
        labels[other] = UNKNOWN
    if "sunglasses_too" in face.attributes:
        labels[[sunglasses, 3]] = 1
    if "eyeglasses" in face.attributes:
        labels[spectacles] = 1
    if face.pose is not None:
        labels[YAW : ROLL + 1] = face.pose
    return labels


# The detector looks at a picture with this longest side, in pixels: a selfie is found in the service's first look, too.
DETECTED = 256


def _in_a_scene(rng: Rng, photo: Image, margin: int, donor: Image) -> tuple[Image, int]:
    """`photo` with `margin` pixels of something around it, its edges sometimes cut; and where its corner lies.

    Without this a stretched crop could be told by where its picture ends.
    """
    height, width = photo.shape[:2]
    most = np.array([0.15 * height, 0.12 * height, 0.16 * width, 0.16 * width])
    cuts = (most * rng.uniform(0, 1, 4) * (rng.random(4) < 0.4)).astype(int)
    inside = photo[cuts[0] : height - cuts[1], cuts[2] : width - cuts[3]]
    around = [margin + int(cut) for cut in cuts]
    scene = cv2.copyMakeBorder(inside, *around, cv2.BORDER_REPLICATE)
    if rng.random() < 0.7:
        paint = cv2.resize(overlays.fabric(rng, donor), (scene.shape[1], scene.shape[0]))
        paint[around[0] : -around[1], around[2] : -around[3]] = inside
        scene = np.clip(paint, 0, 255).astype(np.uint8)
    return scene, margin


def _pulled(points: NDArray[np.float64], centre: tuple[float, float], radius: float, power: float) -> None:
    """Move float64 [..., 2] source points within `radius` pixels of `centre`: what is there grows with power > 0."""
    apart = points - centre
    share = np.hypot(apart[..., 0], apart[..., 1]) / radius
    scale = np.where(share < 1, np.maximum(share, 1e-3) ** power, 1.0)
    points[:] = centre + apart * scale[..., None]


def warped(rng: Rng, crop: Image) -> Image:
    """A 160-pixel crop with parts of the face made larger, smaller or twisted, as filters of apps do it."""
    y, x = np.mgrid[0 : overlays.SIZE, 0 : overlays.SIZE].astype(np.float64)
    source = np.stack([x, y], -1)
    kind = rng.random()
    if kind < 0.5:
        spots = [overlays.NOSE, overlays.NOSE, overlays.MOUTH, (80, 95), (80, 130)]
        centre = np.array(spots[int(rng.integers(len(spots)))]) + rng.normal(0, 5, 2)
        power = rng.uniform(0.1, 0.7) if rng.random() < 0.6 else -rng.uniform(0.08, 0.4)
        _pulled(source, (centre[0], centre[1]), 44 * rng.uniform(0.9, 2.4), power)
    elif kind < 0.7:
        power, radius = rng.uniform(-0.3, 0.7), 44 * rng.uniform(0.35, 0.6)
        for spot in overlays.EYES:
            _pulled(source, spot, radius, power)
    elif kind < 0.8:
        apart = source - (80, 92)
        far = np.hypot(apart[..., 0], apart[..., 1]) / (44 * rng.uniform(1.2, 2.2))
        turn = rng.uniform(-0.8, 0.8) * np.clip(1 - far, 0, 1) ** 2
        twist = np.stack([np.cos(turn), -np.sin(turn), np.sin(turn), np.cos(turn)], -1).reshape(*turn.shape, 2, 2)
        source = (twist @ apart[..., None])[..., 0] + (80, 92)
    else:
        sigma, strength = rng.uniform(10, 30), rng.uniform(2, 7)
        shift = cv2.GaussianBlur(rng.normal(size=source.shape), (0, 0), sigma)
        source += strength * shift / shift.std()
    return cv2.remap(crop, source.astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _distortion(rng: Rng) -> tuple[float, list[str]]:
    """By how much a photo is stretched, and what else is done to it."""
    stretch = 1.0 if rng.random() < 0.3 else float(np.exp(rng.uniform(-1, 1) * np.log(2.2)))
    if rng.random() < 0.35:
        stretch = float(np.exp(rng.normal(0, 0.16)))
    kinds = damage.chosen(rng)
    # What nobody distorted must be known as well as what somebody did.
    return (1.0, []) if rng.random() < 0.25 else (stretch, kinds)


def distorted(
    rng: Rng, face: Face, donor: Image, detector: teachers.Detector, recogniser: teachers.Recogniser
) -> tuple[Image, NDArray[np.float32]]:
    """The face as the service cuts it out of a photo that was stretched, compressed, made noisy or blurred."""
    assert face.mesh is not None
    inter_eye = float(np.exp(rng.uniform(np.log(26), np.log(90))))
    scale = inter_eye / 44
    image, (stretch, kinds) = face.image, _distortion(rng)
    if rng.random() < 0.4:
        image = warped(rng, image)
        if rng.random() < 0.6:  # filters of apps leave the rest of a photo as it is
            stretch, kinds = 1.0, []
    across, down = scale * stretch**0.5, scale / stretch**0.5
    photo = cv2.resize(image, None, fx=across, fy=down, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    photo, corner = _in_a_scene(rng, photo, int(44 * max(across, down)), donor)
    photo, grade = damage.damaged(rng, photo, kinds, inter_eye)
    reduced = min(1.0, DETECTED / max(photo.shape))
    found = detector.landmarks(cv2.resize(photo, None, fx=reduced, fy=reduced, interpolation=cv2.INTER_AREA))
    landmarks = teachers.five_points(face.mesh) * (across, down) + corner if found is None else found / reduced
    landmarks = landmarks + rng.normal(0, 0.01 * inter_eye, (5, 2))
    matrix = teachers.similarity(landmarks, teachers.CROP_POINTS)
    zoom = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if zoom < 0.5:
        photo = cv2.resize(photo, None, fx=2 * zoom, fy=2 * zoom, interpolation=cv2.INTER_AREA)
        matrix[:, :2] /= 2 * zoom
    image = cv2.warpAffine(photo, matrix, (overlays.SIZE,) * 2, borderMode=cv2.BORDER_REPLICATE)
    labels = _labels(shut=UNKNOWN, hand=UNKNOWN, spectacles=UNKNOWN)
    labels[STRETCH], labels[DAMAGED] = np.log2(stretch), grade
    if face.embedding is None:
        straight = teachers.similarity(teachers.five_points(face.mesh), teachers.CROP_POINTS)
        plain = cv2.warpAffine(face.image, straight, (overlays.SIZE,) * 2, borderMode=cv2.BORDER_REPLICATE)
        face.embedding = recogniser.embedding(plain)
    labels[LIKENESS] = float(recogniser.embedding(image) @ face.embedding)
    if labels[LIKENESS] < 0.35:  # what nobody can recognise, nobody can label
        labels[: len(PROBABILITIES)] = UNKNOWN
    elif abs(labels[STRETCH]) < 0.3 and face.pose is not None:
        labels[YAW : ROLL + 1] = face.pose
    return image, labels


def compose(  # noqa: PLR0912 - one return for each kind of the recipe
    rng: Rng, pictures: Pictures, kind: str, pack: tuple[teachers.Detector, teachers.Recogniser]
) -> tuple[Image, NDArray[np.float32]]:
    """One 160-pixel picture of the recipe's `kind` and its labels."""
    crops = pictures.crops
    if kind in crops:
        face = _choose(rng, crops[kind])
        return face.image, known_of(kind, face)
    bare = _choose(rng, crops["none" if rng.random() < 0.6 else "none+more"])
    if kind == "distorted":
        return distorted(rng, bare, _choose(rng, crops["none"]).image, *pack)
    image, donor = bare.image, _choose(rng, crops[str(rng.choice(["none", "mask"]))]).image
    labels = known_of("none", bare)
    if kind in ("drawn shut", "drawn half"):
        assert bare.mesh is not None
        share = rng.uniform(0.88, 1.05) if kind == "drawn shut" else rng.uniform(0.1, 0.5)
        seen = labels[PROBABILITIES.index("shut")] == 0
        labels[PROBABILITIES.index("shut")] = (1.0 if kind == "drawn shut" else 0.0) if seen else UNKNOWN
        return teachers.close_eyes(image, bare.mesh, float(share)), labels
    dress = rng.random()
    if dress < 0.12 and kind != "clean variant":
        image = overlays.headwear(image, rng, _choose(rng, crops["none"]).image)
    elif dress < 0.24:
        image = (overlays.beard, overlays.strands)[int(rng.integers(2))](image, rng)
    if kind == "clean variant":
        image, drawn = _clean_variant(image, rng, pictures, donor)
    elif kind == "drawn mask":
        if rng.random() < 0.2:
            image = _glasses(image, rng, pictures, donor, dark=False)[0]
        under = rng.random() < 0.25
        image = overlays.mask(image, rng, donor, "nose" if under else "full")[0]
        drawn = _labels(mask=1, mouth=1, nose=0 if under else 1, other=UNKNOWN)
    elif kind == "drawn sunglasses":
        image, drawn = _glasses(image, rng, pictures, donor, dark=True)
    elif kind == "mask and sunglasses":
        masked = _choose(rng, crops["mask"])
        image, drawn = _glasses(masked.image, rng, pictures, donor, dark=True)
        return image, np.fmax(drawn, KNOWN["mask"])
    else:
        if rng.random() < 0.15:
            image = _glasses(image, rng, pictures, donor, dark=False)[0]
        image, drawn = _nameless(image, rng, pictures, donor, covering=True)
    shut = PROBABILITIES.index("shut")
    if drawn[shut] == 0:
        drawn[shut] = labels[shut]
    spectacles = PROBABILITIES.index("spectacles")
    drawn[spectacles] = max(drawn[spectacles], labels[spectacles])
    drawn[YAW : ROLL + 1] = labels[YAW : ROLL + 1]
    return image, drawn


def view(rng: Rng, picture: Image, labels: NDArray[np.float32], *, plain: bool) -> tuple[Image, NDArray[np.float32]]:
    """The network's 128-pixel view of a 160-pixel crop, as other detectors and cameras might have given it.

    Args:
        rng: the sample's own.
        picture: uint8 [160, 160, 3].
        labels: by OUTPUTS.
        plain: leave light, sharpness and compression as they are.
    """
    labels = labels.copy()
    if rng.random() < 0.12:  # a photo that ends close to the face
        left, right, top, bottom = (rng.uniform(0, 45, 4) * (rng.random(4) < 0.4)).astype(int)
        picture = cv2.copyMakeBorder(
            picture[top : 160 - bottom, left : 160 - right], top, bottom, left, right, cv2.BORDER_REPLICATE
        )
    angle = float(rng.normal(0, 5))
    scale = float(np.exp(np.clip(rng.normal(0, 0.065), -0.2, 0.2)))
    matrix = cv2.getRotationMatrix2D((80, 88), angle, scale)
    centre = np.array([80 - LEFT, 88 - TOP]) + rng.normal(0, (2.6, 3.2))
    matrix = matrix + np.array([[0, 0, centre[0] - 80], [0, 0, centre[1] - 88]])
    # OpenCV turns anticlockwise by positive angles; roll grows clockwise.
    labels[ROLL] -= angle
    border = cv2.BORDER_REPLICATE if rng.random() < 0.85 else cv2.BORDER_CONSTANT
    seen = cv2.warpAffine(picture, matrix, (INPUT, INPUT), flags=cv2.INTER_LINEAR, borderMode=border)
    return (seen if plain else overlays.look(seen, rng, INPUT)), labels


_shared: Pictures


_pack: Path
_recipe: dict[str, float]


def _bank_part(task: tuple[int, int, int]) -> tuple[Image, NDArray[np.float32]]:
    seed, first, count = task
    cv2.setNumThreads(1)
    pack = teachers.Detector(_pack / "det.onnx"), teachers.Recogniser(_pack / "rec.onnx")
    have = {k: v for k, v in _recipe.items() if k.split("+")[0] not in KNOWN or k in _shared.crops}
    shares = np.array(list(have.values()))
    images, labels = np.empty((count, INPUT, INPUT, 3), np.uint8), np.empty((count, len(OUTPUTS)), np.float32)
    for i in range(count):
        rng = np.random.default_rng([seed, first + i])
        kind = str(rng.choice(list(have), p=shares / shares.sum()))
        picture, known = compose(rng, _shared, kind, pack)
        images[i], labels[i] = view(rng, picture, known, plain=kind == "distorted")
    return images, labels


def bank(  # noqa: PLR0917 - what samples are made of
    pictures: Pictures, pack: Path, count: int, seed: int, workers: int, recipe: dict[str, float] = RECIPE
) -> tuple[Image, NDArray[np.float32]]:
    """`count` composed samples: uint8 [count, 128, 128, 3] BGR and float32 [count, 15] labels."""
    global _shared, _pack, _recipe
    _shared, _pack, _recipe = pictures, pack, recipe
    step = 500
    tasks = [(seed, first, min(step, count - first)) for first in range(0, count, step)]
    images, labels = np.empty((count, INPUT, INPUT, 3), np.uint8), np.empty((count, len(OUTPUTS)), np.float32)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for (_, first, n), (x, y) in zip(tasks, pool.imap(_bank_part, tasks), strict=True):
            images[first : first + n], labels[first : first + n] = x, y
            log.info("composed %d of %d", first + n, count)
    return images, labels
