"""Counts how often a challenge accepts attacks and refuses honest people, in frames made from photos.

    python benchmarks/challenges.py PACK... --mesh face_landmark_468.onnx --photos PHOTO... --people FOLDER

PACK is the folder of an InsightFace pack, or `compact`. Each photo with one nearly frontal face gives a head in 3D and
prints of it (`turning_faces.py`). Honest people and attackers do the steps of random challenges before a background;
the frames are JPEGs with a sensor's noise. FOLDER has a folder a person, for the attack by several photos of one.

The words are those of ISO/IEC 30107-3: APCER is the share of attacks accepted, of each kind of attack; BPCER the share
of honest attempts refused; BPNRR the share of honest attempts that an app ends because it does not see a step.
Intervals are Wilson's at 95 %. The people are split in two halves by a hash of their names: the limits were chosen on
the first.
"""

from __future__ import annotations

import argparse
import math
import pickle
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.turning_faces import (
    ARM_LENGTH,
    FLAT_PIVOT,
    NECK_PIVOT,
    FaceMesh,
    Relief,
    View,
    a_background,
    as_sent,
    filmed,
    folded_print_of,
    head_of,
    print_of,
)
from bootstrap import load_engine
from challenge.judge import Outcome, judge, look_at
from challenge.motion import Frame, size_of
from challenge.steps import CLOSER, LEFT, MAX_FRAMES, ORDERS, RIGHT, STRAIGHT
from commands.evaluate.biometrics import wilson
from engines.base import MEAN_FACE, Engine, Face, Template
from engines.face_attributes import AttributeReader, FaceAttributesModel
from engines.insightface_engine import InsightFaceEngine
from face_checks import Pose, aligned_face, pose_of
from photos.pixels import Pixels
from settings import Settings

MIN_INTER_EYE_PX = 36.0
MAX_YAW_DEG, MAX_ROLL_DEG = 12.0, 10.0
# How often the app before a guided person looks at a step, at most. Who is still asked to turn turns further each time.
TRIES, FURTHER_DEG = 3, 5.0
# When an app takes a step for done, as /try does and docs/clients.md says: degrees of yaw in the first look, in later
# ones and in a turn, and how many times as large the face is.
FIRST_DEG, STRAIGHT_DEG, TURNED_DEG, GROWN = 12.0, 7.0, 21.0, 1.28
HONEST, GUIDED = "honest", "honest, before an app that looks"
# An attacker's app looks more often.
TRIES_OF_A_FOLD, LEANS_DEG = 7, (25.0, 50.0)
FOLDED, WIDE_FOLDED = "print folded along the nose, as it is", "print folded along the nose, printed wider"
LOOKED_AT = (GUIDED, FOLDED, WIDE_FOLDED)
Film = Callable[[View], Pixels]


@dataclass(frozen=True)
class Subject:
    """A person's name, a photo with one face, what it is in 3D, and the background that it is filmed before."""

    person: str
    photo: Pixels
    face: Face
    head: Relief
    background: Pixels


@dataclass(frozen=True)
class Sent:
    """What one attempt sends.

    Attributes:
        kind: of attempt.
        person: a name of the person on the photo.
        frames: of a kind in LOOKED_AT as many for each step as the app looks, of which it keeps one.
    """

    kind: str
    person: str
    photo: Pixels
    steps: tuple[str, ...]
    frames: list[bytes]


def subjects(
    photos: Sequence[Path],
    people: Path | None,
    random: np.random.Generator,
    *,
    engine: Engine,
    reader: AttributeReader,
    mesh: FaceMesh,
) -> list[Subject]:
    """The photos that show one face, large and straight enough to be turned. Those in `people` name the person."""
    found = []
    for path in photos:
        photo = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR), np.uint8)
        faces = engine.detect(photo)
        if len(faces) != 1 or faces[0].inter_eye < MIN_INTER_EYE_PX:
            continue
        pose = pose_of(faces[0], reader.read(aligned_face(photo, faces[0])))
        if abs(pose.yaw) <= MAX_YAW_DEG and abs(pose.roll) <= MAX_ROLL_DEG:
            person = path.parent.name if path.parent.parent == people else path.stem
            found.append(Subject(person, photo, faces[0], head_of(photo, faces[0], mesh), a_background(random)))
    return found


