"""Counts how often a distorted second photo of an enrolled person enrols once more, by kind of distortion.

    python -m benchmarks.distorted_copies FOLDER --face-model PACK --verify-threshold 0.38

FOLDER has a sub-folder of photos a person. The first photo of each that passes the checks signs up; distorted copies of
the later ones, or of the same one with `--same`, try to sign up afterwards, each against the same gallery. All of it
goes through the service's own pipeline and gallery, in this process. Every setting is a flag: `--max-stretch 10
--min-likeness -1 --max-damage 1` shows what the check `distorted` does. Intervals are Wilson's at 95 %; copies of one
photo fare alike, so the true ones are wider.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from benchmarks.degradations import DEGRADATIONS, Eyes, eye_distance, saved
from benchmarks.evaluate_checks import read_people
from bootstrap import engine_of
from commands.evaluate.biometrics import wilson
from engines.base import cosine_of
from engines.face_attributes import FaceAttributesModel
from engines.model_slots import ModelSlots
from errors import FaceError
from gallery.decisions import Gallery
from photos import decode
from photos.pixels import Pixels
from pipeline import Pipeline, Trace
from settings import PROJECT, Settings, add_flags, load_settings
from store.sqlite import SqliteStore

_DEGRADE = {kind.name: kind.apply for kind in DEGRADATIONS}


def _widen(image: Pixels, _: Eyes, factor: float) -> Pixels:
    return np.asarray(cv2.resize(image, None, fx=factor, fy=1, interpolation=cv2.INTER_LINEAR), np.uint8)


def _heighten(image: Pixels, _: Eyes, factor: float) -> Pixels:
    return np.asarray(cv2.resize(image, None, fx=1, fy=factor, interpolation=cv2.INTER_LINEAR), np.uint8)


def _mirror(image: Pixels, _: Eyes, __: float) -> Pixels:
    return np.ascontiguousarray(image[:, ::-1])


def _pulled(image: Pixels, centres: Eyes, radius: float, power: float) -> Pixels:
    """What lies within `radius` pixels of one of the centres grows with a power above 0, and shrinks below it."""
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float64)
    source = np.stack([x, y], axis=-1)
    moved = source.copy()
    for centre in centres:
        apart = source - centre
        share = np.hypot(apart[..., 0], apart[..., 1]) / radius
        moved += apart * (np.where(share < 1, np.maximum(share, 1e-3) ** power, 1.0) - 1.0)[..., None]
    across, down = moved[..., 0].astype(np.float32), moved[..., 1].astype(np.float32)
    warped = cv2.remap(image, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped, np.uint8)


def _middle_pulled(image: Pixels, eyes: Eyes, power: float) -> Pixels:
    across = eyes[1] - eyes[0]
    nose = eyes.mean(axis=0) + 0.6 * np.array([-across[1], across[0]])
    return _pulled(image, nose[None], 1.9 * eye_distance(eyes), power)


def _eyes_pulled(image: Pixels, eyes: Eyes, power: float) -> Pixels:
    return _pulled(image, eyes, 0.6 * eye_distance(eyes), power)


def _few_colours(image: Pixels, _: Eyes, step: float) -> Pixels:
    return image // int(step) * int(step) + int(step) // 2


def _sharpened(image: Pixels, _: Eyes, amount: float) -> Pixels:
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 2)
    return np.clip(image + amount * (image - smooth), 0, 255).astype(np.uint8)


def _painted(image: Pixels, _: Eyes, colours: float) -> Pixels:
    return np.asarray(cv2.stylization(image, sigma_s=20, sigma_r=colours), np.uint8)


def _smooth_skin(image: Pixels, _: Eyes, colours: float) -> Pixels:
    return np.asarray(cv2.edgePreservingFilter(image, flags=1, sigma_s=40, sigma_r=colours), np.uint8)


def _halftone(image: Pixels, _: Eyes, period: float) -> Pixels:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float64) * 2 * np.pi / period
    dots = np.where(image > (128 + 100 * np.sin(x) * np.sin(y))[..., None], 255.0, 0.0)
    return np.clip(0.4 * image + 0.6 * dots, 0, 255).astype(np.uint8)


def _squares(image: Pixels, eyes: Eyes, inter_eye: float) -> Pixels:
    small = _DEGRADE["shrunk"](image, eyes, inter_eye)
    return np.asarray(cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_NEAREST), np.uint8)


def _salt_and_pepper(image: Pixels, _: Eyes, share: float) -> Pixels:
    chance = np.random.default_rng(2).random(image.shape[:2])
    salted = image.copy()
    salted[chance < share] = 0
    salted[chance < share / 2] = 255
    return salted


APPLY = {
    **_DEGRADE,
    "wider": _widen,
    "higher": _heighten,
    "mirrored": _mirror,
    "salt and pepper": _salt_and_pepper,
    "WebP": saved(".webp", cv2.IMWRITE_WEBP_QUALITY),
    "JPEG 2000": saved(".jp2", cv2.IMWRITE_JPEG2000_COMPRESSION_X1000),
    "few colours": _few_colours,
    "sharpened": _sharpened,
    "painted": _painted,
    "smooth skin": _smooth_skin,
    "halftone": _halftone,
    "squares": _squares,
    "middle larger or smaller": _middle_pulled,
    "eyes larger": _eyes_pulled,
}
# Each copy's steps, in order: what is done, and how much of it, as `DEGRADATIONS` counts it.
Step = tuple[str, float]
SINGLE: tuple[Step, ...] = (
    *(("wider", factor) for factor in (1.3, 1.5, 1.8, 2)),
    *(("higher", factor) for factor in (1.3, 1.5, 1.8, 2)),
    *(("JPEG", quality) for quality in (20, 10, 5)),
    *(("noise", deviation) for deviation in (15, 30, 50)),
    *(("salt and pepper", share) for share in (0.02, 0.05, 0.1)),
    *(("blur", sigma) for sigma in (0.04, 0.08, 0.13)),
    ("mirrored", 1),
    ("shrunk", 25),
)
COPIES: tuple[tuple[Step, ...], ...] = (
    (),
    *((step,) for step in SINGLE),
    (("wider", 1.5), ("JPEG", 5)),
    (("wider", 1.3), ("JPEG", 10)),
    (("higher", 1.5), ("JPEG", 5)),
    (("wider", 1.3), ("noise", 30)),
    (("wider", 1.5), ("mirrored", 1)),
    (("noise", 30), ("mirrored", 1)),
    (("JPEG", 5), ("mirrored", 1)),
    (("noise", 15), ("JPEG", 10)),
    (("blur", 0.08), ("noise", 15)),
    (("shrunk", 25), ("JPEG", 20)),
    (("shrunk", 25), ("wider", 1.3)),
)

# What else files and filters do to a picture, and what filters of apps do to a face. They are counted apart: of some of
# them the recogniser knows less than of any copy above.
FILTERED: tuple[tuple[Step, ...], ...] = (
    *((("WebP", quality),) for quality in (20, 5)),
    *((("JPEG 2000", thousandths),) for thousandths in (17, 8)),
    *((("few colours", step),) for step in (32, 64)),
    *((("sharpened", amount),) for amount in (3, 6)),
    *((("halftone", period),) for period in (4, 7)),
    *((("squares", inter_eye),) for inter_eye in (14, 10)),
    (("painted", 0.4),),
    (("smooth skin", 0.5),),
)
WARPED: tuple[tuple[Step, ...], ...] = (
    *((("middle larger or smaller", power),) for power in (0.3, 0.5, 0.7, -0.15, -0.25, -0.35)),
    *((("eyes larger", power),) for power in (0.4, 0.7)),
)
KINDS = (COPIES, FILTERED, WARPED)


def name_of(steps: tuple[Step, ...]) -> str:
    return ", ".join(f"{kind} {strength:.3g}".removesuffix(" 1") for kind, strength in steps) or "as it is"


def copy_of(image: Pixels, eyes: Eyes, steps: tuple[Step, ...]) -> bytes:
    """The distorted photo as a PNG file, which costs it nothing more."""
    for kind, strength in steps:
        image = APPLY[kind](image, eyes, strength)
    return bytes(cv2.imencode(".png", image)[1])


def pipeline_of(settings: Settings) -> Pipeline:
    """The service's own pipeline, for one photo at a time, which decodes in this process."""
    engine = engine_of(settings)
    return Pipeline(settings, engine, FaceAttributesModel(PROJECT / "models"), ModelSlots(1, math.inf), decode.decode)


