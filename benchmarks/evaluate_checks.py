"""Runs the real checks over labelled photos, and writes docs/checks.md with its figures from the results."""

from __future__ import annotations

import argparse
import csv
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.degradations import DEGRADATIONS, Degradation, Eyes
from bootstrap import load_engine
from commands.bulk.photo_list import SUFFIXES
from commands.evaluate.biometrics import wilson
from engines.base import Engine, Template, similarity_of
from engines.face_attributes import AttributeReader, FaceAttributesModel
from errors import FaceError
from face_checks import Measurements, judge, measure, require_single_face
from photos import decode
from photos.pixels import Pixels
from settings import PROJECT, Settings, add_flags, load_settings

logger = logging.getLogger(__name__)

# What covers the face -> the code that a refusal should have.
RIGHT_CODE = {
    "none": "", "mask": "mask", "sunglasses": "sunglasses", "other": "face_covered", "open": "", "shut": "eyes_closed",
}  # fmt: skip
# Rows with these labels are left out.
UNDECIDED = {"half", "one_shut"}
# Attributes that set coverings apart in the table.
APART = {"synthetic", "mild"}


@dataclass(frozen=True)
class Photo:
    """One labelled photo; `learned` if the network may have been trained on it: its verdict proves nothing then."""

    path: Path
    label: str
    attributes: tuple[str, ...] = ()
    origin: str = "not stated"
    learned: bool = False


@dataclass(frozen=True)
class Seen:
    """What the checks made of a photo: the codes that failed (none: accepted), and what could be measured."""

    codes: tuple[str, ...]
    measures: dict[str, float] = field(default_factory=dict)
    eyes: Eyes | None = None
    template: Template | None = None


@dataclass(frozen=True)
class Measure:
    """One measure of `face_checks.py`: its code, its setting, and the side of the limit that is good."""

    code: str
    setting: str
    words: str
    read: Callable[[Measurements], float]

    @property
    def low_is_bad(self) -> bool:
        return self.setting.startswith("min_")

    def limit(self, settings: Settings) -> float:
        return float(getattr(settings, self.setting))

    def required(self, settings: Settings) -> str:
        return f"{'≥' if self.low_is_bad else '≤'} {self.limit(settings):g}"


MEASURES = {
    "inter-eye": Measure("face_too_small", "min_inter_eye_px", "inter-eye distance, px", lambda m: m.inter_eye_px),
    "head": Measure("face_too_large", "max_head_size", "eyes to chin / photo height", lambda m: m.head_size),
    "frame": Measure("face_cut_off", "min_face_in_frame", "share of the face in the photo", lambda m: m.in_frame),
    "sharpness": Measure("blurred", "min_sharpness", "sharpness score", lambda m: m.sharpness),
    "luminance": Measure("too_dark", "min_luminance", "mean luminance", lambda m: m.luminance),
    "black": Measure("too_dark", "max_under_exposure", "share of luminance ≤ 25", lambda m: m.under_exposure),
    "bright": Measure("too_bright", "max_luminance", "mean luminance", lambda m: m.luminance),
    "white": Measure("too_bright", "max_over_exposure", "share of luminance ≥ 247", lambda m: m.over_exposure),
    "range": Measure("low_contrast", "min_dynamic_range", "luminance entropy, bits", lambda m: m.dynamic_range),
    "uniformity": Measure("uneven_light", "min_uniformity", "darker / lighter cheek", lambda m: m.uniformity),
    "roll": Measure("head_tilted", "max_roll_deg", "roll, degrees", lambda m: abs(m.pose.roll)),
    "yaw": Measure("head_turned", "max_yaw_deg", "yaw, degrees", lambda m: abs(m.pose.yaw)),
    "pitch": Measure("head_raised_or_lowered", "max_pitch_deg", "pitch, degrees", lambda m: abs(m.pose.pitch)),
    "colour": Measure("unnatural_colour", "max_colour_distance", "distance from skin", lambda m: m.colour_distance),
    "stretch": Measure("distorted", "max_stretch", "width / height, or the inverse", lambda m: m.attributes.distortion),
    "likeness": Measure("distorted", "min_likeness", "estimated likeness", lambda m: m.attributes.likeness),
    "damage": Measure("distorted", "max_damage", "probability of damage", lambda m: m.attributes.damaged),
    "hidden": Measure("landmarks_hidden", "max_hidden", "probability", lambda m: m.attributes.hidden),
    "mask": Measure("mask", "max_mask", "probability", lambda m: m.attributes.mask),
    "sunglasses": Measure("sunglasses", "max_sunglasses", "probability", lambda m: m.attributes.sunglasses),
    "other": Measure("face_covered", "max_covered", "probability", lambda m: m.attributes.other),
    "eyes": Measure("eyes_closed", "max_eyes_shut", "probability", lambda m: m.attributes.eyes_shut),
}
CALIBRATED = tuple(dict.fromkeys(one.measure for one in DEGRADATIONS))
COVERING_CODES = {"landmarks_hidden", *RIGHT_CODE.values()}


