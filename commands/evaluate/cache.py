"""Makes the template of every photo of an evaluation, and keeps templates between runs if the operator wants that."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np

from commands.bulk.processing import in_order
from commands.progress import with_progress
from engines.base import Engine, Template
from errors import FaceError
from settings import PROJECT, Settings
from store.encryption import Keyring

_REFUSED = b"refused: "  # a template of norm 1 holds no float32 with these bytes: each would be far too large


@dataclass(frozen=True)
class Outcome:
    """What became of a photo: a template, or the code of its refusal; and the digest of its bytes."""

    digest: str
    template: Template | None
    code: str | None


class Cache:
    """Outcomes by the digest of the photo's bytes: a file each, encrypted if there are keys. No folder keeps nothing.

    Args:
        folder: holds a folder for each `key`.
        key: `cache_key`.
        dimension: d of the templates.
        keyring: encrypts the files.
    """

    def __init__(self, folder: Path | None, key: str, dimension: int, keyring: Keyring) -> None:
        self._dimension, self._keyring = dimension, keyring
        self._folder = None if folder is None else folder / key
        for made in (folder, self._folder):
            if made is not None:
                made.mkdir(mode=0o700, parents=True, exist_ok=True)

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
        """Keep one outcome, in one step; only one thread may write."""
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
    """A name for everything that decides what becomes of a photo: model, limits, code and libraries."""
    files = files_behind_a_template(PROJECT)
    parts = [engine.name, engine.describe(), without_checks, limits(settings), library_versions(files)]
    digest = hashlib.sha256(repr(parts).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def files_behind_a_template(project: Path) -> list[Path]:
    """The project's files that decide which template a photo gets, or which refusal; all but the recogniser's own."""
    code = [path for room in ("photos", "engines") for path in sorted((project / room).rglob("*.py"))]
    return [*code, project / "face_checks.py", project / "pipeline.py", project / "models" / "face_attributes.onnx"]


def library_versions(files: Sequence[Path]) -> list[str]:
    """Name and version of each installed package that the Python files among `files` import."""
    imported: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_bytes())) if file.suffix == ".py" else ():
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    names = {name for module in imported for name in _installed_packages().get(module, ())}
    return sorted(f"{name} {importlib.metadata.version(name)}" for name in names)


@cache
def _installed_packages() -> Mapping[str, list[str]]:
    """Package names by the module that they install; this reads the files of every installed package."""
    return importlib.metadata.packages_distributions()


def embed_all(
    paths: Sequence[Path], embed: Callable[[bytes], Template], cache: Cache, *, at_once: int
) -> dict[Path, Outcome]:
    """Make the template of every photo that is not in the cache.

    Args:
        paths: the photos.
        embed: from a photo's bytes to its template, or a FaceError; thread-safe.
        cache: outcomes of earlier runs; each new outcome is added at once.
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
