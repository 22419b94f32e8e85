"""Owns what an evaluation is made of: folders of identities, LFW's pairs, subgroups, and each photo's template."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np

from engine import Engine, Vector
from errors import FaceError
from operators.bulk import SUFFIXES
from operators.progress import watched
from sealing import Keyring
from settings import PROJECT, Settings

logger = logging.getLogger("face_api")

# What decides which template a photo gets, beside the model and the settings.
_CODE = (
    *("images.py", "resampling.py", "insightface_engine.py", "compact_engine.py"),
    *("face_checks.py", "covering.py", "pipeline.py", "models/covering.onnx"),
)

Item = TypeVar("Item")


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
    template: Vector | None
    code: str | None


class Cache:
    """Outcomes by the digest of the photo's bytes, in a file of its own for each key; in memory alone without a folder.

    A line of JSON each, appended at once, so that a run that is killed loses what it had in hand and no more. The
    templates are sealed where there are keys.
    """

    def __init__(self, folder: Path | None, key: str, dimension: int, keyring: Keyring) -> None:
        self._keyring = keyring
        self._known: dict[str, Outcome] = {}
        self._file = None
        if folder is None:
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"templates-{key}.jsonl"
        torn = False
        if path.exists():
            data = path.read_bytes()
            torn = not data.endswith(b"\n")
            for line in data.splitlines():
                outcome = _outcome_of(line, dimension, keyring)
                if outcome is not None:
                    self._known[outcome.digest] = outcome
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="ascii")
        if torn:
            self._file.write("\n")

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, digest: str) -> Outcome | None:
        return self._known.get(digest)

    def add(self, outcome: Outcome) -> None:
        """Keep one more; the caller's thread alone writes."""
        if outcome.digest in self._known:
            return
        self._known[outcome.digest] = outcome
        if self._file is not None:
            template = None
            if outcome.template is not None:
                raw = outcome.template.tobytes()
                sealed = self._keyring.seal(raw, outcome.digest) if self._keyring else raw
                template = base64.b64encode(sealed).decode()
            line = {"digest": outcome.digest, "code": outcome.code, "template": template}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _outcome_of(line: bytes, dimension: int, keyring: Keyring) -> Outcome | None:
    """Read a line of the cache; None if a kill cut it off, or if it does not open with these keys."""
    try:
        entry = json.loads(line)
        if entry["template"] is None:
            return Outcome(entry["digest"], None, str(entry["code"]))
        raw = base64.b64decode(entry["template"], validate=True)
        template = np.frombuffer(keyring.open(raw, entry["digest"]) if keyring else raw, np.float32)
    except (ValueError, KeyError, TypeError):
        return None
    usable = template.shape == (dimension,) and abs(float(np.linalg.norm(template)) - 1) < 1e-3
    return Outcome(entry["digest"], template, None) if usable else None


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
    paths: Sequence[Path], embed: Callable[[bytes], Vector], cache: Cache, *, at_once: int
) -> dict[Path, Outcome]:
    """Make the template of every photo that the cache does not know.

    Args:
        paths: the photos.
        embed: from a photo's bytes to its template, or a FaceError; thread-safe.
        cache: what is known already; what is made is added at once.
        at_once: how many photos are in `embed` at once.

    Raises:
        OSError: a photo cannot be read.
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
            return Outcome(digest, None, refusal.code)

    outcomes: dict[Path, Outcome] = {}
    workers = ThreadPoolExecutor(at_once)
    try:
        for path, made in zip(paths, watched(workers.map(outcome, paths), len(paths), "photos"), strict=True):
            cache.add(made)
            outcomes[path] = made
    finally:
        workers.shutdown(cancel_futures=True)
    return outcomes