@dataclass(frozen=True)
class Gates:
    """The service's own way from a photo to a template; here it continues after a refusal."""

    engine: Engine
    reader: AttributeReader
    settings: Settings
    folder: str = ""

    @property
    def title(self) -> str:
        """The model's name, and its folder's, since packs of one recogniser differ in their detector."""
        return f"{self.engine.name} ({self.folder})" if self.folder else self.engine.name

    def see_file(self, path: Path) -> Seen:
        try:
            return self.see(self.read(path))
        except FaceError as error:
            return Seen((error.code,))

    def judged(self, photos: Sequence[Photo]) -> list[tuple[Photo, Seen]]:
        return [(photo, self.see_file(photo.path)) for photo in photos]

    def read(self, path: Path) -> Pixels:
        limits = self.settings
        data = path.read_bytes()
        return decode.decode(data, max_bytes=limits.max_file_bytes, max_pixels=limits.max_image_pixels).pixels

    def see(self, image: Pixels) -> Seen:
        try:
            face, _ = require_single_face(self.engine.detect(image), self.settings)
        except FaceError as error:
            return Seen((error.code,))
        try:
            found = measure(image, face, self.reader)
            template = self.engine.embed(image, face)
        except ValueError:
            return Seen(("landmarks_hidden",))
        codes = tuple(check.code for check in judge(found, self.settings) if not check.passed)
        return Seen(codes, {name: one.read(found) for name, one in MEASURES.items()}, face.eyes, template)


# --- Reading the folders ---------------------------------------------------------------------------------------------


def read_photos(folder: Path) -> list[Photo]:
    """Read a folder of photos: labels.csv (file, label, attributes, ...), or sub-folders named by the label.

    Rows of the split `train` are taken only where they are clean and carry attributes: quality is not learned.

    Raises:
        ValueError: an unknown label, or no photo at all.
    """
    photos = []
    if (folder / "labels.csv").is_file():
        with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["label"] in UNDECIDED:
                    continue
                if row["label"] not in RIGHT_CODE:
                    raise ValueError(f"{folder.name}/labels.csv: unknown label {row['label']!r}")
                attributes = tuple(sorted(filter(None, (row.get("attributes") or "").split(";"))))
                learned = row.get("split") == "train"
                if not learned or (row["label"] == "none" and attributes and "synthetic" not in attributes):
                    photos.append(Photo(folder / row["file"], row["label"], attributes, _origin(row), learned))
    else:
        photos = [Photo(path, label) for label in RIGHT_CODE for path in _photo_files(folder / label)]
    if not photos:
        raise ValueError(f"{folder.name} holds neither labels.csv nor photos in {', '.join(RIGHT_CODE)}")
    return photos


def read_people(folder: Path) -> list[list[Photo]]:
    """Read a folder of identities, one sub-folder each, as clean photos; people.csv may state their source."""
    origins = {}
    if (folder / "people.csv").is_file():
        with (folder / "people.csv").open(encoding="utf-8", newline="") as file:
            origins = {folder / row["file"]: _origin(row) for row in csv.DictReader(file)}
    return [
        [Photo(path, "none", ("people",), origins.get(path, "not stated")) for path in _photo_files(one)]
        for one in sorted(folder.iterdir())
        if one.is_dir()
    ]


def _origin(row: Mapping[str, str]) -> str:
    return f"{row.get('source') or 'not stated'} ({row.get('licence') or 'no licence stated'})"


def _photo_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


# --- Degrading good photos -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """A degraded copy of a good photo; similarity is -1 where no face could be embedded."""

    degradation: Degradation
    strength: float
    seen: Seen
    similarity: float


