"""Runs the production web server: listens, refuses what is not a request, and stops without losing requests."""

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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask
from waitress.utilities import BadRequest, Error
from waitress.wasyncore import loop

from api.request_threads import RequestThreads
from api.responses import SECURITY_HEADERS
from errors import CODES, FaceError
from settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from api.metrics import Metrics

logger = logging.getLogger(__name__)

# The most bytes of a chunked body beside its content, beyond a sixteenth of that. The library searches an unfinished
# chunk header anew with every packet, and takes a second for each MiB of chunks of one byte, in the one thread that
# reads all connections: 64 MiB of either took minutes.
MAX_CHUNK_HEADER_BYTES = 64 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
# Larger bodies are not even read. Up to here the client gets its answer on the same connection.
READ_ANYWAY_BYTES = 64 * 1024 * 1024
# A client that sends a byte now and then keeps a connection open for ever, and needs no API key for it. A thousand of
# them, or fewer with large bodies, stopped the service. So the connections that have been sending for longest are
# closed before a limit is reached; an honest upload is over long before.
MAX_CONNECTIONS = 1000
MAX_BYTES_ARRIVING = 1024 * 1024 * 1024
# Answers that clients do not read, in all connections together; then the ones that read least recently are closed.
MAX_BYTES_UNREAD = 64 * 1024 * 1024
# Of a limit, when connections are closed, and until how much is free again.
CROWDED_SHARE, FREED_SHARE = 0.9, 0.75
# Seconds after which a connection is closed on which nothing is sent or read.
SILENT_CONNECTION_S = 60
# A connection needs a file descriptor, and one more for a large body; the models, the store and the logs need these.
DESCRIPTORS_OF_CONNECTION = 2
OTHER_DESCRIPTORS = 64
# Seconds for which no connection is accepted after one could not be.
ACCEPT_PAUSE_S = 1.0
# Seconds between two log lines about the same trouble with connections.
LOG_PAUSE_S = 60.0
# What a client that speaks TLS sends first: a handshake record of SSL 3.0 or later.
TLS_HANDSHAKE = b"\x16\x03"
# Seconds between two looks at whether decisions can be made, while they cannot.
READY_PAUSE_S = 1.0


class _NoRoomError(Error):  # type: ignore[misc]  # waitress carries no types
    code = 503
    reason = "Service Unavailable"


class _DroppingBuffer(OverflowableBuffer):  # type: ignore[misc]  # waitress carries no types
    def append(self, data: bytes) -> None:
        """Drop the rest of a body."""


class _Parser(HTTPRequestParser):  # type: ignore[misc]  # waitress carries no types
    """Receives a request. It is answered even if the disk is full that a large body needs."""

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
            # Read it to its end all the same: a client that is cut off while it sends never sees its answer.
            self.body_rcv.buf = _DroppingBuffer(0)
            consumed = int(super().received(data))
        if self.completed and self._no_room:
            self.error = _NoRoomError("")
        if self.error:
            self.expect_continue = False  # a refused client is not asked to go on
        body = self.body_rcv
        if isinstance(body, ChunkedReceiver) and not self._no_room:
            headers = self.body_bytes_received - len(body)
            if headers > MAX_CHUNK_HEADER_BYTES + len(body) // 16:
                self.error = BadRequest("Endless chunk headers")
                self.completed = True
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Refuse what RFC 9112 wants refused, because two servers in a row may read it as different requests."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            raise ParsingError("Invalid address") from error
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise ParsingError("Two lengths")
        if self.version not in ("1.0", "1.1") or "TRANSFER_ENCODING" in self.headers:  # of 1.1 the library took it away
            raise ParsingError("Unknown version or coding")
        if self.version == "1.1" and "," in self.headers.get("HOST", ","):
            raise ParsingError("No Host, or several")


class _JsonErrorTask(ErrorTask):  # type: ignore[misc]  # waitress carries no types
    """Answers what the web server itself refuses, such as a malformed header, in the form of the API's errors."""

    def execute(self) -> None:
        status = int(self.request.error.code)
        if status == 501:  # an unknown Transfer-Encoding: the client's fault, so no error of the server
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
        self.channel.server.metrics.refused(status, code)
        self.set_close_on_finish()
        self.write(body)


