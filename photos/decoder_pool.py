"""Owns the processes that decode photos: one that crashes, hangs or grows takes its photo with it, not the service."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from errors import FaceError
from photos import decode
from photos.decode import Photo

logger = logging.getLogger(__name__)

# What a decoder process runs: this module, found from the project's folder.
_PROJECT = Path(__file__).resolve().parent.parent
_PROGRAM = ("-m", "photos.decoder_pool")

# The slowest photo that is within the limits takes 2 s of a core, and waits longer where others want the core, too.
CPU_S, PATIENCE_S = 6, 30.0
START_PATIENCE_S = 60.0
# Of address space: the interpreter and its libraries take 0.2 GB, and the greediest decoder (of WebP with transparency)
# 22 bytes for each pixel: 1.4 GB for 40 megapixels.
BASE_BYTES, BYTES_PER_PIXEL = 384 * 2**20, 24
# No secret of the service is handed on. The allocator's limits are those of `web_server.return_memory`.
_ENVIRONMENT = {
    **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ},
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(14 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
# What comes of a process that is gone, and of an answer that no decoder in order gives.
_NO_ANSWER = (OSError, EOFError, KeyError, TypeError, ValueError, OverflowError, RecursionError)


class Decoders:
    """As many decoding processes as photos are decoded at once, each replaced when it ends.

    Args:
        count: how many.
        max_pixels: of the largest photo, by which their memory is limited.

    Raises:
        OSError: the system gives no process.
    """

    def __init__(self, count: int, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(self._started())

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, *_PROGRAM, str(self._max_pixels)]
        # A session of its own: Ctrl-C is for the service, which still needs its decoders for a while.
        return subprocess.Popen(  # noqa: S603 - it runs this very module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_PROJECT,
            env=_ENVIRONMENT,
            start_new_session=True,
        )

    def require_working(self) -> None:
        """Know before there are photos that they can be decoded; OSError if not."""
        try:
            self.decode(b"", max_bytes=1, max_pixels=1)
        except FaceError as error:
            if error.code != "empty_file":
                raise OSError("no photo can be decoded: what the decoder said is above") from error

    def decode(self, data: bytes, *, max_bytes: int, max_pixels: int, longest_side: float = math.inf) -> Photo:
        """`decode.decode` in another process; a photo that this does not survive is `unreadable_image`.

        Raises:
            FaceError: as `decode.decode`; `overloaded`: the system gives no process.
        """
        asked: dict[str, float] = {"length": len(data), "max_bytes": max_bytes, "max_pixels": max_pixels}
        if longest_side < math.inf:
            asked["longest_side"] = longest_side
        process = self._idle.get()
        try:
            if process.poll() is not None:  # it was ended while idle, which is not this photo's fault
                process = self._instead_of(process)
            try:
                with _watched(process, PATIENCE_S):
                    answer = _asked(process, asked, data, max_pixels)
            except _NO_ANSWER as error:
                process = self._instead_of(process, f"over a photo of {len(data)} bytes")
                raise FaceError("unreadable_image") from error
        finally:
            self._idle.put(process)
        if isinstance(answer, FaceError):
            raise answer
        return answer

    def _instead_of(self, process: subprocess.Popen[bytes], when: str = "while idle") -> subprocess.Popen[bytes]:
        """End a process and return another one that works; FaceError `overloaded`."""
        logger.warning("A decoder ended %s (status %d)", when, _end(process))
        try:
            another = self._started()
            with _watched(another, START_PATIENCE_S):
                _asked(another, {"length": 0, "max_bytes": 1, "max_pixels": 1}, b"", 1)
        except _NO_ANSWER as error:
            logger.error("No decoder can be started (%s): photos are turned away", type(error).__name__)  # noqa: TRY400
            raise FaceError("overloaded", headers={"Retry-After": "5"}) from error
        return another

    def close(self) -> None:
        """End the processes that are idle; one that is at work ends by itself, since nobody listens any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                _end(self._idle.get_nowait())


@contextlib.contextmanager
def _watched(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """End the process if what is done meanwhile takes longer."""
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _end(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what it was still to be told
            stream.close()  # type: ignore[union-attr]  # both are pipes
    return process.wait()


def _asked(
    process: subprocess.Popen[bytes], asked: dict[str, float], data: bytes, max_pixels: int
) -> Photo | FaceError:
    """What the process makes of a photo; nothing in its answer is trusted but that its pixels are some pixels."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    process.stdin.write(data)
    process.stdin.flush()
    answer = json.loads(process.stdout.readline(4096))
    if "code" in answer:
        return FaceError(str(answer["code"]), str(answer["sentence"]), values=answer["values"])
    height, width, reduced_by = (int(answer[name]) for name in ("height", "width", "by"))
    size = (int(answer["of_width"]), int(answer["of_height"]))
    if min(height, width, reduced_by, *size) < 1 or height * width > max_pixels:
        raise ValueError("pixels of no photo")
    pixels = process.stdout.read(3 * height * width)
    return Photo(np.frombuffer(pixels, np.uint8).reshape(height, width, 3), reduced_by, size)


def _limit(max_pixels: int) -> None:
    """What this process may take; a crash leaves no image of its memory, in which a photo would be."""
    for what, most in (
        (resource.RLIMIT_AS, BASE_BYTES + BYTES_PER_PIXEL * max_pixels),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
            resource.setrlimit(what, (most, most))


def _serve(asking: IO[bytes], answering: IO[bytes]) -> None:
    """Decode what is asked for until nobody asks any more."""
    while line := asking.readline():
        limits = json.loads(line)
        data = asking.read(limits.pop("length"))
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, hard))
        pixels: Any = b""
        try:
            photo = decode.decode(data, **limits)
            answer: dict[str, Any] = dict(zip(("height", "width"), photo.pixels.shape[:2], strict=True))
            answer |= {"by": photo.reduced_by, "of_width": photo.size[0], "of_height": photo.size[1]}
            pixels = photo.pixels.data
        except FaceError as error:
            answer = {"code": error.code, "sentence": error.sentence, "values": error.values}
        answering.write(json.dumps(answer).encode() + b"\n")
        answering.write(pixels)
        answering.flush()


if __name__ == "__main__":
    # A supervisor that stops a whole group means the service, which finishes its requests first and then lets go.
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    _limit(int(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)
