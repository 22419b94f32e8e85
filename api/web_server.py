"""Owns the production web server: listening, refusing what is no request, and stopping without losing requests."""

from __future__ import annotations

import ctypes
import json
import logging
import resource
import signal
import socket
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask
from waitress.utilities import BadRequest, Error
from waitress.wasyncore import loop

from api.responses import SECURITY_HEADERS
from errors import CODES
from settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

logger = logging.getLogger(__name__)

# What a body in chunks may have besides its content, at most, beyond a sixteenth of that. The library searches an
# unfinished chunk header anew with every packet, and takes a second for each MiB of chunks of one byte, in the one
# thread that reads all connections: 64 MiB of either took minutes.
MAX_CHUNK_HEADERS = 64 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
# Larger bodies are not even read; up to here the client gets its answer on the same connection.
READ_ANYWAY_BYTES = 64 * 1024 * 1024
# Whoever sends a byte now and then keeps a connection open for ever, and nobody has shown a key yet: a thousand of
# them, or fewer with much in hand, made a service that answered nobody. Before it comes to that, those are closed that
# have been at it for the longest; an honest upload is through long before.
MAX_CONNECTIONS = 1000
# One for each connection, one more for what it sends if that is much, and all others.
DESCRIPTORS = 3 * MAX_CONNECTIONS
MAX_BYTES_ARRIVING = 1024 * 1024 * 1024


class _NoRoomError(Error):  # type: ignore[misc]  # waitress carries no types
    code = 503
    reason = "Service Unavailable"


class _Nowhere(OverflowableBuffer):  # type: ignore[misc]  # waitress carries no types
    def append(self, data: bytes) -> None:
        """Drop what the client still sends."""


class _Parser(HTTPRequestParser):  # type: ignore[misc]  # waitress carries no types
    """Receives a request, and still answers it when the disk that a large one touches on its way is full."""

    _no_room = False
    completed = False

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.begun = time.time()

    def received(self, data: bytes) -> int:
        try:
            consumed = int(super().received(data))
        except OSError as error:
            logger.warning("A request could not be kept in UPLOADS_DIR while it arrived: %s", error.strerror)
            self._no_room = True
            # Read to its end all the same: a client that is cut off in mid-sending never sees its answer.
            self.body_rcv.buf = _Nowhere(0)
            consumed = int(super().received(data))
        if self.completed and self._no_room:
            self.error = _NoRoomError("")
        if self.error:
            self.expect_continue = False  # nobody is asked to go on who is refused already
        body = self.body_rcv
        if isinstance(body, ChunkedReceiver) and not self._no_room:
            headers = self.body_bytes_received - len(body)
            if headers > MAX_CHUNK_HEADERS + len(body) // 16:
                self.error = BadRequest("Endless chunk headers")
                self.completed = True
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Refuse what RFC 9112 has refused, because two servers in a row may read it as different requests."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            raise ParsingError("Invalid address") from error
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Two lengths")
        if self.version not in ("1.0", "1.1") or "TRANSFER_ENCODING" in self.headers:  # of 1.1 the library took it away
            raise ParsingError("A version or a coding that is not spoken here")
        if self.version == "1.1" and "," in self.headers.get("HOST", ","):
            raise ParsingError("No Host, or several")


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress carries no types
    """What the web server itself refuses (a malformed header, too large a body), worded as the API words errors."""

    def execute(self) -> None:
        status = int(self.request.error.code)
        if status == 501:  # a Transfer-Encoding that nobody has: the request's fault, which no monitor should hear of
            self.request.error = BadRequest("")
            status = 400
        known = {413: "file_too_large", 503: "overloaded"}
        code = known.get(status, "internal_error" if status >= 500 else "bad_request")
        request_id = uuid.uuid4().hex
        body = json.dumps(
            {"status": "error", "code": code, "message": CODES[code][1], "request_id": request_id}
        ).encode()
        self.status = f"{status} {self.request.error.reason}"
        self.response_headers.extend(
            [("Content-Type", "application/json"), ("X-Request-ID", request_id), ("Connection", "close")]
        )
        self.response_headers.extend(SECURITY_HEADERS.items())
        if status == 503:
            self.response_headers.append(("Retry-After", "5"))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]  # waitress carries no types
    error_task_class = _JsonErrorTask
    parser_class = _Parser


