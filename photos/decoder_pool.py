"""Decodes photos in processes of their own: a photo that crashes, hangs or fills one leaves the service running."""

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
from typing import IO, TYPE_CHECKING, Any

from errors import FaceError

if TYPE_CHECKING:
    from photos.pixels import Photo

logger = logging.getLogger(__name__)

# What a decoder process runs: this module, found from the project's folder.
_PROJECT = Path(__file__).resolve().parent.parent
_PROGRAM = ("-m", "photos.decoder_pool")

# The slowest photo within the limits takes 2 s of a core. On a busy machine it waits for the core, too.
MAX_CPU_S = 6
MAX_DECODING_S = 30.0
MAX_START_S = 60.0
# Address space: the interpreter and its libraries take 0.2 GB. The most expensive decoder (WebP with transparency)
# takes 22 bytes a pixel. The limit for 40 megapixels is 1.4 GB in all.
BASE_BYTES = 384 * 2**20
BYTES_PER_PIXEL = 24
# The processes get no secret of the service. The allocator's limits are those of `web_server.return_memory`.
_ENVIRONMENT = {
    **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ},
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(14 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
# What is raised if the process is gone, or if its answer is not one of a decoder.
_NO_ANSWER = (OSError, EOFError, KeyError, TypeError, ValueError, OverflowError, RecursionError)


class Decoders:
    """Keeps one process for each photo that is decoded at the same time, and replaces a process that ends.

    Args:
        count: how many processes.
        max_pixels: pixels of the largest photo; the processes' memory is limited by it.

    Raises:
        OSError: the system starts no process.
    """

    def __init__(self, count: int, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(self._start())

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, *_PROGRAM, str(self._max_pixels)]
        # A session of its own: Ctrl-C stops the service, which needs its decoders until its last request is answered.
        return subprocess.Popen(  # noqa: S603 - it runs this very module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_PROJECT,
            env=_ENVIRONMENT,
            start_new_session=True,
        )

    def require_working(self) -> None:
        """Check at start that photos can be decoded; OSError if not."""
        try:
            self.decode(b"", max_bytes=1, max_pixels=1)
        except FaceError as error:
            if error.code != "empty_file":
                raise OSError("no photo can be decoded: the decoder's own message is above") from error

    def decode(self, data: bytes, *, max_bytes: int, max_pixels: int, longest_side: float = math.inf) -> Photo:
        """Decode as `decode.decode` does, in another process. A photo that ends the process is `unreadable_image`.

        Raises:
            FaceError: as `decode.decode`; `overloaded`: the system starts no process.
        """
        limits: dict[str, float] = {"length": len(data), "max_bytes": max_bytes, "max_pixels": max_pixels}
        if longest_side < math.inf:
            limits["longest_side"] = longest_side
        process = self._idle.get()
        try:
            if process.poll() is not None:  # it was ended while idle, which is not this photo's fault
                process = self._replace(process)
            try:
                with _time_limit(process, MAX_DECODING_S):
                    answer = _exchange(process, limits, data, max_pixels)
            except _NO_ANSWER as error:
                process = self._replace(process, f"over a photo of {len(data)} bytes")
                raise FaceError("unreadable_image") from error
        finally:
            self._idle.put(process)
        if isinstance(answer, FaceError):
            raise answer
        return answer

    def _replace(self, process: subprocess.Popen[bytes], when: str = "while idle") -> subprocess.Popen[bytes]:
        """End a process, start another one and return it; FaceError `overloaded`."""
        logger.warning("A decoder ended %s (status %d)", when, _end(process))
        try:
            another = self._start()
            with _time_limit(another, MAX_START_S):
                _exchange(another, {"length": 0, "max_bytes": 1, "max_pixels": 1}, b"", 1)
        except _NO_ANSWER as error:
            logger.error("No decoder can be started (%s): photos are refused", type(error).__name__)  # noqa: TRY400
            raise FaceError("overloaded", headers={"Retry-After": "5"}) from error
        return another

    def close(self) -> None:
        """End the idle processes. A process at work ends by itself when it finds that nobody reads its answer."""
        with contextlib.suppress(queue.Empty):
            while True:
                _end(self._idle.get_nowait())


@contextlib.contextmanager
def _time_limit(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """End the process if the body of the `with` takes longer."""
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _end(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent yet
            stream.close()  # type: ignore[union-attr]  # both are pipes
    return process.wait()


def _exchange(
    process: subprocess.Popen[bytes], limits: dict[str, float], data: bytes, max_pixels: int
) -> Photo | FaceError:
    """Send a photo and read the answer. The answer is not trusted: only its pixels are taken, as mere pixels."""
    from photos.pixels import photo_of  # noqa: PLC0415 - NumPy, which this module's processes do without

    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(limits).encode() + b"\n")
    process.stdin.write(data)
    process.stdin.flush()
    answer = json.loads(process.stdout.readline(4096))
    if "code" in answer:
        return FaceError(str(answer["code"]), str(answer["sentence"]), values=answer["values"])
    height, width, reduced_by = (int(answer[name]) for name in ("height", "width", "by"))
    size = (int(answer["of_width"]), int(answer["of_height"]))
    if min(height, width, reduced_by, *size) < 1 or height * width > max_pixels:
        raise ValueError("not the size of a photo")
    return photo_of(process.stdout.read(3 * height * width), height, width, reduced_by, size)


def _limit_resources(max_pixels: int) -> None:
    """Limit what this process may take. A crash writes no core dump, because a photo would be in it."""
    for resource_name, most in (
        (resource.RLIMIT_AS, BASE_BYTES + BYTES_PER_PIXEL * max_pixels),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        with contextlib.suppress(ValueError, OSError):  # a system without this limit
            resource.setrlimit(resource_name, (most, most))


def _serve(asking: IO[bytes], answering: IO[bytes]) -> None:
    """Decode photos until the service closes the pipe."""
    from photos import decode  # noqa: PLC0415 - the image libraries, which only these processes run

    while line := asking.readline():
        limits = json.loads(line)
        data = asking.read(limits.pop("length"))
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + MAX_CPU_S, hard))
        pixels = b""
        try:
            photo = decode.decode_bytes(data, **limits)
            answer: dict[str, Any] = {"height": photo.height, "width": photo.width, "by": photo.reduced_by}
            answer |= {"of_width": photo.size[0], "of_height": photo.size[1]}
            pixels = photo.bgr
        except FaceError as error:
            answer = {"code": error.code, "sentence": error.sentence, "values": error.values}
        answering.write(json.dumps(answer).encode() + b"\n")
        answering.write(pixels)
        answering.flush()


if __name__ == "__main__":
    # A supervisor may stop the whole group. The service finishes its requests first, and then closes the pipe.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _limit_resources(int(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)