def views(
    steps: Sequence[str], random: np.random.Generator, turns_deg: tuple[float, float], pivot: tuple[float, float, float]
) -> Iterator[tuple[str, View]]:
    """How something stands before the camera while it does the steps, one or two frames a step and some between."""
    yaw, distance, extra = 0.0, ARM_LENGTH * random.uniform(0.9, 1.15), MAX_FRAMES - len(steps)
    pitch, roll = random.normal(0, 3), random.normal(0, 2)
    for step in steps:
        before = yaw, distance
        if step == CLOSER:
            yaw, distance = random.normal(0, 2), distance * random.uniform(0.6, 0.75)
        else:
            sign = {LEFT: 1, RIGHT: -1, STRAIGHT: 0}[step]
            yaw = random.normal(0, 2) if step == STRAIGHT else sign * random.uniform(*turns_deg)
        count = 1 + int(extra > 0 and random.random() < 0.4)
        between = extra > count - 1 and before[0] != 0.0 and random.random() < 0.4
        extra -= count - 1 + between
        half_way = ((before[0] + yaw) / 2, (before[1] + distance) / 2, "between")
        moves = [half_way] if between else []
        for now_yaw, now_distance, name in [*moves, *[(yaw, distance, step)] * count]:
            shift = (random.normal(0, 0.08), random.normal(0, 0.08))
            yield (
                name,
                View(
                    float(now_yaw + random.normal(0, 1)),
                    pitch + random.normal(0, 2),
                    roll + random.normal(0, 2),
                    float(now_distance * random.uniform(0.98, 1.02)),
                    shift,
                    pivot,
                ),
            )


def sent(frames: Sequence[Pixels], random: np.random.Generator) -> list[bytes]:
    """The frames as a camera sends them, in light that changes a little."""
    quality, noise, light = int(random.integers(70, 92)), random.uniform(1, 4), random.uniform(0.8, 1.15)
    lit = [np.clip(frame * (light + random.normal(0, 0.01)), 0, 255).astype(np.uint8) for frame in frames]
    return [as_sent(frame, random, quality=quality, noise=noise) for frame in lit]


def done_by(relief: Relief, background: Pixels, shown: Iterable[tuple[str, View]]) -> list[Pixels]:
    """The frames of a head or a print that does the steps."""
    return [filmed(relief, view, background) for _, view in shown]


def by_head(subject: Subject, steps: Sequence[str], random: np.random.Generator) -> list[Pixels]:
    """The frames of a person who does the steps."""
    return done_by(subject.head, subject.background, views(steps, random, (22, 42), NECK_PIVOT))


def guided(subject: Subject, steps: Sequence[str], random: np.random.Generator) -> list[Pixels]:
    """The frames of a person before an app that asks until it sees each step: TRIES frames for each."""
    return before_an_app(subject.head, subject.background, steps, random, tries=TRIES, pivot=NECK_PIVOT)


def before_an_app(
    relief: Relief,
    background: Pixels,
    steps: Sequence[str],
    random: np.random.Generator,
    *,
    tries: int,
    pivot: tuple[float, float, float],
) -> list[Pixels]:
    """The frames of a head or a print before an app that looks so often at each step."""
    frames: list[Pixels] = []
    near = 1.0
    for step in steps:
        near *= random.uniform(0.6, 0.75) if step == CLOSER else 1.0
        for look in range(tries):
            turn = random.uniform(22, 42) + FURTHER_DEG * look
            yaw = {LEFT: 1, RIGHT: -1}.get(step, 0) * turn + random.normal(0, 2)
            shift = (random.normal(0, 0.08), random.normal(0, 0.08))
            view = View(
                yaw,
                random.normal(0, 3),
                random.normal(0, 2),
                ARM_LENGTH * near * random.uniform(0.97, 1.03),
                shift,
                pivot,
            )
            frames.append(filmed(relief, view, background))
    return frames


