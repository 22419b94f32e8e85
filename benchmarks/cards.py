"""Counts how often a selfie matches its person's identity card, as `/compare` reads one, by kind of card and by width.

    python -m benchmarks.cards FOLDER --face-model PACK --verify-threshold 0.38

FOLDER has a sub-folder of photos a person. The first photo of each is the selfie. The next ones, if they match it as
they are, become the portraits on cards of every kind and width. A card is also compared with everybody else's selfie.
All of it goes through the service's own pipeline, in this process. Every setting is a flag. Intervals are Wilson's at
95 %.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.distorted_copies import pipeline_of
from benchmarks.evaluate_checks import read_people
from commands.evaluate.biometrics import wilson
from engines.base import Template, cosine_of
from errors import FaceError
from photos.pixels import Pixels
from pipeline import Pipeline
from settings import add_flags, load_settings

# Widths of the whole picture in pixels. A card is drawn at the last one and then made smaller.
WIDTHS = (300, 450, 700, 1000, 1600)
CARD = (1600, 1008)
# Left, top, width and height on the card: of the portrait, and of the ghost that repeats it, small and faint.
PORTRAIT, GHOST = (96, 240, 464, 557), (1312, 640, 160, 192)
PAPER, INK, DESK = (238, 230, 222), (70, 60, 50), (52, 70, 88)

Random = np.random.Generator
Floats = npt.NDArray[np.float32]


def _pixels(values: npt.NDArray[np.floating]) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _grey(portrait: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(portrait, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR), np.uint8)


def _tinted(portrait: Pixels, random: Random) -> Pixels:
    """In one ink on the paper: blue, green, red or brown."""
    ink = np.array([(120, 60, 20), (60, 90, 20), (40, 30, 120), (30, 60, 90)], np.float32)[random.integers(4)]
    light = _grey(portrait) / np.float32(255)
    return _pixels(ink + light * (np.array(PAPER, np.float32) - ink))


def _place(card: Pixels, portrait: Pixels, box: tuple[int, int, int, int], opacity: float = 1.0) -> None:
    left, top, width, height = box
    smaller = width < portrait.shape[1]
    scaled = cv2.resize(portrait, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
    part = card[top : top + height, left : left + width]
    part[:] = _pixels(part * np.float32(1 - opacity) + scaled * np.float32(opacity))


def _card(portrait: Pixels) -> Pixels:
    card = np.full((CARD[1], CARD[0], 3), PAPER, np.uint8)
    cv2.putText(card, "IDENTITY CARD", (660, 150), cv2.FONT_HERSHEY_SIMPLEX, 1.6, INK, 3, cv2.LINE_AA)
    for row, words in enumerate(("DOE", "ALEX", "01.02.1980", "D0123456")):
        cv2.putText(card, words, (660, 300 + 90 * row), cv2.FONT_HERSHEY_SIMPLEX, 1.2, INK, 2, cv2.LINE_AA)
    _place(card, portrait, PORTRAIT)
    return card


def plain(portrait: Pixels, _: Random) -> Pixels:
    return _card(portrait)


def grey(portrait: Pixels, _: Random) -> Pixels:
    return _card(_grey(portrait))


def tinted(portrait: Pixels, random: Random) -> Pixels:
    return _card(_tinted(portrait, random))


def ghost(portrait: Pixels, _: Random) -> Pixels:
    card = _card(portrait)
    _place(card, _grey(portrait), GHOST, opacity=0.5)
    return card


def askew(portrait: Pixels, random: Random) -> Pixels:
    """Photographed on a desk: turned by up to 15 degrees, one side up to a sixth shorter, as large as fits."""
    width, height = CARD
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    seen = corners + random.uniform(0, 1 / 12, (4, 2)).astype(np.float32) * (corners.mean(axis=0) - corners) * 2
    angle = math.radians(random.uniform(-15, 15))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], np.float32)
    seen = (seen - seen.mean(axis=0)) @ turn.T
    seen *= 0.96 * min(np.array(CARD) / np.ptp(seen, axis=0))
    seen += np.array(CARD) / 2 - (seen.max(axis=0) + seen.min(axis=0)) / 2
    matrix = cv2.getPerspectiveTransform(corners, seen.astype(np.float32))
    return np.asarray(cv2.warpPerspective(ghost(portrait, random), matrix, CARD, borderValue=DESK), np.uint8)


def glaring(portrait: Pixels, random: Random) -> Pixels:
    """A soft white spot somewhere on the portrait, as wide as half of it."""
    left, top, width, height = PORTRAIT
    centre = np.array([left, top]) + random.uniform(0.1, 0.9, 2) * (width, height)
    y, x = np.mgrid[0 : CARD[1], 0 : CARD[0]].astype(np.float32)
    away = np.hypot((x - centre[0]) / width, (y - centre[1]) / width) / 0.25
    light = 0.85 * np.exp(-(away**2))[..., None]
    card = ghost(portrait, random)
    return _pixels(card + light * (np.float32(255) - card))


def _waves(portrait: Pixels, random: Random, period: float, width: float) -> Pixels:
    """Wavy lines of ink over portrait and paper, as guilloches are; lengths in hundredths of a card's width."""
    y, x = np.mgrid[0 : CARD[1], 0 : CARD[0]].astype(np.float32) * np.float32(100 / CARD[0])
    phase = (y + 1.2 * np.sin(x / 3 + random.uniform(0, 6)) + 0.3 * x) % period
    line = cv2.GaussianBlur(0.5 * (np.abs(phase - period / 2) < width / 2).astype(np.float32), (3, 3), 0)
    card = ghost(portrait, random)
    return _pixels(card + line[..., None] * (np.array((160, 140, 60), np.float32) - card))