class Service:
    """A pipeline, and a gallery in `folder` whose people stay until the end."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.pipeline = pipeline_of(settings)
        self.engine = self.pipeline.engine
        store = SqliteStore(folder / "faces.sqlite3")
        store.prepare()
        self.gallery = Gallery(store, self.engine.name, self.engine.dimension)

    def sign_up(self, photo: bytes) -> str:
        """The user_id; raises as `Pipeline.template` and `Gallery.enrol`."""
        trace = Trace()
        template = self.pipeline.template(photo, trace, new_person=True)
        cosine = cosine_of(self.settings.duplicate_threshold, self.engine.cosine_at_half)
        return self.gallery.enrol(template, duplicate_cosine=cosine, restored=trace.restored)

    def try_to_sign_up(self, photo: bytes) -> str:
        """`enrolled`, after which the person is erased again, or the code of the refusal."""
        try:
            user_id = self.sign_up(photo)
        except FaceError as refusal:
            return refusal.code
        self.gallery.erase(user_id)
        return "enrolled"

    def pixels_and_eyes(self, photo: bytes) -> tuple[Pixels, Eyes] | None:
        """The photo and its widest face's eyes; None if there is no face."""
        image = decode.decode(
            photo, max_bytes=self.settings.max_file_bytes, max_pixels=self.settings.max_image_pixels
        ).pixels
        faces = self.engine.detect(image)
        return (image, faces[0].eyes.astype(np.float64)) if faces else None


