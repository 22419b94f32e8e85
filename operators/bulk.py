"""Owns many photos at once: finding them, taking them through the pipeline, and a report that can be gone on with."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from covering import CoveringModel
from engine import Engine, Vector
from errors import FaceError
from pipeline import ModelSlots, Pipeline
from settings import PROJECT, Settings

logger = logging.getLogger("face_api")

Item = TypeVar("Item")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


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
    template: Vector | None
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
        found = [Photo(path, None) for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES]
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
        raise ValueError(f"there is no photo in {source}")
    if len({photo.path for photo in found}) < len(found):
        raise ValueError(f"{source} names a photo twice")
    return found


def one_thread_each(settings: Settings) -> Settings:
    """The same settings for a bulk: a photo on every core rather than every core on a photo."""
    if settings.model_threads:
        return settings
    return replace(settings, model_threads=1, model_slots=min(os.cpu_count() or 1, settings.request_threads - 1),
                   queue_limit=0)  # fmt: skip


def made_of(photos: Sequence[Photo], engine: Engine, settings: Settings) -> Iterator[Made]:
    """Take photos through the service's own pipeline, as many at once as there are model slots, in their order."""
    slots = ModelSlots(settings.model_slots, settings.queue_limit)
    pipeline = Pipeline(settings, engine, CoveringModel(PROJECT / "models"), slots)

    def made(photo: Photo) -> Made:
        try:
            with photo.path.open("rb") as file:
                data = file.read(settings.max_file_bytes + 1)
        except OSError:
            return Made(photo, "", None, FaceError("unreadable_image", "unreadable_file"))
        digest = hashlib.sha256(data).hexdigest()
        try:
            return Made(photo, digest, pipeline.template(data), None)
        except FaceError as refusal:
            return Made(photo, digest, None, refusal)

    workers = ThreadPoolExecutor(settings.model_slots)
    running: deque[Future[Made]] = deque()
    try:
        for photo in photos:
            running.append(workers.submit(made, photo))
            # A few more than are in the models, so that none waits for the one whose turn it is to be handed on.
            if len(running) >= 4 * settings.model_slots:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        workers.shutdown(cancel_futures=True)


class Report:
    """A CSV with one line for each photo that is done; what is in it already is not done again.

    Raises:
        OSError: it cannot be read or written.
        ValueError: the file is another one.
    """

    def __init__(self, path: Path) -> None:
        self._columns = [field.name for field in fields(Line)]
        self.lines: dict[str, Line] = {}
        if path.exists() and path.stat().st_size:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a line that a kill cut off is written anew
            rows = list(csv.reader(whole.decode("utf-8").splitlines()))
            if not rows or rows[0] != self._columns:
                raise ValueError(f"{path} is no report of this command")
            self.lines = {row[0]: Line(*row) for row in rows[1:]}
            os.truncate(path, len(whole))
        self._file = path.open("a", newline="", encoding="utf-8")
        path.chmod(0o600)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not self.lines and path.stat().st_size == 0:
            self._writer.writerow(self._columns)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

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


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: between two steps, with what is done written down."""
    import signal  # noqa: PLC0415 - the service's own handling is server.py's

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def watched(items: Iterable[Item], total: int, what: str = "photos") -> Iterator[Item]:
    """Pass the items on, and tell how far it is: in place on a terminal, else by a log line every half minute."""
    begun = told = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= (0.2 if terminal else 30.0) or (terminal and done == total):
            left = (now - begun) / done * (total - done)
            text = f"{done} of {total} {what}, {done / (now - begun):.1f} a second, {left / 60:.0f} min left"
            if terminal:
                sys.stderr.write(f"\r{text}\x1b[K" + ("\n" if done == total else ""))
                sys.stderr.flush()
            else:
                logger.info("%s", text)
            told = now