def degraded_copies(gates: Gates, path: Path) -> list[Copy]:
    """Every step of every degradation of one accepted photo."""
    image = gates.read(path)
    good = gates.see(image)
    assert good.eyes is not None
    assert good.template is not None
    logger.info("degrading %s", path.name)
    copies = []
    for degradation in DEGRADATIONS:
        for strength in degradation.strengths:
            seen = gates.see(degradation.apply(image, good.eyes, strength))
            similarity = -1.0
            if seen.template is not None:
                similarity = similarity_of(float(good.template @ seen.template), gates.engine.cosine_at_half)
            copies.append(Copy(degradation, strength, seen, similarity))
    return copies


# --- Writing it down -------------------------------------------------------------------------------------------------


def _share(which: Iterable[bool]) -> str:
    """How many per cent are true, with the interval."""
    true = list(which)
    low, high = wilson(sum(true), len(true))
    return f"{100 * sum(true) / len(true):.1f} ({100 * low:.1f}-{100 * high:.1f})" if true else "-"


def _per_cent(which: Iterable[bool]) -> str:
    true = list(which)
    return f"{100 * sum(true) / len(true):.0f}" if true else "-"


def _quantiles(values: Sequence[float], *wanted: float) -> str:
    return " / ".join(f"{value:.3g}" for value in np.percentile(values, wanted)) if values else "-"


def _codes(found: Iterable[str]) -> str:
    return ", ".join(f"`{code}` {count}" for code, count in Counter(found).most_common()) or "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines), ""]


Judged = Sequence[tuple[Photo, Seen]]


def covering_section(judged: Judged) -> list[str]:
    """How many coverings are refused, and how often with the right code."""
    rows = []
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for photo, seen in judged:
        if RIGHT_CODE[photo.label]:
            groups.setdefault((photo.label, *sorted(APART & {*photo.attributes})), []).append(seen.codes)
    for kind, mine in sorted(groups.items()):
        refused, code = [codes for codes in mine if codes], RIGHT_CODE[kind[0]]
        rows.append(
            (
                " ".join(kind),
                len(mine),
                _share(bool(codes) for codes in mine),
                _per_cent(codes[0] == code for codes in refused),
                _per_cent(code in codes for codes in refused),
                _codes(codes[0] for codes in refused if codes[0] != code),
            )
        )
    head = ("covering", "photos", "refused, %", "of them `code` right, %", "right code listed, %", "other first codes")
    return _table(head, rows)


def clean_section(judged: Judged) -> list[str]:
    """How many clean faces are accepted in each subgroup; those that the classifier learned: for quality alone."""
    groups: dict[str, list[tuple[str, ...]]] = {"all": []}
    for photo, seen in judged:
        if not RIGHT_CODE[photo.label] and not photo.learned:
            for name in ("all", *(photo.attributes or ("no attribute",))):
                groups.setdefault(name, []).append(seen.codes)
    for photo, seen in judged:
        for name in photo.attributes if photo.learned else ():
            codes = tuple(code for code in seen.codes if code not in COVERING_CODES)
            groups.setdefault(f"{name}, quality alone", []).append(codes)
    rows = (
        (name, len(mine), _share(not codes for codes in mine), _codes(codes[0] for codes in mine if codes))
        for name, mine in groups.items()
    )
    return _table(("clean faces", "photos", "accepted, %", "refused as"), rows)


def measures_section(judged: Judged, settings: Settings) -> list[str]:
    """How far ordinary photos are from the limits."""
    clean = [seen.measures for photo, seen in judged if photo.label == "none" and not photo.learned and seen.measures]
    rows = []
    for name, one in MEASURES.items():
        sign = 1 if one.low_is_bad else -1
        values = np.array([sign * measures[name] for measures in clean] or [0.0])
        beyond = _share(values < sign * one.limit(settings))
        quantiles = " / ".join(f"{value:.3g}" for value in 0.0 + sign * np.percentile(values, (0, 1, 5, 50, 95)))
        rows.append((f"`{one.code}`", one.words, one.required(settings), beyond, quantiles))
    return _table(("check", "measure", "limit", "beyond it, %", "worst / 1 / 5 / 50 / 95 % from the bad end"), rows)


