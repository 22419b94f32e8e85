"""Takes many photos through the service's own pipeline, several at once and each in one thread."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from commands.bulk.photo_list import Photo
from engines.base import Engine, Template
from engines.face_attributes import FaceAttributesModel
from engines.model_slots import ModelSlots
from errors import FaceError
from photos.decoder_pool import Decoders
from pipeline import Pipeline, Trace
from settings import PROJECT, Settings

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ProcessedPhoto:
    """What became of one photo.

    Attributes:
        photo: the photo.
        digest: SHA-256 of its file in hexadecimal; empty if the file cannot be read.
        template: float32[d], L2-normalised; None if the photo was refused.
        error: why it was refused; None if it was not.
        quality: as `face_checks.photo_quality`; None if the photo was refused.
        restored: as `Trace.restored`.
    """

    photo: Photo
    digest: str
    template: Template | None
    error: FaceError | None
    quality: float | None = None
    restored: Sequence[Template] = ()


def one_thread_per_photo(settings: Settings) -> Settings:
    """The same settings for a bulk: a photo on every core is faster than every core on one photo."""
    if settings.model_threads:
        return settings
    slots = min(os.cpu_count() or 1, settings.photo_requests)
    return replace(settings, model_threads=1, model_slots=slots)


@contextmanager
def open_pipeline(engine: Engine, settings: Settings) -> Iterator[Pipeline]:
    """The service's own pipeline with its own decoder processes, so that one bad photo does not end the bulk.

    Raises:
        OSError: no photo can be decoded.
    """
    slots = ModelSlots(settings.model_slots, math.inf)
    with closing(Decoders(settings.model_slots, settings.max_image_pixels)) as decoders:
        decoders.require_working()
        yield Pipeline(settings, engine, FaceAttributesModel(PROJECT / "models"), slots, decoders.decode)


def process_photos(
    photos: Sequence[Photo], engine: Engine, settings: Settings, stopping: threading.Event | None = None
) -> Iterator[ProcessedPhoto]:
    """Take photos through the pipeline, as many at once as there are model slots; the results keep their order.

    Raises:
        FaceError: with a status of 500 or above: the machine cannot process photos.
    """

    def process(photo: Photo) -> ProcessedPhoto:
        try:
            data = read_photo(photo, settings)
        except OSError:
            return ProcessedPhoto(photo, "", None, FaceError("unreadable_image", "unreadable_file"))
        digest = hashlib.sha256(data).hexdigest()
        trace = Trace()
        try:
            template = pipeline.template(data, trace, new_person=True)
            return ProcessedPhoto(photo, digest, template, None, trace.quality, trace.restored)
        except FaceError as refusal:
            if refusal.status >= 500:  # the machine's fault, not the photo's
                raise
            return ProcessedPhoto(photo, digest, None, refusal)

    with open_pipeline(engine, settings) as pipeline:
        yield from in_order(process, photos, settings.model_slots, stopping)


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], at_once: int, stopping: threading.Event | None = None
) -> Iterator[Result]:
    """Do the work in `at_once` threads, and yield the results in the order of the items.

    Once `stopping` is set no work begins, and the results of the work that has begun are still yielded.
    """
    stopping = stopping or threading.Event()
    workers = ThreadPoolExecutor(at_once)
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            if stopping.is_set():
                break
            running.append(workers.submit(work, item))
            # More than are worked on, so that no thread waits while the oldest result is not ready.
            if len(running) >= 4 * at_once:
                yield running.popleft().result()
        while running:
            future = running.popleft()
            if not (stopping.is_set() and future.cancel()):
                yield future.result()
    finally:
        workers.shutdown(cancel_futures=True)


@contextmanager
def stopped_gently() -> Iterator[threading.Event]:
    """Let the work in hand end at Ctrl-C or SIGTERM: the event is set, and KeyboardInterrupt is raised at the end.

    A second Ctrl-C interrupts at once.
    """
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping.is_set():
        raise KeyboardInterrupt


def read_photo(photo: Photo, settings: Settings) -> bytes:
    """A photo's bytes; of a file that is too large only as many as show that it is."""
    with photo.path.open("rb") as file:
        return file.read(settings.max_file_bytes + 1)