def shaken(subject: Subject, steps: Sequence[str], random: np.random.Generator) -> list[Pixels]:
    """A print that is moved in every way but as asked."""
    flat = print_of(subject.photo, subject.face)
    return [
        filmed(
            flat,
            View(
                random.uniform(-50, 50), random.uniform(-25, 25), random.uniform(-15, 15),
                ARM_LENGTH * random.uniform(0.7, 1.3), (random.normal(0, 0.3), random.normal(0, 0.3)), FLAT_PIVOT,
            ),
            subject.background,
        )
        for _ in range(len(steps) + 4)
    ]  # fmt: skip


def with_eye_holes(subject: Subject, other: Subject, steps: Sequence[str], random: np.random.Generator) -> list[Pixels]:
    """A print with the eyes cut out, before the attacker's own face."""
    mask = print_of(subject.photo, subject.face, holes=True)
    frames = []
    for _, view in views(steps, random, (25, 55), FLAT_PIVOT):
        behind = View(view.yaw, view.pitch, view.roll, view.distance + 0.5, view.shift, (0.0, 0.6, 0.5))
        frames.append(filmed(mask, view, filmed(other.head, behind, subject.background)))
    return frames


def replayed(subject: Subject, random: np.random.Generator) -> list[Pixels]:
    """A screen that shows what a person did for another challenge."""
    steps = drawn(random)
    height, width = subject.background.shape[:2]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    seen = (corners + random.normal(0, 8, corners.shape)).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(corners, seen)
    stripes = 4 * np.sin(np.arange(width) * random.uniform(0.8, 2.5))[None, :, None]
    return [
        np.clip(cv2.warpPerspective(frame, matrix, (width, height)) * 0.9 + 10 + stripes, 0, 255).astype(np.uint8)
        for frame in by_head(subject, steps, random)
    ]


def with_anothers_turns(
    subject: Subject, other: Subject, steps: Sequence[str], random: np.random.Generator
) -> list[Pixels]:
    """A print of the person where a look straight is asked for, the attacker's own head where it must turn."""
    flat = print_of(subject.photo, subject.face)
    frames = []
    for name, view in views(steps, random, (22, 42), NECK_PIVOT):
        frames.append(filmed(other.head if name in (LEFT, RIGHT) else flat, view, subject.background))
    return frames


# The camera's distance in the pose fit. The focal length of an uploaded photo is unknown, so the view is nearly
# parallel.
_CAMERA_DISTANCE_INTER_EYES = 20.0


def head_pose(face: Face) -> Pose:
    """Estimate the head pose from five landmarks: the rotation of a rigid mean face that fits them best.

    Least squares of the reprojection (Levenberg-Marquardt) from a frontal face with the roll of the eyes' line.

    Raises:
        ValueError: the landmarks are degenerate.
    """
    left, right = face.eyes
    between = right - left
    inter_eye = face.inter_eye
    if not np.isfinite(face.landmarks).all() or inter_eye < 1.0:
        raise ValueError("degenerate landmarks")
    tilt = math.atan2(between[1], between[0])
    focal = inter_eye * _CAMERA_DISTANCE_INTER_EYES
    middle = (left + right) / 2
    camera = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]])
    fitted, turn, _ = cv2.solvePnP(
        MEAN_FACE,
        face.landmarks.astype(np.float64),
        camera,
        None,
        rvec=np.array([[0.0], [0.0], [tilt]]),
        tvec=np.array([[0.0], [0.0], [_CAMERA_DISTANCE_INTER_EYES]]),
        useExtrinsicGuess=True,
        flags=cv2.SOLVEPNP_ITERATIVE,
    )
    if not fitted or not np.isfinite(turn).all():
        raise ValueError("degenerate landmarks")
    rotation = cv2.Rodrigues(turn)[0]
    # rotation = roll about the line of sight, then pitch, then yaw of the head about its own axis
    pitch = math.asin(float(np.clip(-rotation[1, 2], -1, 1)))
    yaw = math.atan2(float(rotation[0, 2]), float(rotation[2, 2]))
    roll = math.atan2(float(rotation[1, 0]), float(rotation[1, 1]))
    return Pose(yaw=math.degrees(yaw), pitch=math.degrees(pitch), roll=math.degrees(roll))