class _Channel(HTTPChannel):  # type: ignore[misc]  # waitress carries no types
    """A connection. Its next request is read when the answer to the one before is sent: no more than one waits."""

    error_task_class = _JsonErrorTask
    parser_class = _Parser
    requests: list[Any]
    request: Any
    sent_continue: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._unparsed = b""
        super().__init__(*arguments, **options)

    def readable(self) -> bool:
        return not self._unparsed and bool(super().readable())

    def received(self, data: bytes) -> bool:
        if data.startswith(TLS_HANDSHAKE) and self.request is None and not self._unparsed and not self.requests:
            self.server.trouble.warn("https was sent to this http port, from %s", self.addr[0])
            self.server.metrics.connection_closed("https")
            self.handle_close()
            return False
        with self.requests_lock:
            self._unparsed += data
            self._parse()
        return True

    def service(self) -> None:
        super().service()
        with self.requests_lock:
            pipelined = bool(self._unparsed)
            self._parse()
        if pipelined and self.connected:
            self.server.pull_trigger()  # for the loop, which read nothing from this connection meanwhile

    def handle_write(self) -> None:
        super().handle_write()
        with self.requests_lock:
            self._parse()

    def _parse(self) -> None:
        """Parse up to the end of one request, unless there is one, or an answer, already. Called with the lock held."""
        while self._unparsed and not self.requests and not self.total_outbufs_len:
            if self.will_close or self.close_when_flushed or not self.connected:
                self._unparsed = b""
                return
            if self.request is None:
                self.request = _Parser(self.adj)
            taken = self.request.received(self._unparsed)
            self._unparsed = self._unparsed[taken:]
            if self.request.expect_continue and self.request.headers_finished and not self.sent_continue:
                self.send_continue()
            if self.request.completed:
                self.sent_continue = False
                whole, self.request = self.request, None
                if not whole.empty:
                    self.requests.append(whole)
                    self.server.add_task(self)


class _Trouble:
    """Warns about trouble that anybody outside can cause as often as they like: one line in LOG_PAUSE_S seconds."""

    def __init__(self) -> None:
        self._next_line: dict[str, float] = {}

    def warn(self, message: str, *values: object) -> None:
        now = time.monotonic()
        if now >= self._next_line.get(message, 0.0):
            self._next_line[message] = now + LOG_PAUSE_S
            logger.warning(message, *values)


class _Listener(TcpWSGIServer):  # type: ignore[misc]  # waitress carries no types
    channel_class = _Channel

    def __init__(
        self, app: WSGIApplication, threads: RequestThreads, trouble: _Trouble, metrics: Metrics, **options: Any
    ) -> None:
        self._threads, self.trouble, self.metrics = threads, trouble, metrics
        self._accepting_from = 0.0
        super().__init__(app, dispatcher=threads, **options)

    def bind_server_socket(self) -> None:
        if self.sockinfo[3][0] == "::":  # every address, those of IPv4 too
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().bind_server_socket()

    def add_task(self, task: _Channel) -> None:
        self._threads.add(task, _NoRoomError(""))

    def readable(self) -> bool:
        return bool(super().readable()) and time.monotonic() >= self._accepting_from

    def maintenance(self, now: float) -> None:
        """Close the silent connections; one that is silent between two requests is nothing to count."""
        for one in self.active_channels.values():
            if one.request is not None and not one.will_close and one.last_activity < now - self.adj.channel_timeout:
                self.metrics.connection_closed("silent")
        super().maintenance(now)

    def handle_accept(self) -> None:
        try:
            connection, address = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptor or no memory is left: trying again at once would only burn the CPU
            self._accepting_from = time.monotonic() + ACCEPT_PAUSE_S
            self.trouble.warn("A connection cannot be accepted: %s", error.strerror)
            return
        try:
            self.set_socket_options(connection)
            self.channel_class(self, connection, address, self.adj, map=self._map)
        except OSError:  # the client is gone already
            connection.close()


