"""A stand-in for the model hub on loopback, which serves well or badly as a test asks."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Literal

REPO = "somebody/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# How the bytes of a file are sent; the last two concern every request: "trickling" never comes to the end of a header,
# "portal" answers with a web page, as a hotel's network does.
Manner = Literal["well", "slowly", "broken_off", "reset", "wrong", "stalled", "trickling", "portal"]


class HubStandIn(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as a download needs: metadata, a redirect to storage, ranges.

    Attributes:
        url: what HF_ENDPOINT is set to.
        storage: where the hub's redirects lead.
        requests: "METHOD path" of every request, in order.
        at_first: how the first downloads go, one entry a download.
        manner: how the further ones go.
        token: where set, metadata is given to its bearer alone.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another host, as the real hub's storage is
        self.requests: list[str] = []
        self.at_first: list[Manner] = []
        self.manner: Manner = "well"
        self.token: str | None = None
        self.begun = threading.Event()
        self.closing = threading.Event()

    def downloads(self) -> list[str]:
        """The names of the files whose bytes were asked for, in order."""
        return [PurePosixPath(path).name for path in self.requests if path.startswith("GET /storage/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass

    def _answer(self) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        name = PurePosixPath(self.path).name
        content = hub.files.get(name)
        if hub.manner == "trickling":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Patience: ")
            with contextlib.suppress(ConnectionError):
                while not hub.closing.wait(0.1):
                    self.wfile.write(b".")
            self.close_connection = True
        elif hub.manner == "portal":
            self._head(200, {"Content-Type": "text/html", "Content-Length": "0"})
        elif (
            hub.token
            and not self.path.startswith("/storage/")
            and self.headers["Authorization"] != f"Bearer {hub.token}"
        ):
            self._head(401, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        elif content is None:
            self._head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        elif self.path == f"/{REPO}/resolve/main/{name}":
            self._head(
                302,
                {
                    "Location": f"{hub.storage}/storage/{name}",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Linked-Size": str(len(content)),
                    "X-Xet-Hash": "0" * 64,  # offered by the real hub: the storage protocol that we leave alone
                    "X-Xet-Refresh-Route": f"{hub.url}/api/models/{REPO}/xet-read-token/{COMMIT}",
                    "ETag": '"of-the-redirect"',
                    "Content-Length": "0",
                },
            )
        else:
            self._send(content)

    def _send(self, content: bytes) -> None:
        hub = self.server
        manner = hub.at_first.pop(0) if hub.at_first else hub.manner
        if manner == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, headers)
        content = content[start:]
        # A client that is killed or gives up in the middle is what some tests are about.
        with contextlib.suppress(ConnectionError):
            if manner == "slowly":
                step = len(content) // 10 + 1
                for at in range(0, len(content), step):
                    self.wfile.write(content[at : at + step])
                    hub.begun.set()
                    hub.closing.wait(0.3)
                return
            if manner in ("well", "wrong"):
                self.wfile.write(content)
                return
            self.wfile.write(content[: len(content) * 9 // 10])
            hub.begun.set()
            if manner == "stalled":
                hub.closing.wait()
            if manner == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextlib.contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[HubStandIn]:
    """Run a stand-in that holds these files, until the block is left."""
    hub = HubStandIn(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