def album(folder: Path, engine: Engine) -> list[tuple[float, Pixels, Face]]:
    """A person's photos with one face each, with the yaw that is read from each, from left to right."""
    photos = []
    for path in sorted(folder.glob("*.jpg")):
        photo = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR), np.uint8)
        faces = engine.detect(photo)
        if len(faces) == 1:
            photos.append((head_pose(faces[0]).yaw, photo, faces[0]))
    return sorted(photos, key=lambda one: one[0])


def with_mirror_image(photos: Sequence[tuple[float, Pixels, Face]], engine: Engine) -> list[tuple[float, Pixels, Face]]:
    """As an `album`: a person's straightest photo, the one that is turned most, and that one's mirror image."""
    straight, (yaw, turned, face) = (choose(photos, key=lambda one: abs(one[0])) for choose in (min, max))
    mirrored = np.ascontiguousarray(turned[:, ::-1])
    sides = [(yaw, turned, face), *((-yaw, mirrored, seen) for seen in engine.detect(mirrored)[:1])]
    return sorted([straight, *sides], key=lambda one: one[0])


def several_photos(
    photos: Sequence[tuple[float, Pixels, Face]], background: Pixels, steps: Sequence[str], random: np.random.Generator
) -> tuple[Pixels, list[Pixels]]:
    """Photos of one person, turned to either side and straight, held up one after the other; and the straight one."""
    straight = min(photos, key=lambda one: abs(one[0]))
    prints = {name: print_of(*one[1:]) for name, one in ((LEFT, photos[0]), (RIGHT, photos[-1]), (STRAIGHT, straight))}
    frames = [
        filmed(prints.get(name, prints[STRAIGHT]), view, background)
        for name, view in views(steps, random, (0, 5), FLAT_PIVOT)
    ]
    return straight[1], frames


def attacks_on(
    subject: Subject, other: Subject, random: np.random.Generator
) -> dict[str, Callable[[tuple[str, ...]], list[Pixels]]]:
    """Kind of attack -> what makes its frames for a challenge's steps."""
    flat = print_of(subject.photo, subject.face)
    bent = print_of(subject.photo, subject.face, radius=random.uniform(0.9, 2.5))

    def turned(relief: Relief, degrees: tuple[float, float]) -> Callable[[tuple[str, ...]], list[Pixels]]:
        return lambda steps: done_by(relief, subject.background, views(steps, random, degrees, FLAT_PIVOT))

    return {
        "flat print, turned and moved closer": turned(flat, (25, 60)),
        "bent print, turned and moved closer": turned(bent, (25, 55)),
        "print with eye holes": lambda steps: with_eye_holes(subject, other, steps, random),
        "print, shaken": lambda steps: shaken(subject, steps, random),
        "one photo, repeated": lambda steps: [filmed(flat, View(), subject.background)] * (len(steps) + 2),
        "screen, another challenge": lambda _: replayed(subject, random),
        "another person's head": lambda steps: by_head(other, steps, random),
        "print, and another's head for the turns": lambda steps: with_anothers_turns(subject, other, steps, random),
    }


def attempts(
    people: Sequence[Subject], albums: Sequence[Path], engine: Engine, random: np.random.Generator, honest: int
) -> Iterator[Sent]:
    """Honest attempts of every person, and an attack of every kind on each."""
    for at, subject in enumerate(people):
        other = people[(at + 1 + int(random.integers(len(people) - 1))) % len(people)]
        for _ in range(honest):
            for kind, film in ((HONEST, by_head), (GUIDED, guided)):
                steps = drawn(random)
                yield Sent(kind, subject.person, subject.photo, steps, sent(film(subject, steps, random), random))
        for kind, attack in attacks_on(subject, other, random).items():
            steps = drawn(random)
            yield Sent(kind, subject.person, subject.photo, steps, sent(attack(steps), random))
    several = {folder.name: photos for folder in albums if len(photos := album(folder, engine)) >= 3}
    mirrored = {person: with_mirror_image(photos, engine) for person, photos in several.items()}
    for kind, shown in (("several photos of the person", several), ("a side view and its mirror image", mirrored)):
        for person, photos in shown.items():
            steps = drawn(random)
            photo, frames = several_photos(photos, a_background(random), steps, random)
            yield Sent(f"{kind}, in turn", person, photo, steps, sent(frames, random))
    # Last, so that the other kinds stay what they were with one seed.
    for subject in people:
        for kind in (FOLDED, WIDE_FOLDED):
            fold = folded_print_of(subject.photo, subject.face, random.uniform(*LEANS_DEG), widened=kind == WIDE_FOLDED)
            steps = drawn(random)
            frames = before_an_app(fold, subject.background, steps, random, tries=TRIES_OF_A_FOLD, pivot=FLAT_PIVOT)
            yield Sent(kind, subject.person, subject.photo, steps, sent(frames, random))