def require_free(host: str, port: int) -> None:
    """Check, before the models are fetched and loaded, that the service can listen on the address.

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
    """Set the C library's limits so that it gives the memory of large photos back to the system, but keeps a little.

    By default it has one heap for each of many threads, keeps what was freed there, and otherwise gives pages back only
    to ask for them again. After 14 photos of 40 megapixels the process held 2.4 GB, and with these limits 0.3 GB; a
    check of a photo of 12 megapixels takes 0.85 of the CPU time. The decoder's blocks for larger photos (16 MiB) go
    back at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 14 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def allow_descriptors() -> int:
    """Raise the limit of open files (often 1,024 or less) as far as connections need and the system allows.

    Returns:
        How many connections the limit allows, at most MAX_CONNECTIONS.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_OF_CONNECTION * MAX_CONNECTIONS + OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    connections = (wanted - OTHER_DESCRIPTORS) // DESCRIPTORS_OF_CONNECTION
    if connections < MAX_CONNECTIONS:
        logger.warning(
            "Only %d connections at once: the limit of open files is %d (ulimit -n)", max(1, connections), wanted
        )
    return max(1, min(connections, MAX_CONNECTIONS))


def release_memory() -> None:
    """Give the system the memory that loading the models has freed: of 0.87 GB with a ResNet-100, 0.41 GB stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def serve(app: WSGIApplication, settings: Settings, require_ready: Callable[[], None], metrics: Metrics) -> None:
    """Serve `app` until SIGTERM or Ctrl-C, then finish the requests in hand (at most STOP_TIMEOUT_S) and return.

    Args:
        app: the application.
        settings: the operator's settings.
        require_ready: raises FaceError while no decision can be made.
        metrics: count what the web server refuses by itself, which the application never sees.

    Raises:
        OSError: the service cannot listen on the address, or no thread can be started.
    """
    most_connections = allow_descriptors()
    sockets: dict[int, Any] = {}
    adjustments = Adjustments(
        host=settings.host,
        port=settings.port,
        max_request_body_size=max(READ_ANYWAY_BYTES, 2 * settings.max_file_bytes),
        connection_limit=most_connections,
        channel_timeout=SILENT_CONNECTION_S,
        ident=None,
        clear_untrusted_proxy_headers=False,  # `Access` looks at them; only ProxyFix believes them
    )
    threads, trouble = RequestThreads(settings.request_threads), _Trouble()
    listeners = [
        _Listener(app, threads, trouble, metrics, map=sockets, adj=adjustments, sockinfo=sockinfo)
        for sockinfo in adjustments.listen
    ]
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    urls = " and ".join(_url_of(listener) for listener in listeners)
    paths = ["/try", "/docs"] if settings.try_page == "on" else ["/docs"]
    pages = ", ".join(f"{_url_of(listeners[0])}{path}" for path in paths)
    threading.Thread(
        target=_announce, args=(urls, pages, require_ready, stopping), name="announce", daemon=True
    ).start()
    # poll, not select: select ends at 1,024 descriptors, and a crowd of slow uploads has more.
    next_look = 0.0
    while not stopping.is_set():
        loop(timeout=0.5, use_poll=True, map=sockets, count=1)
        if time.monotonic() >= next_look:
            _make_room([one for one in sockets.values() if isinstance(one, HTTPChannel)], most_connections)
            if threads.refused:
                threads.refused, refused = 0, threads.refused
                logger.warning("All request threads were busy: refused %d requests", refused)
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


def _url_of(listener: _Listener) -> str:
    host = listener.effective_host
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.effective_port}"


def _announce(urls: str, pages: str, require_ready: Callable[[], None], stopping: threading.Event) -> None:
    """Log that the service is ready as soon as it can decide."""
    reason = ""
    while True:
        try:
            require_ready()
        except FaceError as error:
            if error.code != reason:
                reason = error.code
                logger.warning("Listening on %s, but no decision can be made yet: %s", urls, error.message)
        else:
            logger.info("Ready: listening on %s", urls)
            logger.info("The pages for people: %s", pages)
            return
        if stopping.wait(READY_PAUSE_S):
            return


def _make_room(connections: list[Any], most_connections: int) -> None:
    """Close the oldest idle, slow or unread connections before a limit of connections, disk or memory is reached."""
    unread = sum(one.total_outbufs_len for one in connections)
    if unread >= MAX_BYTES_UNREAD:
        behind = sorted((one for one in connections if one.total_outbufs_len), key=lambda one: one.last_activity)
        _close(behind, lambda one: one.total_outbufs_len, unread - FREED_SHARE * MAX_BYTES_UNREAD, "unread answers")
    # A request that is complete and being served is not idle.
    idle = sorted(
        (one for one in connections if not one.requests),
        key=lambda one: one.request.begun if one.request else one.last_activity,
    )
    if len(connections) >= CROWDED_SHARE * most_connections:
        _close(idle, lambda _: 1, len(connections) - FREED_SHARE * most_connections, "connections")
    arriving = sum(_bytes_arriving(one) for one in idle)
    if arriving >= MAX_BYTES_ARRIVING:
        _close(idle, _bytes_arriving, arriving - FREED_SHARE * MAX_BYTES_ARRIVING, "unfinished uploads")


def _bytes_arriving(connection: Any) -> int:
    return connection.request.body_bytes_received if connection.request else 0


def _close(connections: list[Any], size: Callable[[Any], int], excess: float, what: str) -> None:
    """Close connections, the first ones first, until `excess` is gone by their sizes."""
    closed = 0
    for one in connections:
        if excess <= 0:
            break
        excess -= size(one)
        one.will_close = True
        one.server.metrics.connection_closed(what)
        closed += 1
    if closed:
        logger.warning("Too many %s: closed the %d oldest connections among them", what, closed)


def _busy(one: Any) -> bool:
    """Whether a connection has a request that is arriving, being served, or whose answer is still being sent."""
    return isinstance(one, HTTPChannel) and bool(one.requests or one.request is not None or one.total_outbufs_len)
