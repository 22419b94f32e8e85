"""Runs the service as a process of its own, for tests that use it over its socket."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from settings import PROJECT
from tests.support.fakes import packaged

ASTRONAUT = packaged("skimage", "data", "astronaut.png")
GROUP = packaged("insightface", "data", "images", "t1.jpg")


def one_of_the_group(left: int, top: int) -> bytes:
    """The 270 x 320 pixels of the group photo from there on."""
    file = io.BytesIO()
    Image.open(io.BytesIO(GROUP)).crop((left, top, left + 270, top + 320)).save(file, "PNG")
    return file.getvalue()


SOMEBODY, SOMEBODY_ELSE = one_of_the_group(384, 176), one_of_the_group(645, 250)


class Service:
    """`python app.py` on a free port, with the compact model, its own store and its own uploads folder."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.uploads = folder / "uploads"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MONGO_"))},
            "FACE_MODEL": "compact",
            "MONGO_URI": "",
            "DATA_DIR": str(folder / "data"),
            "UPLOADS_DIR": str(self.uploads),
            "PORT": "0",
            "HOST": "127.0.0.1",
            "DEBUG": "false",
            "LOG_FORMAT": "text",
            "LOG_LEVEL": "INFO",
            **settings,
        }
        self.lines: list[str] = []
        self._news = threading.Condition()

    def start(self) -> None:
        self.begin()
        ready = self.wait_for_line("Ready: listening on ")
        self.url = ready.split("listening on ")[1].strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def begin(self) -> None:
        """Start it without waiting until it is ready."""
        self.process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=PROJECT, env=self.environment, stderr=subprocess.PIPE, text=True
        )
        self.lines.clear()
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self.lines.append("(the process has ended)")
            self._news.notify_all()

    def wait_for_line(self, part: str) -> str:
        def found() -> str | None:
            return next((line for line in self.lines if part in line or "has ended" in line), None)

        with self._news:
            line = self._news.wait_for(found, 60)
        assert line is not None
        assert part in line, "".join(self.lines)
        return line

    def stop(self) -> None:
        """Stop it as an operator does, and wait for that."""
        self.process.terminate()
        assert self.process.wait(60) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def post(self, route: str, photo: bytes = ASTRONAUT, **options: Any) -> requests.Response:
        options.setdefault("files", {"file": ("photo.png", photo)})
        return requests.post(self.url + route, timeout=60, **options)

    def raw(self, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send these very bytes; returns status, headers and body of the answer."""
        with self.connect(sent) as connection:
            return read_answer(connection)

    def connect(self, sent: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), 30)
        connection.sendall(sent)
        return connection


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers: dict[str, str] = {}
        while line := stream.readline().strip():
            name, value = line.decode().split(":", 1)
            headers[name.lower()] = value.strip()
        return status, headers, stream.read(int(headers["content-length"]))