def drawn(random: np.random.Generator) -> tuple[str, ...]:
    """The steps of a challenge, which are the same in every run with one seed."""
    return ORDERS[int(random.integers(len(ORDERS)))]


def template_of(one: Sent, engine: Engine) -> Template:
    """The template of the photo that an attempt sends."""
    return engine.embed(one.photo, engine.detect(one.photo)[0])


def judged(
    one: Sent, template: Template, engine: Engine, reader: AttributeReader, settings: Settings
) -> Outcome | None:
    """What the service makes of one attempt; None if an app that looks does not see a step."""
    decoded = (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in one.frames)
    frames = look_at([np.asarray(pixels, np.uint8) for pixels in decoded], engine, reader)
    if one.kind in LOOKED_AT:
        frames = kept(frames, one.steps, partial(seen_by_app, engine=engine, reader=reader))
    return judge(frames, one.steps, template, engine, settings) if frames else None


@dataclass(frozen=True)
class Seen:
    """What /try knows of a frame: degrees by which the head is turned (left is negative), and its size in pixels."""

    turn: float
    size: float


def seen_by_app(frame: Frame, *, engine: Engine, reader: AttributeReader) -> Seen | None:
    """What `POST /analyze` tells /try of a frame, from a whole search and reading; None unless it shows one face."""
    faces = engine.detect(frame.pixels)
    if len(faces) != 1:
        return None
    return Seen(reader.read(aligned_face(frame.pixels, faces[0])).yaw, size_of(faces[0]))


def kept(frames: Sequence[Frame], steps: Sequence[str], see: Callable[[Frame], Seen | None]) -> list[Frame]:
    """The frames that an app keeps: of each step the first one that /try takes for it; none if a step is missing."""
    chosen: list[Frame] = []
    straight: Seen | None = None
    tries = len(frames) // len(steps)
    for at, step in enumerate(steps):
        for frame in frames[at * tries : (at + 1) * tries]:
            seen = see(frame)
            if seen is not None and shows(step, seen, straight):
                straight = straight or seen
                chosen.append(frame)
                break
        if len(chosen) <= at:
            return []
    return chosen


def shows(step: str, seen: Seen, straight: Seen | None) -> bool:
    """Whether /try takes a step for done."""
    if straight is None:
        return abs(seen.turn) <= FIRST_DEG
    turned = seen.turn - straight.turn
    if step == STRAIGHT:
        return abs(turned) <= STRAIGHT_DEG
    if step == CLOSER:
        return abs(turned) <= STRAIGHT_DEG and seen.size >= GROWN * straight.size
    sign = -1 if step == LEFT else 1
    return min(sign * turned, sign * seen.turn) >= TURNED_DEG


def of_the_first_half(person: str) -> bool:
    """Whether the limits were chosen on this person."""
    return zlib.crc32(person.encode()) % 2 == 0