def require_free(host: str, port: int) -> None:
    """Know before the models are fetched and loaded that the address can be listened on.

    Raises:
        OSError: it cannot; the message says what to do.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, or choose another HOST or PORT"
        ) from error


def return_memory() -> None:
    """Have the C library keep little of the memory that large photos took, and take that little without new pages.

    By itself it keeps what was freed in a heap for each of many threads, and gives pages back only to ask for them
    again. After 14 photos of 40 megapixels the process held 2.4 GB, and with these limits 0.3 GB; a check of a photo
    of 12 megapixels takes 0.85 of the CPU time. The decoder's blocks for larger photos (16 MiB) go back at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 14 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def allow_descriptors() -> None:
    """Have as many open files as connections may need, where the system's first limit (often 1,024) is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def release_memory() -> None:
    """Give back what loading the models has taken and freed: of 0.87 GB with a ResNet-100 recogniser, 0.41 GB stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def serve(app: WSGIApplication, settings: Settings) -> None:
    """Serve `app` until SIGTERM or Ctrl-C, then finish the requests in hand (at most STOP_TIMEOUT_S) and return.

    Raises:
        OSError: the address cannot be listened on.
    """
    allow_descriptors()
    sockets: dict[int, Any] = {}
    create_server(
        app,
        map=sockets,
        host=settings.host,
        port=settings.port,
        threads=settings.request_threads,
        max_request_body_size=max(READ_ANYWAY_BYTES, 2 * settings.max_file_bytes),
        connection_limit=MAX_CONNECTIONS,
        channel_timeout=60,
        ident=None,
        clear_untrusted_proxy_headers=False,  # `Access` looks for them; they are believed by ProxyFix alone
    )
    listeners = [one for one in sockets.values() if isinstance(one, BaseWSGIServer)]
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    for listener in listeners:
        listener.channel_class = _Channel
        host = listener.effective_host
        logger.info("Ready: listening on http://%s:%s", f"[{host}]" if ":" in host else host, listener.effective_port)
    # poll, not select: the latter ends at 1,024 descriptors, which a crowd of slow uploads passes.
    next_look = 0.0
    while not stopping.is_set():
        loop(timeout=0.5, use_poll=True, map=sockets, count=1)
        if time.monotonic() >= next_look:
            _make_room([one for one in sockets.values() if isinstance(one, HTTPChannel)])
            next_look = time.monotonic() + 0.5
    logger.info("Stopping: finishing the requests in hand")
    for listener in listeners:
        listener.accepting = False
        sockets.pop(listener.socket.fileno(), None)
        listener.socket.close()
    deadline = time.monotonic() + settings.stop_timeout_s
    while time.monotonic() < deadline and any(_busy(one) for one in list(sockets.values())):
        loop(timeout=0.1, use_poll=True, map=sockets, count=1)
    logger.info("Stopped")


def _make_room(connections: list[Any]) -> None:
    """Before all places or too much of the disk are taken, close those that have been sending or silent for longest."""
    waiting = [one for one in connections if not one.requests]  # not those whose request is whole and being served
    places, held = len(connections), sum(one.request.body_bytes_received for one in waiting if one.request)
    if places < 0.9 * MAX_CONNECTIONS and held < MAX_BYTES_ARRIVING:
        return
    waiting.sort(key=lambda one: one.request.begun if one.request else one.last_activity)
    closed = 0
    for one in waiting:
        if places < 0.75 * MAX_CONNECTIONS and held < 0.75 * MAX_BYTES_ARRIVING:
            break
        one.will_close = True
        closed += 1
        places, held = places - 1, held - (one.request.body_bytes_received if one.request else 0)
    logger.warning("Connections were about to run out: closed the %d that had been waiting for the longest", closed)


def _busy(one: Any) -> bool:
    """Whether a connection has a request that is arriving, being served, or whose answer is still being sent."""
    return isinstance(one, HTTPChannel) and bool(one.requests or one.request is not None or one.total_outbufs_len)