def calibration_section(copies: Sequence[Copy], settings: Settings, thresholds: Sequence[float]) -> list[str]:
    """The verdicts by the similarity that is left; then each step's measure, similarity and verdict."""
    edges = (-2.0, *thresholds, thresholds[-1] + 0.1, thresholds[-1] + 0.2, 2.0)
    bands = (f"below {edges[1]:g}", *(f"{a:g}-{b:g}" for a, b in pairwise(edges[1:-1])), f"{edges[-2]:g} and above")
    rows = []
    for name in (*(one.name for one in DEGRADATIONS), "**all**"):
        mine = [copy for copy in copies if name in (copy.degradation.name, "**all**")]
        cells = [[bool(copy.seen.codes) for copy in mine if a <= copy.similarity < b] for a, b in pairwise(edges)]
        rows.append((name, *(f"{_per_cent(cell)} ({len(cell)})" for cell in cells)))
    lines = ["Refused, per cent (of how many copies), by the similarity left to the photo itself:", ""]
    lines += _table(("", *bands), rows)
    verified = tuple(f"at {one:g} or above, %" for one in thresholds)
    head = ("damage", "step", "measure 5 / 50 / 95 %", "similarity 5 / 50 %", *verified, "refused, %", "first codes")
    for name in CALIBRATED:
        one, rows = MEASURES[name], []
        lines += [f"### `{one.code}`: {one.words} {one.required(settings)}", ""]
        lines += [f"![similarity against {one.words}](checks/{name}.svg)", ""]
        for kind in (kind for kind in DEGRADATIONS if kind.measure == name):
            for strength in kind.strengths:
                mine = [copy for copy in copies if copy.degradation is kind and copy.strength == strength]
                found = [copy for copy in mine if copy.seen.measures]
                rows.append(
                    (
                        kind.name,
                        f"{kind.steps} {strength:g}",
                        _quantiles([copy.seen.measures[name] for copy in found], 5, 50, 95),
                        _quantiles([copy.similarity for copy in found], 5, 50),
                        *(_per_cent(copy.similarity >= threshold for copy in mine) for threshold in thresholds),
                        _per_cent(bool(copy.seen.codes) for copy in mine),
                        _codes(copy.seen.codes[0] for copy in mine if copy.seen.codes),
                    )
                )
        lines += _table(head, rows)
    return lines


def pose_section(people: Sequence[Judged], cosine_at_half: float, thresholds: Sequence[float]) -> list[str]:
    """Similarity of each photo to its person's most frontal one, by how far the head is turned or raised."""
    pairs: list[tuple[Mapping[str, float], float]] = []
    for person in people:
        known = [(seen.measures, seen.template) for _, seen in person if seen.template is not None]
        known.sort(key=lambda one: one[0]["yaw"] + one[0]["pitch"])
        for measures, template in known[1:]:
            pairs.append((measures, similarity_of(float(known[0][1] @ template), cosine_at_half)))
    rows = []
    for angle in ("yaw", "pitch"):
        for low, high in ((0, 10), (10, 20), (20, 30), (30, 45), (45, 90)):
            mine = [similarity for measures, similarity in pairs if low <= measures[angle] < high]
            verified = (_share(similarity >= threshold for similarity in mine) for threshold in thresholds)
            rows.append((angle, f"{low}-{high}", len(mine), _quantiles(mine, 5, 50), *verified))
    verified = (f"at {one:g} or above, %" for one in thresholds)
    return _table(("", "degrees", "pairs", "similarity 5 / 50 %", *verified), rows)


MAX_POINTS = 400  # of one kind in a figure: more are one cloud, and a large file