def report(outcomes: dict[str, list[Outcome | None]]) -> None:
    """Print a table of the kinds of attempts, with what refuses each most."""
    print("| attempt | share | 95 % | what refused it most |")
    print("|---|---|---|---|")
    for kind, made in outcomes.items():
        judged_ones = [one for one in made if one is not None]
        refused = [one for one in judged_ones if not all(check.passed for check in one.checks)]
        reasons = Counter(map(reason_of, refused)).most_common(3)
        told = ", ".join(f"{name} {count}" for name, count in reasons)
        errors = len(refused) if kind in (HONEST, GUIDED) else len(judged_ones) - len(refused)
        if judged_ones:
            print(f"| {kind} | {share_of(errors, len(judged_ones))} | {told} |")
        if kind in LOOKED_AT:
            print(f"| {kind}, and does not see a step | {share_of(made.count(None), len(made))} | |")


def share_of(events: int, of: int) -> str:
    """A share with its interval, as two cells of a table."""
    low, high = wilson(events, of)
    return f"{events} of {of}, {events / of:.1%} | {low:.1%} to {high:.1%}"


def cost(made: Sequence[Sent], engine: InsightFaceEngine, reader: AttributeReader) -> float:
    """The CPU of judging eight frames, as a share of four full looks of the detector and two embeddings."""
    spent = allowed = 0.0
    for one in [one for one in made if one.kind == HONEST and len(one.frames) == 8][:12]:
        photo = np.asarray(cv2.resize(one.photo, (640, 640)), np.uint8)
        face = engine.detect(photo)[0]
        judging = partial(judged, one, engine.embed(photo, face), engine, reader, Settings())
        outcome = judging()
        if outcome and all(check.passed for check in outcome.checks):  # others cost less
            spent += cpu_seconds(judging)
            allowed += 4 * cpu_seconds(partial(engine._look, photo, (640, 640)))
            allowed += 2 * cpu_seconds(partial(engine.embed, photo, face))
    return spent / allowed


def cpu_seconds(work: Callable[[], object]) -> float:
    """The least CPU time of five runs: other work on the machine slows single ones."""

    def once() -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun

    return min(once() for _ in range(5))


def reason_of(outcome: Outcome) -> str:
    """The name of the first failed check."""
    failed = next(at for at, check in enumerate(outcome.checks) if not check.passed)
    return str(list(outcome.figures)[failed]).removeprefix("challenge_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of packs, or compact")
    parser.add_argument("--mesh", type=Path, required=True, help="MediaPipe's face landmark network as ONNX")
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--people", type=Path, help="a folder with a folder a person")
    parser.add_argument("--honest", type=int, default=3, help="honest attempts of each person")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[], help="VERIFY_THRESHOLD of each model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a file to keep the attempts in, outside of the repository")
    options = parser.parse_args()
    engines = [
        load_engine(model, models_dir=PROJECT / "models", hub_timeout_s=1, threads=1, may_fall_back=False)
        for model in options.models
    ]
    reader = FaceAttributesModel(PROJECT / "models")
    random = np.random.default_rng(options.seed)
    if options.keep and options.keep.exists():
        made = pickle.loads(options.keep.read_bytes())
    else:
        mesh = FaceMesh(options.mesh)
        people = subjects(options.photos, options.people, random, engine=engines[0], reader=reader, mesh=mesh)
        albums = sorted(path for path in options.people.iterdir() if path.is_dir()) if options.people else []
        made = list(attempts(people, albums, engines[0], random, options.honest))
        if options.keep:
            options.keep.write_bytes(pickle.dumps(made))
    for engine, threshold in zip(engines, [*options.thresholds, *[0.5] * len(engines)], strict=False):
        outcomes: dict[bool, dict[str, list[Outcome | None]]] = {True: defaultdict(list), False: defaultdict(list)}
        for one in made:
            outcome = judged(one, template_of(one, engine), engine, reader, Settings(verify_threshold=threshold))
            outcomes[of_the_first_half(one.person)][one.kind].append(outcome)
        print(f"\n{engine.describe()}, VERIFY_THRESHOLD {threshold}")
        assert isinstance(engine, InsightFaceEngine)
        print(f"CPU of 8 frames, against four full looks and two embeddings: {cost(made, engine, reader):.2f}")
        for first, of_half in outcomes.items():
            print(f"\nThe people {'on whom the limits were chosen' if first else 'on whom nothing was chosen'}:\n")
            report(of_half)


if __name__ == "__main__":
    main()