def probes(service: Service, people: list[list[Path]], *, same: bool) -> list[bytes]:
    """Sign everybody up, and return the photos from which the copies are made."""
    found = []
    for photos in people:
        for number, photo in enumerate(photos):
            try:
                service.sign_up(photo.read_bytes())
            except FaceError:
                continue
            found += [photo] if same else photos[number + 1 :]
            break
    return [photo.read_bytes() for photo in found]


def report(outcomes: dict[str, Counter[str]]) -> str:
    """A table in Markdown: each kind of copy, how many enrolled, were recognised, and were refused by which code."""
    totals = {
        name: sum((outcomes.get(name_of(steps), Counter[str]()) for steps in copies if steps), Counter[str]())
        for name, copies in zip(("**all distorted**", "**all filtered**", "**all warped**"), KINDS, strict=True)
    }
    lines = ["| copy | copies | enrolled, % | recognised, % | refused, % | refused as |", "|---|---|---|---|---|---|"]
    for name, counts in {**outcomes, **totals}.items():
        total, enrolled, known = counts.total(), counts["enrolled"], counts["duplicate_face"]
        low, high = wilson(enrolled, total)
        codes = ", ".join(
            f"`{code}` {count}" for code, count in counts.most_common() if code not in ("enrolled", "duplicate_face")
        )
        shares = [100 * count / max(1, total) for count in (enrolled, known, total - enrolled - known)]
        lines.append(
            f"| {name} | {total} | {shares[0]:.1f} ({100 * low:.1f}-{100 * high:.1f}) "
            f"| {shares[1]:.1f} | {shares[2]:.1f} | {codes or '-'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line; `.env` is not read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", type=Path, help="folder of identities, a sub-folder per person")
    parser.add_argument("--same", action="store_true", help="distort the enrolled photo itself")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="NAME", help="files that show somebody else")
    add_flags(parser)
    given = vars(parser.parse_args(arguments))
    settings = load_settings(given, environ={}, env_file=None)
    people = [
        [photo.path for photo in photos if photo.path.name not in given["leave_out"]]
        for photos in read_people(given["people"])
    ]
    copies = [steps for kind in KINDS for steps in kind]
    outcomes: dict[str, Counter[str]] = {name_of(steps): Counter() for steps in copies}
    with tempfile.TemporaryDirectory() as folder:
        service = Service(settings, Path(folder))
        for photo in probes(service, people, same=given["same"]):
            seen = service.pixels_and_eyes(photo)
            if seen is None:
                continue
            for steps in copies:
                outcomes[name_of(steps)][service.try_to_sign_up(copy_of(*seen, steps))] += 1
    print(report(outcomes))


if __name__ == "__main__":
    main()