def draw(name: str, copies: Sequence[Copy], settings: Settings, thresholds: Sequence[float], out: Path) -> None:
    """Write an SVG of similarity against one measure: a point for each copy, the limit and the thresholds as lines."""
    shown = [copy for copy in copies if copy.degradation.measure == name and copy.seen.measures]
    limit = MEASURES[name].limit(settings)
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel=MEASURES[name].words, ylabel="similarity")
    for kind in (kind for kind in DEGRADATIONS if kind.measure == name):
        mine = [copy for copy in shown if copy.degradation is kind]
        few = mine[:: len(mine) // MAX_POINTS + 1]
        values = [copy.seen.measures[name] for copy in few]
        axes.plot(values, [copy.similarity for copy in few], ".", alpha=0.5, label=kind.name)
    axes.axvline(limit, color="black", label=f"limit: {limit:g}")
    for threshold in thresholds:
        axes.axhline(threshold, color="black", linestyle="--", label=f"similarity {threshold:g}")
    highest = np.percentile([copy.seen.measures[name] for copy in shown] or [0.0], 99)
    axes.set(xlim=(0, max(float(highest), 1.2 * limit)), ylim=(-0.2, 1.02))
    axes.grid(color="#dddddd")
    figure.legend(loc="outside right upper", frameon=False)
    with mpl.rc_context({"svg.hashsalt": "face-api"}):  # the same data give the same file
        figure.savefig(out, format="svg", metadata={"Date": None})


INTRODUCTION = """# What the checks refuse, and what they let through

How often each check refuses a photo with a covering, shut eyes or a distortion, and a clean one.
`make evaluate-checks DATA=<folder>` writes every number and figure here. It runs the real models and the real checks
with the default settings over whole photos.

To use your own photos, make a folder with a `labels.csv`, or with the
sub-folders `none`, `mask`, `sunglasses` and `other`. A folder of identities (a sub-folder per person) is optional:

    python -m benchmarks.evaluate_checks <photos> --people <identities> --model <FACE_MODEL> --out checks.md

The first model judges all folders and is calibrated. The other models judge the first folder and the identities.
Shares are in per cent, with Wilson's 95 % interval in brackets. *Quality alone*: these faces are of the training
part of their folder, so the network's verdict is left out. The photos are for research only, and none of them is
shown."""


def write_page(
    out: Path,
    folders: Mapping[str, Sequence[Photo]],
    people: Sequence[Sequence[Photo]],
    gates: Sequence[Gates],
    *,
    thresholds: Sequence[float],
    sample: int,
) -> None:
    """Run the gates over everything and write the page, and its figures into `checks/` beside it.

    Args:
        folders: labelled photos by the name of their folder.
        people: each person's photos, clean ones; counted with the first folder.
        gates: one for each engine; the first one's judge every folder and calibrate, the others' the first folder.
        thresholds: similarities at which a photo is said to verify, ascending.
        sample: from how many accepted clean photos at most copies are made.
    """
    origins = Counter(photo.origin for some in (*folders.values(), *people) for photo in some)
    lines = [INTRODUCTION, "", *_table(("source", "photos"), sorted(origins.items()))]
    for one in gates:
        title, settings = one.title, one.settings
        known = [one.judged(person) for person in people]
        clean: list[Photo] = []
        for number, (name, photos) in enumerate(folders.items()):
            if number and one is not gates[0]:
                break
            logger.info("%s: %s photos of %s", title, len(photos), name)
            judged = [*one.judged(photos), *(chain.from_iterable(known) if number == 0 else ())]
            lines += [f"## {title}: the folder `{name}`", "", *clean_section(judged), *covering_section(judged)]
            if number == 0:
                lines += measures_section(judged, settings)
                clean = [photo for photo, seen in judged if photo.label == "none" and not (photo.learned or seen.codes)]
        if one is gates[0]:
            clean = clean[:: math.ceil(len(clean) / sample) or 1]
            copies = [copy for photo in clean for copy in degraded_copies(one, photo.path)]
            lines += [f"## {title}: calibration", "", f"{len(clean)} accepted photos, degraded by known steps.", ""]
            lines += calibration_section(copies, settings, thresholds)
            lines += ["### Head pose: similarity to the most frontal photo of the same person", ""]
            lines += pose_section(known, one.engine.cosine_at_half, thresholds)
            (out.parent / "checks").mkdir(parents=True, exist_ok=True)
            for measured in CALIBRATED:
                draw(measured, copies, settings, thresholds, out.parent / "checks" / f"{measured}.svg")
    out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line: every setting is a flag, so that other limits can be tried; `.env` is not read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="+", type=Path, help="folders of labelled photos")
    parser.add_argument("--people", type=Path, help="folder of identities, a sub-folder per person")
    parser.add_argument("--model", action="append", help="a FACE_MODEL; may be repeated, the first is calibrated")
    parser.add_argument("--out", type=Path, default=PROJECT / "docs" / "checks.md", help="the page to write")
    parser.add_argument("--thresholds", nargs="+", type=float, help="similarities that verify")
    parser.add_argument("--sample", type=int, default=40, help="clean photos to degrade at most")
    add_flags(parser)
    given = vars(parser.parse_args(arguments))
    settings = load_settings(given, environ={}, env_file=None)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reader = FaceAttributesModel(settings.models_dir)
    gates = []
    for name in given["model"] or [settings.face_model]:
        engine = load_engine(
            name,
            models_dir=settings.models_dir,
            hub_timeout_s=settings.hub_timeout_s,
            threads=settings.model_threads,
            may_fall_back=True,
        )
        gates.append(Gates(engine, reader, settings, Path(name).name))
    write_page(
        given["out"],
        {folder.name: read_photos(folder) for folder in given["photos"]},
        read_people(given["people"]) if given["people"] else [],
        gates,
        thresholds=sorted(given["thresholds"] or [settings.verify_threshold]),
        sample=given["sample"],
    )


if __name__ == "__main__":
    main()