def patterned(portrait: Pixels, random: Random) -> Pixels:
    return _waves(portrait, random, 0.6, 0.15)


def coarse(portrait: Pixels, random: Random) -> Pixels:
    return _waves(portrait, random, 1.2, 0.4)


def turned(portrait: Pixels, random: Random) -> Pixels:
    return np.ascontiguousarray(np.rot90(ghost(portrait, random), int(random.integers(1, 4))))


KINDS: dict[str, Callable[[Pixels, Random], Pixels]] = {
    "plain": plain,
    "grey": grey,
    "one tint": tinted,
    "with a ghost": ghost,
    "askew, ghost": askew,
    "a quarter, half or three quarters of a turn, ghost": turned,
    "glare on the portrait, ghost": glaring,
    "fine lines over the portrait, ghost": patterned,
    "coarse lines over the portrait, ghost": coarse,
}


def portrait_of(photo: bytes) -> Pixels:
    """The middle of a photo in the portrait's shape, at its whole height."""
    image = np.asarray(cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    width = round(image.shape[0] * PORTRAIT[2] / PORTRAIT[3])
    left = max(0, (image.shape[1] - width) // 2)
    return image[:, left : left + width]


def photographed(card: Pixels, width: int) -> bytes:
    """The card as a JPEG file of this width; one that lies on its side gets this height."""
    scale = width / max(card.shape[:2])
    small = cv2.resize(card, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1])


def read(pipeline: Pipeline, photo: bytes, *, picture: bool) -> Template | str:
    """The template, as `/compare` makes it, or the code of the refusal."""
    try:
        return pipeline.template(photo, picture=picture, enrols=False)
    except FaceError as refusal:
        return refusal.code


def report(outcomes: dict[tuple[str, int], Counter[str]], wrong: dict[str, Counter[str]]) -> str:
    """A table in Markdown: cards that match by kind and width, why others do not, and matches of different people."""
    lines = [
        f"| card | {' | '.join(f'{width} px' for width in WIDTHS)} | all, % | not matched | wrong matches |",
        "|---" * (len(WIDTHS) + 4) + "|",
    ]
    for title, kinds in {**{kind: (kind,) for kind in KINDS}, "**all**": tuple(KINDS)}.items():
        counts = [sum((outcomes[kind, width] for kind in kinds), Counter[str]()) for width in WIDTHS]
        total = sum(counts, Counter[str]())
        pairs = sum((wrong[kind] for kind in kinds), Counter[str]())
        low, high = wilson(total["match"], total.total())
        codes = ", ".join(f"`{code}` {count}" for code, count in total.most_common() if code != "match")
        lines.append(
            f"| {title} | {' | '.join(str(one['match']) for one in counts)} "
            f"| {100 * total['match'] / total.total():.1f} ({100 * low:.1f}-{100 * high:.1f}) of {total.total()} "
            f"| {codes or '-'} | {pairs['match']} of {pairs.total()} |"
        )
    return "\n".join(lines)


def measured(pipeline: Pipeline, people: list[list[bytes]], least: float) -> str:
    """The report for everybody whose plain photos match the selfie, their first one, at the cosine `least`."""
    selfies = {
        person: template
        for person, photos in enumerate(people)
        if not isinstance(template := read(pipeline, photos[0], picture=False), str)
    }
    outcomes: dict[tuple[str, int], Counter[str]] = {(kind, width): Counter() for kind in KINDS for width in WIDTHS}
    wrong: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for person, selfie in selfies.items():
        others = np.stack([template for other, template in selfies.items() if other != person])
        for number, photo in enumerate(people[person][1:]):
            plainly = read(pipeline, photo, picture=False)
            if isinstance(plainly, str) or float(selfie @ plainly) < least:
                continue
            for kind, draw in KINDS.items():
                card = draw(portrait_of(photo), np.random.default_rng([person, number, zlib.crc32(kind.encode())]))
                for width in WIDTHS:
                    found = read(pipeline, photographed(card, width), picture=True)
                    if isinstance(found, str):
                        outcomes[kind, width][found] += 1
                        continue
                    outcomes[kind, width]["match" if float(selfie @ found) >= least else "no_match"] += 1
                    matching = int((others @ found >= least).sum())
                    wrong[kind].update({"match": matching, "no match": len(others) - matching})
    return report(outcomes, wrong)


def main(arguments: list[str] | None = None) -> None:
    """The command line; `.env` is not read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", type=Path, help="folder of identities, a sub-folder per person")
    parser.add_argument("--portraits", type=int, default=2, help="at most so many of each person [2]")
    add_flags(parser)
    given = vars(parser.parse_args(arguments))
    settings = load_settings(given, environ={}, env_file=None)
    most = 1 + given["portraits"]
    people = [[photo.path.read_bytes() for photo in photos[:most]] for photos in read_people(given["people"])]
    pipeline = pipeline_of(settings)
    print(measured(pipeline, people, cosine_of(settings.verify_threshold, pipeline.engine.cosine_at_half)))


if __name__ == "__main__":
    main()
