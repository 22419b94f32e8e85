"""The web server before a small application: unread answers, hanging requests, refusals, few descriptors."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from api import request_threads
from api.request_threads import RequestThreads
from bootstrap import explaining_missing_threads
from settings import PROJECT

LINUX = Path("/proc/self/fd").is_dir()
# /big answers a megabyte, /hang not for a minute, /metrics what Prometheus reads, and everything else at once.
SCRIPT = """
import logging, resource, sys, time
import logs
from api import request_threads, web_server
from api.metrics import Metrics
from errors import FaceError
from settings import Settings

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/hang":
        time.sleep(60)
    start_response("200 OK", [("Content-Type", "text/plain")])
    if path == "/metrics":
        return [metrics.text()[0]]
    return [b"x" * 2**20 if path == "/big" else path.encode()]

attempts = []
request_threads.LONGEST_WAIT_S = 0.3

def require_ready():
    attempts.append(1)
    if len(attempts) <= int(sys.argv[1]):
        raise FaceError("not_ready")

descriptors = int(sys.argv[3])
if descriptors:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
web_server.SILENT_CONNECTION_S = web_server.Adjustments.cleanup_interval = float(sys.argv[4])
logs.configure("text", "INFO")
metrics = Metrics("model", lambda: (0, 0), lambda: {"enrolled": 0, "last_seq": 0}, lambda: 0)
web_server.serve(app, Settings(port=0, host=sys.argv[2], request_threads=4), require_ready, metrics)
"""


class Server:
    """`web_server.serve` as a process of its own."""

    def __init__(
        self, *, host: str = "127.0.0.1", unready: int = 0, descriptors: int = 0, silent_s: float = 60
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(unready), host, str(descriptors), str(silent_s)],
            cwd=PROJECT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "Ready: " in line:
                break
        threading.Thread(target=self.lines.extend, args=(self.process.stderr,), daemon=True).start()
        self.port = int(line.rsplit(":", 1)[1])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def get(self, path: str = "/other") -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=20)

    def counted(self, metric: str) -> dict[str, float]:
        """What a metric has counted, by code or reason."""
        line = rf'^{metric}_total{{.*?(?:code|reason)="([^"]+)".*}} (\S+)$'
        found = re.findall(line, self.get("/metrics").text, re.MULTILINE)
        return {label: float(value) for label, value in found}

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def said(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode()


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    while some := connection.recv(2**16):
        received += some
    return received


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not LINUX, reason="reads Linux's /proc")
def test_answers_that_nobody_reads_take_little_memory(server: Server) -> None:
    before = server.resident_bytes()
    crowd = [server.connect() for _ in range(60)]
    for connection in crowd:
        connection.sendall(request("/big") * 200)
    for _ in range(10):
        assert server.get("/").text == "/"
        time.sleep(0.1)
    # 60 x 200 answers of a megabyte; each connection holds one, of which the system took a part.
    assert server.resident_bytes() - before < 150 * 2**20
    for connection in crowd:
        connection.close()


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with server.connect() as connection:
        sent = [f"/{number}" for number in range(500)]
        sender = threading.Thread(target=lambda: connection.sendall(b"".join(request(path) for path in sent)))
        sender.start()
        received = b""
        while received.count(b"HTTP/1.1 200") < len(sent) or not received.endswith(b"/499"):
            received += connection.recv(2**16)
        sender.join()
    assert re.findall(r"\r\n\r\n(/\d+)", received.decode()) == sent


def test_a_request_in_small_pieces_behind_another_is_answered(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(request("/one") + b"GET /tw")
        time.sleep(0.2)
        connection.sendall(b"o HTTP/1.1\r\nHo")
        time.sleep(0.2)
        connection.sendall(b"st: here\r\n\r\n")
        received = b""
        while not received.endswith(b"/two"):
            received += connection.recv(2**16)
    assert received.count(b"200 OK") == 2


def test_the_probes_are_answered_while_every_request_hangs_and_more_are_refused(server: Server) -> None:
    hanging = [server.connect() for _ in range(5)]
    for connection in hanging:
        connection.sendall(request("/hang"))
    time.sleep(0.5)
    refused = server.get("/other")
    assert (refused.json()["code"], refused.headers["Retry-After"]) == ("overloaded", "5")
    for path in ("/", "/health") * 5:
        assert server.get(path).text == path
    wait_until(lambda: server.said("All request threads were busy"))


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "bad_request"),
        (b"no request at all\r\n\r\n", "bad_request"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", "file_too_large"),
    ],
    ids=["no Host", "no HTTP", "too large"],
)
def test_what_the_web_server_refuses_by_itself_is_counted(server: Server, sent: bytes, code: str) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        assert f'"code": "{code}"'.encode() in read_all(connection)
    assert server.counted("face_requests") == {code: 1}


def test_connections_that_the_web_server_closes_are_counted_by_their_reason() -> None:
    server = Server(silent_s=0.5)
    try:
        with server.connect() as idle, server.connect() as half:
            half.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
            assert read_all(half) == read_all(idle) == b""
        with server.connect() as tls:
            tls.sendall(b"\x16\x03\x01\x00\x05hello")
            assert read_all(tls) == b""
        assert server.counted("face_connections_closed") == {"silent": 1, "https": 1}
    finally:
        server.stop()


def test_https_to_the_http_port_is_closed_at_once_with_one_line_in_the_log(server: Server) -> None:
    for _ in range(3):
        with server.connect() as connection:
            connection.sendall(bytes.fromhex("16030100c0010000bc0303") + bytes(180))
            assert connection.recv(100) == b""
    wait_until(lambda: server.said("https was sent to this http port"))  # a thread of this process reads the log
    assert len(server.said("https was sent to this http port")) == 1


@pytest.mark.skipif(not LINUX, reason="reads Linux's /proc")
def test_with_few_descriptors_connections_wait_without_noise() -> None:
    server = Server(descriptors=128)
    crowd = [server.connect() for _ in range(120)]
    time.sleep(2)
    used = sum(int(time_) for time_ in Path(f"/proc/{server.process.pid}/stat").read_text().split()[13:15])
    time.sleep(1)
    more = sum(int(time_) for time_ in Path(f"/proc/{server.process.pid}/stat").read_text().split()[13:15]) - used
    assert more < 30  # hundredths of a second
    assert len(server.lines) < 20
    assert server.said("limit of open files is 128")
    assert server.get().text == "/other"
    assert server.counted("face_connections_closed")["connections"] > 0
    for connection in crowd:
        connection.close()
    server.stop()


def test_every_address_means_those_of_ipv4_too() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = Server(host="::")
    for host in ("127.0.0.1", "[::1]"):
        assert requests.get(f"http://{host}:{server.port}/", timeout=10).status_code == 200
    server.stop()


def test_the_service_is_called_ready_only_when_it_can_decide() -> None:
    server = Server(unready=2)
    told = [line for line in server.lines if "listening on" in line.lower()]
    assert ["no decision can be made yet" in line for line in told] == [True, False]
    assert "Ready" in told[1]
    server.stop()


def test_without_a_thread_the_start_ends_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="no thread can be started"), explaining_missing_threads():
        RequestThreads(8)


def test_without_another_thread_requests_wait_for_those_that_there_are_or_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released, served = threading.Event(), list[object]()

    class Connection:
        def __init__(self) -> None:
            self.error, self.path, self.command, self.requests = None, "/other", "GET", [self]

        def service(self) -> None:
            assert self.error or released.wait(10)
            served.append(self.error)

    monkeypatch.setattr(request_threads, "LONGEST_WAIT_S", 0.1)
    threads = RequestThreads(3)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for pause in (0.0, 0.0, 0.3, 0.0, 0.0):
        threads.add(Connection(), "no room")
        time.sleep(pause)
    wait_until(lambda: served == ["no room"] * 2)
    released.set()
    wait_until(lambda: served == ["no room"] * 2 + [None] * 3)
