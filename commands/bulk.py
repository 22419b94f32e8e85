"""Owns many photos at once: finding them, taking them through the pipeline, and a report that can be gone on with."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from engines.base import Engine, Template
from engines.covering import CoveringModel
from errors import FaceError
from photos.decoder_pool import Decoders
from pipeline import ModelSlots, Pipeline
from settings import PROJECT, Settings

logger = logging.getLogger("face_api")

Item = TypeVar("Item")
Result = TypeVar("Result")

# Files with other names are not meant as photos; what the service makes of one of these is reported.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif")
# Codes of a report's lines, beside those of refusals.
DONE = ("enrolled", "reembedded")


@dataclass(frozen=True)
class Photo:
    """One photo of a bulk: where it is, and the id that its CSV gives it (None without)."""

    path: Path
    label: str | None


@dataclass(frozen=True)
class Made:
    """What became of one photo: a template, or the error that refused it. `digest` is the file's SHA-256."""

    photo: Photo
    digest: str
    template: Template | None
    error: FaceError | None


@dataclass(frozen=True)
class Line:
    """One line of a report."""

    path: str
    sha256: str
    code: str
    user_id: str
    message: str


def photos_of(source: Path) -> list[Photo]:
    """Find the photos of a folder (by their suffix, with its sub-folders) or of a CSV (path, and perhaps an id).

    A CSV's relative paths start at its folder; a first line that names its columns is left out.

    Raises:
        ValueError: there is no photo, or a path twice.
        OSError: the folder or the file cannot be read.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        found = [Photo(path, None) for path in files if path.suffix.lower() in SUFFIXES]
        if len(found) < len(files):
            logger.info("Passed over, having no name of a photo: %d files", len(files) - len(found))
    else:
        with source.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row and row[0].strip()]
        if rows and rows[0][0].strip().lower() in ("path", "file", "photo"):
            rows = rows[1:]
        found = [
            Photo(source.parent / row[0].strip(), row[1].strip() if len(row) > 1 and row[1].strip() else None)
            for row in rows
        ]
    if not found:
        raise ValueError(f"there is no photo in {source} ({', '.join(SUFFIXES)})")
    if len({photo.path for photo in found}) < len(found):
        raise ValueError(f"{source} names a photo twice")
    return found


def one_thread_each(settings: Settings) -> Settings:
    """The same settings for a bulk: a photo on every core rather than every core on a photo."""
    if settings.model_threads:
        return settings
    return replace(settings, model_threads=1, model_slots=min(os.cpu_count() or 1, settings.request_threads - 1),
                   queue_limit=0)  # fmt: skip


@contextmanager
def pipeline_of(engine: Engine, settings: Settings) -> Iterator[Pipeline]:
    """The service's own pipeline with decoders of its own, so that one bad photo ends no bulk.

    Raises:
        OSError: no photo can be decoded.
    """
    slots = ModelSlots(settings.model_slots, settings.queue_limit)
    with closing(Decoders(settings.model_slots, settings.max_image_pixels)) as decoders:
        decoders.require_working()
        yield Pipeline(settings, engine, CoveringModel(PROJECT / "models"), slots, decode=decoders.decode)


def made_of(photos: Sequence[Photo], engine: Engine, settings: Settings) -> Iterator[Made]:
    """Take photos through the service's own pipeline, as many at once as there are model slots, in their order."""

    def made(photo: Photo) -> Made:
        try:
            data = _read(photo, settings)
        except OSError:
            return Made(photo, "", None, FaceError("unreadable_image", "unreadable_file"))
        digest = hashlib.sha256(data).hexdigest()
        try:
            return Made(photo, digest, pipeline.template(data), None)
        except FaceError as refusal:
            if refusal.status >= 500:  # the machine's fault, not the photo's
                raise
            return Made(photo, digest, None, refusal)

    with pipeline_of(engine, settings) as pipeline:
        yield from in_order(made, photos, settings.model_slots)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Iterator[Result]:
    """Do the work in so many threads; the results come in the order of the items."""
    workers = ThreadPoolExecutor(at_once)
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(workers.submit(work, item))
            # A few more than are worked on, so that none waits for the one whose turn it is to be handed on.
            if len(running) >= 4 * at_once:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        workers.shutdown(cancel_futures=True)


def _read(photo: Photo, settings: Settings) -> bytes:
    """A photo's bytes, and of a file that is too large no more than shows it."""
    with photo.path.open("rb") as file:
        return file.read(settings.max_file_bytes + 1)


class Report:
    """A CSV with one line for each photo that is done, so that it is not done again; of several the last counts.

    Raises:
        OSError: it cannot be read or written.
        ValueError: the file is another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = [field.name for field in fields(Line)]
        self.lines: dict[str, Line] = {}
        if path.exists() and path.stat().st_size:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a line that a kill cut off is written anew
            rows = list(csv.reader(io.StringIO(whole.decode("utf-8", "surrogateescape"), newline="")))
            if not rows or rows[0] != self._columns or any(len(row) != len(self._columns) for row in rows):
                raise ValueError(f"{path} is no report of this command")
            self.lines = {row[0]: Line(*row) for row in rows[1:]}
            os.truncate(path, len(whole))
        # Not every file's name is text.
        self._file = path.open("a", newline="", encoding="utf-8", errors="surrogateescape")
        path.chmod(0o600)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not self.lines and path.stat().st_size == 0:
            self._writer.writerow(self._columns)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def refused(self, photo: Photo, settings: Settings) -> bool:
        """Whether this very photo was refused, and not another one under its name."""
        line = self.lines.get(str(photo.path))
        if line is None or line.code in DONE:
            return False
        try:
            return line.sha256 == hashlib.sha256(_read(photo, settings)).hexdigest()
        except OSError:
            return not line.sha256

    def add(self, lines: Iterable[Line]) -> None:
        """Add lines, durably."""
        for line in lines:
            self.lines[line.path] = line
            self._writer.writerow([line.path, line.sha256, line.code, line.user_id, line.message])
        self._file.flush()
        os.fsync(self._file.fileno())

    def counts(self) -> str:
        """How many photos came to which end, for people."""
        counted = Counter(line.code for line in self.lines.values())
        return "".join(f"{count:8} {code}\n" for code, count in counted.most_common())
