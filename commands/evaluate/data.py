"""Owns what an evaluation is made of: folders of identities, LFW's pairs, subgroups, and each photo's template."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from commands.bulk.photo_list import SUFFIXES
from commands.bulk.processing import in_order
from commands.progress import with_progress
from engines.base import Engine, Template
from errors import FaceError
from settings import PROJECT, Settings
from store.encryption import Keyring

logger = logging.getLogger(__name__)

# What decides which template a photo gets, beside the model and the settings.
_CODE = (
    *sorted(
        path.relative_to(PROJECT).as_posix() for room in ("photos", "engines") for path in (PROJECT / room).glob("*.py")
    ),
    "face_checks.py",
    "pipeline.py",
    "models/face_attributes.onnx",
)

_REFUSED = b"refused: "  # and no float of a template of norm 1, the four bytes of each being far too large


@dataclass(frozen=True)
class Pair:
    """Two photos of LFW's protocol, and whether they show one person."""

    photos: tuple[Path, Path]
    same: bool


def read_folder(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """The photos of each person, in the order of their names, and how many other files were passed over.

    Those are what is no photo, and photos that lie beside or below the folders of people.

    Raises:
        ValueError: fewer than two people.
        OSError: no such folder.
    """
    people: dict[str, list[Path]] = {}
    ignored = sum(one.is_file() and one.suffix.lower() in SUFFIXES for one in folder.iterdir())
    for person in sorted(one for one in folder.iterdir() if one.is_dir()):
        files = [Path(root, name) for root, _, names in os.walk(person) for name in names]
        photos = sorted(one for one in files if one.parent == person and one.suffix.lower() in SUFFIXES)
        ignored += len(files) - len(photos)
        if photos:
            people[person.name] = photos
    if len(people) < 2:
        raise ValueError(f"{folder} must hold a folder of photos for each of two or more people")
    return people, ignored


def read_pairs(file: Path, people: Mapping[str, Sequence[Path]]) -> list[list[Pair]]:
    """Read pairs in LFW's format: `folds pairs` first, then for each fold so many `name n n` and `name n name n`.

    Raises:
        ValueError: the file is not of that form, or names a photo (`name/name_000n.*`) that is not there.
    """
    there = {(name, photo.stem): photo for name, photos in people.items() for photo in photos}
    head, *lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()] or [[]]
    folds, each = (int(one) for one in head) if len(head) == 2 and all(map(str.isdigit, head)) else (0, 0)
    if folds < 2 or each < 1 or len(lines) != 2 * folds * each:
        raise ValueError(
            f"{file} is no list of pairs in LFW's format: its first line gives folds (2 or more) and pairs, and twice "
            f"folds x pairs lines follow; it gives {' '.join(head) or 'nothing'}, and {len(lines)} lines follow"
        )
    pairs = []
    for words in lines:
        same = len(words) == 3
        ends = [(words[0], words[1]), (words[0] if same else words[-2], words[-1])] if len(words) in (3, 4) else []
        photos = [there.get((name, f"{name}_{number:0>4}")) for name, number in ends]
        if not photos or photos[0] is None or photos[1] is None:
            raise ValueError(f"{file} names a pair that is not there: {' '.join(words)}")
        pairs.append(Pair((photos[0], photos[1]), same))
    return [pairs[start : start + 2 * each] for start in range(0, len(pairs), 2 * each)]


def read_subgroups(file: Path, people: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Read which group each person belongs to; whoever is not named belongs to none.

    Raises:
        ValueError: a column is missing, one person is in two groups, or nobody of the file has photos.
    """
    groups: dict[str, str] = {}
    with file.open(encoding="utf-8-sig", newline="") as rows:
        for row in csv.DictReader(rows):
            identity, group = ((row.get(column) or "").strip() for column in ("identity", "group"))
            if not identity or not group:
                raise ValueError(f"{file} needs the columns identity and group, both filled in every row")
            if groups.setdefault(identity, group) != group:
                raise ValueError(f"{file} puts {identity} into two groups")
    groups = {identity: group for identity, group in groups.items() if identity in people}
    if not groups:
        raise ValueError(f"{file} names nobody of whom there are photos")
    return groups


# --- From photos to templates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a photo: a template, or the code of its refusal; and the digest of its bytes."""

    digest: str
    template: Template | None
    code: str | None


class Cache:
    """Outcomes by the digest of the photo's bytes, a file each, sealed where there are keys; nothing without a folder.

    Args:
        folder: holds a folder for each `key`.
        key: `cache_key`.
        dimension: d of the templates.
        keyring: seals what is written.
    """

    def __init__(self, folder: Path | None, key: str, dimension: int, keyring: Keyring) -> None:
        self._dimension, self._keyring = dimension, keyring
        self._folder = None if folder is None else folder / key
        for one in (folder, self._folder):
            if one is not None:
                one.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, digest: str) -> Outcome | None:
        if self._folder is None:
            return None
        try:
            data = (self._folder / digest).read_bytes()
            data = self._keyring.open(data, digest) if self._keyring else data
            if data.startswith(_REFUSED):
                return Outcome(digest, None, data.removeprefix(_REFUSED).decode())
            template = np.frombuffer(data, np.float32)
        except (FileNotFoundError, ValueError):
            return None
        usable = template.shape == (self._dimension,) and abs(float(np.linalg.norm(template)) - 1) < 1e-3
        return Outcome(digest, template, None) if usable else None

    def add(self, outcome: Outcome) -> None:
        """Keep one more, whole or not at all; the caller's thread alone writes."""
        if self._folder is None:
            return
        data = _REFUSED + str(outcome.code).encode() if outcome.template is None else outcome.template.tobytes()
        partial = self._folder / "partial"
        partial.touch(mode=0o600)
        partial.write_bytes(self._keyring.seal(data, outcome.digest) if self._keyring else data)
        partial.replace(self._folder / outcome.digest)


def limits(settings: Settings) -> dict[str, float]:
    """The settings that decide which photos are refused."""
    return {
        one.name.upper(): getattr(settings, one.name) for one in fields(Settings) if one.name[:4] in ("min_", "max_")
    }


def cache_key(engine: Engine, settings: Settings, without_checks: bool) -> str:
    """A name for all that decides what becomes of a photo: model, limits, and the code itself."""
    digest = hashlib.sha256(f"{engine.name} {engine.describe()} {without_checks} {limits(settings)}".encode())
    for name in _CODE:
        digest.update((PROJECT / name).read_bytes())
    return digest.hexdigest()[:16]


def embed_all(
    paths: Sequence[Path], embed: Callable[[bytes], Template], cache: Cache, *, at_once: int
) -> dict[Path, Outcome]:
    """Make the template of every photo that the cache does not know.

    Args:
        paths: the photos.
        embed: from a photo's bytes to its template, or a FaceError; thread-safe.
        cache: what is known already; what is made is added at once.
        at_once: how many photos are in `embed` at once.

    Raises:
        OSError: a photo cannot be read.
        FaceError: `overloaded`, no photo can be decoded.
    """

    def outcome(path: Path) -> Outcome:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        known = cache.get(digest)
        if known is not None:
            return known
        try:
            return Outcome(digest, embed(data), None)
        except FaceError as refusal:
            if refusal.status >= 500:  # the machine's fault, not the photo's
                raise
            return Outcome(digest, None, refusal.code)

    outcomes: dict[Path, Outcome] = {}
    made = with_progress(in_order(outcome, paths, at_once), len(paths), "photos")
    for path, one in zip(paths, made, strict=True):
        if cache.get(one.digest) is None:
            cache.add(one)
        outcomes[path] = one
    return outcomes
